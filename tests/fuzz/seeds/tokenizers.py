"""Small tokenizers: byte-level BPE out of the embedded model's, SentencePiece of both kinds made by hand."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from bamba_quant.embedded import embedded_model
from tests.fuzz.tree import Tree

VOCAB_SIZE = 304
TEXT = "Hello world, it's 2026!\n\n 日本 <|pad|> the end"


@cache
def byte_level_bpe() -> Tree:
    """tokenizer.json, with the first tokens and merges alone, and its settings."""
    tokenizer = json.loads((embedded_model() / "tokenizer.json").read_bytes())
    model = tokenizer["model"]
    model["vocab"] = {text: token for text, token in model["vocab"].items() if token < VOCAB_SIZE - 4}
    model["merges"] = [
        merge for merge in model["merges"] if all(part in model["vocab"] for part in (*merge, "".join(merge)))
    ]
    settings = json.loads((embedded_model() / "tokenizer_config.json").read_bytes())
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2).encode(),
    }


@cache
def with_everything() -> Tree:
    """The same with added tokens in every file that may hold some, and chat templates in every place."""
    tree = dict(byte_level_bpe())
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = json.loads(tree["tokenizer_config.json"])  # type: ignore[arg-type]
    settings["added_tokens_decoder"] = {
        "0": {"content": "<|begin_of_text|>", **special},
        str(VOCAB_SIZE - 2): {"content": "<|im_start|>", **special},
    }
    settings["chat_template"] = [
        {"name": "default", "template": "{{ messages }}"},
        {"name": "rag", "template": "{{ documents }}"},
    ]
    tree["tokenizer_config.json"] = json.dumps(settings, indent=2).encode()
    mapped = {
        "bos_token": {"content": "<|begin_of_text|>", **special},
        "eos_token": "<|end_of_text|>",
        "additional_special_tokens": ["<|im_start|>"],
    }
    tree["special_tokens_map.json"] = json.dumps(mapped, indent=2).encode()
    tree["added_tokens.json"] = json.dumps({"<|im_start|>": VOCAB_SIZE - 2}, indent=2).encode()
    tree["additional_chat_templates/tool_use.jinja"] = b"{% for m in messages %}{{ m.content }}{% endfor %}"
    return tree


@cache
def with_map_alone() -> Tree:
    """The same without tokenizer_config.json, as old directories have it: the map is what names special tokens."""
    return {name: content for name, content in with_everything().items() if name != "tokenizer_config.json"}


@cache
def with_template() -> Tree:
    """The same with its template in a file of its own."""
    return {
        **byte_level_bpe(),
        "chat_template.jinja": "{{ bos_token }}{% for m in messages %}…{% endfor %}".encode(),
    }


@cache
def with_template_object() -> Tree:
    """The same as older processors keep theirs."""
    return {**byte_level_bpe(), "chat_template.json": b'{"chat_template": "{{ messages }}"}'}


@cache
def sentencepiece(kind: str) -> Tree:
    """tokenizer.model of ``kind`` "bpe", with byte pieces, or "unigram", and its settings."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    for text, number in (("<unk>", 2), ("<s>", 3), ("</s>", 3), ("<pad>", 3), ("<tool>", 4)):
        model.pieces.add(piece=text, score=0.0, type=number)
    if kind == "bpe":
        for byte in range(256):
            model.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=6)
    words = [
        "▁",
        *"abcdehlorstw",
        "he",
        "ll",
        "lo",
        "▁w",
        "or",
        "▁t",
        "▁the",
        "hell",
        "hello",
        "▁wor",
        "▁end",
    ]
    for place, word in enumerate(words):
        model.pieces.add(piece=word, score=-float(place), type=1)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = 2 if kind == "bpe" else 1
    trainer.byte_fallback = kind == "bpe"
    trainer.vocab_size = len(model.pieces)
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, 3
    normalizer.name = "identity" if kind == "bpe" else "nmt_nfkc"
    normalizer.add_dummy_prefix = True
    normalizer.remove_extra_whitespaces = kind == "unigram"
    normalizer.escape_whitespaces = True
    settings: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": "<pad>",
        "add_bos_token": True, "add_eos_token": False,
        "added_tokens_decoder": {
            str(len(model.pieces)): {"content": "<|im_start|>", "special": True, "lstrip": False,
            "rstrip": False, "normalized": False,
                                     "single_word": False},
        },
    }  # fmt: skip
    return {
        "tokenizer.model": model.SerializeToString(),
        "tokenizer_config.json": json.dumps(settings, indent=2).encode(),
        "added_tokens.json": json.dumps({"<|im_start|>": len(model.pieces)}).encode(),
    }
