"""Measures FP8 products with activations rounded by token on a GPU: `python -m benchmarks.fp8_cuda`.

Bamba-9B's matrices by 8,192 tokens and by one, in bfloat16. Errors are relative, ‖found − truth‖ / ‖truth‖, truth being
the product of the same codes and scales in float64; what leaving activations unrounded changes stands beside them.
Times are medians with a cold L2: the scaled product, of which the rounding; rounded activations by bfloat16 weights,
as where there is no scaled product; and bfloat16 alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812

MATRICES = {"in_proj": (16768, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336)}
TOKENS = (8192, 1)


def main() -> None:
    from bamba_quant.checkpoint.packed import Activations
    from bamba_quant.codecs.fp8.activations import quantize_by_token
    from bamba_quant.evaluation.fp8_activations import (
        has_scaled_products,
        quantized,
        rounded,
        scaled_product,
        weight_codes,
    )
    from benchmarks.contests import milliseconds

    if not torch.cuda.is_available() or not has_scaled_products(torch.device("cuda"), torch.bfloat16):
        sys.exit("torch sees no GPU with FP8 products")
    torch.manual_seed(0)
    rule = Activations("token")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; errors; ms")
    words = ("scaled", "emulated", "unrounded", "scaled", "rounding", "emulated", "bfloat16")
    print(f"{'matrix':12}{'tokens':>7}" + "".join(f"{word:>11}" for word in words))
    for name, (rows, columns) in MATRICES.items():
        codes = (50 * torch.randn(rows, columns, device="cuda")).clamp(-448, 448).to(torch.float8_e4m3fn)
        scale = (1e-4 + 0.001 * torch.rand(rows, 1, device="cuda")).bfloat16().float()
        weight = (codes.float() * scale).bfloat16()
        codes = weight_codes(weight, scale)
        for tokens in TOKENS:
            x = torch.randn(tokens, columns, device="cuda").bfloat16()
            mine, steps = quantized(x, rule)
            truth = (mine.double() * steps) @ (codes.double() * scale).T
            runs: list[Callable[[], torch.Tensor]] = [
                lambda x=x, codes=codes, scale=scale: scaled_product(x, codes, scale, rule),
                lambda x=x, weight=weight: F.linear(rounded(x, rule), weight),
                lambda x=x, weight=weight: F.linear(x, weight),
            ]
            errors = [((run().double() - truth).norm() / truth.norm()).item() for run in runs]
            times = [milliseconds(run) for run in (runs[0], lambda x=x: quantize_by_token(x), *runs[1:])]
            told = "".join(f"{e:11.1e}" for e in errors) + "".join(f"{t:11.3f}" for t in times)
            print(f"{name:12}{tokens:7}{told}", flush=True)


if __name__ == "__main__":
    main()
