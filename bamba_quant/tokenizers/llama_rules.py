"""What llama.cpp assumes of a vocabulary and changes in it, whatever a GGUF says (src/llama-vocab.cpp, impl::load)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gguf import TokenType

# llama.cpp's byte-level pre-tokenizers that add BOS before a text unless the file disagrees.
ADD_BOS_NAMES = frozenset(
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano tekken chameleon".split()
)
# Pre-tokenizers without a BOS by default.
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


# Tokens that end a text wherever they are in a vocabulary (special_eog_ids).
END_OF_GENERATION_TEXTS = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> "
    "<|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> "
    "<｜end▁of▁sentence｜> [e~[".split()
)
# Tokens for filling in the middle; the first that is there counts, unless a key names one.
FILL_IN_MIDDLE_TEXTS = {
    "fim_pre": (
        "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
        "<|code_prefix|>", "<|prefix|>",
    ),
    "fim_suf": (
        "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
        "<|code_suffix|>", "<|suffix|>",
    ),
    "fim_mid": (
        "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
        "<|code_middle|>", "<|middle|>",
    ),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}  # fmt: skip
# Of gpt-oss, whose tokens llama.cpp always writes out.
_USER_DEFINED_TEXTS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


def end_of_generation_tokens(ids: Mapping[str, int], special: Mapping[str, int]) -> set[int]:
    """The tokens for which llama.cpp's ``llama_vocab_is_eog`` is true.

    ``ids`` maps text to id, ``special`` are ids by kind with llama.cpp's defaults.
    """
    found, kept = _ending(ids, special)
    return found - kept.keys()


def overridden_types(
    types: Sequence[int], ids: Mapping[str, int], special: Mapping[str, int]
) -> tuple[int, ...]:
    """The types of tokens once llama.cpp has loaded a vocabulary; see ``end_of_generation_tokens``."""
    fill_in = _fill_in(ids, special)
    changed = {ids[text]: TokenType.CONTROL for text in END_OF_GENERATION_TEXTS if text in ids}
    changed |= {token: TokenType.CONTROL for kind, token in fill_in.items() if kind not in special}
    changed |= {ids[text]: TokenType.USER_DEFINED for text in _USER_DEFINED_TEXTS if text in ids}
    changed |= _ending(ids, special)[1]
    return tuple(int(changed.get(token, kind)) for token, kind in enumerate(types))


def _fill_in(ids: Mapping[str, int], special: Mapping[str, int]) -> dict[str, int]:
    """Tokens for filling in the middle by kind; of several texts llama.cpp takes any, here it is the first."""
    by_text = {
        kind: next((ids[text] for text in texts if text in ids), None)
        for kind, texts in FILL_IN_MIDDLE_TEXTS.items()
    }
    found = {kind: special.get(kind, token) for kind, token in by_text.items()}
    return {kind: token for kind, token in found.items() if token is not None}


def _ending(ids: Mapping[str, int], special: Mapping[str, int]) -> tuple[set[int], dict[int, TokenType]]:
    """Tokens that look as if they ended a text, and those of them that do not, with the types they get instead."""
    found = {ids[text] for text in END_OF_GENERATION_TEXTS if text in ids}
    found |= {special[kind] for kind in ("eos", "eot", "eom") if kind in special}
    found |= {
        token for kind, token in _fill_in(ids, special).items() if kind in ("fim_pad", "fim_rep", "fim_sep")
    }

    def ends(*texts: str) -> bool:
        return any(ids.get(text) in found for text in texts)

    kept = {}
    if ends("<|end|>") and ends("<|call|>", "<|calls|>") and ends("<|return|>", "<|flush|>"):
        kept[ids["<|end|>"]] = TokenType.USER_DEFINED  # it ends a message, not the text
    if ends("</s>") and ends("<|tool_response>", "<|plamo:eos|>"):
        kept[ids["</s>"]] = TokenType.NORMAL
    return found, kept
