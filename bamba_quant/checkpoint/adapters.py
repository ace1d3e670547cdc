"""Adapters (LoRA and others of the peft library) in a checkpoint directory, which no reader here applies."""

from __future__ import annotations

import reprlib
from pathlib import Path

from bamba_quant.errors import CheckpointError
from bamba_quant.files.json_file import read_json
from bamba_quant.files.regular_file import lexists

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = (ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin")
_MERGE = (
    "merge it: load the base model and the adapter with peft, call merge_and_unload(), then save_pretrained(), and "
    "give that directory"
)


def adapter_notes(directory: Path, *, ignore: bool) -> tuple[str, ...]:
    """A note for an adapter that is ignored; none where the directory has no adapter.

    transformers with peft installed applies an adapter that it finds beside a model. Raises ``CheckpointError``
    for an adapter that is not to be ignored, and for one without a base model.
    """
    found = [name for name in ADAPTER_FILES if lexists(directory / name)]
    if not found:
        return ()
    described = _described(directory)
    if not lexists(directory / "config.json"):
        raise CheckpointError(
            "the directory holds an adapter, not a model",
            where=directory,
            found=f"{', '.join(found)}, but no config.json; {described}",
            expected="a model's config.json and weights",
            fix=_MERGE,
        )
    if not ignore:
        raise CheckpointError(
            "an adapter is stored beside the model; transformers with peft applies it, this program does not",
            where=directory,
            found=f"{', '.join(found)}; {described}",
            fix=f"{_MERGE}; or read the base model alone with --ignore-adapter",
        )
    return (f"the adapter beside the model is not applied ({', '.join(found)}; {described})",)


def _described(directory: Path) -> str:
    """Type and base model of the adapter, as far as its configuration says."""
    try:
        config = read_json(directory / ADAPTER_CONFIG, "the adapter's configuration")
    except CheckpointError as error:
        return f"its type and base model are unknown: {error.what}"
    kind, base = (
        value if isinstance(value := config.get(key), str) and len(value) < 200 else reprlib.repr(value)
        for key in ("peft_type", "base_model_name_or_path")
    )
    return f"peft_type {kind}, base model {base}"
