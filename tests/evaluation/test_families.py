"""Every family is evaluated, run and continued like Bamba: by directory, by GGUF, and quantized either way."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from bamba_quant.embedded import embedded_model
from bamba_quant.evaluation.evaluate import evaluate
from bamba_quant.evaluation.result import Candidate, Evaluation
from bamba_quant.evaluation.run import EvaluationOptions
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.writers import write_plan
from bamba_quant_cli.app import app
from tests.support.conversion import to_gguf
from tests.support.families import CASES, FAMILIES, KINDS, MIXERS_ALONE, STACKED, save

# Experts that read and write less than the model's width lose elsewhere than others.
LATENT = [(name, case) for name, case in CASES if FAMILIES[name].reference(case).moe_latent_size]
OPTIONS = EvaluationOptions(ctx=64, chunks=6, resamples=200, floor_chunks=1, drift_chunks=1, backend="numba")
TEXT = "The function returns a list of the names that are bound in the module, in the order of their definition.\n"
# What the rows of a mixer's projections are.
CLASSES: dict[str, dict[str, list[str]]] = {
    "mamba2": {"ssm_in": ["z", "x", "B", "C", "dt"]},
    "mamba1": {"ssm_in": ["x", "z"], "ssm_x": ["dt", "B", "C"]},
}


@dataclasses.dataclass(frozen=True)
class Made:
    name: str
    case: str
    directory: Path
    files: dict[str, Path]


def with_tokenizer(name: str, case: str, directory: Path) -> Path:
    """A checkpoint of a family's model, with the tokenizer of the embedded one."""
    family = FAMILIES[name]
    overrides: dict[str, Any] = {
        **family.small.multiples_of_128,
        **family.small.cases[case],
        "vocab_size": 2048,
    }
    save(family.random(**overrides), directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_model() / file, directory)
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pydoc_data.topics import topics

    file = tmp_path_factory.mktemp("text") / "help.txt"
    file.write_text("\n".join(topics[topic] for topic in sorted(topics))[:6000], encoding="utf-8")
    return file


@pytest.fixture(scope="module", params=KINDS + LATENT, ids=" ".join)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A family's model as it is and in three other forms."""
    name, case = request.param
    place = tmp_path_factory.mktemp(name)
    directory = with_tokenizer(name, case, place / "model")
    files = {outtype: to_gguf(directory, place / f"{outtype}.gguf", outtype) for outtype in ("f32", "q8_0")}
    write_plan(plan_quantization(directory, "fp8-dynamic"), place / "fp8")
    return Made(name, case, directory, {**files, "fp8": place / "fp8"})


@pytest.fixture(scope="module")
def evaluation(made: Made, text: Path) -> Evaluation:
    return evaluate(made.directory, list(made.files.values()), text, OPTIONS)


def value(candidate: Candidate, figure: str) -> float:
    return candidate.figures[figure].value


def test_the_f32_file_is_the_model(evaluation: Evaluation) -> None:
    """Mamba's A_log comes back from its exponential a last digit apart."""
    exact = evaluation.candidates[0]
    assert abs(value(exact, "kld_mean")) < 1e-10
    assert value(exact, "same_top") == 1
    assert value(exact, "ppl") == pytest.approx(value(exact, "ppl_base"), rel=1e-5)
    assert all(loss.max_error < 1e-6 for loss in exact.tensors)
    assert all(layer.local is None or layer.local > 120 for layer in exact.layers)


def test_fewer_bits_lose_more(evaluation: Evaluation, made: Made) -> None:
    _, eight, fp8 = evaluation.candidates
    floor = evaluation.noise_floor
    assert floor is not None
    assert 1e3 * floor.figures["kld_mean"] < value(eight, "kld_mean") < value(fp8, "kld_mean") / 2
    # Two mixers in every layer of random weights lose more than one.
    parallel = all(len(layer.blocks) > 1 for layer in FAMILIES[made.name].reference(made.case).layers)
    assert value(eight, "kld_mean") < (0.02 if parallel else 0.01)
    for better, worse in zip(eight.layers, fp8.layers, strict=True):
        assert better.local is not None and worse.local is not None
        assert better.local > 25
        # Experts stay in 16 bits.
        assert 20 < worse.local < (45 if "moe" in worse.kind else 35)


