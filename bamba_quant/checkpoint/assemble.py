"""What the readers of quantized checkpoints share: the parts of a weight, each checked, and their assembly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from bamba_quant.checkpoint.base import Shape, StoredTensor, read_tensor
from bamba_quant.checkpoint.dequantize import Dequantizer
from bamba_quant.checkpoint.packed import Activations, CodeTensor, PackedTensor, ScaleTensor, packed_tensor
from bamba_quant.errors import CheckpointError

E4M3 = "f8_e4m3"
_FLOATS = ("f32", "bf16", "f16")


class WeightAssembler:
    """Makes ``weights`` of a directory's tensors, and collects the names of those that are ``unused``.

    ``prefix`` precedes the tensors' names in the headers of the files.
    """

    def __init__(self, directory: Path, tensors: Mapping[str, StoredTensor], prefix: str = "") -> None:
        self.directory = directory
        self.prefix = prefix
        self.weights: dict[str, PackedTensor] = {}
        self.unused: set[str] = set()
        self._tensors = tensors
        self._taken: set[str] = set()

    def remaining(self) -> dict[str, StoredTensor]:
        """The tensors that belong to no weight so far."""
        gone = self._taken | self.unused
        return {name: tensor for name, tensor in self._tensors.items() if name not in gone}

    def get(self, name: str) -> StoredTensor | None:
        """The tensor of this name, None where there is none or a weight has it already."""
        return None if name in self._taken or name in self.unused else self._tensors.get(name)

    def take(
        self, name: str, dtypes: tuple[str, ...] = _FLOATS, shapes: tuple[Shape, ...] = ()
    ) -> StoredTensor:
        """A part of a weight. Raises ``CheckpointError`` when it is missing, or of another dtype or shape."""
        tensor = self._tensors.get(name)
        if tensor is None:
            raise CheckpointError(
                "a tensor of a quantized weight is missing",
                where=self.directory,
                found=f"no tensor {name}",
                fix="fetch all shards, or correct quantization_config",
            )
        if tensor.format.name not in dtypes or (shapes and tensor.shape not in shapes):
            raise CheckpointError(
                "a tensor of a quantized weight does not match quantization_config",
                where=f"{tensor.file}, tensor {name}",
                found=f"{tensor.format.name} of shape {tensor.shape}",
                expected=f"{' or '.join(dtypes)}"
                + (f" of shape {' or '.join(map(str, shapes))}" if shapes else ""),
                fix="check that config.json and the weights belong together",
            )
        self._taken.add(name)
        return tensor

    def number(self, name: str) -> float | None:
        """The one number of the tensor ``name``; None where there is none, or it is not positive and finite."""
        tensor = self._tensors.get(name)
        if tensor is None or tensor.elements != 1 or tensor.format.name not in _FLOATS:
            return None
        found = float(read_tensor(tensor).reshape(()))
        return found if 0 < found < math.inf else None

    def add(self, name: str, described: str, shape: tuple[int, int], dequantizer: Dequantizer,
            codes: CodeTensor | StoredTensor, scale: ScaleTensor, zero: ScaleTensor | None = None,
            activations: Activations | None = None) -> None:  # fmt: skip
        """Assemble the weight ``name``; ``codes`` given as a tensor are in the order of rows."""
        if isinstance(codes, StoredTensor):
            codes = CodeTensor(codes, codes.row_bytes)
        self.weights[name] = packed_tensor(
            name, described, shape, dequantizer, codes=codes, scale=scale, zero=zero, activations=activations
        )

    def unsupported(self, name: str, found: object, expected: str, what: str = "a weight") -> CheckpointError:
        """The error for a weight, or ``what`` else, that is stored in a form that is not supported."""
        return CheckpointError(
            f"{what} cannot be read",
            where=f"{self.directory}, {name}",
            found=str(found),
            expected=expected,
            fix="give the unquantized checkpoint",
        )


def is_length(value: Any) -> TypeGuard[int]:
    """Whether a value of a configuration can be a number of rows or columns."""
    return type(value) is int and 0 < value < 2**31


def are_two_lengths(value: Any) -> TypeGuard[list[int]]:
    """Whether a value of a configuration can be the shape of a matrix or of a block."""
    return isinstance(value, list) and len(value) == 2 and all(map(is_length, value))
