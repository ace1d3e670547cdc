"""llama-perplexity's file of logits: its bytes, its way back, and its limits."""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bamba_quant.errors import CheckpointError, OutputError
from bamba_quant.evaluation.logits_file import (
    base_blocks,
    decode_rows,
    encode_rows,
    is_logits_file,
    read_logits_file,
    writing,
)
from bamba_quant.evaluation.scores import score
from bamba_quant.inference.distributed import Ranks

CTX, CHUNKS = 9, 3
SCORED = CTX - 1 - CTX // 2


def scalar_row(row: np.ndarray) -> bytes:
    """One row as perplexity.cpp's ``log_softmax`` writes it, a float32 operation at a time."""
    f = np.float32
    highest, lowest = f(max(row)), f(min(row))
    lowest = max(lowest, f(highest - f(16)))
    total = 0.0
    for x in row:
        total += float(np.exp(f(x - highest)))
    log_total = f(math.log(total))
    least, scale = f(f(lowest - highest) - log_total), f(f(highest - lowest) / f(65535))
    words = []
    for x in row:
        step = 0
        if scale and x > lowest:
            value = f(f(f(1) / scale) * f(x - lowest)) + f(12582912)
            (bits,) = struct.unpack("<i", struct.pack("<f", value))
            step = (bits & 0x007FFFFF) - 0x00400000
        words.append(step & 0xFFFF)
    raw = struct.pack("<ff", scale, least) + struct.pack(f"<{len(words)}H", *words)
    return raw + b"\0\0" * (len(words) % 2)


