"""Whether predicted losses of mixtures rank as measured ones do, and how long the search for a large model takes.

    python benchmarks/allocation.py MODEL TEXT [--eval-text FILE] [--device cuda] [--assignments 60] [--imatrix FILE]

Costs come from TEXT by both methods. Random assignments (every tensor in a format drawn for it alone) are then measured
on --eval-text, and their mean divergences are ranked beside the sums of the costs. The search is timed with the
shapes of Bamba-9B and random costs, measuring excluded.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from pathlib import Path

from benchmarks.points import Point, add_option, table, write

CONFIG = Path(__file__).parents[1] / "tests" / "support" / "bamba_9b.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--eval-text", type=Path, help="by default TEXT")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--assignments", type=int, default=60)
    parser.add_argument("--chunks", type=int, default=32, help="that costs are measured on")
    parser.add_argument("--eval-chunks", type=int, default=24)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--no-direct", action="store_true", help="leave out the method of one tensor at a time"
    )
    parser.add_argument("--seed", type=int, default=0)
    add_option(parser)
    options = parser.parse_args()
    points = [*_ranks(options), _search()]
    print(table(points))
    write(points, options.points)


def _ranks(options: argparse.Namespace) -> list[Point]:
    import numpy as np
    import torch

    from bamba_quant.calibration.candidates import FORMATS, quantize_candidates
    from bamba_quant.calibration.costs import spread
    from bamba_quant.calibration.sensitivity import (
        gradient_costs,
        measured_costs,
        measured_divergence,
        targets_of,
    )
    from bamba_quant.calibration.texts import read_texts, token_chunks
    from bamba_quant.inference.loading import load_model_and_tokenizer

    device = torch.device(options.device)
    original, encoder = load_model_and_tokenizer(options.model)
    chunks = spread(token_chunks(encoder, read_texts([options.text]), 512), options.chunks)
    held_out = token_chunks(encoder, read_texts([options.eval_text or options.text]), 512)
    held_out = spread(held_out, options.eval_chunks)
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        candidates = quantize_candidates(options.model, FORMATS, Path(scratch), imatrix=options.imatrix)
        print(f"quantizing {len(FORMATS)} candidates: {time.perf_counter() - started:.1f} s")
        arguments = {"device": device, "batch": options.batch}
        methods = {"gradient": gradient_costs} | ({} if options.no_direct else {"direct": measured_costs})
        costs = {}
        for name, method in methods.items():
            started = time.perf_counter()
            costs[name] = method(original, candidates, chunks, **arguments)
            print(f"costs, {name}: {time.perf_counter() - started:.1f} s")
        targets = targets_of(original, candidates)
        drawn = [{each: draw.choice(each.formats) for each in targets} for _ in range(options.assignments)]
        measured = measured_divergence(original, candidates, drawn, held_out, **arguments)
    points = []
    for name, found in costs.items():
        predicted = [sum(found[each.gguf][kind] for each, kind in some.items()) for some in drawn]
        ranks = np.corrcoef(*(np.argsort(np.argsort(values)) for values in (predicted, measured)))[0, 1]
        ratio = math.exp(np.mean(np.log(np.array(measured) / np.array(predicted))))
        what = (
            f"rank correlation of {len(drawn)} random assignments, {name} (measured / predicted {ratio:.2f})"
        )
        points.append(Point(what, "≥ 0.9", f"{ranks:.3f}", ranks >= 0.9))
    if len(costs) > 1:
        both = [[value for one in each.values() for value in one.values()] for each in costs.values()]
        ranks = np.corrcoef(*(np.argsort(np.argsort(values)) for values in both))[0, 1]
        points.append(Point("rank correlation of the two methods", "≥ 0.9", f"{ranks:.4f}", ranks >= 0.9))
    return points


def _search() -> Point:
    from bamba_quant.calibration.allocation import allocate, known_costs

    with tempfile.TemporaryDirectory() as scratch:
        config = json.loads(CONFIG.read_text())
        (Path(scratch) / "config.json").write_text(json.dumps(config))
        draw = random.Random(0)
        costs = {
            tensor: {name: cost * draw.uniform(0.2, 5) for name, cost in each.items()}
            for tensor, each in known_costs(Path(scratch)).items()
        }
        started = time.perf_counter()
        found = allocate(Path(scratch), costs, like="q4_k_m", allow_config_only=True)
        seconds = time.perf_counter() - started
    what = f"search for Bamba-9B's {len(costs)} tensors, {found.allocated.n_bytes:,} bytes, frontier included"
    return Point(what, "< 600 s", f"{seconds:.1f} s", seconds < 600)


if __name__ == "__main__":
    main()
