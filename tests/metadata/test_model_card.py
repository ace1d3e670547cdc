"""The front matter of a model card is read in bounded memory, whatever follows it."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from bamba_quant.errors import CheckpointError, PlanError
from bamba_quant.metadata.model_card import _MOST_BYTES, read_front_matter


def test_a_long_card_is_not_read_whole(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_bytes(b"---\nlicense: mit\n---\n" + b"x y\n" * 5_000_000)
    tracemalloc.start()
    assert read_front_matter(card) == {"license": "mit"}
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()


def test_a_character_across_the_end_of_what_is_read(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    head = b"---\nlicense: mit\n---\n"
    card.write_bytes(head.ljust(_MOST_BYTES - 1, b"\n") + "é".encode())
    assert read_front_matter(card) == {"license": "mit"}
    card.write_bytes(head + "é".encode()[:1])  # cut in two at the end of the file
    with pytest.raises(CheckpointError, match="UTF-8"):
        read_front_matter(card)


def test_front_matter_without_an_end(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit")
    assert read_front_matter(card) == {"license": "mit"}
    card.write_text("---\n" + "# \N{GRINNING FACE}\n" * 400_000)
    with pytest.raises(PlanError, match="front matter"):
        read_front_matter(card)
