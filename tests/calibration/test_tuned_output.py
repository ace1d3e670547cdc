"""Tuned files are files like any other: llama.cpp and transformers load them and compute the reference's logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from bamba_quant.calibration.tune_options import TuneOptions
from bamba_quant.calibration.tuned_output import plan_tuning, write_tuned_gguf, write_tuned_output
from bamba_quant.embedded import embedded_model
from bamba_quant.evaluation.weights_compare import compare_weights
from bamba_quant.inference.loading import load_model
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.quantize import plan_quantization
from bamba_reference.torch.forward import forward, load
from tests.planning.test_integers_in_transformers import assert_right
from tests.support import llama
from tests.support.conversion import english_chunks, to_gguf
from tests.support.tuning import StandIn

OPTIONS = TuneOptions(steps=4, ctx=64, batch=4, held_out=16, evaluations=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pydoc_data.topics import topics

    file = tmp_path_factory.mktemp("text") / "help.txt"
    file.write_text("\n".join(topics[name] for name in sorted(topics))[:60_000], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return english_chunks(embedded_model(), length=200, count=8)[-1]


def reference(model: Path, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities (tokens, vocabulary) of what the weights of ``model`` compute in float32."""
    loaded = load_model(model)
    with torch.no_grad():
        return forward(load(loaded.config, loaded.weights), torch.tensor([tokens])).logits[0].log_softmax(-1)


def divergence(expected: torch.Tensor, logits: np.ndarray) -> float:
    found = torch.from_numpy(logits).log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@pytest.mark.parametrize("outtype", ["q4_k_m", "iq4_xs"])
def test_llama_cpp_computes_the_references_logits(
    outtype: str, text: Path, tokens: list[int], tmp_path: Path
) -> None:
    plain = to_gguf(embedded_model(), tmp_path / "plain.gguf", outtype)
    conversion = plan_conversion(embedded_model(), outtype=outtype, outfile=tmp_path / "tuned.gguf")
    tuning = plan_tuning([text], OPTIONS, output=conversion.outfile)
    (file,), tuned = write_tuned_output(conversion, conversion.outfile, tuning)
    assert tuned.record.better
    changed = {each.name: each.changed for each in compare_weights(plain, file).codes}
    assert sum(changed.values()) == tuned.record.codes_changed > 100
    # llama.cpp rounds what enters a matrix to 8 bits, of any file.
    rounding, found = (
        divergence(reference(each, tokens), llama.logits(each, tokens)) for each in (plain, file)
    )
    assert found < min(1.5 * rounding, 5e-3)


def test_llama_cpp_reads_whatever_codes_were_chosen(tokens: list[int], tmp_path: Path) -> None:
    plain = to_gguf(embedded_model(), tmp_path / "plain.gguf", "q4_k_m")
    conversion = plan_conversion(embedded_model(), outtype="q4_k_m", outfile=tmp_path / "rolled.gguf")
    (file,), _ = write_tuned_gguf(conversion, conversion.outfile, StandIn())
    found = llama.logits(file, tokens)
    assert divergence(reference(file, tokens), found) < 0.05
    assert divergence(reference(plain, tokens), found) > 1


@pytest.mark.parametrize("scheme", ["w4a16-g128", "fp8-dynamic"])
def test_transformers_loads_tuned_directories(scheme: str, text: Path, tmp_path: Path) -> None:
    plan, directory = plan_quantization(embedded_model(), scheme), tmp_path / "out"
    _, tuned = write_tuned_output(plan, directory, plan_tuning([text], OPTIONS, output=directory))
    assert tuned is not None
    assert tuned.record.better
    dequantized = (
        {} if scheme == "w4a16-g128" else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    )
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, **dequantized).eval()
    assert loaded.config.bamba_quant == tuned.record.plain()
    assert_right(directory, loaded)