def test_drift_and_rows_are_the_familys_own(evaluation: Evaluation, made: Made) -> None:
    _, eight, _ = evaluation.candidates
    config = FAMILIES[made.name].config(**FAMILIES[made.name].small.cases[made.case])
    assert len(eight.layers) == config.num_hidden_layers
    family, blocks = FAMILIES[made.name], FAMILIES[made.name].blocks(made.case)
    # A layer's second step is of its kind where it has no first one.
    steps = [layer.blocks or layer.feed_forward for layer in family.reference(made.case).layers]
    assert [layer.kind for layer in eight.layers] == [
        "+".join(step).replace("mamba2", "mamba") for step in steps
    ]
    found = {
        loss.role: [part.name for part in loss.row_classes] for loss in eight.tensors if loss.row_classes
    }
    assert found == {
        role: names for mixer in blocks & CLASSES.keys() for role, names in CLASSES[mixer].items()
    }
    for loss in eight.tensors:
        if loss.row_classes:
            assert sum(part.rows for part in loss.row_classes) == loss.shape[0]
    quantized = {loss.role for loss in eight.tensors if loss.output_sqnr is not None}
    assert quantized >= ({"attn_q", "attn_output"} if "attention" in blocks else {"ssm_in", "ssm_out"})
    if (made.name, made.case) in STACKED:
        assert {"ffn_gate_exps", "ffn_down_exps"} <= {loss.role for loss in eight.tensors if loss.weight_sqnr}


@pytest.mark.parametrize(("name", "case"), MIXERS_ALONE)
def test_rows_of_mambas_projections(name: str, case: str, text: Path, tmp_path: Path) -> None:
    """Noise in the rows that transformers splits off as C shows as C, and in the first half of in_proj as x."""
    original, spoilt = with_tokenizer(name, case, tmp_path / "model"), tmp_path / "spoilt"
    shutil.copytree(original, spoilt)
    state = load_file(spoilt / "model.safetensors")
    config = FAMILIES[name].config(**FAMILIES[name].small.multiples_of_128)
    state["backbone.layers.1.mixer.x_proj.weight"][-config.state_size :] *= 1.1
    state["backbone.layers.1.mixer.in_proj.weight"][: config.intermediate_size] *= 1.1
    save_file(state, spoilt / "model.safetensors", metadata={"format": "pt"})
    (candidate,) = evaluate(original, [spoilt], text, OPTIONS).candidates
    lost = {
        (loss.role, part.name): part.output_sqnr
        for loss in candidate.tensors
        for part in loss.row_classes
        if part.weight_sqnr is not None
    }
    assert lost == {("ssm_x", "C"): pytest.approx(20, abs=0.01), ("ssm_in", "x"): pytest.approx(20, abs=0.01)}


def run(*arguments: object) -> Any:
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_perplexity_is_evaluates(evaluation: Evaluation, made: Made, text: Path) -> None:
    options = ("--text", text, "--ctx", 64, "--chunks", 6)
    base = value(evaluation.candidates[0], "ppl_base")
    assert run("perplexity", made.directory, *options)["perplexity"] == pytest.approx(base, rel=1e-4)
    for candidate, path in zip(evaluation.candidates, made.files.values(), strict=True):
        found = run("perplexity", path, *options, "--stream")["perplexity"]
        assert found == pytest.approx(value(candidate, "ppl"), rel=1e-4)


def test_generation_is_the_same_from_either_file(made: Made) -> None:
    arguments = ("--prompt", TEXT, "--max-tokens", 12, "--stop", 2)
    said = [run("generate", path, *arguments) for path in (made.directory, made.files["f32"])]
    assert said[0]["tokens"] == said[1]["tokens"]
    assert len(said[0]["tokens"]) == 12 and len(np.unique(said[0]["tokens"])) > 1
    for name in ("q8_0", "fp8"):
        assert len(run("generate", made.files[name], *arguments)["tokens"]) == 12
