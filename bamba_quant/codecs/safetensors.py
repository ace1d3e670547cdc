"""Codecs of safetensors directories: a matrix becomes several tensors, and config.json says how they are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bamba_quant.codecs.base import Codec, Part, Parts, Shared


@dataclass(frozen=True)
class Ignored:
    """Linear layers that a configuration lists, in three notations, since no runtime understands all of them.

    They are those that stay unquantized, or those of a group. ``modules`` are all of them by Hugging Face's names.
    ``patterns`` are Python's regular expressions, without compressed-tensors' prefix ``re:``, that match those of
    ``modules`` inside layers and no other one, also under vLLM's names, which differ between layer and leaf.
    ``aliases`` are vLLM's own names.
    """

    modules: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def unmatched(self) -> tuple[str, ...]:
        """The names that no pattern matches: of modules outside layers, such as the output, and of modules that vLLM
        names as if they belonged to another layer.
        """
        expressions = [re.compile(pattern) for pattern in self.patterns]
        names = (*self.modules, *self.aliases)
        return tuple(name for name in names if not any(e.match(name) for e in expressions))


@dataclass(frozen=True, kw_only=True)
class SafetensorsCodec(Codec):
    """A layout of matrices in a safetensors directory.

    ``tensors(rows, columns)`` are the parts of a matrix, ``whole(rows, columns, shared)`` the contents of those that
    are not cut by rows, and ``fits(rows, columns)`` the shapes that it takes where this one is not among them, else
    "". ``configuration`` is the ``quantization_config`` of config.json. A ``packed`` layer that a loader makes from
    it has no ``weight``, one with ``zero_points`` has integers beside its scales; ``kernels`` names what computing
    with it requires, "" for a CPU. ``block_rows`` is the height of blocks that share a scale, 0 where there are none.
    ``measured`` is the part, "" for none, that a plan fills from the largest magnitude that enters the matrix on a
    text, by ``global_scale`` of FP4. ``experts`` says whether transformers loads experts in this form, each a matrix
    in the directory and all of a layer one tensor in memory. ``metadata(matrices, others)``, given the shapes of the
    matrices and the names of all other tensors, is the ``__metadata__`` of every shard's header.
    """

    tensors: Callable[[int, int], tuple[Part, ...]]
    configuration: Callable[[Ignored], dict[str, Any]]
    packed: bool = False
    zero_points: bool = False
    kernels: str = ""
    block_rows: int = 0
    measured: str = ""
    experts: bool = True
    fits: Callable[[int, int], str] = lambda rows, columns: ""
    whole: Callable[[int, int, Shared], Parts] = lambda rows, columns, shared: {}
    metadata: Callable[[Mapping[str, tuple[int, int]], Sequence[str]], dict[str, str]] = (
        lambda matrices, others: {"format": "pt"}
    )

    def parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        return self.tensors(rows, columns)

    def misfit(self, rows: int, columns: int) -> str:
        return self.fits(rows, columns)
