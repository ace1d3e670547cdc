"""Vocabularies in GGUF with key-values changed, and what llama.cpp itself says of a vocabulary."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bamba_quant.checkpoint.gguf_values import GgufValue
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.gguf_layout import with_key_values
from bamba_quant.writers import write_plan
from tests.support.llama import llama_cpp


def write_vocabulary(
    directory: Path,
    target: Path,
    *,
    drop: Collection[str] = (),
    change: Mapping[str, GgufValue] | None = None,
    pre: str | None = None,
) -> Path:
    """The vocabulary in ``directory`` as a GGUF, without the keys ``drop`` and with those of ``change``."""
    planned = plan_conversion(directory, outtype="f32", outfile=target, vocab_only=True, pre=pre)
    kept = {key: value for key, value in planned.metadata.items() if key not in drop}
    (file,) = write_plan(with_key_values(planned, kept | dict(change or {})), target)
    return file


@dataclass(frozen=True)
class LlamaVocabulary:
    """A vocabulary as llama.cpp loaded it; ``tokens`` are the ids of texts, whose special tokens are parsed.

    ``attributes`` are llama.cpp's bits for the type of each token.
    """

    add_bos: bool
    add_eos: bool
    bos: int
    eos: int
    ending: tuple[int, ...]
    tokens: tuple[list[int], ...]
    attributes: tuple[int, ...]


def llama_vocabulary(file: Path, texts: Sequence[str] = ()) -> LlamaVocabulary:
    """Load the vocabulary of ``file`` with llama.cpp and encode ``texts``, around which it puts BOS and EOS."""
    module = llama_cpp()
    llama = module.Llama(str(file), n_gpu_layers=0, verbose=False, vocab_only=True)
    try:
        vocabulary = module.llama_model_get_vocab(llama.model)
        count = module.llama_vocab_n_tokens(vocabulary)
        return LlamaVocabulary(
            bool(module.llama_vocab_get_add_bos(vocabulary)),
            bool(module.llama_vocab_get_add_eos(vocabulary)),
            module.llama_vocab_bos(vocabulary),
            module.llama_vocab_eos(vocabulary),
            tuple(token for token in range(count) if module.llama_vocab_is_eog(vocabulary, token)),
            tuple(llama.tokenize(text.encode(), add_bos=True, special=True) for text in texts),
            tuple(module.llama_vocab_get_attr(vocabulary, token) for token in range(count)),
        )
    finally:
        llama.close()
