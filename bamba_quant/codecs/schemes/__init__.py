"""Schemes of quantized safetensors, one file a family; a file that registers schemes makes them known here."""

import importlib
import pkgutil

from bamba_quant.codecs.schemes.base import (
    Ignored,
    Method,
    Part,
    Scheme,
    register,
    scheme_named,
    schemes,
)

# Packages hold compiled twins and are imported when one is asked for.
for _module in sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg):
    importlib.import_module(f"{__name__}.{_module}")

__all__ = ["Ignored", "Method", "Part", "Scheme", "register", "scheme_named", "schemes"]
