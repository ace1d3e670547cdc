"""Recipes as TOML: what is written is read back, what is wrong is named, and a plan follows the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bamba_quant.checkpoint.gguf_values import string
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import PlanError
from bamba_quant.inference.loading import load_model
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.printable import printable
from bamba_quant.recipes import Recipe, TypeOverrides, read_recipe, recipe_named, recipe_text, recipes
from bamba_quant.recipes.hybrid import ROLE_COSTS
from bamba_quant.recipes.recipe_file import quantized_roles
from bamba_quant.writers import write_plan
from bamba_quant_cli.app import app

MIX = """
name = "mix"
like = "q4_k_m"

[roles]
ssm_out = "q6_k"
ffn_up = [{ format = "q8_0", layers = [0, 3] }, { format = "q5_k", when = "more_bits" }, "q3_k"]

[[tensors]]
name = "blk.1.ssm_out.weight"
format = "Q5_K"

[[tensors]]
pattern = "attn_[qk]"
format = "iq4_xs"
"""


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.name)
def test_every_built_in_recipe_is_read_back(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text(recipe_text(recipe, recipe.name, comment="Two\nlines"))
    assert read_recipe(file) == recipe


def planned(recipe: Recipe | str, **options: object) -> dict[str, str]:
    plan = plan_conversion(embedded_model(), outtype=recipe, **options)
    return {row.name: row.format.name for row in plan.rows}


def test_a_file_s_formats_are_the_plan_s(tmp_path: Path) -> None:
    file = tmp_path / "mix.toml"
    file.write_text(MIX)
    recipe = read_recipe(file)
    found = planned(recipe, overrides=TypeOverrides(tensor_types=(("blk.0.ssm_out", "q3_k"),)))
    assert [found[f"blk.{i}.ssm_out.weight"] for i in (0, 1, 3)] == ["q3_k", "q5_k", "q6_k"]
    assert [found[f"blk.{i}.ffn_up.weight"] for i in range(4)] == ["q8_0", "q3_k", "q5_k", "q8_0"]
    assert (found["blk.2.attn_q.weight"], found["blk.2.attn_v.weight"]) == ("iq4_xs", "q6_k")
    assert found["output.weight"] == "q6_k"
    conversion = plan_conversion(embedded_model(), outtype=recipe)
    assert conversion.outfile.name.endswith("-MIX.gguf")
    like = plan_conversion(embedded_model(), outtype="q4_k_m")
    assert conversion.metadata == {**like.metadata, "bamba_quant.recipe": string("mix")}
    assert set(planned(recipe, overrides=TypeOverrides(pure=True)).values()) == {"f32", "q4_k"}


def test_what_a_recipe_lacks_of_the_one_it_is_like(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    plain = replace(recipe_named("q4_k_m_h"), name="x", candidates=(), refine=False)
    file.write_text(recipe_text(plain, "q4_k_m_h"))
    assert read_recipe(file) == plain


def test_any_text_about_a_recipe_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    about = "of 'm\N{GRINNING FACE}\x7f\"\\' and caf\udce9"
    recipe = replace(recipe_named("q4_k_m"), about=about)
    file.write_text(recipe_text(recipe, "q4_k_m", f"from {about}\n\x1b"), encoding="utf-8")
    assert read_recipe(file).about == printable(about)


def test_a_refined_file_has_the_same_layout_and_less_error(tmp_path: Path) -> None:
    file = tmp_path / "mix.toml"
    file.write_text('like = "q5_k_m"\n')
    plain = plan_conversion(embedded_model(), outtype=read_recipe(file), outfile=tmp_path / "plain.gguf")
    file.write_text('like = "q5_k_m"\nrefine = true\n')
    recipe = read_recipe(file)
    assert "refine = true" in recipe_text(recipe, "q5_k_m")
    refined = plan_conversion(embedded_model(), outtype=recipe, outfile=tmp_path / "refined.gguf")
    assert (refined.n_bytes, refined.metadata) == (plain.n_bytes, plain.metadata)
    original = load_model(embedded_model()).weights
    lost = []
    for conversion in (plain, refined):
        write_plan(conversion, conversion.outfile)
        weights = load_model(conversion.outfile).weights
        lost.append(sum(float(np.square(weights[name] - original[name]).sum()) for name in weights))
    assert 0.5 < lost[1] / lost[0] < 0.93


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "does not set 'like'"),
        ('like = "q9"', "q9"),
        ('like = "q4_k_m"\nrolls = 1', "rolls"),
        ('like = "q4_k_m"\nname = "../x"', "file name"),
        ('like = "q4_k_m"\ndefault = "iq2_s"', "read but not written"),
        ('like = "q4_k_m"\ncandidates = "q4_k"', "not a list"),
        ('like = "q4_k_m"\nrefine = 1', "neither true nor false"),
        ('like = "q4_k_m"\n[roles]\nnorm = "q4_k"', "no tensor that can be quantized"),
        ('like = "q4_k_m"\n[roles]\nssm_in = 4', "not a name"),
        ('like = "q4_k_m"\n[roles]\nssm_in = []', "a role has no format"),
        ('like = "q4_k_m"\n[roles]\nssm_in = { format = "q4_k" }', "layers or a condition"),
        ('like = "q4_k_m"\n[roles]\nssm_in = { format = "q4_k", layers = [-1] }', "layer numbers"),
        ('like = "q4_k_m"\n[roles]\nssm_in = { format = "q4_k", when = "later" }', "no condition"),
        ('like = "q4_k_m"\n[[tensors]]\nname = "x"', "name or a pattern"),
        ('like = "q4_k_m"\n[[tensors]]\npattern = "("\nformat = "q4_k"', "regular expression"),
        ('like = "q4_k_m"\n[tensors]\nname = "x"', "not a list"),
        ("like = ", "not TOML"),
    ],
)
def test_files_that_say_something_else(text: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text(text)
    with pytest.raises(PlanError, match=complaint) as error:
        read_recipe(file)
    assert "q9" in complaint or str(file) in str(error.value)


def test_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text('like = "q4_k_m"\n[[tensors]]\nname = "blk.9.ssm_in.weight"\nformat = "q6_k"')
    with pytest.raises(PlanError, match=r"blk\.9\.ssm_in"):
        planned(read_recipe(file))


def test_the_command_prints_what_convert_takes(tmp_path: Path) -> None:
    listed = CliRunner().invoke(app, ["recipes"]).output
    assert all(f"\n{recipe.name} " in listed for recipe in recipes())
    printed = CliRunner().invoke(app, ["recipes", "Q3_K"]).output
    file = tmp_path / "mine.toml"
    file.write_text(printed.replace('name = "q3_k_m"', 'name = "mine"'))
    command = ["convert", str(embedded_model()), "--dry-run", "--recipe", str(file)]
    plan = CliRunner().invoke(app, command).output
    assert "-MINE.gguf" in plan
    both = CliRunner().invoke(app, [*command, "--outtype", "q4_k_m"])
    assert isinstance(both.exception, PlanError)


def test_every_role_has_a_cost() -> None:
    roles = {role.removesuffix("_exps").removesuffix("_shexp") for role in quantized_roles()}
    assert roles == ROLE_COSTS.keys()
