"""The vocabulary of a GGUF file becomes a tokenizer that makes the original's tokens, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from bamba_quant.checkpoint import open_checkpoint
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import TokenizerError
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.export import plan_export
from bamba_quant.planning.gguf_layout import with_key_values
from bamba_quant.tokenizers.encoder import read_encoder
from bamba_quant.writers import write_plan
from tests.support.conversion import to_gguf
from tests.support.exports import exported
from tests.support.models import random_bamba, save_checkpoint
from tests.support.texts import BROAD, SPECIAL
from tests.tokenizers import test_pretokenizers, test_sentencepiece


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
    test_pretokenizers.train(test_pretokenizers.PRETOKENIZERS[0], tmp_path / "m")
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
        if "<s>" not in text:  # the encoder finds it in a text, as transformers does
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
    test_pretokenizers.train(test_pretokenizers.PRETOKENIZERS[0], tmp_path / "m")
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


@pytest.mark.parametrize("key", ["tokens", "merges"])
def test_half_a_vocabulary(key: str, tmp_path: Path) -> None:
    planned = plan_conversion(embedded_model(), outtype="bf16", outfile=tmp_path / "m.gguf")
    metadata = dict(planned.metadata)
    del metadata[f"tokenizer.ggml.{key}"]
    write_plan(with_key_values(planned, metadata), planned.outfile)
    with pytest.raises(TokenizerError, match=key):
        plan_export(planned.outfile)
