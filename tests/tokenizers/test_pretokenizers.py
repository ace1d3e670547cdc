"""Every row of the table is a claim about llama.cpp: a vocabulary trained with the left side must split alike there."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from bamba_quant.embedded import embedded_model
from bamba_quant.errors import TokenizerError
from bamba_quant.tokenizers import read_vocabulary
from bamba_quant.tokenizers.pretokenizers import (
    CL100K,
    GPT4O,
    KNOWN_NAMES,
    LLAMA3,
    PRETOKENIZERS,
    QWEN2,
    TEKKEN,
    PreTokenizer,
)
from tests.support import llama
from tests.support.conversion import to_gguf
from tests.support.models import random_bamba, save_checkpoint
from tests.support.shared import shared
from tests.support.texts import BROAD, SPECIAL

CORPUS = [*BROAD * 9, *(topics[name] for name in sorted(topics)[:25])]
ROWS = [pytest.param(row, id=f"{row.name}-{number}") for number, row in enumerate(PRETOKENIZERS)]


def step(described: tuple[Any, ...]) -> Any:
    kind, *arguments = described
    if kind == "Split":
        return pre_tokenizers.Split(Regex(arguments[0]), arguments[1].lower())
    if kind == "Punctuation":
        return pre_tokenizers.Punctuation(arguments[0].lower())
    if kind == "Digits":
        return pre_tokenizers.Digits(individual_digits=arguments[0])
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=arguments[0])


def train(row: PreTokenizer, directory: Path, vocab_size: int = 4000, **changes: Any) -> Tokenizer:
    """A tokenizer.json in ``directory`` with BOS, EOS, user tokens and the splitting of ``row``."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=row.ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([step(described) for described in row.steps])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("</tool>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "tokenizer.json"
    tokenizer.save(str(file))
    settings = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|end_of_text|>"}}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    if changes:
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return tokenizer


def converted(directory: Path, vocab_size: int, **options: Any) -> Path:
    """The vocabulary in ``directory`` as a vocabulary-only GGUF of a model with that many embedding rows."""
    model = random_bamba(vocab_size=vocab_size, num_hidden_layers=2, attn_layer_indices=[1])
    save_checkpoint(model, directory)
    return to_gguf(directory, directory / "vocab.gguf", vocab_only=True, **options)


def has_marks_or_foreign_case(text: str) -> bool:
    kinds = {unicodedata.category(letter) for letter in text if not letter.isascii()}
    return bool(kinds & {"Mn", "Mc", "Me", "Lu", "Ll", "Lt"})


@pytest.mark.parametrize("row", ROWS)
def test_llama_cpp_splits_alike(row: PreTokenizer, tmp_path: Path) -> None:
    tokenizer = train(row, tmp_path)
    vocabulary = read_vocabulary(tmp_path, 4100)
    assert vocabulary.pre == row.name
    assert vocabulary.add_bos is True
    assert vocabulary.add_eos is False
    split_notes = [note for note in vocabulary.notes if "stops at" not in note]
    assert split_notes == ([row.differs] if row.differs else [])
    texts = [text for text in BROAD + SPECIAL if not (row.differs and has_marks_or_foreign_case(text))]
    expected = [tokenizer.encode(text).ids for text in texts]
    found = llama.tokenize(converted(tmp_path, 4100), texts)
    for text, ours, theirs in zip(texts, found, expected, strict=True):
        assert ours == theirs, text


@pytest.mark.parametrize("name", ["bamba-mini", "bamba-43m"])
def test_trained_vocabularies(name: str, tmp_path: Path) -> None:
    directory = embedded_model() if name == "bamba-mini" else shared("models/bamba-43m")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    texts = BROAD + SPECIAL + [topics[topic] for topic in sorted(topics)]
    file = to_gguf(directory, tmp_path / "vocab.gguf", vocab_only=True)
    assert llama.tokenize(file, texts) == [tokenizer.encode(text).ids for text in texts]


def test_special_user_and_unused_tokens(tmp_path: Path) -> None:
    train(PRETOKENIZERS[1], tmp_path)
    vocabulary = read_vocabulary(tmp_path, 4010)
    assert len(vocabulary.tokens) == len(vocabulary.types) == 4010
    kinds = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert kinds["<|begin_of_text|>"] == kinds["<|end_of_text|>"] == TokenType.CONTROL
    assert kinds["<tool>"] == TokenType.USER_DEFINED
    assert kinds["[PAD4009]"] == TokenType.UNUSED
    assert vocabulary.special_ids == {"bos": 0, "eos": 1}


