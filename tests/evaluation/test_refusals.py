"""What an evaluation has no answer for is an error that says why, before the long work where it can be."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bamba_quant.embedded import embedded_model
from bamba_quant.errors import BambaQuantError
from bamba_quant.evaluation import evaluate as module
from bamba_quant.evaluation.evaluate import evaluate
from bamba_quant.evaluation.models import ComparisonError
from bamba_quant.evaluation.run import EvaluationOptions
from bamba_reference.packing import InputError
from tests.evaluation.conftest import OPTIONS
from tests.support.models import random_bamba, save_checkpoint


def test_models_that_cannot_be_compared(files: dict[str, Path], text: Path, tmp_path: Path) -> None:
    def refused(match: str, *candidates: Path, base: Path = embedded_model()) -> str:
        with pytest.raises(ComparisonError, match=match) as error:
            evaluate(base, candidates, text, OPTIONS)
        return str(error.value)

    refused("given twice", files["q8_0"], files["q8_0"])
    refused("given twice", embedded_model())
    refused("no candidate")
    wide = save_checkpoint(random_bamba(vocab_size=2049), tmp_path / "vocabulary")
    assert "2049 tokens" in refused("another vocabulary", wide)
    small = save_checkpoint(random_bamba(vocab_size=2048, attn_layer_indices=[2]), tmp_path / "small")
    assert "model.embed_tokens.weight" in refused("another shape", small)
    longer = save_checkpoint(
        random_bamba(vocab_size=2048, attn_layer_indices=[2], num_hidden_layers=5), tmp_path / "longer"
    )
    assert "4 layers" in refused("other layers", longer, base=small)


def test_another_architecture(text: Path, tmp_path: Path) -> None:
    directory = save_checkpoint(random_bamba(), tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(BambaQuantError, match="architecture is not supported") as error:
        evaluate(embedded_model(), [directory], text, OPTIONS)
    assert "LlamaForCausalLM" in str(error.value)


def test_a_tokenizer_that_reads_otherwise(files: dict[str, Path], text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in embedded_model().iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:200]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ComparisonError, match="produces other tokens") as error:
        evaluate(embedded_model(), [other], text, OPTIONS)
    assert "--tokenizer" in str(error.value)
    vouched = evaluate(
        embedded_model(), [other], text, dataclasses.replace(OPTIONS, tokenizer=embedded_model())
    )
    assert abs(vouched.candidates[0].figures["kld_mean"].value) < 1e-14


def test_texts_that_cannot_be_scored(files: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "text.txt"

    def refused(kind: type[BambaQuantError], match: str, raw: bytes) -> None:
        file.write_bytes(raw)
        with pytest.raises(kind, match=match):
            evaluate(embedded_model(), [files["q8_0"]], file, OPTIONS)

    refused(BambaQuantError, "not UTF-8", "Grüße ".encode("latin-1") * 500)
    refused(BambaQuantError, "not UTF-8", "words ".encode("utf-16") * 500)
    refused(InputError, "too short", b"")
    refused(InputError, "too short", b"A few words.")
    with pytest.raises(BambaQuantError, match="no text"):
        evaluate(embedded_model(), [files["q8_0"]], None, OPTIONS)


def spoilt(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """The embedded model with changed weights, in float32."""
    from safetensors.torch import load_file, save_file

    directory.mkdir()
    for file in embedded_model().iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    state = {name: w.float() for name, w in load_file(directory / "model.safetensors").items()}
    change(state)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("drift_chunks", [0, 1])
def test_weights_that_are_not_numbers(drift_chunks: int, text: Path, tmp_path: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        state["model.layers.3.feed_forward.down_proj.weight"][0, 0] = math.nan

    model, saved = spoilt(tmp_path / "spoilt", change), tmp_path / "base.kld"
    options = dataclasses.replace(OPTIONS, drift_chunks=drift_chunks, save_base=saved)
    with pytest.raises(BambaQuantError, match="not finite numbers") as error:
        evaluate(embedded_model(), [model], text, options)
    assert ("down_proj" if drift_chunks else "spoilt, chunk 0") in str(error.value)
    assert not saved.exists()


def test_a_perplexity_beyond_all_numbers(text: Path, tmp_path: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            if name in state:
                state[name] *= 1e5

    with pytest.raises(BambaQuantError, match="larger than any number") as error:
        evaluate(embedded_model(), [spoilt(tmp_path / "spoilt", change)], text, OPTIONS)
    assert "nats a token" in str(error.value)


def test_a_base_that_cannot_be_saved_is_found_out_first(
    files: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "final_hidden", lambda *a, **k: pytest.fail("the models were run"))
    there = tmp_path / "there.kld"
    there.write_bytes(b"something")
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(files["q8_0"].read_bytes())
    for path, overwrite, match in (
        (there, False, "exists already"),
        (tmp_path / "nowhere" / "x.kld", False, "does not exist"),
        (copy, True, "replace the file it is made from"),
    ):
        options = dataclasses.replace(OPTIONS, save_base=path, overwrite=overwrite)
        with pytest.raises(BambaQuantError, match=match):
            evaluate(embedded_model(), [copy], text, options)
    assert copy.read_bytes() == files["q8_0"].read_bytes() and there.read_bytes() == b"something"


def test_a_file_of_logits_has_its_own_chunks(files: dict[str, Path], text: Path, tmp_path: Path) -> None:
    saved = tmp_path / "base.kld"
    plain = dataclasses.replace(OPTIONS, drift_chunks=0, noise_floor="none")
    evaluate(embedded_model(), [files["q8_0"]], text, dataclasses.replace(plain, save_base=saved, ctx=33))
    found = evaluate(saved, [files["q8_0"]], None, EvaluationOptions(resamples=1000, chunks=3))
    assert (found.text.ctx, found.text.chunks, found.text.scored) == (33, 3, 48)
    assert found.run.options["ctx"] == 33
    for chunks in (0, -1):
        with pytest.raises(InputError, match="number of chunks"):
            evaluate(saved, [files["q8_0"]], None, EvaluationOptions(chunks=chunks))
    with pytest.raises(ComparisonError, match="another length"):
        evaluate(saved, [files["q8_0"]], None, EvaluationOptions(ctx=64))
