"""Measures each Triton kernel on a GPU beside the one it competes with: `python -m benchmarks.kernels_cuda`.

Errors are relative, ‖found − truth‖ / ‖truth‖, truth being the reference's torch operations in float64 on the
same inputs. The peer is mamba_ssm's kernel where it has one, of the convolution causal_conv1d's where that is
installed, else what transformers does in torch. Times are medians with a cold L2. A kernel that is less exact than
its peer is marked, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks import peers, points
from benchmarks.points import Point

# Bamba-9B's.
WIDTH, INNER, FFN = 4096, 8192, 14336
EPS, UNLIMITED = 1e-5, (0.0, float("inf"))
LENGTHS = (1, 7, 64, 500, 2048, 8192)
# An error below this share above the peer's is the same error: both are samples of roundings.
SAME = 1.02


@dataclass(frozen=True)
class Contest:
    """One kernel on one input: each function gives the tensors that ``truth`` holds in float64.

    ``against`` names who made the peer. An error up to ``floor`` is none.
    """

    kernel: str
    case: str
    truth: Callable[[], tuple[Tensor, ...]]
    ours: Callable[[], tuple[Tensor, ...]]
    peer: Callable[[], tuple[Tensor, ...]]
    timed: bool = False
    against: str = "mamba_ssm"
    floor: float = 0.0


def doubles(*values: Any) -> list[Any]:
    return [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]


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
    fresh: Tensor | None

    @staticmethod
    def random(shape: Shape, dtype: torch.dtype) -> Mixer:
        B, L, G, packed, N, P = shape.batch, shape.length, shape.groups, shape.packed, shape.state, shape.head
        W, H = INNER + 2 * G * N, INNER // P
        u = torch.rand(H, device="cuda")
        steps = torch.exp(torch.empty(H, device="cuda").uniform_(-6.9, -1.2))  # 0.001 to 0.3
        fresh = None
        if packed:
            fresh = torch.rand(B, L, device="cuda") < min(0.1, 8 / L)
            fresh[:, 0] = True
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
            fresh=fresh,
        )


def mixer_contests(theirs: Any, dtype: torch.dtype, shape: Shape, timed: bool) -> Iterator[Contest]:
    from bamba_reference import torch_ops
    from bamba_reference.kernels import convolution, norms, scan

    m = Mixer.random(shape, dtype)
    B, L, G, packed, N, P = shape.batch, shape.length, shape.groups, shape.packed, shape.state, shape.head
    H, case = INNER // P, f"{str(dtype)[6:]:9}{shape}"
    convolved = torch_ops.conv(m.xBC, m.weight, m.bias, m.tail, m.fresh).to(dtype)
    x, Bs, Cs = convolved.split([INNER, G * N, G * N], dim=-1)
    x, Bs, Cs = x.unflatten(-1, (H, P)), Bs.unflatten(-1, (G, N)), Cs.unflatten(-1, (G, N))
    args = (x, m.dt, m.A_log, Bs, Cs, m.D, m.dt_bias, UNLIMITED, m.h)
    segments = None if m.fresh is None else m.fresh.cumsum(1).int() - 1

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

    def their_step() -> tuple[Tensor, ...]:
        h = m.h.clone()

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
        lambda: torch_ops.scan(*doubles(*args), 64, m.fresh, None),
        lambda: scan.scan(*args, 64, m.fresh, None),
        their_step if L == 1 and not packed else their_scan,
        timed,
    )
    y = torch.randn(B, L, INNER, device="cuda").to(dtype)
    yield Contest(
        "gated norm",
        case,
        lambda: (torch_ops.gated_norm(*doubles(y, m.z, m.norm), G, EPS),),
        lambda: (norms.gated_norm(y, m.z, m.norm, G, EPS),),
        lambda: (
            theirs.gated_norm(y, m.norm, None, z=m.z, eps=EPS, group_size=INNER // G, norm_before_gate=False),
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
        lambda: (torch_ops.conv(*doubles(m.xBC, *rounded, m.tail), m.fresh),),
        lambda: (convolution.conv(m.xBC, *rounded, m.tail, m.fresh),),
        their_conv,
        timed,
        "causal_conv1d" if theirs.conv else "torch",
    )


def other_contests(theirs: Any, dtype: torch.dtype, L: int, timed: bool) -> Iterator[Contest]:
    from bamba_reference import torch_ops
    from bamba_reference.kernels import elementwise, norms

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
        their_norm,
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


def relative(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> list[float]:
    return [
        ((f.double() - t.double()).norm() / t.double().norm()).item() if f.isfinite().all() else float("nan")
        for f, t in zip(found, truth, strict=True)
    ]


def milliseconds(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=10, rep=40, return_mode="median"))


def contests(theirs: Any, dtype: torch.dtype, times: bool) -> Iterator[Contest]:
    if times:
        for shape in (Shape(4, 2048), Shape(1, 8192), Shape(1, 8192, groups=8), Shape(1, 1)):
            yield from mixer_contests(theirs, dtype, shape, timed=True)
        yield from other_contests(theirs, dtype, 8192, timed=True)
        return
    for length, groups, packed in itertools.product(LENGTHS, (1, 8), (False, True)):
        if not (packed and length == 1):
            yield from mixer_contests(theirs, dtype, Shape(1, length, groups, packed), timed=False)
    for head, state in ((64, 64), (64, 256), (32, 128), (128, 16)):
        yield from mixer_contests(theirs, dtype, Shape(2, 300, 2, state=state, head=head), timed=False)
    for length in LENGTHS:
        yield from other_contests(theirs, dtype, length, timed=False)


def parse(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--dtype", nargs="+", choices=["bfloat16", "float16"], default=["bfloat16", "float16"]
    )
    parser.add_argument("--times", action="store_true", help="a few large inputs with times, instead of all")
    points.add_option(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU")
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    return options


def report(held: Iterator[Contest], options: argparse.Namespace) -> None:
    """Print a line a contest; exit with 1 where a kernel is less exact than its peer."""
    times = options.times
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; errors against float64; ms, cold L2")
    print(f"{'kernel':18}{'case':34}{'ours':>18}{'peer':>18}{' ours ms  peer ms' if times else ''}")
    counted, worse = Counter[str](), Counter[str]()
    for contest in held:
        truth = contest.truth()
        ours, peer = relative(contest.ours(), truth), relative(contest.peer(), truth)
        del truth
        lost = any(
            not mine <= max(SAME * other, contest.floor) for mine, other in zip(ours, peer, strict=True)
        )
        counted[contest.against] += 1
        worse[contest.against] += lost
        shown = [" ".join(f"{error:.2e}" for error in errors) for errors in (ours, peer)]
        took = [milliseconds(run) for run in (contest.ours, contest.peer)] if contest.timed else []
        told = "".join(f"{time:9.4f}" for time in took)
        print(
            f"{contest.kernel:18}{contest.case:34}{shown[0]:>18}{shown[1]:>18}{told}  {contest.against}"
            f"{'  WORSE' if lost else ''}",
            flush=True,
        )
    print(f"{worse.total()} of {counted.total()} less exact than their peers")
    inputs = " and ".join(options.dtype)
    points.write(
        [
            Point(
                f"kernels against float64 beside {against}'s, {inputs}",
                "none less exact",
                f"{worse[against]} of {count} inputs less exact",
                not worse[against],
            )
            for against, count in counted.items()
        ],
        options.points,
    )
    sys.exit(1 if worse.total() else 0)


def main() -> None:
    from benchmarks import selective_scan_cuda

    options, theirs = parse(__doc__), peers.kernels()
    report(
        itertools.chain.from_iterable(
            itertools.chain(
                contests(theirs, dtype, options.times),
                selective_scan_cuda.contests(theirs, dtype, options.times),
            )
            for dtype in (getattr(torch, name) for name in options.dtype)
        ),
        options,
    )


if __name__ == "__main__":
    main()
