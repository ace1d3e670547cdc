"""A quantized directory has the same bytes for any threads, chunks and interrupts, and appears whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bamba_quant.codecs import SafetensorsCodec, codecs
from bamba_quant.errors import BambaQuantError, CheckpointError, OutputError
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.recipes.mixtures import mixtures
from bamba_quant.writers import journal, stream, write_plan
from bamba_quant.writers.resumable import partial_of
from tests.planning.test_quantize import WIDE
from tests.support.models import random_bamba, save_checkpoint

SCHEMES = [
    "fp8-dynamic",
    "fp8-tensor",
    "fp8-block",
    "fp8-block-inv",
    "w4a16-asym-g128",
    "torchao-int4-g128",
    "hybrid-nvfp4",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(random_bamba(**WIDE), tmp_path_factory.mktemp("model") / "m", shards=2)


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def write(model: Path, directory: Path, scheme: str = "fp8-dynamic", **options: Any) -> dict[str, bytes]:
    writing = {k: options.pop(k) for k in ("threads", "resume", "overwrite", "progress") if k in options}
    write_plan(plan_quantization(model, scheme, **options), directory, **writing)
    return contents(directory)


def stop_after(count: int) -> Any:
    """Progress that ends the run as Ctrl-C does, once it was told ``count`` times."""
    told = 0

    def progress(n_bytes: int) -> None:
        nonlocal told
        told += 1
        if told > count:
            raise KeyboardInterrupt

    return progress


def test_schemes_are_there() -> None:
    assert set(SCHEMES) <= {scheme.name for scheme in codecs(SafetensorsCodec)} | mixtures().keys()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_do_not_depend_on_threads_or_chunks(
    scheme: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write(model, tmp_path / "whole", scheme)
    for threads, chunk in ((1, 512), (3, 100_000), (7, 1 << 22)):
        monkeypatch.setattr(stream, "CHUNK_BYTES", chunk)
        assert write(model, tmp_path / f"{threads}", scheme, threads=threads) == expected


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_interrupted_run_goes_on(
    scheme: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "CHUNK_BYTES", 1 << 15)
    expected = write(model, tmp_path / "whole", scheme)
    threads = threading.active_count()
    reads: list[int] = []
    for count in (0, 25, 40):
        with pytest.raises(KeyboardInterrupt):
            write(model, tmp_path / "out", scheme, resume=True, progress=stop_after(count))
        assert not (tmp_path / "out").exists()
        assert partial_of(tmp_path / "out").is_dir()
    lines = (partial_of(tmp_path / "out") / journal.NAME).read_text().splitlines()
    done = {tuple(chunk) for line in lines[1:] for chunk in json.loads(line)}
    assert len(done) == sum(len(json.loads(line)) for line in lines[1:])
    assert len(done) >= 10
    plan = plan_quantization(model, scheme)
    again: list[tuple[int, int]] = []
    monkeypatch.setattr(journal.Journal, "add", lambda self, chunk: again.append(chunk))
    write_plan(plan, tmp_path / "out", resume=True, progress=reads.append)
    assert contents(tmp_path / "out") == expected
    assert done.isdisjoint(again)
    assert sum(reads) == plan.work_bytes
    assert not partial_of(tmp_path / "out").exists()
    assert threading.active_count() == threads


KILLED = """
import os, sys, time
from pathlib import Path
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.recipes.mixtures import mixtures
from bamba_quant.writers import journal, stream, write_plan
stream.CHUNK_BYTES, journal.SECONDS = 1 << 14, 0.0
told = 0
def progress(n_bytes):
    global told
    told += 1
    if told > 60:
        # The journal is written beside the work, however slow the disk is.
        while len((Path(sys.argv[2] + ".partial") / journal.NAME).read_text().splitlines()) < 3:
            time.sleep(0.01)
        os._exit(9)
