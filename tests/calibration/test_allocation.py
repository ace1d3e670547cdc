"""Allocated files take exactly the bytes that were predicted and never more than asked for."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bamba_quant.calibration.allocation import Allocation, allocate, known_costs
from bamba_quant.checkpoint import open_checkpoint
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import BambaQuantError, PlanError
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.recipes import read_recipe
from bamba_quant.recipes.hybrid import HEADER_ROOM
from bamba_quant.writers import write_plan
from bamba_quant_cli.app import app
from tests.support.families import FAMILIES, save


def file_bytes(model: Path, outtype: str, allow_config_only: bool = False) -> int:
    conversion = plan_conversion(model, outtype=outtype, allow_config_only=allow_config_only)
    return sum(conversion.paths(conversion.outfile).values())


def written(allocation: Allocation, place: Path) -> int:
    conversion = plan_conversion(embedded_model(), outtype=allocation.recipe, outfile=place)
    (file,) = write_plan(conversion, conversion.outfile)
    return file.stat().st_size


def test_the_bytes_of_a_type(tmp_path: Path) -> None:
    costs = known_costs(embedded_model())
    found = allocate(embedded_model(), costs, like="q4_k_m")
    plain = file_bytes(embedded_model(), "q4_k_m")
    assert found.plain is not None
    assert found.plain.n_bytes == plain
    assert 0.99 * plain < found.allocated.n_bytes <= plain - HEADER_ROOM
    assert written(found, tmp_path / "x.gguf") == found.allocated.n_bytes
    assert found.allocated.predicted < 0.8 * found.plain.predicted
    named = found.allocated.n_bytes - plain - sum(move.more_bytes for move in found.moves)
    assert named in (32, 64), "the key that names the recipe"
    gain = sum((move.cost_before or 0) - move.cost_after for move in found.moves)
    assert gain == pytest.approx(found.plain.predicted - found.allocated.predicted)
    sizes = [point.n_bytes for point in found.frontier]
    assert sizes == sorted(sizes)
    lost = [point.predicted for point in found.frontier]
    assert lost == sorted(lost, reverse=True)


def test_a_size_and_a_number_of_bits() -> None:
    costs = known_costs(embedded_model())
    found = allocate(embedded_model(), costs, target_bytes=2_500_000)
    assert 2_480_000 < found.allocated.n_bytes <= 2_500_000
    assert found.like.name == "iq4_xs"  # the nearest
    found = allocate(embedded_model(), costs, target_bpw=6.0, name="six")
    plan = plan_conversion(embedded_model(), outtype=found.recipe)
    assert 5.95 < plan.bits_per_weight <= 6.0
    assert plan.recipe == "six"
    with pytest.raises(PlanError, match="smallest types"):
        allocate(embedded_model(), costs, target_bytes=1_000_000)
    for wrong in (math.nan, math.inf, -1.0):
        with pytest.raises(PlanError, match="not a positive number"):
            allocate(embedded_model(), costs, target_bpw=wrong)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family: str, tmp_path: Path) -> None:
    """Ties, experts, and rows of no whole blocks of 256."""
    save(FAMILIES[family].random(), tmp_path / "model", dtype="bfloat16")
    (tmp_path / "config.json").write_bytes((tmp_path / "model" / "config.json").read_bytes())
    goal = file_bytes(tmp_path, "q5_k_m", allow_config_only=True)
    found = allocate(tmp_path, known_costs(tmp_path), target_bytes=goal, allow_config_only=True)
    assert 0.95 * goal < found.allocated.n_bytes <= goal


def test_a_hybrid_recipe_is_allocated_from_as_well(tmp_path: Path) -> None:
    file = tmp_path / "mix.toml"
    command = ["allocate", str(embedded_model()), "--like", "q4_k_m_h", "--no-refine", "-o", str(file)]
    command += ["--types", "q4_k,iq4_xs,q5_k"]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    costs = {move["before"]: move["cost_before"] for move in json.loads(done.stdout)["moves"]}
    assert costs["q6_k"] is None
    assert "nan" not in CliRunner().invoke(app, [*command, "--overwrite"]).output
    conversion = plan_conversion(embedded_model(), outtype=read_recipe(file))
    assert {row.format.name for row in conversion.rows} <= {"f32", "q4_k", "iq4_xs", "q5_k"}
    size = sum(conversion.paths(conversion.outfile).values())
    assert size == json.loads(done.stdout)["bytes"]


def test_the_command(tmp_path: Path) -> None:
    recipe, svg, page = (tmp_path / name for name in ("mix.toml", "chart.svg", "chart.html"))
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"Line {i} of a text, and {i * i} words more." for i in range(2000)))
    command = ["allocate", str(embedded_model()), "--like", "q3_k_m", "--types", "q2_k,q3_k,q4_k,q5_k,q6_k"]
    done = CliRunner().invoke(
        app,
        [
            *command,
            "--text",
            str(text),
            "--chunks",
            "1",
            "--ctx",
            "64",
            "-o",
            str(recipe),
            "--chart",
            str(svg),
        ],
    )
    assert done.exit_code == 0, done.output
    assert "ssm_out" in done.output
    assert ET.parse(svg).getroot().tag.endswith("svg")
    conversion = plan_conversion(embedded_model(), outtype=read_recipe(recipe))
    size = sum(conversion.paths(conversion.outfile).values())
    assert size <= file_bytes(embedded_model(), "q3_k_m")
    out = tmp_path / "x.gguf"
    convert = ["convert", str(embedded_model()), "--recipe", str(recipe), "--outfile", str(out)]
    assert CliRunner().invoke(app, convert).exit_code == 0
    assert out.stat().st_size == size
    formats = {tensor.format.name for tensor in open_checkpoint(out).tensors.values()}
    assert formats <= {"f32", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"}

    told = CliRunner().invoke(app, [*command, "--json", "--chart", str(page)])
    assert json.loads(told.stdout)["like"] == "q3_k_m"
    assert "<svg" in page.read_text()
    for wrong in (
        command[:2],
        [*command, "--target-bpw", "4"],
        [*command, "-o", str(recipe)],
        [*command, "--chart", "x.png"],
        [*command, "--types", "q9"],
    ):
        assert isinstance(CliRunner().invoke(app, wrong).exception, BambaQuantError), wrong
