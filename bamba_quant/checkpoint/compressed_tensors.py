"""compressed-tensors' checkpoints: e4m3 weights with scales of rows, blocks or a matrix, packed integers and FP4.

Values are those of compressed-tensors' own decompression: the product is rounded to the scale's type.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import regex

from bamba_quant.checkpoint.assemble import E4M3, WeightAssembler, are_two_lengths, is_length
from bamba_quant.checkpoint.base import StoredTensor, read_raw
from bamba_quant.checkpoint.compressed_fp4 import assemble_float4
from bamba_quant.checkpoint.dequantize import Float8Dequantizer, IntegerDequantizer
from bamba_quant.checkpoint.packed import Activations, ScaleTensor
from bamba_quant.codecs.integers.grid import IntegerGrid
from bamba_quant.codecs.integers.pack_quantized import unpack_zeros
from bamba_quant.errors import repr_short

# Of activations and of the key-value cache: nothing that a weight's value depends on.
_UNUSED = re.compile(
    r"\.(input_scale|input_global_scale|input_zero_point|output_scale|output_zero_point|[kqv]_scale|[kqv]_zero_point)$"
)
# The layer's number, and k or v: compressed-tensors' names, the newer ones and those that it wrote on the projections.
CACHE_SCALE = re.compile(r"\.(\d+)\..*\b([kv])(?:_proj\.output)?_scale$")
_WEIGHT_PARTS = tuple(
    f".weight_{part}" for part in ("scale", "zero_point", "shape", "g_idx", "packed", "global_scale")
)
_STRATEGIES = "tensor, channel, block or group"


def read_compressed_tensors(quantization: Mapping[str, Any], stored: WeightAssembler) -> None:
    """Assemble what is packed, or e4m3, and its scales. Raises ``CheckpointError`` naming what cannot be read."""
    transforms = quantization.get("transform_config")
    if transforms:  # a rotated weight needs the inverse rotation of its input at run time
        found = f"transform_config {repr_short(transforms)}"
        raise stored.unsupported("quantization_config", found, "none", "the checkpoint")
    groups = ConfigGroups(quantization, stored)
    for name, tensor in list(stored.remaining().items()):
        if name.endswith(".weight_packed"):
            module = name.removesuffix(".weight_packed")
            if tensor.format.name == "u8":
                group = groups.find(module, "float")
                assemble_float4(stored, module, tensor, group["weights"], _activations(stored, module, group))
            else:
                _assemble_integers(stored, module, groups.find(module, "int"))
        elif name.endswith(".weight") and tensor.format.name == E4M3:
            module = name.removesuffix(".weight")
            _assemble_float8(stored, module, tensor, groups.find(module, "float"))
    for name in stored.remaining():
        if _UNUSED.search(name):
            stored.unused.add(name)
        elif name.endswith(_WEIGHT_PARTS):
            expected = "weight_packed, or a weight in e4m3"
            raise stored.unsupported(
                name, "a part without packed codes", expected, "a weight with such a part"
            )


def _assemble_float8(
    stored: WeightAssembler, module: str, codes: StoredTensor, group: Mapping[str, Any]
) -> None:
    weights = group["weights"]
    strategy, name = weights.get("strategy"), f"{module}.weight"
    bits = weights.get("num_bits")
    if type(bits) is not int or bits != 8 or not _symmetric(weights) or len(codes.shape) != 2:
        found = f"{_bits_and_symmetry(weights)}, shape {codes.shape}"
        raise stored.unsupported(name, found, "8 bits, symmetric, a matrix")
    rows, columns = codes.shape
    height, width = _tile_shape(stored, name, weights, rows, columns)
    tall, wide = -(-rows // height), -(-columns // width)
    shapes = {"tensor": ((1,), (), (1, 1)), "channel": ((rows, 1), (rows,))}.get(
        str(strategy), ((tall, wide),)
    )
    scale = stored.take(f"{module}.weight_scale", shapes=shapes)
    stored.take(name, (E4M3,))
    stored.add(
        name,
        f"e4m3 by {strategy}",
        (rows, columns),
        Float8Dequantizer(columns, width, scale.format.name),
        codes,
        ScaleTensor(scale, 0 if strategy == "tensor" else height),
        activations=_activations(stored, module, group),
    )


def _bits_and_symmetry(weights: Mapping[str, Any]) -> str:
    return f"num_bits {repr_short(weights.get('num_bits'))}, symmetric {repr_short(weights.get('symmetric', True))}"


def _symmetric(weights: Mapping[str, Any]) -> bool | None:
    """True by default; None where the configuration has something that is not a boolean."""
    found = weights.get("symmetric", True)
    return found if isinstance(found, bool) else None


def _tile_shape(
    stored: WeightAssembler, name: str, weights: Mapping[str, Any], rows: int, columns: int
) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    strategy, size, structure = (weights.get(key) for key in ("strategy", "group_size", "block_structure"))
    if strategy == "tensor":
        return rows, columns
    if strategy == "channel":
        return 1, columns
    if strategy == "group" and is_length(size) and columns % size == 0:
        return 1, size
    if strategy == "block" and are_two_lengths(structure):
        return structure[0], structure[1]
    sizes = f"strategy {repr_short(strategy)}, group_size {repr_short(size)}, block_structure {repr_short(structure)}"
    found = f"{sizes}, {columns} columns"
    raise stored.unsupported(name, found, f"strategy {_STRATEGIES}, with its sizes")


def _assemble_integers(stored: WeightAssembler, module: str, described: Mapping[str, Any]) -> None:
    weights = described["weights"]
    name, bits, symmetric = f"{module}.weight", weights.get("num_bits"), _symmetric(weights)
    if type(bits) is not int or bits not in (4, 8) or symmetric is None:
        raise stored.unsupported(name, _bits_and_symmetry(weights), "4 or 8 bits, symmetric true or false")
    if stored.get(f"{module}.weight_g_idx") is not None:
        raise stored.unsupported(name, "weight_g_idx", "groups in order")
    rows, columns = _weight_shape(stored, f"{module}.weight_shape")
    _, group = _tile_shape(stored, name, weights, rows, columns)
    if weights.get("strategy") not in ("group", "channel") or group % 32 or columns % group:
        strategy = repr_short(weights.get("strategy"))
        found = f"strategy {strategy}, {group} of {columns} columns share a scale"
        raise stored.unsupported(name, found, "groups, or rows, of a multiple of 32 columns")
    per_word = 32 // bits
    codes = stored.take(f"{module}.weight_packed", ("i32",), ((rows, columns // per_word),))
    scale = stored.take(f"{module}.weight_scale", shapes=((rows, columns // group),))
    zero = None
    if not symmetric:
        words = stored.take(
            f"{module}.weight_zero_point", ("i32",), ((-(-rows // per_word), columns // group),)
        )
        zero = ScaleTensor(words, per_word, unpack=partial(_unpack_zeros, bits=bits))
    grid = IntegerGrid(bits, "none" if symmetric else "integer", group)
    stored.add(
        name,
        f"w{bits}a16{'' if symmetric else '-asym'}-g{group}",
        (rows, columns),
        IntegerDequantizer(grid, 1 << bits - 1, columns, scale.format.name),
        codes,
        ScaleTensor(scale),
        zero,
        _activations(stored, module, described),
    )


def _unpack_zeros(words: Any, count: int, bits: int) -> Any:
    return unpack_zeros(words, bits, count)


def _weight_shape(stored: WeightAssembler, name: str) -> tuple[int, int]:
    """The two numbers that ``weight_shape`` holds."""
    tensor = stored.take(name, ("i64", "i32"), ((2,),))
    rows, columns = read_raw(tensor).view(tensor.format.dtype).reshape(-1).tolist()
    if rows <= 0 or columns <= 0:
        raise stored.unsupported(name, f"{rows} × {columns}", "a matrix")
    return rows, columns


_MOST_PATTERNS, _MOST_LENGTH = 1000, 1000
_SECONDS = 2.0  # for all matches of a checkpoint: some expressions take exponential time


class ConfigGroups:
    """The groups of ``config_groups``, found by a module's name, by regular expression, or by class.

    Regular expressions follow ``re:`` and match as re.match.
    """

    def __init__(self, quantization: Mapping[str, Any], stored: WeightAssembler) -> None:
        groups = quantization.get("config_groups")
        self._stored = stored
        self._groups = [
            group
            for group in (groups.values() if isinstance(groups, dict) else ())
            if isinstance(group, dict) and isinstance(group.get("targets"), list)
        ]
        self._names: dict[str, set[int]] = {}
        self._patterns: list[tuple[regex.Pattern[str], int]] = []
        self._left = _SECONDS
        for index, group in enumerate(self._groups):
            for target in group["targets"]:
                if isinstance(target, str) and target.startswith("re:"):
                    self._patterns.append((self._compiled(target), index))
                elif isinstance(target, str):
                    self._names.setdefault(target, set()).add(index)
        if len(self._patterns) > _MOST_PATTERNS:
            raise self._unsupported(f"{len(self._patterns)} regular expressions", f"at most {_MOST_PATTERNS}")

    def find(self, module: str, kind: str) -> Mapping[str, Any]:
        """The group for a module whose weights are of type ``kind``: one that names it, else one for its class.

        Raises ``CheckpointError`` when there is none.
        """
        module = self._stored.target(module)
        named = self._names.get(module, set()) | {
            index for pattern, index in self._patterns if self._matches(pattern, module)
        }
        for index in (*sorted(named), *sorted(self._names.get("Linear", ()))):
            weights = self._groups[index].get("weights")
            if isinstance(weights, dict) and weights.get("type") == kind:
                return self._groups[index]
        found = f"no group of quantization_config for it with weights of type {kind}"
        expected = "config_groups whose targets name the module or Linear"
        raise self._stored.unsupported(f"module {module}", found, expected)

    def _compiled(self, target: str) -> regex.Pattern[str]:
        if len(target) > _MOST_LENGTH:
            raise self._unsupported(repr_short(target), f"at most {_MOST_LENGTH} characters")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                re.compile(target[3:])  # regex accepts expressions that re, which loaders use, refuses
                return regex.compile(target[3:])
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise self._unsupported(
                f"{repr_short(target)}: {error}", "a regular expression after re:"
            ) from None

    def _matches(self, pattern: regex.Pattern[str], module: str) -> bool:
        started = time.monotonic()
        try:
            return pattern.match(module[:_MOST_LENGTH], timeout=max(1e-3, self._left)) is not None
        except TimeoutError:
            raise self._unsupported(
                f"re:{pattern.pattern}", f"expressions that match all modules within {_SECONDS:.0f} s"
            ) from None
        finally:
            self._left -= time.monotonic() - started

    def _unsupported(self, found: str, expected: str) -> Exception:
        return self._stored.unsupported("quantization_config", found, expected, "a target")


# FP4 by strategy, group and dynamic, and the dtypes of its scales; None in files of earlier releases.
_FLOAT4: dict[tuple[Any, ...], tuple[Literal["nvfp4", "mxfp4"], tuple[str | None, ...]]] = {
    ("tensor_group", 16, "local"): ("nvfp4", ("torch.float8_e4m3fn", None)),
    ("group", 32, True): ("mxfp4", ("torch.uint8",)),
}


def activations_of_group(group: Mapping[str, Any], scale: float | None = None) -> Activations | None:
    """The rounding of activations in a group of compressed-tensors' ``config_groups``, None without any.

    ``scale`` is the number that the file holds for a matrix, its ``input_scale`` or ``input_global_scale``.
    """
    inputs, outputs = group.get("input_activations"), group.get("output_activations")
    if not inputs and not outputs:
        return None
    found: Mapping[str, Any] = inputs if isinstance(inputs, dict) and not outputs else {}
    bits, strategy, size, dynamic = (
        found.get(key) for key in ("num_bits", "strategy", "group_size", "dynamic")
    )
    if found.get("type") == "float" and found.get("symmetric") is True:
        if type(bits) is int and bits == 8 and dynamic is True:
            if strategy in ("token", "tensor"):
                return Activations(strategy)
            if strategy == "group" and type(size) is int and size > 0:
                return Activations("group", size)
        if type(bits) is int and bits == 8 and dynamic is False and strategy == "tensor" and scale:
            return Activations("tensor", scale=scale)
        if type(bits) is int and bits == 4 and type(size) is int and isinstance(strategy, str):
            kind, dtypes = _FLOAT4.get((strategy, size, dynamic), ("nvfp4", ()))
            if found.get("scale_dtype") in dtypes and (scale or kind == "mxfp4"):
                return Activations(kind, size, scale=scale or 0.0)
    return Activations(
        unknown=f"input_activations {repr_short(inputs)}, output_activations {repr_short(outputs)}"
        + ("" if scale or dynamic is True else ", no scale of them in the file")
    )


def _activations(stored: WeightAssembler, module: str, group: Mapping[str, Any]) -> Activations | None:
    return activations_of_group(
        group, stored.number(f"{module}.input_scale") or stored.number(f"{module}.input_global_scale")
    )
