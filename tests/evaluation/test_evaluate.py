"""One evaluation as a whole: against plain computation, against itself, in company, for experts and other dtypes."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bamba_quant.checkpoint import open_checkpoint
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import BambaQuantError
from bamba_quant.evaluation import scoring
from bamba_quant.evaluation.evaluate import evaluate
from bamba_quant.evaluation.models import ComparisonError
from bamba_quant.evaluation.result import FIGURES, Evaluation
from bamba_quant.evaluation.scoring import EvaluationProgress
from bamba_quant.inference.loading import load_model, load_model_and_tokenizer
from bamba_quant.inference.weights import LazyWeights
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.writers import write_plan
from bamba_reference.runtime.perplexity import cut_chunks
from bamba_reference.torch.forward import forward, load
from tests.evaluation.conftest import OPTIONS
from tests.evaluation.oracle import table
from tests.support.conversion import to_gguf
from tests.support.families import FAMILIES, STACKED, save
from tests.support.shared import shared


def plain_logits(path: Path, cut: np.ndarray) -> np.ndarray:
    """Logits (scored tokens, V) of the whole model at once."""
    loaded = load_model(path)
    with torch.no_grad():
        out = forward(load(loaded.config, loaded.weights), cut).logits
    kept: np.ndarray = out[:, cut.shape[1] // 2 : -1].flatten(0, 1).numpy()
    return kept


def test_the_figures_are_those_of_the_whole_models(
    evaluation: Evaluation, files: dict[str, Path], text: Path
) -> None:
    loaded, encoder = load_model_and_tokenizer(embedded_model())
    ids = encoder.encode(text.read_text())
    cut = cut_chunks(ids, vocab_size=loaded.config.vocab_size, ctx=64, bos=encoder.bos, chunks=10)
    base = plain_logits(embedded_model(), cut)
    assert (evaluation.text.chunks, evaluation.text.scored, evaluation.text.tokens) == (10, 310, len(ids))
    for candidate in evaluation.candidates:
        expected = table(base, plain_logits(files[candidate.model.label], cut), cut[:, 33:].ravel().tolist())
        for key, value in expected.items():
            if not key.startswith("±"):
                assert candidate.figures[key].value == pytest.approx(value, rel=1e-3, abs=1e-6), key


def test_the_record_is_complete_and_plain(evaluation: Evaluation, files: dict[str, Path]) -> None:
    written = json.dumps(dataclasses.asdict(evaluation), allow_nan=False)
    assert json.loads(written)["candidates"][1]["model"]["label"] == "q4_k_m"
    assert [candidate.model.recipe for candidate in evaluation.candidates] == ["q8_0", "q4_k_m"]
    assert evaluation.base.recipe == "bf16" and evaluation.base.kind == "huggingface"
    assert {file.name for file in evaluation.base.files} >= {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
    }
    for candidate in evaluation.candidates:
        model, checkpoint = candidate.model, open_checkpoint(files[candidate.model.label])
        assert list(candidate.figures) == list(FIGURES)
        assert model.bits_per_weight == pytest.approx(8 * checkpoint.n_bytes / checkpoint.elements)
        assert model.file_bytes == files[model.label].stat().st_size == model.files[0].n_bytes
        assert len(candidate.tensors) == len(checkpoint.tensors)
        assert {loss.stored_name for loss in candidate.tensors} == set(checkpoint.tensors)
        assert len(candidate.layers) == 4 and len(candidate.worst) == 5
        assert len(candidate.chunks.kld) == 10
        assert np.mean(candidate.chunks.kld) == pytest.approx(candidate.figures["kld_mean"].value)
        assert sum(candidate.kld_histogram.counts) + candidate.kld_histogram.below == 310
    timing = evaluation.timing
    assert timing.reading + timing.dequantizing + timing.compiling + timing.computing == pytest.approx(1)
    assert min(timing.reading, timing.dequantizing, timing.computing) > 0
    assert timing.seconds_per_token == pytest.approx(timing.seconds / 640)
    assert evaluation.run.options["activations"] == "none" and evaluation.run.versions["torch"]


def test_more_bits_lose_less(evaluation: Evaluation) -> None:
    eight, four = evaluation.candidates
    for key in ("kld_mean", "kld_99", "delta_p_rms"):
        assert 0 < eight.figures[key].value < four.figures[key].value / 5
    assert eight.figures["same_top"].value > four.figures["same_top"].value
    for q8, q4 in zip(eight.layers, four.layers, strict=True):
        assert q8.local > q4.local + 10 and q8.accumulated > q4.accumulated + 10


def test_the_noise_floor_is_far_below_and_beside_every_figure(evaluation: Evaluation) -> None:
    floor = evaluation.noise_floor
    assert floor is not None and floor.chunks == 4 and "64 instead of 32" in floor.path
    assert list(floor.figures) == list(FIGURES)
    for candidate in evaluation.candidates:
        for key, figure in candidate.figures.items():
            assert figure.floor == floor.figures[key]
    assert 0 <= floor.figures["kld_mean"] < 1e-8 < evaluation.candidates[0].figures["kld_mean"].value
    assert all(layer.accumulated is None or layer.accumulated > 90 for layer in floor.layers)


def test_a_base_of_fewer_bits_than_a_candidate_is_a_warning(files: dict[str, Path], text: Path) -> None:
    options = dataclasses.replace(OPTIONS, noise_floor="none", drift_chunks=0, chunks=2)
    with pytest.warns(
        UserWarning, match=r"base q4_k_m is quantized, .* fewer than bf16 \(16.1\), f32 \(32.0\)"
    ):
        evaluate(files["q4_k_m"], [files["bf16"], files["f32"]], text, options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        evaluate(files["bf16"], [files["q4_k_m"], files["f32"]], text, options)


def test_bfloat16_arithmetic_as_floor(files: dict[str, Path], text: Path) -> None:
    options = dataclasses.replace(OPTIONS, noise_floor="bfloat16", drift_chunks=0)
    found = evaluate(embedded_model(), [files["q8_0"]], text, options)
    assert found.noise_floor is not None and "bfloat16" in found.noise_floor.path
    assert 1e-5 < found.noise_floor.figures["kld_mean"] < 1e-2
    assert found.candidates[0].layers == () == found.candidates[0].tensors
    none = evaluate(embedded_model(), [files["q8_0"]], text, dataclasses.replace(options, noise_floor="none"))
    assert none.noise_floor is None and none.candidates[0].figures["kld_mean"].floor is None


def without_time(evaluation: Evaluation) -> Evaluation:
    run = dataclasses.replace(evaluation.run, command="", started="")
    return dataclasses.replace(evaluation, run=run, timing=None)


def test_alone_or_in_company_and_again(evaluation: Evaluation, files: dict[str, Path], text: Path) -> None:
    again = evaluate(embedded_model(), [files["q8_0"], files["q4_k_m"]], text, OPTIONS)
    assert without_time(again) == without_time(evaluation)
    alone = evaluate(embedded_model(), [files["q4_k_m"]], text, OPTIONS)
    assert alone.candidates == evaluation.candidates[1:]
    other_seed = evaluate(embedded_model(), [files["q8_0"]], text, dataclasses.replace(OPTIONS, seed=1))
    found, before = other_seed.candidates[0].figures["kld_mean"], evaluation.candidates[0].figures["kld_mean"]
    assert found.value == before.value and found.low != before.low


def test_exact_copies_lose_nothing(files: dict[str, Path], text: Path) -> None:
    """The same weights in another container, q and k rows moved there and back."""
    found = evaluate(embedded_model(), [files["bf16"]], text, OPTIONS).candidates[0]
    assert all(loss.max_error < 1e-6 for loss in found.tensors)
    assert all(loss.weight_sqnr is None for loss in found.tensors if not loss.name.endswith("A_log"))
    assert all(layer.local is None or layer.local > 100 for layer in found.layers)
    for key, kind in FIGURES.items():
        if kind.perfect is not None:
            assert found.figures[key].value == pytest.approx(kind.perfect, abs=2e-4), key


def test_the_base_is_read_once(files: dict[str, Path], text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the forward pass: once for all candidates. Weights are compared once more, a candidate at a time."""
    read: dict[tuple[str, str], int] = {}
    rows = LazyWeights.rows

    def counting(
        self: LazyWeights, name: str, start: int = 0, stop: int | None = None, timings: Any = None
    ) -> Any:
        kind = "base" if self.info("model.layers.0.mamba.in_proj.weight").format == "bf16" else "other"
        length = self.info(name).shape[0]
        read[kind, name] = read.get((kind, name), 0) + (length if stop is None else min(stop, length)) - start
        return rows(self, name, start, stop, timings)

    monkeypatch.setattr(LazyWeights, "rows", counting)
    options = dataclasses.replace(OPTIONS, drift_chunks=0, noise_floor="none")
    evaluate(embedded_model(), [files["q8_0"], files["q4_k_m"]], text, options)
    for (kind, name), count in read.items():
        if ".layers." in name:
            length = load_model(embedded_model()).weights.info(name).shape[0]
            assert count == length * (1 if kind == "base" else 2), name


