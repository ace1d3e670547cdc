"""A ``pytorch_model*.bin`` as named byte ranges: a zip archive of torch's, whose pickle is interpreted, not run."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from bamba_quant.checkpoint.base import StoredTensor
from bamba_quant.checkpoint.state_dict import STORAGES, PickledTensor, PickleError, read_state_dict
from bamba_quant.codecs import BlockCodec, codec_named
from bamba_quant.errors import CheckpointError, repr_short
from bamba_quant.files.reading import open_raw

_LOCAL_HEADER = 30  # bytes before name and extra field: APPNOTE.TXT, section 4.3.7
_PICKLE_BYTES = 16 << 20  # a tensor takes about 200
_DIRECTORY_BYTES = 8 << 20  # of the archive's list of members, of which each takes about 70
_ENCRYPTED = 1  # of a member's flags
_RESAVE = "load it with torch and save the model as safetensors"


@dataclass(frozen=True)
class _Record:
    """A member of the archive: its bytes begin at ``offset`` of the file, after its local header."""

    name: str
    offset: int
    size: int
    crc: int


class _Archive(io.BufferedReader):
    """A file whose list of members, which zipfile reads at once, has at most ``_DIRECTORY_BYTES``."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _DIRECTORY_BYTES:
            raise zipfile.BadZipFile(
                f"a list of zip entries of {size:,} bytes, more than {_DIRECTORY_BYTES:,}"
            )
        return super().read(size)


def read_torch_file(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file by name, without reading a weight.

    The offset of a record is read from its local header, because tools that repack an archive use other offsets than
    torch. Raises ``CheckpointError`` for a file of the format before torch 1.6, for compressed records, for
    anything but tensors, and for tensors that are not contiguous.
    """
    try:
        raw, size = open_raw(file)
        with _Archive(raw) as stream:
            if not zipfile.is_zipfile(stream):
                raise CheckpointError(
                    "a .bin file is not a zip archive",
                    where=file,
                    expected="the format torch writes since 1.6",
                    fix="fetch the file again, or save the model as safetensors",
                )
            records = _records(file, stream, size)
            pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(pickles) != 1:
                raise zipfile.BadZipFile(f"{len(pickles)} zip entries called data.pkl")
            folder = pickles[0].removesuffix("data.pkl")
            if folder + "byteorder" in records:
                _check_byte_order(file, _read_record(stream, records[folder + "byteorder"]))
            state = read_state_dict(_read_record(stream, records[pickles[0]]))
    # What zipfile, pickletools and the interpreter of their opcodes raise for damaged bytes.
    except (
        OSError, ValueError, LookupError, EOFError, OverflowError, RuntimeError, struct.error, zipfile.BadZipFile
    ) as error:  # fmt: skip
        if isinstance(error, PickleError):
            raise CheckpointError(
                "a .bin file does not hold a dictionary of tensors",
                where=file,
                found=str(error),
                expected="a dictionary of tensors saved by torch 1.6 or later",
                fix=_RESAVE,
            ) from error
        raise CheckpointError(
            "a .bin file is damaged",
            where=file,
            found=str(error) or type(error).__name__,
            expected="a zip archive as torch.save writes it",
            fix="fetch the file again, or save the model as safetensors",
        ) from error
    if type(state) is not dict:
        raise CheckpointError(
            "a .bin file does not hold a dictionary of tensors",
            where=file,
            found=type(state).__name__,
            fix="save only the model's state_dict, as safetensors",
        )
    return {name: _locate_tensor(file, name, value, folder, records) for name, value in state.items()}


def _locate_tensor(
    file: Path, name: str, value: object, folder: str, records: dict[str, _Record]
) -> StoredTensor:
    where = f"{file}, tensor {name}"
    if type(value) is not PickledTensor:
        raise CheckpointError(
            "a .bin file holds something that is not a tensor",
            where=f"{file}, entry {name}",
            found=type(value).__name__,
            fix="save only the model's state_dict, as safetensors",
        )
    storage = value.storage
    if storage.kind not in STORAGES:
        raise CheckpointError(
            "a tensor has a dtype that is not supported for weights",
            where=where,
            found=repr_short(storage.kind),
            expected=", ".join(STORAGES),
        )
    if not (value.contiguous and value.plain):
        raise CheckpointError(
            "a tensor of a .bin file is not contiguous",
            where=where,
            found=f"shape {value.shape}, stride {value.stride}",
            fix="save the model as safetensors",
        )
    record = records.get(f"{folder}data/{storage.key}")
    if record is None:
        raise CheckpointError(
            "the data of a tensor is missing from a .bin file",
            where=where,
            expected=f"a zip entry {repr_short(f'{folder}data/{storage.key}')}",
            fix="fetch the file again, or save the model as safetensors",
        )
    codec = codec_named(STORAGES[storage.kind], BlockCodec)
    begin = value.offset * codec.block_bytes
    tensor = StoredTensor(name, value.shape, codec, file, record.offset + begin)
    needed = max(storage.elements * codec.block_bytes, begin + tensor.n_bytes)
    if needed != record.size:
        raise CheckpointError(
            "a zip entry of a .bin file and its tensor differ in size",
            where=f"{where}, zip entry {record.name}",
            found=f"{record.size} bytes",
            expected=f"{needed} bytes" if needed < 2**63 else "more bytes than any file holds",
            fix="fetch the file again, or save the model as safetensors",
        )
    return tensor


def _records(file: Path, stream: BinaryIO, size: int) -> dict[str, _Record]:
    """Every member by name, located by its own local header. Raises ``BadZipFile`` for a damaged archive."""
    records: dict[str, _Record] = {}
    with zipfile.ZipFile(stream) as archive:
        members = archive.infolist()
    for member in members:
        name = member.filename
        stream.seek(member.header_offset)
        header = stream.read(_LOCAL_HEADER)
        if len(header) < _LOCAL_HEADER or not header.startswith(b"PK\3\4"):
            raise zipfile.BadZipFile(f"the header of {name} is missing")
        lengths = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        offset = member.header_offset + _LOCAL_HEADER + sum(lengths)
        if offset + member.compress_size > size:
            raise zipfile.BadZipFile(f"{name} ends after the end of the file")
        if name in records:
            raise zipfile.BadZipFile(f"{name} is listed twice")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & _ENCRYPTED:
            raise CheckpointError(
                "a .bin file is compressed or encrypted",
                where=f"{file}, zip entry {repr_short(name)}",
                expected="zip entries that are stored as they are, as torch.save writes them",
                fix=_RESAVE,
            )
        if member.compress_size != member.file_size:
            raise zipfile.BadZipFile(f"{name} is not compressed, but has two sizes")
        records[name] = _Record(name, offset, member.file_size, member.CRC)
    return records


def _read_record(stream: io.BufferedReader, record: _Record) -> bytes:
    """The bytes of a small record."""
    if record.size > _PICKLE_BYTES:
        raise PickleError(f"{record.name} of {record.size:,} bytes, more than {_PICKLE_BYTES:,}")
    content = bytearray(record.size)
    stream.seek(record.offset)
    stream.readinto(content)
    if zlib.crc32(content) != record.crc:
        raise zipfile.BadZipFile(f"the checksum of {record.name} is wrong")
    return bytes(content)


def _check_byte_order(file: Path, content: bytes) -> None:
    if content.strip() != b"little":
        raise CheckpointError("a .bin file was written on a big-endian machine", where=file, fix=_RESAVE)
