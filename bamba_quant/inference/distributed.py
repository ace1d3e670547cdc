"""Processes that work on one text together: each has its part, and what all found comes together in their order.

torchrun starts them, or the command itself; one process alone is the same code with one part. Values travel whole,
through torch.distributed's key-value store, and nothing is added up on the way, so that what follows is the same to the
last bit however many they are. A process that waits for others polls, and gets an error when one of them has ended.

The store has no access control of its own. ``exchange`` authenticates every value with a token of the run, which the
processes are given in the environment variable BAMBA_QUANT_TOKEN: the same user and root can read it, nobody else.
``--processes`` draws a token for each run, and its store listens on 127.0.0.1 only. torchrun draws none, and its store
listens on every interface: whoever reaches the port can end such a run or change its figures, but not run code. Give
torchrun a secret value of BAMBA_QUANT_TOKEN, the same on every machine, and the figures are protected as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from bamba_quant.errors import BambaQuantError
from bamba_quant.inference.exchange import Exchange, RankError

if TYPE_CHECKING:
    from bamba_reference.packing import Ints
    from bamba_reference.runtime.perplexity import Likelihoods, Scorer

T = TypeVar("T")

# The secret of a run, in hexadecimal digits; --processes draws one for each run.
TOKEN = "BAMBA_QUANT_TOKEN"
_SECONDS_TO_MEET = 300


class FailedElsewhereError(BambaQuantError):
    """Another process of the same run has said already why the run ends."""


@dataclass(frozen=True)
class Ranks:
    """This process is number ``rank`` of ``size``, and number ``local`` of ``local_size`` on its machine."""

    rank: int = 0
    size: int = 1
    local: int = 0
    local_size: int = 1
    _exchange: Exchange | None = None

    @property
    def first(self) -> bool:
        """Whether this process prints, writes files and shows progress."""
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

    def gather(self, value: T, *records: type) -> list[T]:
        """Every process's ``value`` in the order of the ranks, in every process, once all have called this.

        A value consists of what ``serialization`` encodes: plain values, arrays and the dataclasses ``records``. Raises
        ``RankError`` when another process is gone, or when a value that arrives is not what its process sent.
        """
        return self._exchange.gather(value, *records) if self._exchange else [value]

    def share(self, value: T | None = None, *records: type) -> T:
        """The first process's ``value``, in every process; ``records`` as in ``gather``."""
        found = self.gather(value if self.first else None, *records)[0]
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


SINGLE_PROCESS = Ranks()


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Connect the processes that torchrun started with this one; ``SINGLE_PROCESS`` if there are none.

    When several of them fail, the first error is raised as it is and the others become ``FailedElsewhereError``, so
    that one error is reported. Raises ``RankError`` when the processes cannot connect to one another.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        yield SINGLE_PROCESS
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


def spread_over_ranks(score: Scorer, together: Callable[[int], int], ranks: Ranks) -> Scorer:
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


def _meet() -> Exchange:
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = _store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), rank, size)
    except KeyError as error:
        raise _not_met(f"{error.args[0]} is not set") from error
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        raise _not_met(str(error).splitlines()[0]) from error
    return Exchange(store, rank, size, os.environ.get(TOKEN, "").encode())


def _store(host: str, port: int, rank: int, size: int) -> Any:
    """The store at this address, in which the first process holds it unless torchrun or ``--processes`` does."""
    import socket

    from torch.distributed import TCPStore

    more: dict[str, Any] = {"timeout": timedelta(seconds=_SECONDS_TO_MEET)}
    holds = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if holds and (address := _loopback(host)):  # torch itself listens on every interface
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        more["master_listen_fd"] = socket.create_server((address, port), family=family).detach()
    return TCPStore(host, port, size, holds, **more)


def _loopback(host: str) -> str | None:
    import ipaddress
    import socket

    address = socket.gethostbyname(host) if host == "localhost" else host
    try:
        return address if ipaddress.ip_address(address).is_loopback else None
    except ValueError:  # the name of another machine
        return None


def _not_met(found: str) -> RankError:
    return RankError(
        "the processes of this run did not connect to one another",
        found=found,
        expected="the variables RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them",
        fix="start with --processes N, or torchrun --nproc-per-node N -m bamba_quant_cli, or unset WORLD_SIZE",
    )
