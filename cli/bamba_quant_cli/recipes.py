"""``bamba-quant recipes``: the built-in recipes, or one of them as TOML for ``convert`` or ``quantize --recipe``."""

from __future__ import annotations

from typing import Annotated

import typer

from bamba_quant_cli.console import echo, echo_lines, print_table

EXAMPLES = """
Examples:

  bamba-quant recipes

  bamba-quant recipes q4_k_m > mine.toml

  bamba-quant recipes hybrid-nvfp4 > mixture.toml
"""


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A recipe to print in its TOML form.")
    ] = None,
) -> None:
    """List the recipes of convert and the mixtures of quantize, or print one to start your own from."""
    from bamba_quant.recipes import recipe_named, recipe_text
    from bamba_quant.recipes import recipes as known
    from bamba_quant.recipes.mixtures import mixture_text, mixtures

    if name is None:
        for title, listed in (("type", known()), ("mixture", mixtures().values())):
            if title == "mixture":
                echo()
            print_table(
                (title, "matrices", "what it is"), [(each.name, each.default, each.about) for each in listed]
            )
        return
    if name.lower() in mixtures():
        echo_lines(mixture_text(mixtures()[name.lower()]).rstrip("\n"))
        return
    recipe = recipe_named(name)
    echo_lines(recipe_text(recipe, recipe.name).rstrip("\n"))
