"""The small model that travels with the package, for the demo and the tests."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def embedded_model() -> Path:
    """Directory of bamba-mini, a trained Bamba of 4.2 million bf16 weights, as a Hugging Face checkpoint."""
    return Path(str(files("bamba_quant") / "data" / "bamba-mini"))
