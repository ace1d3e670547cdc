"""Models of the Hugging Face Hub by their names: org/name, org/name@revision, hf://org/name, org/name/file.gguf."""

from __future__ import annotations

import os
from pathlib import Path

from bamba_quant.hub.reference import VIEW, parse_reference
from bamba_quant.metadata.model_name import name_of

__all__ = ["address", "local_path"]


def local_path(model: str | Path, *, headers: bool = False) -> Path:
    """``model`` if that path exists; else the snapshot, in huggingface_hub's cache, of the model of that name.

    Fetches what is needed and missing: weights, configuration, tokenizer. With ``headers`` no weights: a temporary
    directory stands for the snapshot, and headers are read by range. A string that is neither a path nor a name is
    returned as a path. Raises ``CheckpointError`` for what the Hub does not give.
    """
    if os.path.lexists(model):
        return Path(model)
    reference = parse_reference(str(model))
    if reference is None:
        return Path(model)
    from bamba_quant.hub.snapshot import fetched, view

    return (view if headers else fetched)(reference)


def address(path: Path) -> Path | str:
    """``path`` for people and programs: of a directory that ends with this process, what it stands for."""
    if not any(part.startswith(VIEW) for part in path.parts):
        return path
    name = name_of(path if path.is_dir() else path.parent)
    inside = path.as_posix().partition(f"/{name.commit}/")[2]
    return f"hf://{name.repository}@{name.commit}" + (inside and f"/{inside}")
