"""Changes to JSON files by their structure: values, keys, and how the text is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from random import Random
from typing import Any

from tests.fuzz.mutations.values import STRINGS, Pairs, Raw, many, odd_value


def json_text(random: Random, raw: bytes) -> bytes:
    """One to three changes of the values and keys of a JSON file, or one of its text."""
    try:
        value = _parsed(raw)
    except (ValueError, RecursionError):
        return _spelled(random, raw)
    if random.random() < 0.1:
        return _spelled(random, raw)
    return dumped(changed(random, value)).encode("utf-8", "surrogatepass")


def changed(random: Random, value: Any, odd: Callable[[Random, Any], Any] = odd_value) -> Any:
    """``value`` with one to three changes; ``odd`` gives other values."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        value = _change(random, value, odd, 0)
    return value


@lru_cache(64)
def _parsed(raw: bytes) -> Any:
    # Changes copy what they change, so what is kept stays as it was.
    return json.loads(raw, object_pairs_hook=Pairs)


def _change(random: Random, value: Any, odd: Callable[[Random, Any], Any], depth: int) -> Any:
    """Change something in ``value``: in a container mostly something below it."""
    if not isinstance(value, list) or not value or random.random() < (0.03 if depth == 0 else 0.12):
        return odd(random, value)
    place = random.randrange(len(value))
    copied = type(value)(value)
    choice = random.random()
    if isinstance(value, Pairs):
        key, held = value[place]
        if choice < 0.72:
            copied[place] = (key, _change(random, held, odd, depth + 1))
        elif choice < 0.80:
            del copied[place]
        elif choice < 0.86:
            copied[place] = (
                random.choice((*STRINGS[:20], key + "x", key.upper(), f"{key}.{key}", "__proto__")),
                held,
            )
        elif choice < 0.91:
            copied.insert(random.randrange(len(value) + 1), (key, odd(random, held)))
        elif choice < 0.96:
            other = random.randrange(len(value))
            copied[place], copied[other] = (key, value[other][1]), (value[other][0], held)
        else:
            copied.append((random.choice((*STRINGS[:20], "x")), odd(random, held)))
        return copied
    if choice < 0.75:
        copied[place] = _change(random, value[place], odd, depth + 1)
    elif choice < 0.83:
        del copied[place]
    elif choice < 0.91:
        copied.insert(random.randrange(len(value) + 1), value[place])
    elif choice < 0.96:
        other = random.randrange(len(value))
        copied[place], copied[other] = value[other], value[place]
    else:
        copied.append(odd(random, value[place]))
    return copied


def dumped(value: Any) -> str:
    """The JSON text of a value in which objects are ``Pairs`` and parts may be ``Raw``.

    What is nested too deeply for that, by a change before, becomes a text that is nested deeply.
    """
    try:
        return _dumped(value)
    except RecursionError:
        return "[" * 3000


def _dumped(value: Any) -> str:
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {_dumped(held)}" for key, held in value) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_dumped, value)) + "]"
    return json.dumps(value)


def _spelled(random: Random, raw: bytes) -> bytes:
    """The same, or another, text in an unusual form."""
    text = raw.decode("utf-8", "surrogateescape")
    choice = random.randrange(17)
    if choice == 0:
        return b"\xef\xbb\xbf" + raw
    if choice == 1:
        return text.encode(random.choice(("utf-16", "utf-16-le", "utf-32", "utf-7")), "replace")
    if choice == 2:
        at = random.randrange(len(raw) + 1)
        return (
            raw[:at]
            + random.choice((b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xe9", b"\0", b"\x1b[2J"))
            + raw[at:]
        )
    if choice == 3:
        return raw + random.choice((raw, b"}", b"\0", b"//", b"{}", b"\x1a", b"nan"))
    if choice == 4:
        return random.choice(
            (b"", b"null", b"[]", b"{}", b"0", b'""', b"true", b"\n" * 1000, b"{", b"NaN", b"<html>")
        )
    if choice == 5:
        return b" " * random.choice((1000, 1 << 20)) + raw
    if choice == 6:
        return b"[" * random.choice((900, 3000, 100_000)) + raw
    if choice == 7:
        return text.replace('"', "'").encode("utf-8", "surrogateescape")
    if choice == 8:
        return text.replace(": ", ":\t/* c */").encode("utf-8", "surrogateescape")
    if choice == 9:
        return text.replace(",", ",,", 1).encode("utf-8", "surrogateescape")
    if choice == 10:
        return raw.replace(b"\n", b"\r\n")
    if choice == 11:
        return raw.rstrip()[:-1] + b',"twice": 1, "twice": 2}'
    if choice == 12:
        return raw.rstrip()[:-1] + b',"more": ' + many(random).text.encode() + b"}"
    if choice == 13:
        return b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    if choice == 14:
        return raw[: random.randrange(len(raw) + 1)]
    if choice == 15:
        return dumped([_parsed(raw)]).encode() if raw.lstrip().startswith(b"{") and _is_json(raw) else raw
    return raw.rstrip()[:-1] + b',"a": "' + b"x" * random.choice((5000, 2_000_000)) + b'"}'


def _is_json(raw: bytes) -> bool:
    try:
        _parsed(raw)
    except (ValueError, RecursionError):
        return False
    return True
