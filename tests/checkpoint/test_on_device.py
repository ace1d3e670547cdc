"""Packed weights decoded where torch has a device are those that numpy decodes, bit for bit; torch's CPU stands in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bamba_quant.checkpoint import PackedTensor, RawReader, Section, read_raw, read_tensor
from bamba_quant.checkpoint.dequantize import Dequantizer, Float8Dequantizer, IntegerDequantizer, TorchaoTiles
from bamba_quant.codecs import SafetensorsCodec, codecs
from bamba_quant.codecs.compiled.rows import row_kernels
from bamba_quant.codecs.integers.grid import IntegerGrid
from bamba_quant.inference import weights as weights_module
from bamba_quant.inference.loading import load_model
from bamba_quant.inference.prefetch import Prefetcher
from bamba_quant.inference.weights import DeviceWeights, LazyWeights
from bamba_reference.torch.forward import to_tensor
from tests.checkpoint.conftest import Made
from tests.support.kernels import DEVICE

CPU = torch.device("cpu")


def packed(weights: LazyWeights) -> list[str]:
    return [name for name in weights if isinstance(weights.stored(name)[0], PackedTensor)]


@pytest.mark.parametrize("scheme", codecs(SafetensorsCodec), ids=lambda scheme: scheme.name)
def test_every_scheme(scheme: SafetensorsCodec, made: Made) -> None:
    weights = load_model(made(scheme)).weights
    names = packed(weights)
    assert names
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = DeviceWeights(weights, DEVICE, dtype)
        for name in names:
            value = found[name]
            assert value.device.type == DEVICE.type and value.dtype == dtype
            assert torch.equal(value.cpu(), to_tensor(weights[name], dtype, CPU)), name


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_rows_in_any_pieces(made: Made, data: st.DataObject) -> None:
    weights = load_model(made(data.draw(st.sampled_from(codecs(SafetensorsCodec))))).weights
    name = data.draw(st.sampled_from(packed(weights)))
    truth = weights[name]
    start = data.draw(st.integers(0, len(truth) - 1))
    stop = data.draw(st.integers(start + 1, len(truth)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_module, "_PIECE", data.draw(st.sampled_from([1, 700, 5000, 1 << 24])))
        found = DeviceWeights(weights, DEVICE, torch.float32).rows(name, start, stop)
    np.testing.assert_array_equal(found.cpu().numpy(), truth[start:stop])


@pytest.mark.parametrize("scheme", codecs(SafetensorsCodec), ids=lambda scheme: scheme.name)
def test_rows_that_are_there_already(
    scheme: SafetensorsCodec, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_module, "_PIECE", 5000)
    weights = load_model(made(scheme)).weights
    for name in packed(weights)[:3]:
        tensor = weights.stored(name)[0]
        assert isinstance(tensor, PackedTensor)
        raw = torch.from_numpy(read_raw(tensor)).to(DEVICE)
        found = weights_module.decode_packed(tensor, raw, torch.float32)
        np.testing.assert_array_equal(found.cpu().numpy(), weights[name])


@pytest.mark.parametrize("scheme", codecs(SafetensorsCodec), ids=lambda scheme: scheme.name)
def test_compiled_rows(scheme: SafetensorsCodec, made: Made) -> None:
    """On a CPU, for products with weights as they are stored."""
    weights = load_model(made(scheme)).weights
    for name in packed(weights)[:3]:
        tensor = weights.stored(name)[0]
        kernels = row_kernels(tensor.format, tensor.columns)
        assert kernels is not None
        out = np.empty(tensor.shape, np.float32)
        kernels.decode(read_raw(tensor), out)
        np.testing.assert_array_equal(out, weights[name])


@pytest.mark.parametrize("scheme", codecs(SafetensorsCodec), ids=lambda scheme: scheme.name)
def test_prefetched_rows(scheme: SafetensorsCodec, made: Made) -> None:
    """All in one order, most of it brought there before it is asked for, and nothing left waiting."""
    weights = load_model(made(scheme)).weights
    names = packed(weights)
    with Prefetcher(DEVICE, threads=2, piece=5000) as ahead:
        found = DeviceWeights(weights, DEVICE, torch.float32, ahead)
        ahead.begin([found.prefetch_request(name) for name in names])
        for name in names:
            truth = weights[name]
            np.testing.assert_array_equal(found.rows(name, 5, 30).cpu().numpy(), truth[5:30])
            np.testing.assert_array_equal(found[name].cpu().numpy(), truth)
        assert not ahead._pending and not ahead._order


GRIDS = [IntegerGrid(bits, zero, 32) for bits in (4, 8) for zero in ("none", "integer", "float")]
ROUNDED = st.sampled_from(["f32", "bf16", "f16"])


def same(dequantizer: Dequantizer, *parts: np.ndarray[Any, Any]) -> None:
    with np.errstate(all="ignore"):
        truth = dequantizer.values(*parts)
    found = dequantizer.values_on(*(torch.from_numpy(part).to(DEVICE) for part in parts))
    np.testing.assert_array_equal(found.cpu().numpy(), truth)
    assert np.isnan(truth).mean() < 0.5


@settings(deadline=None)
@given(
    width=st.sampled_from([1, 32, 50, 96, 200]),
    dtype=ROUNDED,
    power=st.integers(-40, 30),
    seed=st.integers(0, 99),
)
def test_every_float_code(width: int, dtype: str, power: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    codes = random.permuted(
        np.tile(np.arange(256, dtype=np.uint8)[:192], (9, 1)) + np.arange(9)[:, None] * 8, axis=1
    )
    scale = random.normal(size=(9, -(-192 // width))) * 2.0**power
    same(
        Float8Dequantizer(192, width, dtype),
        codes.astype(np.uint8),
        scale.astype(np.float32),
        np.empty((9, 0), np.float32),
    )


@settings(deadline=None)
@given(grid=st.sampled_from(GRIDS), dtype=ROUNDED, power=st.integers(-40, 30), seed=st.integers(0, 99))
def test_every_integer_code(grid: IntegerGrid, dtype: str, power: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    codes = random.integers(256, size=(9, 192 * grid.bits // 8), dtype=np.uint8)
    scale, zero = (
        random.normal(size=(9, 7)) * 2.0**power for _ in range(2)
    )  # one more than there are groups
    if grid.zero == "integer":
        zero = random.integers(grid.low, grid.high + 1, size=zero.shape)
    for offset in (0, 1 << grid.bits - 1):
        same(
            IntegerDequantizer(grid, offset, 192, dtype),
            codes,
            scale.astype(np.float32),
            zero.astype(np.float32),
        )


@pytest.mark.parametrize("columns", [1024, 96])
def test_every_tile(columns: int) -> None:
    stored = np.random.default_rng(0).integers(256, size=(3, 8 * 1024 // 2), dtype=np.uint8)
    found = TorchaoTiles(columns).rows_on(torch.from_numpy(stored).to(DEVICE))
    np.testing.assert_array_equal(found.cpu().numpy(), TorchaoTiles(columns).rows(stored))


def test_a_section_of_a_stack(made: Made) -> None:
    """Rows that lie in blocks of a larger matrix, as Granite's stacked halves do."""
    for scheme in codecs(SafetensorsCodec):
        weights = load_model(made(scheme)).weights
        whole = weights.stored(packed(weights)[0])[0]
        assert isinstance(whole, PackedTensor)
        half = whole.rows // 2
        section = replace(whole, shape=(half, whole.columns), section=Section(half, half, whole.rows))
        with RawReader() as reader:
            rows = [section.decode_on(each, DEVICE) for each in section.row_blocks(reader, 3, half - 1, 5)]
        found = torch.cat(rows).cpu().numpy()
        np.testing.assert_array_equal(found, read_tensor(whole)[half + 3 : whole.rows - 1])
        np.testing.assert_array_equal(found, read_tensor(section)[3:-1])
