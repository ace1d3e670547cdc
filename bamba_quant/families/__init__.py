"""Model families, one package each, found by existing: every package beside this file registers its family."""

import importlib
import pkgutil

from bamba_quant.families.registry import Family, families, family_of, family_of_gguf, read_config
from bamba_quant.families.rules import Rule, TensorRule

for _module in sorted(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg):
    importlib.import_module(f"{__name__}.{_module}")

__all__ = ["Family", "Rule", "TensorRule", "families", "family_of", "family_of_gguf", "read_config"]
