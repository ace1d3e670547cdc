"""A family's tensors as a table of rules, from which plans and the checks of a checkpoint follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from bamba_quant.checkpoint import Section, StoredTensor
from bamba_quant.checkpoint.gguf_values import GgufValue
from bamba_quant.families.transforms import IDENTITY, Transform
from bamba_reference.config import Config

Shape = tuple[int, ...]
Metadata = dict[str, GgufValue]
Tensors = Mapping[str, StoredTensor]


@dataclass(frozen=True)
class Rule:
    """One kind of tensor: ``{i}`` in a name stands for the layer.

    ``name`` is the reference's. ``hf`` lists the checkpoints' spellings of it, the one to write first; without any
    they are the reference's. ``shape`` and ``gguf_shape`` (where it differs) follow from the configuration, in
    numpy's order. ``section`` (k, n) says that a checkpoint stacks this tensor as number k of n along the rows of
    each matrix. ``layers`` gives the layers that have the tensor; a name without ``{i}`` stands once. ``when`` says
    whether a configuration has the tensor at all. A rule whose ``gguf`` is None covers a tensor that GGUF has no
    place for, or that no output needs, for the reason in ``skipped``; such a tensor may also be missing, and must
    equal the one that the reference names ``equal_to``, if that is given.
    """

    name: str
    gguf: str | None
    role: str
    shape: Callable[[Config], Shape]
    gguf_shape: Callable[[Config], Shape] | None = None
    transform: Callable[[Config], Transform] = lambda config: IDENTITY
    layers: Callable[[Config], tuple[int, ...]] = lambda config: tuple(range(config.num_hidden_layers))
    when: Callable[[Config], bool] = lambda config: True
    skipped: str = ""
    equal_to: str | None = None
    hf: tuple[str, ...] = ()
    section: tuple[int, int] = (0, 1)


def spelled(rules: tuple[Rule, ...], *dialects: Mapping[str, str]) -> tuple[Rule, ...]:
    """``rules`` under a family's own names: each of its dialects replaces parts of the reference's."""
    return tuple(
        replace(rule, hf=tuple(dict.fromkeys(_replaced(rule.name, words) for words in dialects)))
        for rule in rules
    )


def _replaced(name: str, words: Mapping[str, str]) -> str:
    for word, other in words.items():
        name = name.replace(word, other)
    return name


@dataclass(frozen=True)
class TensorRule:
    """A rule with its layer and configuration filled in: one tensor of the reference.

    ``hf`` is the first of its ``spellings`` in checkpoints, ``hf_shape`` the shape there: where ``section`` is set,
    of the tensor whose rows it shares with others.
    """

    name: str
    hf: str
    spellings: tuple[str, ...]
    gguf: str | None
    role: str
    layer: int | None
    shape: Shape
    gguf_shape: Shape
    hf_shape: Shape
    section: Section | None
    transform: Transform
    skipped: str
    equal_to: str | None


def fill_rules(rules: tuple[Rule, ...], config: Config) -> tuple[TensorRule, ...]:
    """Every tensor of a model of this shape: in file order, those of a layer together."""
    present = [rule for rule in rules if rule.when(config)]
    per_layer = [rule for rule in present if "{i}" in rule.name]
    layers = {id(rule): frozenset(rule.layers(config)) for rule in per_layer}
    filled = [_fill(rule, config, None) for rule in present if "{i}" not in rule.name]
    for layer in range(config.num_hidden_layers):
        filled += (_fill(rule, config, layer) for rule in per_layer if layer in layers[id(rule)])
    return tuple(filled)


def _fill(rule: Rule, config: Config, layer: int | None) -> TensorRule:
    shape, hf_shape, section = rule.shape(config), rule.shape(config), None
    index, count = rule.section
    if count > 1:
        *stack, rows, columns = shape
        section = Section(index * rows, rows, count * rows)
        hf_shape = (*stack, count * rows, columns)
    spellings = tuple(name.format(i=layer) for name in rule.hf or (rule.name,))
    return TensorRule(
        name=rule.name.format(i=layer),
        hf=spellings[0],
        spellings=spellings,
        gguf=rule.gguf.format(i=layer) if rule.gguf is not None else None,
        role=rule.role,
        layer=layer,
        shape=shape,
        gguf_shape=rule.gguf_shape(config) if rule.gguf_shape else shape,
        hf_shape=hf_shape,
        section=section,
        transform=rule.transform(config),
        skipped=rule.skipped,
        equal_to=rule.equal_to,
    )
