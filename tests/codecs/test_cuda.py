"""The CUDA twins write numpy's bytes: on a GPU for all inputs, elsewhere interpreted for a few."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.kernels import needs_triton

needs_triton()

from bamba_quant.codecs import Format, format_named, formats
from bamba_quant.codecs.base import F32
from bamba_quant.codecs.cuda import encode
from bamba_quant.codecs.dispatch import quantizer
from bamba_quant.errors import FormatError
from tests.codecs.inputs import importances, weights

WRITABLE = [number_format for number_format in formats() if number_format.writable]
every_writable = pytest.mark.parametrize("number_format", WRITABLE, ids=lambda f: f.name)


def _check(number_format: Format, x: F32, importance: F32 | None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = None if importance is None else torch.from_numpy(importance).to(device)
    found = encode(number_format, torch.from_numpy(x).to(device), weight).cpu().numpy()
    np.testing.assert_array_equal(found, number_format.quantize(x, importance))


@every_writable
@pytest.mark.parametrize("importance", ("no importance", "importance with zeros"))
def test_one_row_of_each_kind(number_format: Format, importance: str) -> None:
    """Few lanes of many kinds: the interpreter's time hardly depends on their number."""
    weight = importances()[importance]
    x = np.stack([rows[i % len(rows), :512] for i, rows in enumerate(weights().values())])
    _check(number_format, x, None if weight is None else weight[:512])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@every_writable
@pytest.mark.parametrize("importance", importances())
def test_all_inputs_on_a_gpu(number_format: Format, importance: str) -> None:
    for x in weights().values():
        _check(number_format, x, importances()[importance])


def test_no_rows() -> None:
    assert encode(format_named("q4_k"), torch.empty(0, 512)).shape == (0, 288)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_device_is_refused() -> None:
    with pytest.raises(FormatError, match="no GPU"):
        quantizer(format_named("q4_k"), "cuda")
    assert quantizer(format_named("f32"), "auto")(np.zeros((1, 4), np.float32)).shape == (1, 16)
