"""Compiled code reads a format's rows as numpy does, bit for bit, and multiplies by these values."""

from __future__ import annotations

import numpy as np
import pytest

from bamba_quant.codecs import BlockCodec, codec_named, codecs
from bamba_quant.codecs.compiled import unpacking
from bamba_quant.codecs.compiled.rows import row_kernels
from tests.codecs.inputs import weights

COLUMNS = 512
# The others are codebooks, which are only read, and trits five to a byte.
COMPILED = [
    codec for codec in codecs(BlockCodec) if codec.layout is not None or codec.name in ("f16", "bf16")
]


@np.errstate(all="ignore")
def check(codec: BlockCodec) -> None:
    kernels = row_kernels(codec, COLUMNS)
    assert kernels is not None
    noise = np.random.default_rng(0).integers(256, size=(64, codec.row_bytes(COLUMNS)), dtype=np.uint8)
    quantized = codec.quantize(np.stack([rows[0, :COLUMNS] for rows in weights().values()]))
    for raw in (noise, quantized):  # every code, NaN and infinite scales are in noise
        out = np.empty((len(raw), COLUMNS), np.float32)
        kernels.decode(raw, out)
        np.testing.assert_array_equal(out, codec.dequantize(raw))


@pytest.mark.parametrize("codec", COMPILED, ids=lambda codec: codec.name)
def test_every_format(codec: BlockCodec) -> None:
    check(codec)


def test_processors_that_look_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "has", lambda feature: False)
    check(codec_named("iq4_nl", BlockCodec))


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("rows", [1, 7, 70])
def test_products(rows: int, count: int) -> None:
    codec, random = codec_named("q4_k", BlockCodec), np.random.default_rng(1)
    raw = codec.quantize(random.standard_normal((rows, COLUMNS), np.float32))
    x = random.standard_normal((count, COLUMNS), np.float32)
    kernels = row_kernels(codec, COLUMNS)
    assert kernels is not None
    expected = x.astype(np.float64) @ codec.dequantize(raw).astype(np.float64).T
    np.testing.assert_allclose(kernels.product(raw, x), expected, rtol=0, atol=1e-4)
