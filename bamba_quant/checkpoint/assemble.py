"""What the readers of quantized checkpoints share: the parts of a weight, each checked, and their assembly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from bamba_quant.checkpoint.base import Shape, StoredTensor, read_tensor
from bamba_quant.checkpoint.dequantize import Dequantizer
from bamba_quant.checkpoint.packed import Activations, CodeTensor, PackedTensor, ScaleTensor, packed_tensor
from bamba_quant.checkpoint.stack import stacked
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
        self._tensors = dict(tensors)
        self._stacks: dict[str, int] = {}
        self._taken: set[str] = set()

    def split_stacks(self) -> None:
        """Replace e4m3 and e2m1 stacks (E, rows, columns), and parts beside them, by those of E matrices.

        A part that does not have E along its first axis is that of each. IBM's Granite 4.0 in FP8 has such experts.
        """
        for name, codes in list(self._tensors.items()):
            module, _, leaf = name.rpartition(".")
            if len(codes.shape) != 3 or not codes.elements or leaf not in ("weight", "weight_packed"):
                continue
            if codes.format.name not in (E4M3, "u8"):
                continue
            count = self._stacks[module] = codes.shape[0]
            for part in [each for each in self._tensors if each.rpartition(".")[0] == module]:
                leaf = part.rpartition(".")[2]
                if not leaf.startswith(("weight", "input_")):
                    continue
                tensor = self._tensors.pop(part)
                cut = len(tensor.shape) > 0 and tensor.shape[0] == count
                for number in range(count):
                    here, offset = f"{module}.{number}.{leaf}", number * tensor.n_bytes // count
                    shape = tensor.shape[1:] if cut else tensor.shape
                    moved = tensor.offset + offset if cut else tensor.offset
                    self._tensors[here] = replace(tensor, name=here, shape=shape, offset=moved)

    def target(self, module: str) -> str:
        """The name that a configuration has for ``module``: of a matrix of a stack, that of the stack."""
        whole = module.rpartition(".")[0]
        return whole if whole in self._stacks else module

    def assembled(self) -> dict[str, StoredTensor]:
        """All tensors in the end, matrices of stacks put together. Raises ``CheckpointError`` as ``stacked`` does."""
        found: dict[str, StoredTensor] = {**self.remaining(), **self.weights}
        for module, count in self._stacks.items():
            matrices = [found.pop(f"{module}.{number}.weight", None) for number in range(count)]
            found[f"{module}.weight"] = stacked(f"{module}.weight", [each for each in matrices if each])
        return found

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
