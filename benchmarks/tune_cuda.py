"""Tuning Bamba-9B's exact shape on one GPU, in bfloat16, a layer at a time: `python -m benchmarks.tune_cuda`.

A checkpoint with random weights is made on the GPU (19.6 GB) and quantized like Q4_K_M. A process of its own then tunes
that file for --steps steps, and for a few with plain torch's operations and gradients in the place of the kernels, and
in --small bytes of the GPU. The time of an epoch over 3.7 million tokens is computed: what the process takes besides
its steps, plus as many steps as the tokens fill at the measured rate; the table says so. With --costs allocation's
sensitivities of all tensors are measured too, in files made of the same checkpoint.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import points
from benchmarks.bamba_9b import LAYERS, card, make_pair, place
from benchmarks.checkpoints import random_text
from benchmarks.points import Point

TOKENS = 3_700_000
PARTS = ["kernels", "plain", "small"]
_LIMIT = 774e12  # operations a second of bfloat16 products on an H200, as measured (benchmarks.forward_cuda)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--steps", type=int, default=60, help="of 12,288 tokens")
    parser.add_argument("--few", type=int, default=6, help="steps of what is only compared with")
    parser.add_argument("--ctx", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--small", default="24GB")
    parser.add_argument("--costs", type=int, metavar="CHUNKS", help="measure sensitivities on so many chunks")
    parser.add_argument("--formats", default="q2_k,q3_k,iq4_xs,q4_k,q5_k,q6_k,q8_0", help="of --costs")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--directory", type=Path, help="where 25 GB of files go; a temporary one by default")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    points.add_option(parser)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(tuned(**json.loads(options.child))))
        return
    found = []
    with place(options.directory) as directory:
        pair = make_pair(directory, options.layers, "cuda")
        print(f"made in {pair.making:.0f} s, quantized in {pair.converting:.0f} s", flush=True)
        text = random_text(directory / "text.txt", 200_000)
        whole = {"model": str(pair.model), "quantized": str(pair.q4_k_m), "text": str(text)}
        few = whole | {"steps": options.few, "ctx": options.ctx[0]}
        for ctx in options.ctx if "kernels" in options.only else ():
            steps = options.steps if ctx == options.ctx[0] else options.few
            found += _points(_run(whole | {"steps": steps, "ctx": ctx}), ctx, epoch=ctx == options.ctx[0])
        if "plain" in options.only:
            plain = _run(few | {"plain": True, "batch": 8})
            print(f"plain torch: {plain['rate']:,.0f} tokens/s, {plain['memory'] / 1e9:.1f} GB", flush=True)
        if "small" in options.only:
            small, most = _run(few | {"max_memory": _bytes(options.small)}), _bytes(options.small)
            measured = f"{small['memory'] / 1e9:.1f} GB; {small['rate']:,.0f} tokens/s, an epoch in"
            measured += f" {small['epoch'] / 60:.0f} min"
            within = small["memory"] <= most
            found.append(Point(f"tuning in {options.small}", f"≤ {options.small}", measured, within))
        if options.costs:
            found.append(_costs(pair.model, text, options.costs, options.formats))
    print(card("cuda"))
    print(points.table(found))
    points.write(found, options.points)


def _bytes(text: str) -> int:
    return int(float(text.removesuffix("GB")) * 1e9)


def _last(command: list[str]) -> Any:
    """The JSON in the last line that a process prints."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def _run(job: dict[str, Any]) -> dict[str, Any]:
    began = time.perf_counter()
    row = _last([sys.executable, "-m", "benchmarks.tune_cuda", "--child", json.dumps(job)])
    whole = time.perf_counter() - began
    row["besides"] = whole - row["stepping"]
    row["epoch"] = row["besides"] + TOKENS / row["rate"]
    print(json.dumps(job | row), flush=True)
    return row


