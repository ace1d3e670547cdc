"""The search keeps its budget and finds what trying everything finds, or nearly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bamba_quant.errors import PlanError
from bamba_quant.recipes.least_cost import Option, least_cost

OPTIONS = st.lists(st.builds(Option, st.integers(1, 200), st.floats(0, 100)), min_size=1, max_size=5)


@given(st.lists(OPTIONS, min_size=1, max_size=4), st.integers(1, 800))
@settings(max_examples=200, deadline=None)
def test_the_budget_is_kept_and_no_change_of_two_helps(tensors: list[list[Option]], budget: int) -> None:
    least = sum(min(option.n_bytes for option in options) for options in tensors)
    if least > budget:
        with pytest.raises(PlanError, match="smallest types"):
            least_cost(tensors, budget)
        return
    chosen = least_cost(tensors, budget)
    found = [options[number] for options, number in zip(tensors, chosen, strict=True)]
    assert sum(each.n_bytes for each in found) <= budget
    cost = sum(each.cost for each in found)
    for one, other in itertools.combinations_with_replacement(range(len(tensors)), 2):
        for mine, theirs in itertools.product(tensors[one], tensors[other]):
            changed = list(found)
            changed[one], changed[other] = mine, theirs
            if sum(each.n_bytes for each in changed) <= budget:
                assert sum(each.cost for each in changed) >= cost - 1e-9 * max(1, cost)


def test_more_sizes_than_are_told_apart() -> None:
    """Rounded up to what there is room for, the budget is kept still and the cost no greater than the quick one."""
    generator = np.random.default_rng(1)
    for budget in (2 * 10**9, 3 * 10**9 + 1, 7 * 10**9):
        tensors = [
            [Option(int(n), float(c)) for n, c in zip(sizes, np.sort(generator.random(6))[::-1], strict=True)]
            for sizes in np.sort(generator.integers(1, 10**8, (100, 6)), axis=1)
        ]
        quick, best = (
            [options[i] for options, i in zip(tensors, numbers, strict=True)]
            for numbers in (least_cost(tensors, budget), least_cost(tensors, budget, thorough=True))
        )
        assert sum(each.n_bytes for each in best) <= budget
        assert sum(each.cost for each in best) <= sum(each.cost for each in quick)


def test_near_the_best_of_all() -> None:
    generator = np.random.default_rng(0)
    shares = []
    for _ in range(60):
        tensors = [
            [
                Option(int(n), float(c))
                for n, c in zip(
                    generator.integers(1, 200, 5), np.sort(generator.random(5))[::-1], strict=True
                )
            ]
            for _ in range(6)
        ]
        budget = int(generator.integers(300, 700))
        every = [
            sum(tensors[t][i].cost for t, i in enumerate(numbers))
            for numbers in itertools.product(range(5), repeat=6)
            if sum(tensors[t][i].n_bytes for t, i in enumerate(numbers)) <= budget
        ]
        found = sum(tensors[t][i].cost for t, i in enumerate(least_cost(tensors, budget)))
        shares.append(found / min(every))
        best = sum(tensors[t][i].cost for t, i in enumerate(least_cost(tensors, budget, thorough=True)))
        assert best == pytest.approx(min(every), rel=1e-12)
    assert np.mean(shares) < 1.02
    assert max(shares) < 1.2
