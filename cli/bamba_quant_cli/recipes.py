"""``bamba-quant recipes``: the built-in recipes, or one of them as the TOML that ``convert --recipe`` takes."""

from __future__ import annotations

from typing import Annotated

import typer

from bamba_quant_cli.console import echo_lines, print_table

EXAMPLES = """
Examples:

  bamba-quant recipes

  bamba-quant recipes q4_k_m > mine.toml
"""


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A recipe to print in its TOML form.")
    ] = None,
) -> None:
    """List the recipes by which convert stores tensors, or print one to start your own from."""
    from bamba_quant.recipes import recipe_named, recipe_text
    from bamba_quant.recipes import recipes as known

    if name is None:
        print_table(
            ("type", "matrices", "what it is"), [(each.name, each.default, each.about) for each in known()]
        )
        return
    recipe = recipe_named(name)
    echo_lines(recipe_text(recipe, recipe.name).rstrip("\n"))
