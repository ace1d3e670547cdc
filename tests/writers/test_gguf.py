"""The writer: files gguf-py reads, the same bytes for any threads and chunks, whole or not there at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bamba_quant.checkpoint import open_checkpoint, read_tensor
from bamba_quant.codecs.floats import to_float32
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import CheckpointError, FormatError, OutputError
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.plan import Plan
from bamba_quant.writers import commit, stream, write_plan
from bamba_quant_cli.app import app
from tests.recipes.test_llama_quantize import random_imatrix
from tests.support.models import random_bamba, save_checkpoint


def conversion(path: Path, target: Path, outtype: str = "bf16", **options: Any) -> Plan:
    return plan_conversion(path, outtype=outtype, outfile=target, vocab=False, **options)


def write(path: Path, target: Path, outtype: str = "bf16", overwrite: bool = False) -> Path:
    planned = conversion(path, target, outtype)
    return write_plan(planned, planned.outfile, overwrite=overwrite)[0]


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
def test_gguf_py_reads_what_was_planned(outtype: str, tmp_path: Path) -> None:
    planned = plan_conversion(embedded_model(), outtype=outtype, outfile=tmp_path / "x.gguf")
    (file,) = write_plan(planned, planned.outfile)
    reader = gguf.GGUFReader(str(file))
    assert [tensor.name for tensor in reader.tensors] == [row.name for row in planned.rows]
    for tensor, row in zip(reader.tensors, planned.rows, strict=True):
        assert tensor.tensor_type == row.format.ggml_type
        assert tuple(reversed(tensor.shape.tolist())) == row.shape
        assert tensor.n_bytes == row.n_bytes
        source = to_float32(read_tensor(row.source))
        rows = source.reshape(row.matrix)
        expected = row.transform.apply(rows, 0)
        found = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(row.matrix)
        if row.format.name == "q8_0":
            expected = gguf.dequantize(gguf.quantize(expected, tensor.tensor_type), tensor.tensor_type)
        elif row.format.name == "f16":
            expected = expected.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(found, expected.reshape(row.matrix), err_msg=row.name)
    for key, value in planned.metadata.items():
        expected_value = np.float32(value.value) if value.type == gguf.GGUFValueType.FLOAT32 else value.value
        assert reader.get_field(key).contents() == expected_value, key


@pytest.mark.parametrize("outtype", ["f32", "q8_0", "q4_k_m", "iq4_xs"])
def test_bytes_do_not_depend_on_threads_or_chunks(
    outtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows of 256, so that every format keeps its own blocks.
    wide = {"hidden_size": 256, "intermediate_size": 256, "mamba_d_head": 64}
    directory = save_checkpoint(random_bamba(**wide), tmp_path / "m", dtype="bfloat16")
    expected = write(directory, tmp_path / "whole.gguf", outtype).read_bytes()
    for threads, chunk in ((1, 512), (3, 5000), (2, 1 << 14), (7, 1 << 22)):
        monkeypatch.setattr(stream, "CHUNK_BYTES", chunk)
        planned = conversion(directory, tmp_path / f"{threads}.gguf", outtype)
        (file,) = write_plan(planned, planned.outfile, threads=threads)
        assert file.read_bytes() == expected


def refuse(*arguments: Any) -> int:
    raise OSError(errno.EXDEV, "Invalid cross-device link")


@pytest.mark.parametrize("copy_file_range", [refuse, lambda *arguments: 0, None])
def test_rows_that_change_nothing_are_copied(
    copy_file_range: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the system where it can, else by this process; the bytes are the same."""
    directory = save_checkpoint(random_bamba(), tmp_path / "m", dtype="bfloat16")
    copied: list[int] = []
    system = os.copy_file_range

    def count(*arguments: Any) -> int:
        copied.append(system(*arguments))
        return copied[-1]

    monkeypatch.setattr(os, "copy_file_range", count)
    expected = write(directory, tmp_path / "x.gguf").read_bytes()
    rows = [row for row in conversion(directory, tmp_path / "x.gguf").rows if stream.is_copied(row)]
    assert {row.role for row in rows} >= {"token_embd", "output", "ssm_in", "attn_v", "ffn_up"}
    assert not {row.role for row in rows} & {"attn_q", "attn_k", "norm"}
    assert sum(copied) == sum(row.n_bytes for row in rows)
    if copy_file_range is None:
        monkeypatch.delattr(os, "copy_file_range")
    else:
        monkeypatch.setattr(os, "copy_file_range", copy_file_range)
    assert write(directory, tmp_path / "y.gguf").read_bytes() == expected


