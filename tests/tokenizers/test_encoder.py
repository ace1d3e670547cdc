"""The vocabulary inside a GGUF, run here, makes the tokens that the original tokenizer makes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from bamba_quant.checkpoint import open_checkpoint
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import TokenizerError
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
            ids = encoder.encode(text)
            assert ids == [oracle.bos_id(), *oracle.encode(text)], text
            assert encoder.decode(ids) == oracle.decode(ids)
            assert encoder.decode([*ids, test_sentencepiece.ROWS - 1]) == oracle.decode(ids), (
                "a row without a token"
            )


def test_embedded_model() -> None:
    encoder = read_encoder(open_checkpoint(embedded_model()))
    tokenizer = Tokenizer.from_file(str(embedded_model() / "tokenizer.json"))
    assert [encoder.encode(text) for text in BROAD] == [tokenizer.encode(text).ids for text in BROAD]


def test_what_cannot_be_run(tmp_path: Path) -> None:
    directory = save_checkpoint(random_bamba(), tmp_path / "m")
    with pytest.raises(TokenizerError, match="no tokenizer"):
        read_encoder(open_checkpoint(directory))
    with pytest.raises(TokenizerError, match="--tokenizer"):
        read_encoder(open_checkpoint(to_gguf(directory, tmp_path / "none.gguf", vocab=False)))
    file = to_gguf(embedded_model(), tmp_path / "viking.gguf", pre="viking")
    with pytest.raises(TokenizerError, match="viking"):
        read_encoder(open_checkpoint(file))
