"""Changes to GGUF files by their grammar: values of other types, counts that lie, tensors that overlap."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

from tests.fuzz.mutations.blind import blind
from tests.fuzz.mutations.gguf_file import ARRAY, SCALARS, STRING, Gguf, Info, Items, Literal, packed, parsed
from tests.fuzz.mutations.values import STRINGS

_NUMBERS = (
    0, 1, 2, 3, 7, 8, 31, 32, 33, 64, 127, 255, 256, 1000, 65535, 65536, 2**20, 2**24, 2**28, 2**29, 2**30,
    2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62,
    2**63 - 1, 2**63, 2**64 - 1, -1, -2, -32, -(2**31), -(2**63), 0.5, 1.5, -1.0, 1e-45, 1e38, 1e300,
    float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
_TYPES = (*range(45), 99, 999, 2**16, 2**31, 2**32 - 1)
_KEYS = (
    b"general.alignment", b"general.architecture", b"general.type", b"general.file_type", b"general.name",
    b"general.base_model.count", b"general.dataset.count",
    b"general.base_model.0.name", b"general.base_model.0.repo_url", b"general.tags", b"general.languages",
    b"general.license", b"general.quantization_version",
    b"split.no", b"split.count", b"split.tensors.count", b"tokenizer.ggml.model", b"tokenizer.ggml.pre",
    b"tokenizer.ggml.tokens", b"tokenizer.ggml.token_type",
    b"tokenizer.ggml.scores", b"tokenizer.ggml.merges", b"tokenizer.ggml.bos_token_id",
    b"tokenizer.ggml.eos_token_id", b"tokenizer.ggml.eot_token_id", b"tokenizer.ggml.eom_token_id",
    b"tokenizer.ggml.unknown_token_id", b"tokenizer.ggml.padding_token_id", b"tokenizer.ggml.add_bos_token",
    b"tokenizer.ggml.add_eos_token", b"tokenizer.ggml.add_space_prefix",
    b"tokenizer.ggml.remove_extra_whitespaces", b"tokenizer.ggml.precompiled_charsmap",
    b"tokenizer.chat_template", b"tokenizer.chat_templates", b"tokenizer.chat_template.x",
    b"granitehybrid.rope.scaling.finetuned", b"granitehybrid.rope.dimension_count",
    b"granitehybrid.attention.key_length", b"granitehybrid.expert_count", b"granitehybrid.embedding_scale",
    b"bamba_quant.version", b"quantize.imatrix.file", b"imatrix.datasets", b"imatrix.chunk_count",
    b"imatrix.chunk_size", b"", b"x", b"\xff\xfe", b"\x1b]0;x\x07", b"a" * 70_000,
)  # fmt: skip


def gguf(random: Random, raw: bytes) -> bytes:
    """One to three changes of a GGUF file's lists."""
    try:
        file = parsed(raw)
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            change = random.choices(*zip(*_CHANGES.items(), strict=True))[0]  # type: ignore[arg-type]
            file = change(random, file)
        return packed(file)
    # Of a file that was changed before, arrays nested more deeply than this reads among them.
    except (struct.error, IndexError, ValueError, RecursionError):
        return blind(random, raw)


def _of_value(random: Random, file: Gguf) -> Gguf:
    """Another value, or type, of one key; keys of tokens are no more likely than others."""
    if not file.values:
        return file
    values = list(file.values)
    at = random.randrange(len(values))
    key, tag, value = values[at]
    values[at] = (key, *_other(random, tag, value))
    return replace(file, values=tuple(values))


def _other(random: Random, tag: int, value: Any) -> tuple[int, Any]:
    choice = random.random()
    if choice < 0.30 and tag in SCALARS and isinstance(value, int | float):  # another number of the same type
        near = (value + 1, value - 1, value * 2, value * 1024, -value, not value)
        return tag, random.choice((*_NUMBERS, *near))
    if choice < 0.30 and tag == STRING and isinstance(value, bytes):
        text = random.choice(STRINGS).encode("utf-8", "surrogatepass")
        return tag, random.choice(
            (text, b"", value + b"\0", value[:-1], value * 3, b"\xff\xfe" + value, b"\x1b[2K" + value)
        )
    if choice < 0.55 and isinstance(value, Items):
        return tag, _array(random, value)
    if choice < 0.65 and tag in SCALARS:  # the same number as another type
        return random.choice((*SCALARS, STRING)), value if random.random() < 0.8 else str(value).encode()
    return _fresh(random)


