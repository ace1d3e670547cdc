"""What the device reads from a format's bytes is what numpy reads, bit for bit: on a GPU, else interpreted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.kernels import needs_triton

needs_triton()

from bamba_quant.codecs import Format, format_named, formats
from bamba_quant.codecs.base import U8
from bamba_quant.codecs.gpu.decoding import decode
from bamba_quant.errors import FormatError
from tests.codecs.inputs import weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts bfloat16 off instead of rounding it (Triton 3.6).
NARROW = torch.bfloat16 if torch.cuda.is_available() else torch.float16


def raws(number_format: Format) -> dict[str, U8]:
    """Bytes that quantizing gives, and bytes of any kind: every code, NaN and infinite scales among them."""
    # 1,000 rows draw 64,000 entries of a codebook, of which the largest has 2,048.
    shape = (64 if number_format.writable else 1000, number_format.row_bytes(512))
    found = {"noise": np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)}
    if number_format.writable:
        rows = np.stack([rows[i % len(rows), :512] for i, rows in enumerate(weights().values())])
        found["quantized"] = number_format.quantize(rows, None)
    return found


@pytest.mark.parametrize("number_format", formats(), ids=lambda f: f.name)
@np.errstate(all="ignore")
def test_every_format(number_format: Format) -> None:
    for kind, raw in raws(number_format).items():
        found = decode(number_format, torch.from_numpy(raw).to(DEVICE)).cpu().numpy()
        truth = number_format.dequantize(raw)
        np.testing.assert_array_equal(found, truth, err_msg=kind)
        if kind == "quantized" or not number_format.writable:
            narrow = decode(number_format, torch.from_numpy(raw).to(DEVICE), NARROW).cpu()
            expected = torch.from_numpy(truth.copy()).to(NARROW)
            np.testing.assert_array_equal(narrow.float().numpy(), expected.float().numpy())


def test_others_are_refused() -> None:
    unknown = replace(format_named("q8_0"), name="unheard of")
    with pytest.raises(FormatError, match="unheard of cannot be read on a GPU"):
        decode(unknown, torch.zeros(1, 66, dtype=torch.uint8))


def test_no_rows() -> None:
    assert decode(format_named("q4_k"), torch.empty(0, 288, dtype=torch.uint8)).shape == (0, 512)
