"""The small files of a quantized directory: those of the original, its configuration and card with what was done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from bamba_quant.checkpoint.config_text import with_key
from bamba_quant.checkpoint.json_file import read_bytes
from bamba_quant.writers.directory import COPIED

_CONFIG, _CARD = "config.json", "README.md"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.gguf")


def small_files(
    directory: Path, configuration: Mapping[str, Any], account: Sequence[str]
) -> tuple[dict[str, bytes], list[str]]:
    """The files by name, and the names of those in ``directory`` that are no part of a model and stay behind.

    config.json gains ``configuration`` as its quantization_config, README.md a section of the paragraphs in
    ``account``, and what else is copied keeps every byte.
    """
    config = directory / _CONFIG
    raw = read_bytes(config, "it says which model this is")
    files = {_CONFIG: with_key(raw, "quantization_config", configuration, config)}
    others: list[str] = []
    for file in sorted(directory.iterdir()):
        if file.name in (_CONFIG, _CARD) or not file.is_file():
            continue
        if any(fnmatch(file.name, pattern) for pattern in COPIED):
            files[file.name] = read_bytes(file, "it is copied")
        elif not file.name.startswith(".") and not any(fnmatch(file.name, p) for p in _WEIGHTS):
            others.append(file.name)
    card = directory / _CARD
    original = read_bytes(card, "the model card") if card.is_file() else None
    files[_CARD] = _card(original, directory.resolve().name, account)
    return files, others


def _card(original: bytes | None, title: str, account: Sequence[str]) -> bytes:
    """README.md: ``original`` to the last byte, else a title, then the section."""
    if original is None:
        matter = yaml.safe_dump({"library_name": "transformers", "base_model": title}, sort_keys=False)
        original = f"---\n{matter}---\n\n# {title}\n".encode()
    gap = b"" if original.endswith(b"\n\n") else b"\n" if original.endswith(b"\n") else b"\n\n"
    return original + gap + ("## Quantization\n\n" + "\n\n".join(account) + "\n").encode()
