"""Changes to files of plain C structs: llama-imatrix's .dat and llama-perplexity's logits."""

from __future__ import annotations

import struct
from random import Random

from tests.fuzz.mutations.blind import INTERESTING, blind


def dat_imatrix(random: Random, raw: bytes) -> bytes:
    """Another count, length, number of calls, name or value of an old imatrix."""
    if len(raw) < 8:
        return blind(random, raw)
    places = _dat_numbers(raw)
    changed = bytearray(raw)
    for _ in range(random.choice((1, 1, 2))):
        choice = random.random()
        at = random.choice(places)
        if choice < 0.6:
            struct.pack_into("<i", changed, at, _int32(random, struct.unpack_from("<i", changed, at)[0]))
        elif choice < 0.8:
            place = random.randrange(max(1, len(changed) - 4))
            value = random.choice((float("nan"), float("inf"), -1.0, -0.0, 1e38, 1e-45, 0.0))
            struct.pack_into("<f", changed, place, value)
        else:
            end = random.choice(places)
            return bytes(changed[:at] + changed[end:])
    return bytes(changed)


def _dat_numbers(raw: bytes) -> list[int]:
    """Where the whole numbers of a valid file stand."""
    places, at = [0], 4
    (count,) = struct.unpack_from("<i", raw)
    try:
        for _ in range(max(0, min(count, 100))):
            places.append(at)
            at += 4 + struct.unpack_from("<i", raw, at)[0]
            places += [at, at + 4]
            at += 8 + 4 * struct.unpack_from("<i", raw, at + 4)[0]
        places += [at, at + 4]
    except struct.error:
        pass
    return [place for place in places if 0 <= place <= len(raw) - 4] or [0]


def logits(random: Random, raw: bytes) -> bytes:
    """Another context, vocabulary, number of chunks, token, scale or word."""
    if len(raw) < 28:
        return blind(random, raw)
    changed = bytearray(raw)
    for _ in range(random.choice((1, 1, 2))):
        choice = random.random()
        if choice < 0.5:
            at = random.choice((8, 12, 16))
            struct.pack_into("<i", changed, at, _int32(random, struct.unpack_from("<i", changed, at)[0]))
        elif choice < 0.7:
            at = 20 + 4 * random.randrange(max(1, (len(changed) - 24) // 4))
            struct.pack_into("<i", changed, at, _int32(random, 3))
        elif choice < 0.9:
            at = 20 + 4 * random.randrange(max(1, (len(changed) - 24) // 4))
            value = random.choice((float("nan"), float("inf"), float("-inf"), -1.0, 1e38, 3e38, 0.0))
            struct.pack_into("<f", changed, at, value)
        else:
            return bytes(changed[: random.choice((8, 19, 20, 24, len(changed) - 1, len(changed) - 2))])
    return bytes(changed)


def _int32(random: Random, old: int) -> int:
    number = random.choice((*INTERESTING, -1, -(2**31), old + 1, old - 1, old * 2, old // 2, -old))
    return (number + 2**31) % 2**32 - 2**31
