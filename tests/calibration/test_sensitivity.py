"""Costs by gradients are the divergences that are measured by putting one tensor at a time in each format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bamba_quant.calibration.candidates import quantize_candidates
from bamba_quant.calibration.costs import Measuring, spread, text_costs
from bamba_quant.calibration.sensitivity import gradient_costs, measured_costs
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import BambaQuantError, PlanError
from bamba_quant.inference.loading import load_model
from bamba_quant.recipes.hybrid import ERRORS
from tests.support.conversion import english_chunks

CPU = torch.device("cpu")


def flat(costs: dict[str, dict[str, float]], formats: list[str]) -> np.ndarray:
    return np.array([[costs[tensor][name] for name in formats] for tensor in costs])


def test_the_estimate_is_what_is_measured(tmp_path: Path) -> None:
    formats = ["q3_k"]
    original = load_model(embedded_model())
    candidates = quantize_candidates(embedded_model(), formats, tmp_path)
    chunks = np.array(english_chunks(embedded_model(), 192, 4))
    estimated = flat(gradient_costs(original, candidates, chunks, device=CPU), formats)
    measured = flat(measured_costs(original, candidates, chunks, device=CPU, batch=4), formats)
    assert len(estimated) == 24
    # From 0.001 to 0.08 nats; of four chunks the labels' chance moves an estimate by some 10 %.
    assert np.abs(np.log(estimated / measured)).max() < 0.7
    assert np.abs(np.log(estimated / measured)).mean() < 0.2
    ranks = [np.argsort(np.argsort(each.ravel())) for each in (estimated, measured)]
    assert np.corrcoef(*ranks)[0, 1] > 0.97


def test_one_number_a_tensor_says_what_it_costs_in_every_format(tmp_path: Path) -> None:
    """What the hybrid recipes rest on; and no cost depends on how many tensors are held at once."""
    formats = ["q3_k", "q4_k", "q6_k"]
    original = load_model(embedded_model())
    candidates = quantize_candidates(embedded_model(), formats, tmp_path)
    chunks = np.array(english_chunks(embedded_model(), 128, 2))
    costs = gradient_costs(original, candidates, chunks, device=CPU, batch=2)
    units = np.log(flat(costs, formats) / [ERRORS[name] for name in formats])
    assert np.abs(units - units.mean(1, keepdims=True)).max() < 0.3
    in_groups = gradient_costs(original, candidates, chunks, device=CPU, batch=2, memory=8 << 20)
    np.testing.assert_allclose(flat(costs, formats), flat(in_groups, formats), rtol=1e-4)


def test_what_cannot_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_text("some words\n" * 2000)
    for options, complaint in (
        (Measuring(method="guess"), "guess"),
        (Measuring(chunks=0), "number of chunks"),
        (Measuring(batch=0), "chunks in a batch is too small"),
    ):
        with pytest.raises(PlanError, match=complaint):
            text_costs(embedded_model(), [tmp_path / "text"], options)
    with monkeypatch.context() as patched:
        patched.setattr("bamba_quant.inference.memory.available_memory", lambda device: 10_000_000)
        with pytest.raises(BambaQuantError, match="does not fit in the memory of cpu"):
            text_costs(embedded_model(), [tmp_path / "text"])
    assert spread(np.arange(100)[:, None], 4).ravel().tolist() == [0, 33, 66, 99]
