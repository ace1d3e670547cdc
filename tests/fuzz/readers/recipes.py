"""Reader of what a user's recipe file says."""

from __future__ import annotations

from bamba_quant.recipes import read_recipe, recipe_text
from tests.fuzz.mutations.blind import files
from tests.fuzz.mutations.text import toml_text
from tests.fuzz.registry import Case, reader

_RECIPE = b"""name = "mix"
like = "q4_k_m"
about = "more for the mixers"
default = "q4_k"
candidates = ["q4_k", "q6_k"]

[roles]
ssm_out = "q6_k"
ffn_up = [{ format = "q8_0", layers = [0, 3] }, { format = "q5_k", when = "more_bits" }, "q3_k"]

[[tensors]]
name = "blk.1.ssm_out.weight"
format = "q5_k"

[[tensors]]
pattern = "attn_[qk]"
format = "iq4_xs"
"""


@reader(
    "recipe", seeds=lambda: [{"recipe.toml": _RECIPE}], mutate=files({"recipe.toml": toml_text}), weight=4
)
def recipe(case: Case) -> None:
    found = read_recipe(case.path / "recipe.toml")
    recipe_text(found, "q4_k_m")
    _ = [found.assigned(name) for name in ("blk.1.ssm_out.weight", "output.weight")]
