"""Changes to bytes that know nothing of what the bytes mean, and to what stands at a file's name."""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatch
from random import Random

from tests.fuzz.tree import Directory, Entry, Fifo, Link, Shrinks, Sparse, Tree, Unreadable

Bytes = Callable[[Random, bytes], bytes]

INTERESTING = (0, 1, 2, 7, 8, 16, 31, 32, 127, 128, 255, 256, 4095, 65535, 65536, 2**24, 2**28, 2**29, 2**30,
               2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip


def blind(random: Random, raw: bytes) -> bytes:
    """One change of any bytes: flip, overwrite, insert, remove, repeat, splice, truncate, extend."""
    return random.choice(_CHANGES)(random, raw)


def _flip(random: Random, raw: bytes) -> bytes:
    changed = bytearray(raw or b"\0")
    for _ in range(random.choice((1, 1, 1, 2, 8, 64))):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _flip_early(random: Random, raw: bytes) -> bytes:
    changed = bytearray(raw or b"\0")
    changed[random.randrange(min(len(changed), 64))] = random.randrange(256)
    return bytes(changed)


def _number(random: Random, raw: bytes) -> bytes:
    """A number of 1 to 8 bytes that readers stumble over, at any place."""
    width, code = random.choice(((1, "B"), (2, "H"), (4, "I"), (8, "Q"), (4, "i"), (8, "d"), (4, "f")))
    if code in "df":
        packed = struct.pack(f"<{code}", random.choice((float("nan"), float("inf"), -1.0, 0.0, 1e38)))
    else:
        number = random.choice(INTERESTING) % 2 ** (8 * width - (code == "i"))
        packed = struct.pack(f"{random.choice('<<<>')}{code}", number)
    at = random.randrange(max(1, len(raw) - width + 1))
    return raw[:at] + packed + raw[at + width :]


def _remove(random: Random, raw: bytes) -> bytes:
    at = random.randrange(len(raw) + 1)
    return raw[:at] + raw[at + random.choice((1, 1, 2, 4, 8, 100, 4096)) :]


def _insert(random: Random, raw: bytes) -> bytes:
    at = random.randrange(len(raw) + 1)
    return raw[:at] + random.randbytes(random.choice((1, 1, 2, 4, 8, 100, 4096))) + raw[at:]


def _splice(random: Random, raw: bytes) -> bytes:
    start, to = random.randrange(len(raw) + 1), random.randrange(len(raw) + 1)
    piece = raw[start : start + random.choice((1, 4, 16, 256, 4096))]
    return raw[:to] + piece + raw[to + random.choice((0, len(piece))) :]


def _truncate(random: Random, raw: bytes) -> bytes:
    return raw[
        : random.choice((0, 1, 4, 8, 16, 24, len(raw) // 2, len(raw) - 1, random.randrange(len(raw) + 1)))
    ]


def _extend(random: Random, raw: bytes) -> bytes:
    more = random.choice((1, 8, 100, 5000))
    return raw + random.choice((bytes(more), random.randbytes(more), raw[:more]))


def _zeros(random: Random, raw: bytes) -> bytes:
    at = random.randrange(len(raw) + 1)
    count = random.choice((8, 64, 1024))
    return (raw[:at] + random.choice((b"\0", b"\xff")) * count + raw[at + count :])[: max(len(raw), 1)]


_CHANGES: Sequence[Bytes] = (
    _flip, _flip, _flip_early, _number, _number, _remove, _insert, _splice, _truncate, _truncate, _extend, _zeros,
)  # fmt: skip


def odd_entry(random: Random, raw: bytes) -> Entry:
    """Something else at the name of a file of ``raw`` bytes."""
    # Half of the first steps, when headers are read, and half of those after them.
    shrinks = Shrinks(
        raw, random.choice((0, 8, len(raw) // 2, max(0, len(raw) - 1))), int(2 ** random.uniform(0, 12))
    )
    entries: tuple[Entry, ...] = (
        b"",
        Fifo(),
        Directory(),
        Link("loop"),
        Link("missing"),
        Link(random.choice(("/dev/zero", "/dev/null", "/dev/urandom", "/dev/full", "/proc/self/mem"))),
        Link("/etc/passwd"),
        Link("."),
        Link("x" * 255),
        Unreadable(raw),
        Sparse(raw, len(raw) + random.choice((1 << 16, 1 << 24, 3 << 30, 1 << 40))),
        Sparse(b"", random.choice((1, 3 << 30, 1 << 40))),
        *[shrinks] * 6,
    )  # fmt: skip
    return random.choice(entries)


def files(
    known: Mapping[str, Bytes], *, odd: float = 0.05, others: Collection[str] = ()
) -> Callable[[Random, Tree], Tree]:
    """A mutation of trees: of the files that a pattern of ``known`` names, each by its own changes, one to three.

    Some changes are blind; a share ``odd`` of the cases puts something else at the name, also of ``others``, and some
    remove a file.
    """

    def mutate(random: Random, tree: Tree) -> Tree:
        changed = dict(tree)
        for _ in range(random.choice((1, 1, 1, 1, 2, 2, 3))):
            candidates = [name for name in changed if _change(known, name) is not None]
            if not candidates:
                break
            name = random.choice(candidates)
            raw = changed[name]
            if not isinstance(raw, bytes):
                continue
            choice = random.random()
            if choice < odd:
                more = [name, *(other for other in changed if any(fnmatch(other, each) for each in others))]
                name = random.choice(more)
                held = changed[name]
                changed[name] = odd_entry(random, held if isinstance(held, bytes) else b"")
            elif choice < odd + 0.01:
                del changed[name]
            elif choice < odd + 0.12:
                changed[name] = blind(random, raw)
            else:
                change = _change(known, name)
                assert change is not None
                changed[name] = change(random, raw)
        if any(entry == Link("loop") for entry in changed.values()):
            changed["loop"] = Link("loop")
        return changed

    return mutate


def _change(known: Mapping[str, Bytes], name: str) -> Bytes | None:
    return next((change for pattern, change in known.items() if fnmatch(name, pattern)), None)
