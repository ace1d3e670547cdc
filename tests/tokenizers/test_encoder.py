"""The vocabulary inside a GGUF, run here, makes the tokens that the original tokenizer makes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from bamba_quant.checkpoint import open_checkpoint
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import TokenizerError
from bamba_quant.tokenizers import read_vocabulary
from bamba_quant.tokenizers.encoder import read_encoder
from bamba_quant.tokenizers.pretokenizers import PreTokenizer
from tests.support.conversion import to_gguf
from tests.support.models import random_bamba, save_checkpoint
from tests.support.texts import BROAD, SPECIAL
from tests.tokenizers import test_pretokenizers, test_sentencepiece


@pytest.mark.parametrize("row", test_pretokenizers.ROWS)
def test_byte_level_bpe(row: PreTokenizer, tmp_path: Path) -> None:
    tokenizer = test_pretokenizers.train(row, tmp_path)
    file = test_pretokenizers.converted(tmp_path, 4100)
    for encoder in (read_encoder(open_checkpoint(file)), read_encoder(open_checkpoint(tmp_path))):
        assert encoder.bos == 0
        for text in BROAD + SPECIAL:
            ids = encoder.encode(text)
            assert ids == tokenizer.encode(text).ids, text
            decoded = tokenizer.decode(ids, skip_special_tokens=False)
            assert encoder.decode(ids) == decoded
            assert encoder.decode([*ids, 4099]) == decoded, "a row without a token"


@pytest.mark.parametrize(
    "options", [test_sentencepiece.LLAMA, test_sentencepiece.UNIGRAM], ids=["bpe", "unigram"]
)
def test_sentencepiece_models(options: dict[str, object], tmp_path: Path) -> None:
    oracle = test_sentencepiece.train(tmp_path, **options)
    file = test_sentencepiece.converted(tmp_path)
    for encoder in (read_encoder(open_checkpoint(file)), read_encoder(open_checkpoint(tmp_path))):
        for text in BROAD:
            if "<s>" in text:  # which the library never finds in a text, and transformers does
                continue
            ids = encoder.encode(text)
            assert ids == [oracle.bos_id(), *oracle.encode(text)], text
            decoded = oracle.decode(ids[1:]).replace(" \u2047 ", "<unk>")
            assert encoder.decode(ids[1:]) == decoded
            assert encoder.decode([*ids[1:], test_sentencepiece.ROWS - 1]) == decoded, "a row without a token"


@pytest.mark.parametrize(
    "saved",
    [
        {"truncation": {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}},
        {
            "padding": {
                "strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None,
                "pad_id": 2, "pad_type_id": 0, "pad_token": "<|pad|>",
            }
        },
    ],
    ids=["truncation", "padding"],
)  # fmt: skip
@pytest.mark.parametrize("gap", [False, True])
def test_a_text_is_never_cut_or_padded(saved: dict[str, Any], gap: bool, tmp_path: Path) -> None:
    """Both belong to a call of the library, and stay in a file that was saved while they were on."""
    directory = shutil.copytree(embedded_model(), tmp_path / "m")
    file = directory / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | saved))
    if gap:  # an id that the library does not give of itself, so that the tokenizer is built another way
        (directory / "added_tokens.json").write_text(json.dumps({"<x>": 2050}))
    oracle, encoder = AutoTokenizer.from_pretrained(directory), read_encoder(open_checkpoint(directory))
    for text in ("short", " ".join(BROAD)):
        ids = oracle.encode(text, truncation=False, padding=False)
        assert encoder.encode(text) == ids
        assert encoder.decode(ids) == oracle.decode(ids)
    file = to_gguf(embedded_model(), tmp_path / "m.gguf", vocab_only=True)
    assert read_encoder(open_checkpoint(file)).encode(text) == ids


def test_embedded_model() -> None:
    encoder = read_encoder(open_checkpoint(embedded_model()))
    tokenizer = Tokenizer.from_file(str(embedded_model() / "tokenizer.json"))
    assert [encoder.encode(text) for text in BROAD] == [tokenizer.encode(text).ids for text in BROAD]


def test_the_bos_that_the_settings_name(tmp_path: Path) -> None:
    """Goes before the model's own, in a directory and in its GGUF."""
    test_sentencepiece.train(tmp_path, **test_sentencepiece.LLAMA)
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<tool>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    file = test_sentencepiece.converted(tmp_path)
    expected = AutoTokenizer.from_pretrained(tmp_path).encode("a text")
    assert read_encoder(open_checkpoint(tmp_path)).encode("a text") == expected
    assert read_encoder(open_checkpoint(file)).encode("a text") == expected


