"""Changes to a SentencePiece model, field by field of its protocol buffer."""

from __future__ import annotations

import struct
from random import Random

from tests.fuzz.mutations.blind import INTERESTING
from tests.fuzz.mutations.values import STRINGS

Field = tuple[int, int, int | bytes]  # number, wire type, value

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # of ModelProto
_NESTED = {_PIECES, _TRAINER, _NORMALIZER, 4, 5}


def sentencepiece(random: Random, raw: bytes) -> bytes:
    """A change of one field of the model, or of one of a piece, the trainer or the normalizer."""
    try:
        fields = _fields(raw)
    except (IndexError, ValueError):
        return raw[: random.randrange(len(raw) + 1)]
    for _ in range(random.choice((1, 1, 2, 3))):
        if not fields:
            break
        # Of several hundred fields two are not pieces.
        places = [at for at, field in enumerate(fields) if field[0] != _PIECES]
        if random.random() < 0.5 or not places:
            places = list(range(len(fields)))
        at = random.choice(places)
        number, wire, value = fields[at]
        choice = random.random()
        if choice < 0.7 and number in _NESTED and isinstance(value, bytes):
            try:
                fields[at] = (number, wire, _packed(_one(random, _fields(value), number)))
            except (IndexError, ValueError):
                fields[at] = (number, wire, value[:-1])
        elif choice < 0.8:
            del fields[at]
        elif choice < 0.88:
            fields.insert(random.randrange(len(fields) + 1), fields[at])
        elif choice < 0.93:
            other = random.randrange(len(fields))
            fields[at], fields[other] = fields[other], fields[at]
        else:
            fields[at] = (
                random.choice((0, number, number + 1, 2**29 - 1)),
                random.choice((0, 1, 2, 3, 4, 5, 6, 7)),
                value,
            )
    packed = _packed(fields)
    return packed if random.random() < 0.95 else packed[: random.randrange(len(packed) + 1)]


def _one(random: Random, fields: list[Field], inside: int) -> list[Field]:
    choice = random.random()
    at = random.randrange(len(fields)) if fields else 0
    if inside == _PIECES and choice < 0.6:
        made: tuple[Field, ...] = (
            (1, 2, random.choice(STRINGS).encode("utf-8", "surrogatepass")),
            (1, 2, b"\xff\xfe"),
            (1, 2, b""),
            (2, 5, struct.pack("<f", random.choice((float("nan"), float("inf"), -float("inf"), 1e38, -0.0)))),
            (3, 0, random.choice((0, 1, 2, 3, 4, 5, 6, 7, 100, 2**32, 2**64 - 1))),
        )
        more = random.choice(made)
        return [more if number == more[0] else (number, wire, value) for number, wire, value in fields]
    if not fields or choice < 0.15:
        # Of the trainer 3 is the kind, 35 byte fallback, 40 to 43 are ids; of the normalizer 1 is the name.
        number = random.choice((1, 2, 3, 3, 4, 5, 24, 35, 40, 41, 42, 43, 45, 46, 47, 48))
        return [
            *fields,
            random.choice(
                (
                    (number, 0, random.choice(INTERESTING)),
                    (number, 2, random.choice(STRINGS).encode("utf-8", "surrogatepass")),
                )
            ),
        ]
    number, wire, value = fields[at]
    if choice < 0.75:
        if isinstance(value, int):
            fields[at] = (number, wire, random.choice((*INTERESTING, value ^ 1, value + 1)) % 2**64)
        elif wire == 2:
            fields[at] = (
                number,
                wire,
                random.choice(
                    (
                        b"",
                        value * 2,
                        value[:-1],
                        b"\xff" + value,
                        random.randbytes(64),
                        *(s.encode("utf-8", "surrogatepass") for s in STRINGS[:12]),
                    )
                ),
            )
        else:
            fields[at] = (number, wire, random.choice((b"\0", b"\xff", b"\x7f")) * len(value))
    elif choice < 0.85:
        del fields[at]
    else:
        fields[at] = (number, random.choice((0, 1, 2, 5)), value)
    return fields


def _fields(raw: bytes) -> list[Field]:
    """The fields of a message. Raises ``IndexError`` or ``ValueError`` for bytes that are none."""
    fields: list[Field] = []
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(raw, at)
            fields.append((number, wire, value))
            continue
        if wire == 2:
            size, at = _varint(raw, at)
        else:
            size = {1: 8, 5: 4}.get(wire, -1)
        if size < 0 or at + size > len(raw):
            raise ValueError("no message")
        fields.append((number, wire, raw[at : at + size]))
        at += size
    return fields


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _packed(fields: list[Field]) -> bytes:
    parts = bytearray()
    for number, wire, value in fields:
        parts += _as_varint(number << 3 | wire)
        if isinstance(value, int):
            parts += _as_varint(value)
        else:
            parts += (_as_varint(len(value)) if wire == 2 else b"") + value
    return bytes(parts)


def _as_varint(value: int) -> bytes:
    packed = bytearray()
    while value > 127:
        packed.append(value & 127 | 128)
        value >>= 7
    return bytes([*packed, value])
