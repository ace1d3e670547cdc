"""A plausible, complete Evaluation for tests of what reads one: invented models, seeded numbers, nothing measured."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bamba_quant.evaluation.provenance import FileHash, ModelFile, Run, Text, Timing, TypeTotal
from bamba_quant.evaluation.result import (
    FIGURES,
    SCHEMA,
    Candidate,
    ChunkMeans,
    Evaluation,
    Figure,
    Flips,
    Gate,
    Histogram,
    LayerDrift,
    NoiseFloor,
    RowClass,
    TensorLoss,
)

LAYERS = 10
ATTENTION = (3, 7)
WEIGHTS = 43_100_000

# recipe: kind, commonest type, bits per weight, mean KLD
RECIPES: dict[str, tuple[str, str, float, float]] = {
    "q8_0": ("gguf", "q8_0", 8.5, 6e-4),
    "q4_k_m": ("gguf", "q4_k", 4.96, 0.029),
    "q2_k": ("gguf", "q2_k", 3.2, 0.37),
    "fp8-dynamic": ("huggingface", "fp8_e4m3", 8.1, 4e-3),
    "int4-gptq": ("huggingface", "int4", 4.7, 0.035),
}


def make_evaluation(
    recipes: Sequence[str] = ("q8_0", "q4_k_m"), *, seed: int = 0, chunks: int = 40, failing: bool = False
) -> Evaluation:
    """An evaluation with one candidate a name in ``RECIPES``; ``failing``: the last candidate fails a gate."""
    generator = np.random.default_rng(seed)
    ctx = 512
    scored = chunks * (ctx - 1 - ctx // 2)
    nll = 3.1 + 0.2 * generator.standard_normal(chunks)
    candidates = tuple(
        _candidate(recipe, generator, nll, scored, failing and recipe == recipes[-1]) for recipe in recipes
    )
    return Evaluation(
        schema=SCHEMA,
        run=Run(
            command=f"bamba-quant evaluate bamba-43m {' '.join(f'{name}.gguf' for name in recipes)} --text eval.txt",
            options={"ctx": ctx, "chunks": chunks, "noise_floor": "path", "max_kld": 0.05, "tokenizer": None},
            seed=seed,
            resamples=10_000,
            versions={"bamba-quant": "0.1.0", "python": "3.12.3", "numpy": "2.3.5", "torch": "2.13.0"},
            backend="torch",
            device="cpu",
            dtype="float32",
            threads=2,
            processor="x86_64",
            started="2026-01-01T00:00:00+00:00",
        ),
        text=Text("eval.txt", _hash("text"), 61_234, ctx, chunks, scored, 0, _hash("tokenizer")),
        base=_model("bamba-43m", "huggingface", "bf16", "bf16", 16.0),
        candidates=candidates,
        noise_floor=NoiseFloor(
            path="float32, scan in chunks of 64 instead of 32, products by another routine",
            chunks=8,
            figures={key: abs(_value(key, 1e-9, 0.0) - (kind.perfect or 0.0)) for key, kind in FIGURES.items()},
            layers=tuple(LayerDrift(i, _kind(i), None, 118.0 - i) for i in range(LAYERS)),
        ),
        drift_chunks=2,
        timing=Timing(25.0, 25.0 / (chunks * ctx), 0.03, 0.07, 0.0, 0.9, 0.7, 0.4, 1_200_000_000, None),
    )  # fmt: skip


def _candidate(
    recipe: str, generator: np.random.Generator, nll_base: np.ndarray, scored: int, failing: bool
) -> Candidate:
    kind, stored, bits, kld = RECIPES[recipe]
    loss = 0.6 * kld
    per_chunk = kld * np.exp(0.3 * generator.standard_normal(len(nll_base)))
    nll = nll_base + loss + 0.3 * math.sqrt(kld) * generator.standard_normal(len(nll_base)) / 16
    figures = {key: _figure(key, kld, loss) for key in FIGURES}
    tokens = kld * np.exp(1.2 * generator.standard_normal(scored))
    shifts = math.sqrt(kld) * 0.25 * generator.standard_normal(scored)
    limit = kld * (0.5 if failing else 2.0)
    bound = figures["kld_mean"].upper
    assert bound is not None
    tensors = tuple(
        replace(each, stored_name=_gguf_name(each)) if kind == "gguf" else each
        for each in _tensors(stored, kld)
    )
    ranked = sorted(
        (t for t in tensors if t.output_sqnr is not None), key=lambda tensor: tensor.output_sqnr or 0.0
    )
    return Candidate(
        model=_model(f"bamba-43m-{recipe}", kind, recipe, stored, bits),
        figures=figures,
        flips=Flips(lost=round(scored * 0.02), gained=round(scored * 0.015), p_value=0.004),
        kld_histogram=_histogram(np.log10(tokens), -8, 2, powers=True),
        delta_p_histogram=_histogram(shifts, -1, 1, powers=False),
        chunks=ChunkMeans(
            tuple(nll_base.tolist()),
            tuple(nll.tolist()),
            tuple(per_chunk.tolist()),
            tuple((-0.1 * per_chunk).tolist()),
            tuple((1 - np.sqrt(per_chunk)).clip(0, 1).tolist()),
        ),
        tensors=tensors,
        layers=tuple(
            LayerDrift(i, _kind(i), 22 - 10 * math.log10(kld), 20 - 10 * math.log10(kld) - 0.8 * i)
            for i in range(LAYERS)
        ),
        worst=tuple(tensor.name for tensor in ranked[:5]),
        gates=(
            Gate(
                "kld_mean", "max", limit, figures["kld_mean"].value, bound, figures["kld_mean"].floor, bound < limit
            ),
            Gate("same_top", "min", 0.1, figures["same_top"].value, figures["same_top"].lower or 0.0, 1e-4, True),
        ),
    )  # fmt: skip


def _value(key: str, kld: float, loss: float) -> float:
    spread = {
        "max": 60,
        "99_9": 14,
        "99": 6,
        "95": 3,
        "90": 2,
        "median": 0.6,
        "10": 0.05,
        "5": 0.02,
        "1": 4e-3,
    }
    if key.startswith("kld_"):
        return kld * {"mean": 1.0, "0_1": 5e-4, "min": -1e-6, **spread}[key.removeprefix("kld_")]
    if key.startswith("delta_p_"):
        deviations = {
            "max": 6,
            "99_9": 4,
            "99": 2.5,
            "95": 1.5,
            "90": 1.1,
            "75": 0.4,
            "median": 0,
            "25": -0.4,
        }
        deviations |= {"10": -1.1, "5": -1.5, "1": -2.5, "0_1": -4, "min": -6, "mean": -0.05, "rms": 1}
        return max(-1.0, min(1.0, 0.25 * math.sqrt(kld) * deviations[key.removeprefix("delta_p_")]))
    ppl = math.exp(3.1)
    ratio = math.exp(loss)
    return {
        "ppl": ppl * ratio,
        "ppl_base": ppl,
        "correlation": 1 - kld / 10,
        "ln_ppl_ratio": loss,
        "ppl_ratio": ratio,
        "ppl_difference": ppl * (ratio - 1),
        "same_top": 1 - 0.6 * math.sqrt(kld),
        "top_5_overlap": 1 - 0.5 * math.sqrt(kld),
        "flips": 0.2 * math.sqrt(kld),
        "accuracy_difference": -0.02 * math.sqrt(kld),
    }[key]


def _figure(key: str, kld: float, loss: float) -> Figure:
    value = _value(key, kld, loss)
    spread = 0.05 * (abs(value - (FIGURES[key].perfect or 0.0)) + 1e-6)
    naive = (
        0.4 * spread
        if key in ("ppl", "ppl_base", "kld_mean", "ln_ppl_ratio", "same_top", "delta_p_mean", "delta_p_rms")
        else None
    )
    return Figure(
        value, value - 1.96 * spread, value + 1.96 * spread, value - 1.64 * spread, value + 1.64 * spread, naive, 1e-7
    )  # fmt: skip


def _tensors(stored: str, kld: float) -> list[TensorLoss]:
    signal = 15 - 10 * math.log10(kld)
    found = [_tensor("model.embed_tokens.weight", None, "token_embd", (8192, 512), stored, signal, None)]
    for i in range(LAYERS):
        prefix = f"model.layers.{i}."
        found.append(_tensor(prefix + "input_layernorm.weight", i, "norm", (512,), "f32", None, None))
        if i in ATTENTION:
            for letter in "qkvo":
                name = f"{prefix}self_attn.{letter}_proj.weight"
                found.append(
                    _tensor(name, i, f"attn_{letter}", (512, 512), stored, signal + i / 5, signal + 2)
                )
        else:
            classes = tuple(
                RowClass(name, rows, signal - drop, signal + 1 - drop)
                for drop, (name, rows) in enumerate(
                    {"z": 1024, "x": 1024, "B": 128, "C": 128, "dt": 16}.items()
                )
            )
            name = prefix + "mamba.in_proj.weight"
            found.append(_tensor(name, i, "ssm_in", (2320, 512), stored, signal, signal + 1, classes))
            name = prefix + "mamba.out_proj.weight"
            found.append(_tensor(name, i, "ssm_out", (512, 1024), stored, signal - 1, signal - 2 - i / 7))
        for part in ("gate", "up", "down"):
            name = f"{prefix}feed_forward.{part}_proj.weight"
            found.append(
                _tensor(name, i, f"ffn_{part}", (1280, 512), stored, signal + i / 9, signal + 3 + i / 5)
            )
    found.append(_tensor("lm_head.weight", None, "output", (8192, 512), "q6_k", signal + 12, None))
    return found


def _gguf_name(tensor: TensorLoss) -> str:
    return ("" if tensor.layer is None else f"blk.{tensor.layer}.") + f"{tensor.role}.weight"


def _tensor(
    name: str,
    layer: int | None,
    role: str,
    shape: tuple[int, ...],
    stored: str,
    weight: float | None,
    output: float | None,
    classes: tuple[RowClass, ...] = (),
) -> TensorLoss:
    return TensorLoss(
        name, name, layer, role, shape, "bf16", stored, math.prod(shape) // 2, weight, 0.0 if weight is None else 0.01,
        None if weight is None else 1 - 10 ** (-weight / 10) / 2, output, classes,
    )  # fmt: skip


def _histogram(values: np.ndarray, low: float, high: float, *, powers: bool) -> Histogram:
    edges = np.linspace(low, high, 41)
    counts, _ = np.histogram(values, edges)
    shown = 10.0**edges if powers else edges
    return Histogram(
        tuple(shown.tolist()), tuple(counts.tolist()), int((values < low).sum()), int((values > high).sum())
    )


def _model(label: str, kind: str, recipe: str, stored: str, bits: float) -> ModelFile:
    n_bytes = round(WEIGHTS * bits / 8)
    assert kind in ("huggingface", "gguf")
    single = label + (".gguf" if kind == "gguf" else "/model.safetensors")
    return ModelFile(
        label=label,
        path=label + (".gguf" if kind == "gguf" else ""),
        kind=kind,  # type: ignore[arg-type]
        architecture="bamba",
        recipe=recipe,
        types=(
            TypeTotal(stored, 62, WEIGHTS - 50_000, n_bytes - 200_000),
            TypeTotal("f32", 89, 50_000, 200_000),
        ),
        weights=WEIGHTS,
        n_bytes=n_bytes,
        file_bytes=n_bytes + 400_000,
        bits_per_weight=bits,
        files=(FileHash(single, n_bytes + 400_000, _hash(label)),),
    )


def _kind(layer: int) -> str:
    return "attention" if layer in ATTENTION else "mamba"


def _hash(of: str) -> str:
    return hashlib.sha256(of.encode()).hexdigest()
