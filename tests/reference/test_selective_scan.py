"""Mamba's recurrence token by token, in chunks side by side and in torch is the same recurrence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bamba_reference import chunked_scan
from bamba_reference import model as numpy_model
from bamba_reference.numpy_ops import silu
from bamba_reference.torch import scan as torch_scan
from bamba_reference.torch.scan import SelectiveScanArguments
from tests.reference.cases import relative_error

TOLERANCE = 2e-5
INNER, N = 6, 5
lengths, chunks, seeds = st.integers(1, 70), st.integers(1, 80), st.integers(0, 2**32 - 1)


def arguments(L: int, seed: int) -> dict[str, np.ndarray]:
    """x, dt, A, B, C, h and starts of packed sequences for 6 channels with states of 5."""
    random = np.random.default_rng(seed)
    return {
        "x": random.normal(size=(L, INNER)),
        "dt": np.exp(random.uniform(np.log(1e-3), np.log(3), size=(L, INNER))),
        "A": -random.uniform(0.5, 16, size=(INNER, N)),
        "B": random.normal(size=(L, N)),
        "C": random.normal(size=(L, N)),
        "h": random.normal(size=(INNER, N)),
        "sequence_starts": random.random(L) < 0.1,
    }


@settings(max_examples=60, deadline=None)
@given(L=lengths, chunk=chunks, seed=seeds)
def test_chunked_is_sequential(L: int, chunk: int, seed: int) -> None:
    given_ = arguments(L, seed)
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, TOLERANCE)):
        typed = {k: v if k == "sequence_starts" else v.astype(dtype) for k, v in given_.items()}
        y, h = numpy_model.mamba1_scan(**typed)
        chunked_y, chunked_h = chunked_scan.mamba1_scan(**typed, chunk=chunk)
        assert relative_error(chunked_y, y) <= tolerance
        assert relative_error(chunked_h, h) <= tolerance
        assert chunked_y.dtype == chunked_h.dtype == dtype


def test_the_recurrence_is_the_papers() -> None:
    """Written out once more, element by element (Gu and Dao 2023, equations 2 and 4)."""
    a = arguments(9, 0)
    h, expected = a["h"].copy(), np.zeros((9, INNER))
    for t in range(9):
        for i in range(INNER):
            for n in range(N):
                kept = 0 if a["sequence_starts"][t] else np.exp(a["dt"][t, i] * a["A"][i, n]) * h[i, n]
                h[i, n] = kept + a["dt"][t, i] * a["B"][t, n] * a["x"][t, i]
                expected[t, i] += a["C"][t, n] * h[i, n]
    y, last = numpy_model.mamba1_scan(**a)
    assert relative_error(y, expected) <= 1e-13
    assert relative_error(last, h) <= 1e-13


def in_torch(rows: list[dict[str, np.ndarray]], dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """The rows as a batch, with D, z and a bias of dt, for ``selective_scan`` but ``chunk``."""
    random = np.random.default_rng(seed)
    bias = random.normal(size=INNER)

    def batch(name: str, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.from_numpy(np.stack([row[name] for row in rows])).to(kind)

    raw = torch.log(torch.expm1(batch("dt", torch.float64))) - torch.from_numpy(bias)  # softplus undone
    return {
        "x": batch("x"),
        "dt": raw.to(dtype),
        "A_log": torch.from_numpy(np.log(-rows[0]["A"])).to(dtype),
        "B": batch("B"),
        "C": batch("C"),
        "D": torch.from_numpy(random.normal(size=INNER)).to(dtype),
        "z": torch.from_numpy(random.normal(size=(len(rows), len(rows[0]["x"]), INNER))).to(dtype),
        "dt_bias": torch.from_numpy(bias).to(dtype),
        "h": batch("h"),
        "sequence_starts": batch("sequence_starts", torch.bool),
        "real": None,
    }


@settings(max_examples=60, deadline=None)
@given(L=lengths, chunk=chunks, elements=st.sampled_from([1, 500, 2000, 1 << 20]), seed=seeds)
def test_torch_is_sequential(L: int, chunk: int, elements: int, seed: int) -> None:
    """However many chunks fit side by side."""
    first, second = arguments(L, seed), arguments(L, seed + 1)
    rows = [first, second | {"A": first["A"]}]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, TOLERANCE)):
        batch = in_torch(rows, dtype, seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch_scan, "_CPU_ELEMENTS", elements)
            y, h = torch_scan.selective_scan(SelectiveScanArguments(**batch, chunk=chunk))
        for i, row in enumerate(rows):
            expected, last = numpy_model.mamba1_scan(**row)
            expected = (expected + batch["D"].double().numpy() * row["x"]) * silu(
                batch["z"][i].double().numpy()
            )
            assert relative_error(y[i], expected) <= tolerance
            assert relative_error(h[i], last) <= tolerance


def test_padding_leaves_the_state() -> None:
    batch = in_torch([arguments(8, 1)], torch.float64, 1) | {"sequence_starts": None}
    real = torch.zeros(1, 8, dtype=torch.bool)
    _, h = torch_scan.selective_scan(SelectiveScanArguments(**batch | {"real": real}, chunk=3))
    assert torch.equal(h, batch["h"])


@pytest.mark.parametrize("chunk", [1, 3, 4, 9])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_finite_differences(chunk: int, packed: bool) -> None:
    """With respect to every argument, the state included; 9 tokens make several chunks and a rest."""
    batch = in_torch([arguments(9, 2), arguments(9, 3)], torch.float64, 2)
    sequence_starts = (
        torch.tensor([[False] * 5 + [True] + [False] * 3, [True] + [False] * 8]) if packed else None
    )
    names = [
        name for name, value in batch.items() if isinstance(value, torch.Tensor) and name != "sequence_starts"
    ]

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given_ = dict(zip(names, values, strict=True)) | {"sequence_starts": sequence_starts, "real": None}
        return torch_scan.selective_scan(SelectiveScanArguments(**given_, chunk=chunk))

    assert torch.autograd.gradcheck(run, tuple(batch[name].requires_grad_() for name in names))
