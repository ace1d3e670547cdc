"""Convert hybrid Mamba-2/attention checkpoints to GGUF, FP8, int4 and FP4, and measure what each file lost.

The functions of ``bamba_quant.api`` are attributes of this package. They are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bamba_quant.api import (
        convert,
        evaluate,
        export,
        imatrix,
        inspect,
        load_model,
        quantize,
        release,
        repair,
        tune,
    )

__version__ = "0.1.0"
__all__ = [
    "__version__", "convert", "evaluate", "export", "imatrix", "inspect", "load_model", "quantize", "release", "repair",
    "tune",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("bamba_quant.api"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
