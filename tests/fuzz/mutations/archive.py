"""Changes to zip archives of torch: members, their headers and compression, and the opcodes of the pickle inside."""

from __future__ import annotations

import io
import pickletools
import struct
import warnings
import zipfile
from random import Random

from tests.fuzz.mutations.blind import INTERESTING, blind

Member = tuple[str, bytes]


def torch_archive(random: Random, raw: bytes) -> bytes:
    """Another pickle, another list of members, another compression, or other fields of their headers."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            members = [(name, archive.read(name)) for name in archive.namelist()]
    except Exception:  # noqa: BLE001 - decompressors raise what they like for an archive that was changed before
        return blind(random, raw)
    choice = random.random()
    if choice < 0.25 or not members:
        return _fields(random, raw)
    compression = zipfile.ZIP_STORED
    if choice < 0.65:
        members = [
            (name, pickled(random, content) if name.endswith("data.pkl") else content)
            for name, content in members
        ]
    elif choice < 0.9:
        members = _members(random, members)
    else:
        compression = random.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    made = packed(members, compression)
    return _fields(random, made) if random.random() < 0.2 else made


def packed(members: list[Member], compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive of the members."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", compression) as archive:
        warnings.simplefilter("ignore")  # of names that stand twice, which are wanted
        for name, content in members:
            many = len(content) > 1 << 20
            # With a time of its own, so that the same members are the same bytes.
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED if many else compression)
    return buffer.getvalue()


def _members(random: Random, members: list[Member]) -> list[Member]:
    changed = list(members)
    at = random.randrange(len(changed))
    name, content = changed[at]
    choice = random.randrange(9)
    if choice == 0:
        del changed[at]
    elif choice == 1:
        changed.append(changed[at])
    elif choice == 2:
        changed[at] = (
            random.choice(
                (
                    name + "x",
                    "../" + name,
                    "/" + name,
                    name.replace("archive", "other"),
                    "",
                    "a\0b",
                    "data.pkl",
                    name.upper(),
                    "é" * 100,
                )
            ),
            content,
        )
    elif choice == 3:
        changed[at] = (name, content[:-1])
    elif choice == 4:
        changed[at] = (name, blind(random, content))
    elif choice == 5:
        changed.append(
            (random.choice(("archive/data/99", "archive/byteorder", "archive/version", "x")), b"big")
        )
    elif choice == 6:
        # A few kilobytes that become a hundred megabytes.
        changed[at] = (name, bytes(random.choice((20, 100) if random.random() < 0.2 else (2,)) << 20))
    elif choice == 7:
        changed = [(n, b"big" if n.endswith("byteorder") else c) for n, c in changed]
    else:
        changed += [(f"archive/data/x{number}", b"") for number in range(random.choice((10, 2000)))]
    return changed


_CENTRAL = (  # offset and code of fields of an entry of the central directory, behind PK\1\2
    (8, "<H"), (10, "<H"), (16, "<I"), (20, "<I"), (24, "<I"), (28, "<H"), (30, "<H"), (32, "<H"), (42, "<I"),
)  # fmt: skip
_LOCAL = ((6, "<H"), (8, "<H"), (14, "<I"), (18, "<I"), (22, "<I"), (26, "<H"), (28, "<H"))
_END = ((8, "<H"), (10, "<H"), (12, "<I"), (16, "<I"), (20, "<H"))


def _fields(random: Random, raw: bytes) -> bytes:
    """Another number in a header: flags, method, sizes, lengths, offsets."""
    changed = bytearray(raw)
    for _ in range(random.choice((1, 1, 2))):
        mark, fields = random.choice(
            ((b"PK\1\2", _CENTRAL), (b"PK\1\2", _CENTRAL), (b"PK\3\4", _LOCAL), (b"PK\5\6", _END))
        )
        places = [at for at in range(len(raw)) if raw.startswith(mark, at)] if len(raw) < 300_000 else []
        if not places:
            continue
        at, (offset, code) = random.choice(places), random.choice(fields)
        if at + offset + 4 > len(changed):
            continue
        (old,) = struct.unpack_from(code, changed, at + offset)
        number = random.choice((*INTERESTING, old + 1, old - 1, old ^ 1, 12, 14, 93, 99))
        struct.pack_into(code, changed, at + offset, number % 2 ** (8 * struct.calcsize(code)))
    return bytes(changed)


_GLOBALS = (
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\nbytearray\n", b"ctorch\nload\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n",
    b"ctorch\nLongStorage\n",
    b"ctorch\nQInt8Storage\n", b"ctorch._utils\n_rebuild_sparse_tensor\n",
    b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n", b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch\nSize\n", b"ctorch\ndevice\n", b"ctorch.nn.parameter\nParameter\n",
    b"c\n\n", b"cx\ny\n", b"\x93", b"cnumpy\nndarray\n", b"cnumpy.core.multiarray\nscalar\n",
    b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ctorch\nfloat64\n", b"cbuiltins\nset\n",
    b"c_codecs\nencode\n",
)  # fmt: skip
_LITERALS = (
    b"N", b"K\0", b"K\xff", b"J\xff\xff\xff\xff", b"M\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
    b"\x8a\x09" + b"\xff" * 8 + b"\x7f", b"\x8b" + struct.pack("<i", 2000) + b"\xff" * 1999 + b"\x7f",
    b"\x8b" + struct.pack("<i", -1),
    b"X" + struct.pack("<I", 3) + b"abc", b"X" + struct.pack("<I", 2**32 - 1), b"\x8d" + struct.pack("<Q",
    2**62), b"X\x02\0\0\0\xff\xfe", b"X\x03\0\0\0\xed\xa0\x80", b"]", b"}", b")", b"(", b"\x85", b"\x86",
    b"\x87", b"0", b"2", b"\x88", b"\x89",
    b"\x96" + struct.pack("<Q", 3 * 10**9), b"\x96" + struct.pack("<Q", 4) + b"abcd", b"B" + struct.pack("<I",
    2**31), b"\x8e" + struct.pack("<Q", 2**40), b"G" + struct.pack(">d", float("nan")), b"R", b"b", b"Q",
    b"a", b"e", b"u", b"s", b"q\xff", b"r\xff\xff\xff\xff", b"h\xff",
    b"j\xff\xff\xff\xff", b"\x80\x09", b"\x95" + struct.pack("<Q", 2**63), b".", b"P1\n", b"i__main__\nx\n",
    b"o", b"\x81", b"\x92", b"I99999999999999999999\n", b"Ix\n", b"L" + b"9" * 5000 + b"L\n", b"F1e400\n",
    b"S'x'\n", b"Vx\n", b"]" * 5000, b"(" * 5000, b"]\x94" * 100,
)  # fmt: skip


def pickled(random: Random, raw: bytes) -> bytes:
    """One to three opcodes replaced, removed, repeated or added."""
    for _ in range(random.choice((1, 1, 2, 3))):
        try:
            places = [at for _, _, at in pickletools.genops(raw) if at is not None]
        except Exception:  # noqa: BLE001 - the pickle may be damaged by earlier mutations
            return blind(random, raw)
        places.append(len(raw))
        at = random.randrange(len(places) - 1)
        start, stop = places[at], places[at + 1]
        choice = random.random()
        if choice < 0.15:
            raw = raw[:start] + raw[stop:]
        elif choice < 0.25:
            raw = raw[:start] + raw[start:stop] * 2 + raw[stop:]
        elif choice < 0.65:
            raw = raw[:start] + random.choice(_LITERALS) + raw[stop:]
        elif choice < 0.75:
            raw = raw[:start] + random.choice(_LITERALS) + raw[start:]
        elif choice < 0.85:
            raw = (
                raw[:start]
                + random.choice(_GLOBALS)
                + random.choice(
                    (b")R", b"(K\x03tR", b"J\0\0\0\x7f\x85R", b"\x8a\x05\0\x5e\xd0\xb2\0\x85R", b"")
                )
                + raw[stop:]
            )
        else:
            raw = raw[:start] + _changed_argument(random, raw[start:stop]) + raw[stop:]
    return raw


def _changed_argument(random: Random, opcode: bytes) -> bytes:
    if len(opcode) < 2:
        return opcode
    changed = bytearray(opcode)
    changed[random.randrange(1, len(changed))] = random.choice(
        (0, 1, 2, 127, 128, 255, random.randrange(256))
    )
    return bytes(changed)
