"""Measures the Triton kernel of Mamba's selective scan on a GPU: `python -m benchmarks.selective_scan_cuda`.

As ``kernels_cuda`` does, which holds these contests too. The peer is mamba_ssm's compiled kernel, where that is
installed and for inputs that it takes: whole sequences that begin with no state. For others, and without it, the peer
is the reference's torch definition in the same dtype. The inputs are those of Mamba's 2.8B model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import contests
from benchmarks.contests import LENGTHS, Contest, Contests, doubles

INNER, STATE = 5120, 16
# What a float32 state may be off without being marked beside torch's: each token's power of 2 is off by up to 2^-22
# (PTX, ex2.approx, which mamba_ssm's kernel takes too), where the definition's exp is rounded.
FLOOR = 2.0**-19
# The torch definition's chunk on a GPU (``torch_forward.default_chunk``).
CHUNK = 64


def contest(
    theirs: Any,
    dtype: torch.dtype,
    batch: int,
    length: int,
    state: int,
    *,
    packed: bool,
    goes_on: bool,
    timed: bool,
) -> Contest:
    """Inputs as a mixer has them: strided parts of projections, steps and decays as trained."""
    from bamba_reference.kernels.selective_scan import selective_scan
    from bamba_reference.torch import scan as torch_scan
    from bamba_reference.torch.scan import SelectiveScanArguments

    steps = torch.exp(torch.empty(INNER, device="cuda").uniform_(-6.9, -2.3))  # 0.001 to 0.1
    sequence_starts = None
    if packed:
        sequence_starts = torch.rand(batch, length, device="cuda") < min(0.1, 8 / length)
        sequence_starts[:, 0] = True
    Bs, Cs = (
        torch.randn(batch, length, 160 + 2 * state, device="cuda").to(dtype)[..., 160:].split(state, dim=-1)
    )
    x, dt = torch.randn(2, batch, length, INNER, device="cuda").to(dtype)
    A_log = torch.log(torch.arange(1, state + 1, device="cuda").float()).repeat(INNER, 1)
    D = 1 + 0.3 * torch.randn(INNER, device="cuda")
    z = torch.randn(batch, length, 2 * INNER, device="cuda").to(dtype)[..., INNER:]
    bias = steps + torch.log(-torch.expm1(-steps))
    h = torch.randn(batch, INNER, state, device="cuda") * goes_on
    args = (x, dt, A_log, Bs, Cs, D, z, bias, h)
    fits = theirs.selective_scan and not packed and not goes_on
    # Laid out as mamba_ssm's kernel reads them, before anything is timed.
    laid_out = [v.transpose(1, 2).contiguous() for v in (x, dt, Bs, Cs, z)] if fits else []

    def their_scan() -> tuple[Tensor, ...]:
        u, delta, B, C, gate = laid_out
        y, after = theirs.selective_scan(
            u, delta, -A_log.exp(), B, C, D, gate, bias, delta_softplus=True, return_last_state=True
        )
        return y.transpose(1, 2), after

    return Contest(
        "selective scan",
        f"{str(dtype)[6:]:9}B{batch} L{length:<4} N{state}{' packed' if packed else ' state' if goes_on else ''}",
        lambda: torch_scan.selective_scan(
            SelectiveScanArguments(*doubles(*args), CHUNK, sequence_starts, None)
        ),
        lambda: selective_scan(SelectiveScanArguments(*args, CHUNK, sequence_starts, None)),
        their_scan
        if fits
        else lambda: torch_scan.selective_scan(SelectiveScanArguments(*args, CHUNK, sequence_starts, None)),
        timed,
        "mamba_ssm" if fits else "torch",
        0.0 if fits else FLOOR,
    )


def all_contests(theirs: Any, dtype: torch.dtype, times: bool) -> Iterator[Contests]:
    def group(
        batch: int, length: int, state: int = STATE, packed: bool = False, goes_on: bool = False
    ) -> Contests:
        def drawn() -> Iterator[Contest]:
            yield contest(theirs, dtype, batch, length, state, packed=packed, goes_on=goes_on, timed=times)

        return drawn

    if times:
        yield from (group(*shape) for shape in ((4, 2048), (1, 8192), (1, 1)))
        return
    for length in LENGTHS:
        yield group(1, length)
        yield group(1, length, goes_on=True)
        if length > 1:
            yield group(1, length, packed=True)
    yield from (group(2, 300, state) for state in (8, 32, 64))


if __name__ == "__main__":
    contests.main("benchmarks.selective_scan_cuda", __doc__)
