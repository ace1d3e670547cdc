"""Several files that replace others together: a replacement that was interrupted is undone by the next run.

N files take N renames. Before the first one, a record beside the files lists them; old files get a second name. The
record's last line, "done", is the moment at which the new set replaces the old one: without it the next run puts the
old files back, with it the next run removes their second names. A record is followed only where it is the user's own
and every name in it belongs to the set that is written: one that came with a downloaded model touches nothing else.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from bamba_quant.errors import OutputError
from bamba_quant.writers.names import flush_directory, is_own, output_error, remove_dead
from bamba_reference.errors import repr_short

_SHARD = re.compile(r"-[0-9]{5}-of-[0-9]{5}(?=\.[^.]*$)")
_PARTIAL = re.compile(r"(?P<file>.+)\.[0-9a-f]{8}\.partial", re.DOTALL)
_MARK = re.compile(r"[0-9a-f]{8}")
_MOST_BYTES = 16 << 20  # of a record: a hundred bytes a file
_RENAME_INSTEAD_OF_LINK = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


def partial_name(file: Path, mark: str) -> Path:
    """What ``file`` is called until it is whole."""
    return file.with_name(f"{file.name}.{mark}.partial")


def restore(*files: Path) -> None:
    """Undo, or tidy up after, an interrupted replacement of the set that ``files``, of one directory, belong to.

    Shards of a split file belong together, whatever their number; of other sets all files are given. Partial files of
    the set whose writers are dead are removed. Raises ``OutputError`` for a record that cannot be read or that is not
    of this set or user, and for files that cannot be put back.
    """
    first, names = files[0], {_set_name(file.name) for file in files}
    try:
        with _record(first, 0) as descriptor:
            if descriptor is not None:
                _settle(files, descriptor)
                _record_name(first).unlink()
                flush_directory(first.parent)
    except OSError as error:
        raise output_error(error, first) from error
    with suppress(OSError), os.scandir(first.parent) as entries:
        found = [(entry.name, _PARTIAL.fullmatch(entry.name)) for entry in entries]
        for name, match in found:
            if match and _set_name(match["file"]) in names:
                remove_dead(first.with_name(name))


def put(partial: Path, file: Path, overwrite: bool) -> None:
    """Give ``partial`` the name ``file``. Raises ``FileExistsError`` for one that exists, unless ``overwrite``."""
    if overwrite:
        partial.replace(file)
        return
    try:
        # Unlike a rename, a link never replaces a file that appeared in the meantime.
        file.hardlink_to(partial)
    except OSError as error:
        if error.errno not in _RENAME_INSTEAD_OF_LINK:
            raise
        if os.path.lexists(file):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(file)) from error
        partial.rename(file)


def put_together(files: Sequence[Path], mark: str, overwrite: bool) -> None:
    """Give the partial files of ``mark`` the names ``files``, of one directory, all or none.

    Raises as ``put`` does; then, and after an interrupt, the old files are back.
    """
    first = files[0]
    with _record(first, os.O_CREAT) as descriptor:
        assert descriptor is not None
        _settle(files, descriptor)
        inodes = {file.name: partial_name(file, mark).stat().st_ino for file in files}
        try:
            _write(descriptor, json.dumps({"mark": mark, "files": inodes}))
            flush_directory(first.parent)
            for file in files if overwrite else ():
                _keep(file, _old_name(file, mark))
            for file in files:
                put(partial_name(file, mark), file, overwrite)
            flush_directory(first.parent)
            _write(descriptor, "done")
        except BaseException:
            _settle(files, descriptor)
            _record_name(first).unlink()
            raise
        _settle(files, descriptor)
        _record_name(first).unlink()


def _settle(files: Sequence[Path], descriptor: int) -> None:
    """Do what the record under ``descriptor`` says is left to do, and empty it; may be interrupted and repeated."""
    begun = _read(files, descriptor)
    if begun is not None:
        mark, inodes, done = begun
        for name, inode in inodes.items():
            target = files[0].with_name(name)
            old = _old_name(target, mark)
            if done:
                old.unlink(missing_ok=True)
            elif os.path.lexists(old):
                old.replace(target)
                old.unlink(missing_ok=True)  # two names of one file: the rename did nothing
            elif os.path.lexists(target) and target.lstat().st_ino == inode:
                target.unlink()
        flush_directory(files[0].parent)
    os.ftruncate(descriptor, 0)


def _keep(file: Path, old: Path) -> None:
    """Give ``file``, if it exists, the second name ``old``; rename it where the system has no hard links."""
    with suppress(FileNotFoundError):
        try:
            os.link(file, old, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _RENAME_INSTEAD_OF_LINK:
                raise
            file.rename(old)


@contextmanager
def _record(file: Path, flags: int) -> Iterator[int | None]:
    """The record of ``file``'s set, open and locked; None where there is none and ``flags`` do not create it.

    Waits for another run that is publishing.
    """
    name = _record_name(file)
    while True:
        try:
            descriptor = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | flags, 0o666)
        except FileNotFoundError:
            if flags:
                raise
            yield None
            return
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise _damaged(file, "not a regular file")
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            status = os.fstat(descriptor)
            if status.st_nlink:  # else its run removed it
                if status.st_size and not is_own(status, name.parent):
                    raise _damaged(file, f"a record of another user, number {status.st_uid}")
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _read(files: Sequence[Path], descriptor: int) -> tuple[str, Mapping[str, int], bool] | None:
    """Mark, inodes of new files by name, and whether they are all in place; None where nothing was begun."""
    names = {_set_name(file.name) for file in files}
    raw = os.pread(descriptor, _MOST_BYTES, 0)
    first, newline, rest = raw.partition(b"\n")
    if not newline and len(raw) < _MOST_BYTES:  # torn while it was written, before anything was renamed
        return None
    try:
        begun = json.loads(first)
        mark, inodes = begun["mark"], begun["files"]
        if not _MARK.fullmatch(mark):
            raise ValueError(f"the mark {repr_short(mark)} is not eight hexadecimal digits")
        for name, inode in inodes.items():
            if _set_name(name) not in names:
                raise ValueError(f"the name {repr_short(name)}, which does not belong to the output")
            if type(inode) is not int:
                raise ValueError("an inode that is not a whole number")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(files[0], str(error)) from None
    return mark, inodes, rest == b"done\n"


def _damaged(file: Path, found: str) -> OutputError:
    return OutputError(
        "the record of an interrupted replacement is damaged or not of this output",
        where=_record_name(file),
        found=found[:200],
        expected="a record that this user's run made of the files it was replacing",
        fix="check the files that are named like the output, then remove the record",
    )


def _write(descriptor: int, line: str) -> None:
    raw = (line + "\n").encode()
    os.lseek(descriptor, 0, os.SEEK_END)
    while raw:
        raw = raw[os.write(descriptor, raw) :]
    os.fsync(descriptor)


def _set_name(name: str) -> str:
    """The name of the set that a file belongs to: its own, without the numbers of a shard."""
    return _SHARD.sub("", name)


def _record_name(file: Path) -> Path:
    return file.with_name(f".{_set_name(file.name)}.bamba-commit")


def _old_name(file: Path, mark: str) -> Path:
    return file.with_name(f"{file.name}.{mark}.old")
