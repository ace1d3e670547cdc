"""Triton's cache of compiled kernels, with errors that name it instead of looking like errors of a model's file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton import knobs
from triton.runtime.cache import FileCacheManager

from bamba_reference.torch.backend import BackendError


class NamedCacheManager(FileCacheManager):  # type: ignore[misc]
    """Triton's own manager; raises ``BackendError`` if it cannot read or write its directory."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _named():
            super().__init__(*args, **kwargs)

    def put(self, *args: Any, **kwargs: Any) -> Any:
        with _named():
            return super().put(*args, **kwargs)

    def get_group(self, *args: Any) -> Any:
        with _named():
            return super().get_group(*args)


def name_errors() -> None:
    """Make Triton use it, unless the user has chosen another manager."""
    if knobs.cache.manager_class in (None, FileCacheManager):
        # Not by assignment, which would export it to the environment of child processes that may not have it.
        vars(knobs.cache)["manager_class"] = NamedCacheManager


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: an index that is not JSON
        raise BackendError(
            "Triton cannot use its cache of compiled kernels",
            where=knobs.cache.dir,
            found=getattr(error, "strerror", None) or str(error),
            fix="free space there, remove the directory, or set TRITON_CACHE_DIR to another one",
        ) from error