def test_split_file_holds_the_same_tensors(tmp_path: Path) -> None:
    directory = save_checkpoint(random_bamba(), tmp_path / "m")
    whole = open_checkpoint(write(directory, tmp_path / "whole.gguf"))
    planned = conversion(directory, tmp_path / "part.gguf", split_max_bytes=60_000)
    files = write_plan(planned, planned.outfile)
    assert len(files) > 2
    parts = open_checkpoint(files[1])
    assert parts.tensors.keys() == whole.tensors.keys()
    for name, tensor in whole.tensors.items():
        np.testing.assert_array_equal(read_tensor(parts.tensors[name]), read_tensor(tensor))
    for number, file in enumerate(files):
        reader = gguf.GGUFReader(str(file))
        assert reader.get_field("split.no").contents() == number
        assert reader.get_field("split.count").contents() == len(files)
        assert reader.get_field("split.tensors.count").contents() == len(whole.tensors)


def test_progress_counts_the_whole_input(tmp_path: Path) -> None:
    planned = conversion(save_checkpoint(random_bamba(), tmp_path / "m"), tmp_path / "x.gguf")
    told: list[int] = []
    write_plan(planned, planned.outfile, progress=told.append)
    assert sum(told) == sum(row.source.n_bytes for row in planned.rows)


