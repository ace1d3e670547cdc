"""Which role of tensor is stored in which number format, under the names users know."""

from bamba_quant.recipes.base import Assignment, Choice, Recipe, TensorPosition
from bamba_quant.recipes.recipe_file import plain_recipe, read_recipe, recipe_named, recipe_text, recipes
from bamba_quant.recipes.selection import Selected, TypeOverrides, select_formats

__all__ = [
    "Assignment",
    "Choice",
    "Recipe",
    "Selected",
    "TensorPosition",
    "TypeOverrides",
    "plain_recipe",
    "read_recipe",
    "recipe_named",
    "recipe_text",
    "recipes",
    "select_formats",
]
