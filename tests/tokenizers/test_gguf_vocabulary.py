"""Values of a GGUF's vocabulary that are of another type, length or range are refused wherever they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType, Keys

from bamba_quant.checkpoint import Checkpoint, open_checkpoint
from bamba_quant.checkpoint.gguf_values import GgufValue, array, boolean, float32, int32, string, uint32
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import TokenizerError
from bamba_quant.tokenizers.encoder import read_encoder
from bamba_quant.tokenizers.export import generation_config, tokenizer_files
from bamba_quant.tokenizers.gguf_vocabulary import read_gguf_vocabulary
from bamba_quant.tokenizers.special_tokens import stop_tokens
from tests.support.conversion import to_gguf
from tests.support.vocabularies import llama_vocabulary, write_vocabulary
from tests.tokenizers import test_sentencepiece

K = Keys.Tokenizer
FILE = Path("m.gguf")


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, GgufValue]]:
    """The key-values of a vocabulary of each kind."""
    directory = tmp_path_factory.mktemp("vocabularies")
    found = {"gpt2": to_gguf(embedded_model(), directory / "gpt2.gguf", vocab_only=True)}
    for kind, options in (("llama", test_sentencepiece.LLAMA), ("t5", test_sentencepiece.UNIGRAM)):
        test_sentencepiece.train(directory / kind, **options)
        found[kind] = test_sentencepiece.converted(directory / kind)
    return {kind: dict(open_checkpoint(file).metadata) for kind, file in found.items()}


def readers(values: dict[str, GgufValue]) -> list[Any]:
    checkpoint = Checkpoint(FILE, "gguf", values, {})
    return [
        lambda: read_encoder(checkpoint),
        lambda: tokenizer_files(FILE, values, 4096),
        lambda: generation_config(FILE, values),
        lambda: stop_tokens(checkpoint),
    ]


def strings(*texts: str) -> GgufValue:
    return array(GGUFValueType.STRING, texts)


NESTED = GgufValue(GGUFValueType.ARRAY, [array(GGUFValueType.INT32, [1])], GGUFValueType.ARRAY)
WRONG: list[tuple[str, str, GgufValue]] = [
    *((kind, K.MODEL, value) for kind in ("gpt2",) for value in (uint32(1), string("bert"), strings("gpt2"))),
    ("gpt2", K.PRE, uint32(3)),
    *(
        (kind, K.LIST, value)
        for kind in ("gpt2", "llama", "t5")
        for value in (string("a"), NESTED, strings("a"))
    ),
    ("gpt2", K.LIST, array(GGUFValueType.INT32, range(2048))),
    ("gpt2", K.LIST, strings(*["a"] * 2048)),
    ("gpt2", K.TOKEN_TYPE, array(GGUFValueType.FLOAT32, [1.0] * 2048)),
    ("gpt2", K.TOKEN_TYPE, array(GGUFValueType.INT32, [1] * 2047 + [7])),
    ("gpt2", K.TOKEN_TYPE, array(GGUFValueType.INT32, [1] * 2047 + [-1])),
    ("gpt2", K.TOKEN_TYPE, array(GGUFValueType.INT32, [1] * 2047)),
    ("gpt2", K.MERGES, array(GGUFValueType.INT32, [1])),
    ("gpt2", K.MERGES, strings("ab")),
    ("gpt2", K.MERGES, strings(" a")),
    ("gpt2", K.MERGES, strings("")),
    *((kind, K.SCORES, string("x")) for kind in ("llama", "t5")),
    *((kind, K.SCORES, strings(*["1"] * 2100)) for kind in ("llama", "t5")),
    *((kind, K.SCORES, array(GGUFValueType.FLOAT32, [float("nan")] * 2100)) for kind in ("llama", "t5")),
    *(
        ("gpt2", key, value)
        for key in (K.BOS_ID, K.EOS_ID, K.EOT_ID, K.EOM_ID, K.UNK_ID, K.PAD_ID, K.FIM_PAD_ID)
        for value in (string("0"), float32(0), boolean(True), int32(-1), NESTED)
    ),
    *(
        (kind, key, value)
        for kind in ("gpt2", "llama", "t5")
        for key in (K.ADD_BOS, K.ADD_EOS, K.ADD_PREFIX, K.REMOVE_EXTRA_WS)
        for value in (uint32(1), string("true"), NESTED)
    ),
    *(
        ("t5", K.PRECOMPILED_CHARSMAP, value)
        for value in (string("x"), strings("x"), array(GGUFValueType.INT32, [1]))
    ),
    ("gpt2", K.CHAT_TEMPLATE, uint32(1)),
    ("gpt2", K.CHAT_TEMPLATES, string("x")),
    ("llama", "bamba_quant.tokenizer.space_prefix_once", uint32(1)),
]


@pytest.mark.parametrize(("kind", "key", "value"), WRONG)
def test_wrong_values(kind: str, key: str, value: GgufValue, valid: dict[str, dict[str, GgufValue]]) -> None:
    for read in readers(valid[kind] | {key: value}):
        with pytest.raises(TokenizerError) as error:
            read()
        assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("kind", "key"),
    [(kind, K.LIST) for kind in ("gpt2", "llama", "t5")]
    + [(kind, K.TOKEN_TYPE) for kind in ("llama", "t5")]
    + [("gpt2", K.MERGES), ("llama", K.SCORES), ("t5", K.SCORES)],
)
def test_missing_lists(kind: str, key: str, valid: dict[str, dict[str, GgufValue]]) -> None:
    values = {name: value for name, value in valid[kind].items() if name != key}
    for read in readers(values):
        with pytest.raises(TokenizerError, match=key):
            read()


@pytest.mark.parametrize("token", [uint32(2048), uint32(2**31), uint32(2**32 - 1)])
@pytest.mark.parametrize("key", [K.BOS_ID, K.EOS_ID, K.EOT_ID, K.PAD_ID, K.MASK_ID, K.FIM_PRE_ID])
def test_ids_beyond_the_vocabulary(key: str, token: GgufValue, tmp_path: Path) -> None:
    """llama.cpp takes its default for the kind."""
    file = write_vocabulary(
        embedded_model(), tmp_path / "m.gguf", change={key: token, K.ADD_BOS: boolean(False)}
    )
    checkpoint = open_checkpoint(file)
    llama = llama_vocabulary(file, ["a text"])
    assert read_encoder(checkpoint).encode("a text") == llama.tokens[0]
    assert stop_tokens(checkpoint) == llama.ending
    vocabulary = read_gguf_vocabulary(file, checkpoint.metadata)
    assert vocabulary is not None
    assert (vocabulary.special("bos"), vocabulary.special("eos")) == (llama.bos, llama.eos)
    assert any(key in note for note in tokenizer_files(file, checkpoint.metadata, 64)[1])


def test_no_token_types(tmp_path: Path) -> None:
    file = write_vocabulary(embedded_model(), tmp_path / "m.gguf", drop=[K.TOKEN_TYPE])
    text = "a text<|pad|> <|end_of_text|> b"
    assert read_encoder(open_checkpoint(file)).encode(text) == llama_vocabulary(file, [text]).tokens[0]


@pytest.mark.parametrize("text", ["\udcff\udcfe", "x" * 100_000, "\x1b[2J"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_tokens_of_any_text(kind: str, text: str, valid: dict[str, dict[str, GgufValue]]) -> None:
    """A vocabulary may hold any bytes; a library that does not take them ends in a short error."""
    values = dict(valid[kind])
    texts = list(values[K.LIST].value)
    texts[600] = text
    values[K.LIST] = array(GGUFValueType.STRING, texts)
    for read in readers(values):
        try:
            read()
        except TokenizerError as error:
            assert len(str(error)) < 1000


def test_a_charsmap_that_is_cut_short(valid: dict[str, dict[str, GgufValue]]) -> None:
    whole = valid["t5"][K.PRECOMPILED_CHARSMAP].value
    for size in (1, 3, 4, 5, 100, len(whole) // 2):
        values = valid["t5"] | {K.PRECOMPILED_CHARSMAP: array(GGUFValueType.UINT8, whole[:size])}
        with pytest.raises(TokenizerError):
            read_encoder(Checkpoint(FILE, "gguf", values, {})).encode("a text")
