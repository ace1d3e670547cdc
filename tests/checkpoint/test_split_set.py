"""Shards that are not of one set are refused wherever a split GGUF is read."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
from safetensors.torch import load_file, save_file

from bamba_quant.checkpoint import open_checkpoint
from bamba_quant.checkpoint.gguf_file import FINGERPRINT_KEY, UNKNOWN_FINGERPRINT, check_split, other_splits
from bamba_quant.checkpoint.gguf_values import GgufValue, KeyValues, int32, string, uint16, uint32
from bamba_quant.errors import CheckpointError
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.export import plan_export
from bamba_quant.planning.gguf_layout import with_key_values
from bamba_quant.planning.inspection import inspect_path
from bamba_quant.writers import stream, write_plan
from tests.support import llama
from tests.support.models import random_bamba, save_checkpoint


def split(model: Path, target: Path, **options: Any) -> list[Path]:
    target.parent.mkdir(exist_ok=True)
    planned = plan_conversion(model, outfile=target, vocab=False, split_max_bytes=60_000, **options)
    return list(write_plan(planned, planned.outfile))


def mark(file: Path) -> str:
    return gguf.GGUFReader(str(file)).get_field(FINGERPRINT_KEY).contents()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(random_bamba(), tmp_path_factory.mktemp("model") / "m", dtype="bfloat16")


def test_the_mark_depends_on_content_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on times, places, threads or chunks; any weight changes it."""
    first = split(model, tmp_path / "a" / "x.gguf")
    assert len({mark(file)[:32] for file in first}) == 1
    assert len({mark(file)[32:] for file in first}) == len(first)
    shutil.copytree(model, tmp_path / "copy" / "m")
    monkeypatch.setattr(stream, "CHUNK_BYTES", 1000)
    again = split(tmp_path / "copy" / "m", tmp_path / "b" / "x.gguf")
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in first]
    weights = tmp_path / "copy" / "m" / "model.safetensors"
    state = load_file(weights)
    state["lm_head.weight"][-1, -1] *= 2
    save_file(state, weights)
    changed = split(tmp_path / "copy" / "m", tmp_path / "c" / "x.gguf")
    assert mark(changed[0]) != mark(first[0])
    plain = [[f.read_bytes().replace(mark(f).encode(), b"") for f in files] for files in (first, changed)]
    assert sum(ours != theirs for ours, theirs in zip(*plain, strict=True)) == 1


@pytest.mark.parametrize("number", [0, 1, -1])
@pytest.mark.parametrize("marked", [True, False])
def test_a_mixture_is_refused_by_every_reader(number: int, marked: bool, model: Path, tmp_path: Path) -> None:
    """One shard of another conversion, or of another tool."""
    files = split(model, tmp_path / "a" / "x.gguf")
    if marked:
        other = split(
            save_checkpoint(random_bamba(1), tmp_path / "m", dtype="bfloat16"), tmp_path / "b" / "x.gguf"
        )
        shutil.copy(other[number], files[number])
    else:
        without_mark(files[number])
    for read in (open_checkpoint, inspect_path, plan_export, plan_conversion):
        for file in (files[0], files[-1]):
            with pytest.raises(CheckpointError, match=rf"different sets[\s\S]*{files[number].name}"):
                read(file)


def without_mark(file: Path) -> None:
    """Rename the mark, as a file of another tool has none."""
    file.write_bytes(
        file.read_bytes().replace(FINGERPRINT_KEY.encode(), FINGERPRINT_KEY.replace("set", "xxx").encode())
    )


def test_shards_of_other_tools_are_read(model: Path, tmp_path: Path) -> None:
    files = split(model, tmp_path / "x.gguf")
    whole = open_checkpoint(files[0]).tensors.keys()
    for file in files:
        without_mark(file)
    assert open_checkpoint(files[1]).tensors.keys() == whole


def test_llama_cpp_loads_marked_shards(tmp_path: Path) -> None:
    model = save_checkpoint(random_bamba(), tmp_path / "m")
    planned = plan_conversion(model, outtype="f32", outfile=tmp_path / "whole.gguf", vocab=False)
    write_plan(planned, planned.outfile)
    files = split(model, tmp_path / "x.gguf", outtype="f32")
    tokens = [5, 7, 11, 100, 3]
    assert (llama.logits(files[0], tokens) == llama.logits(planned.outfile, tokens)).all()


