"""ggml's formats: neighbouring weights of a row become a block of bytes."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.codecs.base import Codec, Encode, Method, Part, Parts, Shared
from bamba_quant.codecs.fields import FieldLayout
from bamba_quant.codecs.layout import BlockLayout
from bamba_quant.errors import FormatError

Quantize = Callable[[F32, "F32 | None"], U8]
Dequantize = Callable[[U8], F32]


@dataclass(frozen=True)
class PackedRows:
    """Rows of codes with float32 scales and zeros behind them, from bytes ``scales_at`` and ``zeros_at`` on.

    Codes of ``kind`` "e4m3" or "e2m1", or integers of ``bits`` stored with ``offset`` and a zero as the kind says,
    share a scale in groups of ``group``; weights are rounded to ``dtype``.
    """

    kind: str
    bits: int
    offset: int
    dtype: str
    group: int
    scales_at: int
    zeros_at: int


@dataclass(frozen=True, kw_only=True)
class BlockCodec(Codec):
    """``block_size`` neighbours of a row become ``block_bytes`` bytes; all blocks are one part, without a suffix.

    ``dequantize`` takes uint8 (rows, ``row_bytes(n)``) and returns float32 (rows, n). ``dtype`` is set for plain
    numbers; weights up to the magnitude ``max_abs`` never overflow a block's scale. Tensors of a codec that is not
    ``readable`` can only be listed. ``fields`` gives codes and scales as arrays. ``layout`` is the table of its
    blocks, ``packed`` that of rows whose scales lie behind their codes; where there is none, ``gpu`` names a module
    whose ``WEIGHTS[name]`` is a Triton function that reads one weight.
    ``ggml_type`` is negative for what no GGUF holds.
    """

    ggml_type: int
    block_size: int
    block_bytes: int
    dequantize: Dequantize
    dtype: np.dtype[Any] | None = None
    max_abs: float = math.inf
    readable: bool = True
    fields: FieldLayout | None = None
    layout: BlockLayout | None = None
    packed: PackedRows | None = None
    gpu: str = ""

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_size

    @property
    def compiled(self) -> bool:
        return self.dtype is not None or super().compiled

    def fits(self, columns: int) -> bool:
        return columns % self.block_size == 0

    def misfit(self, rows: int, columns: int) -> str:
        return "" if self.fits(columns) else f"columns in multiples of {self.block_size}"

    def parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        return (Part("", "U8", (rows, self.row_bytes(columns))),)

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of ``columns`` weights. Raises ``FormatError`` when blocks do not fill the row."""
        if not self.fits(columns):
            raise FormatError(
                f"a row does not divide into blocks of {self.name}",
                found=f"{columns} columns",
                expected=f"a multiple of {self.block_size}",
            )
        return columns // self.block_size * self.block_bytes

    def quantize(self, x: F32, importance: F32 | None = None) -> U8:
        """The definition: numpy's version of the default method, with temporaries of several times the input.

        Takes float32 (rows, n), n a multiple of ``block_size``, and importance (n,) or None; returns uint8
        (rows, ``row_bytes(n)``). Raises ``FormatError`` for a codec that is only read.
        """
        packed: U8 = self.method().encode(x, importance, None)[""]
        return packed

    def quantizer(self, method: str | None = None, compiled: bool = True) -> Quantize:
        """The quantizer of a method, by default the first: compiled where there is a compiled version, else numpy.

        The compiled version runs without the interpreter lock, so that several threads can quantize different rows at
        the same time; ``compiled=False`` selects the numpy version. Raises ``FormatError`` as ``method``, and in the
        quantizer for arrays that do not fit the codec.
        """
        chosen = self.method(method)
        encode = chosen.compiled() if compiled and chosen.compiled else chosen.encode

        def quantize(x: F32, importance: F32 | None = None) -> U8:
            self._check_arrays(x, importance)
            packed: U8 = encode(x, importance, None)[""]
            return packed

        return quantize

    def _check_arrays(self, x: F32, importance: F32 | None) -> None:
        if x.ndim != 2 or x.dtype != np.float32:
            raise FormatError(
                f"{self.name} quantizes rows of float32",
                found=f"{x.dtype} of shape {x.shape}",
                expected="float32 of shape (rows, columns)",
            )
        self.row_bytes(x.shape[1])
        if importance is not None and (importance.shape != x.shape[1:] or importance.dtype != np.float32):
            raise FormatError(
                "the importance does not fit the rows",
                found=f"{importance.dtype} of shape {importance.shape}",
                expected=f"float32 of shape ({x.shape[1]},)",
            )


def block_methods(
    name: str,
    block: tuple[int, int],
    quantize: Quantize,
    compiled: str = "",
    fields: FieldLayout | None = None,
) -> tuple[Method, ...]:
    """The methods of a block codec: "ggml", its own search, and "refine" where blocks have a float16 scale.

    ``block`` is its weights and its bytes. ``quantize`` is the numpy version; ``compiled`` names a module whose
    ``KERNELS[name]`` is the compiled one, where there is one.
    """

    def in_numpy(x: F32, importance: F32 | None, shared: Shared) -> Parts:
        return {"": quantize(x, importance)}

    def by_kernel() -> Encode:
        return _encoder(importlib.import_module(compiled).KERNELS[name], block)

    search = Method("ggml", "ggml's own search", in_numpy, by_kernel if compiled else None)
    if fields is None or not fields.refinable:
        return (search,)

    def refined(search: Encode) -> Encode:
        def encode(x: F32, importance: F32 | None, shared: Shared) -> Parts:
            from bamba_quant.codecs.compiled.refinement import refine

            return {"": refine(fields, search(x, importance, shared)[""], x, importance)}

        return encode

    compiled_refine = (lambda: refined(by_kernel())) if compiled else None
    about = "ggml's search, then scales moved among their neighbours to the least weighted squared error"
    return search, Method("refine", about, refined(in_numpy), compiled_refine)


def _encoder(kernel: Any, block: tuple[int, int]) -> Encode:
    """``kernel``, compiled at the first call or fetched from disk, as a method's ``encode``."""
    from bamba_quant.codecs.compiled.compilation import compiled

    def encode(x: F32, importance: F32 | None, shared: Shared) -> Parts:
        out = np.empty((len(x), x.shape[1] // block[0] * block[1]), np.uint8)
        x = np.require(x, np.float32, ["C", "A"])
        if importance is not None:
            importance = np.require(np.broadcast_to(importance, x.shape[1:]), np.float32, ["C", "A"])
        compiled(kernel, importance is not None)(x, importance, out)
        return {"": out}

    return encode


def block_codec(
    name: str,
    layout: BlockLayout,
    quantize: Quantize,
    *,
    compiled: str = "",
    max_abs: float = math.inf,
    with_fields: bool = True,
) -> BlockCodec:
    """The codec ``name`` of ggml whose rows are blocks of ``layout``; other arguments as ``block_methods``'s."""
    fields = layout.rows() if with_fields else None
    return BlockCodec(
        name=name,
        ggml_type=GGMLQuantizationType[name.upper()],
        block_size=layout.block,
        block_bytes=layout.block_bytes,
        dequantize=layout.dequantize,
        methods=block_methods(name, (layout.block, layout.block_bytes), quantize, compiled, fields),
        max_abs=max_abs,
        fields=fields,
        layout=layout,
    )
