"""Numpy's and compiled quantizers: the same bytes for any chunks, threads and memory layouts; errors."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from bamba_quant.codecs import BlockCodec, codec_named, codecs
from bamba_quant.errors import FormatError
from tests.codecs.inputs import COLUMNS, importances, weights

WRITABLE = [codec for codec in codecs(BlockCodec) if codec.writable]
every_writable = pytest.mark.parametrize("codec", WRITABLE, ids=lambda f: f.name)
weighted = pytest.mark.parametrize("importance", ("no importance", "importance"))


@every_writable
@weighted
def test_chunks_and_threads_change_nothing(codec: BlockCodec, importance: str) -> None:
    x = np.concatenate([weights()[name] for name in ("normal", "mixed", "heavy-tailed", "sparse")])
    weight = importances()[importance]
    quantize = codec.quantizer()
    whole = quantize(x, weight)
    with ThreadPoolExecutor(4) as pool:
        for size in (1, 3, 16):
            chunks = pool.map(
                lambda rows: quantize(rows, weight), (x[i : i + size] for i in range(0, len(x), size))
            )
            np.testing.assert_array_equal(np.concatenate(list(chunks)), whole)
    np.testing.assert_array_equal(codec.quantize(x, weight), whole)


@every_writable
@pytest.mark.parametrize("compiled", (False, True))
def test_any_memory_layout_is_read(codec: BlockCodec, compiled: bool) -> None:
    x = weights()["normal"]
    importance = importances()["importance"]
    assert importance is not None
    quantize = codec.quantizer(compiled=compiled)
    expected = quantize(x, importance)
    fixed, shifted = x.copy(), np.empty(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(x.shape)
    fixed.flags.writeable = False
    shifted[:] = x
    wide = np.repeat(x, 2, axis=1)[:, ::2]
    for same in (fixed, shifted, wide, np.asfortranarray(x)):
        np.testing.assert_array_equal(quantize(same, np.repeat(importance, 2)[::2]), expected)
    assert quantize(x[:0], None).shape == (0, codec.row_bytes(COLUMNS))


@every_writable
def test_inputs_are_left_alone(codec: BlockCodec) -> None:
    x, importance = weights()["mixed"], importances()["importance with zeros"]
    assert importance is not None
    before = x.copy(), importance.copy()
    for compiled in (False, True):
        codec.quantizer(compiled=compiled)(x, importance)
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(importance, before[1])


def test_errors_name_what_was_found_and_expected() -> None:
    q4_k = codec_named("Q4_K", BlockCodec)
    quantize = q4_k.quantizer()
    with pytest.raises(FormatError, match=r"300 columns\n.*a multiple of 256"):
        quantize(np.zeros((2, 300), np.float32))
    with pytest.raises(FormatError, match=r"float64 of shape \(2, 256\)"):
        quantize(np.zeros((2, 256)))  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=r"shape \(255,\)\n.*float32 of shape \(256,\)"):
        quantize(np.zeros((2, 256), np.float32), np.zeros(255, np.float32))
    with pytest.raises(FormatError, match="q4_k"):
        codec_named("q4_q", BlockCodec)


def test_a_format_that_is_only_read_refuses_to_quantize() -> None:
    iq2_xs = codec_named("iq2_xs", BlockCodec)
    assert not iq2_xs.writable
    with pytest.raises(FormatError, match="iq2_xs can be read but not written"):
        iq2_xs.quantize(np.zeros((1, 256), np.float32), None)
    with pytest.raises(FormatError, match="iq2_xs can be read but not written"):
        iq2_xs.quantizer()


def _python(code: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-W", "default", "-c", code],
        env=os.environ | environment, check=True, capture_output=True, text=True,
    ).stderr  # fmt: skip


def test_importing_the_formats_imports_no_compiler() -> None:
    _python("import sys, bamba_quant.codecs; assert not {'numba', 'torch'} & set(sys.modules)")


_QUANTIZE = """
import numpy as np
from bamba_quant.codecs import BlockCodec, codec_named
x = np.linspace(-1, 1, 256, dtype=np.float32)[None]
bf16 = codec_named("bf16", BlockCodec)
assert np.array_equal(bf16.quantizer()(x), bf16.quantize(x, None))
"""


def test_kernels_are_kept_on_disk(tmp_path: Path) -> None:
    """Where another process finds them (tests/reference/cpu_kernels/test_kernel_cache.py)."""
    _python(_QUANTIZE, NUMBA_CACHE_DIR="", XDG_CACHE_HOME=str(tmp_path))
    assert list(tmp_path.glob("bamba-quant/kernels-*/*.nbc"))
