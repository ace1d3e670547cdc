"""Both recurrences are the same token by token, in chunks of any size, in numpy and in torch."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bamba_reference import chunked_scan, numpy_ops
from bamba_reference import model as numpy_model
from bamba_reference.numpy_ops import silu
from bamba_reference.torch import forward as torch_forward
from bamba_reference.torch import scan as torch_scan
from bamba_reference.torch.backend import Backend
from bamba_reference.torch.scan import ScanArguments, SelectiveScanArguments
from tests.reference.cases import RANDOM, every_backend, random_case, random_tokens, relative_error

TOLERANCE = 2e-5
HEADS, P, INNER, N = 4, 5, 6, 5
lengths, chunks, seeds = st.integers(1, 70), st.integers(1, 80), st.integers(0, 2**32 - 1)
groups = st.sampled_from([1, 2, 4])
some = settings(max_examples=60, deadline=None)
Mamba = Literal["mamba2", "mamba1"]


def arguments(mamba: Mamba, L: int, seed: int, G: int = 1) -> dict[str, np.ndarray]:
    """The arguments of numpy's scans: for Mamba-2 4 heads of 5 in G groups, for Mamba 6 channels; state size 5."""
    random = np.random.default_rng(seed)
    if mamba == "mamba2":
        x, dt, A, B, h = (L, HEADS, P), (L, HEADS), (HEADS,), (L, G, N), (HEADS, P, N)
    else:
        x, dt, A, B, h = (L, INNER), (L, INNER), (INNER, N), (L, N), (INNER, N)
    return {
        "x": random.normal(size=x),
        "dt": np.exp(random.uniform(np.log(1e-3), np.log(3), size=dt)),
        "A": -random.uniform(0.5, 16, size=A),
        "B": random.normal(size=B),
        "C": random.normal(size=B),
        "h": random.normal(size=h),
        "sequence_starts": random.random(L) < 0.1,
    }


def in_torch(rows: list[dict[str, np.ndarray]], dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """Rows of arguments with one A as a batch, with D and a bias of dt, but without ``chunk``, dt_limit and z."""
    random = np.random.default_rng(seed)
    channels = rows[0]["dt"].shape[1]
    bias = random.normal(size=channels)

    def batch(name: str, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.from_numpy(np.stack([row[name] for row in rows])).to(kind)

    raw = torch.log(torch.expm1(batch("dt", torch.float64))) - torch.from_numpy(bias)  # softplus undone
    return {
        "x": batch("x"),
        "dt": raw.to(dtype),
        "A_log": torch.from_numpy(np.log(-rows[0]["A"])).to(dtype),
        "B": batch("B"),
        "C": batch("C"),
        "D": torch.from_numpy(random.normal(size=channels)).to(dtype),
        "dt_bias": torch.from_numpy(bias).to(dtype),
        "h": batch("h"),
        "sequence_starts": batch("sequence_starts", torch.bool),
        "real": None,
    }


def selective(rows: list[dict[str, np.ndarray]], dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """``in_torch`` with a gate z, for ``SelectiveScanArguments``."""
    z = np.random.default_rng(seed + 1).normal(size=(len(rows), len(rows[0]["x"]), INNER))
    return in_torch(rows, dtype, seed) | {"z": torch.from_numpy(z).to(dtype)}


@pytest.mark.parametrize("mamba", ["mamba2", "mamba1"])
@some
@given(L=lengths, chunk=chunks, G=groups, seed=seeds)
def test_chunked_is_sequential(mamba: Mamba, L: int, chunk: int, G: int, seed: int) -> None:
    drawn = arguments(mamba, L, seed, G)
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, TOLERANCE)):
        typed = {k: v if k == "sequence_starts" else v.astype(dtype) for k, v in drawn.items()}
        y, h = getattr(numpy_ops, f"{mamba}_scan")(**typed)
        chunked_y, chunked_h = getattr(chunked_scan, f"{mamba}_scan")(**typed, chunk=chunk)
        assert relative_error(chunked_y, y) <= tolerance
        assert relative_error(chunked_h, h) <= tolerance
        assert chunked_y.dtype == chunked_h.dtype == dtype


def test_the_selective_recurrence_is_the_papers() -> None:
    """Written out once more, element by element (Gu and Dao 2023, equations 2 and 4)."""
    a = arguments("mamba1", 9, 0)
    h, expected = a["h"].copy(), np.zeros((9, INNER))
    for t in range(9):
        for i in range(INNER):
            for n in range(N):
                kept = 0 if a["sequence_starts"][t] else np.exp(a["dt"][t, i] * a["A"][i, n]) * h[i, n]
                h[i, n] = kept + a["dt"][t, i] * a["B"][t, n] * a["x"][t, i]
                expected[t, i] += a["C"][t, n] * h[i, n]
    y, last = numpy_ops.mamba1_scan(**a)
    assert relative_error(y, expected) <= 1e-13
    assert relative_error(last, h) <= 1e-13


@every_backend
@some
@given(L=lengths, chunk=chunks, G=groups, seed=seeds)
def test_backends_are_sequential(backend: Backend, L: int, chunk: int, G: int, seed: int) -> None:
    first, second = arguments("mamba2", L, seed, G), arguments("mamba2", L, seed + 1, G)
    rows = [first, second | {"A": first["A"]}]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, TOLERANCE)):
        batch = in_torch(rows, dtype, seed)
        y, h = backend.scan(ScanArguments(**batch, chunk=chunk, dt_limit=(0.0, float("inf"))))
        for i, row in enumerate(rows):
            expected, last = numpy_ops.mamba2_scan(**row)
            assert (
                relative_error(y[i], expected + batch["D"].double().numpy()[:, None] * row["x"]) <= tolerance
            )
            assert relative_error(h[i], last) <= tolerance


