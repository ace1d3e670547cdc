"""Hugging Face configurations of every family, one file each; a file that registers a family makes it known by
standing here.
"""

import importlib
import pkgutil

from bamba_reference.hf_configs.families import Family, families, family_of, read_hf_config

for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")

__all__ = ["Family", "families", "family_of", "read_hf_config"]
