"""Model families, one file each; a file that registers an architecture makes it known by standing here."""

import importlib
import pkgutil

from bamba_quant.families.rules import (
    Architecture,
    Rule,
    TensorRule,
    architecture_of,
    architecture_of_gguf,
    architectures,
)

for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")

__all__ = ["Architecture", "Rule", "TensorRule", "architecture_of", "architecture_of_gguf", "architectures"]
