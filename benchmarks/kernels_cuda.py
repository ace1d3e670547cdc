"""Measures the Triton kernels on a GPU beside the one it competes with: `python -m benchmarks.kernels_cuda`.

Errors are relative, ‖found − truth‖ / ‖truth‖, truth being the reference's torch operations in float64 on the
same inputs. The peer is mamba_ssm's kernel where it has one, of the convolution causal_conv1d's where that is
installed, else what transformers does in torch. Those of other files are held here too: ``selective_scan_cuda`` and
``one_token_cuda``. Times are medians with a cold L2. A kernel that is less exact than
its peer is marked, and the exit code is then 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks import contests, one_token_cuda, selective_scan_cuda
from benchmarks.contests import EPS, FFN, INNER, LENGTHS, WIDTH, Contest, Contests, doubles

UNLIMITED = (0.0, float("inf"))


@dataclass(frozen=True)
class Shape:
    """A mixer's input; ``state`` and ``head`` are sizes of Bamba-9B's heads unless said."""

    batch: int
    length: int
    groups: int = 1
    packed: bool = False
    state: int = 128
    head: int = 64

    def __str__(self) -> str:
        heads = f" P{self.head} N{self.state}" if (self.head, self.state) != (64, 128) else ""
        return f"B{self.batch} L{self.length:<4} G{self.groups}{heads}{' packed' if self.packed else ''}"


@dataclass(frozen=True)
class Mixer:
    """A mixer's inputs as a projection leaves them: strided views of one tensor, decays and steps as trained."""

    z: Tensor
    xBC: Tensor  # noqa: N815
    dt: Tensor
    weight: Tensor
    bias: Tensor
    tail: Tensor
    A_log: Tensor
    D: Tensor
    dt_bias: Tensor
    norm: Tensor
    h: Tensor
    sequence_starts: Tensor | None

    @staticmethod
    def random(shape: Shape, dtype: torch.dtype) -> Mixer:
        B, L, G, packed, N, P = shape.batch, shape.length, shape.groups, shape.packed, shape.state, shape.head
        W, H = INNER + 2 * G * N, INNER // P
        u = torch.rand(H, device="cuda")
        steps = torch.exp(torch.empty(H, device="cuda").uniform_(-6.9, -1.2))  # 0.001 to 0.3
        sequence_starts = None
        if packed:
            sequence_starts = torch.rand(B, L, device="cuda") < min(0.1, 8 / L)
            sequence_starts[:, 0] = True
        projected = torch.randn(B, L, INNER + W + H, device="cuda").to(dtype)
        z, xBC, dt = projected.split([INNER, W, H], dim=-1)
        scale = 0.0 if packed else 1.0
        return Mixer(
            z=z,
            xBC=xBC,
            dt=dt,
            weight=0.5 * torch.randn(W, 4, device="cuda"),
            bias=0.3 * torch.randn(W, device="cuda"),
            tail=scale * torch.randn(B, 3, W, device="cuda").to(dtype),
            A_log=torch.log(0.5 + 15.5 * u),
            D=1 + 0.3 * torch.randn(H, device="cuda"),
            dt_bias=steps + torch.log(-torch.expm1(-steps)),
            norm=1 + 0.3 * torch.randn(INNER, device="cuda"),
            h=scale * torch.randn(B, H, P, N, device="cuda"),
            sequence_starts=sequence_starts,
        )


def mixer_contests(theirs: Any, dtype: torch.dtype, shape: Shape, timed: bool) -> Iterator[Contest]:
    from bamba_reference.kernels import convolution, norms, scan
    from bamba_reference.torch import ops as torch_ops
    from bamba_reference.torch import scan as torch_scan
    from bamba_reference.torch.scan import ScanArguments

    m = Mixer.random(shape, dtype)
    B, L, G, packed, N, P = shape.batch, shape.length, shape.groups, shape.packed, shape.state, shape.head
    H, case = INNER // P, f"{str(dtype)[6:]:9}{shape}"
    convolved = torch_ops.conv(m.xBC, m.weight, m.bias, m.tail, m.sequence_starts).to(dtype)
    x, Bs, Cs = convolved.split([INNER, G * N, G * N], dim=-1)
    x, Bs, Cs = x.unflatten(-1, (H, P)), Bs.unflatten(-1, (G, N)), Cs.unflatten(-1, (G, N))
    args = (x, m.dt, m.A_log, Bs, Cs, m.D, m.dt_bias, UNLIMITED, m.h)
    segments = None if m.sequence_starts is None else m.sequence_starts.cumsum(1).int() - 1

    def their_scan() -> tuple[Tensor, ...]:
        return theirs.scan(
            x,
            m.dt,
            -m.A_log.exp(),
            Bs,
            Cs,
            chunk_size=256,
            D=m.D,
            dt_bias=m.dt_bias,
            dt_softplus=True,
            dt_limit=UNLIMITED,
            initial_states=None if packed else m.h,
            seq_idx=segments,
            return_final_states=True,
        )

    # Brought up to date in place: the first call is the one that counts, further ones are timed.
    h = m.h.clone()

    def their_step() -> tuple[Tensor, ...]:

        def spread(v: Tensor) -> Tensor:
            return v[:, None].expand(H, P)

        y = theirs.step(
            h,
            x[:, 0],
            m.dt[:, 0, :, None].expand(B, H, P),
            (-m.A_log.exp())[:, None, None].expand(H, P, N),
            Bs[:, 0],
            Cs[:, 0],
            spread(m.D),
            dt_bias=spread(m.dt_bias),
            dt_softplus=True,
        )
        return y[:, None], h

    yield Contest(
        "step" if L == 1 else "scan",
        case,
        lambda: torch_scan.scan(ScanArguments(*doubles(*args), 64, m.sequence_starts, None)),
        lambda: scan.scan(ScanArguments(*args, 64, m.sequence_starts, None)),
        theirs.scan and (their_step if L == 1 and not packed else their_scan),
        timed,
    )
    y = torch.randn(B, L, INNER, device="cuda").to(dtype)
    yield Contest(
        "gated norm",
        case,
        lambda: (torch_ops.gated_norm(*doubles(y, m.z, m.norm), G, EPS),),
        lambda: (norms.gated_norm(y, m.z, m.norm, G, EPS),),
        theirs.gated_norm
        and (
            lambda: (
                theirs.gated_norm(
                    y, m.norm, None, z=m.z, eps=EPS, group_size=INNER // G, norm_before_gate=False
                ),
            )
        ),
        timed,
    )
    rounded = m.weight.to(dtype), m.bias.to(dtype)

    def their_conv() -> tuple[Tensor, ...]:
        if theirs.conv:
            out = theirs.conv(
                m.xBC.transpose(1, 2),
                *rounded,
                seq_idx=segments,
                initial_states=None if packed else m.tail.transpose(1, 2),
                activation="silu",
            )
            return (out.transpose(1, 2),)
        inputs = torch.cat([m.tail, m.xBC], dim=1).transpose(1, 2)
        out = F.conv1d(inputs, rounded[0][:, None], rounded[1], groups=len(m.bias))
        return (F.silu(out).transpose(1, 2),)

    if packed and not theirs.conv:
        return
    yield Contest(
        "conv",
        case,
        lambda: (torch_ops.conv(*doubles(m.xBC, *rounded, m.tail), m.sequence_starts),),
        lambda: (convolution.conv(m.xBC, *rounded, m.tail, m.sequence_starts),),
        their_conv,
        timed,
        "causal_conv1d" if theirs.conv else "torch",
    )


