"""What is added up is what enters the matrices of transformers' models, for every family and every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bamba_quant.calibration import imatrix as module
from bamba_quant.calibration.imatrix import Round, collect
from bamba_quant.checkpoint.activation_sums import ActivationSums
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import BambaQuantError
from bamba_quant.inference.loading import LoadedModel, load_model
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.writers import write_plan
from bamba_reference.runtime.stream import rows_together
from tests.calibration.llama_imatrix import collect_imatrix
from tests.calibration.oracle import hooked_sums
from tests.support.conversion import to_gguf
from tests.support.families import CASES, RICHEST, STACKED, random_case, sampled, save, wide_case


def random_chunks(vocab_size: int = 160, count: int = 3, ctx: int = 40) -> np.ndarray:
    return np.random.default_rng(1).integers(3, vocab_size, (count, ctx))


def assert_same(sums: ActivationSums, oracle: Any, loaded: LoadedModel, chunks: np.ndarray) -> None:
    expected = hooked_sums(oracle, loaded, chunks)
    assert sums.entries.keys() == expected.keys()
    for name, (squares, plain, counts) in expected.items():
        entry = sums.entries[name]
        np.testing.assert_array_equal(entry.counts, counts, err_msg=name)
        np.testing.assert_allclose(entry.squares, squares, rtol=1e-4, atol=1e-12, err_msg=name)
        assert entry.sums is not None
        tokens = np.sqrt(np.maximum(counts, 1))[:, None]
        assert (np.abs(entry.sums - plain) <= 1e-4 * tokens * np.sqrt(squares) + 1e-12).all(), name


@pytest.mark.parametrize(("name", "case", "backend"), sampled(CASES, ["numba", "torch"], 1))
def test_every_family(name: str, case: str, backend: str, tmp_path: Path) -> None:
    oracle = random_case(name, case)
    loaded = load_model(save(oracle, tmp_path / "m"))
    chunks = random_chunks()
    sums = collect(loaded, chunks, ("text",), output=True, backend=backend)
    assert (sums.datasets, sums.chunks, sums.chunk_size) == (("text",), 3, 40)
    assert_same(sums, oracle, loaded, chunks)


@pytest.mark.parametrize(("name", "case"), RICHEST)
def test_what_llama_imatrix_adds_up(name: str, case: str, tmp_path: Path) -> None:
    """The same tensors, tokens and sums, in llama.cpp's own graph of the model."""
    directory = save(random_case(name, case), tmp_path / "m")
    chunks = random_chunks()
    expected = collect_imatrix(to_gguf(directory, tmp_path / "m.gguf", "f32", vocab=False), chunks)
    sums = collect(load_model(directory), chunks, (), output=True)
    assert sums.entries.keys() == expected.keys()
    for tensor, (squares, counts) in expected.items():
        np.testing.assert_array_equal(sums.entries[tensor].counts, counts, err_msg=tensor)
        np.testing.assert_allclose(
            sums.entries[tensor].squares, squares, rtol=1e-3, atol=1e-6 * squares.max(), err_msg=tensor
        )


@pytest.mark.parametrize("kind", ["f32", "q8_0", "fp8-dynamic", "w4a16-g128"])
def test_every_format_runs_with_the_weights_it_holds(kind: str, tmp_path: Path) -> None:
    oracle = wide_case("bamba")
    directory = save(oracle, tmp_path / "m")
    if kind in ("f32", "q8_0"):
        loaded = load_model(to_gguf(directory, tmp_path / "m.gguf", kind, vocab=False))
    else:
        write_plan(plan_quantization(directory, kind), tmp_path / "out")
        loaded = load_model(tmp_path / "out")
    oracle.load_state_dict(
        {name: torch.from_numpy(np.array(loaded.weights[name], np.float32)) for name in oracle.state_dict()}
    )
    chunks = random_chunks()
    assert_same(collect(loaded, chunks, (), output=True), oracle, loaded, chunks)


def test_a_text_in_several_rounds_has_the_same_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(save(random_case(*STACKED[0]), tmp_path / "m"))
    whole = collect(loaded, random_chunks(), ())
    sums = module._sums_bytes(loaded.weights) // rows_together(40, "cpu")
    assert sums > 0
    monkeypatch.setattr(module, "_HIDDEN_BYTES", 2 * (4 * 40 * 64 + sums))
    told: list[Round] = []
    parts = collect(loaded, random_chunks(), (), progress=told.append)
    assert [(now.round, now.layer) for now in told] == [(i, layer) for i in (0, 1) for layer in (1, 2, 3, 4)]
    assert {(now.rounds, now.layers) for now in told} == {(2, 4)}
    for name, entry in whole.entries.items():
        np.testing.assert_array_equal(parts.entries[name].counts, entry.counts)
        np.testing.assert_allclose(parts.entries[name].squares, entry.squares, rtol=1e-5, atol=1e-9)


def test_every_run_adds_up_the_same_sums() -> None:
    """Threads that take a part of the texts each would add in the order in which they finish."""
    loaded = load_model(embedded_model())
    chunks = np.random.default_rng(0).integers(loaded.config.vocab_size, size=(6, 512))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        first, second = (collect(loaded, chunks, ()) for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    for name, sums in first.entries.items():
        assert (sums.counts == 6 * 512).all()
        np.testing.assert_array_equal(sums.squares, second.entries[name].squares)


def test_the_output_is_measured_on_demand_alone(tmp_path: Path) -> None:
    loaded = load_model(save(random_case("bamba"), tmp_path / "m"))
    assert "output.weight" not in collect(loaded, random_chunks(), ()).entries
    tied = load_model(save(random_case("bamba", "tied"), tmp_path / "tied"))
    names = collect(tied, random_chunks(), (), output=True).entries.keys()
    assert names.isdisjoint({"output.weight", "token_embd.weight"})


def test_activations_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    oracle = random_case("bamba")
    oracle.model.layers[1].input_layernorm.weight.data[:] = 1e30
    loaded = load_model(save(oracle, tmp_path / "m"))
    with pytest.raises(BambaQuantError, match="not finite"):
        collect(loaded, random_chunks(), ())
