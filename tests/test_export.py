"""A GGUF file goes back to the directory it came from: bit for bit where it was not quantized, and runs alike."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from bamba_quant.architectures.transforms import NEGATIVE_EXP, log_of_negative
from bamba_quant.checkpoint import open_checkpoint
from bamba_quant.convert import plan_conversion
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import BambaQuantError, CheckpointError, OutputError, PlanError, TokenizerError
from bamba_quant.export import plan_export, write_export
from bamba_quant.plan import PlanRow
from bamba_quant.tokenizers.encoder import read_encoder
from bamba_quant.weights import load_model
from bamba_quant.writers import write_gguf
from bamba_quant.writers.safetensors import layout
from bamba_reference.config import Config
from tests.support.conversion import assert_same_tensors, random_tokens, to_gguf, transformers_logits
from tests.support.models import random_bamba, save_checkpoint
from tests.support.texts import BROAD, SPECIAL
from tests.test_logits import RANDOM
from tests.test_repair import faulty
from tests.tokenizers import test_pretokenizers, test_sentencepiece

TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def exported(file: Path, target: Path, **options: Any) -> Path:
    writing = {key: options.pop(key) for key in ("threads", "overwrite", "progress") if key in options}
    write_export(plan_export(file, **options), target, **writing)
    return target


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same_checkpoint(found: Path, expected: Path, but: str = "\0") -> None:
    """Names, dtypes, shapes and bits are the same, except of names that end in ``but``."""
    ours, theirs = tensors(found), tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].shape == tensor.shape, name
        if not name.endswith(but):
            assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


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
    read, written = (Config.from_hf(open_checkpoint(place).metadata) for place in (original, back))
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
    write_export(plan, tmp_path / "back")
    found, stored = tensors(tmp_path / "back"), tensors(original)
    assert torch.equal(found["model.layers.0.mamba.D"], stored["model.layers.0.mamba.D"])


@pytest.mark.parametrize(("dtype", "least"), [(ml_dtypes.bfloat16, 2.0**-15), (np.float16, 2.0**-12)])
def test_every_16_bit_a_log_is_found(dtype: Any, least: float) -> None:
    everything = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float32)
    # Under the least, neighbours share their A; above 8 a state is forgotten within a step.
    values = everything[(np.abs(everything) >= least) & (np.abs(everything) <= 8)]
    for shape in ((1, -1), (-1, 1)):
        found = log_of_negative(NEGATIVE_EXP.apply(values.reshape(shape)))
        np.testing.assert_array_equal(found.reshape(-1), values)
    # As PyTorch computes it for llama.cpp's converter.
    theirs = (-torch.exp(torch.from_numpy(values))).numpy().reshape(1, -1)
    np.testing.assert_array_equal(log_of_negative(theirs)[0], values)
    tiny = everything[np.abs(everything) < least].reshape(1, -1)
    again = NEGATIVE_EXP.apply(log_of_negative(NEGATIVE_EXP.apply(tiny)))
    np.testing.assert_allclose(again, NEGATIVE_EXP.apply(tiny), rtol=2.0**-23, atol=0)


def test_f32_a_log_makes_the_same_decay() -> None:
    a_log = np.random.default_rng(0).uniform(-3, 3, (1, 20_000)).astype(np.float32)
    decay = NEGATIVE_EXP.apply(a_log)
    found = log_of_negative(decay)
    np.testing.assert_array_equal(NEGATIVE_EXP.apply(found), decay)
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
    files = write_gguf(planned.plan, planned.outfile)
    assert len(files) > 2
    assert_same_checkpoint(exported(files[1], tmp_path / "back"), embedded_model())


def test_layout_is_aligned_and_without_gaps(tmp_path: Path) -> None:
    original = save_checkpoint(random_bamba(vocab_size=161), tmp_path / "model")
    plan = plan_export(to_gguf(original, tmp_path / "m.gguf", "bf16", vocab=False), max_shard_bytes=50_000)
    for shard in layout(plan.rows):
        assert len(shard.header) % 8 == 0
        ends = 0
        for entry in sorted(shard.entries, key=lambda entry: entry.offset):
            assert entry.offset == ends
            assert entry.offset % (entry.n_bytes // math.prod(entry.shape)) == 0
            ends += entry.n_bytes
        assert len(shard.header) + ends == shard.n_bytes
        assert ends <= 50_000 or len(shard.entries) == 1
    assert sum(plan.sizes.values()) > 0


@pytest.mark.parametrize("row", test_pretokenizers.ROWS)
def test_byte_level_tokenizers(row: Any, tmp_path: Path) -> None:
    oracle = test_pretokenizers.train(row, tmp_path / "m")
    settings = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "chat_template": [
            {"name": "default", "template": "{{ 'ü' }}"},
            {"name": "tool_use", "template": "{{ 2 }}"},
        ],
    }
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(settings))
    back = tmp_path / "back"
    file = whole_file(tmp_path, 4100)
    exported(file, back)
    tokenizer = Tokenizer.from_file(str(back / "tokenizer.json"))
    for text in BROAD + SPECIAL:
        ids = oracle.encode(text).ids
        assert tokenizer.encode(text).ids == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == oracle.decode(
            ids, skip_special_tokens=False
        )
    assert tokenizer.get_vocab() == oracle.get_vocab()
    written = json.loads((back / "tokenizer_config.json").read_text())
    assert {key: written[key] for key in settings} == settings
    assert open_checkpoint(to_gguf(back, tmp_path / "again.gguf")).metadata == open_checkpoint(file).metadata


def whole_file(tmp_path: Path, vocab_size: int) -> Path:
    model = random_bamba(vocab_size=vocab_size, num_hidden_layers=2, attn_layer_indices=[1])
    return to_gguf(save_checkpoint(model, tmp_path / "m"), tmp_path / "m.gguf")


def test_bos_and_eos_around_a_text(tmp_path: Path) -> None:
    test_pretokenizers.train(test_pretokenizers.TABLE[0], tmp_path / "m")
    file = tmp_path / "m" / "tokenizer.json"
    changed = json.loads(file.read_text())
    changed["post_processor"]["single"].append({"SpecialToken": {"id": "<|end_of_text|>", "type_id": 0}})
    changed["post_processor"]["special_tokens"]["<|end_of_text|>"] = {
        "id": "<|end_of_text|>",
        "ids": [1],
        "tokens": ["<|end_of_text|>"],
    }
    file.write_text(json.dumps(changed))
    back = exported(whole_file(tmp_path, 4010), tmp_path / "back")
    found = Tokenizer.from_file(str(back / "tokenizer.json"))
    assert found.encode("some text").ids == Tokenizer.from_file(str(file)).encode("some text").ids
    assert found.encode("x").ids[-1] == 1


@pytest.mark.parametrize(
    "options", [test_sentencepiece.LLAMA, test_sentencepiece.UNIGRAM], ids=["bpe", "unigram"]
)
def test_sentencepiece_models(options: dict[str, Any], tmp_path: Path) -> None:
    import sentencepiece

    oracle = test_sentencepiece.train(tmp_path / "m", **options)
    file = whole_file(tmp_path, test_sentencepiece.ROWS)
    back = exported(file, tmp_path / "back")
    found = sentencepiece.SentencePieceProcessor(model_file=str(back / "tokenizer.model"))
    assert found.get_piece_size() == oracle.get_piece_size() == 2000
    for token in range(2000):
        assert found.id_to_piece(token) == oracle.id_to_piece(token)
        assert found.get_score(token) == oracle.get_score(token)
    assert (found.bos_id(), found.eos_id(), found.unk_id()) == (
        oracle.bos_id(),
        oracle.eos_id(),
        oracle.unk_id(),
    )
    encoder = read_encoder(open_checkpoint(back))
    for text in BROAD:
        assert found.encode(text) == oracle.encode(text), text
        assert encoder.encode(text) == [oracle.bos_id(), *oracle.encode(text)]
    assert open_checkpoint(to_gguf(back, tmp_path / "again.gguf")).metadata == open_checkpoint(file).metadata
    ours = AutoTokenizer.from_pretrained(back)
    plain = "Hello world! It's the 1st test, isn't it?"
    assert ours(plain, add_special_tokens=False).input_ids == oracle.encode(plain)
    if options is test_sentencepiece.LLAMA:
        assert ours(plain).input_ids == [oracle.bos_id(), *oracle.encode(plain)]
    assert any("T5Tokenizer" in note for note in plan_export(file).notes) == (
        options is test_sentencepiece.UNIGRAM
    )


def test_added_tokens(tmp_path: Path) -> None:
    test_sentencepiece.train(tmp_path / "m", **test_sentencepiece.LLAMA)
    settings = {
        "bos_token": "<s>",
        "eos_token": "<|end|>",
        "added_tokens_decoder": {"2003": {"content": "<|end|>", "special": True}},
    }
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(settings))
    file = whole_file(tmp_path, test_sentencepiece.ROWS)
    back = exported(file, tmp_path / "back")
    assert json.loads((back / "tokenizer_config.json").read_text())["eos_token"] == "<|end|>"
    assert open_checkpoint(to_gguf(back, tmp_path / "again.gguf")).metadata == open_checkpoint(file).metadata


def test_several_tokens_to_stop_at(tmp_path: Path) -> None:
    test_pretokenizers.train(test_pretokenizers.TABLE[0], tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5, 6]}))
    back = exported(whole_file(tmp_path, 4010), tmp_path / "back")
    assert json.loads((back / "generation_config.json").read_text()) == {
        "bos_token_id": 0,
        "eos_token_id": [1, 5, 6],
        "pad_token_id": 2,
    }


def test_vocabularies_that_cannot_be_written(tmp_path: Path) -> None:
    file = to_gguf(embedded_model(), tmp_path / "viking.gguf", pre="viking")
    with pytest.raises(TokenizerError, match="--no-vocab"):
        plan_export(file)
    assert "tokenizer.json" not in plan_export(file, vocab=False).files
    none = plan_export(to_gguf(embedded_model(), tmp_path / "none.gguf", vocab=False))
    assert set(none.files) == {"config.json", "README.md"}
    assert any("no vocabulary" in note for note in none.notes)


@pytest.mark.parametrize("key", ["tokens", "token_type", "merges"])
def test_half_a_vocabulary(key: str, tmp_path: Path) -> None:
    planned = plan_conversion(embedded_model(), outtype="bf16", outfile=tmp_path / "m.gguf")
    metadata = dict(planned.plan.metadata)
    del metadata[f"tokenizer.ggml.{key}"]
    write_gguf(replace(planned.plan, metadata=metadata), planned.outfile)
    with pytest.raises(TokenizerError, match=key):
        plan_export(planned.outfile)


def test_a_decay_that_grows(tmp_path: Path) -> None:
    file = to_gguf(embedded_model(), tmp_path / "m.gguf", "bf16")
    row = next(row for row in plan_export(file).rows if row.role == "ssm_a")
    with file.open("r+b") as stream:
        stream.seek(row.source.offset)
        stream.write(np.float32(0.5).tobytes())
    with pytest.raises(CheckpointError, match="ssm_a"):
        exported(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_misplaced_rows_and_other_inputs_are_refused(tmp_path: Path) -> None:
    original = save_checkpoint(random_bamba(), tmp_path / "m")
    with pytest.raises(PlanError, match="bamba-quant repair"):
        plan_export(faulty(original, tmp_path / "wrong.gguf"))
    with pytest.raises(PlanError, match="wants a GGUF"):
        plan_export(original)
    with pytest.raises(PlanError, match="float8"):
        plan_export(to_gguf(original, tmp_path / "m.gguf", vocab=False), dtype="float8")
    with pytest.raises(BambaQuantError, match="tensors are not"):
        plan_export(to_gguf(embedded_model(), tmp_path / "v.gguf", vocab_only=True))


def test_output_directories(tmp_path: Path) -> None:
    plan = plan_export(to_gguf(embedded_model(), tmp_path / "m.gguf", "bf16"))
    (tmp_path / "empty").mkdir()
    write_export(plan, tmp_path / "empty")
    before = sorted(path.name for path in (tmp_path / "empty").iterdir())
    with pytest.raises(OutputError, match="--overwrite"):
        write_export(plan, tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    write_export(plan, tmp_path / "empty", overwrite=True)
    assert len((tmp_path / "empty" / "config.json").read_text()) > 2
    (tmp_path / "empty" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"thesis\.txt"):
        write_export(plan, tmp_path / "empty", overwrite=True)
    assert (tmp_path / "empty" / "thesis.txt").read_text() == "mine"
    with pytest.raises(OutputError, match="create it first"):
        write_export(plan, tmp_path / "no" / "where")
    with pytest.raises(OutputError, match="no directory"):
        write_export(plan, tmp_path / "m.gguf", overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "linked")
    (tmp_path / "linked").mkdir()
    write_export(plan, tmp_path / "link")
    assert sorted(path.name for path in (tmp_path / "linked").iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link", "linked", "m.gguf"]


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    plan = plan_export(to_gguf(embedded_model(), tmp_path / "m.gguf", "bf16"))
    threads = threading.active_count()

    def interrupt(n_bytes: int) -> None:
        assert list(tmp_path.glob("out.*.partial/model.safetensors"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_export(plan, tmp_path / "out", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    write_export(plan, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        write_export(plan, tmp_path / "out", overwrite=True, progress=interrupt)
    assert_same_checkpoint(tmp_path / "out", embedded_model())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "out"]
    assert threading.active_count() == threads


@pytest.mark.filterwarnings("ignore:invalid value")
def test_damaged_blocks_are_named(tmp_path: Path) -> None:
    file = to_gguf(embedded_model(), tmp_path / "q.gguf", "q8_0")
    plan = plan_export(file)
    row: PlanRow = next(row for row in plan.rows if row.source.format.name == "q8_0")
    with file.open("r+b") as stream:
        stream.seek(row.source.offset)
        stream.write(b"\x00\x7c")  # a scale of infinity
    with pytest.raises(CheckpointError, match=row.source.name):
        write_export(plan, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["q.gguf"]


def test_values_too_large_for_f16(tmp_path: Path) -> None:
    model = random_bamba()
    with torch.no_grad():
        model.lm_head.weight[3, 4] = 1e6
    file = to_gguf(save_checkpoint(model, tmp_path / "m"), tmp_path / "m.gguf", vocab=False)
    with pytest.raises(BambaQuantError, match=r"output\.weight"):
        exported(file, tmp_path / "out", dtype="f16")
    assert not (tmp_path / "out").exists()
