"""Where a run collects its output: nothing of the user's is taken for it, and its damage is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bamba_quant.calibration import read_imatrix
from bamba_quant.errors import OutputError
from bamba_quant.quantize import plan_quantization
from bamba_quant.writers import journal, quantized
from bamba_quant.writers.quantized import write_quantized
from bamba_quant.writers.resumable import partial_of
from tests.recipes.test_llama_quantize import random_imatrix
from tests.support.models import random_bamba, save_checkpoint
from tests.writers.test_quantized import contents, interrupted, write


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(quantized, "CHUNK_BYTES", 1 << 14)
    return save_checkpoint(random_bamba(), tmp_path / "m")


@pytest.fixture
def linked(model: Path, tmp_path: Path) -> Path:
    """The same model by links, as Hugging Face's cache has it."""
    place = tmp_path / "linked"
    place.mkdir()
    for file in model.iterdir():
        (place / file.name).symlink_to(file)
    return place


@pytest.mark.parametrize("options", [{"overwrite": True}, {"resume": True}, {}])
def test_the_input_is_never_replaced(
    options: dict[str, Any], model: Path, linked: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").symlink_to(model)
    before = contents(model)
    for source, out in (
        (model, model),
        (model, tmp_path / "other"),
        (tmp_path / "other", model),
        (model, tmp_path),
        (linked, linked),
        (linked, model),
    ):
        with pytest.raises(OutputError, match="would replace the input"):
            write(source, out, **options)
    partial = model.rename(partial_of(tmp_path / "out"))
    with pytest.raises(OutputError, match="would replace the input"):
        write(partial, tmp_path / "out", **options)
    assert contents(partial) == before


def test_directories_in_a_model_are_not_replaced(model: Path, tmp_path: Path) -> None:
    write(model, tmp_path / "out")
    (tmp_path / "out" / "tokenizer-old").mkdir()
    (tmp_path / "out" / "tokenizer-old" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="tokenizer-old"):
        write(model, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "tokenizer-old" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("options", [{"overwrite": True}, {"resume": True}, {}])
def test_a_name_that_is_taken(options: dict[str, Any], model: Path, tmp_path: Path) -> None:
    partial = partial_of(tmp_path / "out")
    partial.mkdir()
    (partial / "config.json").write_text("mine")
    with pytest.raises(OutputError, match="the output is collected is taken"):
        write(model, tmp_path / "out", **options)
    assert contents(partial) == {"config.json": b"mine"}
    (partial / "config.json").unlink()
    partial.rmdir()
    for make in (lambda: partial.write_text("mine"), lambda: partial.symlink_to(tmp_path / "elsewhere")):
        make()
        with pytest.raises(OutputError, match="the output is collected is taken"):
            write(model, tmp_path / "out", **options)
        partial.unlink()
    partial.mkdir()
    write(model, tmp_path / "out", **options)


def test_what_lies_beside_the_output_stays(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / "thesis.txt").write_text("mine")
    expected = write(model, tmp_path / "out")
    assert write(model, tmp_path / "out", overwrite=True) == expected
    assert (tmp_path / "out.old" / "thesis.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out", "out.old"]


def test_a_file_that_is_missing(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(model, out, max_shard_bytes=40_000)
    next(partial_of(out).glob("model-00001-*.safetensors")).unlink()
    with pytest.raises(OutputError, match=r"damaged(.|\n)*model-00001-(.|\n)*no such file"):
        write(model, out, resume=True, max_shard_bytes=40_000)
    assert not out.exists() and not partial_of(out).exists()


def test_what_a_run_was_begun_with(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    random_imatrix(model, tmp_path / "imatrix.gguf")
    imatrix = read_imatrix(tmp_path / "imatrix.gguf")
    interrupted(model, out, imatrix=imatrix)
    before = contents(partial_of(out))
    other = replace(imatrix, entries={name: entry[::-1] for name, entry in imatrix.entries.items()})
    for options, said in (
        ({}, "importance matrix"),
        ({"imatrix": other}, "another importance matrix"),
        ({"imatrix": imatrix, "dtype": "stored"}, "layout"),
    ):
        with pytest.raises(OutputError, match=said):
            write(model, out, resume=True, **options)
    (model / "README.md").write_text("# a card")
    with pytest.raises(OutputError, match="another configuration or card"):
        write(model, out, resume=True, imatrix=imatrix)
    (model / "README.md").unlink()
    assert contents(partial_of(out)) == before
    monkeypatch.chdir(tmp_path)  # the same input by another path
    went_on = write(Path(model.name), Path("out"), resume=True, imatrix=imatrix, threads=3)
    assert went_on == write(model, tmp_path / "x", imatrix=imatrix)


@pytest.mark.parametrize("spoiled", [b"[[0,1],[2\n[[3,0]]\n", b"\0\0\n", b'{"a":1}\n', b"[1]\n"])
@pytest.mark.parametrize("first", [True, False])
def test_a_journal_that_is_damaged(first: bool, spoiled: bytes, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(model, out)
    listed = partial_of(out) / journal.NAME
    listed.write_bytes(spoiled if first else listed.read_bytes() + spoiled)
    before = contents(partial_of(out))
    with pytest.raises(OutputError, match=r"damaged|not what would go on"):
        write(model, out, resume=True)
    assert contents(partial_of(out)) == before
    assert write(model, out, overwrite=True) == write(model, tmp_path / "x")


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_last_steps_interrupted(
    overwrite: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rename, and the removal of the journal behind them, is where Ctrl-C comes."""
    out = tmp_path / "out"
    expected = write(model, tmp_path / "x")
    if overwrite:
        write(model, out)
    rename, unlink = Path.rename, Path.unlink

    def before_rename(self: Path, target: Path) -> Path:
        if self == partial_of(out):
            raise KeyboardInterrupt
        return rename(self, target)

    def before_unlink(self: Path, missing_ok: bool = False) -> None:
        if self.name == journal.NAME:
            raise KeyboardInterrupt
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "rename", before_rename)
    with pytest.raises(KeyboardInterrupt):
        write(model, out, overwrite=overwrite)
    assert out.exists() == overwrite
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(Path, "unlink", before_unlink)
    read: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        write_quantized(plan_quantization(model, "fp8-dynamic"), out, resume=True, overwrite=overwrite)
    monkeypatch.setattr(Path, "unlink", unlink)
    left = contents(out)
    assert {name: content for name, content in left.items() if name != journal.NAME} == expected
    assert write(model, out, overwrite=True, progress=read.append) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out", "x"]
