"""Number formats, one file a family; a file that registers a format makes it known by standing here."""

import importlib
import pkgutil

from bamba_quant.codecs.base import Format, format_named, formats

# Packages hold compiled twins and are imported when one is asked for.
for _module in sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg):
    importlib.import_module(f"{__name__}.{_module}")

__all__ = ["Format", "format_named", "formats"]
