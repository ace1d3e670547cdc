"""``int4`` as users run it, and what the other commands make of its output."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bamba_quant.embedded import embedded_model
from tests.support.command import run
from tests.support.models import random_bamba, save_checkpoint

TEXT = "The miller looked at the river, and the river went on turning his wheel. " * 60


def test_help_has_examples() -> None:
    text = run("int4", "--help").stdout
    assert "Examples" in text
    assert "bamba-quant int4" in text
    assert "int4" in run("--help").stdout


def test_a_quantized_directory_is_a_model_like_any_other(tmp_path: Path) -> None:
    out = tmp_path / "w4a16"
    done = run("int4", embedded_model(), out, "--asymmetric", "--group-size", "64")
    assert done.stdout.strip() == str(out)
    assert "w4a16-asym-g64" in done.stderr
    assert "not empty" in run("int4", embedded_model(), out, code=2).stderr
    again = run("int4", out, tmp_path / "again", code=2)
    assert "quantized already" in again.stderr
    assert not (tmp_path / "again").exists()

    shown = json.loads(run("inspect", out, "--json").stdout)
    assert "w4a16-asym-g64" in shown["types"]
    (tmp_path / "text.txt").write_text(TEXT)
    options = ("--text", tmp_path / "text.txt", "--ctx", "64", "--chunks", "4", "--json")
    quantized = json.loads(run("perplexity", out, *options).stdout)["perplexity"]
    original = json.loads(run("perplexity", embedded_model(), *options).stdout)["perplexity"]
    assert quantized != original
    assert quantized == pytest.approx(original, rel=0.2)
    assert json.loads(run("generate", out, "--prompt", "The", "--max-tokens", "2", "--json").stdout)["tokens"]

    refused = run("convert", out, "--outtype", "q8_0", "--outfile", tmp_path / "m.gguf", code=2)
    assert "--allow-requantize" in refused.stderr
    run("convert", out, "--outtype", "bf16", "--outfile", tmp_path / "m.gguf")
    assert json.loads(run("perplexity", tmp_path / "m.gguf", *options).stdout)["perplexity"] == pytest.approx(
        quantized, rel=1e-4
    )


def test_a_dry_run_of_a_configuration_adds_up(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((embedded_model() / "config.json").read_bytes())
    plan = json.loads(run("int4", tmp_path / "config.json", tmp_path / "out", "--dry-run", "--json").stdout)
    real = json.loads(run("int4", embedded_model(), tmp_path / "out", "--method", "rtn", "--json").stdout)
    weights = [file["bytes"] for file in real["files"] if file["file"].endswith(".safetensors")]
    assert sum(f["bytes"] for f in plan["files"] if f["file"].endswith(".safetensors")) == sum(weights)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (("--bits", "3"), "'3' is not one of '4', '8'"),
        (("--bits", "8", "--format", "torchao"), "torchao has 4 bits, not 8"),
        (("--symmetric", "--format", "torchao"), "float zero points"),
        (("--group-size", "100"), "'100' is not one of '128', '64', '32'"),
        (("--format", "gptq"), "'gptq' is not one of 'compressed-tensors'"),
        (("--method", "gptq"), "'gptq' is not one of 'hqq', 'mse', 'rtn'"),
    ),
)
def test_options_that_mean_nothing(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = run("int4", embedded_model(), tmp_path / "out", *options, code=2)
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_does_not_divide_is_named_or_kept(tmp_path: Path) -> None:
    model = save_checkpoint(random_bamba(), tmp_path / "model")
    done = run("int4", model, tmp_path / "out", "--group-size", "64", code=2)
    assert "down_proj.weight" in done.stderr
    assert "columns in multiples of 64" in done.stderr
    assert "--ignore" in done.stderr
    kept = ("--ignore", "ffn_down", "--ignore", "ffn_gate", "--ignore", "ffn_up")
    run("int4", model, tmp_path / "out", "--group-size", "64", *kept)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    patterns = [entry[3:] for entry in config["quantization_config"]["ignore"] if entry.startswith("re:")]
    assert any(re.match(pattern, "model.layers.0.feed_forward.down_proj") for pattern in patterns)
