"""The functions of ``bamba_quant``, with paths as strings; converting without torch and without installed metadata."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import bamba_quant
from bamba_quant.calibration import tuned_output
from bamba_quant.calibration.allocation import allocate
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import BambaQuantError, OutputError
from bamba_quant.evaluation.evaluate import evaluate
from bamba_quant.evaluation.run import EvaluationOptions
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.recipes import recipe_named
from tests.support.command import run
from tests.support.conversion import faulty
from tests.support.evaluations import RECIPES, make_evaluation
from tests.support.models import random_bamba, save_checkpoint

MINI = str(embedded_model())
TEXT = "The miller ground the corn, and the river turned the wheel. " * 100

# Runs command lines, given as JSON, where these packages are not installed, nor is this project's metadata.
WITHOUT = """
import importlib.metadata, json, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchao", "safetensors", "transformers", "triton", "lm_eval"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
def version(name, version=importlib.metadata.version):
    if name == "bamba-quant":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = version
sys.meta_path.insert(0, Missing())
from bamba_quant_cli.app import run
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    try:
        run()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    print("exit code", code, words[0], flush=True)
"""


def without_torch(*commands: list[str]) -> tuple[list[str], str]:
    """The lines "exit code …" of commands, and what they wrote to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, json.dumps(commands)], capture_output=True, text=True, check=True
    )
    return [line for line in done.stdout.splitlines() if line.startswith("exit code")], done.stderr


def test_converting_needs_no_torch(tmp_path: Path) -> None:
    wrong = faulty(embedded_model(), tmp_path / "wrong.gguf")
    out = str(tmp_path / "out")
    codes, err = without_torch(
        ["--help"],
        ["--version"],
        ["recipes", "q4_k_m"],
        ["inspect", MINI],
        ["convert", MINI, "--outfile", f"{out}.gguf"],
        ["convert", MINI, "--outtype", "q8_0", "--outfile", f"{out}-q8.gguf"],
        ["fp8", MINI, f"{out}-fp8"],
        ["int4", MINI, f"{out}-int4"],
        ["export", f"{out}.gguf", f"{out}-hf"],
        ["repair", str(wrong), "--outfile", f"{out}-repaired.gguf"],
    )
    assert len(codes) == 10 and all(code.startswith("exit code 0 ") for code in codes), err


def test_what_needs_torch_says_how_to_install_it(tmp_path: Path) -> None:
    codes, err = without_torch(
        ["generate", MINI, "--prompt", "x"],
        ["convert", MINI, "--outtype", "q4_k_m", "--tune", "self"],
        ["lm-eval", MINI, "--tasks", "arc_easy"],
    )
    assert codes == ["exit code 2 generate", "exit code 2 convert", "exit code 2 lm-eval"]
    assert err.count("error: this needs torch, which is not installed") == 2
    assert err.count("fix: pip install 'bamba-quant[torch]'") == 2
    assert (
        "error: this needs lm_eval, which is not installed\n  fix: pip install 'bamba-quant[lm-eval]'" in err
    )


