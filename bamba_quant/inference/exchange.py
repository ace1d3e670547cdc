"""What the processes of a run exchange through torch's key-value store, and which of them are still running.

The store may be reached by any process of the machine. Therefore values are bytes of ``serialization``, which
run no code when they are read, and each is authenticated: HMAC-SHA256 over its key and its bytes, with the run's token
as the key. A value that another process put, moved or changed is an error before it is decoded, and one that it deleted
is an error once its author reports that it had set it. Without a token, as under torchrun alone, the same checks detect
accidents, but not a process that computes the HMAC too: it can then change figures, but still not run code.
"""

from __future__ import annotations

import hmac
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from bamba_quant.errors import BambaQuantError

# Bytes of one value of the store, which takes 8 MiB at most.
_PIECE = 1 << 22
_SECONDS_BETWEEN_LOOKS = 0.01
# Each process sends a heartbeat at this interval; after this many missed ones it counts as gone.
_SECONDS_BETWEEN_SIGNS = 5.0
_SIGNS_MISSED = 12
_LENGTH = struct.Struct("<Q")
_SIGN = struct.Struct("<QQ")  # how many signs its process has shown, and how many steps it has done
_GONE = "see the other lines for how it ended; one that was killed may have run out of memory"


class RankError(BambaQuantError):
    """Processes that cannot work together, or one of which has ended."""


