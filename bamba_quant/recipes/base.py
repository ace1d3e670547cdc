"""What a recipe is: for each role of tensor, formats with the places they are for; data, and never tensor names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gguf import LlamaFileType

from bamba_quant.errors import PlanError


@dataclass(frozen=True)
class Place:
    """Where a tensor stands: number ``index`` of ``count`` among those of its role, in layer order.

    ``grouped_query`` is query heads per key-value head in the first layer, 0 where that is no attention layer;
    ``experts`` is how many a mixture has, else 0; ``imatrix`` says whether importance was measured.
    """

    index: int
    count: int
    grouped_query: int
    experts: int
    imatrix: bool


Condition = Callable[[Place], bool]


def anywhere(place: Place) -> bool:
    return True


@dataclass(frozen=True)
class Choice:
    """A format, and the places it is for."""

    format: str
    when: Condition = anywhere


@dataclass(frozen=True)
class Recipe:
    """A mixture of formats under the name users know.

    ``default`` is the format of every matrix; ``roles`` lists what some roles take instead, the first choice whose
    place fits; ``file_type`` is what ``general.file_type`` says; ``needs_importance`` names formats that this
    recipe does not use without an importance matrix; ``about`` is its documentation.
    """

    name: str
    file_type: LlamaFileType
    default: str
    about: str
    roles: Mapping[str, tuple[Choice, ...]] = field(default_factory=dict)
    needs_importance: frozenset[str] = frozenset()

    def format_for(self, role: str, place: Place) -> str:
        """The format of a matrix of this role at this place."""
        fitting = (choice.format for choice in self.roles.get(role, ()) if choice.when(place))
        return next(fitting, self.default)


_registry: dict[str, Recipe] = {}
_aliases: dict[str, str] = {}


def register(recipe: Recipe, *aliases: str) -> Recipe:
    """Make a recipe known by its name and any further ones."""
    _registry[recipe.name] = recipe
    _aliases.update(dict.fromkeys(aliases, recipe.name))
    return recipe


def recipes() -> tuple[Recipe, ...]:
    return tuple(_registry.values())


def recipe_named(name: str) -> Recipe:
    """The recipe users call ``name``, in any case. Raises ``PlanError`` listing the names there are."""
    key = name.lower()
    try:
        return _registry[_aliases.get(key, key)]
    except KeyError:
        raise PlanError(
            f"no output type is called {name!r}", expected="auto, " + ", ".join([*_registry, *_aliases])
        ) from None
