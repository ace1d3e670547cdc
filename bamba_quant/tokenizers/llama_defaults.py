"""What llama.cpp assumes of a vocabulary whose GGUF does not say it (src/llama-vocab.cpp, llama_vocab::impl::load)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# llama.cpp's byte-level pre-tokenizers that put BOS before a text unless the file says otherwise.
ADD_BOS_NAMES = frozenset(
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano tekken chameleon".split()
)
# Pre-tokenizers for which there is no BOS unless the file names one.
_NO_BOS_NAMES = frozenset("chatglm-bpe glm4 glm5".split())


@dataclass(frozen=True)
class LlamaDefaults:
    """Flags, and ids of special tokens by kind."""

    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    ids: Mapping[str, int] = field(default_factory=dict)
    remove_extra_whitespaces: bool = False


def llama_defaults(model: str, pre: str | None) -> LlamaDefaults:
    """Defaults for ``tokenizer.ggml.model`` and ``tokenizer.ggml.pre``."""
    if model == "llama":
        return LlamaDefaults(True, False, add_space_prefix=True, ids={"bos": 1, "eos": 2, "unk": 0})
    if model == "t5":
        return LlamaDefaults(False, True, add_space_prefix=False, ids={"eos": 1, "unk": 2, "pad": 0})
    ids = {"eos": 11} if pre in _NO_BOS_NAMES else {"bos": 11, "eos": 11}
    return LlamaDefaults(pre in ADD_BOS_NAMES, False, add_space_prefix=False, ids=ids)
