"""The families whose configurations are read, and which of them a configuration belongs to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from bamba_reference.config import Config
from bamba_reference.errors import ConfigError
from bamba_reference.shown import shown


@dataclass(frozen=True)
class Family:
    """``name`` is transformers' ``model_type``; ``classes`` may stand under ``architectures``.

    ``layer`` is what state-spaces' ``ssm_cfg`` calls the family, if it can. ``read`` takes a configuration and the
    keys the caller vouches for. ``keys`` are those it reads, ``inert`` those it knows to change no logit.
    """

    name: str
    classes: tuple[str, ...]
    read: Callable[[Mapping[str, Any], Collection[str]], Config]
    keys: frozenset[str]
    inert: frozenset[str]
    layer: str | None = None


_registry: dict[str, Family] = {}

# The class of state-spaces' own code, for any of the families that have a ``layer``.
_STATE_SPACES = "MambaLMHeadModel"


def register(family: Family) -> Family:
    """Make a family known by its name and classes."""
    _registry[family.name] = family
    return family


def families() -> tuple[Family, ...]:
    return tuple(_registry.values())


def family_of(hf: Mapping[str, Any]) -> Family:
    """The family of a configuration, by ``architectures``, state-spaces' own keys or ``model_type``.

    Raises ``ConfigError`` listing the classes that are supported.
    """
    classes, model_type, found = hf.get("architectures"), hf.get("model_type"), []
    if classes is not None and not (
        isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    ):
        raise ConfigError(
            "the configuration's architectures is not a list of names",
            found=shown(classes),
            expected="a list of one name, or null",
        )
    if classes and classes != [_STATE_SPACES]:
        found = [family for family in families() if any(name in family.classes for name in classes)]
    if not found and (not classes or classes == [_STATE_SPACES]):
        ssm_cfg = hf.get("ssm_cfg")
        if "d_model" in hf and "n_layer" in hf:
            layer = ssm_cfg.get("layer", "Mamba1") if isinstance(ssm_cfg, Mapping) else "Mamba1"
            found = [family for family in families() if family.layer == layer]
        elif isinstance(model_type, str):
            found = [family for family in families() if family.name == model_type]
    if found:
        return found[0]
    raise ConfigError(
        "the configuration is of no family whose forward pass is known",
        found=f"architectures {shown(classes)}, model_type {shown(model_type)}",
        expected=", ".join(name for family in families() for name in family.classes),
    )


def read_hf_config(hf: Mapping[str, Any], ignore: Collection[str]) -> Config:
    """``Config.from_hf``."""
    return family_of(hf).read(hf, ignore)
