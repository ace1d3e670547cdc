"""``generate`` and ``perplexity`` of a Q4_K_M of Bamba-9B's exact shape, beside llama.cpp on the same file and cores.

    python benchmarks/generate_large.py [--threads N] [--keep]

prints peak memory, the time of a prompt and the rate of new tokens. The file (5.9 GB) has the metadata that ``convert``
writes and random weights: rows of a few that were quantized, in random order. The rate is the difference between two
runs of one and of --tokens new tokens, so that reading and starting do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bamba_quant.codecs import BlockCodec, codec_named
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.plan import Part
from checkpoints import BAMBA_9B, random_text, write_tokenizer
from processes import run

DISTINCT, TOGETHER = 256, 2048  # rows that are quantized, and that are written at once
PROMPT = "etaoi nshrd lueta oinsh"

LLAMA = """
import json, sys, time
import numpy as np
from llama_cpp import Llama
file, threads, count, prompt = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
model = Llama(file, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
ids = model.tokenize(prompt.encode())
started = time.perf_counter()
model.eval(ids)
prompted = time.perf_counter()
for _ in range(count):
    model.eval([int(np.argmax(model.scores[model.n_tokens - 1]))])
ended = time.perf_counter()
print(json.dumps({"prompt_tokens": len(ids), "prompt": prompted - started, "token": (ended - prompted) / count}))
"""


def make_file(directory: Path) -> Path:
    file = directory / "bamba-9b-random-q4_k_m.gguf"
    if file.is_file():
        return file
    model = directory / "bamba-9b-config"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(BAMBA_9B))
    write_tokenizer(model, BAMBA_9B["bos_token_id"])
    plan = plan_conversion(model, outtype="q4_k_m", outfile=file)
    (shard,) = plan.shards
    rng, known = np.random.default_rng(9), dict[tuple[str, int], Any]()
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        stream.write(shard.header)
        for part in shard.parts:
            stream.seek(len(shard.header) + part.offset)
            for rows in drawn(part, rng, known):
                stream.write(rows.tobytes())
        stream.truncate(shard.n_bytes)
    return partial.rename(file)


def drawn(part: Part, rng: np.random.Generator, known: dict[tuple[str, int], Any]) -> Any:
    """The bytes of a tensor, some rows at a time."""
    columns = part.shape[-1]
    if part.dtype == "f32":  # vectors, convolutions and norms
        values = 0.3 * rng.standard_normal(part.shape)
        if "norm" in part.name:
            values += 1
        elif part.name.endswith("ssm_a"):
            values = -rng.uniform(0.5, 16, part.shape)
        elif "ssm_dt" in part.name:
            values -= 3
        yield values.astype(np.float32)
        return
    if (part.dtype, columns) not in known:
        codec = codec_named(part.dtype, BlockCodec)
        x = rng.standard_normal((DISTINCT, columns), np.float32) / np.float32(np.sqrt(columns))
        known[part.dtype, columns] = codec.quantizer()(x, None)
    left = int(np.prod(part.shape[:-1]))
    while left:
        count = min(left, TOGETHER)
        yield known[part.dtype, columns][rng.integers(DISTINCT, size=count)]
        left -= count


def measured(command: list[str], directory: Path) -> tuple[float, float, dict[str, Any]]:
    """Wall seconds, peak megabytes and the JSON object that a command prints."""
    printed = directory / "printed.json"
    wall, peak = run(["sh", "-c", 'out=$1; shift; "$@" > "$out"', "sh", str(printed), *command])
    return wall, peak, json.loads(printed.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, default=Path("bench"), help="where the files go")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tokens", type=int, default=9, help="new tokens of the longer run")
    parser.add_argument("--keep", action="store_true", help="do not remove the 5.9 GB afterwards")
    options = parser.parse_args()
    directory = options.directory
    directory.mkdir(exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    file = make_file(directory)
    size = file.stat().st_size
    print(f"{size / 1e9:.2f} GB, {options.threads} threads", flush=True)
    command = [sys.executable, "-m", "bamba_quant_cli"]
    generate = [*command, "generate", str(file), "--prompt", PROMPT, "--json", "--max-tokens"]
    first, _, _ = measured([*generate, "1"], directory)
    last, peak, found = measured([*generate, str(options.tokens)], directory)
    rate = (options.tokens - 1) / (last - first)
    print(
        f"generate: {first:.1f} s to the first token, then {rate:.2f} tokens/s; peak {peak:.0f} MB, "
        f"{peak * 1e6 / size:.2f} × the file; backend {found['backend']}",
        flush=True,
    )
    text = random_text(directory / "random.txt", 400)
    score = [*command, "perplexity", str(file), "--text", str(text), "--json"]
    for ctx in (128, 512):
        wall, peak, found = measured([*score, "--ctx", str(ctx), "--chunks", "2"], directory)
        print(
            f"perplexity of 2 × {ctx} tokens: {found['perplexity']:.1f}, {wall:.1f} s; peak {peak:.0f} MB, "
            f"{peak * 1e6 / size:.2f} × the file",
            flush=True,
        )
    llama = [sys.executable, "-c", LLAMA, str(file), str(options.threads), str(options.tokens - 1), PROMPT]
    _, peak, theirs = measured(llama, directory)
    print(
        f"llama.cpp: {theirs['prompt']:.2f} s for {theirs['prompt_tokens']} tokens of prompt, then "
        f"{1 / theirs['token']:.2f} tokens/s; peak {peak:.0f} MB"
    )
    if not options.keep:
        file.unlink()


if __name__ == "__main__":
    main()
