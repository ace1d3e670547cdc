"""Numbers in a safetensors header are believed as far as an array and a file could hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bamba_quant.checkpoint import open_checkpoint, safetensors_file
from bamba_quant.checkpoint.safetensors_file import read_safetensors
from bamba_quant.errors import CheckpointError
from tests.checkpoint.test_huggingface import TENSORS, directory, rewrite_header


@pytest.mark.parametrize(
    "shape",
    [
        [2**62, 2**62],
        [0, 2**63 - 1, 2],
        [2**63],
        [10**4000, 10**200],
        [1] * 33,
        [1] * 100_000,
        [-1],
        [True],
        [8.0],
        "48",
        {"0": 48},
    ],
)
def test_shapes_that_no_array_has(shape: Any, tmp_path: Path) -> None:
    directory(tmp_path, model=TENSORS)
    rewrite_header(tmp_path / "model.safetensors", lambda header: header["a"].update(shape=shape))
    with pytest.raises(CheckpointError, match=r"malformed[\s\S]*tensor a") as error:
        open_checkpoint(tmp_path)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("offsets", [[0], [0, 10**4000], [2**64, 2**64], [0.0, 192.0], None, {"0": 1}])
def test_offsets_that_no_file_has(offsets: Any, tmp_path: Path) -> None:
    directory(tmp_path, model=TENSORS)
    rewrite_header(tmp_path / "model.safetensors", lambda header: header["a"].update(data_offsets=offsets))
    with pytest.raises(CheckpointError, match=r"malformed[\s\S]*tensor a"):
        open_checkpoint(tmp_path)


def test_the_number_of_tensors_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "_MOST_TENSORS", 4)
    entry = '{"dtype":"F16","shape":[0],"data_offsets":[0,0]}'
    for count in (4, 5):
        header = ("{" + ",".join(f'"{number}":{entry}' for number in range(count)) + "}").encode()
        file = tmp_path / "model.safetensors"
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        if count > 4:
            with pytest.raises(CheckpointError, match=r"too many tensors[\s\S]*found: 5"):
                read_safetensors(file)
        else:
            assert len(read_safetensors(file)) == count


def test_a_header_that_would_fill_the_memory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write((90_000_000).to_bytes(8, "little"))
        stream.truncate(100_000_000)
    with pytest.raises(
        CheckpointError, match=r"not a complete safetensors file[\s\S]*at most 25,165,824 bytes"
    ):
        open_checkpoint(tmp_path)