@some
@given(L=lengths, chunk=chunks, elements=st.sampled_from([1, 500, 2000, 1 << 20]), seed=seeds)
def test_selective_scan_is_sequential(L: int, chunk: int, elements: int, seed: int) -> None:
    """However many chunks are computed in parallel."""
    first, second = arguments("mamba1", L, seed), arguments("mamba1", L, seed + 1)
    rows = [first, second | {"A": first["A"]}]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, TOLERANCE)):
        batch = selective(rows, dtype, seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch_scan, "_CPU_ELEMENTS", elements)
            y, h = torch_scan.selective_scan(SelectiveScanArguments(**batch, chunk=chunk))
        for i, row in enumerate(rows):
            expected, last = numpy_ops.mamba1_scan(**row)
            expected = (expected + batch["D"].double().numpy() * row["x"]) * silu(
                batch["z"][i].double().numpy()
            )
            assert relative_error(y[i], expected) <= tolerance
            assert relative_error(h[i], last) <= tolerance


def test_padding_leaves_the_state() -> None:
    batch = selective([arguments("mamba1", 8, 1)], torch.float64, 1) | {"sequence_starts": None}
    real = torch.zeros(1, 8, dtype=torch.bool)
    _, h = torch_scan.selective_scan(SelectiveScanArguments(**batch | {"real": real}, chunk=3))
    assert torch.equal(h, batch["h"])


@pytest.mark.parametrize("chunk", [1, 3, 4, 9])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_finite_differences(chunk: int, packed: bool) -> None:
    """With respect to every argument, the state included; 9 tokens make several chunks and a rest."""
    batch = selective([arguments("mamba1", 9, 2), arguments("mamba1", 9, 3)], torch.float64, 2)
    starts = torch.tensor([[False] * 5 + [True] + [False] * 3, [True] + [False] * 8]) if packed else None
    names = [
        name for name, value in batch.items() if isinstance(value, torch.Tensor) and name != "sequence_starts"
    ]

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given_ = dict(zip(names, values, strict=True)) | {"sequence_starts": starts, "real": None}
        return torch_scan.selective_scan(SelectiveScanArguments(**given_, chunk=chunk))

    assert torch.autograd.gradcheck(run, tuple(batch[name].requires_grad_() for name in names))


@pytest.mark.parametrize("name", RANDOM)
@torch.no_grad()
def test_chunk_size_does_not_matter(name: str) -> None:
    case = random_case(name)
    tokens = random_tokens(case, 70)
    truth = numpy_model.forward(case.config, case.weights, tokens, chunk=None).logits
    single = numpy_model.forward(case.config, case.weights, tokens, chunk=None, dtype=np.float32)
    assert relative_error(single.logits, truth) <= TOLERANCE
    for chunk in (1, 7, 32, 64, 70, 256):
        logits = numpy_model.forward(case.config, case.weights, tokens, chunk=chunk, dtype=np.float32).logits
        assert relative_error(logits, truth) <= TOLERANCE
        model = torch_forward.load(case.config, case.weights, chunk=chunk)
        assert relative_error(torch_forward.forward(model, tokens[None]).logits[0], truth) <= TOLERANCE
