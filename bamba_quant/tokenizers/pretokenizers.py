"""Which of llama.cpp's pre-tokenizers splits text as a tokenizer.json does, by the structure of that file.

A tokenizer.json describes its splitting: a normalizer and a list of splits with their patterns. llama.cpp has
a list of names, each standing for patterns in its source (src/llama-vocab.cpp). The table pairs the two; every
row is tested by training a vocabulary with the left side and comparing tokens with llama.cpp under the right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bamba_quant.errors import TokenizerError, did_you_mean, repr_short
from bamba_quant.files.json_file import object_list, optional, required
from bamba_quant.tokenizers.library_guard import first_line

Step = tuple[Any, ...]

# The contractions and white space that most patterns share.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TAIL_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_TAIL_SLASH}"
)
TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|{_TAIL_SLASH}"
# The possessive spelling of tiktoken's cl100k_base; it matches what LLAMA3 matches.
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)

# Patterns whose matches leave no character of any text out.
_COVERING = frozenset({LLAMA3, QWEN2, GPT4O, TEKKEN, CL100K})

_BYTES: Step = ("ByteLevel", False)
_GPT2: Step = ("ByteLevel", True)

# Falcon's and FalconMamba's: punctuation first, digits last, in threes from the left.
FALCON: tuple[Step, ...] = (
    ("Punctuation", "Contiguous"),
    _GPT2,
    ("Digits", False),
    ("Split", "[0-9][0-9][0-9]", "Isolated"),
)

# Measured: llama.cpp's patterns for these two leave out \p{M} and tell case by ASCII letters.
_NO_MARKS = (
    "llama.cpp cuts words at combining marks, and words of mixed case outside ASCII, unlike this tokenizer"
)


def _split(pattern: str) -> tuple[Step, ...]:
    return (("Split", pattern, "Isolated"), _BYTES)


@dataclass(frozen=True)
class PreTokenizer:
    """llama.cpp's ``name`` for ``steps``; ``ignore_merges`` is what that name implies for whole-word tokens.

    ``differs`` describes where llama.cpp's pattern of that name only approximates the tokenizer's.
    """

    name: str
    steps: tuple[Step, ...]
    ignore_merges: bool
    differs: str = ""


PRETOKENIZERS: tuple[PreTokenizer, ...] = (
    PreTokenizer("llama-bpe", _split(LLAMA3), ignore_merges=True),
    PreTokenizer("smaug-bpe", _split(LLAMA3), ignore_merges=False),
    PreTokenizer("llama-bpe", _split(CL100K), ignore_merges=True),
    PreTokenizer("smaug-bpe", _split(CL100K), ignore_merges=False),
    PreTokenizer("qwen2", _split(QWEN2), ignore_merges=False),
    PreTokenizer("gpt-4o", _split(GPT4O), ignore_merges=False, differs=_NO_MARKS),
    PreTokenizer("tekken", _split(TEKKEN), ignore_merges=True, differs=_NO_MARKS),
    PreTokenizer("gpt-2", (_GPT2,), ignore_merges=False),
    PreTokenizer("starcoder", (("Digits", True), _GPT2), ignore_merges=False),
    PreTokenizer("falcon", FALCON, ignore_merges=False),
)

# llama.cpp's other names for rows of the table: the same patterns and the same treatment of whole-word tokens.
_ALIASES: dict[str, str] = {
    alias: name
    for name, aliases in {
        "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        "smaug-bpe": "dbrx chatglm-bpe",
        "qwen2": "deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
        "gpt-4o": "llama4 kanana2 talkie minimax-m2",
        "gpt-2": "phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert exaone4 mpt olmo "
        "jais trillion granite-docling",
        "starcoder": "refact command-r smollm codeshell exaone minerva-7b mellum2",
    }.items()
    for alias in aliases.split()
}
READ_NAMES = tuple(
    sorted({row.name for row in PRETOKENIZERS}.union(_ALIASES))
)  # those whose splitting is known here
# Names of llama.cpp's byte-level pre-tokenizers that --pre accepts without a check.
_OTHER_NAMES = """
    afmoe bailingmoe bloom chameleon chatglm-bpe codeshell command-r dbrx deepseek-coder
    deepseek-llm deepseek-r1-qwen deepseek-v3 exaone exaone-moe exaone4 falcon-h1 falcon3
    glm4 gpt3-finnish granite-docling granite-embed-multi-97m grok-2 hunyuan hunyuan-dense jais
    jais-2 kimi-k2 llama3 llama4 megrez mellum2 minerva-7b minimax-m2 mpt olmo phi-2 pixtral
    poro-chat qwen35 refact seed-coder smollm solar-open stablelm2 superbpe tiny_aya trillion viking
    youtu
""".split()
KNOWN_NAMES = tuple(sorted({row.name for row in PRETOKENIZERS}.union(_OTHER_NAMES)))


def find_pretokenizer(name: str) -> PreTokenizer | None:
    """The row of llama.cpp's ``name`` or alias, None without one."""
    return next((row for row in PRETOKENIZERS if row.name == _ALIASES.get(name, name)), None)


