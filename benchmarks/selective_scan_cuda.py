"""Measures the Triton kernel of Mamba's selective scan on a GPU: `python -m benchmarks.selective_scan_cuda`.

As ``kernels_cuda`` does, which holds these contests too; the peer is the reference's torch definition in the same
dtype, for mamba_ssm's kernel of this scan is compiled CUDA. The inputs are those of Mamba's 2.8B model.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.kernels_cuda import LENGTHS, Contest, doubles, parse, report

INNER, STATE = 5120, 16
# What a float32 state may be off without being marked: each token's power of 2 is off by up to 2^-22 (PTX,
# ex2.approx, which the source of mamba_ssm's kernel takes too), where the definition's exp is rounded, and the table
# shows by how much. Of outputs in 16 bits nothing shows.
FLOOR = 2.0**-19
# The torch definition's chunk on a GPU (``torch_forward.default_chunk``).
CHUNK = 64


def contest(dtype: torch.dtype, batch: int, length: int, state: int, packed: bool, timed: bool) -> Contest:
    """Inputs as a mixer has them: x convolved in float32, z a part of a projection, steps and decays as trained."""
    from bamba_reference import selective_scan as definition
    from bamba_reference.kernels.selective_scan import selective_scan

    steps = torch.exp(torch.empty(INNER, device="cuda").uniform_(-6.9, -2.3))  # 0.001 to 0.1
    fresh = None
    if packed:
        fresh = torch.rand(batch, length, device="cuda") < min(0.1, 8 / length)
        fresh[:, 0] = True
    Bs, Cs = (
        torch.randn(batch, length, 160 + 2 * state, device="cuda").to(dtype)[..., 160:].split(state, dim=-1)
    )
    args = (
        torch.randn(batch, length, INNER, device="cuda"),
        torch.randn(batch, length, INNER, device="cuda").to(dtype),
        torch.log(torch.arange(1, state + 1, device="cuda").float()).repeat(INNER, 1),
        Bs,
        Cs,
        1 + 0.3 * torch.randn(INNER, device="cuda"),
        torch.randn(batch, length, 2 * INNER, device="cuda").to(dtype)[..., INNER:],
        steps + torch.log(-torch.expm1(-steps)),
        torch.randn(batch, INNER, state, device="cuda"),
    )
    return Contest(
        "selective scan",
        f"{str(dtype)[6:]:9}B{batch} L{length:<4} N{state}{' packed' if packed else ''}",
        lambda: definition.selective_scan(*doubles(*args), CHUNK, fresh, None),
        lambda: selective_scan(*args, CHUNK, fresh, None),
        lambda: definition.selective_scan(*args, CHUNK, fresh, None),
        timed,
        FLOOR,
    )


def contests(dtype: torch.dtype, times: bool) -> Iterator[Contest]:
    if times:
        for batch, length in ((4, 2048), (1, 8192), (1, 1)):
            yield contest(dtype, batch, length, STATE, packed=False, timed=True)
        return
    for length in LENGTHS:
        for packed in (False, True) if length > 1 else (False,):
            yield contest(dtype, 1, length, STATE, packed, timed=False)
    for state in (8, 32, 64):
        yield contest(dtype, 2, 300, state, packed=False, timed=False)


def main() -> None:
    options = parse(__doc__)
    report(contests(getattr(torch, options.dtype), options.times), options.times)


if __name__ == "__main__":
    main()
