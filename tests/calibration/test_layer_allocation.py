"""The layers of a quantized directory that keep 16 bits: those that cost most, within the size, fused ones together."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from bamba_quant.calibration.costs import Measuring, text_costs
from bamba_quant.calibration.layer_allocation import allocate_layers
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import PlanError
from bamba_quant.inference.loading import load_model
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.recipes.ignore_file import ignore_text, read_ignore_file
from tests.support.command import run

SCHEMES = ("w4a16-g128", "fp8-dynamic")


def sizes(scheme: str, keep: tuple[str, ...] = ()) -> int:
    return sum(plan_quantization(embedded_model(), scheme, keep=keep).sizes.values())


def equal_costs(scheme: str, **dear: float) -> dict[str, dict[str, float]]:
    """A cost of 1 for every tensor, and others for the roles in ``dear``."""
    weights = load_model(embedded_model()).weights
    rules = [weights.stored(name)[1] for name in weights]
    return {str(rule.gguf): {scheme: dear.get(rule.role, 1.0)} for rule in rules if rule.gguf}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_dearest_layers_keep_16_bits(scheme: str) -> None:
    smallest = sizes(scheme)
    costs = equal_costs(scheme, attn_q=100.0)
    everything = allocate_layers(embedded_model(), scheme, costs, smallest)
    assert everything.ignore == () and everything.n_bytes == smallest
    room = 600_000
    found = allocate_layers(embedded_model(), scheme, costs, smallest + room)
    assert smallest < found.n_bytes <= smallest + room
    assert found.n_bytes == sizes(scheme, found.ignore)
    assert found.predicted < found.smallest_predicted
    kept = {name.rsplit(".", 1)[1] for name in found.ignore if ".self_attn." in name}
    assert {"q_proj", "k_proj", "v_proj"} <= kept  # fused by vLLM, so all three of a layer


def test_sizes_that_cannot_be_chosen_for() -> None:
    scheme = SCHEMES[0]
    costs, smallest = equal_costs(scheme), sizes(scheme)
    with pytest.raises(PlanError, match="too large"):
        allocate_layers(embedded_model(), scheme, costs, smallest - 1)
    with pytest.raises(PlanError, match="without quantization"):
        allocate_layers(embedded_model(), scheme, costs, 10 * smallest)


def test_lists_of_layers(tmp_path: Path) -> None:
    file = tmp_path / "keep.toml"
    file.write_text(ignore_text("w4a16-g128", ["model.layers.0.mamba.in_proj"], "by hand"))
    assert read_ignore_file(file, "w4a16-g128") == ("model.layers.0.mamba.in_proj",)
    with pytest.raises(PlanError, match="another scheme"):
        read_ignore_file(file, "fp8-dynamic")
    for text in ("ignore = []", 'scheme = "x"\nignore = [1]', 'scheme = "x"\nignore = "y"', "[roles]"):
        file.write_text(text)
        with pytest.raises(PlanError, match="does not list"):
            read_ignore_file(file, "x")


def test_command_and_both_ways_to_measure(tmp_path: Path) -> None:
    text, keep, scheme = tmp_path / "help.txt", tmp_path / "keep.toml", "w4a16-g128"
    text.write_text("".join(topics[name] for name in sorted(topics)))
    options = Measuring(ctx=128, chunks=4)
    direct = Measuring("direct", ctx=128, chunks=4)
    costs, measured = (
        text_costs(embedded_model(), [text], each, scheme=scheme) for each in (options, direct)
    )
    assert costs.keys() == measured.keys()
    total, other = (sum(cost[scheme] for cost in each.values()) for each in (costs, measured))
    assert 0.5 < total / other < 2
    given = ["--scheme", scheme, "--target-size", "4.2MB", "--text", text, "--ctx", "128", "--chunks", "4"]
    found = json.loads(run("allocate", embedded_model(), *given, "-o", keep, "--json").stdout)
    assert found["ignore"] and found["n_bytes"] <= 4_200_000
    run("int4", embedded_model(), tmp_path / "out", "--ignore", keep)
    assert sum(file.stat().st_size for file in (tmp_path / "out").rglob("*")) == found["n_bytes"]
    assert "another scheme" in run("fp8", embedded_model(), tmp_path / "x", "--ignore", keep, code=2).stderr
    for wrong in (["--like", "q4_k_m"], ["--target-size", "4MB", "--chart", tmp_path / "x.svg"]):
        run("allocate", embedded_model(), "--scheme", scheme, *wrong, code=2)