def _points(row: dict[str, Any], ctx: int, *, epoch: bool) -> list[Point]:
    share = row["rate"] * row["operations"] / _LIMIT
    what = f"tuning, sequences of {ctx:,}"
    found = [
        Point(
            f"{what}: tokens a second",
            "≥ 4,100, 50 % of the products' limit",
            f"{row['rate']:,.0f}, {share:.0%}",
            row["rate"] >= 4100 and share >= 0.5,
        ),
        Point(f"{what}: memory", "≤ 130 GB", f"{row['memory'] / 1e9:.1f} GB", row["memory"] <= 130e9),
    ]
    if epoch:
        said = f"{row['epoch'] / 60:.1f} min, computed of {row['steps']} steps"
        found.append(Point(f"{what}: an epoch of 3.7 million tokens", "≤ 30 min", said, row["epoch"] <= 1800))
    return found


def tuned(
    model: str,
    quantized: str,
    text: str,
    steps: int,
    ctx: int,
    plain: bool = False,
    max_memory: int | None = None,
    batch: int = 24,
) -> dict[str, Any]:
    """One run of tuning in this process: tokens a second of its steps, the most memory, operations a token."""
    import torch

    from bamba_quant.calibration import by_layer, units
    from bamba_quant.calibration.tune import tune
    from bamba_quant.calibration.tune_options import TuneOptions
    from bamba_reference.torch.backend import TORCH

    if plain:
        by_layer.backends = units.backends = lambda device: (TORCH, TORCH)
    times: list[float] = []
    # As many tokens a step whatever their sequences.
    options = TuneOptions(
        steps=steps, ctx=ctx, batch=batch * 512 // ctx, dtype="bfloat16", device="cuda", max_memory=max_memory,
        held_out=32 * 512 // ctx, evaluations=1,
    )  # fmt: skip

    def tell(progress: Any) -> None:
        torch.cuda.synchronize()
        times.append(time.perf_counter())

    def note(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    by_layer.ByLayer.advance = _timed(by_layer.ByLayer.advance, times)
    result = tune(Path(model), Path(quantized), [Path(text)], options, note=note)
    warm = len(times) // 4 + 1
    tokens = options.batch * ctx if options.batch else 0
    rate = (len(times) - warm) * tokens / (times[-1] - times[warm - 1])
    return {
        "rate": rate,
        "stepping": times[-1] - times[0],
        "steps": steps,
        "memory": torch.cuda.max_memory_reserved(),
        "operations": _operations(model),
        "before": result.record.held_out_kld_before,
        "after": result.record.held_out_kld_after,
    }


def _timed(advance: Any, times: list[float]) -> Any:
    """``advance`` that notes when each step has ended."""
    import torch

    def timed(*arguments: Any) -> Any:
        loss = advance(*arguments)
        torch.cuda.synchronize()
        times.append(time.perf_counter())
        return loss

    return timed


def _operations(model: str) -> float:
    """Operations a token of the products: two passes of the student and one of the original, and back twice one."""
    from bamba_quant.inference.loading import load_model
    from bamba_reference.tensors import EMBEDDING, tensor_shapes

    shapes = tensor_shapes(load_model(model).config)
    matrices = sum(
        shape[0] * shape[1] for name, shape in shapes.items() if len(shape) == 2 and name != EMBEDDING
    )
    return 2.0 * matrices * 5


def _costs(model: Path, text: Path, chunks: int, formats: str) -> Point:
    """Sensitivities of all tensors by gradients; making the candidates' files is told apart."""
    code = (
        "import json, sys, time; from pathlib import Path\n"
        "from bamba_quant.calibration.costs import Measuring, text_costs\n"
        "times = {}\n"
        "def tell(what, done, total):\n    times.setdefault(what.split()[0], time.perf_counter())\n"
        "options = Measuring(chunks=int(sys.argv[3]), device='cuda', dtype='bfloat16', refine=False)\n"
        "formats = sys.argv[4].split(',')\n"
        "text_costs(Path(sys.argv[1]), [Path(sys.argv[2])], options, formats=formats, progress=tell)\n"
        "end = time.perf_counter()\n"
        "print(json.dumps([times['measuring'] - times['quantizing'], end - times['measuring']]))\n"
    )
    making, measuring = _last([sys.executable, "-c", code, str(model), str(text), str(chunks), formats])
    said = (
        f"{measuring / 60:.1f} min on {chunks} chunks, {formats}, after {making / 60:.1f} min of quantizing"
    )
    return Point("sensitivities of all tensors", "≤ 5 min", said, measuring <= 300)


if __name__ == "__main__":
    main()
