"""A codec in a package of its own, registered from outside, is one like the others: numpy quantizes it, with a note."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bamba_quant.codecs import BlockCodec, Codec, codec_named, codecs, register, register_package, registry
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import FormatError
from bamba_quant.planning.convert import plan_conversion
from bamba_quant_cli.plans import numpy_notes
from tests.codecs.inputs import weights
from tests.codecs.test_fields import check_bytes, check_fields

# 32 weights of three bits under a float16 scale.
TOY = """
import numpy as np
from bamba_quant.codecs.arithmetic import largest, nearest_clipped, quiet, reciprocal
from bamba_quant.codecs.blocks import BlockCodec, block_methods
from bamba_quant.codecs.fields import Fields
from bamba_quant.codecs.layout import Bits, BlockLayout, Field, to_blocks

LAYOUT = BlockLayout(32, 14, 32, Field((Bits(2, 2, 32, run=8), Bits(10, 1, 32, low=2)), zero=4), d=0)


@quiet
def quantize(rows, importance=None):
    x = to_blocks(rows, 32)
    d = largest(x) / np.float32(-4)
    codes = nearest_clipped(x * reciprocal(d), -4, 3).astype(np.int8)
    return LAYOUT.packed(rows.shape[1] // 32, Fields(codes, d))


fields = LAYOUT.rows()
CODECS = (
    BlockCodec(
        name="toy3", ggml_type=-1, block_size=32, block_bytes=14, dequantize=LAYOUT.dequantize,
        methods=block_methods("toy3", (32, 14), quantize, fields=fields), fields=fields, layout=LAYOUT,
    ),
)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BlockCodec]:
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "codecs_of_a_test"
    (package / "toy").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "toy" / "__init__.py").write_text(TOY)
    register_package(importlib.import_module("codecs_of_a_test"))
    yield codec_named("toy3", BlockCodec)
    for name in [name for name in sys.modules if name.startswith("codecs_of_a_test")]:
        del sys.modules[name]


def test_it_is_found_by_name_and_in_lists(toy: BlockCodec) -> None:
    assert toy in codecs(BlockCodec)
    assert toy in codecs(Codec)
    assert toy.bits_per_weight == 3.5
    assert [method.name for method in toy.methods] == ["ggml", "refine"]
    with pytest.raises(ValueError, match="twice"):
        register(toy)


def test_its_bytes_and_fields_are_each_others_inverse(toy: BlockCodec) -> None:
    assert toy.fields is not None
    for seed in range(5):
        check_bytes(toy, toy.fields, seed, 3, lambda raw: toy.dequantize(raw))
        check_fields(toy, toy.fields, seed, 3)


def test_every_method_and_version_quantizes(toy: BlockCodec) -> None:
    assert not toy.compiled
    x = weights()["normal"]
    packed, refined = toy.quantizer()(x), toy.quantizer("refine")(x)
    np.testing.assert_array_equal(packed, toy.quantizer(compiled=False)(x))
    lost, left = (np.square(toy.dequantize(each) - x).sum() for each in (packed, refined))
    assert left < lost < 0.05 * np.square(x).sum()


def test_a_note_says_that_numpy_quantizes(toy: BlockCodec) -> None:
    plan = plan_conversion(embedded_model(), outtype="q8_0")
    assert not numpy_notes(plan)
    slow = replace(plan, rows=(*plan.rows[:-1], replace(plan.rows[-1], codec=toy)))
    assert numpy_notes(slow) == ["toy3 has no compiled version: numpy quantizes it, which is slower"]


def test_names_of_other_kinds_and_unknown_names_are_errors() -> None:
    with pytest.raises(FormatError, match=r"'fp8-dynamic'\n.*q4_k"):
        codec_named("fp8-dynamic", BlockCodec)
    with pytest.raises(FormatError, match="q4_q"):
        codec_named("q4_q", Codec)