def test_unknown_pattern_is_shown_with_the_names(tmp_path: Path) -> None:
    unknown = PreTokenizer(
        "", (("Split", r"\p{L}+|\d", "Isolated"), ("ByteLevel", False)), ignore_merges=False
    )
    train(unknown, tmp_path)
    with pytest.raises(TokenizerError) as error:
        read_vocabulary(tmp_path, 4100)
    assert r"\p{L}+|\d" in str(error.value)
    assert "--pre NAME" in str(error.value)
    assert "smaug-bpe" in str(error.value)
    assert read_vocabulary(tmp_path, 4100, pre="gpt-2").pre == "gpt-2"
    with pytest.raises(TokenizerError, match="nonsense"):
        read_vocabulary(tmp_path, 4100, pre="nonsense")


def test_names_of_pre_load_in_llama_cpp(tmp_path: Path) -> None:
    train(PRETOKENIZERS[1], tmp_path)
    model = random_bamba(vocab_size=4100, num_hidden_layers=2, attn_layer_indices=[1])
    save_checkpoint(model, tmp_path)
    for name in KNOWN_NAMES:
        file = to_gguf(tmp_path, tmp_path / f"{name}.gguf", vocab_only=True, pre=name)
        assert llama.tokenize(file, ["a b"])


@pytest.mark.parametrize("pattern", [LLAMA3, QWEN2, GPT4O, TEKKEN, CL100K])
def test_removing_what_a_pattern_leaves_out(pattern: str, tmp_path: Path) -> None:
    """As conversions of tiktoken write it: kept are the matches alone, which these patterns leave nothing between."""
    row = next(row for row in PRETOKENIZERS if row.steps[0][1] == pattern)
    isolated, removed, inverted = (
        pre_tokenizers.Split(Regex(pattern), behavior, invert=invert)
        for behavior, invert in (("isolated", False), ("removed", True), ("isolated", True))
    )
    for text in [*BROAD, *SPECIAL, *(topics[name] for name in sorted(topics)[:25])]:
        assert removed.pre_tokenize_str(text) == isolated.pre_tokenize_str(text)
        assert inverted.pre_tokenize_str(text) == isolated.pre_tokenize_str(text)
    train(row, tmp_path)
    file = tmp_path / "tokenizer.json"
    written = json.loads(file.read_text())
    for behavior, invert in (("Removed", True), ("Isolated", True)):
        written["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": behavior, "invert": invert}
        file.write_text(json.dumps(written))
        assert read_vocabulary(tmp_path, 4100).pre == row.name
    for behavior, invert in (("Removed", False), ("MergedWithNext", True)):
        written["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": behavior, "invert": invert}
        file.write_text(json.dumps(written))
        with pytest.raises(TokenizerError, match="Split"):
            read_vocabulary(tmp_path, 4100)


def test_removing_what_a_pattern_does_leave_out(tmp_path: Path) -> None:
    """Digits in threes are matches in Falcon's last step, and the text around them would be lost."""
    train(next(row for row in PRETOKENIZERS if row.name == "falcon"), tmp_path)
    file = tmp_path / "tokenizer.json"
    written = json.loads(file.read_text())
    written["pre_tokenizer"]["pretokenizers"][-1] |= {"behavior": "Removed", "invert": True}
    file.write_text(json.dumps(written))
    with pytest.raises(TokenizerError, match="Split"):
        read_vocabulary(tmp_path, 4100)


def test_ignore_merges_decides_between_names_of_one_pattern() -> None:
    names = {row.ignore_merges: row.name for row in PRETOKENIZERS if row.steps[0][1] == LLAMA3}
    assert names == {True: "llama-bpe", False: "smaug-bpe"}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"model": {"type": "WordPiece", "vocab": {"a": 0}}}, "WordPiece"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "byte_fallback": True}}, "byte_fallback"),
    ],
)
def test_what_llama_cpp_lacks_is_refused(changes: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    train(PRETOKENIZERS[1], tmp_path, **changes)
    with pytest.raises(TokenizerError, match=complaint):
        read_vocabulary(tmp_path, 4100)


def test_nfc_is_noted(tmp_path: Path) -> None:
    train(PRETOKENIZERS[1], tmp_path, normalizer={"type": "NFC"})
    assert any("NFC" in note for note in read_vocabulary(tmp_path, 4100).notes)


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    train(PRETOKENIZERS[1], tmp_path)
    with pytest.raises(TokenizerError, match="no row"):
        read_vocabulary(tmp_path, 3900)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no tokenizer"):
        read_vocabulary(tmp_path, 100)
