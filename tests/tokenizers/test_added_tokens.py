"""Tokens that any file of a directory adds: AutoTokenizer's ids in the encoder, in the GGUF and in llama.cpp."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from transformers import AutoTokenizer

from bamba_quant.checkpoint import open_checkpoint
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import TokenizerError
from bamba_quant.tokenizers import read_vocabulary
from bamba_quant.tokenizers.encoder import read_encoder
from tests.support.exports import exported
from tests.support.models import random_bamba, save_checkpoint
from tests.support.texts import BROAD
from tests.support.vocabularies import llama_vocabulary, write_vocabulary
from tests.tokenizers import test_sentencepiece

PLAIN = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
MARKERS = ("<|im_start|>", "<|im_end|>")
TEXTS = [
    "<|im_start|>user\nHello there<|im_end|>\nnext",
    "Hi <|im_start|> a <|im_end|>  b<|im_end|><|im_end|>",
    "plain text, no markers",
    "é🦙 漢<|im_end|>🦙",
    "say <call> twice <call>.",
    "",
    " ",
]
Files = dict[str, dict[str, Any]]


def decoder(first: int) -> Files:
    entries = {str(first + i): {"content": text, **PLAIN, "special": True} for i, text in enumerate(MARKERS)}
    entries[str(first + 2)] = {"content": "<call>", **PLAIN, "special": False}
    return {"tokenizer_config.json": {"added_tokens_decoder": entries}}


def added_tokens_json(first: int) -> Files:
    special = {"additional_special_tokens": list(MARKERS)}
    listed = {text: first + i for i, text in enumerate((*MARKERS, "<call>"))}
    return {"added_tokens.json": listed, "tokenizer_config.json": special}


def only_settings(first: int) -> Files:
    return {
        "tokenizer_config.json": {"pad_token": MARKERS[0], "extra_special_tokens": [MARKERS[1], "<call>"]}
    }


def special_tokens_map(first: int) -> Files:
    return {
        "special_tokens_map.json": {"pad_token": MARKERS[0], "mask_token": MARKERS[1], "cls_token": "<call>"}
    }


FORMS = [decoder, added_tokens_json, only_settings, special_tokens_map]


def add(directory: Path, files: Files) -> None:
    for name, content in files.items():
        file = directory / name
        held = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps({**held, **content}))


@pytest.fixture
def byte_level(tmp_path: Path) -> Path:
    """bamba-mini's tokenizer, whose 2048 tokens the embedding has 16 rows more than."""
    directory = tmp_path / "m"
    save_checkpoint(random_bamba(vocab_size=2064, num_hidden_layers=2, attn_layer_indices=[1]), directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(embedded_model() / name, directory / name)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, options in {
        "with a leading space": test_sentencepiece.LLAMA,
        "without": {**test_sentencepiece.LLAMA, "add_dummy_prefix": False},
        "unigram": test_sentencepiece.UNIGRAM,
    }.items():
        found[name] = tmp_path_factory.mktemp("spm")
        test_sentencepiece.train(found[name], **options)
        rows = test_sentencepiece.ROWS
        save_checkpoint(
            random_bamba(vocab_size=rows, num_hidden_layers=2, attn_layer_indices=[1]), found[name]
        )
        settings: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>"}
        settings |= {"bos_token": "<s>", "eos_token": "</s>", "add_prefix_space": name != "without"}
        if name == "unigram":
            settings |= {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
        (found[name] / "tokenizer_config.json").write_text(json.dumps(settings))
    return found


def check(directory: Path, target: Path, first: int, *, llama: bool = True) -> None:
    """All readings of the vocabulary agree, on the texts above and on others."""
    oracle = AutoTokenizer.from_pretrained(directory)
    encoder = read_encoder(open_checkpoint(directory))
    file = write_vocabulary(directory, target)
    gguf = read_encoder(open_checkpoint(file))
    theirs = llama_vocabulary(file, TEXTS)
    assert gguf.bos == encoder.bos
    for text, ids in zip(TEXTS, theirs.tokens, strict=True):
        expected = oracle.encode(text, add_special_tokens=False)
        if text.strip():  # transformers 5 drops a space at the start of a SentencePiece text
            assert encoder.plain(text) == expected, text
        assert gguf.encode(text) == encoder.encode(text), text
        if llama:
            assert ids == encoder.encode(text), text
        for each in (encoder, gguf):
            assert each.decode(expected) == oracle.decode(expected, skip_special_tokens=False)
    assert [encoder.plain(text) for text in BROAD] == [gguf.plain(text) for text in BROAD]
    kinds = dict(enumerate(read_vocabulary(directory, max(first + 3, 2064)).types))
    assert kinds[first] == kinds[first + 1] == TokenType.CONTROL
    assert kinds[first + 2] in (TokenType.CONTROL, TokenType.USER_DEFINED)


@pytest.mark.parametrize("form", FORMS)
def test_byte_level(form: Any, byte_level: Path, tmp_path: Path) -> None:
    add(byte_level, form(2048))
    check(byte_level, tmp_path / "m.gguf", 2048)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["with a leading space", "without", "unigram"])
def test_sentencepiece_models(form: Any, kind: str, trained: dict[str, Path], tmp_path: Path) -> None:
    directory = shutil.copytree(trained[kind], tmp_path / "m")
    add(directory, form(2000))
    # llama.cpp puts the leading space behind added tokens too, which a note says.
    check(directory, tmp_path / "m.gguf", 2000, llama=kind != "with a leading space")
    notes = read_vocabulary(directory, test_sentencepiece.ROWS).notes
    assert any("leading space" in note for note in notes) == (kind == "with a leading space")


def test_a_leading_space_behind_each_token(trained: dict[str, Path], tmp_path: Path) -> None:
    """ "legacy" is llama.cpp's way, and comes back by export."""
    directory = shutil.copytree(trained["with a leading space"], tmp_path / "m")
    add(directory, decoder(2000))
    add(directory, {"tokenizer_config.json": {"legacy": True}})
    text = "<|im_start|>user<|im_end|>next"
    ids = AutoTokenizer.from_pretrained(directory).encode(text, add_special_tokens=False)
    file = write_vocabulary(directory, tmp_path / "m.gguf")
    assert read_encoder(open_checkpoint(directory)).plain(text) == ids
    assert read_encoder(open_checkpoint(file)).plain(text) == ids
    assert llama_vocabulary(file, [text]).tokens[0][1:] == ids


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized"])
@pytest.mark.parametrize("kind", ["byte level", "without"])
def test_flags(flag: str, kind: str, byte_level: Path, trained: dict[str, Path], tmp_path: Path) -> None:
    directory = byte_level if kind == "byte level" else shutil.copytree(trained[kind], tmp_path / "s")
    first = 2048 if kind == "byte level" else 2000
    entry = {"content": "<call>", **PLAIN, "special": False, flag: True}
    add(directory, {"tokenizer_config.json": {"added_tokens_decoder": {str(first): entry}}})
    oracle, encoder = AutoTokenizer.from_pretrained(directory), read_encoder(open_checkpoint(directory))
    for text in ("a <call> b", "a<call>b", "a  <call>  <call>\n", "<call>", "x<call> <call>y"):
        assert encoder.plain(text) == oracle.encode(text, add_special_tokens=False), text
    trims = flag != "normalized"
    assert any("white space" in note for note in read_vocabulary(directory, first + 64).notes) == trims


def test_flags_of_tokenizer_json_go_before_added_tokens_json(byte_level: Path) -> None:
    entry = {"id": 2048, "content": "<call>", **PLAIN, "special": True, "lstrip": True}
    held = json.loads((byte_level / "tokenizer.json").read_text())["added_tokens"]
    add(
        byte_level,
        {"tokenizer.json": {"added_tokens": [*held, entry]}, "added_tokens.json": {"<call>": 2048}},
    )
    oracle, encoder = AutoTokenizer.from_pretrained(byte_level), read_encoder(open_checkpoint(byte_level))
    assert encoder.encode("a  <call> b") == oracle.encode("a  <call> b")
    assert read_vocabulary(byte_level, 2064).types[2048] == TokenType.CONTROL


def test_special_tokens_of_the_base_vocabulary(byte_level: Path, tmp_path: Path) -> None:
    """A normal token that the settings name is cut out of every text, and is a control token in GGUF."""
    add(byte_level, {"tokenizer_config.json": {"pad_token": "!"}})
    text = "Hey!! you!"
    oracle, encoder = AutoTokenizer.from_pretrained(byte_level), read_encoder(open_checkpoint(byte_level))
    file = write_vocabulary(byte_level, tmp_path / "m.gguf")
    assert encoder.encode(text) == oracle.encode(text) == llama_vocabulary(file, [text]).tokens[0]
    vocabulary = read_vocabulary(byte_level, 2064)
    assert vocabulary.types[vocabulary.special_ids["pad"]] == TokenType.CONTROL


def test_split_special_tokens(byte_level: Path) -> None:
    add(byte_level, {"tokenizer_config.json": {"split_special_tokens": True}})
    text = "a<|end_of_text|>b"
    oracle, encoder = AutoTokenizer.from_pretrained(byte_level), read_encoder(open_checkpoint(byte_level))
    assert encoder.encode(text) == oracle.encode(text)
    assert 1 not in encoder.encode(text)
    assert any("split_special_tokens" in note for note in read_vocabulary(byte_level, 2064).notes)


def test_ids_with_a_gap_are_followed(byte_level: Path, tmp_path: Path) -> None:
    add(byte_level, {"tokenizer_config.json": decoder(2055)["tokenizer_config.json"]})
    encoder = read_encoder(open_checkpoint(byte_level))
    file = write_vocabulary(byte_level, tmp_path / "m.gguf")
    for text in TEXTS:
        ids = encoder.encode(text)
        assert (
            read_encoder(open_checkpoint(file)).encode(text)
            == ids
            == llama_vocabulary(file, [text]).tokens[0]
        )
        assert encoder.decode(encoder.plain(text)) == text
    assert encoder.plain("<|im_start|>") == [2055]
    assert any("without a gap" in note for note in read_vocabulary(byte_level, 2064).notes)


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ({"added_tokens.json": {"<x>": 5}}, ("tokenizer.json", "added_tokens.json")),
        ({"added_tokens.json": {"<|pad|>": 2048}}, ("tokenizer.json", "added_tokens.json")),
        (
            {"added_tokens.json": {"<x>": 2048}, **decoder(2048)},
            ("added_tokens.json", "tokenizer_config.json"),
        ),
        (
            {"added_tokens.json": {"<|im_start|>": 2049}, **decoder(2048)},
            ("added_tokens.json", "tokenizer_config.json"),
        ),
        (decoder(0), ("tokenizer.json", "tokenizer_config.json")),
        (
            {"special_tokens_map.json": {"eos_token": "<|begin_of_text|>"}},
            ("tokenizer_config.json", "special_tokens_map.json"),
        ),
    ],
)
def test_files_that_contradict_each_other(files: Files, names: tuple[str, str], byte_level: Path) -> None:
    add(byte_level, files)
    for read in (
        lambda: read_vocabulary(byte_level, 2064),
        lambda: read_encoder(open_checkpoint(byte_level)),
    ):
        with pytest.raises(TokenizerError) as error:
            read()
        assert all(name in str(error.value) for name in names), error.value


