"""Every figure is what llama-perplexity's definition gives, from blocks of any size, and flips are counted right."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bamba_quant.evaluation import figures
from bamba_quant.evaluation.intervals import Bootstrap
from bamba_quant.evaluation.result import FIGURES
from bamba_quant.evaluation.scores import Scores, base_block, collect, score
from tests.evaluation.oracle import table

CHUNKS, EACH = 10, 31


def logits(
    seed: int, vocab_size: int, spread: float = 3.0, noise: float = 0.3
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    base = spread * rng.standard_normal((CHUNKS * EACH, vocab_size)).astype(np.float32)
    return base, base + noise * rng.standard_normal(base.shape).astype(np.float32)


def scored(base: np.ndarray, other: np.ndarray, targets: np.ndarray, block: int = 1000) -> Scores:
    blocks = []
    for start in range(0, len(base), block):
        now = slice(start, start + block)
        blocks.append(
            score(base_block(torch.from_numpy(base[now]), targets[now]), torch.from_numpy(other[now]))
        )
    return collect(blocks, CHUNKS)


@pytest.mark.parametrize(
    ("vocab_size", "spread", "noise"), [(50, 3, 0.3), (3, 1, 1), (700, 30, 0.01), (300, 6, 5)]
)
def test_the_table_is_llama_perplexitys(vocab_size: int, spread: float, noise: float) -> None:
    base, other = logits(vocab_size, vocab_size, spread, noise)
    targets = np.random.default_rng(1).integers(vocab_size, size=len(base))
    expected = table(base, other, targets.tolist())
    found = figures.figures(scored(base, other, targets), Bootstrap(CHUNKS, 0, 1000), None)
    assert list(found) == list(FIGURES)
    for key, value in expected.items():
        ours = found[key.removeprefix("± ")]
        number = ours.naive_error if key.startswith("±") else ours.value
        assert number == pytest.approx(value, rel=1e-6, abs=1e-9), key
    with_errors = {key.removeprefix("± ") for key in expected if key.startswith("±")}
    assert {key for key, figure in found.items() if figure.naive_error is not None} == with_errors


@pytest.mark.parametrize("block", [1, 7, 100])
def test_blocks_change_nothing(block: int) -> None:
    base, other = logits(0, 300)
    targets = np.random.default_rng(1).integers(300, size=len(base))
    whole, parts = scored(base, other, targets), scored(base, other, targets, block)
    for name, values in vars(whole).items():
        np.testing.assert_allclose(getattr(parts, name), values, rtol=1e-12, atol=1e-14)


def test_adding_a_constant_to_logits_changes_nothing() -> None:
    base, other = logits(0, 100)
    targets = np.zeros(len(base), np.int64)
    moved = scored(base + np.float32(8), other - np.float32(4), targets)
    plain = scored(base, other, targets)
    np.testing.assert_allclose(moved.kld, plain.kld, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(moved.nll, plain.nll, rtol=1e-5, atol=1e-6)


def test_a_model_against_itself_loses_nothing() -> None:
    base, _ = logits(0, 1000, spread=10)
    found = figures.values(scored(base, base.copy(), np.zeros(len(base), np.int64)))
    for key, kind in FIGURES.items():
        if kind.perfect is not None:
            assert found[key] == pytest.approx(kind.perfect, abs=1e-12), key


def test_agreement_by_hand() -> None:
    base = np.array([[5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5]] * (CHUNKS * EACH // 2), np.float32)
    other = np.array([[5, 4, 3, 2, 0, 1], [9, 1, 2, 3, 4, 5]] * (CHUNKS * EACH // 2), np.float32)
    targets = np.array([0, 5] * (CHUNKS * EACH // 2))
    found = figures.values(scored(base, other, targets))
    assert found["same_top"] == 0.5
    assert found["top_5_overlap"] == pytest.approx((4 + 4) / 10)
    assert (found["flips"], found["accuracy_difference"]) == (0.5, -0.5)


@given(st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=60)
def test_mcnemar_is_the_exact_binomial_test(lost: int, gained: int) -> None:
    right_base = np.array([True] * lost + [False] * gained + [True, False])[None]
    right = np.array([False] * lost + [True] * gained + [True, False])[None]
    zero = np.zeros(right.shape)
    found = figures.flips(Scores(zero, zero, zero, zero, right, zero.astype(int), right_base, right))
    n = lost + gained
    tail = sum(math.comb(n, k) for k in range(min(lost, gained) + 1)) / 2**n
    assert (found.lost, found.gained) == (lost, gained)
    assert found.p_value == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


def test_histograms_count_every_token() -> None:
    values = np.array([-2.0, -1.0, 0.0, 0.5, 1.0, 1.5])
    found = figures.histogram(values, np.array([-1.0, 0.0, 1.0]))
    assert (found.below, found.counts, found.above) == (1, (1, 3), 1)
