"""What a GPU would be brought and decode gives the figures of a CPU: on a GPU, else with its kernels interpreted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.kernels import DEVICE, needs_triton

needs_triton()

from bamba_quant.embedded import embedded_model
from bamba_quant.evaluation import evaluate as module
from bamba_quant.evaluation.evaluate import evaluate
from bamba_quant.evaluation.result import Evaluation
from bamba_quant.evaluation.tensor_loss import tensor_difference
from bamba_quant.inference.loading import load_model
from bamba_quant.inference.prefetch import Prefetcher
from bamba_quant.inference.weights import DeviceWeights, LazyWeights
from tests.evaluation.conftest import OPTIONS
from tests.support.conversion import to_gguf

CPU = torch.device("cpu")
# Of the embedded model: a layer with a mixer, one with attention, and what is in none.
SOME = (None, 1, 2)


def test_an_evaluation(
    evaluation: Evaluation, files: dict[str, Path], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interpreted to the last digit, whether or not what is asked for has been read ahead."""
    backend = "torch" if DEVICE.type == "cuda" else OPTIONS.backend
    options = dataclasses.replace(OPTIONS, device=DEVICE.type, backend=backend)
    asked: list[str] = []
    rows = LazyWeights.rows

    def watched(self: LazyWeights, name: str, *given: object) -> np.ndarray:
        asked.append(name)
        return rows(self, name, *given)

    for budget, name, plain in zip((1, 1 << 30), ("q8_0", "q4_k_m"), evaluation.candidates, strict=True):
        monkeypatch.setattr(
            module, "prefetcher_for", lambda device, budget=budget: Prefetcher(device, budget)
        )
        monkeypatch.setattr(LazyWeights, "rows", watched)
        found = evaluate(embedded_model(), [files[name]], text, options)
        (ours,) = found.candidates
        if DEVICE.type == "cpu":
            assert dataclasses.asdict(ours) == dataclasses.asdict(plain)
        assert ours.model == plain.model
        assert ours.figures["kld_mean"].value == pytest.approx(plain.figures["kld_mean"].value, rel=1e-3)
        for loss, expected in zip(ours.tensors, plain.tensors, strict=True):
            assert (loss.weight_sqnr or 0) == pytest.approx(expected.weight_sqnr or 0, rel=1e-12)
        if DEVICE.type == "cpu":
            assert found.noise_floor == evaluation.noise_floor
    assert not any("proj" in name or "embed" in name for name in asked)


@pytest.mark.parametrize("recipe", ["q8_0", "q4_k_m"])
def test_weights_compared_where_they_are_decoded(recipe: str, tmp_path: Path) -> None:
    base = load_model(embedded_model()).weights
    other = load_model(to_gguf(embedded_model(), tmp_path / "model.gguf", recipe)).weights
    with Prefetcher(DEVICE) as ahead:
        ours = [DeviceWeights(each, DEVICE, torch.float32, ahead) for each in (base, other)]
        names = [name for name in base if base.info(name).layer in SOME]
        ahead.begin(each.prefetch_request(name) for name in names for each in ours)
        for name in names:
            found = tensor_difference(ours[0], ours[1], name, device=DEVICE)
            expected = tensor_difference(base, other, name, device=CPU)
            for field, value in vars(expected).items():
                np.testing.assert_allclose(
                    getattr(found, field), value, rtol=1e-12, err_msg=f"{name} {field}"
                )


def test_one_layer_is_held_and_read_once(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    weights = load_model(files["q4_k_m"]).weights
    expected = dict(weights)
    with Prefetcher(DEVICE) as ahead:
        narrow = DeviceWeights(weights, DEVICE, torch.bfloat16, ahead)
        wide = narrow.to(torch.float32)
        names = [name for name in weights if narrow.on_device(name) and weights.info(name).layer in SOME]
        ahead.begin(narrow.prefetch_request(name) for name in names)
        monkeypatch.setattr(LazyWeights, "raw", lambda *given: pytest.fail("read again"))
        for name in names:
            narrow.rows(name)
            np.testing.assert_array_equal(wide.rows(name).cpu().numpy(), expected[name])
            layers = {weights.info(held).layer for held in narrow._held}
            assert layers == {weights.info(name).layer} and (layers != {None} or len(narrow._held) == 1)
