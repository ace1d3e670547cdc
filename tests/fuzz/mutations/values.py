"""Values that readers stumble over, as they are written in JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import Any

_LONG = 3000  # of what an earlier change made, which is not made a thousand times longer


@dataclass(frozen=True)
class Raw:
    """Text that stands for a value as it is, also where it is no valid one."""

    text: str


class Pairs(list):  # type: ignore[type-arg]
    """A JSON object as its (key, value) pairs, so that a key may stand there twice."""


NUMBERS = (
    "-1", "0", "1", "2", "3", "-0", "0.5", "8.0", "1e0", "1e3", "1e-320", "1e308", "1e400", "-1e400", "NaN",
    "Infinity", "-Infinity", str(2**15), str(2**31 - 1), str(2**31), str(2**32), str(2**53), str(2**53 + 1),
    str(2**62), str(2**63), str(2**64), str(-(2**31)), str(-(2**63)), "9" * 400, "9" * 5000, "-" + "9" * 5000,
    "1" + "0" * 400, "0x10", "01", "+1", "1_000", "1e", "1e99999999",
)  # fmt: skip

STRINGS = (
    "", " ", "a", "/", ".", "..", "../../../etc/passwd", "/dev/zero", "a" * 300, "a" * 70_000, "\0", "a\0b",
    "\x1b]0;title\x07",
    "\x1b[2K\rerased", "\n", "\r\n", "\u202egnp.exe", "\ufeff", "é", "日本", "𝄞", "\udc80", "\ud800",
    "\udfff\ud800",
    "None", "null", "true", "nan", "inf", "1", "-1", "1e400", "9" * 400, "%s%n", "{ftype}", "{0.__class__}",
    "re:(a+)+$", "re:(a|aa)+$",
    "re:(.*)*x", "re:[", "re:" + "(" * 200, "re:(?P<a>.)(?P=a)", "Linear", "F32", "BF16", "F8_E4M3", "bamba",
    "mamba2", "<unk>", "<s>", "▁",
    "[PAD5]", "model.safetensors", "float32", "bfloat16", "int8",
)  # fmt: skip


def text(string: str) -> Raw:
    """A JSON string, in one of two spellings."""
    return Raw(json.dumps(string))


def number(random: Random) -> Raw:
    return Raw(random.choice(NUMBERS))


def string(random: Random) -> Raw:
    return text(random.choice(STRINGS))


def nested(random: Random) -> Raw:
    """A value that is nested more deeply than a reader's stack goes."""
    depth = random.choice((30, 900, 3000, 100_000))
    kind = random.randrange(3)
    if kind == 0:
        return Raw("[" * depth + "]" * depth)
    if kind == 1:
        return Raw('{"a":' * depth + "0" + "}" * depth)
    return Raw("[" * depth)


def many(random: Random) -> Raw:
    """A long list, a large object, an object with one key twice among many, or one key many times."""
    count = random.choice((100, 3000, 3000, 20_000, 120_000))
    kind = random.randrange(5)
    if kind == 0:
        return Raw("[" + ",".join("0" * 1 for _ in range(count)) + "]")
    if kind == 1:
        return Raw("[" + ",".join(f'"{place}"' for place in range(count)) + "]")
    if kind == 2:
        return Raw("{" + ",".join(f'"k{place}":{place}' for place in range(count)) + "}")
    if kind == 3:
        return Raw("{" + ",".join(f'"k{place}":0' for place in range(count)) + f',"k{count - 1}":1}}')
    return Raw("{" + ",".join('"k":0' for _ in range(count)) + "}")


def odd_value(random: Random, old: Any = None) -> Any:
    """Another value in the place of ``old``: of another type, extreme, empty, or near it."""
    choice = random.random()
    if choice < 0.18:
        return number(random)
    if choice < 0.34:
        return string(random)
    if choice < 0.46:
        return random.choice((None, True, False, [], Pairs(), [None], [[]], Pairs([("", None)])))
    if choice < 0.50:
        return nested(random)
    if choice < 0.515:
        return many(random)
    return near(random, old)


def near(random: Random, old: Any) -> Any:
    """What differs from ``old`` a little, or is it in another form."""
    if isinstance(old, str | list) and len(old) > _LONG:
        return old[: random.choice((0, 1, _LONG))]
    if isinstance(old, bool) or old is None:
        return random.choice((not old, None, "true", 0, 1, [old]))
    if isinstance(old, int | float) and abs(old) < 1e300:
        return random.choice(
            (old + 1, old - 1, -old, old * 2, old * 1000, old * 2**20, old * 2**40, old / 2, float(old),
            str(old), [old], [old, old],
             Pairs([("value", old)]), Raw(f"{old}.0"), Raw(f"{old}e0"), bool(old), 0)
        )  # fmt: skip
    if isinstance(old, str):
        return random.choice(
            (old + "x", old[:-1], old.upper(), old[::-1], old * 2, old * 1000, [old], Pairs([(old, old)]),
            old + "\0", "\x1b[31m" + old,
             old + "\udc80", f" {old}", len(old))
        )  # fmt: skip
    if isinstance(old, Pairs):
        return random.choice(
            ([old], list(map(list, old)), [key for key, _ in old], Pairs(old * 2), Pairs(), None, "{}")
        )
    if isinstance(old, list):
        return random.choice(
            (old * 2, old * 100, old[:-1], old[::-1], [old], Pairs([(str(place), item) for place,
            item in enumerate(old)]), old[:1],
             old[0] if old else None, [*old, None], "[]", len(old))
        )  # fmt: skip
    return None