def spoil(
    directory: Path, name: str, place: tuple[int, ...], value: float, dtype: torch.dtype = torch.float32
) -> None:
    state = {key: tensor.to(dtype) for key, tensor in load_file(directory / "model.safetensors").items()}
    state[name][place] = value
    save_file(state, directory / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    directory = save_checkpoint(random_bamba(), tmp_path / "m")
    name = "model.layers.1.self_attn.o_proj.weight"
    spoil(directory, name, (33, 5), value, dtype)
    with pytest.raises(CheckpointError, match=rf"{name}[\s\S]*row 33, column 5"):
        write(directory, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == [directory]


def test_largest_finite_weights_pass(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        directory = save_checkpoint(random_bamba(), tmp_path / str(dtype))
        for place, value in (((0, 0), torch.finfo(dtype).max), ((1, 1), torch.finfo(dtype).min)):
            spoil(directory, "lm_head.weight", place, value, dtype)
        assert write(directory, tmp_path / f"{dtype}.gguf", "f32").exists()


def test_a_weight_too_large_for_the_format(tmp_path: Path) -> None:
    directory = save_checkpoint(random_bamba(), tmp_path / "m")
    spoil(directory, "lm_head.weight", (3, 3), 7e4)
    with pytest.raises(FormatError, match=r"lm_head\.weight"):
        write(directory, tmp_path / "x.gguf", "f16")
    assert write(directory, tmp_path / "x.gguf", "q8_0").exists()
    spoil(directory, "lm_head.weight", (3, 3), 1e7)
    with pytest.raises(FormatError, match="q8_0"):
        write(directory, tmp_path / "y.gguf", "q8_0")


def test_existing_file_stays(tmp_path: Path) -> None:
    directory = save_checkpoint(random_bamba(), tmp_path / "m")
    target = tmp_path / "x.gguf"
    target.write_text("precious")
    planned = conversion(directory, target)
    with pytest.raises(OutputError, match="exists already"):
        write_plan(planned, target)
    assert target.read_text() == "precious"
    write_plan(planned, target, overwrite=True)
    assert open_checkpoint(target).tensors


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failure_midway_leaves_the_old_file_and_nothing_else(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save_checkpoint(random_bamba(), tmp_path / "m")
    target = tmp_path / "x.gguf"
    target.write_text("precious")
    planned = conversion(directory, target)
    calls = []

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 9:
            raise failure
        return len(data)

    monkeypatch.setattr(os, "pwrite", pwrite)
    expected: Any = OutputError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="disk is full" if isinstance(failure, OSError) else None):
        write_plan(planned, target, overwrite=True)
    assert target.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "x.gguf"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    directory = save_checkpoint(random_bamba(), tmp_path / "m")
    with pytest.raises(OutputError, match="does not exist"):
        write(directory, tmp_path / "nowhere" / "x.gguf")


def test_a_file_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    planned = conversion(save_checkpoint(random_bamba(), tmp_path / "m"), tmp_path / "x.gguf")

    def write_meanwhile(n_bytes: int) -> None:
        planned.outfile.write_text("precious")

    with pytest.raises(OutputError, match="exists already"):
        write_plan(planned, planned.outfile, progress=write_meanwhile)
    assert planned.outfile.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "x.gguf"]


def test_targets_that_are_not_regular_files(tmp_path: Path) -> None:
    directory = save_checkpoint(random_bamba(), tmp_path / "m")
    planned = conversion(directory, tmp_path / "x.gguf", split_max_bytes=60_000)
    second = tmp_path / f"x-00002-of-{len(planned.shards):05d}.gguf"
    second.mkdir()
    with pytest.raises(OutputError, match="not a regular file"):
        write_plan(planned, planned.outfile, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", second.name]
    single = conversion(directory, tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="not a regular file"):
        write_plan(single, tmp_path / "pipe", overwrite=True)
    with pytest.raises(OutputError, match="too long"):
        write_plan(single, tmp_path / ("x" * 300), overwrite=True)


def test_an_input_is_not_replaced(tmp_path: Path) -> None:
    directory = save_checkpoint(random_bamba(), tmp_path / "m")
    weights = directory / "model.safetensors"
    before = weights.read_bytes()
    (tmp_path / "link").symlink_to(weights)
    for target in (weights, tmp_path / "link"):
        with pytest.raises(OutputError, match="made from"):
            write(directory, target, overwrite=True)
    assert weights.read_bytes() == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "imatrix.gguf", "about.json"])
def test_small_inputs_are_not_replaced(name: str, tmp_path: Path) -> None:
    """Nor are the importance matrix and the metadata, which lie anywhere."""
    directory = tmp_path / "m"
    shutil.copytree(embedded_model(), directory)
    random_imatrix(directory, tmp_path / "imatrix.gguf")
    (tmp_path / "about.json").write_text("{}")
    file = next(each for each in (directory / name, tmp_path / name) if each.exists())
    before = file.read_bytes()
    options = ["--imatrix", tmp_path / "imatrix.gguf", "--metadata", tmp_path / "about.json", "--overwrite"]
    with pytest.raises(OutputError, match="made from"):
        app(["convert", *map(str, [directory, "--outfile", file, *options])], standalone_mode=False)
    assert file.read_bytes() == before


def test_shards_are_published_all_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = conversion(
        save_checkpoint(random_bamba(), tmp_path / "m"), tmp_path / "x.gguf", split_max_bytes=60_000
    )
    put = commit.put

    def fail_at_the_second(partial: Path, file: Path, overwrite: bool) -> None:
        if "-00002-" in file.name:
            raise OSError(errno.EIO, "Input/output error")
        put(partial, file, overwrite)

    monkeypatch.setattr(commit, "put", fail_at_the_second)
    with pytest.raises(OutputError, match="cannot be written"):
        write_plan(planned, planned.outfile)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_files_are_flushed_before_they_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = conversion(save_checkpoint(random_bamba(), tmp_path / "m"), tmp_path / "x.gguf")
    flushed: list[bool] = []
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.append(planned.outfile.exists())
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_plan(planned, planned.outfile)
    assert flushed == [False, True]  # the file, then the directory with its name


def test_too_little_space_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = conversion(save_checkpoint(random_bamba(), tmp_path / "m"), tmp_path / "x.gguf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match="1,000 bytes free"):
        write_plan(planned, planned.outfile)


def test_directories_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = conversion(save_checkpoint(random_bamba(), tmp_path / "m"), tmp_path / "x.gguf")

    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    (file,) = write_plan(planned, planned.outfile)
    assert open_checkpoint(file).tensors
    with pytest.raises(OutputError, match="exists already"):
        write_plan(planned, planned.outfile)


def test_tied_head_that_is_no_copy(tmp_path: Path) -> None:
    model = random_bamba(tie_word_embeddings=True)
    directory = save_checkpoint(model, tmp_path / "m")
    state = load_file(directory / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, directory / "model.safetensors")
    file = write(directory, tmp_path / "x.gguf")
    assert "output.weight" not in open_checkpoint(file).tensors
    state["lm_head.weight"][-1, -1] += 1
    save_file(state, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        write(directory, tmp_path / "y.gguf")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert "output.weight" in open_checkpoint(write(directory, tmp_path / "y.gguf")).tensors