def test_export_brings_added_tokens_back(byte_level: Path, tmp_path: Path) -> None:
    from tests.support.conversion import to_gguf

    add(byte_level, decoder(2048))
    file = to_gguf(byte_level, tmp_path / "m.gguf")
    back = exported(file, tmp_path / "back")
    oracle = AutoTokenizer.from_pretrained(byte_level)
    for text in TEXTS:
        assert AutoTokenizer.from_pretrained(back).encode(text) == oracle.encode(text)
    assert open_checkpoint(to_gguf(back, tmp_path / "again.gguf")).metadata == open_checkpoint(file).metadata


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("tokenizer_config.json", {"extra_special_tokens": 5}, "extra_special_tokens"),
        ("tokenizer_config.json", {"additional_special_tokens": [5]}, "additional_special_tokens"),
        ("tokenizer_config.json", {"additional_special_tokens": [{"text": "x"}]}, "content"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"-5": {"content": "x"}}}, "not an id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"2147483648": {"content": "x"}}}, "out of range"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 3000: {"content": "x"}}}, "not an id"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"2048": {"content": "x", "lstrip": 1}}},
            "lstrip",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {"2048": {"content": ""}}}, "no text"),
        ("added_tokens.json", {"<x>": -1}, "out of range"),
        ("added_tokens.json", {"<x>": 10**30}, "out of range"),
        ("added_tokens.json", {"<x>": [1]}, "<x>"),
        ("special_tokens_map.json", {"pad_token": 5}, "pad_token"),
    ],
)
def test_malformed(name: str, content: dict[str, Any], complaint: str, byte_level: Path) -> None:
    add(byte_level, {name: content})
    for read in (
        lambda: read_vocabulary(byte_level, 2064),
        lambda: read_encoder(open_checkpoint(byte_level)),
    ):
        with pytest.raises(TokenizerError, match=complaint) as error:
            read()
        assert len(str(error.value)) < 1000
