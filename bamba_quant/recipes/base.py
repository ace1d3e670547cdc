"""What a recipe is: for each role of tensor, formats with the places they are for, and formats of single tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gguf import LlamaFileType

from bamba_quant.errors import PlanError

# What a row takes whose length its format's blocks do not fill (llama-quant.cpp, ``tensor_type_fallback``).
FALLBACKS = {
    "iq4_xs": "iq4_nl",
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "tq1_0": "q4_0",
    "tq2_0": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}


@dataclass(frozen=True)
class TensorPosition:
    """Where a tensor stands: number ``index`` of ``count`` among those of its role, in layer order.

    ``grouped_query`` is query heads per key-value head in the first layer, 0 where that is not an attention layer;
    ``experts`` is how many a mixture has, else 0; ``imatrix`` says whether importance was measured. ``layer`` is
    the number of its layer, None outside the layers.
    """

    index: int
    count: int
    grouped_query: int
    experts: int
    imatrix: bool
    layer: int | None = None


Condition = Callable[[TensorPosition], bool]


def anywhere(position: TensorPosition) -> bool:
    return True


@dataclass(frozen=True)
class InLayers:
    """The condition that a tensor belongs to one of these layers, counted from 0."""

    layers: frozenset[int]

    def __call__(self, position: TensorPosition) -> bool:
        return position.layer in self.layers


@dataclass(frozen=True)
class Choice:
    """A format, and the places it is for."""

    format: str
    when: Condition = anywhere


@dataclass(frozen=True)
class Assignment:
    """The format of the tensor called ``name`` in GGUF, or of those in whose names ``pattern`` is found."""

    format: str
    name: str = ""
    pattern: str = ""

    def covers(self, name: str) -> bool:
        """Whether it is for the tensor called ``name``."""
        return name == self.name if self.name else re.search(self.pattern, name) is not None


@dataclass(frozen=True)
class Recipe:
    """A mixture of formats under the name users know.

    ``default`` is the format of every matrix; ``roles`` lists what some roles take instead, the first choice whose
    position fits; ``tensors`` are formats of single tensors, which come before both, the first that covers one;
    ``file_type`` is what ``general.file_type`` says; ``needs_importance`` names formats that this recipe does not
    use without an importance matrix; ``about`` is its documentation. With ``candidates`` bits are then moved between
    tensors: each takes one of these formats, so that the estimated loss is least at no more bytes (``hybrid``).
    With ``refine`` scales are searched further than ggml does (``formats.cpu.refinement``).
    """

    name: str
    file_type: LlamaFileType
    default: str
    about: str
    roles: Mapping[str, tuple[Choice, ...]] = field(default_factory=dict)
    needs_importance: frozenset[str] = frozenset()
    tensors: tuple[Assignment, ...] = ()
    candidates: tuple[str, ...] = ()
    refine: bool = False

    def assigned(self, name: str) -> str | None:
        """The format that ``tensors`` give the tensor called ``name``, or None."""
        return next((each.format for each in self.tensors if each.covers(name)), None)

    def format_for(self, role: str, position: TensorPosition) -> str:
        """The format of a matrix of this role at this position."""
        fitting = (choice.format for choice in self.roles.get(role, ()) if choice.when(position))
        return next(fitting, self.default)


_registry: dict[str, Recipe] = {}
_aliases: dict[str, str] = {}


def register(recipe: Recipe, *aliases: str) -> Recipe:
    """Make a recipe known by its name and any further ones."""
    _registry[recipe.name] = recipe
    _aliases.update(dict.fromkeys(aliases, recipe.name))
    return recipe


def plain_recipe(file_type: int | None) -> Recipe | None:
    """The recipe that ``general.file_type`` stands for, which others may be like; None for other numbers."""
    return next((known for known in recipes() if known.file_type == file_type), None)


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
