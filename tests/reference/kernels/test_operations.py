"""Each kernel gives what the operation of its name in ``torch.ops`` gives in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bamba_reference.kernels import attention, convolution, elementwise, experts, launch, matmul, norms, scan
from bamba_reference.torch import ops as torch_ops
from bamba_reference.torch import scan as torch_scan
from bamba_reference.torch.backend import BackendError
from bamba_reference.torch.scan import ScanArguments
from tests.reference.cases import relative_error
from tests.reference.operations import (
    EPS,
    EXACT,
    RECURRENT,
    assert_rounded_once,
    doubles,
    draw,
    random_starts,
)
from tests.support.kernels import DEVICE

DTYPES = [torch.float32] + ([torch.bfloat16, torch.float16] if torch.cuda.is_available() else [])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_dtype
@settings(max_examples=12, deadline=None)
@given(
    L=st.integers(1, 70),
    K=st.sampled_from([2, 4]),
    packed=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_conv(dtype: torch.dtype, L: int, K: int, packed: bool, biased: bool, seed: int) -> None:
    normal = draw(seed)
    W = 37
    projected = normal(2, L, W + 20, dtype=dtype)
    xBC = projected[..., 11 : 11 + W]  # strided, as the projection's part is
    weight, bias = normal(W, 1, K)[:, 0], normal(W) if biased else None
    tail = normal(2, K - 1, W, dtype=dtype)
    sequence_starts = random_starts(seed, 2, L) if packed else None
    truth = torch_ops.conv(*doubles(xBC, weight, bias, tail), sequence_starts)
    assert_rounded_once(convolution.conv(xBC, weight, bias, tail, sequence_starts), truth, dtype)
    if L == 1 and not packed:
        after = tail.clone()
        assert_rounded_once(convolution.conv_in_place(xBC, weight, bias, after, None), truth, dtype)
        assert torch.equal(after, torch_ops.next_tail(tail, xBC))


def scan_arguments(dtype: torch.dtype, L: int, G: int, N: int, P: int, seed: int) -> list[Any]:
    normal, H, B = draw(seed), 4, 2
    convolved = normal(B, L, H * P + 2 * G * N, dtype=dtype)
    x, Bs, Cs = convolved.split([H * P, G * N, G * N], dim=-1)
    dt = normal(B, L, H + 3, dtype=dtype)[..., 3:]
    return [
        x.unflatten(-1, (H, P)),
        dt,
        normal(H).abs(),
        Bs.unflatten(-1, (G, N)),
        Cs.unflatten(-1, (G, N)),
        normal(H),
        normal(H) - 2,
        (0.0, float("inf")),
        normal(B, H, P, N),
    ]


@every_dtype
@settings(max_examples=16, deadline=None)
@given(
    L=st.sampled_from([1, 2, 31, 32, 33, 96, 100]),
    shape=st.sampled_from([(1, 16, 16), (2, 24, 5), (4, 64, 64), (2, 128, 16), (1, 256, 16)]),
    padding=st.sampled_from(["packed", "padded", "whole"]),
    seed=st.integers(0, 2**31),
)
def test_scan(dtype: torch.dtype, L: int, shape: tuple[int, int, int], padding: str, seed: int) -> None:
    args = scan_arguments(dtype, L, *shape, seed)
    sequence_starts = random_starts(seed, 2, L) if padding == "packed" else None
    real = None
    if padding == "padded":
        real = torch.ones(2, L, dtype=torch.bool, device=DEVICE)
        real[0, : L // 3 + 1] = False
    truth = torch_scan.scan(ScanArguments(*doubles(*args), 32, sequence_starts, real))
    before = args[8].clone()
    found = scan.scan(ScanArguments(*args, 32, sequence_starts, real))
    assert torch.equal(args[8], before)
    # float32's products are exact; two bfloat16 parts of a float32 leave 2^-17.
    besides = RECURRENT if dtype == torch.float32 else 2e-5
    assert_rounded_once(found[0], truth[0], dtype, besides)
    assert_rounded_once(found[1], truth[1], torch.float32, besides)


def test_scan_of_small_steps_and_limits() -> None:
    """softplus keeps its digits where it is small (dt near -12), and dt keeps to its limits."""
    args = scan_arguments(torch.float32, 40, 1, 16, 16, 0)
    args[1] = args[1] - 10
    for limit in ((0.0, float("inf")), (1e-5, 2e-5)):
        args[7] = limit
        for found, truth in zip(
            scan.scan(ScanArguments(*args, 32, None, None)),
            torch_scan.scan(ScanArguments(*doubles(*args), 32, None, None)),
            strict=True,
        ):
            assert relative_error(found.cpu(), truth.cpu()) <= RECURRENT


@pytest.mark.parametrize("chunk", [16, 32, 64])
def test_scan_in_pieces_and_chunks(chunk: int) -> None:
    args = scan_arguments(torch.float32, 90, 2, 16, 16, 1)
    tuning = scan.ScanTuning(chunk=chunk, rows=16)
    whole = scan.scan(ScanArguments(*args, 32, None, None), tuning=tuning)
    first = [v[:, :50] if i in (0, 1, 3, 4) else v for i, v in enumerate(args)]
    second = [v[:, 50:] if i in (0, 1, 3, 4) else v for i, v in enumerate(args)]
    y, second[8] = scan.scan(ScanArguments(*first, 32, None, None), tuning=tuning)
    rest, h = scan.scan(ScanArguments(*second, 32, None, None), tuning=tuning)
    assert relative_error(torch.cat([y, rest], dim=1).cpu(), whole[0].cpu()) <= RECURRENT
    assert relative_error(h.cpu(), whole[1].cpu()) <= RECURRENT


@every_dtype
@pytest.mark.parametrize("groups", [1, 3])
def test_norms(dtype: torch.dtype, groups: int) -> None:
    normal = draw(groups)
    x, delta = normal(2, 5, 60, dtype=dtype), normal(2, 5, 60, dtype=dtype)
    weight = normal(60)
    truth = torch_ops.rms_norm(*doubles(x, weight), EPS)
    assert_rounded_once(norms.rms_norm(x, weight, EPS), truth, dtype)
    total, normed = norms.add_norm(x, delta, weight, EPS)
    assert torch.equal(total, x + delta)
    truth = torch_ops.rms_norm(*doubles(total, weight), EPS)
    assert_rounded_once(normed, truth, dtype)
    z = normal(2, 5, 100, dtype=dtype)[..., 17:77]
    truth = torch_ops.gated_norm(*doubles(x, z, weight), groups, EPS)
    assert_rounded_once(norms.gated_norm(x, z, weight, groups, EPS), truth, dtype)


def test_any_layout_of_memory() -> None:
    """Results do not depend on the order of the arguments in memory."""
    normal = draw(8)
    x, delta, weight = normal(2, 5, 60), normal(2, 5, 60), normal(60)
    turned, z = (v.permute(2, 0, 1).contiguous().permute(1, 2, 0) for v in (x, delta))
    assert torch.equal(norms.rms_norm(turned, weight, EPS), norms.rms_norm(x, weight, EPS))
    for found, expected in zip(
        norms.add_norm(x, z, weight, EPS), norms.add_norm(x, delta, weight, EPS), strict=True
    ):
        assert torch.equal(found, expected)
    expected = norms.gated_norm(x, delta, weight, 2, EPS)
    assert torch.equal(norms.gated_norm(turned, z, weight, 2, EPS), expected)
    for L in (1, 2):
        args = scan_arguments(torch.float32, L, 2, 16, 24, L)
        expected = scan.scan(ScanArguments(*args, 32, None, None))
        for i in (0, 3, 4, 8):
            args[i] = args[i].transpose(-1, -2).contiguous().transpose(-1, -2)
        for ours, same in zip(scan.scan(ScanArguments(*args, 32, None, None)), expected, strict=True):
            assert torch.equal(ours, same)


@every_dtype
@pytest.mark.parametrize(("E", "half", "rows"), [(40, 8, 1), (16, 8, 3)])
def test_rotary_and_swiglu(dtype: torch.dtype, E: int, half: int, rows: int) -> None:
    normal = draw(E)
    q = normal(3, 7, 5, E, dtype=dtype)
    angles = normal(rows, 7, half)
    truth = torch_ops.rotary(q.double(), angles.double().cos(), angles.double().sin())
    found = elementwise.rotary(q, angles.double().cos().float(), angles.double().sin().float())
    assert_rounded_once(found, truth, dtype)
    assert torch.equal(found[..., 2 * half :], q[..., 2 * half :])
    gate, up = normal(2, 5, 70, dtype=dtype).split([30, 40], dim=-1)
    truth = torch_ops.swiglu(gate.double(), up[..., :30].double())
    assert_rounded_once(elementwise.swiglu(gate, up[..., :30]), truth, dtype)
    assert_rounded_once(elementwise.relu2(up), torch_ops.relu2(up.double()), dtype)


@every_dtype
@pytest.mark.parametrize("gated", [False, True])
def test_experts(dtype: torch.dtype, gated: bool) -> None:
    """Of 70 pairs most go to expert 2, in two tiles, and none to expert 4."""
    normal, (T, k, E, inner, d) = draw(3), (35, 2, 5, 40, 70)
    x, weights = normal(T, d, dtype=dtype), normal(T, k).abs()
    up, gate, down = (
        normal(*shape, dtype=dtype) / 8 for shape in ((E, inner, d), (E, inner, d), (E, d, inner))
    )
    chosen = torch.tensor([[2, t % 2 * 3 if t > 3 else 1] for t in range(T)], device=DEVICE)
    truth = torch.zeros(T, d, dtype=torch.float64, device=DEVICE)
    for t, r in itertools.product(range(T), range(k)):
        v, (first, second, last) = x[t].double(), (m[chosen[t, r]].double() for m in (gate, up, down))
        hidden = torch_ops.swiglu(first @ v, second @ v) if gated else torch_ops.relu2(second @ v)
        truth[t] += weights[t, r].double() * (last @ hidden)
    found = experts.experts(
        x, chosen, weights, gate if gated else None, up, down, experts.ExpertTuning(rows=32)
    )
    assert found.dtype == torch.float32
    assert relative_error(found.cpu(), truth.cpu()) <= (EXACT if dtype == torch.float32 else 2**-8)


@every_dtype
@pytest.mark.parametrize("rows", [1, 3])
def test_few_rows(dtype: torch.dtype, rows: int) -> None:
    normal = draw(rows)
    x, residual = normal(rows, 1, 200, dtype=dtype), normal(rows, 1, 37, dtype=dtype)
    weight, gated = normal(37, 200, dtype=dtype), normal(37, 200, dtype=dtype)
    bias = normal(37, dtype=dtype)
    product = torch_ops.linear(*doubles(x, weight, bias), "")
    found = matmul.few_rows(x, weight, bias=bias, residual=residual)
    assert_rounded_once(found, product + residual, dtype)
    truth = torch_ops.swiglu(*(torch_ops.linear(*doubles(x, w, None), "") for w in (weight, gated)))
    assert_rounded_once(matmul.few_rows(x, weight, gated=gated), truth, dtype)
    wide = matmul.few_rows(x, weight, dtype=torch.float32)
    assert_rounded_once(wide, torch_ops.linear(*doubles(x, weight, None), ""), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_product_is_added_to_the_stream_and_rounded_once(dtype: torch.dtype) -> None:
    normal = draw(9)
    y, weight, bias = normal(2, 20, 300, dtype=dtype), normal(37, 300, dtype=dtype), normal(37, dtype=dtype)
    for added in (bias, None):
        x = 20 * normal(2, 20, 37, dtype=dtype)
        truth = x.double() + torch_ops.linear(*doubles(y, weight, added), "")
        assert_rounded_once(matmul.add_linear(x, y, weight, added, ""), truth, dtype)


def test_gate_and_up_side_by_side() -> None:
    normal = draw(5)
    names = [f"model.layers.0.feed_forward.{part}_proj.weight" for part in ("gate", "up", "down")]
    weights = dict(zip(names, (normal(30, 20), normal(30, 20), normal(20, 30)), strict=True))
    arranged = matmul.arrange(weights)
    assert all(torch.equal(arranged[name], weight) for name, weight in weights.items())
    gate, up = (arranged[name] for name in names[:2])
    assert up.data_ptr() == gate.data_ptr() + gate.nbytes
    again = matmul.arrange(arranged)
    assert all(again[name] is arranged[name] for name in names)
    x = normal(2, 9, 20)
    truth = torch_ops.swiglu(*(torch_ops.linear(x.double(), w.double(), None, "") for w in (gate, up)))
    for pair in ((gate, up), (weights[names[0]], weights[names[1]])):
        found = matmul.gate_up(x, (pair[0], None, names[0]), (pair[1], None, names[1]))
        assert relative_error(found.cpu(), truth.cpu()) <= EXACT
    total, y = normal(2, 9, 20), normal(2, 9, 30)
    expected = total.double() + torch_ops.linear(*doubles(y, weights[names[2]], None), "")
    found = matmul.add_linear(total, y, weights[names[2]], None, names[2])
    assert relative_error(found.cpu(), expected.cpu()) <= EXACT


@every_dtype
@pytest.mark.parametrize(("last", "starts"), [(257, (0, 5)), (0, (0, 0)), (70, (64, 70))])
def test_attention_of_one_token(dtype: torch.dtype, last: int, starts: tuple[int, int]) -> None:
    normal = draw(last)
    q, k, v = normal(2, 1, 8, 40, dtype=dtype), *normal(2, 2, 300, 2, 40, dtype=dtype)
    first = torch.tensor(starts, device=DEVICE)
    found = attention.decode_attention(q, k, v, 0.2, torch.tensor([last], device=DEVICE), first)
    seen = (q.double(), k[:, : last + 1].double(), v[:, : last + 1].double())
    assert_rounded_once(found, torch_ops.attention(*seen, 0.2, first, None), dtype)


@every_dtype
@pytest.mark.parametrize("heads", [2, 8])
@pytest.mark.parametrize(("L", "S"), [(70, 70), (1, 70), (9, 70)])
def test_attention(dtype: torch.dtype, heads: int, L: int, S: int) -> None:
    normal = draw(L)
    q, k, v = normal(2, L, heads, 40, dtype=dtype), *normal(2, 2, S, 2, 40, dtype=dtype)
    truth = torch_ops.attention(*doubles(q, k, v), 0.2, None, None)
    found = attention.attention(q, k, v, 0.2, None, None)
    # On a GPU torch's kernels round the weights of the values as well, and may multiply float32 in parts.
    bound = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert found.dtype == dtype and relative_error(found.cpu(), truth.cpu()) <= bound


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@every_dtype
def test_attention_holds_no_scores(dtype: torch.dtype) -> None:
    """Of 8 heads for 2, each 4,096 tokens before as many: one head's scores alone are 4 bytes × 4,096²."""
    q, k, v = (torch.randn(1, 4096, n, 64, device="cuda").to(dtype) for n in (8, 2, 2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention.attention(q, k, v, 0.125, None, None)
    assert torch.cuda.max_memory_allocated() - before < 4 * 4096**2


def test_another_gpu_than_the_current_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton would start its kernel on the current one, and read memory there."""

    class Elsewhere:
        dtype, is_cuda, device = torch.float32, True, torch.device("cuda:1")

        def get_device(self) -> int:
            return 1

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(BackendError, match=r"set_device\(1\)"):
        launch.check(Elsewhere())  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    launch.check(Elsewhere())  # type: ignore[arg-type]


def test_float64_is_refused() -> None:
    x = torch.randn(1, 4, 16, dtype=torch.float64, device=DEVICE)
    for call in (
        lambda: norms.rms_norm(x, x[0, 0], EPS),
        lambda: norms.gated_norm(x, x, x[0, 0], 1, EPS),
        lambda: elementwise.swiglu(x, x),
        lambda: convolution.conv(x, x[0, :, :2].t(), None, x[:, :1], None),
    ):
        with pytest.raises(BackendError, match="float64"):
            call()
