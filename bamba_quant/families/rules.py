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
    """One kind of tensor. ``{i}`` in a name stands for the layer; a name without it belongs to no layer.

    ``name`` is the reference's. ``gguf`` is the name in GGUF, None for a tensor that GGUF cannot hold or that no output
    needs. ``hf`` lists the names in checkpoints, the one to write first; none means the reference's name. ``role``
    says what the tensor is for, to recipes. An ``hf`` name with ``*`` stands for a stack (E, rows, columns) whose
    matrices are tensors of their own in checkpoints: the number of the expert takes its place.

    ``shape`` follows from the configuration, and ``gguf_shape`` where that of GGUF differs; both in numpy's order.
    ``section`` (k, n) means that a checkpoint stacks this tensor as number k of n along the rows of each matrix, but
    under a name with ``*``.
    ``row_sections`` names the sections of its own rows that mean different things, with their lengths.

    ``layers`` gives the layers that have the tensor, ``when`` whether a configuration has it at all. A tensor with a
    reason in ``skipped`` is left out of every output. It may be missing, and must equal the reference's tensor
    ``equal_to``, if that is given.
    """

    name: str
    gguf: str | None
    role: str
    shape: Callable[[Config], Shape]
    gguf_shape: Callable[[Config], Shape] | None = None
    transform: Callable[[Config], Transform] = lambda config: IDENTITY
    row_sections: Callable[[Config], Mapping[str, int]] = lambda config: {}
    layers: Callable[[Config], tuple[int, ...]] = lambda config: tuple(range(config.num_hidden_layers))
    when: Callable[[Config], bool] = lambda config: True
    skipped: str = ""
    equal_to: str | None = None
    hf: tuple[str, ...] = ()
    section: tuple[int, int] = (0, 1)


def renamed(rules: tuple[Rule, ...], *names: Mapping[str, str]) -> tuple[Rule, ...]:
    """``rules`` with a family's own names, one for each of ``names``: parts of the reference's name and their
    replacements.
    """
    return tuple(
        replace(rule, hf=tuple(dict.fromkeys(_replaced(rule.name, parts) for parts in names)))
        for rule in rules
    )


def _replaced(name: str, words: Mapping[str, str]) -> str:
    for word, other in words.items():
        name = name.replace(word, other)
    return name


@dataclass(frozen=True)
class TensorRule:
    """A rule with its layer and configuration filled in: one tensor of the reference.

    ``hf`` is the first of ``hf_names``, its names in checkpoints. ``hf_shape`` is the shape under those without ``*``:
    where ``section`` is set, that of the tensor of which this one is a section.
    """

    name: str
    hf: str
    hf_names: tuple[str, ...]
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
    row_sections: Mapping[str, int]

    def stored(self, name: str) -> dict[str, Shape]:
        """The tensors of a checkpoint that hold this one under ``name``, one of ``hf_names``, with their shapes."""
        if "*" not in name:
            return {name: self.hf_shape}
        return {name.replace("*", str(matrix)): self.shape[1:] for matrix in range(self.shape[0])}


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
    hf_names = tuple(name.format(i=layer) for name in rule.hf or (rule.name,))
    return TensorRule(
        name=rule.name.format(i=layer),
        hf=hf_names[0],
        hf_names=hf_names,
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
        row_sections=rule.row_sections(config),
    )