class Exchange:
    """One process's side: it is number ``rank`` of ``size``, and ``token`` is the secret that all of them share."""

    def __init__(self, store: Any, rank: int, size: int, token: bytes = b"") -> None:
        self.rank, self.size = rank, size
        self._store, self._token = store, token
        self._rounds = 0
        self._steps = [0] * size  # of each process; two a round: its value is there, it has read all values
        self._lost: RankError | None = None
        self._left = threading.Event()
        self._signs = threading.Thread(target=self._live, name="signs of life", daemon=True)
        self._signs.start()

    def gather(self, value: Any, *records: type) -> list[Any]:
        """Every process's ``value`` in the order of the ranks; ``records`` are the dataclasses in them."""
        from bamba_quant.inference.serialization import encode

        self._rounds += 1
        with _reaching():
            pieces = self._put(encode(value, records))
            found = [value if rank == self.rank else self._take(rank, records) for rank in range(self.size)]
            self._set(self._key(self.rank, "read"), b"")
            self._steps[self.rank] += 1
            for rank in range(self.size):
                self._wait_for(rank, "read", step=2 * self._rounds)
            for piece in pieces:  # which all have read
                self._store.delete_key(piece)
        return found

    def finish(self) -> None:
        """Tell the first process, which may hold the store, that this one has ended; the first waits for all."""
        with _reaching():
            if self.rank:
                self._set(f"finished/{self.rank}", b"")
            else:
                keys = {rank: f"finished/{rank}" for rank in range(1, self.size)}
                self._until(lambda: bool(self._store.check(list(keys.values()))))
                for rank, key in keys.items():
                    self._get(key, rank)

    def check(self) -> None:
        """Raise ``RankError`` when another process is gone."""
        if self._lost:
            raise self._lost

    def is_first_to_fail(self) -> bool:
        """Whether no other process has called this before; the first one reports why the run ends."""
        key = "failed"
        own = self._sealed(key, _LENGTH.pack(self.rank))
        try:
            first = self._store.compare_set(key, "", own)
            self._opened(key, first, self.rank)
        except (RankError, RuntimeError):  # the store cannot be used
            return True
        return bool(first == own)

    def leave(self) -> None:
        """Show no further sign of life."""
        self._left.set()
        self._signs.join(_SECONDS_BETWEEN_SIGNS)

    def _put(self, raw: bytes) -> list[str]:
        keys = [self._key(self.rank, place) for place in range(-(-len(raw) // _PIECE))]
        for place, key in enumerate(keys):
            self._set(key, raw[place * _PIECE : (place + 1) * _PIECE])
        self._set(self._key(self.rank, "length"), _LENGTH.pack(len(raw)))
        self._steps[self.rank] += 1
        return keys

    def _take(self, rank: int, records: Collection[type]) -> Any:
        from bamba_quant.inference.serialization import SerializationError, decode

        head = self._wait_for(rank, "length", step=2 * self._rounds - 1)
        length = int.from_bytes(head, "little")
        raw = bytearray()
        while len(raw) < length:  # piece by piece, so that a false length reserves no memory
            key = self._key(rank, len(raw) // _PIECE)
            piece = self._get(key, rank)
            if len(piece) != min(_PIECE, length - len(raw)):
                raise self._changed(key, rank, f"{len(piece)} bytes of a value of {length}")
            raw += piece
        try:
            return decode(bytes(raw), records)
        except SerializationError as error:
            raise self._changed(self._key(rank, "length"), rank, str(error)) from error

    def _wait_for(self, rank: int, what: str, step: int) -> bytes:
        """A value of ``rank``, which sets it in its step number ``step``."""
        key = self._key(rank, what)

        def there() -> bool:
            done = self._steps[rank] >= step  # asked before the store is, which must have the value then
            found = bool(self._store.check([key]))
            if done and not found:
                raise self._changed(key, rank, "deleted")
            return found

        self._until(there)
        return self._get(key, rank)

    def _key(self, rank: int, what: object) -> str:
        return f"{self._rounds}/{rank}/{what}"

    def _set(self, key: str, payload: bytes) -> None:
        self._store.set(key, self._sealed(key, payload))

    def _get(self, key: str, rank: int) -> bytes:
        if not self._store.check([key]):  # where the store would wait for it
            raise self._changed(key, rank, "deleted")
        return self._opened(key, self._store.get(key), rank)

    def _sealed(self, key: str, payload: bytes) -> bytes:
        return self._digest(key, payload) + payload

    def _opened(self, key: str, sealed: bytes, rank: int) -> bytes:
        digest, payload = sealed[:32], sealed[32:]
        if not hmac.compare_digest(digest, self._digest(key, payload)):
            raise self._changed(key, rank, "a value that is not authenticated by this run's token")
        return payload

    def _digest(self, key: str, payload: bytes) -> bytes:
        name = key.encode()
        return hmac.digest(self._token, _LENGTH.pack(len(name)) + name + payload, "sha256")

    def _changed(self, key: str, rank: int, found: str) -> RankError:
        return RankError(
            "a value that the processes of this run exchange was changed by another process",
            where=f"key {key}, which rank {rank} of {self.size} sets",
            found=found,
            fix="find the process that writes to this run's store, and run again",
        )

    def _until(self, there: Callable[[], bool]) -> None:
        while not there():
            self.check()
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _live(self) -> None:
        """Show a sign of life and look for the others', until this process leaves.

        Missed signs are counted by this process's own, so that all may be stopped together and go on. A sign that is
        not later than the one before it is missed.
        """
        seen, missed, count = [0] * self.size, [0] * self.size, 0
        while not self._left.wait(_SECONDS_BETWEEN_SIGNS):
            count += 1
            try:
                self._set(f"signs/{self.rank}", _SIGN.pack(count, self._steps[self.rank]))
                for other in range(self.size):
                    missed[other] += 1
                    key = f"signs/{other}"
                    if other == self.rank or not self._store.check([key]):
                        continue
                    number, steps = _SIGN.unpack(self._opened(key, self._store.get(key), other))
                    if number > seen[other]:
                        seen[other], missed[other] = number, 0
                        self._steps[other] = steps
            except RankError as error:
                self._lost = self._lost or error
                return
            except (RuntimeError, struct.error) as error:
                self._lost = self._lost or _unreachable(error)
                return
            silent = [
                other for other in range(self.size) if other != self.rank and missed[other] > _SIGNS_MISSED
            ]
            if silent:
                self._lost = RankError(
                    "a process of this run does not respond",
                    found=f"rank {silent[0]} of {self.size}, silent for {_SIGNS_MISSED * _SECONDS_BETWEEN_SIGNS:.0f} s",
                    fix="find out whether that process waits for a disk, a GPU or memory; all processes are ended now",
                )


@contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise _unreachable(error) from error


def _unreachable(error: Exception) -> RankError:
    return RankError(
        "the process with this run's store has ended",
        found=str(error).splitlines()[0] if str(error) else type(error).__name__,
        fix=_GONE,
    )
