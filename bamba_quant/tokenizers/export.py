"""A GGUF's vocabulary as a tokenizer again, and as the files in which a model directory keeps it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gguf import TokenType

from bamba_quant.checkpoint.gguf_values import GgufValue
from bamba_quant.errors import TokenizerError
from bamba_quant.tokenizers.gguf_vocabulary import read_gguf_vocabulary
from bamba_quant.tokenizers.library_guard import library_errors
from bamba_quant.tokenizers.pretokenizers import PRETOKENIZERS, find_pretokenizer
from bamba_quant.tokenizers.vocabulary import BPE, UNIGRAM, Vocabulary, is_filler

_FIX = "leave the tokenizer out with --no-vocab, and copy the original's files into the directory"
_KINDS = ("bos", "eos", "unk", "sep", "pad", "mask")
# transformers' classes for the two kinds of SentencePiece models.
_SENTENCEPIECE_CLASSES = {"llama": "LlamaTokenizer", "t5": "T5Tokenizer"}


def tokenizer_files(
    path: Path, values: Mapping[str, GgufValue], max_length: int
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Contents by file name, and notes; no files where there is no vocabulary ("none" or no key at all).

    ``path`` is only for messages. Raises ``TokenizerError`` for a vocabulary that cannot be rebuilt.
    """
    vocabulary = read_gguf_vocabulary(path, values, _FIX)
    if vocabulary is None:
        return {}, ("the file has no vocabulary, so no tokenizer is written",)
    kind = vocabulary.model
    notes = vocabulary.notes
    if kind == "gpt2":
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **_settings(vocabulary, max_length)}
        files = {"tokenizer.json": _tokenizer_json(path, vocabulary)}
    else:
        settings = {"tokenizer_class": _SENTENCEPIECE_CLASSES[kind], **_settings(vocabulary, max_length)}
        settings |= _sentencepiece_settings(vocabulary)
        with library_errors(path, "the vocabulary cannot be written as a SentencePiece model"):
            files = {"tokenizer.model": bytes(build_sentencepiece_model(vocabulary).SerializeToString())}
        if kind == "t5" and (settings["add_bos_token"] or not settings["add_eos_token"]):
            notes += (
                "transformers' T5Tokenizer puts EOS behind every text and no BOS before it, whatever the file "
                "says; the pieces are the same",
            )
    return {**files, "tokenizer_config.json": as_json(path, settings)}, notes


def generation_config(path: Path, values: Mapping[str, GgufValue]) -> dict[str, bytes]:
    """generation_config.json by its name: where to begin, all tokens to stop at, and padding; none without ids."""
    vocabulary = read_gguf_vocabulary(path, values, _FIX)
    special = {} if vocabulary is None else vocabulary.special_ids
    stops = list(dict.fromkeys(special[kind] for kind in ("eos", "eot", "eom") if kind in special))
    ids = {
        "bos_token_id": special.get("bos"),
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": special.get("pad"),
    }
    kept = {key: token for key, token in ids.items() if token is not None}
    return {"generation_config.json": as_json(path, kept)} if kept else {}


def as_json(path: Path, value: Mapping[str, Any]) -> bytes:
    """JSON as model directories have it. Raises ``TokenizerError`` for text that is not UTF-8."""
    try:
        return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            "the file holds text that is not UTF-8, which JSON cannot store",
            where=path,
            found=repr(error.object[max(0, error.start - 8) : error.end + 8]),
            fix=_FIX,
        ) from error


def _settings(vocabulary: Vocabulary, max_length: int) -> dict[str, Any]:
    tokens = vocabulary.tokens
    # transformers looks for every token named here in a text, which would change how an ordinary one is encoded.
    settings: dict[str, Any] = {
        f"{kind}_token": tokens[token]
        for kind, token in vocabulary.special_ids.items()
        if kind in _KINDS and vocabulary.types[token] != TokenType.NORMAL
    }
    for kind in ("bos", "eos"):
        token = vocabulary.token_around(kind)
        settings[f"add_{kind}_token"] = token is not None
        if token is not None:
            settings[f"{kind}_token"] = tokens[token]
    templates = _templates(vocabulary.chat_templates)
    if templates:
        settings["chat_template"] = templates
    return settings | {
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
    }


def _templates(templates: Mapping[str, str]) -> str | list[dict[str, str]] | None:
    """The one template, or all of them by name as transformers lists several."""
    if set(templates) <= {"default"}:
        return templates.get("default")
    return [{"name": name, "template": text} for name, text in templates.items()]


def _sentencepiece_settings(vocabulary: Vocabulary) -> dict[str, Any]:
    """Tokens that transformers must find in a text itself: SentencePiece never matches a control token there."""
    settings: dict[str, Any] = {
        "added_tokens_decoder": {
            str(token): {
                "content": text,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": found == TokenType.CONTROL,
            }
            for token, (text, found) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
            if found in (TokenType.CONTROL, TokenType.USER_DEFINED)
        }
    }
    if vocabulary.model == "llama":
        prefix = vocabulary.prefixes_space
        # legacy: the leading space is also added after each added token.
        legacy = prefix and not vocabulary.space_prefix_once
        return settings | {"legacy": legacy, "add_prefix_space": prefix}
    # Otherwise transformers adds T5's sentinel tokens.
    return settings | {"extra_ids": 0}


