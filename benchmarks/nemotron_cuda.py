"""Measures Nemotron 3 Nano's exact shape on one GPU beside transformers: `python -m benchmarks.nemotron_cuda`.

31.6 billion random weights, bfloat16, are made on the GPU and shared by all paths; 128 experts of 1,856, six a token.
Printed are the experts of one layer by themselves, in each way that they can run, and prefill of 4 × 2,048 tokens with
full logits, as tokens per second and as a share of the rate of one large matrix product. The paths take turns; figures
are medians, after a run of each that is not counted. In float32 the logits of a few layers are compared first.
transformers runs its experts by torch's grouped products, which is its default; its scan and its convolution are in
torch, and those of mamba_ssm and causal_conv1d where these are installed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import peers, points, transformers_cuda
from benchmarks.forward_cuda import LENGTH, ROWS, profile, turns
from benchmarks.points import Point
from benchmarks.transformers_cuda import CONVOLUTION, SCAN, TORCH_ONLY, draw, in_torch, paths
from tests.support.published import PUBLISHED

NANO_3 = PUBLISHED["nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"].config
OURS = "reference, triton"


def shape(layers: int) -> dict[str, Any]:
    letters = NANO_3["hybrid_override_pattern"][:layers]
    return NANO_3 | {"hybrid_override_pattern": letters, "num_hidden_layers": len(letters)}


def oracle(layers: int, dtype: torch.dtype) -> Any:
    """transformers' model on the GPU. Its lower limit of dt is none, as in NVIDIA's own code."""
    peers.let_mamba_ssm_be_imported()
    from transformers import AutoConfig, NemotronHForCausalLM

    config = AutoConfig.for_model(**shape(layers) | {"time_step_min": 1e-30})
    with torch.device("meta"):
        model = NemotronHForCausalLM(config).to(dtype)
    model = model.to_empty(device="cuda").eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        draw(name, parameter)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias = torch.randn(config.n_routed_experts, device="cuda") / 20
    return model


def reference(theirs: Any, layers: int, dtype: torch.dtype, backend: str = "triton") -> Any:
    """The reference's model of the same weights."""
    from bamba_quant.families import family_of, read_config
    from bamba_reference.backends import backend_named
    from bamba_reference.torch.forward import load

    hf, cuda = shape(layers), torch.device("cuda")
    config, given = read_config(hf), theirs.state_dict()
    weights = {
        rule.name: next(given[name] for name in rule.hf_names if name in given)
        for rule in family_of(hf).tensors(config)
        if not rule.skipped
    }
    return load(config, weights, dtype=dtype, device=cuda, backend=backend_named(backend, cuda, dtype))


def agreement(layers: int) -> list[Point]:
    """The logits of 256 tokens after a few layers, in float32."""
    from bamba_reference.torch.forward import forward

    theirs = oracle(layers, torch.float32)
    ids = np.random.default_rng(1).integers(NANO_3["vocab_size"], size=(1, 256))
    with in_torch((*SCAN, *CONVOLUTION)):
        truth = theirs(torch.from_numpy(ids).cuda(), use_cache=False).logits
    found = forward(reference(theirs, layers, torch.float32), ids).logits
    error = ((found - truth).norm() / truth.norm()).item()
    what = f"Nemotron 3 Nano's first {layers} layers, float32, logits beside transformers'"
    return [Point(what, "<= 1e-3", f"{error:.1e}", error <= 1e-3)]


