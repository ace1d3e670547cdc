"""Values that arrive as they were sent to the last bit, and bytes of which no value is made."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import random
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from bamba_quant.evaluation.result import RECORDS, Flips, TaskResult, TaskScore
from bamba_quant.evaluation.scoring import ScoreBlocks
from bamba_quant.inference.serialization import SerializationError, decode, encode
from tests.support.evaluations import make_evaluation
from tests.support.tuning import RECORD

_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.binary()
_DTYPES = st.sampled_from("|b1 |i1 |u1 <i2 >i4 <i8 <u8 <f2 <f4 >f8 <f8 <c16".split()).map(np.dtype)
_ARRAYS = _DTYPES.flatmap(lambda kind: arrays.arrays(kind, arrays.array_shapes(min_dims=0, min_side=0)))
_VALUES = st.recursive(
    _SCALARS | _ARRAYS,
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(st.characters()), inner)
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        b = b.astype(a.dtype.newbyteorder("<"))
        return a.shape == b.shape and a.astype(a.dtype.newbyteorder("<")).tobytes() == b.tobytes()
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


@given(_VALUES)
def test_any_value_arrives_as_it_was(value: Any) -> None:
    assert same(value, decode(encode(value)))


def test_numbers_that_json_lacks() -> None:
    (payload,) = struct.unpack("<d", bytes.fromhex("010000000000fc7f"))  # a NaN of its own
    values = [math.nan, -math.nan, payload, math.inf, -math.inf, -0.0, 5e-324, 2**3000]
    assert same(values, decode(encode(values)))
    assert same(1 / 3, decode(encode(np.float64(1 / 3))))


def test_an_evaluation_arrives_as_it_was() -> None:
    found = make_evaluation()
    score = TaskScore("q8_0", 0.5, 0.1, -0.25, 0.1, Flips(2, 1, 0.5))
    task = TaskResult("arc_easy", "1", "acc", "none", True, 4, (score,))
    found = dataclasses.replace(found, base=dataclasses.replace(found.base, tuned=RECORD), tasks=(task,))
    arrived = decode(encode(found, RECORDS), RECORDS)
    assert arrived == found and repr(arrived) == repr(found)
    reached = set[type]()

    def walk(value: Any) -> None:
        if dataclasses.is_dataclass(value):
            reached.add(type(value))
            value = vars(value)
        if isinstance(value, dict):
            value = value.values()
        if not isinstance(value, str) and hasattr(value, "__iter__"):
            for each in value:
                walk(each)

    walk(found)
    assert reached == set(RECORDS)


def test_blocks_of_scores_arrive_as_they_were() -> None:
    block = {"nll": np.random.default_rng(0).normal(size=(3, 5)), "same_top": np.array([True, False])}
    arrived = decode(encode(ScoreBlocks(((block, block), ()), ()), [ScoreBlocks]), [ScoreBlocks])
    assert type(arrived) is ScoreBlocks and arrived.floor == () and len(arrived.candidates) == 2
    for found in arrived.candidates[0]:
        assert same(found, block)
        found["nll"] += 1  # and can be written to


@pytest.mark.parametrize(
    "value",
    [object(), {1: 2}, {1, 2}, np.array([{}]), np.array(["a"]), np.zeros(2, "M8[s]"), np.int64(1), ScoreBlocks((), ())],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_values_that_are_not_sent(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot be sent"):
        encode(value)


def packed(tree: Any, blobs: bytes = b"") -> bytes:
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    return struct.pack("<Q", len(text)) + text + blobs


class Harmful:
    def __reduce__(self) -> Any:
        return pytest.fail, ("code of a pickle ran",)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x00" * 7,
        b"\xff" * 8,
        pickle.dumps(Harmful()),
        packed(pickle.dumps(Harmful())),
        packed([1])[:-1],
        packed([1], b"more"),
        packed(b"\xff"),
        packed(b"{"),
        packed(b"NaN"),
        packed(b"[" * 100_000),
        packed(b"9" * 5000),
        packed(b'{"dict":' * 300 + b"{}" + b"}" * 300),
        packed({}),
        packed({"a": 1, "b": 2}),
        packed({"unknown": 1}),
        packed({"tuple": 1}),
        packed({"dict": []}),
        packed({"float": "00"}),
        packed({"float": "x" * 16}),
        packed({"bytes": 3}, b"12"),
        packed({"bytes": -1}, b"12"),
        packed({"bytes": True}, b"1"),
        packed({"array": ["<f8", [1 << 60]]}, b"12345678"),
        packed({"array": ["<f8", [0, 1 << 90]]}),
        packed({"array": ["<f8", [-1, -1]]}, b"12345678"),
        packed({"array": ["<f8", [1] * 33]}, b"12345678"),
        packed({"array": ["|O8", [1]]}, b"12345678"),
        packed({"array": ["|O", [1]]}, b"12345678"),
        packed({"array": ["<f16", [1]]}, b"12345678"),
        packed({"array": ["<f4,<i4", [1]]}, b"12345678"),
        packed({"array": ["<M8[s]", [1]]}, b"12345678"),
        packed({"array": ["<f8"]}, b"12345678"),
        packed({"array": [[], []]}),
        packed({"record": ["Other", {}]}),
        packed({"record": ["Measured", {}]}),
        packed({"record": ["Measured", {"floor": None, "candidates": None}]}),
        packed({"record": ["Measured", {"candidates": None, "floor": None, "more": None}]}),
    ],
    ids=lambda raw: repr(raw[8:48]),
)
def test_bytes_that_are_not_a_value(raw: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(SerializationError):
            decode(raw, [ScoreBlocks])
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def test_damaged_bytes_are_another_value_or_refused() -> None:
    draw = random.Random(0)
    raw = encode({"a": [1.5, (None, np.arange(6.0).reshape(2, 3))], "b": b"xyz"})
    for _ in range(3000):
        damaged = bytearray(raw)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        try:
            decode(bytes(damaged[: draw.randint(0, len(damaged))] if draw.random() < 0.3 else damaged))
        except SerializationError:
            continue
