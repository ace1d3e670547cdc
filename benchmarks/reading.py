"""Headers and vocabularies read, against other people's readers of the same bytes: seconds, and a ratio in one run.

    python -m benchmarks.reading [--tensors 20000] [--tokens 500000] [--runs 5] [--directory DIR] [--json FILE]

Files: a safetensors file and a GGUF of many one-number tensors, a byte-level BPE tokenizer.json in which every token
behind the bytes has a merge, and the same vocabulary in a GGUF. Product and peer take turns, after one round that is
not counted; everything is in the page cache. Peers: safetensors.safe_open, gguf.GGUFReader, tokenizers.Tokenizer
and json.loads.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFValueType, Keys, TokenType
from safetensors import safe_open
from tokenizers import Tokenizer

from bamba_quant.checkpoint import open_checkpoint
from bamba_quant.checkpoint.gguf_values import (
    GgufValue,
    array,
    boolean,
    pack_string,
    pack_value,
    string,
    uint32,
)
from bamba_quant.embedded import embedded_model
from bamba_quant.tokenizers import read_vocabulary
from bamba_quant.tokenizers.encoder import read_encoder

SLOW = 5.0  # seconds


@dataclass(frozen=True)
class Contest:
    """What the product does with a file, and what a peer does with the same bytes."""

    name: str
    ours: Callable[[], Any]
    peer_name: str
    peer: Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tensors", type=int, default=20_000, help="tensors in a header")
    parser.add_argument("--tokens", type=int, default=500_000, help="tokens in a vocabulary")
    parser.add_argument("--runs", type=int, default=5, help="counted rounds, after one that is not")
    parser.add_argument("--directory", type=Path, default=Path("bench/reading"), help="where the files go")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    found = {}
    print(f"{'reading':44} {'seconds':>22} {'peer':>12} {'seconds':>22} {'ratio':>7}")
    for contest in contests(options.directory, options.tensors, options.tokens):
        ours, theirs = [], []
        for _ in range(options.runs + 1):
            ours.append(seconds(contest.ours))
            # A peer that takes this long is not worth more than one round.
            slow = theirs and theirs[0] > SLOW
            theirs.append(theirs[0] if slow else seconds(contest.peer))
        ours, theirs = ours[1:], theirs[1:]
        ratio = statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))
        print(
            f"{contest.name:44} {shown(ours):>22} {contest.peer_name:>12} {shown(theirs):>22} {ratio:7.2f}",
            flush=True,
        )
        found[contest.name] = {"seconds": ours, contest.peer_name: theirs, "ratio": ratio}
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def contests(directory: Path, tensors: int, tokens: int) -> list[Contest]:
    """All contests, their files made."""
    directory.mkdir(parents=True, exist_ok=True)
    model, header = many_tensors(directory, tensors)
    words, merges = vocabulary(tokens)
    tokenizer, inside = large_vocabulary(directory, words, merges)
    file = tokenizer / "tokenizer.json"
    return [
        Contest(
            f"safetensors header, {tensors:,} tensors",
            lambda: open_checkpoint(model),
            "safe_open",
            lambda: safe_open_keys(model / "model.safetensors"),
        ),
        Contest(
            f"GGUF header, {tensors:,} tensors",
            lambda: open_checkpoint(header),
            "GGUFReader",
            lambda: gguf.GGUFReader(header),
        ),
        Contest(
            f"tokenizer.json, {tokens:,} tokens: vocabulary",
            lambda: read_vocabulary(tokenizer, tokens),
            "json.loads",
            lambda: json.loads(file.read_bytes()),
        ),
        Contest(
            f"tokenizer.json, {tokens:,} tokens: encoder",
            lambda: read_encoder(open_checkpoint(tokenizer, weights=False)),
            "tokenizers",
            lambda: Tokenizer.from_file(str(file)),
        ),
        Contest(
            f"GGUF, {tokens:,} tokens: header",
            lambda: open_checkpoint(inside),
            "GGUFReader",
            lambda: gguf.GGUFReader(inside),
        ),
        Contest(
            f"GGUF, {tokens:,} tokens: header and encoder",
            lambda: read_encoder(open_checkpoint(inside)),
            "tokenizers",
            lambda: Tokenizer.from_file(str(file)),
        ),
    ]


def many_tensors(directory: Path, count: int) -> tuple[Path, Path]:
    """A model directory and a GGUF of ``count`` tensors of one float32 each, named as a model's are."""
    model = directory / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text('{"model_type": "bamba"}')
    names = [f"model.layers.{number // 40}.part_{number % 40}.weight" for number in range(count)]
    entries = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * number, 4 * number + 4]}
        for number, name in enumerate(names)
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    weights = struct.pack("<Q", len(header)) + header + bytes(4 * count)
    (model / "model.safetensors").write_bytes(weights)
    file = directory / "tensors.gguf"
    write_gguf(file, {Keys.General.ARCHITECTURE: string("bamba")}, names)
    return model, file


