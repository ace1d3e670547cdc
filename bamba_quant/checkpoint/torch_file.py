"""A ``pytorch_model*.bin`` as named byte ranges, found by torch's weights-only loader: no pickled code runs."""

from __future__ import annotations

import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from bamba_quant.checkpoint.base import StoredTensor
from bamba_quant.errors import CheckpointError
from bamba_quant.formats import format_named

_LOCAL_HEADER = 30  # bytes before name and extra field: APPNOTE.TXT, section 4.3.7


@dataclass(frozen=True)
class _Record:
    """A member of the archive: its bytes begin at ``offset`` of the file, behind its own local header."""

    name: str
    offset: int
    size: int
    stored: bool


def read_torch_file(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file by name, without reading a weight.

    Under a fake-tensor mode ``torch.load`` gives each storage an offset instead of bytes. What it gives for a new
    file is computed from how torch lays records out, which is wrong for an archive that another tool packed
    (https://docs.pytorch.org/docs/stable/notes/serialization.html). So torch sees a copy whose records are empty
    and that does not claim torch's layout: there the offset is looked up, and tells which record was meant. Where
    that record lies in the file, its own header says. Raises ``CheckpointError`` for a file of the format before
    torch 1.6, for compressed records, for anything but tensors, and for tensors that are not contiguous.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    names = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
    if not file.is_file():
        raise CheckpointError("a file of the checkpoint is missing", where=file)
    if not zipfile.is_zipfile(file):
        raise CheckpointError(
            "a .bin file is no zip archive",
            where=file,
            expected="the format torch writes since 1.6",
            fix="fetch the file again, or save the model as safetensors",
        )
    records = _records(file)
    skeleton, meant = _skeleton(file, records)
    try:
        with FakeTensorMode():
            state = torch.load(skeleton, weights_only=True, map_location="cpu")
    # torch.load raises whatever its unpickler and zip reader raise, so the cause is quoted, not judged.
    except Exception as error:
        raise CheckpointError(
            "torch cannot read a file of the checkpoint as weights alone",
            where=file,
            found=(str(error) or type(error).__name__).splitlines()[0],
            expected="a dictionary of tensors saved by torch 1.6 or later",
            fix="fetch the file again, or save the model as safetensors",
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            "a .bin file holds no dictionary of tensors", where=file, found=type(state).__name__
        )
    tensors: dict[str, StoredTensor] = {}
    for name, value in state.items():
        where = f"{file}, tensor {name}"
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                "a .bin file holds something that is no tensor", where=where, found=type(value).__name__
            )
        if value.dtype not in names:
            raise CheckpointError(
                "a tensor has a dtype that weights cannot be read from",
                where=where,
                found=str(value.dtype).removeprefix("torch."),
                expected=", ".join(names.values()),
            )
        if not isinstance(name, str):
            raise CheckpointError(
                "a .bin file has a tensor whose name is no text", where=file, found=repr(name)
            )
        if value.layout is not torch.strided or not value.is_contiguous() or value.is_neg():
            raise CheckpointError(
                "a tensor of a .bin file does not lie in one piece",
                where=where,
                found=f"layout {value.layout} of shape {tuple(value.shape)}",
                fix="save the model as safetensors",
            )
        storage = value.untyped_storage()
        record = records.get(meant.get(getattr(storage, "_checkpoint_offset", -1), ""))
        if record is None:
            raise CheckpointError("a tensor of a .bin file has no bytes of its own", where=where)
        begin = value.storage_offset() * value.element_size()
        tensor = StoredTensor(
            name, tuple(value.shape), format_named(names[value.dtype]), file, record.offset + begin
        )
        if not record.stored:
            raise CheckpointError(
                "a .bin file is compressed",
                where=f"{where}, record {record.name}",
                expected="records that are stored as they are, as torch.save writes them",
                fix="load it with torch and save the model as safetensors",
            )
        if storage.nbytes() != record.size or begin + tensor.n_bytes > record.size:
            raise CheckpointError(
                "a record of a .bin file has another size than its tensor",
                where=f"{where}, record {record.name}",
                found=f"{record.size} bytes",
                expected=f"{max(storage.nbytes(), begin + tensor.n_bytes)} bytes",
                fix="fetch the file again, or save the model as safetensors",
            )
        tensors[name] = tensor
    return tensors


def _records(file: Path) -> dict[str, _Record]:
    """Every member by name, located by its own local header. Raises ``CheckpointError`` for a damaged archive."""
    records: dict[str, _Record] = {}
    try:
        size = file.stat().st_size
        with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
            for member in archive.infolist():
                stream.seek(member.header_offset)
                header = stream.read(_LOCAL_HEADER)
                if len(header) < _LOCAL_HEADER or not header.startswith(b"PK\3\4"):
                    raise zipfile.BadZipFile(f"no header before {member.filename}")
                lengths = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
                offset = member.header_offset + _LOCAL_HEADER + sum(lengths)
                if offset + member.compress_size > size:
                    raise zipfile.BadZipFile(f"{member.filename} goes beyond the end of the file")
                if member.filename in records:
                    raise zipfile.BadZipFile(f"{member.filename} stands twice")
                stored = (
                    member.compress_type == zipfile.ZIP_STORED and member.compress_size == member.file_size
                )
                records[member.filename] = _Record(member.filename, offset, member.file_size, stored)
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise _damaged(file, error) from error
    return records


def _skeleton(file: Path, records: dict[str, _Record]) -> tuple[io.BytesIO, dict[int, str]]:
    """The archive with empty storages and without the record that claims torch's layout; record names by offset."""
    buffer = io.BytesIO()
    try:
        with zipfile.ZipFile(file) as archive, zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as copy:
            for name in records:
                inner = name.partition("/")[2]
                if inner == "byteorder" and archive.read(name).strip() != b"little":
                    raise CheckpointError(
                        "a .bin file was written on a big-endian machine",
                        where=file,
                        fix="load it with torch and save the model as safetensors",
                    )
                if inner in ("data.pkl", "version", "byteorder"):
                    copy.writestr(name, archive.read(name))
                elif inner.startswith("data/"):
                    copy.writestr(name, b"")
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise _damaged(file, error) from error
    buffer.seek(0)
    with zipfile.ZipFile(buffer) as copy:
        # No extra fields here: a record begins behind its header and name.
        meant = {
            member.header_offset + _LOCAL_HEADER + len(member.filename.encode()): member.filename
            for member in copy.infolist()
        }
    buffer.seek(0)
    return buffer, meant


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        "a .bin file is no whole zip archive",
        where=file,
        found=str(error) or type(error).__name__,
        expected="the format torch writes since 1.6",
        fix="fetch the file again, or save the model as safetensors",
    )
