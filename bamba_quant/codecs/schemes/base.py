"""The registry of schemes: each says how one weight matrix becomes several tensors of a safetensors directory.

A scheme is a layout, known by its name to whoever reads a checkpoint back, and several methods of filling it. Both
work on chunks of rows that never see each other; what a whole matrix, or a unit of fused matrices, must share is
measured in a pass of its own before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from bamba_quant.codecs.base import F32
from bamba_quant.errors import FormatError

# numpy's dtype by the name in a safetensors header.
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}

Array = NDArray[Any]
Parts = Mapping[str, Array]
Shared = Any
Encode = Callable[[F32, "F32 | None", Shared], Parts]
Measure = Callable[[F32, "F32 | None"], Array]


@dataclass(frozen=True)
class Part:
    """One tensor that a matrix becomes: its name is the module's with ``suffix``, as in ``.weight_scale``.

    ``dtype`` is a key of ``DTYPES``. One index along ``axis`` covers ``rows`` rows of the matrix, the last one
    perhaps fewer; ``rows`` 0 marks a part that is not cut by rows and is written once.
    """

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    rows: int = 1
    axis: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return self.elements * DTYPES[self.dtype].itemsize

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The indices along ``axis`` that rows ``start`` to ``stop`` of the matrix fill."""
        return start // self.rows, -(-stop // self.rows)


@dataclass(frozen=True)
class Method:
    """One way to choose codes and scales for a scheme's layout; all ways are read back alike.

    ``encode(x, importance, shared)`` takes float32 of shape (r, columns), r a multiple of the scheme's
    ``row_multiple`` or the last rows, finite; importance float32 of shape (columns,) that weighs squared errors, or
    None; and what ``share`` gave. It returns the parts that are cut by rows, by suffix, for these rows. It is numpy
    and the definition; ``twin`` imports a compiled function of the same bytes, free of the interpreter lock.

    Where a whole matrix shares something, ``measure(x, importance)`` sees every chunk first, ``combine`` joins two
    measurements, exactly and in any order, and ``share`` makes of their union what ``encode`` is told. Matrices
    that a runtime fuses are measured as one. Without ``measure`` shared is None. ``measure_twin`` is like ``twin``.
    """

    name: str
    about: str
    encode: Encode
    twin: Callable[[], Encode] | None = None
    measure: Measure | None = None
    measure_twin: Callable[[], Measure] | None = None
    combine: Callable[[Array, Array], Array] | None = None
    share: Callable[[Array], Shared] | None = None


@dataclass(frozen=True)
class Ignored:
    """The linear layers a scheme leaves alone, in three ways to say so, for no runtime understands every one.

    ``modules`` are all of them by Hugging Face's names. ``patterns`` are Python's regular expressions, without
    compressed-tensors' prefix ``re:``, that match those of ``modules`` that stand in layers and no quantized one,
    under vLLM's names too, which differ between layer and leaf. ``aliases`` are vLLM's own names.
    """

    modules: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def unmatched(self) -> tuple[str, ...]:
        """The modules that stand in no layer, such as the output: every runtime has the same names for them."""
        expressions = [re.compile(pattern) for pattern in self.patterns]
        return tuple(module for module in self.modules if not any(e.match(module) for e in expressions))


@dataclass(frozen=True)
class Scheme:
    """A layout of matrices in a safetensors directory, and the methods that fill it, the default one first.

    ``parts(rows, columns)`` are the tensors a matrix becomes. Chunks of rows begin at multiples of
    ``row_multiple``. ``fits`` says what keeps a matrix out, or "". ``whole(rows, columns, shared)`` gives the parts
    that are not cut by rows. ``decode(parts, columns)`` takes the parts of some rows, uncut ones whole, and returns
    float32 of shape (r, columns): the weight as a loader computes with it. ``configuration`` is the
    ``quantization_config`` of config.json, and a ``packed`` layer made from it has no ``weight``, one with
    ``zero_points`` integers beside its scales; ``kernels`` are what computing with it takes, "" where a CPU will do.
    ``block_rows`` is the height of the blocks that have a scale each, 0 where there are none.
    ``metadata(matrices, others)``, given the shapes of the matrices and the names of all other tensors, is the
    ``__metadata__`` of every shard's header.
    """

    name: str
    about: str
    parts: Callable[[int, int], tuple[Part, ...]]
    methods: tuple[Method, ...]
    decode: Callable[[Parts, int], F32]
    configuration: Callable[[Ignored], dict[str, Any]]
    packed: bool = False
    zero_points: bool = False
    kernels: str = ""
    block_rows: int = 0
    row_multiple: int = 1
    fits: Callable[[int, int], str] = lambda rows, columns: ""
    whole: Callable[[int, int, Shared], Parts] = lambda rows, columns, shared: {}
    metadata: Callable[[Mapping[str, tuple[int, int]], Sequence[str]], dict[str, str]] = (
        lambda matrices, others: {"format": "pt"}
    )

    def check(self, rows: int, columns: int) -> None:
        """Raise ``FormatError`` when a matrix of this shape does not divide as the layout wants."""
        complaint = self.fits(rows, columns)
        if complaint:
            raise FormatError(
                f"a matrix does not divide as {self.name} wants",
                found=f"{rows} rows of {columns}",
                expected=complaint,
            )

    def method(self, name: str | None = None) -> Method:
        """The method called ``name``, by default the first. Raises ``FormatError`` listing the names there are."""
        if name is None:
            return self.methods[0]
        for method in self.methods:
            if method.name == name:
                return method
        raise FormatError(
            f"{self.name} has no method called {name!r}",
            expected="one of " + ", ".join(method.name for method in self.methods),
        )

    def n_bytes(self, rows: int, columns: int) -> int:
        """Bytes of all parts of a matrix."""
        return sum(part.n_bytes for part in self.parts(rows, columns))


_registry: dict[str, Scheme] = {}


def register(scheme: Scheme) -> Scheme:
    """Add a scheme under its name; a second one of the same name is a programming error."""
    if scheme.name in _registry:
        raise ValueError(f"scheme {scheme.name} is registered twice")
    _registry[scheme.name] = scheme
    return scheme


def schemes() -> tuple[Scheme, ...]:
    """Every scheme this build knows, in the order of registration."""
    return tuple(_registry.values())


def scheme_named(name: str) -> Scheme:
    """The scheme called ``name``, in any case. Raises ``FormatError`` listing the names there are."""
    try:
        return _registry[name.lower()]
    except KeyError:
        raise FormatError(
            f"no scheme is called {name!r}", expected="one of " + ", ".join(_registry)
        ) from None
