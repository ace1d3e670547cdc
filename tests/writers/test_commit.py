"""Files that replace others together: all of them or none, whatever ends the run, and nothing of another run's."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bamba_quant.errors import OutputError
from bamba_quant.writers import commit
from bamba_quant.writers.atomic import atomic_files, check_target, partial_name
from bamba_quant.writers.names import create_locked, is_own

NAMES = ("x-00001-of-00003.gguf", "x-00002-of-00003.gguf", "x-00003-of-00003.gguf")


def write(place: Path, text: str, *, overwrite: bool = True, names: tuple[str, ...] = NAMES) -> None:
    with atomic_files([(place / name, len(text)) for name in names], overwrite=overwrite) as descriptors:
        for descriptor in descriptors:
            os.pwrite(descriptor, text.encode(), 0)


def contents(place: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in sorted(place.iterdir())}


def all_of(text: str) -> dict[str, str]:
    return dict.fromkeys(NAMES, text)


def break_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """``commit.put`` raises ``error`` instead of its ``number``-th call."""
    put, calls = commit.put, []

    def broken(partial: Path, file: Path, overwrite: bool) -> None:
        calls.append(file)
        if len(calls) == number:
            raise error
        put(partial, file, overwrite)

    monkeypatch.setattr(commit, "put", broken)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("links", [True, False])
def test_old_files_are_back_after_an_error(
    number: int, error: BaseException, links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "old")
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    break_at(monkeypatch, number, error)
    expected: Any = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write(tmp_path, "new")
    assert contents(tmp_path) == all_of("old")
    write(tmp_path, "new")
    assert contents(tmp_path) == all_of("new")


def refuse(*arguments: Any, **options: Any) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_none_is_left_of_new_files(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_at(
        monkeypatch, number, FileExistsError(errno.EEXIST, "File exists", "a", None, str(tmp_path / "b"))
    )
    with pytest.raises(OutputError, match="exists already"):
        write(tmp_path, "new", overwrite=False)
    assert contents(tmp_path) == {}


def test_a_file_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="exists already"),
        atomic_files([(tmp_path / name, 1) for name in NAMES], overwrite=False),
    ):
        (tmp_path / NAMES[1]).write_text("precious")
    assert contents(tmp_path) == {NAMES[1]: "precious"}


def test_other_numbers_of_shards_are_of_the_same_set(tmp_path: Path) -> None:
    dead = [tmp_path / f"{name}.0123abcd.partial" for name in ("x.gguf", "x-00001-of-00002.gguf", NAMES[2])]
    others = [
        tmp_path / f"{name}.0123abcd.partial" for name in ("y.gguf", "x.gguf.gguf", "xx-00001-of-00002.gguf")
    ]
    for file in (*dead, *others):
        file.write_text("half")
    write(tmp_path, "new", names=("x.gguf",))
    assert contents(tmp_path) == {"x.gguf": "new"} | dict.fromkeys(
        sorted(file.name for file in others), "half"
    )


def test_partial_files_of_every_file_of_a_set_are_removed(tmp_path: Path) -> None:
    names = ("report.json", "report.md")
    for name in names:
        (tmp_path / f"{name}.0123abcd.partial").write_text("half")
    write(tmp_path, "new", names=names)
    assert contents(tmp_path) == dict.fromkeys(names, "new")


def test_partial_files_of_living_runs_stay(tmp_path: Path) -> None:
    """Of the same output and of another one, by locks."""
    with atomic_files([(tmp_path / name, 3) for name in NAMES], overwrite=True) as mine:
        write(tmp_path, "two")
        write(tmp_path, "y", names=("y.gguf",))
        assert len(list(tmp_path.glob("*.partial"))) == len(NAMES)
        for descriptor in mine:
            os.pwrite(descriptor, b"one", 0)
    assert contents(tmp_path) == all_of("one") | {"y.gguf": "y"}


def test_a_partial_file_is_never_taken_for_dead_before_it_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run may look between the creation and the lock: then the file is made again."""
    file, lock, looks = partial_name(tmp_path / "x.gguf", "0123abcd"), fcntl.flock, []

    def looked_at_first(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX and not looks:
            looks.append(descriptor)
            commit.restore(tmp_path / "x.gguf")
            assert not file.exists()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", looked_at_first)
    os.close(create_locked(file))
    assert looks and file.exists()


def test_two_runs_publish_one_after_the_other(tmp_path: Path) -> None:
    texts = [f"{number:03d}" for number in range(20)]
    threads = [threading.Thread(target=write, args=(tmp_path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents(tmp_path) in [all_of(text) for text in texts]


def test_checking_a_target_restores_it_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "new", overwrite=False)
    inodes = {name: (tmp_path / name).stat().st_ino for name in NAMES}
    record(tmp_path, json.dumps({"mark": "0123abcd", "files": inodes}) + "\n")
    (tmp_path / NAMES[2]).unlink()  # it had not been published
    check_target(tmp_path / NAMES[0], False, ())
    assert contents(tmp_path) == {}


def record(place: Path, text: str) -> Path:
    file = place / ".x.gguf.bamba-commit"
    file.write_text(text)
    return file


@pytest.mark.parametrize("text", [
    "7\n", "[]\n", "{}\n", '{"mark":"0123abcd"}\n', '{"mark":7,"files":{}}\n', '{"mark":"../../..","files":{}}\n',
    '{"mark":"0123abcd","files":[]}\n', '{"mark":"0123abcd","files":{"../precious":1}}\n',
    '{"mark":"0123abcd","files":{"..":1}}\n', '{"mark":"0123abcd","files":{"":1}}\n',
    '{"mark":"0123abcd","files":{"x.gguf":1e400}}\n', '{"mark":"0123abcd","files":{"\\ud800":1}}\n',
    "[" * 100_000 + "\n",
])  # fmt: skip
def test_records_that_are_damaged(text: str, tmp_path: Path) -> None:
    file = record(tmp_path, text)
    with pytest.raises(OutputError, match="record of an interrupted replacement is damaged"):
        write(tmp_path, "new")
    assert contents(tmp_path) == {file.name: text}


@pytest.mark.parametrize(
    "name", ["notes.txt", "y.gguf", "xx-00001-of-00003.gguf", "x-00001-of-00003.txt", "x"]
)
@pytest.mark.parametrize("old", [True, False])
def test_a_record_touches_only_files_of_its_own_set(old: bool, name: str, tmp_path: Path) -> None:
    """One that was downloaded with a model could name any file beside it."""
    (tmp_path / name).write_text("precious")
    if old:
        (tmp_path / f"{name}.0123abcd.old").write_text("foreign")
    inode = (tmp_path / name).stat().st_ino
    record(tmp_path, json.dumps({"mark": "0123abcd", "files": {NAMES[0]: 1, name: inode}}) + "\n")
    before = contents(tmp_path)
    for output in ("x.gguf", NAMES[1]):
        with pytest.raises(
            OutputError, match=rf"not of this output[\s\S]*x\.gguf\.bamba-commit[\s\S]*{name}"
        ):
            check_target(tmp_path / output, True, ())
        with pytest.raises(OutputError, match="not of this output"):
            write(tmp_path, "new", names=(output,))
    assert contents(tmp_path) == before


def test_a_record_of_another_user_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "old")
    inodes = {name: (tmp_path / name).stat().st_ino for name in NAMES}
    file = record(tmp_path, json.dumps({"mark": "0123abcd", "files": inodes}) + "\n")
    with monkeypatch.context() as patch:
        patch.setattr(commit, "is_own", lambda *_: False)
        with pytest.raises(OutputError, match="another user"):
            write(tmp_path, "new")
        assert contents(tmp_path) == all_of("old") | {file.name: file.read_text()}
        file.write_text("")  # nothing was begun
        write(tmp_path, "new")
    assert contents(tmp_path) == all_of("new")


def test_whose_a_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = tmp_path.stat()
    assert is_own(status, tmp_path)
    foreign = SimpleNamespace(st_uid=status.st_uid + 1)
    assert not is_own(foreign, tmp_path)  # type: ignore[arg-type]
    assert not is_own(foreign, tmp_path / "nowhere")  # type: ignore[arg-type]
    monkeypatch.setattr(os, "geteuid", lambda: status.st_uid + 1)
    assert is_own(status, tmp_path)  # a server that gives this user's new files to another


def test_a_torn_record_says_that_nothing_was_begun(tmp_path: Path) -> None:
    write(tmp_path, "old")
    for text in ("", '{"mark":"0123abcd","fil'):
        record(tmp_path, text)
        commit.restore(tmp_path / NAMES[1])
        assert contents(tmp_path) == all_of("old")


def test_a_record_is_a_regular_file(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".x.gguf.bamba-commit").symlink_to("precious")
    with pytest.raises(OutputError):
        write(tmp_path, "new")
    assert (tmp_path / "precious").read_text() == "mine"
    (tmp_path / ".x.gguf.bamba-commit").unlink()
    os.mkfifo(tmp_path / ".x.gguf.bamba-commit")
    with pytest.raises(OutputError, match="not a regular file"):
        write(tmp_path, "new")


@pytest.mark.parametrize("name", ["a\nb", "ö 💾", "-rf", "%s{x}*?[", os.fsdecode(b"\xff\xfe"), "x" * 200])
def test_names_of_odd_characters(name: str, tmp_path: Path) -> None:
    names = tuple(f"{name}{number}" for number in range(2))
    for text in ("old", "new"):
        write(tmp_path, text, names=names)
        assert contents(tmp_path) == dict.fromkeys(names, text)


def test_links_are_replaced_and_their_targets_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blobs").mkdir()
    for name in NAMES:
        (tmp_path / "blobs" / name).write_text("blob")
        (tmp_path / name).symlink_to(tmp_path / "blobs" / name)
    with monkeypatch.context() as patch:
        break_at(patch, 3, OSError(errno.EIO, "Input/output error"))
        with pytest.raises(OutputError):
            write(tmp_path, "new")
    assert all((tmp_path / name).is_symlink() for name in NAMES)
    write(tmp_path, "new")
    assert not any((tmp_path / name).is_symlink() for name in NAMES)
    assert contents(tmp_path / "blobs") == all_of("blob")
