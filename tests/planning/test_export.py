"""A GGUF file goes back to the directory it came from: bit for bit where it was not quantized, and runs alike."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from bamba_quant.checkpoint import open_checkpoint
from bamba_quant.embedded import embedded_model
from bamba_quant.families import read_config
from bamba_quant.families.transforms import NEGATIVE_EXP, log_of_negative
from bamba_quant.inference.loading import load_model
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.export import plan_export
from bamba_quant.writers import write_plan
from tests.support.conversion import assert_same_tensors, random_tokens, to_gguf, transformers_logits
from tests.support.directories import tensors
from tests.support.exports import assert_same_checkpoint, exported
from tests.support.models import random_bamba, save_checkpoint
from tests.support.texts import BROAD, SPECIAL
from tests.test_logits import RANDOM

TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def logits(directory: Path, tokens: list[int]) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return transformers_logits(model, tokens)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", RANDOM)
def test_checkpoints_come_back(case: str, dtype: Any, tmp_path: Path) -> None:
    overrides, saving = RANDOM[case]
    model = random_bamba(seed=len(case), **overrides)
    original = save_checkpoint(model, tmp_path / "model", dtype=dtype, **saving)
    file = to_gguf(original, tmp_path / "model.gguf", TYPES[dtype], vocab=False)
    back = exported(file, tmp_path / "back")
    # float32 has finer steps than what is left of A_log in A = -exp(A_log).
    assert_same_checkpoint(back, original, but="A_log" if dtype == "float32" else "\0")
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == dtype
    read, written = (read_config(open_checkpoint(place).metadata) for place in (original, back))
    ids = {"bos_token_id": None, "eos_token_ids": (), "pad_token_id": None}
    assert written == replace(read, **ids)
    assert_same_tensors(to_gguf(back, tmp_path / "again.gguf", TYPES[dtype], vocab=False), file)
    if dtype == "float32":
        tokens = random_tokens(model.config.vocab_size, 60)
        expected = transformers_logits(model, tokens)
        np.testing.assert_allclose(logits(back, tokens), expected, rtol=0, atol=1e-5 * expected.std())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16"])
def test_dtypes_by_wish(dtype: Any, outtype: str, tmp_path: Path) -> None:
    original = save_checkpoint(random_bamba(), tmp_path / "model", dtype=dtype)
    file = to_gguf(original, tmp_path / "model.gguf", outtype, vocab=False)
    if outtype in ("f32", TYPES[dtype]):
        assert_same_checkpoint(exported(file, tmp_path / "back", dtype=TYPES[dtype]), original)
    wide = tensors(exported(file, tmp_path / "wide", dtype="f32"))
    for name, tensor in tensors(original).items():
        assert wide[name].dtype == torch.float32
        if outtype in ("f32", TYPES[dtype]) or tensor.dim() == 1:
            assert torch.equal(wide[name], tensor.float()), name


def test_equal_logits_of_16_bit_checkpoints(tmp_path: Path) -> None:
    original = save_checkpoint(random_bamba(), tmp_path / "model", dtype="bfloat16")
    back = exported(to_gguf(original, tmp_path / "m.gguf", "bf16", vocab=False), tmp_path / "back")
    tokens = random_tokens(160, 60)
    np.testing.assert_array_equal(logits(back, tokens), logits(original, tokens))


def test_vectors_of_a_wider_checkpoint_stay_wide(tmp_path: Path) -> None:
    original = save_checkpoint(random_bamba(), tmp_path / "model")
    plan = plan_export(to_gguf(original, tmp_path / "m.gguf", "bf16", vocab=False))
    types = {row.name: row.format.name for row in plan.rows}
    assert types["model.layers.0.mamba.in_proj.weight"] == "bf16"
    assert types["model.layers.0.mamba.A_log"] == types["model.layers.0.input_layernorm.weight"] == "f32"
    assert any("stay f32" in note for note in plan.notes)
    write_plan(plan, tmp_path / "back")
    found, stored = tensors(tmp_path / "back"), tensors(original)
    assert torch.equal(found["model.layers.0.mamba.D"], stored["model.layers.0.mamba.D"])


@pytest.mark.parametrize(("dtype", "least"), [(ml_dtypes.bfloat16, 2.0**-15), (np.float16, 2.0**-12)])
def test_every_16_bit_a_log_is_found(dtype: Any, least: float) -> None:
    everything = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float32)
    # Under the least, neighbours share their A; above 8 a state is forgotten within a step.
    values = everything[(np.abs(everything) >= least) & (np.abs(everything) <= 8)]
    for shape in ((1, -1), (-1, 1)):
        found = log_of_negative(NEGATIVE_EXP.apply(values.reshape(shape), 0))
        np.testing.assert_array_equal(found.reshape(-1), values)
    # As PyTorch computes it for llama.cpp's converter.
    theirs = (-torch.exp(torch.from_numpy(values))).numpy().reshape(1, -1)
    np.testing.assert_array_equal(log_of_negative(theirs)[0], values)
    tiny = everything[np.abs(everything) < least].reshape(1, -1)
    again = NEGATIVE_EXP.apply(log_of_negative(NEGATIVE_EXP.apply(tiny, 0)), 0)
    np.testing.assert_allclose(again, NEGATIVE_EXP.apply(tiny, 0), rtol=2.0**-23, atol=0)


def test_f32_a_log_makes_the_same_decay() -> None:
    a_log = np.random.default_rng(0).uniform(-3, 3, (1, 20_000)).astype(np.float32)
    decay = NEGATIVE_EXP.apply(a_log, 0)
    found = log_of_negative(decay)
    np.testing.assert_array_equal(NEGATIVE_EXP.apply(found, 0), decay)
    assert np.abs(found - a_log).max() <= 2.0**-22


def test_embedded_model(tmp_path: Path) -> None:
    file = to_gguf(embedded_model(), tmp_path / "mini.gguf", "bf16")
    back = exported(file, tmp_path / "back", max_shard_bytes=2_000_000)
    assert (back / "model.safetensors.index.json").is_file()
    assert len(list(back.glob("model-*-of-*.safetensors"))) > 3
    assert_same_checkpoint(back, embedded_model())
    assert_same_tensors(to_gguf(back, tmp_path / "again.gguf", "bf16"), file)
    before, after = (open_checkpoint(path).metadata for path in (file, tmp_path / "again.gguf"))
    assert after == before
    encoded = [text for text in BROAD + SPECIAL if text]
    ours, theirs = (Tokenizer.from_file(str(path / "tokenizer.json")) for path in (back, embedded_model()))
    assert [ours.encode(text).ids for text in encoded] == [theirs.encode(text).ids for text in encoded]
    assert [ours.encode(text, "b").ids for text in BROAD] == [theirs.encode(text, "b").ids for text in BROAD]
    assert ours.get_vocab() == theirs.get_vocab()
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (back, embedded_model()))
    assert [ours(text).input_ids for text in encoded] == [theirs(text).input_ids for text in encoded]
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == (
        theirs.bos_token,
        theirs.eos_token,
        theirs.pad_token,
    )


@pytest.mark.parametrize("outtype", ["q4_k_m", "q8_0"])
def test_quantized_weights_are_dequantized(outtype: str, tmp_path: Path) -> None:
    file = to_gguf(embedded_model(), tmp_path / "q.gguf", outtype)
    back = exported(file, tmp_path / "back")
    found, weights = tensors(back), load_model(file).weights
    original = tensors(embedded_model())
    assert found.keys() == set(weights) == original.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16, name
        if name.endswith("A_log") or tensor.dim() != 2:
            assert torch.equal(tensor, original[name]), name
        else:
            expected = torch.from_numpy(np.array(weights[name])).bfloat16()
            assert torch.equal(tensor, expected), name
    card = (back / "README.md").read_text()
    assert "dequantized" in card
    assert card.startswith("---\nlicense:")
    assert logits(back, [0, 5, 6]).shape == (3, 2048)


def test_quantized_from_f16_becomes_f16(tmp_path: Path) -> None:
    original = save_checkpoint(random_bamba(), tmp_path / "model", dtype="float16")
    plan = plan_export(to_gguf(original, tmp_path / "q.gguf", "q8_0", vocab=False))
    assert {row.format.name for row in plan.rows} == {"f16"}


def test_threads_and_shards_change_no_byte(tmp_path: Path) -> None:
    file = to_gguf(embedded_model(), tmp_path / "q.gguf", "q4_k_m")
    one = exported(file, tmp_path / "one", threads=1)
    many = exported(file, tmp_path / "many", threads=5, max_shard_bytes=700_000)
    assert_same_checkpoint(many, one)


def test_split_input(tmp_path: Path) -> None:
    planned = plan_conversion(
        embedded_model(), outtype="bf16", outfile=tmp_path / "s.gguf", split_max_bytes=3_000_000
    )
    files = write_plan(planned, planned.outfile)
    assert len(files) > 2
    assert_same_checkpoint(exported(files[1], tmp_path / "back"), embedded_model())


def test_layout_is_aligned_and_without_gaps(tmp_path: Path) -> None:
    original = save_checkpoint(random_bamba(vocab_size=161), tmp_path / "model")
    plan = plan_export(to_gguf(original, tmp_path / "m.gguf", "bf16", vocab=False), max_shard_bytes=50_000)
    for shard in plan.shards:
        assert len(shard.header) % 8 == 0
        ends = 0
        for part in sorted(shard.parts, key=lambda part: part.offset):
            assert part.offset == ends
            assert part.offset % (part.n_bytes // math.prod(part.shape)) == 0
            ends += part.n_bytes
        assert len(shard.header) + ends == shard.n_bytes
        assert ends <= 50_000 or len(shard.parts) == 1
    assert sum(plan.sizes.values()) > 0
