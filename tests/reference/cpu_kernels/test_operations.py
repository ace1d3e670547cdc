"""Each compiled kernel gives what the operation of its name in ``torch.ops`` gives in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

from bamba_reference.kernels.cpu import elementwise, launch, matmul, norms
from bamba_reference.kernels.cpu.backend import NUMBA
from bamba_reference.torch import ops as torch_ops
from bamba_reference.torch import scan as torch_scan
from bamba_reference.torch.backend import TORCH
from bamba_reference.torch.scan import ScanArguments
from tests.reference.cases import relative_error
from tests.reference.operations import EPS, EXACT, doubles, draw, random_starts

CPU = torch.device("cpu")
some = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)


@pytest.fixture(autouse=True, params=[1, 3], ids=lambda n: f"{n} threads")
def several_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


# Either side of a tile, of a block of columns (384), of a part of a sum (128), and of a block of terms (1,024).
@some
@given(
    M=st.integers(1, 150),
    N=st.integers(1, 120) | st.integers(380, 440),
    K=st.integers(1, 300) | st.integers(1000, 1200),
    biased=st.booleans(),
    seed=seeds,
)
def test_product(M: int, N: int, K: int, biased: bool, seed: int) -> None:
    normal = draw(seed, CPU)
    x, weight = normal(M, K + 3)[:, 3:], normal(N, K + 5)[:, :K]
    bias = normal(N) if biased else None
    found = matmul.matmul(x, weight, bias)
    assert relative_error(found, torch_ops.linear(*doubles(x, weight, bias), "")) <= EXACT


@pytest.mark.parametrize("terms", [512, 4096])
def test_products_err_no_more_than_torch(terms: int) -> None:
    normal = draw(terms, CPU)
    x, weight = normal(96, terms), normal(480, terms)
    truth = F.linear(x.double(), weight.double())
    found = relative_error(matmul.matmul(x, weight, None), truth)
    assert found <= relative_error(F.linear(x, weight), truth)


ONES = torch.ones
STATE = dict(zip(("x", "dt", "A", "B", "C", "D", "bias", "h"), (
    (2, 20, 4, 8), (2, 20, 4), (4,), (2, 20, 2, 6), (2, 20, 2, 6), (4,), (4,), (2, 4, 8, 6)
), strict=True))  # fmt: skip


def scanned(ops: Any, **other: tuple[int, ...]) -> Any:
    x, dt, A, B, C, D, bias, h = (ONES(other.get(name, shape)) for name, shape in STATE.items())
    return ops.scan(ScanArguments(x, dt, A, B, C, D, bias, (0.0, torch.inf), h, 32, None, None))


# Where one of the sizes is wrong.
MISFITS: dict[str, Any] = {
    "linear": lambda ops: ops.linear(ONES(80, 48), ONES(48, 47), None, ""),
    "linear's bias": lambda ops: ops.linear(ONES(80, 48), ONES(48, 48), ONES(47), ""),
    "head": lambda ops: ops.head(ONES(80, 48), ONES(48, 47), ""),
    "rms_norm": lambda ops: ops.rms_norm(ONES(20, 60), ONES(30), EPS),
    "gated_norm": lambda ops: ops.gated_norm(ONES(20, 60), ONES(20, 30), ONES(60), 1, EPS),
    "gated_norm's weight": lambda ops: ops.gated_norm(ONES(20, 60), ONES(20, 60), ONES(30), 1, EPS),
    "gated_norm's groups": lambda ops: ops.gated_norm(ONES(20, 60), ONES(20, 60), ONES(60), 7, EPS),
    "swiglu": lambda ops: ops.swiglu(ONES(20, 60), ONES(20, 59)),
    "rotary's tokens": lambda ops: ops.rotary(ONES(2, 20, 3, 8), *ONES(2, 1, 19, 4)),
    "rotary's rows": lambda ops: ops.rotary(ONES(2, 20, 3, 8), *ONES(2, 3, 20, 4)),
    "rotary's head": lambda ops: ops.rotary(ONES(2, 20, 3, 8), *ONES(2, 1, 20, 6)),
    "conv": lambda ops: ops.conv(ONES(2, 20, 8), ONES(7, 4), None, ONES(2, 3, 8), None),
    "conv's bias": lambda ops: ops.conv(ONES(2, 20, 8), ONES(8, 4), ONES(7), ONES(2, 3, 8), None),
    "conv's tail": lambda ops: ops.conv(ONES(2, 20, 8), ONES(8, 4), None, ONES(2, 2, 8), None),
    "attention's heads": lambda ops: ops.attention(ONES(1, 20, 3, 8), *ONES(2, 1, 20, 2, 8), 1.0, None, None),
    "attention's keys": lambda ops: ops.attention(ONES(2, 20, 4, 8), *ONES(2, 2, 20, 2, 7), 1.0, None, None),
    **{f"scan's {name}": lambda ops, name=name, shape=shape: scanned(ops, **{name: (*shape[:-1], shape[-1] - 1)})
       for name, shape in STATE.items()},
    "scan's groups": lambda ops: scanned(ops, B=(2, 20, 3, 6), C=(2, 20, 3, 6)),
}  # fmt: skip


@pytest.mark.parametrize("call", MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_torchs_error(call: Any) -> None:
    """A kernel would read what lies behind the tensor."""
    with pytest.raises(RuntimeError) as theirs:
        call(TORCH)
    with pytest.raises(RuntimeError) as ours:
        call(NUMBA)
    assert str(ours.value) == str(theirs.value)


def test_what_is_broadcast_is_not_read_beyond_its_end() -> None:
    normal = draw(0, CPU)
    x, row = normal(20, 60), normal(60)
    assert torch.equal(NUMBA.swiglu(x, row), TORCH.swiglu(x, row))
    assert torch.equal(NUMBA.relu2(x[:, 7:40]), TORCH.relu2(x[:, 7:40]))
    assert torch.equal(NUMBA.rms_norm(x, row[:1], EPS), TORCH.rms_norm(x, row[:1], EPS))
    assert torch.equal(norms.add_norm(x, row, row, EPS)[0], x + row)


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    normal = draw(0, CPU)
    x, weight = normal(100, 200), normal(333, 200)
    expected = matmul.matmul(x, weight, None)
    for count in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        assert torch.equal(matmul.matmul(x, weight, None), expected)


def test_what_a_thread_raises_is_raised() -> None:
    torch.set_num_threads(3)
    ran = []

    def kernel(start: int, stop: int) -> None:
        ran.append((start, stop))
        if stop == 9:
            raise MemoryError("no memory")

    with pytest.raises(MemoryError):
        launch.share(kernel, count=9)
    assert sorted(ran) == [(0, 3), (3, 6), (6, 9)]


@some
@given(
    L=st.integers(1, 70),
    K=st.sampled_from([1, 2, 4, 5]),
    packed=st.booleans(),
    biased=st.booleans(),
    seed=seeds,
)
def test_conv(L: int, K: int, packed: bool, biased: bool, seed: int) -> None:
    normal = draw(seed, CPU)
    W = 37
    xBC = normal(2, L, W + 20)[..., 11 : 11 + W]  # strided, as the projection's part is
    weight, bias = normal(W, 1, K)[:, 0], normal(W) if biased else None
    tail = normal(2, K - 1, W) * (0 if packed else 1)
    sequence_starts = random_starts(seed, 2, L, CPU) if packed else None
    truth = torch_ops.conv(*doubles(xBC, weight, bias, tail), sequence_starts)
    assert relative_error(NUMBA.conv(xBC, weight, bias, tail, sequence_starts), truth) <= EXACT


@some
@given(
    L=st.sampled_from([1, 2, 31, 32, 33, 96, 100]),
    shape=st.sampled_from([(1, 16, 16), (2, 24, 5), (4, 64, 64), (2, 128, 16), (1, 7, 33)]),
    chunk=st.sampled_from([1, 5, 16, 32, 64, 256]),
    padding=st.sampled_from(["packed", "padded", "whole"]),
    seed=seeds,
)
def test_scan(L: int, shape: tuple[int, int, int], chunk: int, padding: str, seed: int) -> None:
    normal, H, B = draw(seed, CPU), 4, 2
    G, N, P = shape
    x, Bs, Cs = normal(B, L, H * P + 2 * G * N).split([H * P, G * N, G * N], dim=-1)
    arguments = [
        x.unflatten(-1, (H, P)),
        normal(B, L, H + 3)[..., 3:],
        normal(H).abs(),
        Bs.unflatten(-1, (G, N)),
        Cs.unflatten(-1, (G, N)),
        normal(H),
        normal(H) - 2,
        (0.0, float("inf")) if seed % 2 else (1e-2, 0.1),
        normal(B, H, P, N) * (padding != "packed"),
    ]
    sequence_starts = random_starts(seed, B, L, CPU) if padding == "packed" else None
    real = None
    if padding == "padded":
        real = torch.ones(B, L, dtype=torch.bool)
        real[0, : L // 3 + 1] = False
    before = arguments[8].clone()
    found = NUMBA.scan(ScanArguments(*arguments, chunk, sequence_starts, real))
    assert torch.equal(arguments[8], before)
    truth = torch_scan.scan(ScanArguments(*doubles(*arguments), 32, sequence_starts, real))
    for ours, expected in zip(found, truth, strict=True):
        assert relative_error(ours, expected) <= 2 * EXACT


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_a_scan_of_steps_in_any_order_in_memory(order: tuple[int, int, int]) -> None:
    """torch's own operations keep the order of what they are given."""
    normal, (B, L, H, P, N) = draw(1, CPU), (2, 40, 4, 16, 8)
    dt = normal(B, L, H)
    where = sorted(range(3), key=order.__getitem__)
    stored = dt.permute(order).contiguous().permute(where)
    assert torch.equal(stored, dt)
    x, Bs, Cs, h = normal(B, L, H, P), normal(B, L, 2, N), normal(B, L, 2, N), normal(B, H, P, N)
    found, expected = (
        NUMBA.scan(
            ScanArguments(x, some, ONES(H), Bs, Cs, ONES(H), ONES(H), (0.0, torch.inf), h, 32, None, None)
        )
        for some in (stored, dt)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("groups", [1, 3])
def test_norms(groups: int) -> None:
    normal = draw(groups, CPU)
    x, delta, weight = normal(2, 25, 60), normal(2, 25, 80)[..., 9:69], normal(60)
    found = NUMBA.rms_norm(x, weight, EPS)
    assert relative_error(found, torch_ops.rms_norm(*doubles(x, weight), EPS)) <= EXACT
    total, normed = norms.add_norm(x, delta, weight, EPS)
    assert torch.equal(total, x + delta)
    assert relative_error(normed, torch_ops.rms_norm(*doubles(total, weight), EPS)) <= EXACT
    z = normal(2, 25, 100)[..., 17:77]
    found = NUMBA.gated_norm(x, z, weight, groups, EPS)
    assert relative_error(found, torch_ops.gated_norm(*doubles(x, z, weight), groups, EPS)) <= EXACT


@pytest.mark.parametrize(("E", "half", "rows"), [(40, 8, 1), (16, 8, 3)])
def test_rotary(E: int, half: int, rows: int) -> None:
    normal = draw(E, CPU)
    q, angles = normal(3, 17, 5, E), normal(rows, 17, half)
    found = NUMBA.rotary(q, angles.cos(), angles.sin())
    assert relative_error(found, torch_ops.rotary(*doubles(q, angles.cos(), angles.sin()))) <= EXACT
    assert torch.equal(found[..., 2 * half :], q[..., 2 * half :])


def test_swiglu_at_every_size_of_number() -> None:
    gate = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, torch.inf])])
    gate = gate.repeat(20, 1)
    found = NUMBA.swiglu(gate, torch.full_like(gate, 2))
    truth = torch_ops.swiglu(gate.double(), torch.tensor(2.0).double())
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=1e-30)
    assert elementwise.swiglu(torch.tensor([[torch.nan, -torch.inf]]), torch.ones(1, 2)).isnan().all()


