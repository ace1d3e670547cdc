"""Where a run collects its output: nothing of the user's is taken for it, and its damage is named."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bamba_quant.checkpoint.imatrix import read_imatrix
from bamba_quant.errors import OutputError
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.writers import directory, journal, resumable, stream
from bamba_quant.writers.resumable import partial_of
from tests.recipes.test_llama_quantize import random_imatrix
from tests.support.conversion import to_gguf
from tests.support.exports import exported
from tests.support.models import random_bamba, save_checkpoint
from tests.writers.test_quantized import contents, interrupted, write


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(stream, "CHUNK_BYTES", 1 << 14)
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
    with pytest.raises(OutputError, match="temporary name of the output exists"):
        write(model, tmp_path / "out", **options)
    assert contents(partial) == {"config.json": b"mine"}
    (partial / "config.json").unlink()
    partial.rmdir()
    for make in (lambda: partial.write_text("mine"), lambda: partial.symlink_to(tmp_path / "elsewhere")):
        make()
        with pytest.raises(OutputError, match="temporary name of the output exists"):
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
    with pytest.raises(OutputError, match=r"damaged|other options or another version"):
        write(model, out, resume=True)
    assert contents(partial_of(out)) == before
    assert write(model, out, overwrite=True) == write(model, tmp_path / "x")


@pytest.mark.parametrize("raw", [
    b'{"a":1e400}\n', b'{}\n[[1e400,0]]\n', b'{}\n[[0,1.5]]\n', b'{}\n[["0",1]]\n', b'{}\n[[true,1]]\n',
    b'{}\n[[-1,1]]\n', b'{}\n[[0,1,2]]\n', b'{}\n{"0":1}\n', b'{}\n7\n', b'{}\n' + b"[" * 100_000 + b"\n",
    b"[" * 100_000 + b"\n", b"[]\n", b'[["a",1]]\n', b"null\n", b'{}\n[[' + b"9" * 5000 + b",0]]\n",
    b"\xff\xfe\n", b'{"a":"\x1b]0;title\x07"}\n', b"\n\n",
])  # fmt: skip
def test_journals_of_other_values(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / journal.NAME).write_bytes(raw)
    with pytest.raises(OutputError, match=r"damaged|other options or another version") as caught:
        journal.Journal(tmp_path, {"version": "1"}, resume=True)
    assert len(str(caught.value)) < 1000 and "\x1b" not in str(caught.value)
    assert (tmp_path / journal.NAME).read_bytes() == raw


def test_journals_that_are_too_large_or_no_files(tmp_path: Path) -> None:
    place = tmp_path / journal.NAME
    with place.open("wb") as file:
        file.truncate(10 << 30)  # a hole
    with pytest.raises(OutputError, match="more than the"):
        journal.Journal(tmp_path, {}, resume=True)
    place.unlink()
    (tmp_path / "precious").write_text("mine")
    place.symlink_to("precious")
    with pytest.raises(OSError):
        journal.Journal(tmp_path, {}, resume=False)
    assert (tmp_path / "precious").read_text() == "mine"
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(OutputError, match="not a regular file"):
        journal.Journal(tmp_path, {}, resume=True)


def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "exchange", lambda first, second: False)


@pytest.mark.parametrize("exchanging", [True, False])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_last_steps_interrupted(
    overwrite: bool, exchanging: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes before the directory is published, and before the removal of the journal behind it."""
    out = tmp_path / "out"
    expected = write(model, tmp_path / "x")
    if overwrite:
        write(model, out)
    if not exchanging:
        without_exchange(monkeypatch)
    for name in ("publish", "_finish"):
        with monkeypatch.context() as patch:
            patch.setattr(resumable, name, raise_interrupt)
            with pytest.raises(KeyboardInterrupt):
                write(model, out, overwrite=overwrite, resume=True)
        assert (out / journal.NAME).exists() == (name == "_finish")
    left = contents(out) if exchanging or not overwrite else {}
    assert {name: left[name] for name in left if name != journal.NAME} in ({}, expected)
    read: list[int] = []
    assert write(model, out, resume=True, progress=read.append) == expected
    assert read == [plan_quantization(model, "fp8-dynamic").work_bytes]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out", "x"]


def raise_interrupt(*args: Any, **options: Any) -> None:
    raise KeyboardInterrupt


def test_what_was_published_by_another_run_does_not_go_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(resumable, "_finish", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            write(model, out)
    with pytest.raises(OutputError, match="not empty"):
        write(model, out, resume=True, method="absmax")
    assert contents(out) == write(model, tmp_path / "x")


def test_a_file_put_into_the_directory_meanwhile_stays(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    expected = write(model, out)

    def add_a_thesis(n_bytes: int) -> None:
        (out / "thesis.txt").write_text("mine")

    with pytest.raises(OutputError, match=r"thesis\.txt"):
        write(model, out, overwrite=True, progress=add_a_thesis)
    assert contents(out) == expected | {"thesis.txt": b"mine"}
    (out / "thesis.txt").unlink()
    assert write(model, out, overwrite=True, resume=True) == expected


@pytest.mark.parametrize("step", [1, 2])
def test_a_directory_is_restored_where_names_cannot_be_exchanged(
    step: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second rename fails; where putting the old one back fails too, as after a kill, the next run does that."""
    out = tmp_path / "out"
    expected = write(model, out)
    without_exchange(monkeypatch)
    rename, calls = Path.rename, []

    def fail_second(self: Path, target: Path) -> Path:
        calls.append(target)
        if 1 < len(calls) <= 1 + step:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_second)
        with pytest.raises(OutputError, match=r"cannot be written|could not be put back"):
            write(model, out, overwrite=True)
    assert out.exists() == (step == 1)
    resumable.settle(out)
    assert contents(out) == expected
    assert write(model, out, overwrite=True, resume=True) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out"]


def test_an_export_that_cannot_put_back_what_it_was_replacing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run puts the old directory back, and can resume the new one."""
    file = to_gguf(save_checkpoint(random_bamba(), tmp_path / "m"), tmp_path / "x.gguf", vocab=False)
    old = contents(exported(file, tmp_path / "out"))
    without_exchange(monkeypatch)
    rename, calls = Path.rename, []

    def fail_but_first(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) > 1:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_but_first)
        with pytest.raises(OutputError, match="could not be put back"):
            exported(file, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out").exists()
    resumable.settle(tmp_path / "out")
    assert contents(tmp_path / "out") == old
    assert contents(exported(file, tmp_path / "out", overwrite=True, resume=True)) == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out", "x.gguf"]


@pytest.mark.parametrize("target", ["/", "loop", "out.partial"])
def test_names_that_cannot_be_outputs(target: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(OutputError, match=r"root|loop|interrupted run"):
            write(model, tmp_path / target, **options)


@pytest.mark.parametrize("name", ["a\nb", "ö 💾", "-rf", "%s{ftype}*?[", os.fsdecode(b"\xff\xfe"), "x" * 240])
def test_names_of_odd_characters(name: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / name
    expected = write(model, out)
    assert write(model, out, overwrite=True) == expected
    interrupted(model, out, overwrite=True)
    assert write(model, out, overwrite=True, resume=True) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "m"])


def test_a_directory_behind_a_link_is_replaced_where_it_is(model: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "model")
    expected = write(model, tmp_path / "out")
    assert write(model, tmp_path / "out", overwrite=True) == expected
    assert (tmp_path / "out").is_symlink()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["model"]


def test_a_mount_point_is_not_replaced(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    with pytest.raises(OutputError, match="mount point"):
        write(model, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out"]