def _fresh(random: Random) -> tuple[int, Any]:
    """A value of any type."""
    choice = random.random()
    if choice < 0.35:
        return random.choice(tuple(SCALARS)), random.choice(_NUMBERS)
    if choice < 0.55:
        return STRING, random.choice(STRINGS).encode("utf-8", "surrogatepass")
    if choice < 0.62:
        depth = random.choice((1, 2, 20, 900, 3000, 20_000))
        return ARRAY, Literal(
            struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQ", random.choice((0, 8, 9)), 0)
        )
    if choice < 0.66:
        return random.choice((13, 14, 99, 255, 2**31, 2**32 - 1)), 0
    tag = random.choice((*SCALARS, STRING, ARRAY, 13))
    count = random.choice((0, 1, 2, 3, 100, 5000))
    item: Any = random.choice(_NUMBERS) if tag in SCALARS else b"token" if tag == STRING else Items(4, (1, 2))
    if tag == 13:
        return ARRAY, Literal(struct.pack("<IQ", 13, count))
    return ARRAY, Items(tag, (item,) * count)


def _array(random: Random, value: Items) -> Items:
    items = list(value.items)
    choice = random.randrange(12)
    at = random.randrange(len(items)) if items else 0
    if choice == 0 or not items:
        return replace(value, items=())
    if choice == 1:
        return replace(value, items=tuple(items[:at]))
    if choice == 2:
        return replace(value, items=(*items, items[at]))
    if choice == 3:
        return replace(
            value,
            count=random.choice(
                (len(items) + 1, len(items) - 1, 2**31, 2**32, 2**40, 2**61, 2**62, 2**63, 2**64 - 1)
            ),
        )
    if choice == 4:
        return replace(value, tag=random.choice((*SCALARS, STRING, ARRAY, 13, 2**32 - 1)))
    if choice == 5 and value.tag in SCALARS:
        return Items(random.choice(tuple(SCALARS)), value.items)
    if choice == 6:
        return Items(STRING, tuple(item if isinstance(item, bytes) else str(item).encode() for item in items))
    if choice == 7:
        return replace(value, items=tuple(items[::-1]))
    if choice == 8:
        return replace(value, items=(items[at],) * len(items))
    if value.tag == STRING:
        items[at] = random.choice(
            (
                b"",
                b" ",
                b"\xff",
                b"a b c",
                b"\0",
                items[at - 1],
                random.choice(STRINGS).encode("utf-8", "surrogatepass"),
            )
        )
    elif value.tag in SCALARS:
        items[at] = random.choice(_NUMBERS)
    return replace(value, items=tuple(items))


def _of_keys(random: Random, file: Gguf) -> Gguf:
    """A key removed, repeated, renamed or added."""
    values = list(file.values)
    choice = random.randrange(4)
    at = random.randrange(len(values)) if values else 0
    if choice == 0 and values:
        del values[at]
    elif choice == 1 and values:
        values.insert(random.randrange(len(values) + 1), (values[at][0], *_other(random, *values[at][1:])))
    elif choice == 2 and values:
        values[at] = (random.choice((*_KEYS, values[at][0] + b"x", b"\xff" + values[at][0])), *values[at][1:])
    else:
        values.insert(random.randrange(len(values) + 1), (random.choice(_KEYS), *_fresh(random)))
    return replace(file, values=tuple(values))


def _of_known_key(random: Random, file: Gguf) -> Gguf:
    """A key that readers ask for, there or not, with any value or a number in its place."""
    architecture = next(
        (v for k, _, v in file.values if k == b"general.architecture" and isinstance(v, bytes)), b"x"
    )
    below = [key.split(b".", 1)[1] for key, _, _ in file.values if key.startswith(architecture + b".")]
    more = [
        b"block_count",
        b"attention.head_count_kv",
        b"attention.head_count",
        b"attention.key_length",
        b"vocab_size",
        b"rope.dimension_count",
        b"ssm.inner_size",
        b"expert_count",
    ]
    key = random.choice((*_KEYS, *(architecture + b"." + name for name in dict.fromkeys((*below, *more)))))
    values = [value for value in file.values if value[0] != key]
    values.append(
        (key, random.choice((4, 4, 10, 5, 11, 6, 7)), random.choice(_NUMBERS))
        if random.random() < 0.6
        else (key, *_fresh(random))
    )
    return replace(file, values=tuple(values))


def _of_tensor(random: Random, file: Gguf) -> Gguf:
    """Another name, type, shape or place of one tensor."""
    if not file.tensors:
        return file
    tensors = list(file.tensors)
    at = random.randrange(len(tensors))
    other = random.choice(tensors)
    tensors[at] = random.choice(_INFOS)(random, tensors[at], other)
    return replace(file, tensors=tuple(tensors))


