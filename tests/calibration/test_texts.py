"""Calibration texts are read, cut into llama-imatrix's chunks, and split so that nothing learned from is held out."""

from __future__ import annotations

import hashlib
import lzma
import string
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bamba_quant.calibration import texts as module
from bamba_quant.calibration.texts import Text, read_texts, split_held_out, token_chunks
from bamba_quant.errors import CheckpointError
from bamba_quant.tokenizers.encoder import Encoder
from bamba_reference.packing import InputError

LETTERS = Encoder(plain=lambda text: [ord(letter) for letter in text], decode=lambda ids: "", bos=None)
WITH_BOS = Encoder(LETTERS.plain, LETTERS.decode, bos=1)


def text(content: str, name: str = "a.txt") -> Text:
    return Text(Path(name), hashlib.sha256(content.encode()).hexdigest(), content)


def test_plain_and_compressed_texts_are_the_same_text(tmp_path: Path) -> None:
    content = "Zwei Sätze.\n\nUnd noch einer.\n".encode() * 100
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.xz").write_bytes(lzma.compress(content[:500]) + lzma.compress(content[500:]))
    (plain,), (compressed,) = read_texts([tmp_path / "a.txt"]), read_texts([tmp_path / "b.xz"])
    assert plain.content == compressed.content == content.decode()
    assert plain.sha256 == compressed.sha256 == hashlib.sha256(content).hexdigest()
    with pytest.raises(CheckpointError, match="given twice"):
        read_texts([tmp_path / "a.txt", tmp_path / "b.xz"])


def test_what_is_not_such_a_text_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.xz"
    file.write_bytes(lzma.compress(b"a" * 5000)[:-20])
    with pytest.raises(CheckpointError, match="compressed text is damaged"):
        read_texts([file])
    monkeypatch.setattr("bamba_quant.inference.loading.MOST_TEXT_BYTES", 4000)
    file.write_bytes(lzma.compress(b"a" * 5000))
    with pytest.raises(CheckpointError, match="too large"):
        read_texts([file])
    with pytest.raises(CheckpointError, match="no calibration text"):
        read_texts([])


def test_one_text_gives_llama_imatrix_chunks() -> None:
    chunks = token_chunks(WITH_BOS, [text(string.ascii_lowercase)], ctx=5, limit=3)
    ids = [1, *map(ord, string.ascii_lowercase)]
    expected = np.reshape(ids[:15], (3, 5))
    expected[:, 0] = 1
    np.testing.assert_array_equal(chunks, expected)


def test_a_limit_takes_from_every_text() -> None:
    chunks = token_chunks(LETTERS, [text("a" * 80), text("b" * 40), text("c")], ctx=4, limit=6)
    assert ["".join(map(chr, row)) for row in chunks] == ["aaaa"] * 4 + ["bbbb"] * 2
    assert len(token_chunks(LETTERS, [text("a" * 80), text("b" * 40), text("c")], ctx=4)) == 30


def test_texts_that_give_no_chunk_are_refused() -> None:
    for arguments in ((4, None), (1, None), (2, 0)):
        with pytest.raises(InputError):
            token_chunks(LETTERS, [text("abc")], *arguments)


@given(
    st.lists(st.lists(st.text("abc", max_size=3), min_size=1, max_size=60), min_size=1, max_size=8),
    st.sampled_from([0.05, 0.1, 0.3]),
)
def test_both_sides_are_whole_parts_without_a_line_in_common(files: list[list[str]], fraction: float) -> None:
    texts = [text("\n".join(lines), f"{i}.txt") for i, lines in enumerate(files)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_LEAST_CHARACTERS", 8)
        try:
            learned, held = split_held_out(texts, fraction)
        except InputError:
            return
        assert split_held_out(texts, fraction) == (learned, held)
    lines = [
        {line for part in side for line in part.content.splitlines() if line.strip()}
        for side in (learned, held)
    ]
    assert lines[0] and lines[1] and lines[0].isdisjoint(lines[1])
    assert lines[0] | lines[1] == {line for lines in files for line in lines if line}


def test_the_fraction_is_held_out_in_several_places_at_blank_lines() -> None:
    paragraphs = [f"Paragraph {i}, with some words that are its own.\n" for i in range(20_000)]
    whole = text("\n".join(paragraphs))
    _, held = split_held_out([whole], 0.1)
    share = sum(len(part.content) for part in held) / len(whole.content)
    assert 0.08 < share < 0.12
    assert len(held) == 4
    assert all(part.content.startswith("Paragraph") and part.content.endswith("\n\n") for part in held)
    assert all(part.content in whole.content for part in held)
