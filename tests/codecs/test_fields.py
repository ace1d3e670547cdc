"""Codes and scales as arrays: no byte is lost either way, and one formula gives what ggml reads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from bamba_quant.codecs import BlockCodec, codecs
from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.codecs.fields import FieldLayout, Fields

COLUMNS = 512
NAMES = "q2_k q3_k q4_k q5_k q6_k q4_0 q4_1 q5_0 q5_1 q8_0 iq4_nl iq4_xs mxfp4"
LAYOUTS = [(each, each.fields) for each in codecs(BlockCodec) if each.fields is not None]

every_layout = pytest.mark.parametrize(
    ("codec", "layout"), LAYOUTS, ids=lambda each: getattr(each, "name", "")
)


def test_these_formats_have_fields() -> None:
    assert {codec.name for codec, _ in LAYOUTS} >= set(NAMES.split())


def weights_of(layout: FieldLayout, fields: Fields) -> F32:
    step, low = layout.scaling(fields)
    grouped = layout.values(fields.codes).reshape(*step.shape, layout.group)
    weights: F32 = step[..., None] * grouped - (np.float32(0) if low is None else low[..., None])
    return weights.reshape(fields.codes.shape)


every_seed = given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 3))


@every_layout
@settings(max_examples=25, deadline=None)
@every_seed
def test_any_bytes_come_back(codec: BlockCodec, layout: FieldLayout, seed: int, rows: int) -> None:
    check_bytes(codec, layout, seed, rows, lambda raw: dequantize(raw, codec.ggml_type))


@every_layout
@settings(max_examples=25, deadline=None)
@every_seed
def test_any_fields_come_back(codec: BlockCodec, layout: FieldLayout, seed: int, rows: int) -> None:
    check_fields(codec, layout, seed, rows)


def check_bytes(
    codec: BlockCodec, layout: FieldLayout, seed: int, rows: int, read: Callable[[U8], F32]
) -> None:
    """Any bytes are what their fields are packed to, and the fields stand for the weights that ``read`` gives."""
    shape = rows, codec.row_bytes(COLUMNS)
    raw = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    fields = layout.unpack(raw)
    np.testing.assert_array_equal(layout.pack(fields), raw)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(weights_of(layout, fields), read(raw))
    for part, allowed in (
        (fields.codes, layout.codes),
        (fields.scales, layout.scales),
        (fields.minima, layout.minima),
    ):
        assert (part is None) == (allowed is None)
        if part is not None and allowed is not None:
            assert allowed[0] <= part.min() and part.max() <= allowed[1]


def check_fields(codec: BlockCodec, layout: FieldLayout, seed: int, rows: int) -> None:
    """Unpacking what any fields are packed to gives them back."""
    rng = np.random.default_rng(seed)
    kinds = layout.unpack(np.zeros((rows, codec.row_bytes(COLUMNS)), np.uint8))

    def integers(like: np.ndarray | None, allowed: tuple[int, int] | None) -> np.ndarray | None:
        if like is None or allowed is None:
            return None
        return rng.integers(allowed[0], allowed[1] + 1, like.shape).astype(like.dtype)

    def floats(like: np.ndarray) -> np.ndarray:
        if codec.name == "mxfp4":  # powers of two alone
            return np.ldexp(np.float32(1), rng.integers(-128, 128, like.shape))
        return (rng.normal(size=like.shape) * 10.0 ** rng.integers(-6, 3)).astype(like.dtype)

    codes = integers(kinds.codes, layout.codes)
    assert codes is not None
    fields = Fields(
        codes,
        floats(kinds.d),
        integers(kinds.scales, layout.scales),
        None if kinds.dmin is None else floats(kinds.dmin),
        integers(kinds.minima, layout.minima),
    )
    found = layout.unpack(layout.pack(fields))
    for name, expected in vars(fields).items():
        if expected is None:
            assert getattr(found, name) is None
        else:
            np.testing.assert_array_equal(getattr(found, name), expected, err_msg=name)
