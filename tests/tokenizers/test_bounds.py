"""Tokenizer files that would take unbounded time or memory, that are no regular files, or at which libraries panic."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bamba_quant.checkpoint import open_checkpoint
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import BambaQuantError, TokenizerError
from bamba_quant.files.json_file import JSON_BYTES
from bamba_quant.tokenizers import read_vocabulary
from bamba_quant.tokenizers.encoder import Encoder, read_encoder
from bamba_quant.tokenizers.library_guard import check_charsmap, check_pipeline
from bamba_quant.tokenizers.special_tokens import stop_tokens
from tests.tokenizers import test_sentencepiece

GOOD: dict[str, Any] = json.loads((embedded_model() / "tokenizer.json").read_text())
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(embedded_model() / name, tmp_path / name)
    return tmp_path


def encoder(directory: Path, **changes: Any) -> Encoder:
    (directory / "tokenizer.json").write_text(json.dumps(GOOD | changes))
    return read_encoder(open_checkpoint(directory, weights=False))


def replace(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def steps(*each: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(each)}


def split(regex: str) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [step, BYTES]}


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": steps(*[replace("a" * 1000, String="a")] * 2)},
        {"normalizer": steps(*[replace("a" * 10, String="a")] * 8)},
        {"normalizer": steps(*[replace("aa", Regex="a")] * 8)},
        {"normalizer": {"type": "Prepend", "prepend": "a" * 1000}},
        {"normalizer": steps(steps(*[{"type": "ByteLevel"}] * 30))},
        {"normalizer": steps(*[{"type": "NFC"}] * 1000)},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 30}},
        {"pre_tokenizer": split("a" * 5000)},
        {"decoder": {"type": "Sequence", "decoders": [replace("a" * 100, String="a")] * 3}},
    ],
)
def test_steps_that_multiply_a_text(changes: dict[str, Any], directory: Path) -> None:
    with pytest.raises(TokenizerError, match="unbounded") as error:
        encoder(directory, **changes)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "normalizer",
    [
        None,
        steps({"type": "Prepend", "prepend": "\u2581"}, replace("\u2581", String=" ")),
        steps({"type": "NFKC"}, {"type": "Lowercase"}, {"type": "StripAccents"}, {"type": "Nmt"}),
        steps({"type": "NFC"}, replace(" ", Regex=r"\s+"), {"type": "Lowercase"}),
        steps({"type": "Strip", "strip_left": True, "strip_right": True}, replace("\u2581", Regex=" {2,}")),
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True},
    ],
)
def test_steps_of_published_tokenizers(normalizer: dict[str, Any] | None, directory: Path) -> None:
    check_pipeline(GOOD | {"normalizer": normalizer}, "here")
    assert encoder(directory, normalizer=normalizer).encode("Old  mill")


def test_a_charsmap_that_multiplies_a_text() -> None:
    check_charsmap(b"\0\0\0\0" + b"x" * 33 + b"\0", "here")
    with pytest.raises(TokenizerError, match="unbounded"):
        check_charsmap(b"\0\0\0\0a\0" + b"x" * 1000 + b"\0", "here")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "non-zero"),
        ({"normalizer": replace("x", Regex="")}, "index"),
        ({"pre_tokenizer": split("(a+)+b")}, r"retry-limit[\s\S]*too many steps"),
    ],
)
def test_nothing_of_a_panic_is_printed(
    changes: dict[str, Any], found: str, directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TokenizerError, match=found):
        encoder(directory, **changes)
    assert capfd.readouterr().err == ""
    os.write(2, b"still open")
    assert capfd.readouterr().err == "still open"


def test_a_text_with_lone_surrogates(directory: Path) -> None:
    with pytest.raises(TokenizerError, match=r"not valid Unicode[\s\S]*UTF-8") as error:
        encoder(directory).encode("hi \udcff")
    assert "again" not in str(error.value)
    str(error.value).encode()


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "generation_config.json",
        "chat_template.jinja",
    ],
)
@pytest.mark.parametrize("make", [os.mkfifo, lambda file: file.symlink_to("nowhere")], ids=["pipe", "link"])
def test_small_files_that_are_not_files(name: str, make: Callable[[Path], None], directory: Path) -> None:
    (directory / name).unlink(missing_ok=True)
    if name == "special_tokens_map.json":
        (directory / "tokenizer_config.json").write_text("{}")
    make(directory / name)
    with pytest.raises(BambaQuantError, match=re.escape(name)):
        read_vocabulary(directory, 2048)
    if name == "generation_config.json":
        with pytest.raises(BambaQuantError, match=re.escape(name)):
            stop_tokens(open_checkpoint(directory, weights=False))
    elif name != "chat_template.jinja":
        with pytest.raises(BambaQuantError, match=re.escape(name)):
            read_encoder(open_checkpoint(directory, weights=False))


def test_a_tokenizer_json_of_many_items(directory: Path) -> None:
    (directory / "tokenizer.json").write_bytes(b'{"a":[' + b"[]," * (JSON_BYTES // 3) + b"1]}")
    before = time.monotonic()
    with pytest.raises(BambaQuantError, match="too many items"):
        read_vocabulary(directory, 2048)
    assert time.monotonic() - before < 10


def test_a_large_tokenizer_model(directory: Path) -> None:
    (directory / "tokenizer.model").write_bytes(b"\n\0" * (9 << 20))
    with pytest.raises(BambaQuantError, match="too large"):
        read_vocabulary(directory, 2048)


def test_a_large_tokenizer_json_beside_a_model(directory: Path) -> None:
    """The model's tokens may be in it, too, and those of Gemma take more than 24 MiB."""
    test_sentencepiece.train(directory, **test_sentencepiece.LLAMA)
    (directory / "tokenizer_config.json").write_text("{}")
    large = {"added_tokens": [], "model": "x" * (25 << 20)}
    (directory / "tokenizer.json").write_text(json.dumps(large))
    assert read_encoder(open_checkpoint(directory, weights=False)).encode("a")


def test_many_settings_for_tokens(directory: Path) -> None:
    settings = {f"k{i}_token": f"<{i}>" for i in range(20_000)}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(TokenizerError, match="too many special tokens"):
        read_vocabulary(directory, 2048)
