"""Measures the gradients of the Triton kernels on a GPU: `python -m benchmarks.gradients_cuda`.

As ``kernels_cuda`` does, on its inputs: truth is autograd of the reference's torch operations in float64, and the peer
is mamba_ssm's autograd, causal_conv1d's or torch's. Every float tensor of an operation has a gradient; a line shows the
one that is the worst beside its peer. With --times a time is that of the operation and its gradients together. Of 8,192
tokens the selective scan has a quarter of Mamba 2.8B's channels, because the truth holds every state.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks import contests
from benchmarks.contests import EPS, FFN, INNER, LENGTHS, WIDTH, Contest, Contests, doubles
from benchmarks.kernels_cuda import UNLIMITED, Mixer, Shape
from benchmarks.selective_scan_cuda import CHUNK, FLOOR
from benchmarks.selective_scan_cuda import INNER as SELECTIVE_INNER

Operation = Callable[..., Any]


def gradients(operation: Operation, inputs: Sequence[Tensor], upstream: list[Tensor]) -> tuple[Tensor, ...]:
    """Of all inputs, for these gradients of the operation's results, in the results' dtypes."""
    with torch.enable_grad():
        leaves = [v.detach().requires_grad_() for v in inputs]
        results = operation(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        given = [g.to(y.dtype).view_as(y) for g, y in zip(upstream, results, strict=True)]
        return torch.autograd.grad(results, leaves, given, allow_unused=True, materialize_grads=True)


def contest(
    name: str,
    case: str,
    inputs: Sequence[Tensor],
    truth: Operation,
    ours: Operation,
    peer: Operation | None,
    against: str = "mamba_ssm",
    floor: float = 0.0,
    *,
    timed: bool,
) -> Contest:
    results = ours(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    upstream = [torch.randn_like(y) for y in results]
    return Contest(
        name,
        case,
        lambda: gradients(truth, doubles(*inputs), upstream),
        lambda: gradients(ours, inputs, upstream),
        peer and (lambda: gradients(peer, inputs, upstream)),
        timed,
        against,
        floor,
    )


def mixer_contests(theirs: Any, dtype: torch.dtype, shape: Shape, timed: bool) -> Iterator[Contest]:
    from bamba_reference.kernels.backend import TRITON
    from bamba_reference.torch import ops as torch_ops
    from bamba_reference.torch import scan as torch_scan
    from bamba_reference.torch.scan import ScanArguments

    m = Mixer.random(shape, dtype)
    B, L, G, packed, N, P = shape.batch, shape.length, shape.groups, shape.packed, shape.state, shape.head
    H, case, starts = INNER // P, f"{str(dtype)[6:]:9}{shape}", m.sequence_starts
    segments = None if starts is None else starts.cumsum(1).int() - 1
    # Packed sequences see no state before them, so that it has no gradient.
    more = () if packed else (m.h,)
    convolved = torch_ops.conv(m.xBC, m.weight, m.bias, m.tail, starts).to(dtype)
    x, Bs, Cs = convolved.split([INNER, G * N, G * N], dim=-1)
    x, Bs, Cs = x.unflatten(-1, (H, P)), Bs.unflatten(-1, (G, N)), Cs.unflatten(-1, (G, N))

    def scan(operation: Operation) -> Operation:
        def run(*v: Tensor) -> Any:
            h = v[7] if len(v) > 7 else m.h.to(v[2].dtype)
            return operation(ScanArguments(*v[:7], UNLIMITED, h, CHUNK, starts, None))

        return run

    def their_scan(*v: Tensor) -> Any:
        x, dt, A_log, B, C, D, bias, *h = v
        return theirs.scan(
            *(x, dt, -A_log.exp(), B, C),
            chunk_size=256,
            D=D,
            dt_bias=bias,
            dt_softplus=True,
            dt_limit=UNLIMITED,
            initial_states=h[0] if h else None,
            seq_idx=segments,
            return_final_states=True,
        )

    yield contest(
        *("scan", case, (x, m.dt, m.A_log, Bs, Cs, m.D, m.dt_bias, *more)),
        *(scan(torch_scan.scan), scan(TRITON.scan), theirs.scan and their_scan),
        timed=timed,
    )
    y = torch.randn(B, L, INNER, device="cuda").to(dtype)
    size = {"group_size": INNER // G, "norm_before_gate": False}
    yield contest(
        *("gated norm", case, (y, m.z, m.norm)),
        lambda y, z, w: torch_ops.gated_norm(y, z, w, G, EPS),
        lambda y, z, w: TRITON.gated_norm(y, z, w, G, EPS),
        theirs.gated_norm and (lambda y, z, w: theirs.gated_norm(y, w, None, z=z, eps=EPS, **size)),
        timed=timed,
    )

    def conv(operation: Operation) -> Operation:
        return lambda x, w, b, *tail: operation(x, w, b, tail[0] if tail else m.tail.to(x.dtype), starts)

    def their_conv(x: Tensor, w: Tensor, b: Tensor, *tail: Tensor) -> Tensor:
        if theirs.conv:
            before = tail[0].transpose(1, 2) if tail else None
            out = theirs.conv(
                x.transpose(1, 2), w, b, seq_idx=segments, initial_states=before, activation="silu"
            )
        else:
            joined = torch.cat([tail[0], x], dim=1).transpose(1, 2)
            out = F.silu(F.conv1d(joined, w[:, None], b, groups=len(b)))
        return out.transpose(1, 2)

    yield contest(
        *("conv", case, (m.xBC, m.weight.to(dtype), m.bias.to(dtype), *(() if packed else (m.tail,)))),
        *(conv(torch_ops.conv), conv(TRITON.conv), their_conv if theirs.conv or not packed else None),
        "causal_conv1d" if theirs.conv or packed else "torch",
        timed=timed,
    )


def other_contests(theirs: Any, dtype: torch.dtype, L: int, timed: bool) -> Iterator[Contest]:
    from bamba_reference.kernels.backend import TRITON
    from bamba_reference.torch import ops as torch_ops

    case = f"{str(dtype)[6:]:8} L{L}"
    x, delta = torch.randn(2, 1, L, WIDTH, device="cuda").to(dtype)
    weight = (1 + 0.3 * torch.randn(WIDTH, device="cuda")).to(dtype)

    def summed(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The kernels norm the sum as it is rounded."""
        total = x + delta
        return total, torch_ops.rms_norm(
            total + (total.to(dtype).to(total.dtype) - total).detach(), weight, EPS
        )

    def their_norm(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        out, total = theirs.rms_norm(delta, weight, None, residual=x, eps=EPS, prenorm=True)
        return total, out

    yield contest(
        *("residual and norm", case, (x, delta, weight), summed),
        lambda x, delta, weight: TRITON.add_norm(x, delta, weight, EPS),
        theirs.rms_norm and their_norm,
        timed=timed,
    )
    gate, up = torch.randn(2, 1, L, FFN, device="cuda").to(dtype)
    yield contest(
        *("swiglu", case, (gate, up), torch_ops.swiglu, TRITON.swiglu),
        lambda gate, up: F.silu(gate) * up,
        "torch",
        timed=timed,
    )
    q = torch.randn(1, L, 32, 128, device="cuda").to(dtype)
    angles = 6.28 * torch.rand(1, L, 32, device="cuda")
    cos, sin = angles.cos(), angles.sin()

    def their_rotary(q: Tensor) -> Tensor:
        c, s = (torch.cat([v, v], dim=-1)[:, :, None].to(dtype) for v in (cos, sin))
        turned, passed = q[..., :64], q[..., 64:]
        half = torch.cat([-turned[..., 32:], turned[..., :32]], dim=-1)
        return torch.cat([turned * c + half * s, passed], dim=-1)

    yield contest(
        *("rotary", case, (q,), lambda q: torch_ops.rotary(q, cos.double(), sin.double())),
        *(lambda q: TRITON.rotary(q, cos, sin), their_rotary, "torch"),
        timed=timed,
    )


def selective_contest(
    theirs: Any,
    dtype: torch.dtype,
    batch: int,
    L: int,
    N: int = 16,
    packed: bool = False,
    goes_on: bool = False,
    *,
    timed: bool,
) -> Iterator[Contest]:
    from bamba_reference.kernels.backend import TRITON
    from bamba_reference.torch import scan as torch_scan
    from bamba_reference.torch.scan import SelectiveScanArguments

    inner = SELECTIVE_INNER // (4 if batch * L == LENGTHS[-1] and not timed else 1)
    starts = None
    if packed:
        starts = torch.rand(batch, L, device="cuda") < min(0.1, 8 / L)
        starts[:, 0] = True
    steps = torch.exp(torch.empty(inner, device="cuda").uniform_(-6.9, -2.3))  # 0.001 to 0.1
    Bs, Cs = torch.randn(batch, L, 160 + 2 * N, device="cuda").to(dtype)[..., 160:].split(N, dim=-1)
    x, dt, z = torch.randn(3, batch, L, inner, device="cuda").to(dtype)
    A_log = torch.log(torch.arange(1, N + 1, device="cuda").float()).repeat(inner, 1)
    D, bias = 1 + 0.3 * torch.randn(inner, device="cuda"), steps + torch.log(-torch.expm1(-steps))
    h = torch.randn(batch, inner, N, device="cuda") * goes_on

    def scan(operation: Operation) -> Operation:
        def run(*v: Tensor) -> Any:
            before = v[8] if goes_on else h.to(v[2].dtype)
            return operation(SelectiveScanArguments(*v[:8], before, CHUNK, starts, None))[0]

        return run

    def their_scan(*v: Tensor) -> Tensor:
        x, dt, A_log, B, C, D, z, bias = v
        x, dt, B, C, z = (each.transpose(1, 2).contiguous() for each in (x, dt, B, C, z))
        y: Tensor = theirs.selective_scan(x, dt, -A_log.exp(), B, C, D, z, bias, delta_softplus=True)
        return y.transpose(1, 2)

    fits = theirs.selective_scan and not packed and not goes_on
    yield contest(
        "selective scan",
        f"{str(dtype)[6:]:9}B{batch} L{L:<4} N{N}{' packed' if packed else ' state' if goes_on else ''}",
        (x, dt, A_log, Bs, Cs, D, z, bias, *((h,) if goes_on else ())),
        *(scan(torch_scan.selective_scan), scan(TRITON.selective_scan)),
        their_scan if fits else scan(torch_scan.selective_scan),
        *(("mamba_ssm", 0.0) if fits else ("torch", FLOOR)),
        timed=timed,
    )


def all_contests(theirs: Any, dtype: torch.dtype, times: bool) -> Iterator[Contests]:
    """The shapes of ``kernels_cuda`` and ``selective_scan_cuda``, but for single tokens with times."""

    def selective(*shape: int, **kind: bool) -> Contests:
        return partial(selective_contest, theirs, dtype, *shape, **kind, timed=times)

    if times:
        yield from (selective(4, 2048), selective(1, 8192))
        for shape in (Shape(4, 2048), Shape(1, 8192), Shape(1, 8192, groups=8)):
            yield partial(mixer_contests, theirs, dtype, shape, timed=True)
        yield partial(other_contests, theirs, dtype, LENGTHS[-1], timed=True)
        return
    for length in LENGTHS:
        yield selective(1, length)
        yield selective(1, length, goes_on=True)
        if length > 1:
            yield selective(1, length, packed=True)
    yield from (selective(2, 300, state) for state in (8, 32, 64))
    for length, groups, packed in itertools.product(LENGTHS, (1, 8), (False, True)):
        if not (packed and length == 1):
            yield partial(mixer_contests, theirs, dtype, Shape(1, length, groups, packed), timed=False)
    for head, state in ((64, 64), (64, 256), (32, 128), (128, 16)):
        yield partial(mixer_contests, theirs, dtype, Shape(2, 300, 2, state=state, head=head), timed=False)
    for length in LENGTHS:
        yield partial(other_contests, theirs, dtype, length, timed=False)


if __name__ == "__main__":
    contests.main("benchmarks.gradients_cuda", __doc__, "gradients")
