"""Every codec by name."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import TypeVar

from bamba_quant.codecs.base import Codec
from bamba_quant.errors import FormatError, did_you_mean

Kind = TypeVar("Kind", bound=Codec)

_registry: dict[str, Codec] = {}
_ALIASES = {"fp8": "fp8-dynamic", "int4": "w4a16-g128", "fp4": "nvfp4a16"}


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
    """The codec of a kind called ``name``, in any case; "fp8", "int4" and "fp4" are those of the commands by default.

    Raises ``FormatError`` that lists the names.
    """
    found = _registry.get(_ALIASES.get(name.lower(), name.lower()))
    if not isinstance(found, kind):
        known = [each.name for each in codecs(kind)]
        raise FormatError(
            f"unknown type {name!r}{did_you_mean(name, known)}", expected="one of " + ", ".join(known)
        )
    return found
