"""Gradients of the kernels are those of ``torch.ops`` and ``torch.scan`` in float64, and a model's are torch's."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bamba_reference.kernels.backend import TRITON, Differentiable
from bamba_reference.kernels.backward import norms
from bamba_reference.kernels.backward.backend import TRITON_GRADIENTS
from bamba_reference.kernels.decode import _in_place
from bamba_reference.tensors import tensor_shapes
from bamba_reference.torch import forward as torch_forward
from bamba_reference.torch import ops as torch_ops
from bamba_reference.torch.backend import TORCH
from tests.reference.cases import random_case, random_tokens, relative_error
from tests.reference.kernels.test_operations import every_dtype
from tests.reference.operations import EPS, EXACT, assert_rounded_once, doubles, draw, random_starts
from tests.support.kernels import DEVICE


def wants(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def gradients(
    operation: Any, arguments: list[Any], upstream: list[Tensor] | None
) -> tuple[list[Tensor], Any]:
    """Of every float tensor among the arguments, and the upstream gradients: drawn where they are not given."""
    leaves = [v.detach().requires_grad_() if wants(v) else v for v in arguments]
    results = operation(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    if upstream is None:
        upstream = [draw(7)(*each.shape, dtype=each.dtype) for each in results]
    found = torch.autograd.grad(
        results,
        [leaf for leaf in leaves if wants(leaf)],
        [given.to(each.dtype) for given, each in zip(upstream, results, strict=True)],
    )
    return list(found), upstream


def agree(ours: Any, truth: Any, *arguments: Any, besides: float = EXACT) -> None:
    """Each gradient is the float64 one rounded once to its tensor's dtype, for the same upstream gradients."""
    found, upstream = gradients(ours, list(arguments), None)
    expected, _ = gradients(truth, doubles(*arguments), upstream)
    given = [v for v in arguments if wants(v)]
    for mine, exact, argument in zip(found, expected, given, strict=True):
        assert mine.shape == argument.shape
        assert_rounded_once(mine, exact, argument.dtype, besides)


