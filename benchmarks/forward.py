"""Measures the reference forward pass beside transformers' torch path, in one run, on this machine's CPU.

    python benchmarks/forward.py --model ../shared/models/bamba-43m

prints tokens per second of transformers, of the differentiable torch backend and of the backend a CPU gets by
itself, and the last one's ratio to the first, for one Mamba layer of Bamba-9B's shape and for the model end to end,
in float32, and the peak memory of a streamed perplexity over 1.8 billion random weights. They take turns; each
figure is the median of --repeats, after a run of each that is not counted. "products alone" are the matrix products
of the line above and nothing else, divided among threads likewise.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

TOKENS = 1024  # of one layer
BATCH = 4, 512  # texts and tokens, end to end

BAMBA_9B: dict[str, Any] = {
    "architectures": ["BambaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "attn_layer_indices": [9, 18, 27],
    "mamba_n_heads": 128,
    "mamba_d_head": 64,
    "mamba_n_groups": 1,
    "mamba_d_state": 128,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
}

# 1.8 billion weights: Bamba-9B's vocabulary and proportions, half as wide, 18 layers.
BAMBA_2B = BAMBA_9B | {
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "attn_layer_indices": [9],
    "mamba_n_heads": 64,
}


def take_turns(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each run, alternating, after one run of each to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


def report(what: str, seconds: dict[str, float], tokens: int, operations: float | None = None) -> None:
    """``operations`` a token, for the rate at which what is measured computes."""
    figures = " ".join(f"{tokens / each:13,.0f}" for each in seconds.values())
    theirs, *_, ours = seconds.values()
    rates = [f"{operations * tokens / each / 1e9:.0f}" for each in seconds.values()] if operations else []
    print(
        f"{what:40} {figures} tok/s {theirs / ours:6.2f} ×"
        + (f"  GFLOP/s {', '.join(rates)}" if rates else ""),
        flush=True,
    )


def report_products(
    seconds: dict[str, float], batch: tuple[int, int], shapes: list[tuple[int, int]], repeats: int
) -> None:
    """Products alone of (out, in) ``shapes``, each with weights of its own, divided among threads as ``forward`` does.

    ``batch`` is texts and tokens of each; ``seconds`` are those of the whole.
    """
    import torch
    import torch.nn.functional as F  # noqa: N812

    from bamba_reference.runtime.workers import Workers

    rows = {K: torch.randn(*batch, K) for _, K in shapes}
    weights = [torch.randn(shape) for shape in shapes]

    def multiply(linear: Callable[..., torch.Tensor], texts: slice, *others: Any) -> None:
        for weight in weights:
            linear(rows[weight.shape[1]][texts], weight, *others)

    def divided(linear: Callable[..., torch.Tensor]) -> None:
        with Workers(torch.device("cpu"), batch[0]) as workers:
            size = -(-batch[0] // workers.count)
            texts = [slice(start, start + size) for start in range(0, batch[0], size)]
            list(workers.map(lambda some: multiply(linear, some, None, ""), texts))

    runs = {name: functools.partial(divided, ops.linear) for name, ops in backends().items()}
    products = take_turns(
        {"transformers": functools.partial(multiply, F.linear, slice(None))} | runs, repeats
    )
    report("  products alone", products, batch[0] * batch[1], 2 * sum(N * K for N, K in shapes))
    shares = " ".join(f"{products[name] / whole:13.0%}" for name, whole in seconds.items())
    print(f"{'  their share of the time':40} {shares}", flush=True)


def backends() -> dict[str, Any]:
    """The pure torch backend, and the one that a CPU gets by itself."""
    import torch

    from bamba_reference.backends import backend_named

    cpu = torch.device("cpu")
    chosen = backend_named("auto", cpu, torch.float32)
    return {"torch": backend_named("torch", cpu, torch.float32), chosen.name: chosen}


def one_layer(repeats: int) -> None:
    """A mixer of Bamba-9B's shape: whole, without its two projections, and the scan alone."""
    import torch
    from transformers import BambaConfig
    from transformers.models.bamba.modeling_bamba import BambaMixer, mamba2_chunk_scan

    from bamba_quant.families import read_config
    from bamba_reference.packing import layout
    from bamba_reference.tensors import layer_prefix
    from bamba_reference.torch import forward as torch_forward
    from bamba_reference.torch.backend import Backend
    from bamba_reference.torch.blocks import BLOCKS, LayerWeights
    from bamba_reference.torch.scan import ScanArguments

    torch.manual_seed(0)
    oracle = BambaMixer(BambaConfig(**BAMBA_9B), layer_idx=0).eval()
    config = read_config(BAMBA_9B)
    weights = {f"{layer_prefix(0)}mamba.{name}": value for name, value in oracle.state_dict().items()}
    cpu, chunk = torch.device("cpu"), torch_forward.default_chunk(torch.device("cpu"))
    sequences = torch_forward.prepare(config, layout((1, TOKENS)), torch.float32, cpu)
    u = torch.randn(1, TOKENS, config.hidden_size)
    projected = oracle.in_proj(u)

    def given(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, name: str) -> torch.Tensor:
        return projected if name.endswith("mamba.in_proj.weight") else x

    def mixer(backend: Backend) -> torch.Tensor:
        model = torch_forward.Model(config, weights, torch.float32, cpu, backend, chunk)
        return BLOCKS["mamba2"](model, LayerWeights(model, layer_prefix(0)), u, sequences, None)

    ours = backends()
    for backend in ours.values():
        difference = (mixer(backend) - oracle(u)).norm() / oracle(u).norm()
        assert difference < 2e-5, f"the layers differ by {difference}"

    def turns(theirs: Callable[[], object], run: Callable[[Backend], object]) -> dict[str, float]:
        runs = {name: functools.partial(run, backend) for name, backend in ours.items()}
        return take_turns({"transformers": theirs} | runs, repeats)

    whole = turns(lambda: oracle(u), mixer)
    report("Bamba-9B mixer", whole, TOKENS)
    projections = [tuple(oracle.in_proj.weight.shape), tuple(oracle.out_proj.weight.shape)]
    report_products(whole, (1, TOKENS), projections, repeats)

    class Given(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return projected

    oracle.in_proj, oracle.out_proj = Given(), torch.nn.Identity()
    report(
        "Bamba-9B mixer without its projections",
        turns(lambda: oracle(u), lambda backend: mixer(dataclasses.replace(backend, linear=given))),
        TOKENS,
    )

    H, P, N = config.mamba_n_heads, config.mamba_d_head, config.mamba_d_state
    x, dt = torch.randn(1, TOKENS, H, P), torch.randn(1, TOKENS, H)
    B, C = torch.randn(1, TOKENS, 1, N), torch.randn(1, TOKENS, 1, N)
    A_log, D, dt_bias = oracle.A_log, oracle.D, oracle.dt_bias
    h = torch.zeros(1, H, P, N)

    def their_scan() -> torch.Tensor:
        A = -A_log.exp()
        return mamba2_chunk_scan(x, dt, A, B, C, chunk_size=256, D=D, dt_bias=dt_bias, dt_softplus=True)

    def our_scan(backend: Backend) -> torch.Tensor:
        limit = config.time_step_limit
        return backend.scan(ScanArguments(x, dt, A_log, B, C, D, dt_bias, limit, h, chunk, None, None))[0]

    report("Bamba-9B scan", turns(their_scan, our_scan), TOKENS)


def end_to_end(directory: Path, repeats: int) -> None:
    import torch
    from transformers import BambaForCausalLM

    from bamba_quant.families import read_config
    from bamba_reference.torch import forward as torch_forward

    oracle = BambaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    config = read_config(json.loads((directory / "config.json").read_text()))
    weights = oracle.state_dict()
    tokens = torch.randint(config.vocab_size, BATCH, generator=torch.Generator().manual_seed(0))
    runs: dict[str, Callable[[], object]] = {
        "transformers": lambda: oracle(tokens, use_cache=False).logits,
    }
    for name, backend in backends().items():
        model = torch_forward.load(config, weights, backend=backend)
        runs[name] = functools.partial(torch_forward.forward, model, tokens)
    seconds = take_turns(runs, repeats)
    report(f"{directory.name} end to end", seconds, BATCH[0] * BATCH[1])
    matrices = {name: w for name, w in weights.items() if w.dim() == 2 and "embed_tokens" not in name}
    report_products(seconds, BATCH, [tuple(w.shape) for w in matrices.values()], repeats)


class RandomWeights(Mapping[str, np.ndarray]):
    """A bfloat16 checkpoint on disk, one file a tensor, each mapped into memory anew when it is read."""

    def __init__(self, directory: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        self.directory, self.shapes = directory, shapes
        numbers = np.random.default_rng(0).standard_normal(1 << 22, np.float32)
        for name, shape in shapes.items():
            left = int(np.prod(shape))
            scaled = (numbers * shape[-1] ** -0.5).astype(ml_dtypes.bfloat16)
            with (directory / name).open("wb") as file:
                while left > 0:
                    file.write(scaled[:left].tobytes())
                    left -= len(scaled)

    def __getitem__(self, name: str) -> np.ndarray:
        return np.memmap(self.directory / name, ml_dtypes.bfloat16, "r", shape=self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def streamed_memory() -> None:
    """In a process of its own, because a peak is a process's."""
    from bamba_quant.families import read_config
    from bamba_reference.runtime.perplexity import perplexity, stream_scorer
    from bamba_reference.tensors import tensor_shapes

    config = read_config(BAMBA_2B)
    shapes = tensor_shapes(config)
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=4 * 512)
    with tempfile.TemporaryDirectory() as directory:
        source = RandomWeights(Path(directory), shapes)
        start = time.perf_counter()
        scorer = stream_scorer(config, source, backend=[*backends().values()][-1])
        found = perplexity(scorer, tokens, vocab_size=config.vocab_size)
        seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) / 2**20
    print(
        f"streamed perplexity, {count / 1e9:.2f} billion bfloat16 weights, "
        f"{found.chunks} chunks of {found.ctx}: peak {peak:.2f} GiB, {seconds:.0f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory, for end to end")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=["layer", "model", "memory"], help="one of the three measurements")
    arguments = parser.parse_args()
    if arguments.only == "memory":
        streamed_memory()
        return
    import torch

    torch.set_grad_enabled(False)
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, float32; "
        f"{TOKENS} tokens of one layer, {BATCH[0]} × {BATCH[1]} end to end"
    )
    print(f"{'':40} " + " ".join(f"{name:>13}" for name in ("transformers", *backends())))
    if arguments.only != "model":
        one_layer(arguments.repeats)
    if arguments.only != "layer":
        end_to_end(arguments.model, arguments.repeats)
    if arguments.only is None:
        command = [sys.executable, __file__, "--model", str(arguments.model), "--only", "memory"]
        subprocess.run(command, check=True, env=os.environ)


if __name__ == "__main__":
    main()
