"""A section of a stacked tensor is those rows and no others, however it is read, and whatever chunks it is cut into."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from bamba_quant.checkpoint import RawReader, Section, StoredTensor, read_tensor, row_runs
from bamba_quant.codecs import BlockCodec, codec_named
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.export import plan_export
from bamba_quant.writers import stream, write_plan
from tests.recipes.test_llama_quantize import random_imatrix
from tests.support.conversion import to_gguf
from tests.support.families import STACKED, random_case, save


@st.composite
def stacks(draw: st.DrawFn) -> tuple[int, Section, int, int]:
    """How many matrices, which section of each, and a range of the section's rows."""
    matrices, length, count = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    section = Section(draw(st.integers(0, count - 1)) * length, length, count * length)
    first = draw(st.integers(0, matrices * length))
    return matrices, section, first, draw(st.integers(first, matrices * length))


def rows_of(matrices: int, section: Section) -> np.ndarray:
    """The rows of the whole, by number, that are the section's."""
    numbers = np.arange(matrices * section.period).reshape(matrices, section.period)
    return numbers[:, section.start : section.start + section.length].reshape(-1)


@given(stacks())
def test_runs_are_the_sections_rows_in_order(stack: tuple[int, Section, int, int]) -> None:
    matrices, section, first, stop = stack
    runs = list(row_runs(section, first, stop))
    found = [place + k for _, place, count in runs for k in range(count)]
    assert found == rows_of(matrices, section)[first:stop].tolist()
    assert [row for row, _, _ in runs] == np.cumsum([first, *(count for _, _, count in runs)]).tolist()[:-1]
    assert all(count > 0 for _, _, count in runs)


@given(stacks())
def test_a_whole_tensor_is_one_run(stack: tuple[int, Section, int, int]) -> None:
    _, _, first, stop = stack
    assert list(row_runs(None, first, stop)) == [(first, first, stop - first)]


def test_sections_are_read_from_where_they_lie(tmp_path: Path) -> None:
    whole = np.random.default_rng(0).standard_normal((3, 8, 5)).astype(np.float32)
    file = tmp_path / "weights"
    file.write_bytes(b"header" + whole.tobytes())
    for start in (0, 4):
        tensor = StoredTensor("x", (3, 4, 5), codec_named("f32", BlockCodec), file, 6, Section(start, 4, 8))
        np.testing.assert_array_equal(read_tensor(tensor), whole[:, start : start + 4])
        some = np.empty(7 * 20, np.uint8)
        with RawReader() as reader:
            reader.read_rows(tensor, 20, 3, 10, some)
        expected = whole[:, start : start + 4].reshape(12, 5)[3:10]
        np.testing.assert_array_equal(some.view(np.float32).reshape(7, 5), expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_chunks_cut_experts_anywhere(threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes for chunks of any size, with an importance for each expert, there and back."""
    directory = save(random_case(*STACKED[0]), tmp_path / "m", dtype="bfloat16")
    random_imatrix(directory, tmp_path / "imatrix.gguf")
    planned = plan_conversion(
        directory,
        outtype="q4_0",
        vocab=False,
        outfile=tmp_path / "x.gguf",
        imatrix=tmp_path / "imatrix.gguf",
    )
    write_plan(planned, planned.outfile)
    plain = to_gguf(directory, tmp_path / "plain.gguf", "bf16", vocab=False)
    expected = planned.outfile.read_bytes()
    for chunk_bytes in (1, 700, 5000):
        monkeypatch.setattr(stream, "CHUNK_BYTES", chunk_bytes)
        file = tmp_path / f"{chunk_bytes}.gguf"
        assert write_plan(planned, file, threads=threads)[0].read_bytes() == expected
        back = tmp_path / f"back-{chunk_bytes}"
        write_plan(plan_export(plain, vocab=False), back, threads=threads)
        found = load_file(back / "model.safetensors")
        stored = load_file(directory / "model.safetensors")
        assert all((found[name] == tensor).all() for name, tensor in stored.items())
