"""An architecture as a table of rules: plans, their inverse and complaints about a checkpoint follow from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bamba_quant.checkpoint import Section, StoredTensor
from bamba_quant.checkpoint.gguf_values import KeyValues, Value
from bamba_quant.errors import ArchitectureError
from bamba_quant.families.runtime_compat import Loaders
from bamba_quant.families.transforms import IDENTITY, Transform
from bamba_reference.config import Config
from bamba_reference.errors import ConfigError
from bamba_reference.hf_configs import family_of
from bamba_reference.shown import shown

Shape = tuple[int, ...]
Metadata = dict[str, Value]


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


Values = KeyValues
Tensors = Mapping[str, StoredTensor]


@dataclass(frozen=True)
class Architecture:
    """A model family: which configurations are its own, its table, and what GGUF calls and needs for it.

    ``name`` is that of the reference's family. ``gguf_architectures`` are the names GGUF knows it by and
    ``gguf_name`` chooses one; ``reads_gguf`` tells a file from another family's of the same name. ``gguf_metadata``
    gives the keys below that name; ``check_gguf`` raises ``ArchitectureError`` for what llama.cpp cannot represent,
    and notes what it does a little otherwise. ``config_of_gguf`` reads key-values and tensors by name back;
    ``hf_config`` gives the config.json that transformers 4 and 5 both read, without the dtype. ``loaders`` holds what
    those of quantized checkpoints do otherwise.
    """

    name: str
    hf_architectures: tuple[str, ...]
    gguf_architectures: tuple[str, ...]
    rules: tuple[Rule, ...]
    gguf_metadata: Callable[[Config], Metadata]
    check_gguf: Callable[[Config], tuple[str, ...]]
    config_of_gguf: Callable[[Values, Tensors], Config]
    hf_config: Callable[[Config], dict[str, Any]]
    reads_gguf: Callable[[Values], bool] = lambda values: True
    gguf_name: Callable[[Config], str] | None = None
    loaders: Loaders = field(default_factory=Loaders)

    def gguf_architecture(self, config: Config) -> str:
        """What GGUF calls a model of this shape."""
        return self.gguf_architectures[0] if self.gguf_name is None else self.gguf_name(config)

    def tensors(self, config: Config) -> tuple[TensorRule, ...]:
        """Every tensor of a model of this shape: in file order, those of a layer together."""
        filled: list[TensorRule] = []
        rules = [rule for rule in self.rules if rule.when(config)]
        per_layer = [rule for rule in rules if "{i}" in rule.name]
        layers = {id(rule): frozenset(rule.layers(config)) for rule in per_layer}
        filled += (_fill(rule, config, None) for rule in rules if "{i}" not in rule.name)
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


_registry: dict[str, Architecture] = {}


def register(architecture: Architecture) -> Architecture:
    """Make an architecture known by its name and its Hugging Face class names."""
    _registry[architecture.name] = architecture
    return architecture


def architectures() -> tuple[Architecture, ...]:
    return tuple(_registry.values())


def architecture_of(hf_config: Mapping[str, Any]) -> Architecture:
    """The architecture a config.json asks for, by ``architectures``, ``model_type`` or state-spaces' own keys.

    Raises ``ArchitectureError`` listing what is supported.
    """
    classes, model_type = hf_config.get("architectures"), hf_config.get("model_type")
    if classes is None:
        classes = []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ArchitectureError(
            "the configuration's architectures is not a list of names",
            where="config.json",
            found=shown(classes),
            expected="a list of one name, or null",
        )
    try:
        return _registry[family_of(hf_config).name]
    except (ConfigError, KeyError):
        pass
    raise ArchitectureError(
        "this model's architecture is not supported",
        found=", ".join(classes) or f"model_type {shown(model_type)} and no architectures",
        expected=", ".join(name for known in _registry.values() for name in known.hf_architectures),
    )


def architecture_of_gguf(values: Values) -> Architecture:
    """The architecture that a GGUF names. Raises ``ArchitectureError`` listing what is supported."""
    name = architecture_named(values)
    for architecture in _registry.values():
        if name in architecture.gguf_architectures and architecture.reads_gguf(values):
            return architecture
    raise ArchitectureError(
        "this file's architecture is not supported",
        where=values.file,
        found=name or "no general.architecture",
        expected=", ".join(
            sorted({kind for known in _registry.values() for kind in known.gguf_architectures})
        ),
    )


def architecture_named(values: Values) -> str:
    """What a GGUF calls its architecture, "" where it does not say. Raises ``CheckpointError`` for another type."""
    return values.text("general.architecture") or ""
