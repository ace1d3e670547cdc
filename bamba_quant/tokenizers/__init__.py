"""A model directory's vocabulary as GGUF stores it, or an error: never another model's vocabulary."""

from pathlib import Path

from bamba_quant.errors import TokenizerError
from bamba_quant.tokenizers.byte_level_bpe import read_byte_level_bpe
from bamba_quant.tokenizers.sentencepiece_model import read_sentencepiece
from bamba_quant.tokenizers.settings import has_tokenizer, tokenizer_file
from bamba_quant.tokenizers.vocabulary import Vocabulary

__all__ = ["Vocabulary", "has_tokenizer", "read_vocabulary"]


def read_vocabulary(directory: Path, vocab_size: int, pre: str | None = None) -> Vocabulary:
    """The vocabulary in ``directory`` for an embedding of ``vocab_size`` rows.

    A SentencePiece tokenizer.model goes before a tokenizer.json made from it. ``pre`` overrides the recognition
    of a byte-level pre-tokenizer. Raises ``TokenizerError`` when there is none or llama.cpp cannot follow it.
    """
    file = tokenizer_file(directory)
    if file.name == "tokenizer.json":
        return read_byte_level_bpe(file, vocab_size, pre)
    if pre is not None:
        raise TokenizerError(
            "--pre is for byte-level BPE, and this tokenizer is SentencePiece",
            where=file,
            fix="leave --pre out",
        )
    return read_sentencepiece(file, vocab_size)
