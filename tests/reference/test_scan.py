"""The recurrence token by token and in chunks of any size is the same recurrence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bamba_reference import chunked_scan
from bamba_reference import model as numpy_model
from bamba_reference.torch import forward as torch_forward
from bamba_reference.torch.backend import Backend
from bamba_reference.torch.scan import ScanArguments
from tests.reference.cases import RANDOM, every_backend, random_case, random_tokens, relative_error

TOLERANCE = 2e-5


def arguments(L: int, G: int, seed: int) -> dict[str, np.ndarray]:
    """x, dt, A, B, C, h and starts of packed sequences for 4 heads of 5, state size 6; G groups."""
    random = np.random.default_rng(seed)
    return {
        "x": random.normal(size=(L, 4, 5)),
        "dt": np.exp(random.uniform(np.log(1e-3), np.log(3), size=(L, 4))),
        "A": -random.uniform(0.5, 16, size=4),
        "B": random.normal(size=(L, G, 6)),
        "C": random.normal(size=(L, G, 6)),
        "h": random.normal(size=(4, 5, 6)),
        "sequence_starts": random.random(L) < 0.1,
    }


@settings(max_examples=60, deadline=None)
@given(
    L=st.integers(1, 70),
    chunk=st.integers(1, 80),
    G=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 2**32 - 1),
)
def test_chunked_is_sequential(L: int, chunk: int, G: int, seed: int) -> None:
    given_ = arguments(L, G, seed)
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, TOLERANCE)):
        typed = {k: v if k == "sequence_starts" else v.astype(dtype) for k, v in given_.items()}
        y, h = numpy_model.mamba2_scan(**typed)
        chunked_y, chunked_h = chunked_scan.mamba2_scan(**typed, chunk=chunk)
        assert relative_error(chunked_y, y) <= tolerance
        assert relative_error(chunked_h, h) <= tolerance
        assert chunked_y.dtype == chunked_h.dtype == dtype


@every_backend
@settings(max_examples=60, deadline=None)
@given(
    L=st.integers(1, 70),
    chunk=st.integers(1, 80),
    G=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 2**32 - 1),
)
def test_backends_are_sequential(backend: Backend, L: int, chunk: int, G: int, seed: int) -> None:
    rows = [arguments(L, G, seed), arguments(L, G, seed + 1)]
    A, D = rows[0]["A"], np.random.default_rng(seed).normal(size=4)
    expected = []
    for row in rows:
        y, h = numpy_model.mamba2_scan(**row | {"A": A})
        expected.append((y + D[:, None] * row["x"], h))

    def batch(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.stack([row[name] for row in rows])).to(dtype)

    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, TOLERANCE)):
        raw = torch.log(torch.expm1(batch("dt", torch.float64)))  # softplus undone
        y, h = backend.scan(
            ScanArguments(
                batch("x", dtype),
                raw.to(dtype),
                torch.from_numpy(np.log(-A)).to(dtype),
                batch("B", dtype),
                batch("C", dtype),
                torch.from_numpy(D).to(dtype),
                torch.zeros(4, dtype=dtype),
                (0.0, float("inf")),
                batch("h", dtype),
                chunk,
                batch("sequence_starts", torch.bool),
                None,
            )
        )
        assert relative_error(y, np.stack([y for y, _ in expected])) <= tolerance
        assert relative_error(h, np.stack([h for _, h in expected])) <= tolerance


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
