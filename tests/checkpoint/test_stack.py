"""A stack of matrices that lie in several files is read, and named in errors, as what lies where."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bamba_quant.checkpoint import RawReader, Section, StoredTensor, read_tensor, stacked
from bamba_quant.codecs import BlockCodec, codec_named
from bamba_quant.errors import CheckpointError
from bamba_quant.writers.stream import check_finite

F32 = codec_named("f32", BlockCodec)
MATRICES, ROWS, COLUMNS = 4, 3, 5


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, list[StoredTensor]]:
    """Values, and matrices in two files: the first two one behind the other, the others as sections of another."""
    folder = tmp_path_factory.mktemp("stack")
    values = np.random.default_rng(0).normal(size=(MATRICES, ROWS, COLUMNS)).astype(np.float32)
    (folder / "0").write_bytes(b"head" + values[:2].tobytes())
    (folder / "1").write_bytes(np.concatenate(values[2:], axis=0).tobytes())
    found = [
        StoredTensor(f"x.{n}.weight", (ROWS, COLUMNS), F32, folder / "0", 4 + n * values[0].nbytes)
        for n in range(2)
    ]
    for n in range(2):
        cut = Section(n * ROWS, ROWS, 2 * ROWS)
        found.append(StoredTensor(f"x.{2 + n}.weight", (ROWS, COLUMNS), F32, folder / "1", 0, cut))
    return values, found


@given(st.data())
def test_any_rows_are_read(parts: tuple[np.ndarray, list[StoredTensor]], data: st.DataObject) -> None:
    values, matrices = parts
    stack = stacked("x.*.weight", matrices)
    first = data.draw(st.integers(0, stack.rows))
    stop = data.draw(st.integers(first, stack.rows))
    raw = np.empty((stop - first) * stack.row_bytes, np.uint8)
    with RawReader() as reader:
        reader.read_rows(stack, stack.row_bytes, first, stop, raw)
    np.testing.assert_array_equal(
        raw.view(np.float32).reshape(-1, COLUMNS), values.reshape(-1, COLUMNS)[first:stop]
    )


def test_a_stack_is_one_tensor(parts: tuple[np.ndarray, list[StoredTensor]], tmp_path: Path) -> None:
    values, matrices = parts
    stack = stacked("x.*.weight", matrices)
    np.testing.assert_array_equal(read_tensor(stack), values)
    assert stack.n_bytes == values.nbytes and [file.name for file in stack.files] == ["0", "1"]
    values = values.copy()
    values[2, 1, 3] = np.nan
    with pytest.raises(CheckpointError, match=r"tensor x\.2\.weight") as error:
        check_finite(stack, values.reshape(-1)[COLUMNS:], COLUMNS)
    assert error.value.found == "nan at row 1, column 3"
    other = StoredTensor("y", (ROWS, COLUMNS), codec_named("f16", BlockCodec), tmp_path, 0)
    with pytest.raises(CheckpointError, match="different formats") as error:
        stacked("x.*.weight", [*matrices, other])
    assert error.value.found == "f16" and "tensor y" in str(error.value.where)
