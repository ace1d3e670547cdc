"""Changes to safetensors files: the header's length, the entries of tensors, and the data behind."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from tests.fuzz.mutations.json_text import changed, dumped
from tests.fuzz.mutations.values import Pairs, Raw, number, odd_value

_DTYPES = (
    "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "BOOL", "F8_E4M3",
    "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64", "f32", "", "F32 ", "X", "\0", "\x1b[31m",
)  # fmt: skip
_LENGTHS = (0, 1, 2, 7, 8, 100_000_000, 100_000_001, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1)


def safetensors(random: Random, raw: bytes) -> bytes:
    """A change of the header's length, of its text or of one entry."""
    length = int.from_bytes(raw[:8], "little")
    try:
        header = json.loads(raw[8 : 8 + length], object_pairs_hook=Pairs)
    except (ValueError, RecursionError):
        return raw[: random.randrange(len(raw) + 1)]
    data = raw[8 + length :]
    choice = random.random()
    if choice < 0.08:
        return (
            random.choice(
                (random.choice(_LENGTHS), length + random.choice((-1, 1, 8)), len(raw) - 8)
            ).to_bytes(8, "little", signed=False)
            + raw[8:]
        )
    if choice < 0.13:
        return raw[:8] + raw[8 : 8 + length] + random.choice((data[:-1], data + b"\0", b"", data * 2))
    header = (
        changed(random, header)
        if not isinstance(header, Pairs) or not header or choice < 0.4
        else _entry(random, header)
    )
    text = dumped(header).encode("utf-8", "surrogatepass")
    if random.random() < 0.1:
        text += random.choice((b" " * 8, b" " * 100_000, b"\0", b"\n\n", b"{}"))
    return len(text).to_bytes(8, "little") + text + data


def _entry(random: Random, header: Pairs) -> Pairs:
    """Another dtype, shape or byte range of a tensor."""
    copied = Pairs(header)
    place = random.randrange(len(header))
    name, entry = header[place]
    if not isinstance(entry, Pairs) or name == "__metadata__":
        copied[place] = (name, changed(random, entry))
        return copied
    fields = Pairs(entry)
    choice = random.randrange(4)
    for at, (key, value) in enumerate(entry):
        if (key, choice) == ("dtype", 0):
            fields[at] = (key, random.choice(_DTYPES))
        elif (key, choice) == ("shape", 1) and isinstance(value, list):
            fields[at] = (key, _shape(random, value))
        elif (key, choice) == ("data_offsets", 2) and isinstance(value, list):
            fields[at] = (key, _offsets(random, value))
    if choice == 3:
        other = random.choice(header)[1]
        copied[place] = (name, random.choice((other, Pairs([*entry, ("extra", 1)]), Pairs(entry[1:]))))
        if random.random() < 0.3:
            copied.append((name, entry))
        return copied
    copied[place] = (name, fields)
    return copied


def _shape(random: Random, shape: list[Any]) -> list[Any]:
    return random.choice(
        (
            [],
            [0],
            shape[::-1],
            [*shape, 1],
            [1] * 100 + shape,
            [1] * 10_000 + shape,
            [0, 2**63],
            [0, *[2**62] * 5],
            [2**32, 2**32],
            [2**63, 2**63, 2],
            [10**300, 10**300],
            [*[10**15] * 300],
            [number(random), *shape[1:]],
            [odd_value(random, item) for item in shape],
            [True, *shape],
            [-1, *shape],
            [Raw("9" * 5000)],
            [Raw("9" * 4300), Raw("9" * 4300)],
        )
    )


def _offsets(random: Random, offsets: list[Any]) -> list[Any]:
    # An earlier change may have put something else in their place.
    begin, end = [*(each for each in offsets if type(each) is int), 0, 0][:2]
    return random.choice(
        (
            [begin + 4, end + 4],
            [begin, end + 4],
            [begin, end - 4],
            [end, begin],
            [0, end - begin],
            [begin],
            [],
            [begin, end, end],
            [number(random), end],
            [begin, number(random)],
            [2**63, 2**63 + end - begin],
            [2**64, 2**64 + end - begin],
            [-4, end - begin - 4],
            [begin + 0.0, end + 0.0],
        )
    )
