"""The command that mends a candidate names its file's own tensors and the options that made it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bamba_quant.evaluation.result import Candidate, Evaluation
from bamba_quant.report.remedies import remedy, worst_tensors
from tests.report.variants import EDGES
from tests.support.evaluations import make_evaluation


def one(recipe: str, stored: str = "", /, **model: object) -> tuple[Evaluation, Candidate]:
    """An evaluation of one candidate, and that candidate with all its tensors ``stored`` in another format."""
    evaluation = make_evaluation((recipe,))
    (candidate,) = evaluation.candidates
    if stored:
        tensors = tuple(replace(loss, format=stored) for loss in candidate.tensors)
        candidate = replace(candidate, tensors=tensors)
    return evaluation, replace(candidate, model=replace(candidate.model, **model))  # type: ignore[arg-type]


def test_a_gguf_is_converted_again_with_wider_types() -> None:
    evaluation, candidate = one("q4_k_m")
    found = remedy(evaluation, candidate)
    assert found is not None and found.complete
    first = found.parts[0]
    assert first == "bamba-quant convert bamba-43m --outtype q4_k_m"
    names = [loss.stored_name for loss in found.tensors]
    assert names == [loss.stored_name for loss in worst_tensors(candidate)][: len(names)]
    assert all(name.startswith("blk.") for name in names)
    assert [f"--tensor-type {name}=q6_k" for name in names] == list(found.parts[1:-1])
    assert found.parts[-1] == "--outfile bamba-43m-q4_k_m-mended.gguf"


@pytest.mark.parametrize(
    ("stored", "wider"),
    [("q2_k", "q4_k"), ("q3_k", "q5_k"), ("iq4_xs", "q6_k"), ("q5_k", "q8_0"), ("q6_k", "q8_0"), ("q8_0", "bf16")],
)  # fmt: skip
def test_a_type_of_clearly_more_bits(stored: str, wider: str) -> None:
    found = remedy(*one("q4_k_m", stored))
    assert found is not None and f"={wider}" in found.parts[1]


@pytest.mark.parametrize("stored", ["bf16", "f32", "a type of the future"])
def test_no_type_is_wider(stored: str) -> None:
    assert remedy(*one("q4_k_m", stored)) is None


@pytest.mark.parametrize(
    ("stored", "recipe", "start"),
    [
        ("e4m3 by channel", "fp8-dynamic", ["fp8 bamba-43m x-mended", "--scheme dynamic"]),
        ("e4m3 by tensor", "fp8", ["fp8 bamba-43m x-mended", "--scheme tensor"]),
        ("e4m3 by block", "fp8", ["fp8 bamba-43m x-mended", "--format fp8"]),
        ("w4a16-g128", "int4", ["int4 bamba-43m x-mended", "--group-size 128"]),
        (
            "w8a16-asym-g32",
            "int8",
            ["int4 bamba-43m x-mended", "--bits 8", "--group-size 32", "--asymmetric"],
        ),
        ("mxfp4a16", "mxfp4", ["fp4 bamba-43m x-mended", "--scheme mxfp4a16"]),
        ("torchao-int4-tile-packed-g64", "x", ["int4 bamba-43m x-mended", "--format torchao-tile-packed"]),
    ],
)
def test_a_directory_is_made_again_by_its_scheme(stored: str, recipe: str, start: list[str]) -> None:
    found = remedy(*one("fp8-dynamic", stored, recipe=recipe, path="x/"))
    assert found is not None and found.complete
    assert list(found.parts[: len(start)]) == [f"bamba-quant {start[0]}", *start[1:]]
    assert found.parts[-1].startswith("--ignore model.layers.") and ".weight" not in found.command


def test_what_runtimes_fuse_is_ignored_together() -> None:
    evaluation, candidate = one("fp8-dynamic")
    loss = next(loss for loss in candidate.tensors if loss.role == "attn_k")
    found = remedy(evaluation, replace(candidate, worst=(loss.name,)))
    assert found is not None
    prefix = f"--ignore model.layers.{loss.layer}.self_attn."
    assert set(found.parts[-3:]) == {f"{prefix}{letter}_proj" for letter in "qkv"}


@pytest.mark.parametrize("change", [{"recipe": "of another tool"}, {"path": "my file.gguf"}])
def test_only_a_command_that_is_known_is_given_whole(change: dict[str, str]) -> None:
    found = remedy(*one("q4_k_m", **change))
    assert found is not None and found.complete == ("path" in change)
    assert ("'my file-mended.gguf'" in found.command) == found.complete
    quantized, candidate = one("q4_k_m")
    base = replace(quantized.base, bits_per_weight=8.5)
    found = remedy(replace(quantized, base=base), candidate)
    assert found is not None and not found.complete


def test_nothing_to_mend() -> None:
    for name in ("nothing lost", "logits as base"):
        evaluation = EDGES[name]
        assert remedy(evaluation, evaluation.candidates[0]) is None
