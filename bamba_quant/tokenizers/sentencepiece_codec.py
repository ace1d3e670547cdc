"""Text to ids and back by a SentencePiece model with added tokens, which are found in the text before it is encoded.

The sentencepiece library itself finds neither control tokens nor tokens that other files add to the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bamba_quant.tokenizers.added_tokens import AddedToken
from bamba_quant.tokenizers.library_guard import check_charsmap
from bamba_quant.tokenizers.vocabulary import UNIGRAM

_SPACE = "▁"


def sentencepiece_codec(
    model: Any,
    tokens: Mapping[int, str],
    added: Sequence[AddedToken],
    *,
    space_once: bool,
    split_special: bool = False,
) -> tuple[Callable[[str], list[int]], Callable[[Sequence[int]], str]]:
    """Encoding and decoding by ``model``, a ModelProto.

    ``tokens`` are the texts that ids decode to. With ``space_once`` the model's leading space is added before a whole
    text only, else also after each added token, as llama.cpp does. ``split_special`` leaves special tokens inside a
    text to the model.
    """
    check_charsmap(model.normalizer_spec.precompiled_charsmap, "the SentencePiece model")
    first = _processor(model, add_dummy_prefix=model.normalizer_spec.add_dummy_prefix)
    later = _processor(model, add_dummy_prefix=False) if space_once else first
    find = _finder(model, added, split_special)

    def plain(text: str) -> list[int]:
        ids: list[int] = []
        for token, start, stop in find(text):
            if token is not None:
                ids.append(token)
            else:
                ids += (later if start else first).encode(text[start:stop])
        return ids

    decoder = _decoder(model)
    return plain, lambda ids: str(decoder.decode([tokens[token] for token in ids if token in tokens]))


Span = tuple[int | None, int, int]  # an added token or None, and its start and end in the text


def _finder(model: Any, added: Sequence[AddedToken], split_special: bool) -> Callable[[str], list[Span]]:
    """A function that splits a text into spans: added tokens, and the text between them."""
    if not added:
        return lambda text: [(None, 0, len(text))]
    from tokenizers import Tokenizer, models, normalizers

    texts = {one.text for one in added}
    rest = "\uffff"  # the one word of the library's vocabulary, for whatever is not an added token
    while rest in texts:
        rest += "\uffff"
    tokenizer = Tokenizer(models.WordLevel({rest: 0}, rest))
    tokenizer.encode_special_tokens = split_special
    if model.normalizer_spec.precompiled_charsmap and any(one.normalized for one in added):
        tokenizer.normalizer = normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
    tokenizer.add_tokens([to_library_token(one) for one in added])
    ids = {tokenizer.token_to_id(one.text): one.token for one in added}

    def find(text: str) -> list[Span]:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        return [
            (ids.get(token), start, stop)
            for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
        ]

    return find


def to_library_token(one: AddedToken) -> Any:
    """The tokenizers library's form of an added token."""
    from tokenizers import AddedToken

    return AddedToken(
        one.text,
        single_word=one.single_word,
        lstrip=one.lstrip,
        rstrip=one.rstrip,
        normalized=one.normalized,
        special=one.special,
    )


def _processor(model: Any, *, add_dummy_prefix: bool) -> Any:
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    changed = sentencepiece_model_pb2.ModelProto()
    changed.CopyFrom(model)
    changed.normalizer_spec.add_dummy_prefix = add_dummy_prefix
    return SentencePieceProcessor(model_proto=changed.SerializeToString())


def _decoder(model: Any) -> Any:
    """As in transformers' LlamaTokenizer and T5Tokenizer: added tokens keep their text."""
    from tokenizers import decoders

    prefix = bool(model.normalizer_spec.add_dummy_prefix)
    if model.trainer_spec.model_type == UNIGRAM:
        return decoders.Metaspace(replacement=_SPACE, prepend_scheme="always" if prefix else "never")
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
