"""The small files of a quantized directory: those of the original, its configuration and card with what was done."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from bamba_quant.checkpoint import Checkpoint
from bamba_quant.files.json_file import insert_key
from bamba_quant.files.names import CARD, CHAT_TEMPLATES, CONFIG, COPIED
from bamba_quant.files.reading import SMALL_BYTES, TOKENIZER_BYTES, check_link, lexists, read_bytes
from bamba_quant.metadata.model_name import ModelName, name_of


def small_files(
    checkpoint: Checkpoint, configuration: Mapping[str, Any], account: Sequence[str]
) -> tuple[dict[str, bytes], list[str]]:
    """The files by name, and the names of those in the directory that are not part of a model and not copied.

    config.json gains ``configuration`` as its quantization_config, README.md a section of the paragraphs in
    ``account``, and what else is copied keeps every byte. Raises ``CheckpointError`` for a file that cannot be read
    and for a symbolic link that leaves the model, unless it is config.json.
    """
    directory = checkpoint.path
    weights = {file.name for file in checkpoint.files}
    config, card = directory / CONFIG, directory / CARD
    # Wherever a link leads, this was read as the model's configuration: no other file comes into the output by it.
    files = {CONFIG: insert_key(checkpoint.config_text, "quantization_config", configuration, config)}
    others: list[str] = []
    for name in _listed(directory, weights):
        if any(fnmatch(name, pattern) for pattern in COPIED) and (directory / name).is_file():
            limit = TOKENIZER_BYTES if name.startswith("tokenizer") else SMALL_BYTES
            files[name] = _read(directory / name, directory, "it is copied", limit)
        else:
            others.append(name)
    original = _read(card, directory, "the model card", SMALL_BYTES) if lexists(card) else None
    files[CARD] = _card(original, name_of(directory), account)
    return files, others


def _listed(directory: Path, weights: Collection[str]) -> Iterator[str]:
    """Names of all that is neither read as weights nor made anew; hidden files belong to tools such as git."""
    for entry in sorted(directory.iterdir()):
        name = entry.name
        if name in weights or name in (CONFIG, CARD) or name.startswith("."):
            continue
        if entry.is_dir() and name == CHAT_TEMPLATES:
            yield from (f"{name}/{template.name}" for template in sorted(entry.iterdir()))
        elif not name.endswith((".safetensors.index.json", ".bin.index.json")):
            yield f"{name}/" if entry.is_dir() else name


def _read(file: Path, directory: Path, purpose: str, limit: int) -> bytes:
    check_link(file, directory)
    return read_bytes(file, purpose, limit)


def _card(original: bytes | None, own: ModelName, account: Sequence[str]) -> bytes:
    """README.md: ``original`` to the last byte, else a title, then the section."""
    if original is None:
        matter = yaml.safe_dump(
            {"library_name": "transformers", "base_model": own.repository}, sort_keys=False
        )
        original = f"---\n{matter}---\n\n# {own.name}\n".encode()
    gap = b"" if original.endswith(b"\n\n") else b"\n" if original.endswith(b"\n") else b"\n\n"
    return original + gap + ("## Quantization\n\n" + "\n\n".join(account) + "\n").encode()