@pytest.mark.parametrize("columns", [1, 60, 700])
def test_column_sums(columns: int) -> None:
    x = draw(columns, CPU)(3, 40, columns + 9)[..., 4 : 4 + columns]
    truth = torch_ops.column_sums(x.double())
    torch.testing.assert_close(NUMBA.column_sums(x), truth, rtol=1e-13, atol=1e-13)


@some
@given(
    L=st.integers(16, 110),
    past=st.integers(0, 70),
    shape=st.sampled_from([(4, 4, 16), (4, 2, 40), (6, 1, 64), (2, 2, 5)]),
    how=st.sampled_from(["whole", "padded", "packed"]),
    seed=seeds,
)
def test_attention(L: int, past: int, shape: tuple[int, int, int], how: str, seed: int) -> None:
    normal, (heads, kv, E) = draw(seed, CPU), shape
    S = L if how == "packed" else L + past
    q, (k, v) = normal(2, L, heads, E), normal(2, 2, S, kv, E)
    starts = torch.tensor([S // 2, min(3, S - 1)]) if how == "padded" else None
    sequences = [(0, 0, L // 3), (0, L // 3, L), (1, 0, L)] if how == "packed" else None
    truth = torch_ops.attention(*doubles(q, k, v), E**-0.5, starts, sequences)
    assert relative_error(NUMBA.attention(q, k, v, E**-0.5, starts, sequences), truth) <= EXACT


def test_what_is_not_float32_or_wants_a_gradient_is_torchs() -> None:
    x, weight = torch.randn(80, 48, dtype=torch.float64), torch.randn(48, 48, dtype=torch.float64)
    calls: dict[str, Any] = {
        "linear": lambda ops, x, w: ops.linear(x, w, None, ""),
        "head": lambda ops, x, w: ops.head(x, w, ""),
        "rms_norm": lambda ops, x, w: ops.rms_norm(x, w[0], EPS),
        "gated_norm": lambda ops, x, w: ops.gated_norm(x, x, w[0], 1, EPS),
        "swiglu": lambda ops, x, w: ops.swiglu(x, x * w[0]),
        "relu2": lambda ops, x, w: ops.relu2(x * w[0]),
        "rotary": lambda ops, x, w: ops.rotary(x.view(1, 80, 6, 8), *w[:2, None, :4].expand(2, 80, 4)[:, None]),
        "conv": lambda ops, x, w: ops.conv(x[None], w[:, :4], None, x[None, :3], None),
        "scan": lambda ops, x, w: ops.scan(ScanArguments(
            x.view(1, 80, 6, 8), x[None, :, :6], w[0, :6], x.view(1, 80, 2, 24), x.view(1, 80, 2, 24),
            w[0, :6], w[1, :6], (0.0, torch.inf), torch.zeros(1, 6, 8, 24, dtype=x.dtype), 32, None, None,
        ))[0],
        "attention": lambda ops, x, w: ops.attention(*(x.view(1, 80, 6, 8),) * 3, 1.0, None, None),
        "column_sums": lambda ops, x, w: ops.column_sums(x),
    }  # fmt: skip
    fields = (field.name for field in dataclasses.fields(NUMBA))
    # The recurrence with stored states has tests of its own (tests/reference/test_stored_state.py).
    others = {"name", "add_norm", "recurrence"}
    assert {f for f in fields if getattr(NUMBA, f) != getattr(TORCH, f)} == others | set(calls)

    for call in calls.values():
        assert torch.equal(call(NUMBA, x, weight), call(TORCH, x, weight))
        # Of the activations and then of the weights, where the operation has any.
        for wanted in ((True, False), (False, True), (True, True)):
            grads = []
            for ops in (NUMBA, TORCH):
                both = [t.float().requires_grad_(want) for t, want in zip((x, weight), wanted, strict=True)]
                y = call(ops, *both)
                if y.requires_grad:
                    y.sum().backward()
                grads.append([t.grad for t in both])
            for found, expected in zip(*grads, strict=True):
                assert (found is None and expected is None) or torch.equal(found, expected)
        with torch.no_grad():
            found = call(NUMBA, *both)
        assert relative_error(found, call(TORCH, x, weight)) <= EXACT
        assert not found.requires_grad
    assert torch.equal(norms.add_norm(x, x, weight[0], EPS)[0], x + x)
