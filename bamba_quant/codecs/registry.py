"""Every codec by name."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import TypeVar

from bamba_quant.codecs.base import Codec
from bamba_quant.errors import FormatError

Kind = TypeVar("Kind", bound=Codec)

_registry: dict[str, Codec] = {}


def register(codec: Codec) -> None:
    """Add a codec under its name; a second one of the same name is a programming error."""
    if codec.name in _registry:
        raise ValueError(f"codec {codec.name} is registered twice")
    _registry[codec.name] = codec


def register_package(package: ModuleType) -> None:
    """Add every codec in ``CODECS`` of the packages inside ``package``; modules in them are imported when used."""
    for module in sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.ispkg):
        for codec in getattr(importlib.import_module(f"{package.__name__}.{module}"), "CODECS", ()):
            register(codec)


def codecs(kind: type[Kind]) -> tuple[Kind, ...]:
    """Every codec of a kind, ``Codec`` for all, in the order of registration; ``writable`` ones have methods."""
    return tuple(codec for codec in _registry.values() if isinstance(codec, kind))


def codec_named(name: str, kind: type[Kind]) -> Kind:
    """The codec of a kind called ``name``, in any case. Raises ``FormatError`` that lists the names."""
    found = _registry.get(name.lower())
    if not isinstance(found, kind):
        raise FormatError(
            f"unknown type {name!r}", expected="one of " + ", ".join(each.name for each in codecs(kind))
        )
    return found
