"""A format for every tensor of one model as a recipe: by role and layer where there are layers, else by name."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from bamba_quant.families import TensorRule
from bamba_quant.recipes.base import Assignment, Choice, InLayers, Recipe


def with_formats(recipe: Recipe, rules: Sequence[TensorRule], formats: Mapping[str, str]) -> Recipe:
    """``recipe`` with ``formats`` (by GGUF name) for the tensors of ``rules`` in place of its own choices.

    The format that most tensors of a role have is that role's; others are listed by their layers.
    """
    by_role: dict[str, dict[int, str]] = defaultdict(dict)
    tensors = []
    for rule in rules:
        chosen = formats[str(rule.gguf)]
        if rule.layer is None:
            tensors.append(Assignment(chosen, name=str(rule.gguf)))
        else:
            by_role[rule.role][rule.layer] = chosen
    roles = {role: choices for role, choices in recipe.roles.items() if role not in by_role}
    for role, layers in by_role.items():
        most = Counter(layers.values()).most_common(1)[0][0]
        others: dict[str, set[int]] = defaultdict(set)
        for layer, chosen in layers.items():
            if chosen != most:
                others[chosen].add(layer)
        listed = [Choice(name, InLayers(frozenset(found))) for name, found in sorted(others.items())]
        roles[role] = (*listed, Choice(most))
    return replace(recipe, roles=roles, tensors=tuple(tensors), candidates=())
