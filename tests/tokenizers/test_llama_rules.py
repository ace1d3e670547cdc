"""What a GGUF does not say is what llama.cpp assumes: its own answers, for every pre-tokenizer that is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import Keys
from transformers import AutoTokenizer

from bamba_quant.checkpoint import open_checkpoint
from bamba_quant.checkpoint.gguf_values import boolean, string
from bamba_quant.errors import TokenizerError
from bamba_quant.tokenizers.encoder import read_encoder
from bamba_quant.tokenizers.export import tokenizer_files
from bamba_quant.tokenizers.llama_rules import llama_defaults
from bamba_quant.tokenizers.pretokenizers import KNOWN_NAMES, PRETOKENIZERS, READ_NAMES, find_pretokenizer
from tests.support.models import random_bamba, save_checkpoint
from tests.support.texts import BROAD, SPECIAL
from tests.support.vocabularies import llama_vocabulary, write_vocabulary
from tests.tokenizers import test_pretokenizers, test_sentencepiece

FLAGS = (Keys.Tokenizer.ADD_BOS, Keys.Tokenizer.ADD_EOS)
MORE = (*FLAGS, Keys.Tokenizer.ADD_PREFIX, Keys.Tokenizer.REMOVE_EXTRA_WS)
TEXTS = [*BROAD, *SPECIAL]


def model_of(directory: Path, vocab_size: int) -> Path:
    model = random_bamba(vocab_size=vocab_size, num_hidden_layers=2, attn_layer_indices=[1])
    return save_checkpoint(model, directory)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory for each row of the table by the row's name."""
    found = {}
    for row in PRETOKENIZERS:
        if row.name not in found:
            found[row.name] = tmp_path_factory.mktemp("bpe")
            test_pretokenizers.train(row, found[row.name])
            model_of(found[row.name], 4100)
    return found


@pytest.mark.parametrize("name", sorted({*KNOWN_NAMES, *READ_NAMES}))
def test_byte_level_names(name: str, byte_level: dict[str, Path], tmp_path: Path) -> None:
    """The flags of every name, and the tokens of every name whose splitting is read."""
    row = find_pretokenizer(name)
    directory = byte_level[row.name if row else "gpt-2"]
    file = write_vocabulary(
        directory, tmp_path / "m.gguf", drop=FLAGS, change={Keys.Tokenizer.PRE: string(name)}
    )
    differs = row.differs if row else ""
    texts = [text for text in TEXTS if not (differs and test_pretokenizers.has_marks_or_foreign_case(text))]
    theirs = llama_vocabulary(file, texts if row else ())
    defaults = llama_defaults("gpt2", name)
    assert (defaults.add_bos, defaults.add_eos) == (theirs.add_bos, theirs.add_eos)
    if row is not None:
        encoder = read_encoder(open_checkpoint(file))
        assert encoder.bos == (theirs.bos if theirs.add_bos else None)
        assert [encoder.encode(text) for text in texts] == list(theirs.tokens)
        files, _ = tokenizer_files(file, open_checkpoint(file).metadata, 4096)
        assert json.loads(files["tokenizer_config.json"])["add_bos_token"] == theirs.add_bos
        for made, content in files.items():
            (tmp_path / made).write_bytes(content)
        text = "It's 1234 words."
        assert AutoTokenizer.from_pretrained(tmp_path).encode(text) == encoder.encode(text)


@pytest.mark.parametrize("options", [test_sentencepiece.LLAMA, test_sentencepiece.UNIGRAM])
def test_sentencepiece_models(options: dict[str, Any], tmp_path: Path) -> None:
    test_sentencepiece.train(tmp_path, **options)
    model_of(tmp_path, test_sentencepiece.ROWS)
    file = write_vocabulary(
        tmp_path, tmp_path / "m.gguf", drop=(*MORE, "bamba_quant.tokenizer.space_prefix_once")
    )
    texts = [text for text in BROAD if text.strip()]
    theirs = llama_vocabulary(file, texts)
    encoder = read_encoder(open_checkpoint(file))
    behind = [theirs.eos] if theirs.add_eos else []
    assert [[*encoder.encode(text), *behind] for text in texts] == list(theirs.tokens)
    defaults = llama_defaults("llama" if options is test_sentencepiece.LLAMA else "t5", None)
    assert (defaults.add_bos, defaults.add_eos) == (theirs.add_bos, theirs.add_eos)


def test_default_ids(byte_level: dict[str, Path], tmp_path: Path) -> None:
    """BOS and EOS that no key names are llama.cpp's."""
    ids = (Keys.Tokenizer.BOS_ID, Keys.Tokenizer.EOS_ID)
    file = write_vocabulary(byte_level["llama-bpe"], tmp_path / "m.gguf", drop=(*ids, *FLAGS))
    theirs = llama_vocabulary(file, ["a text"])
    encoder = read_encoder(open_checkpoint(file))
    assert encoder.encode("a text") == theirs.tokens[0]
    assert encoder.bos == theirs.bos == 11


def test_a_bos_that_there_is_not(tmp_path: Path) -> None:
    """llama.cpp aborts on such a file."""
    test_sentencepiece.train(tmp_path, **test_sentencepiece.UNIGRAM)
    model_of(tmp_path, test_sentencepiece.ROWS)
    file = write_vocabulary(
        tmp_path,
        tmp_path / "m.gguf",
        drop=(Keys.Tokenizer.BOS_ID,),
        change={Keys.Tokenizer.ADD_BOS: boolean(True)},
    )
    with pytest.raises(TokenizerError, match="BOS"):
        read_encoder(open_checkpoint(file))
    with pytest.raises(TokenizerError, match="BOS"):
        tokenizer_files(file, open_checkpoint(file).metadata, 4096)