def by_grouped_products(
    x: Tensor, chosen: Tensor, weights: Tensor, gate: None, up: Tensor, down: Tensor
) -> Tensor:
    """``Backend.experts`` of ReLU² networks by torch's grouped products."""
    (T, k), count = chosen.shape, len(up)
    expert, pair = chosen.flatten().sort()
    ends = torch.searchsorted(expert, torch.arange(count, device=x.device), right=True).to(torch.int32)
    hidden = torch._grouped_mm(x[pair // k], up.transpose(-2, -1), offs=ends).relu().square()
    out = torch._grouped_mm(hidden, down.transpose(-2, -1), offs=ends)
    sorted_back = torch.empty_like(out).index_copy_(0, pair, out).view(T, k, -1)
    return (sorted_back.float() * weights[..., None]).sum(1)


def experts(model: Any, repeats: int, tune: bool) -> None:
    """The experts of the first layer that has them, for one prefill's tokens, in each way and as a rate."""
    from triton.runtime.errors import OutOfResources

    from bamba_reference.kernels.experts import ExpertTuning
    from bamba_reference.kernels.experts import experts as by_triton

    layer = model.config.layers_of("moe")[0]
    up, down = (model.weights[f"model.layers.{layer}.moe.{name}_proj.weight"] for name in ("up", "down"))
    tokens, k = ROWS * LENGTH, model.config.num_experts_per_tok
    x = torch.randn(tokens, up.shape[-1], device="cuda", dtype=up.dtype)
    ranks = torch.randn(tokens, len(up), device="cuda") + torch.randn(len(up), device="cuda") / 3
    chosen, weights = ranks.topk(k).indices, torch.rand(tokens, k, device="cuda")
    tunings = [ExpertTuning()]
    if tune:
        sizes = itertools.product((64, 128), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4))
        tunings = [ExpertTuning(*size) for size in sizes]
    runs: dict[str, Callable[[], object]] = {
        f"Triton, {tuning}": partial(by_triton, x, chosen, weights, None, up, down, tuning)
        for tuning in tunings
    }
    if hasattr(torch, "_grouped_mm"):
        runs["torch's grouped products"] = partial(by_grouped_products, x, chosen, weights, None, up, down)
    possible = {}
    for name, run in runs.items():
        try:
            run()
            torch.cuda.synchronize()
            possible[name] = run
        except (RuntimeError, OutOfResources) as error:  # too large a tile, or no such product
            print(f"  {name}: {str(error).splitlines()[0][:90]}")
    work = 2 * tokens * k * 2 * up[0].numel()
    print(f"experts of one layer, {tokens} tokens")
    for name, each in sorted(turns(possible, repeats).items(), key=lambda found: found[1]):
        print(f"  {name:90}{1e3 * each:8.2f} ms  {work / each / 1e12:6.0f} TFLOP/s", flush=True)


def prefill(theirs: Any, model: Any, repeats: int) -> list[Point]:
    from bamba_reference.torch.forward import forward

    ids = np.random.default_rng(0).integers(model.config.vocab_size, size=(ROWS, LENGTH))
    on_gpu = torch.from_numpy(ids).cuda()

    def their(path: str, names: Sequence[str]) -> None:
        with in_torch(names):
            transformers_cuda.prefill(theirs, on_gpu, path == TORCH_ONLY)

    runs: dict[str, Callable[[], object]] = {
        path: partial(their, path, names) for path, names in paths().items()
    }
    found = turns(runs | {OURS: lambda: forward(model, ids)}, repeats)
    large = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    rate = 2 * 8192**3 / (turns({"": lambda: [large @ large for _ in range(10)]}, 3)[""] / 10)
    used = model.config.num_experts_per_tok / model.config.num_local_experts
    active = sum(
        weight.numel() * (used if weight.dim() == 3 else 1)
        for name, weight in model.weights.items()
        if weight.dim() > 1 and "embed_tokens" not in name and "conv1d" not in name
    )
    share = {name: 2 * ids.size * active / each / rate for name, each in found.items()}
    print(f"prefill {ROWS} × {LENGTH}, full logits; a large product: {rate / 1e12:.0f} TFLOP/s")
    for name, each in found.items():
        print(
            f"  {name:42}{ids.size / each:10,.0f} tokens/s  {1e3 * each:8.1f} ms  {found[name] / found[OURS]:5.2f} × "
            f"triton's time  {100 * share[name]:4.0f} % of that rate",
            flush=True,
        )
    best = min(each for name, each in found.items() if name != OURS)
    ratio = best / found[OURS]
    told = f"{ratio:.2f} × ({ids.size / found[OURS]:,.0f} tokens/s, {100 * share[OURS]:.0f} % of the matrix rate)"
    what = (
        f"Nemotron 3 Nano's shape, prefill, bfloat16, {ROWS} × {LENGTH} tokens, beside transformers' best way"
    )
    return [Point(what, ">= 1.3 ×", told, ratio >= 1.3)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=NANO_3["num_hidden_layers"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tune", action="store_true", help="the experts with tiles of other sizes")
    parser.add_argument("--profile", action="store_true", help="show where the time goes")
    points.add_option(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU")
    torch.set_grad_enabled(False)
    import transformers

    from bamba_reference.torch.forward import forward

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{torch.cuda.get_device_name()}, {versions}, {', '.join(paths())}")
    held = agreement(min(8, options.layers))
    print(held[0])
    theirs = oracle(options.layers, torch.bfloat16)
    model = reference(theirs, options.layers, torch.bfloat16)
    experts(model, options.repeats, options.tune)
    if options.profile:
        ids = np.random.default_rng(0).integers(model.config.vocab_size, size=(ROWS, LENGTH))
        profile("prefill", lambda: forward(model, ids))
    held += prefill(theirs, model, options.repeats)
    points.write(held, options.points)


if __name__ == "__main__":
    main()