_INFOS: tuple[Callable[[Random, Info, Info], Info], ...] = (
    lambda random, info, other: replace(info, name=other.name),
    lambda random, info, other: replace(info, name=random.choice((b"", b"\xff\xfe", b"a" * 65, b"a" * 70_000,
    info.name + b"\0", b"\x1b]0;x\x07", b"rope_freqs.weight", info.name.replace(b"weight", b"bias")))),
    lambda random, info, other: replace(info, type=random.choice(_TYPES)),
    lambda random, info, other: replace(info, type=random.choice(_TYPES)),
    lambda random, info, other: replace(info, offset=random.choice((other.offset, info.offset + 32,
    info.offset + 1, info.offset - 32, 0, 2**62, 2**63, 2**64 - 32, 2**64 - 1))),
    lambda random, info, other: replace(info, dims=_dims(random, info.dims)),
    lambda random, info, other: replace(info, dims=_dims(random, info.dims)),
)  # fmt: skip


def _dims(random: Random, dims: tuple[int, ...]) -> tuple[int, ...]:
    big = random.choice((2**20, 2**31, 2**32, 2**62, 2**63, 2**64 - 1))
    return random.choice(
        ((), (0,), dims[::-1], (*dims, 1), (1, *dims), (*dims, 1, 1, 1), (*dims, *(1,) * 97), (0, *dims[1:]),
        (*dims[:-1], 0), (big,), (*dims[:-1], big), (0, big), (big, big), (big,) * 4,
         (0, big, big, big), tuple(length + 1 for length in dims), (1,) * random.choice((5, 65, 4000)))
    )  # fmt: skip


def _of_tensors(random: Random, file: Gguf) -> Gguf:
    """A tensor removed, repeated, moved or added."""
    tensors = list(file.tensors)
    choice = random.randrange(5)
    at = random.randrange(len(tensors)) if tensors else 0
    if choice == 0 and tensors:
        del tensors[at]
    elif choice == 1 and tensors:
        tensors.append(tensors[at])
    elif choice == 2:
        random.shuffle(tensors)
    elif choice == 3:
        tensors.append(
            Info(
                random.choice((b"rope_freqs.weight", b"x", b"output.weight")), (8,), random.choice(_TYPES), 0
            )
        )
    else:
        tensors = []
    return replace(file, tensors=tuple(tensors))


def _of_frame(random: Random, file: Gguf) -> Gguf:
    """Another magic, version, count, alignment or length of the data."""
    counts = (0, 1, 2**16, 2**20, 2**31, 2**32, 2**40, 2**63, 2**64 - 1)
    return random.choice(
        (
            lambda: replace(file, magic=random.choice((b"GGML", b"GGUf", b"FUGG", b"\0\0\0\0", b""))),
            lambda: replace(file, version=random.choice((0, 1, 2, 4, 0x03000000, 2**32 - 1))),
            lambda: replace(file, tensor_count=random.choice((*counts, len(file.tensors) + 1,
            len(file.tensors) - 1))),
            lambda: replace(file, value_count=random.choice((*counts, len(file.values) + 1,
            len(file.values) - 1))),
            lambda: _aligned(random, file),
            lambda: _aligned(random, file),
            lambda: replace(file, data=random.choice((b"", file.data[:-1], file.data[: len(file.data) // 2],
            file.data + b"\0" * 100, file.data[32:]))),
        )
    )()  # fmt: skip


def _aligned(random: Random, file: Gguf) -> Gguf:
    """A ``general.alignment``, kept or not."""
    number = random.choice((0, 1, 2, 7, 8, 16, 31, 33, 64, 4096, 2**20, 2**31, 2**32 - 1))
    values = [value for value in file.values if value[0] != b"general.alignment"]
    values.append((b"general.alignment", random.choice((4, 4, 4, 10, 5, 0, 6)), number))
    return replace(
        file,
        values=tuple(values),
        alignment=number if number < 10_000 and random.random() < 0.7 else file.alignment,
    )


def _of_bytes(random: Random, file: Gguf) -> Gguf:
    """Other numbers in the weights: NaN, infinite, extreme."""
    if not file.data:
        return file
    at = random.randrange(max(1, len(file.data) - 4))
    value = struct.pack("<f", random.choice((float("nan"), float("inf"), -1.0, 3e38, 0.0)))
    return replace(file, data=file.data[:at] + value * random.choice((1, 8)) + file.data[at + 4 :])


_CHANGES: dict[Callable[[Random, Gguf], Gguf], int] = {
    _of_value: 30, _of_known_key: 22, _of_keys: 12, _of_tensor: 18, _of_tensors: 6, _of_frame: 8,
    _of_bytes: 4,
}  # fmt: skip