def test_attributes_are_listed_and_others_are_errors() -> None:
    assert set(bamba_quant.__all__) == set(dir(bamba_quant))
    assert all(hasattr(bamba_quant, name) for name in bamba_quant.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = bamba_quant.nothing


def test_files_and_directories(tmp_path: Path) -> None:
    model = str(save_checkpoint(random_bamba(), tmp_path / "m"))
    (file,) = bamba_quant.convert(model, "bf16", f"{tmp_path}/m.gguf", vocab=False)
    with pytest.raises(OutputError):
        bamba_quant.convert(model, outfile=str(file), vocab=False)
    assert bamba_quant.inspect(str(file)).layers == bamba_quant.inspect(model).layers
    exported = bamba_quant.export(str(file), f"{tmp_path}/back", vocab=False)
    assert exported[0] == tmp_path / "back" / "model.safetensors"
    quantized = bamba_quant.quantize(model, f"{tmp_path}/fp8", ignore="hybrid", dtype="stored")
    assert {path.parent for path in quantized} == {tmp_path / "fp8"}
    weights = bamba_quant.load_model(f"{tmp_path}/fp8").weights
    assert weights.keys() == bamba_quant.load_model(model).weights.keys()
    wrong = faulty(embedded_model(), tmp_path / "wrong.gguf")
    (repaired,) = bamba_quant.repair(str(wrong))
    assert repaired.name == f"{wrong.stem}-repaired.gguf"


def test_measuring(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    measured = bamba_quant.imatrix(MINI, str(text), f"{tmp_path}/i.gguf", ctx=64, chunks=2, tokenizer=MINI)
    assert measured.tokens == 128 and (tmp_path / "i.gguf").is_file()
    assert repr(measured).startswith("Measured(sums=ActivationSums(") and len(repr(measured)) < 400
    with pytest.raises(OutputError):
        bamba_quant.imatrix(MINI, [str(text)], f"{tmp_path}/i.gguf")
    (file,) = bamba_quant.convert(MINI, "q4_k_m", f"{tmp_path}/q.gguf", imatrix=f"{tmp_path}/i.gguf")
    reports = f"{tmp_path}/report"
    found = bamba_quant.evaluate(
        MINI, str(file), str(text), report_dir=reports, ctx=64, chunks=8, drift_chunks=0, tokenizer=MINI,
        save_base=f"{tmp_path}/base",
    )  # fmt: skip
    assert 0 < found.candidates[0].figures["kld_mean"].value < 1
    assert (tmp_path / "report" / "report.html").is_file()
    again = evaluate(f"{tmp_path}/base", [str(file)], None, EvaluationOptions(activations="none"))
    assert again.candidates[0].figures["ppl"].value == found.candidates[0].figures["ppl"].value


@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_a_command_is_the_scheme_that_it_writes_by_default(name: str, tmp_path: Path) -> None:
    made = bamba_quant.quantize(MINI, f"{tmp_path}/a", name)
    run(name, MINI, tmp_path / "b")
    assert {path.name: path.read_bytes() for path in made} == {
        path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()
    }


def test_a_scheme_with_a_typing_error(tmp_path: Path) -> None:
    with pytest.raises(BambaQuantError, match=r"did you mean fp8-dynamic\?"):
        bamba_quant.quantize(MINI, f"{tmp_path}/a", "fp8_dynamic")
    with pytest.raises(BambaQuantError, match=r"did you mean q4_k_m\?"):
        bamba_quant.convert(MINI, "q4km", f"{tmp_path}/a")
    assert not list(tmp_path.iterdir())


def test_reprs_are_a_few_lines() -> None:
    plan, evaluation = plan_conversion(MINI, outtype="q4_k_m"), make_evaluation(tuple(RECIPES) * 4)
    quantized = plan_quantization(MINI, "int4")
    loaded, costs = bamba_quant.load_model(MINI), {"output.weight": {"q4_k": 1.0, "q6_k": 0.1}}
    for each in (plan, quantized, plan.rows[0], quantized.rows[0], plan.checkpoint, plan.model, plan.shards[0], loaded,
                 bamba_quant.inspect(MINI), evaluation, evaluation.candidates[0], recipe_named("q4_k_m"),
                 allocate(embedded_model(), costs, target_bytes=3_000_000), loaded.config):  # fmt: skip
        text = repr(each)
        assert text.startswith(f"{type(each).__name__}(") and len(text) < 1500, text
    assert "rows=<tuple of 51>" in repr(plan) and "recipe='q4_k_m'" in repr(plan)
    assert repr(evaluation).count("\n") <= 10 and "and 12 more" in repr(evaluation)
    assert f"kld_mean {evaluation.candidates[1].figures['kld_mean'].value:.5g}" in repr(evaluation)


@pytest.mark.parametrize(("kind", "container"), [("outtype", "gguf"), ("scheme", "safetensors")])
def test_tuning(kind: str, container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[Any, ...]] = []
    monkeypatch.setattr(tuned_output, "write_tuned_output", lambda *given, **more: called.append(given))
    name = {"outtype": "q4_k_m", "scheme": "fp8-dynamic"}[kind]
    bamba_quant.tune(MINI, f"{tmp_path}/out", **{kind: name}, tune_options={"steps": 3})
    ((plan, output, tuning),) = called
    assert plan.container == container and str(output).startswith(f"{tmp_path}/out")
    assert tuning.options.steps == 3 and tuning.options.self_tokens
    with pytest.raises(ValueError, match="give outtype"):
        bamba_quant.tune(MINI, f"{tmp_path}/out")
