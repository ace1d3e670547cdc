"""A SentencePiece model converts so that llama.cpp splits as the sentencepiece library does, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import sentencepiece
from gguf import TokenType
from sentencepiece import sentencepiece_model_pb2

from bamba_quant.checkpoint import open_checkpoint
from bamba_quant.errors import TokenizerError
from bamba_quant.tokenizers import read_vocabulary
from bamba_quant.tokenizers.encoder import read_encoder
from tests.support import llama
from tests.support.conversion import to_gguf
from tests.support.models import random_bamba, save_checkpoint
from tests.support.texts import BROAD

ROWS = 2100
Change = Callable[[Any], object]
# As the tokenizers of Llama 2 and Codestral-Mamba were trained.
LLAMA: dict[str, Any] = {
    "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False, "split_digits": True, "allow_whitespace_only_pieces": True,
}  # fmt: skip
UNIGRAM: dict[str, Any] = {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc"}


def train(directory: Path, **options: Any) -> sentencepiece.SentencePieceProcessor:
    directory.mkdir(parents=True, exist_ok=True)
    lines = [
        line
        for text in [*BROAD * 5, *(topics[name] for name in sorted(topics)[:25])]
        for line in text.splitlines()
        if line.strip()
    ]
    with (directory / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=file,
            vocab_size=2000,
            character_coverage=0.999,
            user_defined_symbols=["<tool>"],
            minloglevel=2,
            **options,
        )
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))


def converted(directory: Path) -> Path:
    save_checkpoint(random_bamba(vocab_size=ROWS, num_hidden_layers=2, attn_layer_indices=[1]), directory)
    return to_gguf(directory, directory / "vocab.gguf", vocab_only=True)


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_bpe_with_byte_fallback(dummy_prefix: bool, tmp_path: Path) -> None:
    oracle = train(tmp_path, **LLAMA, add_dummy_prefix=dummy_prefix)
    texts = [text for text in BROAD if text]
    if dummy_prefix:
        assert any("leading space" in note for note in read_vocabulary(tmp_path, ROWS).notes)
    else:
        texts.append("use <tool> twice <tool>.")
    found = llama.tokenize(converted(tmp_path), texts, special=False)
    for text, ids in zip(texts, found, strict=True):
        assert ids == [oracle.bos_id(), *oracle.encode(text)], text


def test_unigram(tmp_path: Path) -> None:
    oracle = train(tmp_path, **UNIGRAM)
    texts = [text for text in BROAD if text.strip()]
    found = llama.tokenize(converted(tmp_path), texts, special=False)
    for text, ids in zip(texts, found, strict=True):
        assert ids == [oracle.bos_id(), *oracle.encode(text)], text


def test_scores_types_and_added_tokens(tmp_path: Path) -> None:
    oracle = train(tmp_path, **LLAMA)
    settings = {
        "bos_token": "<s>",
        "eos_token": "<|end|>",
        "added_tokens_decoder": {
            "2000": {"content": "<|end|>", "special": True},
            "2001": {"content": "<call>", "special": False},
        },
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": 2002}))
    vocabulary = read_vocabulary(tmp_path, ROWS)
    assert vocabulary.model == "llama"
    assert vocabulary.scores is not None
    assert len(vocabulary.tokens) == len(vocabulary.types) == len(vocabulary.scores) == ROWS
    assert vocabulary.scores[500] == pytest.approx(oracle.get_score(500))
    assert vocabulary.tokens[500] == oracle.id_to_piece(500)
    kinds = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert kinds["<unk>"] == TokenType.UNKNOWN
    assert kinds["<s>"] == TokenType.CONTROL
    assert kinds["<0x41>"] == TokenType.BYTE
    assert kinds["<tool>"] == kinds["<call>"] == kinds["<x>"] == TokenType.USER_DEFINED
    assert kinds["<|end|>"] == TokenType.CONTROL
    assert kinds["[PAD2099]"] == TokenType.UNUSED
    assert dict(vocabulary.special_ids) == {"bos": 1, "eos": 2000, "unk": 0}
    assert (vocabulary.add_bos, vocabulary.add_eos) == (True, False)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (LLAMA | {"normalization_rule_name": "nmt_nfkc"}, "normalizes"),
        (LLAMA | {"remove_extra_whitespaces": True}, "normalizes"),
        (LLAMA | {"byte_fallback": False}, "byte pieces"),
        (UNIGRAM | {"byte_fallback": True}, "byte fallback"),
        (LLAMA | {"treat_whitespace_as_suffix": True}, "white space"),
        ({"model_type": "char"}, "this kind"),
    ],
)
def test_what_llama_cpp_lacks_is_refused(options: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    train(tmp_path, **options, **({"hard_vocab_limit": False} if options["model_type"] == "char" else {}))
    with pytest.raises(TokenizerError, match=complaint):
        read_vocabulary(tmp_path, ROWS)


def test_tokens_that_tokenizer_json_alone_adds(tmp_path: Path) -> None:
    train(tmp_path, **LLAMA)
    added = [
        {"id": 0, "content": "<unk>", "special": True},
        {"id": 1, "content": "<s>", "special": True},
        {"id": 2000, "content": "<|end|>", "special": True},
        {"id": 2001, "content": "<call>", "special": False},
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    vocabulary = read_vocabulary(tmp_path, ROWS)
    assert vocabulary.tokens[2000:2003] == ("<|end|>", "<call>", "[PAD2002]")
    assert vocabulary.types[0] == TokenType.UNKNOWN
    assert vocabulary.types[1] == vocabulary.types[2000] == TokenType.CONTROL
    assert vocabulary.types[2001] == TokenType.USER_DEFINED
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<other>": 2000}))
    with pytest.raises(TokenizerError, match=r"different tokens under one id[\s\S]*2000"):
        read_vocabulary(tmp_path, ROWS)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("added_tokens.json", {"<x>": "2002"}, "<x>"),
        ("added_tokens.json", {"<unk>": 2002}, "two ids"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "y"}}}, "not an id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": "y"}}, "5 is not an object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": {}}}, "content is missing"),
        ("tokenizer_config.json", {"add_bos_token": "yes"}, "add_bos_token"),
        ("tokenizer.json", {"added_tokens": [{"id": 2002}]}, "content is missing"),
    ],
)
def test_malformed_files_beside_a_model(name: str, content: Any, complaint: str, tmp_path: Path) -> None:
    train(tmp_path, **LLAMA)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=complaint):
        read_vocabulary(tmp_path, ROWS)


def test_user_tokens_with_spaces_are_noted(tmp_path: Path) -> None:
    train(tmp_path, **LLAMA, add_dummy_prefix=False)
    assert not any("hold a space" in note for note in read_vocabulary(tmp_path, ROWS).notes)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"a b": 2002}))
    assert any("'a b'" in note for note in read_vocabulary(tmp_path, ROWS).notes)


def score(value: float) -> Change:
    return lambda model: setattr(model.pieces[500], "score", value)


def field(part: str, name: str, value: Any) -> Change:
    return lambda model: setattr(getattr(model, part), name, value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (score(float("nan")), "not finite"),
        (score(float("inf")), "not finite"),
        (lambda model: setattr(model.pieces[500], "piece", ""), "without text"),
        (lambda model: setattr(model.pieces[500], "piece", "<s>"), "two ids"),
        (lambda model: model.ClearField("pieces"), "no pieces"),
        *((field("trainer_spec", f"{kind}_id", 2000), kind) for kind in ("bos", "eos", "unk", "pad")),
        (field("trainer_spec", "bos_id", 2**31 - 1), "bos"),
    ],
)
def test_a_model_with_wrong_values(change: Change, complaint: str, tmp_path: Path) -> None:
    train(tmp_path, **LLAMA)
    file = tmp_path / "tokenizer.model"
    model = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    change(model)
    file.write_bytes(model.SerializeToString())
    (tmp_path / "config.json").write_text("{}")
    for read in (
        lambda: read_vocabulary(tmp_path, ROWS),
        lambda: read_encoder(open_checkpoint(tmp_path, weights=False)),
    ):
        with pytest.raises(TokenizerError, match=complaint):
            read()


def test_a_piece_that_is_not_utf8(tmp_path: Path) -> None:
    train(tmp_path, **LLAMA)
    file = tmp_path / "tokenizer.model"
    file.write_bytes(file.read_bytes().replace(b"<tool>", b"<t\xffol>"))
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        read_vocabulary(tmp_path, ROWS)


def test_a_piece_of_an_unknown_type(tmp_path: Path) -> None:
    """The library takes it as a normal one."""
    train(tmp_path, **LLAMA)
    file = tmp_path / "tokenizer.model"
    raw = file.read_bytes()
    place = raw.index(b"<tool>") + len(b"<tool>") + 5  # behind the piece stand its score and its type
    assert raw[place : place + 2] == b"\x18\x04"
    file.write_bytes(raw[: place + 1] + b"\x63" + raw[place + 2 :])
    vocabulary = read_vocabulary(tmp_path, ROWS)
    assert vocabulary.types[vocabulary.tokens.index("<tool>")] == TokenType.NORMAL
    assert read_encoder(open_checkpoint(converted(tmp_path))).plain("a text") == read_encoder(
        open_checkpoint(tmp_path)
    ).plain("a text")


def test_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        read_vocabulary(tmp_path, ROWS)
