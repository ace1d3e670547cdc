"""``generate`` and ``perplexity`` of a Q4_K_M of Bamba-9B's exact shape, beside llama.cpp on the same file and cores.

    python benchmarks/generate_large.py [--threads N] [--keep]

prints the commands' peak memory, and for both programs the seconds of a prompt and of each new token: of the clock, and
of the processors, which other work on the machine changes less. The file (5.9 GB) has the metadata that ``convert``
writes and random weights: rows of a few that were quantized, in random order.
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

# Each defines eval(ids), which returns the likeliest next token.
OURS = """
from pathlib import Path
import torch
from bamba_quant.inference.loading import load_model_and_tokenizer
from bamba_quant.inference.ready import ready_model
from bamba_reference.torch.forward import forward, new_state
loaded, encoder = load_model_and_tokenizer(Path(file))
model = ready_model(loaded, torch.device("cpu"), torch.float32, weights="stored")
state, ids = new_state(model, 1), encoder.encode(prompt)
@torch.no_grad()
def eval(ids):
    return int(forward(model, [ids], state=state, logits_to_keep=1).logits.argmax())
"""
LLAMA = """
import numpy as np
from llama_cpp import Llama
model = Llama(file, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
ids = model.tokenize(prompt.encode())
def eval(ids):
    model.eval(ids)
    return int(np.argmax(model.scores[model.n_tokens - 1]))
"""
TIMED = """
import json, sys, time
file, threads, count, prompt = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
def now():
    return time.perf_counter(), time.process_time()
{eval}
times = [now()]
tokens = [eval(ids)]
times.append(now())
for _ in range(count):
    tokens.append(eval(tokens[-1:]))
times.append(now())
spent = [[after - before for before, after in zip(*pair)] for pair in zip(times, times[1:])]
print(json.dumps({{"ids": len(ids), "prompt": spent[0], "token": [each / count for each in spent[1]]}}))
"""


def make_file(directory: Path) -> Path:
    file = directory / "bamba-9b-random-q4_k_m.gguf"
    if file.is_file():
        return file
    model = directory / "bamba-9b-config"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(BAMBA_9B))
    write_tokenizer(model, BAMBA_9B["bos_token_id"])
    plan = plan_conversion(model, outtype="q4_k_m", outfile=file, allow_config_only=True)
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
    parser.add_argument("--tokens", type=int, default=8, help="new tokens")
    parser.add_argument("--keep", action="store_true", help="do not remove the 5.9 GB afterwards")
    options = parser.parse_args()
    directory = options.directory
    directory.mkdir(exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    file = make_file(directory)
    size = file.stat().st_size
    print(f"{size / 1e9:.2f} GB, {options.threads} threads", flush=True)
    command = [sys.executable, "-m", "bamba_quant_cli"]
    text = random_text(directory / "random.txt", 400)
    score = ["perplexity", str(file), "--text", str(text), "--chunks", "2", "--ctx"]
    for more in (
        ["generate", str(file), "--prompt", PROMPT, "--max-tokens", str(options.tokens)],
        [*score, "128"],
        [*score, "512"],
    ):
        wall, peak, found = measured([*command, *more, "--json"], directory)
        print(
            f"{more[0]}, {more[-2].strip('-')} {more[-1]}: {wall:.0f} s; peak {peak:.0f} MB, "
            f"{peak * 1e6 / size:.2f} × the file; backend {found['backend']}",
            flush=True,
        )
    for name, code in (("bamba-quant", OURS), ("llama.cpp", LLAMA)):
        command = [sys.executable, "-c", TIMED.format(eval=code)]
        _, peak, found = measured(
            [*command, str(file), str(options.threads), str(options.tokens), PROMPT], directory
        )
        (prompt, prompt_work), (token, token_work) = found["prompt"], found["token"]
        print(
            f"{name}: prompt of {found['ids']} tokens {prompt:.2f} s ({prompt_work:.2f} s of the processors), "
            f"then {token:.2f} s a token ({token_work:.2f} s), {1 / token:.2f} tokens/s; peak {peak:.0f} MB",
            flush=True,
        )
    if not options.keep:
        file.unlink()


if __name__ == "__main__":
    main()