def other_contests(theirs: Any, dtype: torch.dtype, L: int, timed: bool) -> Iterator[Contest]:
    from bamba_reference.kernels import elementwise, norms
    from bamba_reference.torch import ops as torch_ops

    case = f"{str(dtype)[6:]:8} L{L}"
    x, delta = torch.randn(2, 1, L, WIDTH, device="cuda").to(dtype)
    weight = 1 + 0.3 * torch.randn(WIDTH, device="cuda")

    def their_norm() -> tuple[Tensor, ...]:
        out, total = theirs.rms_norm(delta, weight.to(dtype), None, residual=x, eps=EPS, prenorm=True)
        return total, out

    coarse = weight.to(dtype)
    total = x + delta
    yield Contest(
        "residual and norm",
        case,
        lambda: (total.double(), torch_ops.rms_norm(*doubles(total, coarse), EPS)),
        lambda: norms.add_norm(x, delta, coarse, EPS),
        theirs.rms_norm and their_norm,
        timed,
    )
    gate, up = torch.randn(2, 1, L, FFN, device="cuda").to(dtype)
    yield Contest(
        "swiglu",
        case,
        lambda: (torch_ops.swiglu(gate.double(), up.double()),),
        lambda: (elementwise.swiglu(gate, up),),
        lambda: (F.silu(gate) * up,),
        timed,
        "torch",
    )
    q = torch.randn(1, L, 32, 128, device="cuda").to(dtype)
    angles = 6.28 * torch.rand(1, L, 32, device="cuda")
    cos, sin = angles.cos(), angles.sin()

    def their_rotary() -> tuple[Tensor, ...]:
        c, s = (torch.cat([v, v], dim=-1)[:, :, None].to(dtype) for v in (cos, sin))
        turned, passed = q[..., :64], q[..., 64:]
        half = torch.cat([-turned[..., 32:], turned[..., :32]], dim=-1)
        return (torch.cat([turned * c + half * s, passed], dim=-1),)

    yield Contest(
        "rotary",
        case,
        lambda: (torch_ops.rotary(q.double(), cos.double(), sin.double()),),
        lambda: (elementwise.rotary(q, cos, sin),),
        their_rotary,
        timed,
        "torch",
    )


def all_contests(theirs: Any, dtype: torch.dtype, times: bool) -> Iterator[Contests]:
    yield from selective_scan_cuda.all_contests(theirs, dtype, times)
    yield from one_token_cuda.all_contests(theirs, dtype, times)
    if times:
        for shape in (Shape(4, 2048), Shape(1, 8192), Shape(1, 8192, groups=8), Shape(1, 1)):
            yield partial(mixer_contests, theirs, dtype, shape, timed=True)
        yield partial(other_contests, theirs, dtype, 8192, timed=True)
        return
    for length, groups, packed in itertools.product(LENGTHS, (1, 8), (False, True)):
        if not (packed and length == 1):
            yield partial(mixer_contests, theirs, dtype, Shape(1, length, groups, packed), timed=False)
    for head, state in ((64, 64), (64, 256), (32, 128), (128, 16)):
        yield partial(mixer_contests, theirs, dtype, Shape(2, 300, 2, state=state, head=head), timed=False)
    for length in LENGTHS:
        yield partial(other_contests, theirs, dtype, length, timed=False)


if __name__ == "__main__":
    contests.main("benchmarks.kernels_cuda", __doc__)
