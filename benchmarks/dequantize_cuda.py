"""Prints how fast each format is read back on a GPU: `python -m benchmarks.dequantize_cuda`.

One matrix of Bamba-9B's MLP, raw blocks on the device to bfloat16 weights; GB of weights written a second, the
median, and the share of a copy's rate that its traffic (blocks read, weights written) reaches.
"""

from __future__ import annotations

import sys

import torch

from bamba_quant.formats import formats
from bamba_quant.formats.cuda import encode
from bamba_quant.formats.cuda.decoding import decode

SHAPE = (4096, 14336)


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU")
    from triton.testing import do_bench

    def seconds(run: object) -> float:
        return 1e-3 * float(do_bench(run, warmup=10, rep=50, return_mode="median"))

    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    print(f"{torch.cuda.get_device_name()}; a copy moves {copy / 1e12:.2f} TB/s")
    x = torch.randn(SHAPE, device="cuda") * 0.02
    for number_format in formats():
        if not number_format.writable or number_format.dtype is not None:
            continue
        raw = encode(number_format, x)
        each = seconds(
            lambda raw=raw, number_format=number_format: decode(number_format, raw, torch.bfloat16)
        )
        moved = raw.nbytes + 2 * x.numel()
        print(f"{number_format.name:8}{2e-9 * x.numel() / each:8.0f} GB/s{100 * moved / each / copy:6.0f} %")


if __name__ == "__main__":
    main()
