"""Which role of tensor is stored in which number format, under the names users know."""

from bamba_quant.recipes import llama_quantize  # registers the recipes
from bamba_quant.recipes.base import Choice, Place, Recipe, recipe_named, recipes
from bamba_quant.recipes.selection import Selected, Wishes, select_formats

__all__ = [
    "Choice",
    "Place",
    "Recipe",
    "Selected",
    "Wishes",
    "llama_quantize",
    "recipe_named",
    "recipes",
    "select_formats",
]