def _tokenizer_json(path: Path, vocabulary: Vocabulary) -> bytes:
    """tokenizer.json; its post-processor adds BOS before and EOS after a text where the file does."""
    from tokenizers import processors

    with library_errors(path, "the vocabulary cannot be written as a tokenizer.json"):
        tokenizer = build_bpe_tokenizer(path, vocabulary, fix=_FIX)
        added = [vocabulary.token_around(kind) for kind in ("bos", "eos")]
        before, after = ([] if token is None else [vocabulary.tokens[token]] for token in added)
        steps: list[Any] = [processors.ByteLevel(trim_offsets=False)]
        if before or after:
            steps.append(
                processors.TemplateProcessing(
                    single=[*before, "$A", *after],
                    pair=[*before, "$A", *after, *before, "$B", *after],
                    special_tokens=[
                        (vocabulary.tokens[token], token) for token in added if token is not None
                    ],
                )
            )
        tokenizer.post_processor = processors.Sequence(steps)
        return f"{tokenizer.to_str(pretty=True)}\n".encode()


def build_bpe_tokenizer(
    path: Path, vocabulary: Vocabulary, fix: str = "give the original's directory as --tokenizer"
) -> Any:
    """A ``tokenizers.Tokenizer`` from tokens, types and merges; the splitting is the table's for the file's name.

    Rows of the embedding that have no token get none.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    row = find_pretokenizer(vocabulary.pre)
    if row is None:
        raise TokenizerError(
            "only llama.cpp has the file's pre-tokenizer",
            where=path,
            found=repr(vocabulary.pre[:80]),
            expected=", ".join(sorted({row.name for row in PRETOKENIZERS})),
            fix=fix,
        )
    build: dict[str, Callable[..., Any]] = {
        "Split": lambda pattern, behaviour: pre_tokenizers.Split(Regex(pattern), behaviour.lower()),
        "Punctuation": lambda behaviour: pre_tokenizers.Punctuation(behaviour.lower()),
        "Digits": lambda individual: pre_tokenizers.Digits(individual_digits=individual),
        "ByteLevel": lambda regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex),
    }
    typed = list(zip(vocabulary.tokens, vocabulary.types, strict=True))
    base = {text: token for token, (text, kind) in enumerate(typed) if not is_filler(token, text, kind)}
    cuts = ((merge, merge.find(" ", 1)) for merge in vocabulary.merges or ())
    merges = [(merge[:cut], merge[cut + 1 :]) for merge, cut in cuts]
    tokenizer = Tokenizer(models.BPE(base, merges, ignore_merges=row.ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([build[kind](*rest) for kind, *rest in row.steps])
    tokenizer.decoder = decoders.ByteLevel()
    for kinds, add in (
        ((TokenType.CONTROL, TokenType.UNKNOWN), tokenizer.add_special_tokens),
        ((TokenType.USER_DEFINED,), tokenizer.add_tokens),
    ):
        add([AddedToken(text, normalized=False) for text, kind in typed if kind in kinds])
    return tokenizer


def build_sentencepiece_model(vocabulary: Vocabulary) -> Any:
    """A SentencePiece ModelProto with the file's pieces, scores and types, which are SentencePiece's own numbers.

    It ends at the last piece that is a token; fillers between tokens stay, since a piece's index is its id.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    tokens, types, scores = vocabulary.tokens, vocabulary.types, vocabulary.scores or ()
    count = len(tokens)
    while count and is_filler(count - 1, tokens[count - 1], types[count - 1]):
        count -= 1
    for text, score, piece_type in list(zip(tokens, scores, types, strict=True))[:count]:
        model.pieces.add(piece=text, score=score, type=piece_type)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = BPE if vocabulary.model == "llama" else UNIGRAM
    trainer.vocab_size = count
    trainer.byte_fallback = int(TokenType.BYTE) in types
    for name in ("bos", "eos", "unk", "pad"):
        known = vocabulary.special(name) if name == "unk" else vocabulary.special_ids.get(name)
        token = -1 if known is None else known
        setattr(trainer, f"{name}_id", token)
        if 0 <= token < count:
            # The library finds these by their text, not by their id.
            setattr(trainer, f"{name}_piece", tokens[token])
    normalizer.name = "identity" if vocabulary.model == "llama" else "nmt_nfkc"
    normalizer.add_dummy_prefix = vocabulary.prefixes_space
    normalizer.remove_extra_whitespaces = bool(vocabulary.remove_extra_whitespaces)
    normalizer.escape_whitespaces = True
    normalizer.precompiled_charsmap = vocabulary.charsmap
    return model