def vocabulary(count: int) -> tuple[list[str], list[tuple[str, str]]]:
    """The 256 letters of the byte-level alphabet, then words of two, three and four of them, each with its merge."""
    own = json.loads((embedded_model() / "tokenizer.json").read_bytes())["model"]["vocab"]
    letters = [text for text in own if len(text) == 1]
    few = [letter for letter in letters if letter.isalpha()][:96]
    words = list(letters)
    merges: list[tuple[str, str]] = []
    for length in (2, 3, 4):
        for word in itertools.product(few, repeat=length):
            if len(words) == count:
                return words, merges
            merges.append(("".join(word[:-1]), word[-1]))
            words.append("".join(word))
    raise SystemExit(f"{count:,} tokens are too many")


def large_vocabulary(directory: Path, words: list[str], merges: list[tuple[str, str]]) -> tuple[Path, Path]:
    """A directory with config.json and tokenizer.json, and a GGUF with the same tokens, types and merges."""
    model = directory / "tokenizer"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text('{"model_type": "bamba"}')
    own = json.loads((embedded_model() / "tokenizer.json").read_bytes())
    own["added_tokens"], own["post_processor"] = [], None
    own["model"] |= {"vocab": {word: number for number, word in enumerate(words)}, "merges": merges}
    (model / "tokenizer.json").write_text(json.dumps(own, ensure_ascii=False))
    values = {
        Keys.General.ARCHITECTURE: string("bamba"),
        Keys.Tokenizer.MODEL: string("gpt2"),
        Keys.Tokenizer.PRE: string("smaug-bpe"),
        Keys.Tokenizer.LIST: array(GGUFValueType.STRING, words),
        Keys.Tokenizer.TOKEN_TYPE: array(GGUFValueType.INT32, [int(TokenType.NORMAL)] * len(words)),
        Keys.Tokenizer.MERGES: array(GGUFValueType.STRING, [" ".join(merge) for merge in merges]),
        Keys.Tokenizer.ADD_BOS: boolean(False),
        Keys.Tokenizer.EOS_ID: uint32(0),
    }
    file = directory / "vocabulary.gguf"
    write_gguf(file, values, ["token_embd.weight"])
    return model, file


def write_gguf(file: Path, values: dict[str, GgufValue], names: list[str]) -> None:
    """A GGUF with tensors of one float32 each."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(names), len(values))]
    for key, value in values.items():
        parts += (pack_string(key), pack_value(value))
    for number, name in enumerate(names):
        parts += (pack_string(name), struct.pack("<IQIQ", 1, 1, 0, 32 * number))
    header = b"".join(parts)
    file.write_bytes(header + bytes(-len(header) % 32 + 32 * len(names)))


def safe_open_keys(file: Path) -> list[tuple[str, list[int]]]:
    with safe_open(file, framework="np") as opened:
        return [(name, opened.get_slice(name).get_shape()) for name in opened.keys()]  # noqa: SIM118


def seconds(work: Callable[[], Any]) -> float:
    gc.collect()
    started = time.perf_counter()
    made = work()
    spent = time.perf_counter() - started
    del made
    return spent


def shown(figures: list[float]) -> str:
    return f"{statistics.median(figures):.3f} ({min(figures):.3f} to {max(figures):.3f})"


if __name__ == "__main__":
    main()
