"""Keys, values and states as caches store them: against the formats' own code, and through a whole evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from bamba_quant.embedded import embedded_model
from bamba_quant.errors import BambaQuantError
from bamba_quant.evaluation.activations import with_activations
from bamba_quant.evaluation.evaluate import evaluate
from bamba_quant.evaluation.gates import limit
from bamba_quant.evaluation.models import ComparisonError
from bamba_quant.evaluation.stored_types import StoredTypes, combinations, rounded, with_stored_types
from bamba_quant.inference.loading import load_model
from bamba_quant.report.json_report import read_report, to_json
from bamba_quant.report.markdown import to_markdown
from bamba_quant.report.wording import short_names
from bamba_reference import model as numpy_model
from bamba_reference.numpy_ops import linear, softmax
from bamba_reference.tensors import layer_prefix, layer_tensors
from bamba_reference.torch import forward as torch_forward
from bamba_reference.torch.backend import TORCH
from bamba_reference.torch.blocks import LayerWeights, attention
from tests.evaluation.conftest import OPTIONS
from tests.reference.cases import random_case, relative_error
from tests.support.command import run
from tests.support.models import random_bamba, save_checkpoint

Array = np.ndarray
CPU = torch.device("cpu")


def float8(x: Array, scale: float) -> Array:
    return np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(x.dtype) * np.float32(scale)


def int8(x: Array, scale: float) -> Array:
    """A scale for each token and head."""
    step = np.abs(x).max(-1, keepdims=True) / 127
    return np.where(step > 0, np.rint(x / np.where(step > 0, step, 1)) * step, 0)


def through_gguf(x: Array, scale: float) -> Array:
    rows = x.astype(np.float32).reshape(-1, x.shape[-1])
    codes = gguf.quantize(rows, GGMLQuantizationType.Q8_0)
    return gguf.dequantize(codes, GGMLQuantizationType.Q8_0).reshape(x.shape).astype(x.dtype)


STORED: dict[str, Callable[[Array, float], Array]] = {
    "bf16": lambda x, scale: x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(x.dtype),
    "fp16": lambda x, scale: x.astype(np.float16).astype(x.dtype),
    "fp8": float8,
    "int8": int8,
    "q8_0": through_gguf,
}


@pytest.mark.parametrize("name", STORED)
def test_rounding_is_the_types_own(name: str) -> None:
    x = torch.randn(2, 7, 3, 64, generator=torch.Generator().manual_seed(0)) * 4
    x[0, 0, 0] = 0
    x[1, 2, 1] *= 1000
    for scale in (1.0, 0.05) if name == "fp8" else (1.0,):
        found = rounded(x, name, scale)
        np.testing.assert_allclose(found.numpy(), STORED[name](x.numpy(), scale), rtol=1e-6)
        assert torch.isfinite(found).all()
    assert rounded(x.bfloat16(), name).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ("bf16", "fp16", "fp8", "int8"))
@torch.no_grad()
def test_attention_reads_rounded_keys_and_values(name: str) -> None:
    """In float64: keys behind the rotary embedding, all tokens' among them the current one's, and exact queries."""
    case = random_case("plain")
    config, layer = case.config, next(i for i, s in enumerate(case.config.layers) if "attention" in s.blocks)
    w = {
        part: case.weights[layer_prefix(layer) + part].astype(np.float64)
        for part in layer_tensors(config, layer)
    }
    u = np.random.default_rng(0).normal(size=(9, config.hidden_size))
    E, heads, kv = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    q, k, v = (linear(w, f"self_attn.{part}_proj", u).reshape(9, -1, E) for part in "qkv")
    q, k = (numpy_model.rotary(x, np.arange(9), config) for x in (q, k))
    k, v = (np.repeat(STORED[name](x, 0.5), heads // kv, axis=1) for x in (k, v))
    scores = np.einsum("qhe,khe->hqk", q, k) * config.attention_scale
    mixed = np.einsum("hqk,khe->qhe", softmax(np.where(np.tri(9, dtype=bool), scores, -np.inf)), v)
    expected = linear(w, "self_attn.o_proj", mixed.reshape(9, -1))

    def cached(k: torch.Tensor, v: torch.Tensor, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        return rounded(k, name, 0.5), rounded(v, name, 0.5)

    plain = torch_forward.load(config, case.weights, dtype=torch.float64)
    batch = torch_forward.prepare(config, torch_forward.layout((1, 9)), torch.float64, CPU)
    x = torch.from_numpy(u)[None]
    exact, found = (
        attention(model, LayerWeights(model, layer_prefix(layer)), x, batch, None)[0]
        for model in (plain, replace(plain, backend=replace(TORCH, cached=cached)))
    )
    # torch casts float64 by way of float32, which now and then makes one number of a thousand another one.
    assert relative_error(found, expected) < 0.1 * relative_error(exact, expected)


def test_an_evaluation_of_types(files: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """The base alone under two combinations, and a report that names them."""
    told: list[str] = []
    options = replace(OPTIONS, ctx=32, cache_type="f32,fp8", state_type="fp16-stochastic", drift_chunks=1)
    found = evaluate(embedded_model(), [], text, options, note=told.append)
    exact, narrow = found.candidates
    assert exact.model.variant == "bf16 (cache f32, state fp16-stochastic)"
    assert narrow.model.label == f"{found.base.label} (cache fp8, state fp16-stochastic)"
    assert 0 < exact.figures["kld_mean"].value < narrow.figures["kld_mean"].value < 0.1
    assert any("--seed" in note for note in told)
    assert "state fp16-stochastic (seed 0)" in found.run.backend
    assert "--cache-type f32,fp8 --state-type fp16-stochastic" in found.run.command
    (tmp_path / "report.json").write_text(to_json(found), encoding="utf-8")
    assert read_report(tmp_path / "report.json") == found
    assert short_names(found) == ("cache f32", "cache fp8")
    assert r"bamba-mini \(cache fp8, state fp16-stochastic\)" in to_markdown(found)
    # Nothing that is rounded to nothing else differs, whatever the file; and a seed is a seed.
    alike = evaluate(
        embedded_model(), [files["bf16"]], text, replace(options, cache_type="", state_type="f32", seed=1),
        limits=[limit("max-kld", 0.01, "")],
    )  # fmt: skip
    assert alike.candidates[0].figures["kld_mean"].value < 1e-6
    assert alike.candidates[0].gates[0].passed
    other = evaluate(embedded_model(), [], text, replace(options, cache_type="f32", seed=1))
    again = evaluate(embedded_model(), [], text, replace(options, cache_type="f32", chunks=5, floor_chunks=1))
    assert other.candidates[0].chunks.kld != exact.chunks.kld
    np.testing.assert_allclose(again.candidates[0].chunks.kld, exact.chunks.kld[:5], rtol=1e-3)


def test_refusals(text: Path, tmp_path: Path) -> None:
    for given, match in (
        (("fp9", ""), "--cache-type"),
        (("", "fp16,"), "--state-type"),
        (("", "f16"), "fp16"),
    ):
        with pytest.raises(BambaQuantError, match=match):
            combinations(*given)
    with pytest.raises(ComparisonError, match="--state-type"):
        evaluate(embedded_model(), [], text, OPTIONS)
    with pytest.raises(BambaQuantError, match="given twice"):
        evaluate(embedded_model(), [embedded_model()] * 2, text, replace(OPTIONS, state_type="fp16"))
    narrow = load_model(
        save_checkpoint(random_bamba(num_attention_heads=4, attn_rotary_emb=8), tmp_path / "m")
    )
    assert narrow.config.head_dim % 32
    with pytest.raises(BambaQuantError, match="blocks of 32"):
        with_stored_types(TORCH, narrow, StoredTypes(cache="q8_0"), 0)
    for types, layers, match in (
        (StoredTypes(cache="fp8"), ("mamba2",), "no attention"),
        (StoredTypes(state="fp16"), ("attention",), "no Mamba"),
    ):
        alone = tuple(layer._replace(blocks=layers) for layer in narrow.config.layers)
        with pytest.raises(BambaQuantError, match=match):
            model = replace(narrow, config=replace(narrow.config, layers=alone))
            with_activations(TORCH, model, "none", CPU, torch.float32, types)
    done = run(
        "evaluate", embedded_model(), "--text", text, "--state-type", "fp16", "--tasks", "arc_easy", code=2
    )
    assert "cache and state as computed" in done.stderr
