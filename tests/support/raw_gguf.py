"""GGUF files byte by byte, so that a test can write what no library would."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gguf import GGUFValueType as Type

from bamba_quant.checkpoint.gguf_values import GgufValue, pack_string, pack_value
from tests.support.ggml import library


@dataclass(frozen=True)
class Tensor:
    """A tensor's entry; ``dimensions`` in GGUF's order."""

    name: str
    dimensions: tuple[int, ...] = (4,)
    ggml_type: int = 0
    offset: int = 0

    def packed(self) -> bytes:
        raw = pack_string(self.name) + struct.pack("<I", len(self.dimensions))
        return raw + struct.pack(f"<{len(self.dimensions)}QIQ", *self.dimensions, self.ggml_type, self.offset)


@dataclass(frozen=True)
class RawGGUF:
    """A whole file; ``values`` are pairs of key and value, or bytes that follow the key as they are."""

    values: Sequence[tuple[str, GgufValue | bytes]] = (("general.architecture", GgufValue(Type.STRING, "x")),)
    tensors: Sequence[Tensor] = field(default_factory=lambda: (Tensor("a"), Tensor("b", offset=32)))
    version: int = 3
    tensor_count: int | None = None
    value_count: int | None = None
    data: int = 256  # bytes
    alignment: int = 32

    def write(self, file: Path) -> Path:
        counts = (
            len(self.tensors) if self.tensor_count is None else self.tensor_count,
            len(self.values) if self.value_count is None else self.value_count,
        )
        raw = b"GGUF" + struct.pack("<IQQ", self.version, *counts)
        for key, value in self.values:
            raw += pack_string(key) + (value if isinstance(value, bytes) else pack_value(value))
        raw += b"".join(tensor.packed() for tensor in self.tensors)
        file.write_bytes(raw + bytes(-len(raw) % self.alignment + self.data))
        return file


class _Params(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


def ggml_reads(file: Path) -> bool:
    """Whether ggml's ``gguf_init_from_file`` takes a file's header."""
    ggml = library()
    ggml.gguf_init_from_file.restype = ctypes.c_void_p
    ggml.gguf_init_from_file.argtypes = (ctypes.c_char_p, _Params)
    ggml.gguf_free.argtypes = (ctypes.c_void_p,)
    found = ggml.gguf_init_from_file(str(file).encode(), _Params(True, None))
    if found:
        ggml.gguf_free(found)
    return bool(found)
