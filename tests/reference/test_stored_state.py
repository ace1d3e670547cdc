"""States that are rounded after every token, against recurrences in float64 that are written out here."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from bamba_quant.errors import BambaQuantError
from bamba_reference.kernels.cpu.stored_state import recurrence as compiled_recurrence
from bamba_reference.runtime.stream import final_hidden
from bamba_reference.torch import forward as torch_forward
from bamba_reference.torch.backend import TORCH
from bamba_reference.torch.state import MambaState
from bamba_reference.torch.stored_state import STATE_NAMES, STATE_TYPES, recurrence, state_rounding, text_keys
from tests.reference.cases import random_case, random_tokens, relative_error
from tests.reference.families import REPRESENTATIVE

Array = np.ndarray
LAYER, SEED = "model.layers.3.", 7


def nearest(dtype: Any) -> Callable[[Array], Array]:
    """Among all finite numbers of a type; casts from float64 would round twice, in float32 as well."""
    bits = np.arange(2 ** (8 * np.dtype(dtype).itemsize)).astype(f"u{np.dtype(dtype).itemsize}")
    with np.errstate(invalid="ignore"):
        values = bits.view(dtype).astype(np.float64)
    values = np.unique(values[np.isfinite(values)])
    return lambda h: values[np.searchsorted((values[1:] + values[:-1]) / 2, h)]


def by_row(most: float, rounded: Callable[[Array], Array]) -> Callable[[Array], Array]:
    def scaled(h: Array) -> Array:
        scale = np.abs(h).max(-1, keepdims=True) / most
        return np.where(scale > 0, rounded(h / np.where(scale > 0, scale, 1)) * scale, 0)

    return scaled


NEAREST: dict[str, Callable[[Array], Array]] = {
    "bf16": nearest(ml_dtypes.bfloat16),
    "fp16": nearest(np.float16),
    "fp8": by_row(448, nearest(ml_dtypes.float8_e4m3fn)),
    "fp8-unscaled": nearest(ml_dtypes.float8_e4m3fn),
    "int8": by_row(127, np.rint),
}


def mixed(x: Array) -> Array:
    """MurmurHash3's finalizer."""
    x = x.astype(np.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ x >> np.uint32(shift)) * np.uint32(factor)
    return x ^ x >> np.uint32(16)


def stochastic(h: Array, name: str, token: int, text: int, seed: int = SEED) -> Array:
    """One text's states (H, P, N): of the two neighbours in the type, the upper by the fraction's probability."""
    key = np.uint32(zlib.crc32(f"{seed} {LAYER} {text}".encode()))
    H, P, N = h.shape
    rows = mixed(mixed(np.arange(H * P) + token * H * P) ^ key).reshape(H, P, 1)
    with np.errstate(over="ignore"):
        drawn = (mixed(rows + np.arange(N, dtype=np.uint32) * np.uint32(0x9E3779B9)) >> 8) + 1.0

    def rounded(x: Array) -> Array:
        size, kind = np.abs(x), STATE_TYPES[name]
        below = np.floor(np.log2(np.maximum(size, kind.least)))
        step = 2.0 ** (np.minimum(below, np.log2(kind.largest_power)) - kind.digits)
        whole = np.floor(size / step)
        return np.sign(x) * np.minimum((whole + (size / step - whole >= drawn / 2**24)) * step, kind.most)

    return by_row(STATE_TYPES[name].most, rounded)(h) if STATE_TYPES[name].scaled else rounded(h)


