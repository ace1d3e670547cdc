"""Which role of tensor is stored in which number format, under the names users know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gguf import LlamaFileType

from bamba_quant.errors import PlanError

# llama.cpp keeps these in float32 in every file (convert_hf_to_gguf.py: 1-D tensors, norms and the convolution;
# llama-quantize leaves the same ones alone).
ALWAYS_F32 = frozenset({"norm", "bias", "ssm_conv1d", "ssm_dt", "ssm_a", "ssm_d"})


@dataclass(frozen=True)
class Recipe:
    """``default`` is the format of every matrix, ``roles`` names exceptions, ``fallbacks`` what a row takes instead
    when blocks do not fill it. ``file_type`` is what ``general.file_type`` says.
    """

    name: str
    default: str
    file_type: LlamaFileType
    roles: Mapping[str, str] = field(default_factory=dict)
    fallbacks: Mapping[str, str] = field(default_factory=dict)

    def format_for(self, role: str) -> str:
        if role in ALWAYS_F32:
            return "f32"
        return self.roles.get(role, self.default)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("f32", "f32", LlamaFileType.ALL_F32),
        Recipe("f16", "f16", LlamaFileType.MOSTLY_F16),
        Recipe("bf16", "bf16", LlamaFileType.MOSTLY_BF16),
        Recipe("q8_0", "q8_0", LlamaFileType.MOSTLY_Q8_0, fallbacks={"q8_0": "f16"}),
    )
}


def recipe_named(name: str) -> Recipe:
    """The recipe users call ``name``, in any case. Raises ``PlanError`` listing the names there are."""
    try:
        return RECIPES[name.lower()]
    except KeyError:
        raise PlanError(
            f"no output type is called {name!r}", expected="auto, " + ", ".join(RECIPES)
        ) from None