def test_drift_finds_the_tensor_that_was_spoilt(text: Path, tmp_path: Path, files: dict[str, Path]) -> None:
    from safetensors.torch import load_file, save_file

    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    for file in embedded_model().iterdir():
        (spoilt / file.name).write_bytes(file.read_bytes())
    state = load_file(spoilt / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    matrix = state["model.layers.1.mamba.in_proj.weight"].float()
    config = load_model(spoilt).config
    states = config.mamba_d_inner * 2, config.mamba_n_groups * config.mamba_d_state
    B = slice(states[0], states[0] + states[1])
    noise = torch.randn(matrix[B].shape, generator=generator)
    noisy = matrix[B] + 0.1 * matrix[B].norm() / noise.norm() * noise
    matrix[B] = noisy
    state["model.layers.1.mamba.in_proj.weight"] = matrix.to(torch.bfloat16)
    save_file(state, spoilt / "model.safetensors", metadata={"format": "pt"})
    found = evaluate(embedded_model(), [spoilt], text, OPTIONS).candidates[0]
    assert found.worst == ("model.layers.1.mamba.in_proj.weight",)
    by_name = {loss.name: loss for loss in found.tensors}
    classes = {part.name: part for part in by_name["model.layers.1.mamba.in_proj.weight"].row_classes}
    assert list(classes) == ["z", "x", "B", "C", "dt"]
    assert classes["B"].weight_sqnr == pytest.approx(20, abs=0.1)
    assert classes["B"].output_sqnr == pytest.approx(20, abs=6)
    assert all(part.weight_sqnr is part.output_sqnr is None for name, part in classes.items() if name != "B")
    first, second, third, *_ = found.layers
    assert first.local is first.accumulated is None
    assert second.local is not None and second.accumulated is not None
    assert third.local is None or third.local > 100
    assert third.accumulated is not None and third.accumulated < 100


def test_local_and_accumulated_by_hand(evaluation: Evaluation, files: dict[str, Path], text: Path) -> None:
    loaded, encoder = load_model_and_tokenizer(embedded_model())
    other = load_model(files["q4_k_m"])
    cut = cut_chunks(
        encoder.encode(text.read_text()),
        vocab_size=loaded.config.vocab_size,
        ctx=64,
        bos=encoder.bos,
        chunks=2,
    )
    with torch.no_grad():
        base, candidate = (
            forward(load(each.config, each.weights), cut, hidden_states=True).hidden_states
            for each in (loaded, other)
        )
    assert base is not None and candidate is not None
    for layer in evaluation.candidates[1].layers:
        b, c = base[layer.layer + 1].double(), candidate[layer.layer + 1].double()
        expected = 10 * math.log10(float(b.square().sum() / (c - b).square().sum()))
        assert layer.accumulated == pytest.approx(expected, abs=0.01)
    losses = {loss.name: loss for loss in evaluation.candidates[1].tensors}
    for name, loss in losses.items():
        w, v = (np.asarray(each.weights[name], np.float32).astype(np.float64) for each in (loaded, other))
        if np.any(w != v):
            assert loss.weight_sqnr == pytest.approx(
                10 * np.log10((w**2).sum() / ((v - w) ** 2).sum()), abs=1e-3
            )
            assert loss.max_error == pytest.approx(np.abs(v - w).max(), rel=1e-6)
            assert loss.cosine == pytest.approx(
                (w * v).sum() / np.sqrt((w**2).sum() * (v**2).sum()), abs=1e-9
            )


def test_progress_reaches_the_end(files: dict[str, Path], text: Path) -> None:
    told: list[EvaluationProgress] = []
    evaluate(embedded_model(), [files["q8_0"]], text, OPTIONS, progress=told.append)
    assert [(each.done, each.total) for each in told if each.stage == "layers"] == [
        (i, 4) for i in range(1, 5)
    ]
    last = told[-1]
    assert (last.stage, last.done, last.total) == ("tokens", 310, 310)
    assert last.estimates["q8_0"]["kld_mean"] > 0
    work = [each.work for each in told]
    assert work == sorted(work) and work[-1] == 1
    weights = open_checkpoint(embedded_model()).tensors.items()
    layers = 640 * sum(tensor.elements for name, tensor in weights if ".layers." in name)
    assert work[3] == pytest.approx(layers / (layers + 310 * 2048 * 256))


@pytest.mark.parametrize("block", [7, 100])
def test_logits_exist_a_block_at_a_time(
    block: int, evaluation: Evaluation, files: dict[str, Path], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_MOST_TOKENS_ON_CPU", block)
    sizes = []
    score = scoring.score

    def watched(base: Any, logits: torch.Tensor) -> Any:
        sizes.append(len(logits))
        return score(base, logits)

    monkeypatch.setattr(scoring, "score", watched)
    found = evaluate(embedded_model(), [files["q4_k_m"]], text, OPTIONS)
    assert max(sizes) == block
    for key, figure in found.candidates[0].figures.items():
        assert figure.value == pytest.approx(evaluation.candidates[1].figures[key].value, rel=1e-4, abs=1e-7)


def test_a_saved_base_stands_for_the_model(
    evaluation: Evaluation, files: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "base.kld"
    options = dataclasses.replace(OPTIONS, save_base=saved, drift_chunks=0, noise_floor="none")
    evaluate(embedded_model(), [files["q8_0"]], text, options)
    options = dataclasses.replace(OPTIONS, activations="none")
    found = evaluate(saved, [files["q8_0"], files["q4_k_m"]], None, options)
    assert found.base.kind == "logits" and found.noise_floor is None and found.text.chunks == 10
    for mine, whole in zip(found.candidates, evaluation.candidates, strict=True):
        for key in ("ppl", "ppl_base", "kld_mean", "kld_99", "same_top", "delta_p_rms"):
            expected = whole.figures[key].value
            assert mine.figures[key].value == pytest.approx(expected, rel=1e-2, abs=3e-5), key
        assert mine.layers == ()
    with_text = evaluate(saved, [files["q8_0"]], text, options)
    assert with_text.candidates == found.candidates[:1] and with_text.text.file == text.name
    with pytest.raises(ComparisonError, match="already a file of logits"):
        evaluate(saved, [files["q8_0"]], None, dataclasses.replace(options, save_base=tmp_path / "again"))
    other = tmp_path / "other.txt"
    other.write_text("Quite another text. " * 500)
    with pytest.raises(ComparisonError, match="another text"):
        evaluate(saved, [files["q8_0"]], other, options)


def experts(directory: Path, vary: float = 0.0) -> Path:
    """A model of stacked experts with the embedded model's tokenizer; ``vary`` moves its routers."""
    name, case = STACKED[0]
    model = FAMILIES[name].random(**{**FAMILIES[name].small.cases[case], "vocab_size": 2048})
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "router" in name:
                weight += vary * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    save(model, directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (directory / file).write_bytes((embedded_model() / file).read_bytes())
    return directory


def test_experts_lose_by_their_products_too(text: Path, tmp_path: Path) -> None:
    """Under the stack's name, over the base's tokens, though the candidate's router chooses others."""
    base, other = experts(tmp_path / "base"), experts(tmp_path / "other", vary=0.5)
    eight = to_gguf(base, tmp_path / "q8.gguf", "q8_0")
    moved, quantized = evaluate(base, [other, eight], text, OPTIONS).candidates
    for candidate in (moved, quantized):
        stacks = {
            loss.name: loss for loss in candidate.tensors if len(loss.shape) == 3 and "conv" not in loss.name
        }
        assert len(stacks) >= 3
        for loss in stacks.values():
            if candidate is moved:
                assert loss.weight_sqnr is loss.output_sqnr is None
            else:
                assert loss.output_sqnr == pytest.approx(loss.weight_sqnr, abs=3)
    assert any(layer.local is not None and layer.local < 40 for layer in moved.layers)


def test_experts_with_llama_cpps_activations(text: Path, tmp_path: Path) -> None:
    base = experts(tmp_path / "base")
    files = [to_gguf(base, tmp_path / f"{name}.gguf", name) for name in ("bf16", "q8_0")]
    found = evaluate(files[0], files[1:], text, OPTIONS)
    assert found.run.options["activations"] == "llama.cpp"
    exact = evaluate(files[0], files[1:], text, dataclasses.replace(OPTIONS, activations="none"))
    kld = [each.candidates[0].figures["kld_mean"].value for each in (exact, found)]
    assert 0 < kld[0] < kld[1] < 0.01


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(dtype: str, evaluation: Evaluation, files: dict[str, Path], text: Path) -> None:
    found = evaluate(
        embedded_model(), [files["q4_k_m"]], text, dataclasses.replace(OPTIONS, dtype=dtype, backend="auto")
    )
    expected = evaluation.candidates[1].figures["kld_mean"].value
    assert found.candidates[0].figures["kld_mean"].value == pytest.approx(
        expected, rel=0.1 if dtype == "bfloat16" else 1e-4
    )
    assert found.noise_floor is not None
    assert found.noise_floor.figures["kld_mean"] < (1e-3 if dtype == "bfloat16" else 1e-14)


def test_bamba_43m_in_shards(text: Path, tmp_path: Path) -> None:
    model = shared("models/bamba-43m")
    conversion = plan_conversion(
        model, outtype="q4_k_m", outfile=tmp_path / "q4.gguf", split_max_bytes=10_000_000
    )
    shards = write_plan(conversion, conversion.outfile)
    found = evaluate(model, [shards[0]], text, dataclasses.replace(OPTIONS, chunks=4))
    assert len(found.base.files) == 9 and len(found.candidates[0].model.files) == len(shards) > 1
    assert 0.01 < found.candidates[0].figures["kld_mean"].value < 0.1
    assert found.candidates[0].figures["kld_mean"].low is None


def test_quick_figures_are_those_of_the_first_chunks(files: dict[str, Path], text: Path) -> None:
    """The whole evaluation is the same with them, and candidates with the base's own weights lose nothing."""
    early: list[Evaluation] = []
    options = dataclasses.replace(OPTIONS, chunks=20)  # 16 run together
    paths = [files["bf16"], files["q4_k_m"]]
    found = evaluate(embedded_model(), paths, text, options, quick=early.append)
    (quick,) = early
    assert (quick.text.chunks, quick.text.scored) == (16, 16 * 31)
    for ours, chunks in ((quick, 16), (found, 20)):
        theirs = evaluate(embedded_model(), paths, text, dataclasses.replace(options, chunks=chunks))
        assert [each.figures for each in ours.candidates] == [each.figures for each in theirs.candidates]
        assert [each.tensors for each in ours.candidates] == [each.tensors for each in theirs.candidates]
    assert found.candidates[0].figures["kld_max"].value <= 1e-12
    with pytest.MonkeyPatch.context() as patch:
        usual = scoring.score

        def damaged(base: Any, logits: torch.Tensor) -> Any:
            return usual(base, torch.full_like(logits, math.nan))

        patch.setattr(scoring, "score", damaged)
        with pytest.raises(BambaQuantError, match="not finite"):
            evaluate(embedded_model(), paths[:1], text, options, quick=early.append)
    assert len(early) == 1
    nothing: list[Evaluation] = []
    evaluate(embedded_model(), paths[:1], text, dataclasses.replace(options, chunks=16), quick=nothing.append)
    assert not nothing  # of a text that is not longer
