"""What the device reads from a format's bytes is what numpy reads, bit for bit: on a GPU, else interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.kernels import needs_triton

needs_triton()

from bamba_quant.codecs import BlockCodec, codec_named, codecs
from bamba_quant.codecs.arrays import U8
from bamba_quant.codecs.gpu.decoding import decode
from bamba_quant.errors import FormatError
from tests.codecs.inputs import weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts bfloat16 off instead of rounding it (Triton 3.6).
NARROW = torch.bfloat16 if torch.cuda.is_available() else torch.float16


def raws(codec: BlockCodec) -> dict[str, U8]:
    """Bytes that quantizing gives, and bytes of any kind: every code, NaN and infinite scales among them."""
    # 1,000 rows draw 64,000 entries of a codebook, of which the largest has 2,048.
    shape = (64 if codec.writable else 1000, codec.row_bytes(512))
    found = {"noise": np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)}
    if codec.writable:
        rows = np.stack([rows[i % len(rows), :512] for i, rows in enumerate(weights().values())])
        found["quantized"] = codec.quantize(rows, None)
    return found


@pytest.mark.parametrize("codec", codecs(BlockCodec), ids=lambda f: f.name)
@np.errstate(all="ignore")
def test_every_format(codec: BlockCodec) -> None:
    for kind, raw in raws(codec).items():
        found = decode(codec, torch.from_numpy(raw).to(DEVICE)).cpu().numpy()
        truth = codec.dequantize(raw)
        np.testing.assert_array_equal(found, truth, err_msg=kind)
        if kind == "quantized" or not codec.writable:
            narrow = decode(codec, torch.from_numpy(raw).to(DEVICE), NARROW).cpu()
            expected = torch.from_numpy(truth.copy()).to(NARROW)
            np.testing.assert_array_equal(narrow.float().numpy(), expected.float().numpy())


def test_a_codec_without_layout_or_function_is_an_error() -> None:
    unknown = replace(codec_named("q8_0", BlockCodec), name="unheard of", layout=None)
    with pytest.raises(FormatError, match="unheard of cannot be read on a GPU"):
        decode(unknown, torch.zeros(1, 66, dtype=torch.uint8))


def test_no_rows() -> None:
    assert decode(codec_named("q4_k", BlockCodec), torch.empty(0, 288, dtype=torch.uint8)).shape == (0, 512)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bamba_quant.codecs import BlockCodec, codec_named
from bamba_quant.codecs.gpu import decoding

kernel = decoding._decode
for name in ("q4_k", "mxfp4", "tq1_0"):
    codec = codec_named(name, BlockCodec)
    constants = {"SIZE": codec.block_size, "BYTES": codec.block_bytes, "LANES": 1024}
    constants["LAYOUT"] = decoding._numbers(codec.layout) if codec.layout else ()
    constants["WEIGHT"] = None if codec.layout else decoding._function(codec.gpu, name)[0]
    types = {"raw": "*u8", "table": "*fp32", "out": "*bf16", "n": "i32"}
    signature = {each: types.get(each, "constexpr") for each in kernel.arg_names}
    given = {(kernel.arg_names.index(each),): value for each, value in constants.items()}
    triton.compile(ASTSource(kernel, signature, given), target=GPUTarget("cuda", 90, 32))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests compile it for the GPU")
def test_the_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    """The interpreter runs what the compiler does not accept."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True)
