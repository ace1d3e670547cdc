"""Open a model: its checkpoint, configuration, weights and tokenizer; and the torch device and dtype to run it on."""

from __future__ import annotations

import hashlib
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bamba_quant.checkpoint import Checkpoint, ReadOptions, open_checkpoint
from bamba_quant.errors import BambaQuantError, CheckpointError, did_you_mean
from bamba_quant.inference.weights import LazyWeights
from bamba_quant.planning.model import open_model
from bamba_quant.printable import brief_repr
from bamba_quant.tokenizers.encoder import Encoder, read_encoder
from bamba_reference.config import Config

if TYPE_CHECKING:
    import torch

MOST_TEXT_BYTES = 1 << 28
_XZ_MAGIC = b"\xfd7zXZ\x00"
_XZ_MEMORY = 1 << 28  # of a decompressor; xz -9 needs a quarter of it
_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be run: its configuration, its weights and the checkpoint they come from."""

    checkpoint: Checkpoint
    config: Config
    weights: LazyWeights
    architecture: str

    __repr__ = brief_repr


def load_model(path: str | Path, *, reading: ReadOptions = ReadOptions()) -> LoadedModel:
    """The model at ``path``, a Hugging Face directory or a GGUF file: headers now, weights when they are read.

    Raises a ``BambaQuantError`` for an architecture that is not supported and for tensors that do not fit their
    configuration.
    """
    source = open_model(path, reading=reading)
    stored = {rule.name: (tensor, rule) for tensor, rule in source.pairs if not rule.skipped}
    weights = LazyWeights(stored, inverted=source.checkpoint.kind == "gguf")
    return LoadedModel(source.checkpoint, source.config, weights, source.architecture.name)


def load_model_and_tokenizer(
    path: str | Path, tokenizer: str | Path | None = None, reading: ReadOptions = ReadOptions()
) -> tuple[LoadedModel, Encoder]:
    """The model at ``path`` with its own tokenizer, or with that of the checkpoint at ``tokenizer``."""
    loaded = load_model(path, reading=reading)
    return loaded, read_encoder(open_checkpoint(tokenizer, weights=False) if tokenizer else loaded.checkpoint)


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype of that name. Raises ``BambaQuantError`` listing the names."""
    import torch

    if name not in _DTYPES:
        what = f"unknown dtype{did_you_mean(name, _DTYPES)}"
        raise BambaQuantError(what, where="--dtype", found=name, expected=", ".join(_DTYPES))
    return getattr(torch, name)


def torch_device(name: str, given: str | None = None) -> torch.device:
    """torch's device of that name, once it has held a number; kernels are launched on it from then on.

    ``given`` is what the user called it, where that differs. Raises ``BambaQuantError`` when it cannot.
    """
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    # Which of these torch raises for a device it was not built for differs between devices.
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        called = name if given in (None, name) else f"{given} ({name} in this process)"
        raise BambaQuantError(
            "torch cannot use this device",
            found=f"{called}: {str(error).splitlines()[0]}",
            expected="cpu, or cuda with a CUDA build of torch and a GPU",
        ) from error
    return device


def first_product(device: torch.device, dtype: torch.dtype) -> None:
    """Load the GPU's matmul library, which takes about a second, so that other work can overlap with it."""
    import torch

    if device.type == "cuda":
        x = torch.ones(64, 64, dtype=dtype, device=device)
        (x @ x).sum().item()


def read_text(file: Path) -> tuple[str, str]:
    """A UTF-8 text, from a file or an open pipe such as /dev/stdin, and the SHA-256 of its bytes.

    A file in xz's format is decompressed first. Raises ``CheckpointError`` for another encoding, and for devices and
    named pipes, which may never end.
    """
    try:
        open_pipe = file.is_fifo() and not file.resolve().exists()  # of /proc/self/fd, without a name on disk
        if file.exists() and not (file.is_file() or open_pipe):
            raise CheckpointError(
                "the text is not a regular file", where=file, expected="a file, or /dev/stdin with a pipe"
            )
        with file.open("rb") as stream:
            raw = stream.read(MOST_TEXT_BYTES + 1)
        if raw.startswith(_XZ_MAGIC) and len(raw) <= MOST_TEXT_BYTES:
            raw = _decompressed(raw)
        if len(raw) > MOST_TEXT_BYTES:
            raise CheckpointError(
                "the text is too large",
                where=file,
                expected=f"at most {MOST_TEXT_BYTES:,} bytes",
                fix="give a part of it; the text is held in memory as a whole",
            )
        return raw.decode("utf-8"), hashlib.sha256(raw).hexdigest()
    except OSError as error:
        raise CheckpointError("the text cannot be read", where=file, found=error.strerror) from error
    except (lzma.LZMAError, EOFError) as error:
        raise CheckpointError(
            "the compressed text is damaged", where=file, found=str(error), fix="test it with xz --test"
        ) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(
            "the text is not UTF-8",
            where=f"{file}, byte {error.start}",
            found=f"byte 0x{raw[error.start]:02x}",
            fix="convert it, for example with iconv",
        ) from error


def _decompressed(raw: bytes) -> bytes:
    """The streams of an .xz file, one after the other, as far as ``MOST_TEXT_BYTES`` + 1 bytes of them."""
    parts, room = [], MOST_TEXT_BYTES + 1
    while raw and room:
        decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
        parts.append(decompressor.decompress(raw, max_length=room))
        room -= len(parts[-1])
        if room and not decompressor.eof:
            raise EOFError("it ends too early")
        raw = decompressor.unused_data.lstrip(b"\0")  # padding between streams
    return b"".join(parts)
