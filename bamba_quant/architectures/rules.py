"""An architecture as a table of rules: plans, their inverse and complaints about a checkpoint follow from it."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from bamba_quant.architectures.transforms import IDENTITY, Transform
from bamba_quant.checkpoint.gguf_values import Value
from bamba_quant.errors import ArchitectureError
from bamba_reference.config import Config

Shape = tuple[int, ...]
Metadata = dict[str, Value]


@dataclass(frozen=True)
class Rule:
    """One kind of tensor: ``{i}`` in a name stands for the layer.

    ``shape`` and ``gguf_shape`` (where it differs) follow from the configuration, in numpy's order. ``layers``
    gives the layers that have the tensor; a name without ``{i}`` stands once. ``when`` says whether a
    configuration has the tensor at all. A rule whose ``gguf`` is None covers a tensor that is left out, for the
    reason in ``left_out``; such a tensor may also be missing, and must equal the tensor ``equal_to`` if that is
    given.
    """

    hf: str
    gguf: str | None
    role: str
    shape: Callable[[Config], Shape]
    gguf_shape: Callable[[Config], Shape] | None = None
    transform: Callable[[Config], Transform] = lambda config: IDENTITY
    layers: Callable[[Config], tuple[int, ...]] = lambda config: tuple(range(config.num_hidden_layers))
    when: Callable[[Config], bool] = lambda config: True
    left_out: str = ""
    equal_to: str | None = None


@dataclass(frozen=True)
class TensorRule:
    """A rule with its layer and configuration filled in: one tensor."""

    hf: str
    gguf: str | None
    role: str
    layer: int | None
    shape: Shape
    gguf_shape: Shape
    transform: Transform
    left_out: str
    equal_to: str | None


@dataclass(frozen=True)
class Architecture:
    """A model family: which configurations are its own, its table, and what GGUF calls and needs for it.

    ``gguf_metadata`` gives the keys below ``gguf_architecture``; ``check_gguf`` raises ``ArchitectureError`` for
    what llama.cpp cannot represent. ``config_of_gguf`` reads key-values and tensor names back; ``hf_config`` gives
    the config.json that transformers 4 and 5 both read, without the dtype.
    """

    name: str
    hf_architectures: tuple[str, ...]
    gguf_architecture: str
    rules: tuple[Rule, ...]
    gguf_metadata: Callable[[Config], Metadata]
    check_gguf: Callable[[Config], None]
    config_of_gguf: Callable[[Mapping[str, Value], Collection[str]], Config]
    hf_config: Callable[[Config], dict[str, Any]]

    def tensors(self, config: Config) -> tuple[TensorRule, ...]:
        """Every tensor of a model of this shape: in file order, those of a layer together."""
        filled: list[TensorRule] = []
        rules = [rule for rule in self.rules if rule.when(config)]
        per_layer = [rule for rule in rules if "{i}" in rule.hf]
        layers = {id(rule): frozenset(rule.layers(config)) for rule in per_layer}
        filled += (_fill(rule, config, None) for rule in rules if "{i}" not in rule.hf)
        for layer in range(config.num_hidden_layers):
            filled += (_fill(rule, config, layer) for rule in per_layer if layer in layers[id(rule)])
        return tuple(filled)


def _fill(rule: Rule, config: Config, layer: int | None) -> TensorRule:
    shape = rule.shape(config)
    return TensorRule(
        hf=rule.hf.format(i=layer),
        gguf=rule.gguf.format(i=layer) if rule.gguf is not None else None,
        role=rule.role,
        layer=layer,
        shape=shape,
        gguf_shape=rule.gguf_shape(config) if rule.gguf_shape else shape,
        transform=rule.transform(config),
        left_out=rule.left_out,
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
    """The architecture a config.json asks for, by ``architectures`` or else by ``model_type``.

    Raises ``ArchitectureError`` listing what is supported.
    """
    classes, model_type = hf_config.get("architectures"), hf_config.get("model_type")
    if classes is None:
        classes = []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ArchitectureError(
            "the configuration's architectures is no list of names",
            where="config.json",
            found=reprlib.repr(classes),
            expected="a list of one name, or null",
        )
    for architecture in _registry.values():
        if set(classes) & set(architecture.hf_architectures):
            return architecture
    if not classes and isinstance(model_type, str) and model_type in _registry:
        return _registry[model_type]
    raise ArchitectureError(
        "this model's architecture is not supported",
        found=", ".join(classes) or f"model_type {reprlib.repr(model_type)} and no architectures",
        expected=", ".join(name for known in _registry.values() for name in known.hf_architectures),
    )


def architecture_of_gguf(values: Mapping[str, Value]) -> Architecture:
    """The architecture a GGUF's ``general.architecture`` names. Raises ``ArchitectureError`` listing the supported."""
    name = values["general.architecture"].value if "general.architecture" in values else None
    for architecture in _registry.values():
        if architecture.gguf_architecture == name:
            return architecture
    raise ArchitectureError(
        "this file's architecture is not supported",
        found=name,
        expected=", ".join(sorted({known.gguf_architecture for known in _registry.values()})),
    )
