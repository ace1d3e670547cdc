"""The project's own gates are green for what the writers make and red for each fault of a converter or a kernel."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bamba_quant.embedded import embedded_model
from bamba_quant.evaluation.gates import read_gates
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.gguf_layout import with_key_values
from bamba_quant.writers import write_plan
from bamba_quant.writers.candidates import make_candidate
from tests.accuracy.faults import (
    edited,
    edited_directory,
    neighbouring_rows_swapped,
    neighbours_scales_swapped,
    zeroed,
)
from tests.support.command import run
from tests.support.conversion import faulty
from tests.support.tuning import RECORD

GATES = Path(__file__).parent / "bamba-mini.toml"
MODEL = embedded_model()
TUNED = "q4_k_m tuned"
KINDS = ("bf16", "q8_0", "q4_k_m", "fp8-dynamic", "w4a16-g128")
# What a layer adds to the stream comes out of these two.
LAYER = {"blk.1.ssm_out.weight": zeroed, "blk.1.ffn_down.weight": zeroed}
MATRIX = "model.layers.1.feed_forward.down_proj"


def evaluated(candidates: Sequence[Path], directory: Path, code: int) -> dict[str, dict[str, Any]]:
    """Each candidate's part of the command's JSON by label; ``code`` is its exit code."""
    from pydoc_data.topics import topics

    text = directory / "text.txt"
    text.write_text("\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    done = run(
        *("evaluate", MODEL, *candidates, "--text", text, "--ctx", 256, "--chunks", 32, "--gates", GATES),
        *("--tokenizer", MODEL, "--drift-chunks", 0, "--json"),
        code=code,
    )
    found = json.loads(done.stdout)["candidates"]
    assert len(found) == len(candidates)
    return {candidate["model"]["label"]: candidate for candidate in found}


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("honest")
    return {kind: make_candidate(MODEL, kind, directory) for kind in KINDS}


def test_what_the_writers_make_passes(honest: dict[str, Path], tmp_path: Path) -> None:
    found = evaluated(list(honest.values()), tmp_path, 0)
    sections = read_gates(GATES)
    # What is tuned takes minutes, and make accuracy makes it.
    assert {candidate["model"]["recipe"] for candidate in found.values()} == sections.keys() - {TUNED}
    for candidate in found.values():
        gates = candidate["gates"]
        assert len(gates) == len(sections[candidate["model"]["recipe"]])
        assert all(gate["passed"] and gate["measurable"] for gate in gates)


def test_every_fault_turns_them_red(honest: dict[str, Path], tmp_path: Path) -> None:
    q8_0, q4_k_m, fp8 = (honest[kind] for kind in ("q8_0", "q4_k_m", "fp8-dynamic"))
    matrix = "blk.1.ffn_down.weight"
    wrong = {
        **{f"order-{kind}": faulty(MODEL, tmp_path / f"order-{kind}.gguf", kind) for kind in KINDS[:3]},
        "scale-q8_0": edited(q8_0, tmp_path / "scale-q8_0.gguf", {matrix: neighbours_scales_swapped(0, 2)}),
        "scale-q4_k_m": edited(q4_k_m, tmp_path / "scale-q4_k_m.gguf", {matrix: neighbours_scales_swapped(0, 4)}),
        "scale-fp8": edited_directory(
            fp8, tmp_path / "scale-fp8", {f"{MATRIX}.weight_scale": neighbouring_rows_swapped}
        ),
        "layer-q8_0": edited(q8_0, tmp_path / "layer-q8_0.gguf", LAYER),
        "layer-q4_k_m": edited(q4_k_m, tmp_path / "layer-q4_k_m.gguf", LAYER),
    }  # fmt: skip
    found = evaluated(list(wrong.values()), tmp_path, 1)
    red = {
        label for label, candidate in found.items() if not all(gate["passed"] for gate in candidate["gates"])
    }
    assert red == wrong.keys(), {label: found[label]["figures"]["kld_mean"] for label in wrong.keys() - red}


def test_a_tuning_without_gain_turns_them_red(honest: dict[str, Path], tmp_path: Path) -> None:
    """A file that says it is tuned and has the codes of one that is not; one red file of two is enough."""
    conversion = plan_conversion(MODEL, outtype="q4_k_m", outfile=tmp_path / "tuned.gguf")
    metadata = {**conversion.metadata, **RECORD.key_values()}
    write_plan(with_key_values(conversion, metadata), conversion.outfile)
    found = evaluated([honest["bf16"], conversion.outfile], tmp_path, 1)
    passing, failing = ([gate["passed"] for gate in candidate["gates"]] for candidate in found.values())
    assert all(passing) and not any(failing)
    assert {gate["limit"] for gate in found["tuned"]["gates"]} == {
        each.limit for each in read_gates(GATES)[TUNED]
    }