@every_dtype
@pytest.mark.parametrize("groups", [1, 3])
def test_norms(dtype: torch.dtype, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "_PROGRAMS", 4)  # several rows each, and not all as many
    normal = draw(groups)
    x, delta, y = normal(3, 2, 5, 60, dtype=dtype)
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    weight, z = normal(60), normal(2, 5, 100, dtype=dtype)[..., 17:77]
    agree(TRITON.rms_norm, torch_ops.rms_norm, x, weight, EPS)
    agree(TRITON.gated_norm, torch_ops.gated_norm, y, z, weight, groups, EPS)

    def summed(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The kernel norms the sum as it is rounded."""
        total = x + delta
        rounded = total + (total.to(dtype) - total).detach()
        return total, torch_ops.rms_norm(rounded, weight, eps)

    agree(TRITON.add_norm, summed, x, delta, weight, EPS)


def test_one_of_two_results_is_used() -> None:
    x, delta, weight = (v.requires_grad_() for v in draw(0)(3, 5, 60))
    total, y = TRITON.add_norm(x, delta, weight[0], EPS)
    assert torch.equal(*torch.autograd.grad(total.sum(), [x, delta], retain_graph=True))
    assert torch.autograd.grad(total.sum(), [x], retain_graph=True)[0].eq(1).all()
    (found,) = torch.autograd.grad(y.sum(), [x])
    (exact,) = torch.autograd.grad(
        torch_ops.rms_norm((x + delta).double(), weight[0].double(), EPS).sum(), [x]
    )
    assert relative_error(found.cpu(), exact.cpu()) <= EXACT


@every_dtype
@pytest.mark.parametrize(
    ("L", "K", "packed", "biased"),
    [
        (1, 4, False, True),
        (2, 4, True, False),
        (70, 4, True, True),
        (70, 2, False, False),
        (33, 3, True, True),
    ],
)
def test_conv(dtype: torch.dtype, L: int, K: int, packed: bool, biased: bool) -> None:
    normal, W = draw(L), 37
    xBC = normal(2, L, W + 20, dtype=dtype)[..., 11 : 11 + W]
    weight, bias = normal(W, 1, K)[:, 0], normal(W) if biased else None
    sequence_starts = random_starts(L, 2, L) if packed else None
    tail = normal(2, K - 1, W, dtype=dtype)
    agree(TRITON.conv, torch_ops.conv, xBC, weight, bias, tail, sequence_starts)
    # What no gradient is wanted of is not computed, and changes nothing.
    free = xBC.detach().requires_grad_()
    (alone,) = torch.autograd.grad(TRITON.conv(free, weight, bias, tail, sequence_starts).sum(), [free])
    whole = gradients(TRITON.conv, [xBC, weight, bias, tail, sequence_starts], [torch.ones_like(xBC)])
    assert torch.equal(alone, whole[0][0])


@every_dtype
@pytest.mark.parametrize(("E", "half", "rows"), [(40, 8, 1), (16, 8, 3)])
def test_elementwise(dtype: torch.dtype, E: int, half: int, rows: int) -> None:
    normal = draw(E)
    q, angles = normal(3, 7, 5, E, dtype=dtype), normal(rows, 7, half).double()

    def turned(rotary: Any, wide: torch.dtype) -> Any:
        return lambda x: rotary(x, angles.cos().to(wide), angles.sin().to(wide))

    agree(turned(TRITON.rotary, torch.float32), turned(torch_ops.rotary, torch.float64), q)
    gate, up = normal(2, 5, 70, dtype=dtype).split([30, 40], dim=-1)
    for multiplier in (1.0, 0.7):
        agree(TRITON.swiglu, torch_ops.swiglu, gate, up[..., :30], multiplier)
    agree(TRITON.relu2, torch_ops.relu2, up)


@every_dtype
def test_products(dtype: torch.dtype) -> None:
    normal = draw(2)
    x, stream = normal(2, 3, 40, dtype=dtype), normal(2, 3, 30, dtype=dtype)
    weight, other, bias = normal(30, 40, dtype=dtype), normal(30, 40, dtype=dtype), normal(30, dtype=dtype)
    # cuBLAS may sum float32 in another order, and narrow results are rounded between the operations.
    besides = EXACT if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for added in (bias, None):
        agree(TRITON.linear, torch_ops.linear, x, weight, added, "", besides=besides)
        agree(
            lambda *v: TRITON.gate_up(v[0], (v[1], v[3], ""), (v[2], None, ""), 0.7),
            lambda *v: torch_ops.swiglu(v[0] @ v[1].t() + (0 if v[3] is None else v[3]), v[0] @ v[2].t(), 0.7),
            *(x, weight, other, added),
            besides=besides,
        )  # fmt: skip
        agree(
            TRITON.add_linear,
            lambda s, x, w, b, _, m: s + torch_ops.linear(x, w, b, "") * m,
            *(stream, x, weight, added, "", 0.7),
            besides=besides,
        )
    agree(TRITON.head, torch_ops.head, x, weight, "", besides=besides)


@every_dtype
@pytest.mark.parametrize("kind", ["whole", "packed", "padded", "continued"])
def test_attention(dtype: torch.dtype, kind: str) -> None:
    normal = draw(3)
    q, k, v = normal(2, 70, 8, 40, dtype=dtype), *normal(2, 2, 70, 2, 40, dtype=dtype)
    padding = torch.tensor([0, 5], device=DEVICE) if kind == "padded" else None
    sequences = [(0, 0, 30), (0, 30, 70), (1, 0, 70)] if kind == "packed" else None
    q = q[:, 40:] if kind == "continued" else q
    bound = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    agree(TRITON.attention, torch_ops.attention, q, k, v, 0.2, padding, sequences, besides=bound)


def test_kernels_run_where_no_gradient_is_wanted() -> None:
    x, weight = draw(4)(2, 4, 60), draw(5)(60)
    calls: list[str] = []
    ops = Differentiable(lambda *_: calls.append("kernel"), lambda *_: calls.append("gradients"))
    wanting = weight.clone().requires_grad_()
    ops(x, weight)
    ops(x, (wanting, None))
    with torch.no_grad():
        ops(x, wanting)
    assert calls == ["kernel", "gradients", "kernel"]
    replaced = {name for name, each in vars(TRITON).items() if isinstance(each, Differentiable)}
    plain = {"attention", "embedding", "column_sums", "next_tail", "recurrence", "arrange", "decoder"}
    same = {name for name, each in vars(TRITON).items() if callable(each)} - replaced
    assert same == plain, "an operation without gradients"
    # Decoding still reads weights early, but not through a function that a caller has put in their place.
    fixed = torch.zeros(1)
    assert _in_place(TRITON, fixed, fixed).linear.keywords == {"settled": True}
    watched = dataclasses.replace(TRITON, linear=torch_ops.linear)
    assert _in_place(watched, fixed, fixed).linear is torch_ops.linear


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("two groups, finite limit", "packed"),
        ("falcon h1, tied, norm, two groups, short convolution, finite limit", "whole"),
        ("jamba", "packed"),
        ("nemotron, latent experts beside networks", "padded"),
    ],
)
def test_model(name: str, how: str) -> None:
    """Gradients of every weight, also where ``forward`` composes what is fused."""
    case = random_case(name)
    config = dataclasses.replace(case.config, layers=case.config.layers[:2])
    tokens = random_tokens(case, 2, 6)
    arguments: dict[str, Any] = {}
    if how == "packed":
        arguments = {"seq_idx": np.repeat([[0, 1, 2], [4, 5, 5]], [3, 1, 2], axis=1)}
    elif how == "padded":
        arguments = {"attention_mask": np.repeat([[0, 1], [1, 1]], [2, 4], axis=1)}
    found: list[tuple[Tensor, ...]] = []
    for backend in (TORCH, TRITON_GRADIENTS if how == "whole" else TRITON):
        weights = {n: case.weights[n] for n in tensor_shapes(config)}
        model = torch_forward.load(config, weights, device=DEVICE, backend=backend)
        # A sigmoid router's correction only chooses. As ``gradient_costs`` asks, of tensors side by side in memory too.
        leaves = [w.requires_grad_() for n, w in model.weights.items() if not n.endswith("router.correction")]
        logits = torch_forward.forward(model, tokens, **arguments).logits
        direction = draw(1)(*logits.shape)
        found.append(torch.autograd.grad((logits * direction).sum(), leaves, materialize_grads=True))
    for truth, mine in zip(*found, strict=True):
        assert relative_error(mine.cpu(), truth.cpu()) <= 5e-5
