"""Fields of packed weights: they stand for what the checkpoint's loader computes, and go back to the stored bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bamba_quant.checkpoint import PackedTensor, open_checkpoint
from bamba_quant.checkpoint.base import read_raw, read_tensor
from bamba_quant.checkpoint.repacking import StoredArrays, repack
from bamba_quant.codecs import SafetensorsCodec, codec_named, codecs
from bamba_quant.codecs.floats import to_bfloat16, to_float32
from tests.codecs.test_fields import weights_of
from tests.support.models import random_bamba, save_checkpoint
from tests.support.quantized import DIVIDES, read_all, save_quantized, to_torch

NAMES = [
    scheme.name
    for scheme in codecs(SafetensorsCodec)
    if "g64" not in scheme.name and "g32" not in scheme.name
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_bamba(seed=4, **DIVIDES).bfloat16()
    return save_checkpoint(model, tmp_path_factory.mktemp("models") / "model")


@pytest.mark.parametrize("scheme", [codec_named(name, SafetensorsCodec) for name in NAMES], ids=NAMES)
def test_fields_are_the_weights_and_return_to_their_tensors(
    scheme: SafetensorsCodec, model: Path, tmp_path: Path
) -> None:
    method = "absmax" if scheme.name.startswith("fp8") else None  # whose search takes seconds in numpy
    directory = save_quantized(model, tmp_path / "quantized", scheme, method)
    stored: StoredArrays = {}
    changed: StoredArrays = {}
    packed = [t for t in open_checkpoint(directory).tensors.values() if isinstance(t, PackedTensor)]
    assert packed
    for tensor in packed:
        layout, raw = tensor.format.fields, read_raw(tensor)
        assert layout is not None
        fields = layout.unpack(raw)
        np.testing.assert_array_equal(layout.pack(fields), raw)
        if layout.block * fields.d.shape[1] == tensor.columns:
            values = weights_of(layout, fields)
            assert layout.rounded == "bf16" or scheme.name == "fp8-block-inv"
            rounded = to_float32(to_bfloat16(values)) if layout.rounded == "bf16" else values
            np.testing.assert_array_equal(rounded, read_tensor(tensor))
        repack(tensor, raw, stored)
        fields.codes[0, 0] ^= 1
        repack(tensor, layout.pack(fields), changed)
    on_disk = read_all(directory)
    for name, array in stored.items():
        assert to_torch(array).equal(on_disk[name]), name
    assert sum(
        (changed[name].view(np.uint8) != array.view(np.uint8)).sum() for name, array in stored.items()
    ) == len(packed)