def recognize_pretokenizer(tokenizer: Mapping[str, Any], where: object) -> tuple[str, tuple[str, ...]]:
    """llama.cpp's name for the splitting in a parsed tokenizer.json, and notes on what llama.cpp does not do.

    Raises ``TokenizerError`` that shows the structure when no row of the table has it.
    """
    notes = normalizer_notes(tokenizer, where)
    steps = tuple(_step(step) for step in _flattened(tokenizer, "pre_tokenizer", "pretokenizers", where))
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    same_split = [row for row in PRETOKENIZERS if row.steps == steps]
    for row in same_split:
        if row.ignore_merges == ignore_merges:
            return row.name, (*notes, row.differs) if row.differs else notes
    if same_split:
        raise TokenizerError(
            f"llama.cpp's pre-tokenizer {same_split[0].name!r} splits text like this tokenizer, but with another "
            "ignore_merges",
            where=where,
            found=f"ignore_merges = {ignore_merges}",
            expected=f"ignore_merges = {same_split[0].ignore_merges}, as {same_split[0].name!r} implies",
            fix=f"to use it in spite of that, which splits some words differently: --pre {same_split[0].name}",
        )
    raise TokenizerError(
        "none of llama.cpp's pre-tokenizers matches this one",
        where=where,
        found="\n    ".join(["", *map(_describe_step, steps[:6]), *(["…"] if steps[6:] else [])])
        if steps
        else "none",
        expected="the structure of one of: " + ", ".join(sorted({row.name for row in PRETOKENIZERS})),
        fix="if llama.cpp has it under another name, say which with --pre NAME, NAME one of: "
        + ", ".join(KNOWN_NAMES),
    )


def check_pretokenizer_name(name: str) -> str:
    """``name`` if llama.cpp has it. Raises ``TokenizerError`` listing the names."""
    if name not in KNOWN_NAMES:
        raise TokenizerError(
            f"--pre names a pre-tokenizer that llama.cpp does not have{did_you_mean(name, KNOWN_NAMES)}",
            found=repr_short(name),
            expected=", ".join(KNOWN_NAMES),
        )
    return name


def normalizer_notes(tokenizer: Mapping[str, Any], where: object) -> tuple[str, ...]:
    """Notes on the normalizer of a parsed tokenizer.json. Raises ``TokenizerError`` for one that llama.cpp lacks."""
    kinds = [step["type"] for step in _flattened(tokenizer, "normalizer", "normalizers", where)]
    if not kinds:
        return ()
    if kinds == ["NFC"]:
        return (
            "the tokenizer normalizes text to NFC and llama.cpp does not: text in another form may be "
            "tokenized differently there",
        )
    raise TokenizerError(
        "the tokenizer's normalizer has no counterpart in llama.cpp",
        where=where,
        found=first_line(", ".join(kinds)),
        expected="none, or NFC",
    )


def _step(step: Mapping[str, Any]) -> Step:
    kind, pattern = step["type"], step.get("pattern")
    if kind == "Split" and isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
        regex, behavior, invert = pattern["Regex"], step.get("behavior"), step.get("invert")
        # Matches alone are kept, which is all of the text where the pattern leaves nothing between them.
        if behavior == "Removed" and invert is True and regex in _COVERING:
            return (kind, regex, "Isolated")
        if isinstance(behavior, str) and (
            invert in (None, False) or (behavior == "Isolated" and invert is True)
        ):
            return (kind, regex, behavior)
    elif kind == "ByteLevel":
        use_regex = step.get("use_regex", True)
        if step.get("add_prefix_space") in (None, False) and isinstance(use_regex, bool):
            return (kind, use_regex)
    elif kind == "Punctuation" and isinstance(step.get("behavior"), str):
        return (kind, step["behavior"])
    elif kind == "Digits" and isinstance(step.get("individual_digits"), bool):
        return (kind, step["individual_digits"])
    return (kind, *(f"{key}={repr_short(value)}" for key, value in sorted(step.items()) if key != "type"))


def _flattened(tokenizer: Mapping[str, Any], key: str, parts: str, where: object) -> list[dict[str, Any]]:
    """The steps under ``key`` in order, those of sequences within sequences too; each has a type."""
    whole = optional(tokenizer, key, dict, where, TokenizerError)
    pending, flat = [whole] if whole is not None else [], []
    while pending:
        step = pending.pop()
        if required(step, "type", str, where, TokenizerError) == "Sequence":
            required(step, parts, list, where, TokenizerError)
            pending += reversed(object_list(step, parts, where, TokenizerError))
        else:
            flat.append(step)
    return flat


def _describe_step(step: Step) -> str:
    return first_line(f"{step[0]}({', '.join(map(str, step[1:]))})", 600)
