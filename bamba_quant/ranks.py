"""Processes that work on one text together: each has its part, and what all found comes together in their order.

torchrun starts them, or the command itself; one process alone is the same code with one part. Values travel whole,
through torch.distributed's key-value store, and nothing is added up on the way, so that what follows is the same to the
last bit however many they are. A process that waits for others looks again and again, and is told when one of them is
gone.
"""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from bamba_quant.errors import BambaQuantError

if TYPE_CHECKING:
    from bamba_reference.packing import Ints
    from bamba_reference.perplexity import Likelihoods, Scorer

T = TypeVar("T")

# Bytes of one value of the store, which takes 8 MiB at most.
_PIECE = 1 << 22
_SECONDS_TO_MEET = 300
_SECONDS_BETWEEN_LOOKS = 0.01
# A process shows a sign of life every so many seconds; one that stayed silent over so many of another's is gone.
_SECONDS_BETWEEN_SIGNS = 5.0
_SIGNS_MISSED = 12
_GONE = "other lines say how it ended; one that was killed may have run out of memory"


class RankError(BambaQuantError):
    """Processes that cannot work together, or of which one is gone."""


class FailedElsewhereError(BambaQuantError):
    """Another process of the same run has said already why the run ends."""


@dataclass(frozen=True)
class Ranks:
    """This process is number ``rank`` of ``size``, and number ``local`` of ``local_size`` on its machine."""

    rank: int = 0
    size: int = 1
    local: int = 0
    local_size: int = 1
    _exchange: _Exchange | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that prints, writes and tells how far the run is."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device ``name`` means here: of several processes each has a "cuda" of its own."""
        return f"cuda:{self.local}" if name == "cuda" and self.size > 1 else name

    def part(self, count: int, together: int, *, first: int = 0, besides: int = 0) -> slice:
        """Which of ``count`` chunks are this process's: as many as the others', in the order of the ranks.

        Parts begin at multiples of ``together`` chunks. The first process has at least ``first``, and has fewer than
        the others by what it does ``besides``, in chunks. Raises ``RankError`` where there is nothing for a process
        to do.
        """
        groups, kept = -(-count // together), -(-min(first, count) // together)
        begin = max(1, kept, (groups - (self.size - 1) * round(besides / together)) // self.size)
        most = 1 + groups - begin if self.size > 1 else 1
        if self.size > most:
            least = (self.size - 2 + max(1, -(-first // together))) * together + 1
            raise RankError(
                "there are more processes than parts of the text",
                found=f"{self.size} processes; {count} chunks, which are parted by {together}"
                + (f", the first {kept * together} not at all" if first > together else ""),
                expected=f"{least} chunks or more, or "
                + (f"at most {most} processes" if most > 1 else "one process"),
                fix="give a longer text or more --chunks, or start fewer processes",
            )
        bounds = [0, *(begin + (groups - begin) * i // max(1, self.size - 1) for i in range(self.size))]
        return slice(bounds[self.rank] * together, min(count, bounds[self.rank + 1] * together))

    def gather(self, value: T) -> list[T]:
        """Every process's ``value`` in the order of the ranks, in every process, once all have called this."""
        return self._exchange.gather(value) if self._exchange else [value]

    def share(self, value: T | None = None) -> T:
        """The first process's ``value``, in every process."""
        found = self.gather(value if self.first else None)[0]
        assert found is not None
        return found

    def check(self) -> None:
        """Raise ``RankError`` when another process is gone."""
        if self._exchange:
            self._exchange.check()

    def command(self, words: Sequence[str]) -> list[str]:
        """The words of a command line that runs ``bamba-quant`` with ``words`` in as many processes."""
        if self.size == 1:
            return ["bamba-quant", *words]
        machines = ["--nnodes", str(self.size // self.local_size)] if self.size > self.local_size else []
        started = ["torchrun", *machines, "--nproc-per-node", str(self.local_size)]
        return [*started, "-m", "bamba_quant_cli", *words]


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that were started with this one, as torchrun does it; ``ALONE`` where none was.

    Of errors that several of them meet, the first goes on and becomes ``FailedElsewhereError`` in the others, so that
    one is told. Raises ``RankError`` when they do not find together.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        yield ALONE
        return
    exchange = _meet()
    try:
        yield Ranks(
            exchange.rank,
            exchange.size,
            int(os.environ.get("LOCAL_RANK", exchange.rank)),
            int(os.environ.get("LOCAL_WORLD_SIZE", exchange.size)),
            exchange,
        )
        exchange.finish()
    except Exception as error:
        if exchange.is_first_to_fail():
            raise
        raise FailedElsewhereError("another process of this run has failed") from error
    finally:
        exchange.leave()


def spread(score: Scorer, together: Callable[[int], int], ranks: Ranks) -> Scorer:
    """``score`` over the parts of all processes: every one yields all chunks, in the text's order.

    ``together`` says by their length how many chunks ``score`` works on at once. The first process yields its own
    as they are scored.
    """

    def scored(cut: Ints) -> Iterator[Likelihoods]:
        kept = []
        n, ctx = cut.shape
        for nll in score(cut[ranks.part(n, together(ctx))]):
            ranks.check()
            kept.append(nll)
            if ranks.first:
                yield nll
        for part in ranks.gather(kept)[1 if ranks.first else 0 :]:
            yield from part

    return scored


class _Exchange:
    """What processes tell one another through a store that all reach, and who of them is still there."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._store = store
        self._rounds = 0
        self._lost: RankError | None = None
        self._left = threading.Event()
        self._signs = threading.Thread(target=self._live, name="signs of life", daemon=True)
        self._signs.start()

    def gather(self, value: Any) -> list[Any]:
        self._rounds += 1
        with _reaching():
            pieces = self._put(value)
            found = [value if rank == self.rank else self._take(rank) for rank in range(self.size)]
            read = f"{self._rounds}/read"
            self._store.add(read, 1)
            self._until(lambda: int(self._store.add(read, 0)) == self.size)
            for piece in pieces:  # which all have read
                self._store.delete_key(piece)
        return found

    def finish(self) -> None:
        """Of the first process, which may hold the store, wait until the others need it no longer."""
        with _reaching():
            if self.rank:
                self._store.add("finished", 1)
            else:
                self._until(lambda: int(self._store.add("finished", 0)) == self.size - 1)

    def check(self) -> None:
        if self._lost:
            raise self._lost

    def is_first_to_fail(self) -> bool:
        try:
            return int(self._store.add("failures", 1)) == 1
        except RuntimeError:  # then nobody can be asked
            return True

    def leave(self) -> None:
        self._left.set()
        self._signs.join(_SECONDS_BETWEEN_SIGNS)

    def _put(self, value: Any) -> list[str]:
        raw = pickle.dumps(value)
        keys = [self._key(self.rank, place) for place in range(-(-len(raw) // _PIECE))]
        for place, key in enumerate(keys):
            self._store.set(key, raw[place * _PIECE : (place + 1) * _PIECE])
        self._store.set(self._key(self.rank, "pieces"), str(len(keys)))
        return keys

    def _take(self, rank: int) -> Any:
        pieces = self._key(rank, "pieces")
        self._until(lambda: bool(self._store.check([pieces])))
        count = int(self._store.get(pieces))
        return pickle.loads(b"".join(self._store.get(self._key(rank, place)) for place in range(count)))

    def _key(self, rank: int, what: object) -> str:
        return f"{self._rounds}/{rank}/{what}"

    def _until(self, there: Callable[[], bool]) -> None:
        while not there():
            self.check()
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _live(self) -> None:
        """Show a sign of life and look for the others', until this process leaves.

        Missed signs are counted by this process's own, so that all may be stopped together and go on.
        """
        seen, missed, count = dict[int, bytes](), dict[int, int](), 0
        while not self._left.wait(_SECONDS_BETWEEN_SIGNS):
            count += 1
            try:
                self._store.set(f"signs/{self.rank}", str(count))
                for other in range(self.size):
                    key = f"signs/{other}"
                    sign = self._store.get(key) if self._store.check([key]) else b""
                    missed[other] = 0 if sign != seen.get(other) else missed[other] + 1
                    seen[other] = sign
            except RuntimeError as error:
                self._lost = self._lost or _unreachable(error)
                return
            silent = [other for other, times in missed.items() if times > _SIGNS_MISSED]
            if silent:
                self._lost = RankError(
                    "a process of this run has shown no sign of life for too long",
                    found=f"rank {silent[0]} of {self.size}, silent for {_SIGNS_MISSED * _SECONDS_BETWEEN_SIGNS:.0f} s",
                    fix="look what it waits for, a disk, a GPU or memory; it is ended with the others",
                )


def _meet() -> _Exchange:
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=_SECONDS_TO_MEET)))
    except (RuntimeError, ValueError) as error:
        raise RankError(
            "the processes of this run do not find together",
            found=str(error).splitlines()[0],
            expected="the variables RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them",
            fix="start with --processes N, or torchrun --nproc-per-node N -m bamba_quant_cli, or unset WORLD_SIZE",
        ) from error
    return _Exchange(store, rank, size)


@contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise _unreachable(error) from error


def _unreachable(error: RuntimeError) -> RankError:
    return RankError(
        "the process that holds this run's processes together is gone",
        found=str(error).splitlines()[0],
        fix=_GONE,
    )
