"""The model card of a quantized directory: the original's with a section that says what was done to the weights."""

from __future__ import annotations

from collections.abc import Sequence

import yaml


def quantized_card(original: bytes | None, title: str, paragraphs: Sequence[str]) -> bytes:
    """README.md: ``original`` to the last byte, else a title, then a section of ``paragraphs``."""
    if original is None:
        matter = yaml.safe_dump({"library_name": "transformers", "base_model": title}, sort_keys=False)
        original = f"---\n{matter}---\n\n# {title}\n".encode()
    gap = b"" if original.endswith(b"\n\n") else b"\n" if original.endswith(b"\n") else b"\n\n"
    return original + gap + ("## Quantization\n\n" + "\n\n".join(paragraphs) + "\n").encode()
