"""The readers that are fuzzed, each registered where its call is defined."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

from tests.fuzz.tree import Tree, write_tree


@dataclass(frozen=True)
class Case:
    """What a call is given: the directory with its input, and the case's random numbers to choose by."""

    path: Path
    random: Random
    tree: Tree
    valid: bool = False


Seeds = Callable[[], Sequence[Tree]]
Mutate = Callable[[Random, Tree], Tree]
Call = Callable[[Case], None]


@dataclass(frozen=True)
class Reader:
    """``weight`` is its share of the cases; ``leaves`` says that a call may leave files in its directory."""

    name: str
    seeds: Seeds
    mutate: Mutate
    call: Call
    weight: float = 1.0
    leaves: bool = False

    @cached_property
    def valid(self) -> Sequence[Tree]:
        """The valid inputs, made once."""
        return tuple(self.seeds())

    def warm(self, place: Path) -> None:
        """Call it on a valid input below ``place``, so that what is imported or compiled then is there for all."""
        write_tree(self.valid[0], place)
        with contextlib.suppress(Exception):  # which its first case will show
            self.call(Case(place, Random(0), self.valid[0], valid=True))

    def tree(self, seed: int, number: int) -> tuple[Tree, Random]:
        """The input of a case, and the random numbers that its call goes on with."""
        random = Random(f"{self.name}:{seed}:{number}")
        if number < len(self.valid):
            return self.valid[number], random
        return self.mutate(random, random.choice(self.valid)), random


_READERS: dict[str, Reader] = {}


def reader(
    name: str, *, seeds: Seeds, mutate: Mutate, weight: float = 1.0, leaves: bool = False
) -> Callable[[Call], Call]:
    """Register the decorated call as the reader ``name``."""

    def register(call: Call) -> Call:
        if name in _READERS:
            raise ValueError(f"two readers are called {name}")
        _READERS[name] = Reader(name, seeds, mutate, call, weight, leaves)
        return call

    return register


def readers(plugins: Sequence[str] = ()) -> dict[str, Reader]:
    """All readers by name: those of ``tests/fuzz/readers``, or those of the modules ``plugins`` alone."""
    if plugins:
        for name in plugins:
            importlib.import_module(name)
    else:
        package = importlib.import_module("tests.fuzz.readers")
        for module in sorted(found.name for found in pkgutil.iter_modules(package.__path__)):
            importlib.import_module(f"tests.fuzz.readers.{module}")
    return dict(_READERS)
