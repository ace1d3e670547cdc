"""Tokenizers of the kinds that the families' models come with, each from a directory to llama.cpp and back."""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, normalizers

from bamba_quant.checkpoint import open_checkpoint
from bamba_quant.errors import TokenizerError
from bamba_quant.planning.export import plan_export
from bamba_quant.planning.inspection import inspect_path
from bamba_quant.tokenizers import read_vocabulary
from bamba_quant.tokenizers.encoder import read_encoder
from bamba_quant.tokenizers.pretokenizers import LLAMA3, PRETOKENIZERS
from bamba_quant.writers import write_plan
from tests.support import llama
from tests.support.conversion import to_gguf
from tests.support.families import FAMILIES, save
from tests.support.texts import BROAD
from tests.tokenizers.test_pretokenizers import train as train_bpe
from tests.tokenizers.test_sentencepiece import LLAMA
from tests.tokenizers.test_sentencepiece import train as train_sentencepiece

ROWS = 4104  # as state-spaces' models, more than there are tokens
Encode = Callable[[str], list[int]]
# GPT-NeoX's tokenizer puts text into this form first and llama.cpp does not, which the plan notes.
TEXTS = [text for text in BROAD if text and unicodedata.is_normalized("NFC", text)]
TEXTS += [topics["assignment"], "def f():\n    return 1\n" + " " * 30 + "x"]


def _row(name: str, pattern: str | None = None) -> Any:
    return next(row for row in PRETOKENIZERS if row.name == name and pattern in (None, row.steps[0][1]))


def gpt_neox(directory: Path) -> Encode:
    """Mamba's: GPT-2's splitting, NFC, no BOS, one special token, runs of spaces added as tokens of their own."""
    train_bpe(_row("gpt-2"), directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken(" " * count, normalized=True) for count in range(24, 1, -1)])
    described = json.loads(tokenizer.to_str()) | {"post_processor": None}
    (directory / "tokenizer.json").write_text(json.dumps(described))
    end = "<|end_of_text|>"
    settings = {"bos_token": end, "eos_token": end, "unk_token": end, "tokenizer_class": "GPTNeoXTokenizer"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.from_str(json.dumps(described))
    return lambda text: list(tokenizer.encode(text).ids)


def falcon(directory: Path) -> Encode:
    tokenizer = train_bpe(_row("falcon"), directory)
    return lambda text: list(tokenizer.encode(text).ids)


def granite(directory: Path) -> Encode:
    """Granite 4.0's hybrids: the pattern of Llama 3, whole words by merges."""
    tokenizer = train_bpe(_row("smaug-bpe", LLAMA3), directory)
    return lambda text: list(tokenizer.encode(text).ids)


def granite_speech(directory: Path) -> Encode:
    """Granite 4.0's small dense models: starcoder's."""
    tokenizer = train_bpe(_row("starcoder"), directory)
    return lambda text: list(tokenizer.encode(text).ids)


def codestral(directory: Path) -> Encode:
    """A SentencePiece model, under mistral's name for it."""
    oracle: sentencepiece.SentencePieceProcessor = train_sentencepiece(
        directory, **LLAMA, add_dummy_prefix=False
    )
    (directory / "tokenizer.model").rename(directory / "tokenizer.model.v3")
    return lambda text: [oracle.bos_id(), *oracle.encode(text)]


KINDS: dict[str, Callable[[Path], Encode]] = {
    "GPT-NeoX's": gpt_neox,
    "Falcon's": falcon,
    "Llama 3's pattern": granite,
    "starcoder's": granite_speech,
    "Codestral's": codestral,
}


@pytest.mark.parametrize(("kind", "family"), [*zip(KINDS, itertools.cycle(FAMILIES), strict=False)])
def test_llama_cpp_splits_alike_and_export_brings_it_back(kind: str, family: str, tmp_path: Path) -> None:
    """Whichever the family is."""
    make, model = KINDS[kind], FAMILIES[family].random(vocab_size=ROWS)
    directory = save(model, tmp_path / "m")
    encode = make(directory)
    file = to_gguf(directory, tmp_path / "m.gguf", "bf16")
    expected = [encode(text) for text in TEXTS]
    assert llama.tokenize(file, TEXTS, special=False) == expected
    assert open_checkpoint(file).metadata["tokenizer.ggml.tokens"].value[-1].startswith("[PAD")
    write_plan(plan_export(file), tmp_path / "back")
    for checkpoint in (directory, file, tmp_path / "back"):
        encoder = read_encoder(open_checkpoint(checkpoint))
        # SentencePiece's own tokens are spelled by no text, and this one spells them.
        assert [encoder.encode(text) for text in TEXTS if "<s>" not in text] == [
            ids for text, ids in zip(TEXTS, expected, strict=True) if "<s>" not in text
        ]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.small.state_spaces])
def test_state_spaces_bring_no_tokenizer(name: str, tmp_path: Path) -> None:
    """llama.cpp's converter takes GPT-NeoX's from its own files then; here the user says which."""
    directory = save(FAMILIES[name].random(), tmp_path, spelling="state-spaces")
    with pytest.raises(TokenizerError, match="GPT-NeoX"):
        to_gguf(directory, tmp_path / "m.gguf")
    assert inspect_path(directory).architecture == name


def test_gpt_neox_is_recognised(tmp_path: Path) -> None:
    gpt_neox(tmp_path)
    vocabulary = read_vocabulary(tmp_path, ROWS)
    assert vocabulary.pre == "gpt-2"
    assert not vocabulary.add_bos and not vocabulary.add_eos
    assert vocabulary.special_ids["eos"] == vocabulary.special_ids["bos"] == 1
    assert any("NFC" in note for note in vocabulary.notes)