def test_bos_without_a_token(tmp_path: Path) -> None:
    test_sentencepiece.train(tmp_path, **test_sentencepiece.LLAMA, bos_id=-1)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    with pytest.raises(TokenizerError, match="BOS"):
        read_encoder(open_checkpoint(tmp_path, weights=False))
    with pytest.raises(TokenizerError, match="BOS"):
        read_vocabulary(tmp_path, test_sentencepiece.ROWS)


@pytest.mark.parametrize(
    ("single", "expected"),
    [
        ("$A", None), ("$A <e>", None), ("<b> $A", 0), ("<b> $A <e>", 0),
        ("<b> <b> $A", "several"), ("<b> <e> $A", "several"), ("$A $A", "once"), ("<b>", "once"),
    ],
)  # fmt: skip
def test_tokens_around_a_text(single: str, expected: int | str | None, tmp_path: Path) -> None:
    directory = shutil.copytree(embedded_model(), tmp_path / "m")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    special = [("<b>", 0), ("<e>", 1)]
    tokenizer.post_processor = TemplateProcessing(single=single, pair="$A $B", special_tokens=special)
    tokenizer.save(str(directory / "tokenizer.json"))
    if isinstance(expected, str):
        with pytest.raises(TokenizerError, match=expected):
            read_encoder(open_checkpoint(directory))
    else:
        assert read_encoder(open_checkpoint(directory)).bos == expected


def test_what_cannot_be_run(tmp_path: Path) -> None:
    directory = save_checkpoint(random_bamba(), tmp_path / "m")
    with pytest.raises(TokenizerError, match="no tokenizer"):
        read_encoder(open_checkpoint(directory))
    with pytest.raises(TokenizerError, match="--tokenizer"):
        read_encoder(open_checkpoint(to_gguf(directory, tmp_path / "none.gguf", vocab=False)))
    file = to_gguf(embedded_model(), tmp_path / "viking.gguf", pre="viking")
    with pytest.raises(TokenizerError, match="viking"):
        read_encoder(open_checkpoint(file))


def _with_model_last(tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    parsed = change(json.loads((embedded_model() / "tokenizer.json").read_text()))
    (tmp_path / "config.json").write_text('{"model_type": "bamba"}')
    (tmp_path / "tokenizer.json").write_text(json.dumps(parsed))
    return tmp_path


def test_a_vocabulary_with_the_names_of_keys_is_not_parsed_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(parsed: dict[str, Any]) -> dict[str, Any]:
        vocab = parsed["model"]["vocab"]
        vocab |= {
            name: len(vocab) + i for i, name in enumerate(("model", "added_tokens", "padding", "decoder"))
        }
        return {key: value for key, value in parsed.items() if key != "model"} | {"model": parsed["model"]}

    directory = _with_model_last(tmp_path, change)
    monkeypatch.setattr("bamba_quant.tokenizers.encoder._parsed", None)
    encoder = read_encoder(open_checkpoint(directory, weights=False))
    assert encoder.encode("some text") == read_encoder(open_checkpoint(embedded_model())).encode("some text")


@pytest.mark.parametrize("key", ["added_tokens", "added_toke\\u006es"])
def test_tokens_that_follow_the_model_are_not_missed(key: str, tmp_path: Path) -> None:
    def change(parsed: dict[str, Any]) -> dict[str, Any]:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        mark = {"id": 2048, "content": "<mark>", "special": True, **flags}
        added = [*parsed.pop("added_tokens"), mark]
        return parsed | {"model": parsed.pop("model"), "HERE": added}

    directory = _with_model_last(tmp_path, change)
    file = directory / "tokenizer.json"
    file.write_text(file.read_text().replace("HERE", key))
    assert read_encoder(open_checkpoint(directory, weights=False)).plain("<mark>") == [2048]


def test_steps_that_follow_the_model_under_an_escaped_name_are_bounded(tmp_path: Path) -> None:
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 200}

    def change(parsed: dict[str, Any]) -> dict[str, Any]:
        return {**parsed, "normalizer": None, "model": parsed.pop("model"), "HERE": grow}

    directory = _with_model_last(tmp_path, change)
    file = directory / "tokenizer.json"
    file.write_text(file.read_text().replace("HERE", "normalize\\u0072"))
    with pytest.raises(TokenizerError, match="unbounded"):
        read_encoder(open_checkpoint(directory, weights=False))