def test_a_mark_is_not_handed_on(model: Path, tmp_path: Path) -> None:
    files = split(model, tmp_path / "x.gguf")
    planned = plan_conversion(files[0], outtype="q8_0", outfile=tmp_path / "y.gguf")
    (whole,) = write_plan(planned, planned.outfile)
    assert FINGERPRINT_KEY not in open_checkpoint(whole).metadata
    planned = plan_conversion(files[0], outtype="q8_0", outfile=tmp_path / "z.gguf", keep_split=True)
    again = write_plan(planned, planned.outfile)
    assert mark(again[0]) not in (mark(files[0]), UNKNOWN_FINGERPRINT)


SPLIT: dict[str, GgufValue] = {
    "split.no": uint16(0), "split.count": uint16(2), "split.tensors.count": int32(7), FINGERPRINT_KEY: string("a")
}  # fmt: skip
FILES = (Path("x-00001-of-00002.gguf"), Path("x-00002-of-00002.gguf"))


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({}, {FINGERPRINT_KEY: string("b")}, "different sets"),
        ({}, {FINGERPRINT_KEY: int32(1)}, "invalid value"),
        ({}, {FINGERPRINT_KEY: None}, "different sets"),
        ({"split.no": uint16(1)}, {}, "split.no = 1"),
        ({}, {"split.no": uint16(0)}, "split.no = 0"),
        ({}, {"split.no": None}, "no split.no"),
        ({}, {"split.no": uint32(1)}, r"split.no has an invalid value[\s\S]*uint16"),
        ({"split.count": uint16(3)}, {"split.count": uint16(3)}, "split.count = 3"),
        ({"split.count": None}, {}, "no split.count"),
        ({}, {"split.count": string("2")}, "split.count has an invalid value"),
        ({}, {"split.tensors.count": int32(8)}, "split.tensors.count = 8"),
        ({"split.tensors.count": None}, {}, "no split.tensors.count"),
    ],
)
def test_what_llama_cpp_refuses_of_a_split(
    first: Mapping[str, GgufValue | None], second: Mapping[str, GgufValue | None], said: str
) -> None:
    found = [{**SPLIT, **first}, {**SPLIT, "split.no": uint16(1), **second}]
    with pytest.raises(CheckpointError, match=said):
        check_split(FILES, [KeyValues({k: v for k, v in values.items() if v}) for values in found], 7)


def test_what_llama_cpp_takes_of_a_split() -> None:
    only = {"split.no": uint16(1), FINGERPRINT_KEY: string("a")}
    check_split(FILES, [KeyValues(SPLIT), KeyValues(only)], 7)
    check_split(FILES[:1], [KeyValues({"split.count": uint16(0)})], 7)  # gguf-split --merge leaves it so
    with pytest.raises(CheckpointError, match="does not have a shard's name"):
        check_split(FILES[:1], [KeyValues(SPLIT)], 7)


def test_marks_that_another_tool_copied_mean_nothing(model: Path, tmp_path: Path) -> None:
    """llama-quantize and gguf-split copy the first shard's key-values, the mark among them."""
    library = llama.llama_cpp()
    files = split(model, tmp_path / "a" / "x.gguf", outtype="f32")
    parameters = library.llama_model_quantize_default_params()
    parameters.keep_split, parameters.ftype, parameters.nthread = True, int(gguf.LlamaFileType.MOSTLY_Q8_0), 1
    target = tmp_path / "q"
    assert library.llama_model_quantize(str(files[0]).encode(), str(target).encode(), parameters) == 0
    made = sorted(tmp_path.glob("q-*.gguf"))
    assert len(made) == len(files)
    assert mark(made[0]) == mark(files[0])
    assert open_checkpoint(made[0]).tensors.keys() == open_checkpoint(files[0]).tensors.keys()


def test_shards_of_another_split_are_found(tmp_path: Path) -> None:
    names = [
        "x.gguf",
        "x-00001-of-00003.gguf",
        "x-00003-of-00003.gguf",
        "x-00001-of-00002.gguf",
        "y-00001-of-00002.gguf",
    ]
    for name in names:
        (tmp_path / name).touch()
    assert other_splits([tmp_path / "x.gguf"]) == sorted(names[1:4])
    assert (
        other_splits([tmp_path / "x-00001-of-00002.gguf", tmp_path / "x-00002-of-00002.gguf"]) == names[1:3]
    )


def test_plans_hold_no_mark(model: Path) -> None:
    planned = plan_conversion(model, vocab=False)
    plan = with_key_values(planned, {**planned.metadata, FINGERPRINT_KEY: string("old")})
    assert b"old" not in plan.shards[0].header
