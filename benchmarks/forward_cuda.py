"""Measures a model of Bamba-9B's exact shape on one GPU beside transformers: `python -m benchmarks.forward_cuda`.

Weights are random, bfloat16, made on the GPU and shared by all paths; --model falcon-h1-7b takes Falcon-H1-7B's shape.
Printed are the limits of the machine (its matrix products at the model's shapes, its copies), prefill of 4 × 2,048
tokens with full logits, greedy decoding of one sequence, and the error of 512 tokens' logits against float32. The paths
take turns; figures are medians, after a run of each that is not counted, but for decoding, where one run of many tokens
less one of few is a figure. transformers runs in torch alone, a row at a time, and where these are installed with
mamba_ssm's Triton kernels and with causal_conv1d's convolution besides.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import points, transformers_cuda
from benchmarks.points import Point
from benchmarks.transformers_cuda import (
    SHAPES,
    TORCH_ONLY,
    WITH_BOTH,
    WITH_SCAN,
    in_torch,
    oracle,
    paths,
    shape,
)

ROWS, LENGTH = 4, 2048

OURS = "reference, triton"
# Of each model, the least tokens/s of a prefill and how many times transformers' speed, by what that runs with.
LEAST: dict[str, tuple[int, dict[str, float]]] = {
    "bamba-9b": (31_000, {WITH_SCAN: 1.35, WITH_BOTH: 1.0, TORCH_ONLY: 2.9}),
    "falcon-h1-7b": (0, {WITH_SCAN: 1.3, WITH_BOTH: 1.0, TORCH_ONLY: 1.3}),
}


def seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def turns(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    found: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            found[name].append(seconds(run))
    return {name: statistics.median(times) for name, times in found.items()}


def limits(model: Any) -> tuple[float, float]:
    """Seconds of the matrix products of a prefill, each shape measured alone; bytes a second of a copy."""
    tokens, products = ROWS * LENGTH, 0.0
    layers = [name for name in model.weights if name.endswith("proj.weight")]
    shapes: dict[tuple[int, ...], int] = {}
    for name in layers:
        size = tuple(model.weights[name].shape)
        shapes[size] = shapes.get(size, 0) + 1
    for (out, terms), count in [*shapes.items(), ((model.config.vocab_size, model.config.hidden_size), 1)]:
        x = torch.randn(tokens, terms, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(out, terms, device="cuda", dtype=torch.bfloat16) * terms**-0.5
        y = torch.empty(tokens, out, device="cuda", dtype=torch.bfloat16)

        def product(x: Tensor = x, w: Tensor = w, y: Tensor = y) -> None:
            for _ in range(10):
                torch.mm(x, w.t(), out=y)

        each = turns({"": product}, 3)[""] / 10
        products += count * each
        rate = 2e-12 * tokens * out * terms / each
        print(f"  {count:3} × ({tokens}, {terms}) by ({out}, {terms})ᵀ: {rate:6.0f} TFLOP/s", flush=True)
    source = torch.randn(1 << 30, device="cuda")  # 4 GB
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / (turns({"": lambda: [target.copy_(source) for _ in range(5)]}, 3)[""] / 5)
    print(f"  products alone {tokens / products:,.0f} tokens/s; copy {copy / 1e12:.2f} TB/s", flush=True)
    return products, copy


def prefill(
    name: str, theirs: Any, models: dict[str, Any], ids: np.ndarray, repeats: int, products: float
) -> list[Point]:
    from bamba_reference.torch.forward import forward

    on_gpu = torch.from_numpy(ids).cuda()

    def their(path: str, names: Sequence[str]) -> None:
        with in_torch(names):
            transformers_cuda.prefill(theirs, on_gpu, path == TORCH_ONLY)

    runs: dict[str, Callable[[], object]] = {
        path: partial(their, path, names) for path, names in paths().items()
    }
    for backend, model in models.items():
        runs[f"reference, {backend}"] = partial(forward, model, ids)
    found, peak = turns(runs, repeats), {}
    for path, run in runs.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        peak[path] = torch.cuda.max_memory_allocated() / 2**30
    print(f"prefill {ROWS} × {LENGTH}, full logits")
    best = found[OURS]
    for path, each in found.items():
        print(
            f"  {path:42}{ids.size / each:10,.0f} tokens/s  {1e3 * each:8.1f} ms  {each / best:5.2f} × triton's time  "
            f"{100 * products / each:4.0f} % of the products alone  peak {peak[path]:5.1f} GiB",
            flush=True,
        )
    rate, share = ids.size / best, products / best
    (fastest, ratios), what = LEAST[name], f"{name}, prefill, bfloat16, {ROWS} × {LENGTH} tokens"
    held = [
        Point(f"{what}, tokens/s", f">= {fastest:,}", f"{rate:,.0f}", rate >= fastest),
        Point(f"{what}, of its matrix products alone", ">= 75 %", f"{100 * share:.0f} %", share >= 0.75),
    ]
    for path, least in ratios.items():
        ratio = found[path] / best if path in found else 0.0
        told = f"{ratio:.3f} × ({ids.size / found[path]:,.0f} tokens/s)" if ratio else "not installed"
        held.append(Point(f"{what}, beside {path}", f">= {least} ×", told, ratio >= least if ratio else None))
    return held


def decode(theirs: Any, models: dict[str, Any], prompt: list[int], new: int, copy: float) -> list[Point]:
    from bamba_reference.runtime.generate import generate

    ids = torch.tensor([prompt], device="cuda")

    def their(names: Sequence[str], count: int) -> None:
        with in_torch(names):
            theirs.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)

    runs: dict[str, tuple[Callable[[int], object], int]] = {
        path: (partial(their, names), 24) for path, names in paths().items()
    }
    for name, model in models.items():
        many = new if model.backend.decoder else 24
        runs[f"reference, {name}"] = (
            lambda count, model=model: list(generate(model, prompt, max_new_tokens=count, stop=[])),
            many,
        )
    first = next(iter(models.values()))
    read = sum(t.nbytes for name, t in first.weights.items() if "embed_tokens" not in name)
    limit, rates = copy / read, {}
    print(f"greedy decoding, batch 1; reading {read / 1e9:.2f} GB of weights allows {limit:.0f} tokens/s")
    for name, (run, count) in runs.items():
        run(4)
        # The difference of two lengths leaves out the prompt and the recording.
        short, long = seconds(partial(run, 4)), seconds(partial(run, count + 4))
        rates[name] = count / (long - short)
        print(
            f"  {name:42}{rates[name]:8.1f} tokens/s  {100 * rates[name] / limit:4.0f} % of the limit",
            flush=True,
        )
    share = rates[OURS] / limit
    best = max(rate for name, rate in rates.items() if name in paths())
    told = f"{100 * share:.0f} % ({rates[OURS]:.0f} of {limit:.0f} tokens/s; transformers at best {best:.0f})"
    return [Point("greedy decoding, batch 1, of reading the weights once", ">= 70 %", told, share >= 0.7)]


def errors(theirs: Any, models: dict[str, Any], ids: np.ndarray) -> list[Point]:
    """Against the same weights in float32 throughout; D the mean divergence of the next token, in nats."""
    from dataclasses import replace

    from bamba_reference.torch.backend import TORCH
    from bamba_reference.torch.forward import forward

    first = next(iter(models.values()))
    wide = {name: tensor.float() for name, tensor in first.weights.items()}
    exact = replace(first, weights=wide, dtype=torch.float32, backend=TORCH)
    truth = forward(exact, ids).logits
    del wide, exact
    on_gpu = torch.from_numpy(ids).cuda()
    found = {}
    for path, names in paths().items():
        with in_torch(names):
            found[path] = theirs(on_gpu, use_cache=False).logits
    for name, model in models.items():
        found[f"reference, {name}"] = forward(model, ids).logits
    log_p = truth.log_softmax(-1)
    print(f"logits of {ids.size} tokens against float32")
    error = {}
    for name, logits in found.items():
        error[name] = ((logits.float() - truth).norm() / truth.norm()).item()
        divergence = (log_p.exp() * (log_p - logits.float().log_softmax(-1))).sum(-1).mean().item()
        print(f"  {name:42}{error[name]:10.2e}  D {divergence:.2e}", flush=True)
    least = min(error[path] for path in paths())
    told = f"{error[OURS]:.2e}; transformers at best {least:.2e}"
    what = f"logits of {ids.size} tokens, bfloat16 against float32"
    return [Point(what, "no further than transformers' nearest", told, error[OURS] <= least)]


def profile(what: str, run: Callable[[], object], rows: int = 16) -> None:
    """Where a run's time on the GPU goes, by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    run()
    with record(activities=[ProfilerActivity.CUDA]) as found:
        elapsed = seconds(run)
    events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    busy = sum(event.self_device_time_total for event in events) / 1e3
    print(f"{what}: {1e3 * elapsed:.2f} ms, GPU busy {busy:.2f} ms")
    for event in events[:rows]:
        print(f"  {event.self_device_time_total / 1e3:9.3f} ms {event.count:5} × {event.key[:90]}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="bamba-9b")
    parser.add_argument("--layers", type=int, help="all of the model's by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new", type=int, default=256, help="tokens decoded")
    parser.add_argument("--profile", action="store_true", help="show where the time goes")
    points.add_option(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU")
    torch.set_grad_enabled(False)
    import transformers

    from bamba_quant.families import read_config
    from bamba_reference.backends import backend_named
    from bamba_reference.runtime.generate import generate
    from bamba_reference.torch.backend import TORCH, BackendError
    from bamba_reference.torch.forward import forward, load

    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    keys = shape(options.model, options.layers)
    theirs, config = oracle(keys), read_config(keys)
    cuda = torch.device("cuda")
    backends = [backend_named("triton", cuda, torch.bfloat16), TORCH]
    try:
        backends.append(backend_named("mamba-ssm", cuda, torch.bfloat16))
    except BackendError as error:
        print(f"the reference's backend mamba-ssm is left out: {error}")
    given = dict(theirs.named_parameters())
    models = {
        backend.name: load(config, given, dtype=torch.bfloat16, device=cuda, backend=backend)
        for backend in backends
    }
    ids = np.random.default_rng(0).integers(config.vocab_size, size=(ROWS, LENGTH))
    products, copy = limits(models["triton"])
    if options.profile:
        profile("prefill", lambda: forward(models["triton"], ids))
        prompt = ids[0, :128].tolist()
        profile("decode 32", lambda: list(generate(models["triton"], prompt, max_new_tokens=32, stop=[])))
    held = errors(theirs, models, ids[:1, :512])
    held += prefill(options.model, theirs, models, ids, options.repeats, products)
    held += decode(theirs, models, ids[0, :512].tolist(), options.new, copy)
    points.write(held, options.points)


if __name__ == "__main__":
    main()