@pytest.mark.parametrize("vocab_size", [1, 5, 64, 301])
def test_rows_are_llama_perplexitys_bytes(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    rows = (rng.standard_normal((40, vocab_size)) * rng.choice([0.1, 3, 20], (40, 1))).astype(np.float32)
    rows[0] = 2.5
    for row, words in zip(rows, encode_rows(rows), strict=True):
        theirs, ours = scalar_row(row), words.tobytes()
        assert len(theirs) == len(ours)
        assert theirs[:4] == ours[:4] and theirs[8:] == ours[8:]
        # exp may differ by its last bit between mathematics libraries, and the logarithm of the sum with it.
        least = [struct.unpack("<f", raw[4:8])[0] for raw in (theirs, ours)]
        assert least[0] == pytest.approx(least[1], rel=3e-7)


def test_rows_come_back_within_a_step() -> None:
    rows = 4 * np.random.default_rng(0).standard_normal((20, 333)).astype(np.float32)
    wide = rows.astype(np.float64)
    log_p = wide - np.log(np.exp(wide).sum(1, keepdims=True))
    back = decode_rows(encode_rows(rows), 333)
    kept = rows > rows.max(1, keepdims=True) - 16
    assert np.abs(back - log_p)[kept].max() <= 16 / 65535
    assert (back[~kept] >= log_p[~kept]).all()


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    tokens = rng.integers(33, size=(CHUNKS, CTX))
    rows = 3 * rng.standard_normal((CHUNKS * SCORED, 33)).astype(np.float32)
    path = tmp_path / "base.kld"
    with writing(path, tokens, 33) as write:
        for start in range(0, len(rows), 5):
            write(rows[start : start + 5])
    return path, tokens, rows


def test_the_layout_byte_by_byte(written: tuple[Path, np.ndarray, np.ndarray]) -> None:
    path, tokens, rows = written
    raw = path.read_bytes()
    assert raw[:20] == b"_logits_" + struct.pack("<Iii", CTX, 33, CHUNKS)
    assert raw[20 : 20 + 4 * tokens.size] == tokens.astype("<i4").tobytes()
    assert raw[20 + 4 * tokens.size :] == encode_rows(rows).tobytes()
    assert is_logits_file(path) and not is_logits_file(path.parent) and not is_logits_file(Path("nowhere"))


@pytest.mark.parametrize("block", [1, 5, 100])
def test_a_base_from_a_file(block: int, written: tuple[Path, np.ndarray, np.ndarray]) -> None:
    """llama-perplexity's divergence, term by term: entries down to -16 and p as the file has it."""
    path, tokens, rows = written
    file = read_logits_file(path)
    assert (file.ctx, file.vocab_size, file.chunks) == (CTX, 33, CHUNKS)
    np.testing.assert_array_equal(file.tokens, tokens)
    other = rows + np.random.default_rng(4).standard_normal(rows.shape).astype(np.float32)
    found, at = {}, 0
    lengths = [min(block, len(rows) - start) for start in range(0, len(rows), block)]
    for base in base_blocks(file, slice(0, CHUNKS), lengths, torch.device("cpu")):
        for name, values in score(base, torch.from_numpy(other[at : at + len(base.targets)])).items():
            found.setdefault(name, []).extend(values.tolist())
        at += len(base.targets)
    stored = decode_rows(encode_rows(rows), 33).astype(np.float64)
    log_p = other - np.log(np.exp(other.astype(np.float64)).sum(1, keepdims=True))
    targets = tokens[:, CTX // 2 + 1 :].ravel()
    pick = np.arange(len(targets)), targets
    terms = np.where(stored > -16, np.exp(stored) * (stored - log_p), 0)
    np.testing.assert_allclose(found["kld"], terms.sum(1), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found["nll_base"], -stored[pick], rtol=1e-9)
    np.testing.assert_allclose(found["nll"], -log_p[pick], rtol=1e-6)
    assert found["same_top"] == (encode_rows(rows)[:, 4:37].argmax(1) == other.argmax(1)).tolist()


def test_of_equally_likely_tokens_the_first_counts(tmp_path: Path) -> None:
    rows = np.zeros((SCORED, 8), np.float32)
    rows[:, [2, 5]] = 3
    with writing(tmp_path / "x", np.zeros((1, CTX), np.int64), 8) as write:
        write(rows)
    (base,) = base_blocks(read_logits_file(tmp_path / "x"), slice(0, 1), [SCORED], torch.device("cpu"))
    assert base.top[:, 0].tolist() == [2] * SCORED


HEAD = struct.Struct("<8sIii")


@pytest.mark.parametrize(
    ("ctx", "vocab_size", "chunks", "complaint"),
    [
        (CTX, 33, -1, "is not valid"),
        (CTX, 0, CHUNKS, "is not valid"),
        (2, 33, CHUNKS, "is not valid"),
        (2**32 - 1, 2**31 - 1, 2**31 - 1, "is not valid"),
        (2**26, 33, 2, "is not valid"),
        (2**25, 33, 2, "truncated"),
        (CTX, 2**31 - 1, CHUNKS, "truncated"),
        (CTX, 34, CHUNKS + 1, "truncated"),
        (CTX, 33, CHUNKS - 1, "longer than its header says"),
    ],
)
def test_headers_that_no_file_can_hold(
    ctx: int, vocab_size: int, chunks: int, complaint: str, written: tuple[Path, Any, Any]
) -> None:
    path = written[0]
    path.write_bytes(HEAD.pack(b"_logits_", ctx, vocab_size, chunks) + path.read_bytes()[HEAD.size :])
    with pytest.raises(CheckpointError, match=complaint):
        read_logits_file(path)


def test_what_is_no_file_of_logits(written: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    path, tokens, _ = written
    raw = path.read_bytes()
    for end in (-1, HEAD.size + 4 * tokens.size, HEAD.size):
        path.write_bytes(raw[:end])
        with pytest.raises(CheckpointError, match="truncated"):
            read_logits_file(path)
    for content in (raw[: HEAD.size - 1], b"", b"GGUF" + raw[4:]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a file"):
            read_logits_file(path)
    with pytest.raises(OutputError, match="exists already"), writing(path, tokens, 33) as write:
        write(np.zeros((1, 33), np.float32))
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path, tmp_path / "nowhere"):
        assert not is_logits_file(place)
        with pytest.raises(CheckpointError, match=r"cannot be read|not a regular file"):
            read_logits_file(place)


@pytest.mark.parametrize("token", [-1, 33, 2**31 - 1])
def test_tokens_outside_of_the_vocabulary(token: int, written: tuple[Path, Any, Any]) -> None:
    path = written[0]
    with path.open("r+b") as file:
        file.seek(HEAD.size + 4 * (CTX + 2))
        file.write(struct.pack("<i", token))
    with pytest.raises(CheckpointError, match=rf"outside its vocabulary(.|\n)*first of them {token}\n"):
        read_logits_file(path)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("scale", "least"),
    [(NAN, -20), (INF, -20), (-INF, -20), (-1e-4, -20), (1e-4, NAN), (1e-4, INF), (0, -INF), (1e-4, 0), (3e38, -3e38)],
)  # fmt: skip
def test_rows_that_are_no_probabilities(scale: float, least: float, written: tuple[Path, Any, Any]) -> None:
    path = written[0]
    file = read_logits_file(path)
    row = 2 * SCORED + 1
    with path.open("r+b") as stream:
        stream.seek(file.start + 2 * row * file.row_words)
        stream.write(struct.pack("<ff", scale, least))
    blocks = base_blocks(file, slice(0, CHUNKS), [3] * (CHUNKS * SCORED // 3), torch.device("cpu"))
    with pytest.raises(
        CheckpointError, match=r"does not hold logarithms of prob(.|\n)*chunk 2, scored token 1\n"
    ):
        list(blocks)


@pytest.mark.filterwarnings("error")
def test_a_row_of_signaling_nan(written: tuple[Path, Any, Any]) -> None:
    file = read_logits_file(written[0])
    with file.path.open("r+b") as stream:
        stream.seek(file.start)
        stream.write(struct.pack("<II", 0x7FA00000, 0x7FA00000))
    with pytest.raises(CheckpointError, match="does not hold logarithms"):
        next(base_blocks(file, slice(0, CHUNKS), [SCORED] * CHUNKS, torch.device("cpu")))


def test_a_file_that_shrinks_while_it_is_read(written: tuple[Path, Any, Any]) -> None:
    path = written[0]
    file = read_logits_file(path)
    blocks = base_blocks(file, slice(0, CHUNKS), [SCORED] * CHUNKS, torch.device("cpu"))
    assert len(next(blocks).targets) == SCORED
    os.truncate(path, file.start + 2 * SCORED * file.row_words + 1)
    with pytest.raises(CheckpointError, match=rf"changed while it was read.*\n.*{path}"):
        next(blocks)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be opened"):
        next(base_blocks(file, slice(0, CHUNKS), [SCORED] * CHUNKS, torch.device("cpu")))


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="were given"),
        writing(tmp_path / "x", np.zeros((1, CTX)), 8) as write,
    ):
        write(np.zeros((SCORED - 1, 8), np.float32))
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_does_not_reach_the_file(tmp_path: Path) -> None:
    """Such as one on another machine, without the first one's directory."""
    exchange: Any = SimpleNamespace(gather=lambda value: ["mark", value])
    with (
        pytest.raises(OutputError, match=r"cannot be written(.|\n)*x\n.*No such file"),
        writing(
            tmp_path / "x", np.zeros((2, CTX)), 8, part=slice(1, 2), ranks=Ranks(1, 2, _exchange=exchange)
        ),
    ):
        pytest.fail("there is nothing to write into")
    assert list(tmp_path.iterdir()) == []