def arguments(per_state: bool, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Two texts of 20 tokens, 4 heads of 3 channels in 2 groups, 40 states; A for each head or for each state."""
    draw = torch.Generator().manual_seed(0)
    b, L, H, P, G, N = 2, 20, 4, 3, 2, 40
    made = {
        "x": torch.randn(b, L, H, P, generator=draw, dtype=dtype),
        "dt": torch.rand(b, L, H, generator=draw, dtype=dtype) * 0.3,
        "A": -torch.rand(H, N if per_state else 1, generator=draw, dtype=dtype) * 2,
        "B": torch.randn(b, L, G, N, generator=draw, dtype=dtype),
        "C": torch.randn(b, L, G, N, generator=draw, dtype=dtype),
        "h": torch.randn(b, H, P, N, generator=draw, dtype=dtype),
    }
    return made | {"sequence_starts": torch.rand(b, L, generator=draw) < 0.1}


def directly(
    given: dict[str, torch.Tensor], round_text: Callable[[Array, int, int], Array]
) -> tuple[Array, Array]:
    x, dt, A, B, C, h, starts = (each.numpy().copy() for each in given.values())
    y = np.zeros_like(x)
    for text in range(len(x)):
        for t in range(x.shape[1]):
            for head in range(x.shape[2]):
                group = head // (x.shape[2] // B.shape[2])
                kept = 0 if starts[text, t] else np.exp(dt[text, t, head] * A[head])
                added = dt[text, t, head] * np.outer(x[text, t, head], B[text, t, group])
                h[text, head] = kept * h[text, head] + added
                y[text, t, head] = h[text, head] @ C[text, t, group]
            h[text] = round_text(h[text], t, text)
    return y, h


@pytest.mark.parametrize("name", STATE_NAMES[1:])
def test_recurrence_is_the_direct_computation(name: str) -> None:
    """In float64 to its last digits, and compiled in float32 to far less than the rounding changes.

    In float32 a number may lie on the other side of a tie, and is then one step away.
    """
    bare, is_stochastic = name.removesuffix("-stochastic"), name.endswith("-stochastic")
    rounding = state_rounding(name, SEED)
    assert rounding is not None
    for per_state in (False, True):
        given = arguments(per_state)
        keys = text_keys(rounding, LAYER, 5, 2)
        y, h = directly(
            given,
            lambda h, t, text: stochastic(h, bare, t, text + 5) if is_stochastic else NEAREST[bare](h),
        )
        exact, _ = directly(given, lambda h, t, text: h)
        found = recurrence(**given, rounding=rounding, keys=keys)
        np.testing.assert_allclose(found[0], y, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found[1], h, rtol=1e-9, atol=1e-12)
        single = {key: each.float() if each.is_floating_point() else each for key, each in given.items()}
        threads = torch.get_num_threads()
        try:
            compiled = []
            for count in (1, 3):
                torch.set_num_threads(count)
                compiled.append(compiled_recurrence(**single, rounding=rounding, keys=keys))
        finally:
            torch.set_num_threads(threads)
        assert all(map(torch.equal, *compiled))
        assert relative_error(compiled[0][0], y) <= 0.1 * relative_error(torch.from_numpy(exact), y)


@pytest.mark.parametrize("name", STATE_NAMES[1:])
def test_compiled_rounding_is_the_definition_bit_for_bit(name: str) -> None:
    """Of every size, among them zeros, what is below the smallest number and what is above the largest."""
    rounding = state_rounding(name, SEED)
    assert rounding is not None
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(1, 2, 3, 4096, generator=generator) * 10 ** (
        torch.rand(1, 2, 3, 4096, generator=generator) * 24 - 16
    )
    h[0, 0, 0] = 0
    h[0, 1, 0, :3] = torch.tensor([torch.inf, -torch.inf, 3e38]) if not rounding.type.scaled else 0
    keys, none = text_keys(rounding, LAYER, 0, 1), torch.zeros(1, 1, 2)
    nothing = torch.zeros(1, 1, 2, 3), none, -torch.ones(2, 1), *[torch.zeros(1, 1, 1, 4096)] * 2
    _, found = compiled_recurrence(*nothing, h, None, rounding, keys)
    assert torch.equal(found, rounding(h, keys, 0))


def test_stochastic_rounding_is_right_on_average() -> None:
    h = torch.linspace(1, 2, 101, dtype=torch.float64).repeat(1, 1, 4000, 1)
    rounding = state_rounding("fp8-unscaled-stochastic", 3)
    assert rounding is not None
    mean = rounding(h, text_keys(rounding, LAYER, 0, 1), 0).mean(-2)
    assert (mean - h[:, :, 0]).abs().max() < 5 * 0.125 / 2 / 4000**0.5  # five standard deviations at most
    other = [text_keys(replace(rounding, seed=seed), layer, first, 1).item() for seed, layer, first in
             ((3, LAYER, 0), (4, LAYER, 0), (3, "model.layers.4.", 0), (3, LAYER, 1))]  # fmt: skip
    assert len(set(other)) == 4


@pytest.mark.parametrize("name", REPRESENTATIVE)
@torch.no_grad()
def test_a_pass_over_a_text_is_decoding_with_a_rounded_state(name: str) -> None:
    """Tokens one at a time in float64; between two of them the state is rounded outside of the model."""
    case, tokens = random_case(name), random_tokens(random_case(name), 2, 10)
    for kind in ("fp16", "fp8"):
        plain = torch_forward.load(case.config, case.weights, dtype=torch.float64)
        state, steps = torch_forward.new_state(plain, 2), []
        for t in range(10):
            steps.append(torch_forward.forward(plain, tokens[:, t : t + 1], state=state).logits)
            for layer in state.layers:
                for each in layer.values():
                    if isinstance(each, MambaState):
                        each.h = torch.from_numpy(NEAREST[kind](each.h.numpy()))
        rounded = replace(plain, backend=replace(TORCH, state_rounding=state_rounding(kind, 0)))
        found = torch_forward.forward(rounded, tokens).logits
        assert relative_error(found, torch.cat(steps, dim=1)) <= 1e-10
        assert relative_error(torch_forward.forward(plain, tokens).logits, found) > 1e-8


def test_random_numbers_follow_the_text_and_not_the_batch() -> None:
    """The third of three texts that go through the layers together, and alone under its number."""
    case = random_case(REPRESENTATIVE[0])
    tokens = random_tokens(case, 3, 16)
    backend = replace(TORCH, state_rounding=state_rounding("fp8-stochastic", 0))
    alike = {"dtype": torch.float64, "backend": backend}
    (together,) = final_hidden(case.config, [case.weights], tokens, **alike)
    alone, first = (
        final_hidden(case.config, [case.weights], tokens[2:], **alike, first_text=number)[0]
        for number in (2, 0)
    )
    assert relative_error(alone[0], together[2]) <= 1e-10
    assert relative_error(first[0], together[2]) > 1e-6


def test_an_unknown_type() -> None:
    with pytest.raises(BambaQuantError, match=r"(?s)did you mean.*fp16-stochastic"):
        state_rounding("fp16-stochastik", 0)