write_plan(plan_quantization(sys.argv[1], "fp8-tensor"), Path(sys.argv[2]), threads=1, progress=progress)
"""


def test_a_killed_run_goes_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(model), str(tmp_path / "out")], check=False)
    assert killed.returncode == 9
    partial = partial_of(tmp_path / "out")
    listed = (partial / journal.NAME).read_bytes()
    (partial / journal.NAME).write_bytes(listed + b"[[0,")  # and the last line torn
    monkeypatch.setattr(stream, "CHUNK_BYTES", 1 << 14)
    assert write(model, tmp_path / "out", "fp8-tensor", resume=True) == write(
        model, tmp_path / "x", "fp8-tensor"
    )


def interrupted(model: Path, target: Path, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(model, target, progress=stop_after(20), threads=1, **options)


def test_another_plan_or_input_does_not_go_on(tmp_path: Path) -> None:
    model = save_checkpoint(random_bamba(**WIDE), tmp_path / "m")
    out = tmp_path / "out"
    interrupted(model, out)
    before = contents(partial_of(out))
    for options, said in (
        ({"scheme": "fp8-block"}, "another type"),
        ({"method": "absmax"}, "another method"),
        ({"keep": ["ssm_in"]}, "layout"),
        ({"max_shard_bytes": 200_000}, "layout"),
    ):
        with pytest.raises(OutputError, match=said):
            write(model, out, resume=True, **options)
    (model / "model.safetensors").touch()
    with pytest.raises(OutputError, match="another input"):
        write(model, out, resume=True)
    assert contents(partial_of(out)) == before
    with pytest.raises(OutputError, match="--resume"):
        write(model, out)
    assert write(model, out, overwrite=True) == write(model, tmp_path / "x")


def test_work_that_was_damaged(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CHUNK_BYTES", 1 << 15)
    interrupted(model, tmp_path / "out")
    os.truncate(partial_of(tmp_path / "out") / "model.safetensors", 100)
    with pytest.raises(OutputError, match="damaged"):
        write(model, tmp_path / "out", resume=True)
    assert list(tmp_path.iterdir()) == []


def test_two_runs_at_once(model: Path, tmp_path: Path) -> None:
    def second(n_bytes: int) -> None:
        with pytest.raises(OutputError, match="another run"):
            write(model, tmp_path / "out", overwrite=True)

    expected = write(model, tmp_path / "x")
    assert write(model, tmp_path / "out", progress=second) == expected


def test_directories_that_are_not_empty(model: Path, tmp_path: Path) -> None:
    expected = write(model, tmp_path / "out")
    for resume in (False, True):
        with pytest.raises(OutputError, match="not empty"):
            write(model, tmp_path / "out", resume=resume)
    interrupted(model, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == expected
    assert write(model, tmp_path / "out", resume=True, overwrite=True) == expected
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"thesis\.txt"):
        write(model, tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("scheme", ["fp8-dynamic", "fp8-tensor"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.3.mamba.out_proj.weight", float("nan")),
        ("model.layers.1.self_attn.k_proj.weight", float("-inf")),
        ("model.final_layernorm.weight", float("nan")),
    ],
)
def test_weights_that_are_no_numbers(scheme: str, name: str, value: float, tmp_path: Path) -> None:
    directory = save_checkpoint(random_bamba(**WIDE), tmp_path / "m")
    state = load_file(directory / "model.safetensors")
    state[name].reshape(-1)[5] = value
    save_file(state, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=name):
        write(directory, tmp_path / "out", scheme)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_weights_too_large_for_a_scale(tmp_path: Path) -> None:
    directory = save_checkpoint(random_bamba(**WIDE), tmp_path / "m")
    state = load_file(directory / "model.safetensors")
    name = "model.layers.3.mamba.out_proj.weight"
    state[name][3] = torch.finfo(torch.float32).max
    save_file(state, directory / "model.safetensors")
    with pytest.raises(BambaQuantError, match=rf"bfloat16 scale(.|\n)*{name}"):
        write(directory, tmp_path / "out", "torchao-int4-g128")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_weights_too_large_for_bf16(tmp_path: Path) -> None:
    directory = save_checkpoint(random_bamba(**WIDE), tmp_path / "m")
    state = load_file(directory / "model.safetensors")
    state["lm_head.weight"][0, 0] = torch.finfo(torch.float32).max
    save_file(state, directory / "model.safetensors")
    with pytest.raises(BambaQuantError, match=r"lm_head\.weight"):
        write(directory, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
