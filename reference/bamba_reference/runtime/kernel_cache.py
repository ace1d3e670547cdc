"""Caches compiled kernels on disk, a file each, in a directory that no other user can write.

numba's own cache is not used: its errors reach the caller, it unpickles files without a check, and when two processes
compile different kernels of one name at a time, one can load the other's code. Here a kernel's file is named by a
digest of everything that determines its code, begins with a digest of its content, and appears by a rename. A file
that cannot be read or written is a warning, and the kernel is compiled.
"""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import secrets
import stat
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba.core import caching, compiler

_DIGEST_BYTES = hashlib.sha256().digest_size
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW


class KernelCache:
    """The cache of one function for numba's dispatcher; ``about`` identifies its compiler options.

    ``missed`` is called when the function is not in the cache, before it is compiled.
    """

    def __init__(self, function: Any, directory: Path, about: object, missed: Callable[[], None]) -> None:
        self._function, self._directory, self._about, self._missed = function, directory, about, missed
        self.cache_path = str(directory)  # read by the dispatcher's statistics

    def load_overload(self, signature: Any, target: Any) -> Any:
        """The cached code for ``signature``, or None."""
        found = self._load(signature, target)
        if found is None:
            self._missed()
        return found

    def _load(self, signature: Any, target: Any) -> Any:
        descriptor = _opened(self._directory)
        if descriptor is None:
            return None
        target.refresh()
        name = self._name(signature, target.codegen())
        try:
            kept = os.open(name, os.O_RDONLY | _FLAGS, dir_fd=descriptor)
            with os.fdopen(kept, "rb") as file:
                digest, raw = file.read(_DIGEST_BYTES), file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            _warn(self._directory, f"a kept kernel cannot be read ({error.strerror})")
            return None
        if digest == _digest(name, raw):
            try:
                return compiler.CompileResult._rebuild(target, *pickle.loads(raw))
            except Exception:  # noqa: BLE001 - numba and LLVM raise anything for foreign code
                pass
        _warn(self._directory, "a kept kernel is damaged")
        return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Cache ``compiled``, if possible."""
        descriptor = _opened(self._directory)
        if descriptor is None or compiled.library.has_dynamic_globals:
            return
        name = self._name(signature, compiled.codegen)
        raw = caching.dumps(compiled._reduce())
        partial = f"{name}.{secrets.token_hex(4)}.partial"
        try:
            made = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600, dir_fd=descriptor)
            try:
                with os.fdopen(made, "wb") as file:
                    file.write(_digest(name, raw) + raw)
                os.replace(partial, name, src_dir_fd=descriptor, dst_dir_fd=descriptor)
            except BaseException:
                os.unlink(partial, dir_fd=descriptor)
                raise
        except OSError as error:
            _warn(self._directory, f"a compiled kernel cannot be kept ({error.strerror})")

    def _name(self, signature: Any, codegen: Any) -> str:
        function = self._function
        cells = tuple(cell.cell_contents for cell in function.__closure__ or ())
        identity = (
            function.__module__,
            function.__qualname__,
            self._about,
            str(signature),
            codegen.magic_tuple(),
        )
        digest = hashlib.sha256(repr(identity).encode() + function.__code__.co_code + caching.dumps(cells))
        return f"{function.__name__}-{digest.hexdigest()[:32]}.nbc"


@cache
def _opened(directory: Path) -> int | None:
    """A descriptor of the directory, created if it is missing; None, with a warning, if it cannot be used.

    It must be this user's, and no other may write there, because its files are unpickled and run.
    """
    descriptor = None
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | _FLAGS)
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "the directory belongs to another user")
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(errno.EPERM, "other users can write to the directory")
        return descriptor
    except OSError as error:
        if descriptor is not None:
            os.close(descriptor)
        _warn(directory, f"compiled kernels cannot be kept ({error.strerror})")
        return None


def _digest(name: str, raw: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + raw).digest()


@cache
def _warn(directory: Path, what: str) -> None:
    """Once for each ``what``: only speed is lost."""
    warnings.warn(
        f"{what} in {directory}: kernels are compiled anew, which takes some seconds; if this comes again, free space "
        "there, remove the directory, or set NUMBA_CACHE_DIR to another one",
        stacklevel=2,
    )
