"""Errors for weights and inputs that cannot be run say what is wrong, where, and what was expected."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from bamba_reference import model as numpy_model
from bamba_reference.packing import InputError, layout
from bamba_reference.tensors import TensorError, check_names, tensor_shapes
from bamba_reference.torch import forward as torch_forward
from tests.reference.cases import RANDOM, random_case


@pytest.mark.parametrize("name", RANDOM)
def test_tensor_names_and_shapes_are_transformers(name: str) -> None:
    case = random_case(name)
    assert tensor_shapes(case.config) == {k: v.shape for k, v in case.weights.items()}
    check_names(case.config, case.weights)


def test_tensors_that_do_not_fit() -> None:
    case = random_case("plain")
    name = "model.layers.1.self_attn.q_proj.weight"
    lacking = {k: v for k, v in case.weights.items() if k != name}
    extra = case.weights | {"model.layers.1.self_attn.q_proj.bias": np.ones(64, np.float32)}
    wrong = case.weights | {name: np.ones((64, 63), np.float32)}
    runs = [
        lambda weights: numpy_model.forward(case.config, weights, [1, 2]),
        lambda weights: torch_forward.load(case.config, weights),
    ]
    for run in runs:
        with pytest.raises(TensorError, match=f"missing {name}") as error:
            run(lacking)
        assert "in attention False" in str(error.value)
        with pytest.raises(TensorError, match=r"unexpected model\.layers\.1\.self_attn\.q_proj\.bias"):
            run(extra)
        with pytest.raises(TensorError, match="another shape") as error:
            run(wrong)
        assert (error.value.where, error.value.found, error.value.expected) == (name, (64, 63), (64, 64))


@pytest.mark.parametrize("bad", [160, -1])
def test_token_ids_out_of_range(bad: int) -> None:
    case = random_case("plain")
    with pytest.raises(InputError, match="out of the vocabulary's range") as error:
        numpy_model.forward(case.config, case.weights, [1, bad])
    assert error.value.where == "token 1" and error.value.expected == "0 to 159"
    with pytest.raises(InputError, match="out of the vocabulary's range"):
        torch_forward.forward(torch_forward.load(case.config, case.weights), [[1, 2], [3, bad]])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "mask of another shape": ({"attention_mask": np.ones((2, 5))}, "attention_mask does not fit"),
    "padding on the right": (
        {"attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]]},
        "padding follows a token",
    ),
    "positions of another shape": ({"position_ids": [[0, 1]]}, "position_ids does not fit"),
    "sequence numbers of another shape": ({"seq_idx": [0, 1, 2]}, "seq_idx does not fit"),
    "borders for two rows": ({"cu_seq_lens": [0, 4]}, "cu_seq_lens does not divide"),
    "packing and padding": (
        {"attention_mask": [[0, 1, 1, 1], [1, 1, 1, 1]], "seq_idx": [0, 0, 1, 1]},
        "cannot be combined",
    ),
    "two packings": (
        {"seq_idx": [0, 0, 1, 1], "position_ids": [0, 1, 2, 0]},
        "give different starts of the packed sequences",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_inputs_that_contradict_themselves(case: str) -> None:
    said, message = BAD[case]
    with pytest.raises(InputError, match=message):
        layout((2, 4), **said)


def test_positions() -> None:
    mask = [[0, 0, 1, 1], [1, 1, 1, 1]]
    padded = layout((2, 4), attention_mask=mask)
    assert padded.positions.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]] and padded.padding.tolist() == [2, 0]
    later = layout((2, 1), past=4, padding=padded.padding)
    assert later.positions.tolist() == [[2], [4]] and later.real is None
    assert layout((1, 5), seq_idx=[3, 3, 3, 1, 1]).positions.tolist() == [[0, 1, 2, 0, 1]]
    assert layout((1, 3), position_ids=[7, 8, 9]).sequence_starts is None


def test_borders_must_rise_to_the_end() -> None:
    for borders in ([0, 3], [1, 4], [0, 3, 2, 4], [[0, 4]], [0]):
        with pytest.raises(InputError, match="cu_seq_lens does not divide"):
            layout((1, 4), cu_seq_lens=borders)


def test_a_state_cannot_change_its_batch_its_padding_or_be_packed() -> None:
    case = random_case("plain")
    model = torch_forward.load(case.config, case.weights)
    state = torch_forward.new_state(model, 2)
    torch_forward.forward(model, [[1, 2], [3, 4]], attention_mask=[[0, 1], [1, 1]], state=state)
    with pytest.raises(InputError, match="batch of another size"):
        torch_forward.forward(model, [[1]], state=state)
    with pytest.raises(InputError, match="pads other tokens"):
        torch_forward.forward(model, [[1], [2]], attention_mask=[[1, 1, 1], [1, 1, 1]], state=state)
    with pytest.raises(InputError, match="padding follows a token"):
        torch_forward.forward(model, [[1], [2]], attention_mask=[[0], [1]], state=state)
    with pytest.raises(InputError, match="cannot be combined"):
        torch_forward.forward(model, [[1, 2], [3, 4]], seq_idx=[0, 1], state=state)


def test_shapes_of_tokens() -> None:
    case = random_case("plain")
    model = torch_forward.load(case.config, case.weights)
    with pytest.raises(InputError, match="not a batch"):
        torch_forward.forward(model, [1, 2])
    with pytest.raises(InputError, match="no tokens"):
        torch_forward.forward(model, np.empty((1, 0), np.int64))
    with pytest.raises(InputError, match="no tokens"):
        numpy_model.forward(case.config, case.weights, [])
    with pytest.raises(InputError, match="one sequence"):
        numpy_model.forward(case.config, case.weights, [[1, 2]])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float16, np.float64])
def test_arrays_of_any_float_dtype_become_tensors(dtype: Any) -> None:
    array = np.linspace(-2, 2, 12).reshape(3, 4).astype(dtype)
    array.flags.writeable = False
    tensor = torch_forward.to_tensor(array[:, ::2], torch.float32, torch.device("cpu"))
    assert np.array_equal(tensor.numpy(), array[:, ::2].astype(np.float32))


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, bamba_reference, bamba_reference.model, bamba_reference.runtime.perplexity\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
