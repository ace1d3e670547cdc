"""Byte-level BPE from a tokenizer.json: the tokens, merges and added tokens that llama.cpp needs to split alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import TokenType

from bamba_quant.checkpoint.json_file import read_json
from bamba_quant.errors import TokenizerError
from bamba_quant.tokenizers.pretokenizers import check_name, recognise
from bamba_quant.tokenizers.special_tokens import chat_templates, special_ids, tokenizer_config
from bamba_quant.tokenizers.vocabulary import Vocabulary, laid_out

# Features of the BPE model that llama.cpp lacks, with the values that switch them off.
_SWITCHED_OFF = {
    "dropout": (None, 0, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (None, False),
    "fuse_unk": (None, False),
}


def read_byte_level_bpe(file: Path, vocab_size: int, pre: str | None = None) -> Vocabulary:
    """The vocabulary of ``file`` (a tokenizer.json) for an embedding of ``vocab_size`` rows.

    ``pre`` names llama.cpp's pre-tokenizer on the caller's word; otherwise it is recognised. Raises
    ``TokenizerError`` for any tokenizer that llama.cpp would not follow token by token.
    """
    tokenizer = read_json(file, "the tokenizer")
    model = tokenizer.get("model") or {}
    _check_model(file, model)
    name, notes = (check_name(pre), ()) if pre else recognise(tokenizer, file)
    known: dict[int, tuple[str, int]] = {
        token: (text, int(TokenType.NORMAL)) for text, token in model["vocab"].items()
    }
    for added in tokenizer.get("added_tokens") or []:
        kind = TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED
        known[added["id"]] = (added["content"], int(kind))
    tokens, types = laid_out(known, vocab_size, file)
    settings = tokenizer_config(file.parent)
    ids = {text: token for token, (text, _) in known.items()}
    special = special_ids(file.parent, settings, vocab_size, ids.get, {})
    add_bos, add_eos, more = _added_around(file, tokenizer, vocab_size, special, settings)
    return Vocabulary(
        model="gpt2",
        pre=name,
        tokens=tokens,
        types=types,
        merges=_merges(file, model["merges"]),
        special_ids=special,
        add_bos=add_bos,
        add_eos=add_eos,
        chat_templates=chat_templates(file.parent, settings),
        notes=notes + _trimming_notes(tokenizer) + more,
    )


def _check_model(file: Path, model: dict[str, Any]) -> None:
    if model.get("type") != "BPE" or not model.get("vocab") or "merges" not in model:
        raise TokenizerError(
            "the tokenizer is not byte-level BPE",
            where=file,
            found=f"a model of type {model.get('type')!r}",
            expected="BPE with vocab and merges",
            fix="if it came from SentencePiece, put its tokenizer.model into the directory",
        )
    for key, off in _SWITCHED_OFF.items():
        if model.get(key) not in off:
            hint = (
                "; put the tokenizer.model it came from into the directory" if key == "byte_fallback" else ""
            )
            raise TokenizerError(
                f"the tokenizer uses BPE's {key}, which llama.cpp's byte-level BPE lacks",
                where=file,
                found=model[key],
                expected="none" + hint,
            )


def _merges(file: Path, merges: list[Any]) -> tuple[str, ...]:
    """Merges as strings of two parts; a space inside a part is written as the byte-level alphabet writes it."""
    joined = tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in merges)
    if all(merge.count(" ") == 1 for merge in joined):
        return joined
    odd = next((merge for merge in merges if isinstance(merge, str) or len(merge) != 2), None)
    if odd is not None and (not isinstance(odd, str) or odd.count(" ") != 1):
        raise TokenizerError("a merge does not have two parts", where=file, found=repr(odd))
    return tuple(" ".join(part.replace(" ", "\u0120") for part in merge) for merge in merges)


def _added_around(
    file: Path, tokenizer: dict[str, Any], vocab_size: int, special: dict[str, int], settings: dict[str, Any]
) -> tuple[bool, bool, tuple[str, ...]]:
    """Whether encoding puts BOS before and EOS after a text: asked of the post-processor itself.

    It runs behind a vocabulary of one token, whose id no real token has, so that what it adds stands out.
    """
    from tokenizers import Tokenizer

    text = vocab_size
    model = {"type": "BPE", "vocab": {"a": text}, "merges": []}
    bare: dict[str, Any] = {
        "added_tokens": [],
        "post_processor": tokenizer.get("post_processor"),
        "model": model,
    }
    whole = Tokenizer.from_str(json.dumps(bare)).encode("a").ids
    before, after = whole[: whole.index(text)], whole[whole.index(text) + 1 :]
    if before not in ([], [special.get("bos")]) or after not in ([], [special.get("eos")]):
        raise TokenizerError(
            "the tokenizer adds special tokens that llama.cpp cannot add",
            where=file,
            found=f"{before} before and {after} after a text",
            expected=f"at most BOS ({special.get('bos')}) before and EOS ({special.get('eos')}) after",
        )
    notes = tuple(
        f"tokenizer_config.json says add_{kind}_token = {str(flag).lower()}, tokenizer.json does otherwise; "
        "tokenizer.json was followed"
        for kind, flag, does in (
            ("bos", settings.get("add_bos_token"), bool(before)),
            ("eos", settings.get("add_eos_token"), bool(after)),
        )
        if isinstance(flag, bool) and flag != does
    )
    return bool(before), bool(after), notes


def _trimming_notes(tokenizer: dict[str, Any]) -> tuple[str, ...]:
    trimming = [
        added["content"]
        for added in tokenizer.get("added_tokens") or []
        if added.get("lstrip") or added.get("rstrip") or added.get("single_word")
    ]
    if not trimming:
        return ()
    return (
        f"{len(trimming)} added tokens (the first {trimming[0]!r}) take neighbouring white space or only whole "
        "words with them; llama.cpp does not",
    )
