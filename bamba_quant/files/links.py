"""Symbolic links in a model directory: whose targets may be copied into an output."""

from __future__ import annotations

import re
from pathlib import Path

from bamba_quant.errors import CheckpointError

# Where huggingface_hub keeps content, under its SHA-1 or SHA-256.
_BLOB = re.compile(r"/models--[^/]+/blobs/(?:[0-9a-f]{40}|[0-9a-f]{64})\Z")
_ALLOWED = "a file, a link inside the directory, or one to a blob in the Hub's cache"
_FIX = "replace the link by a copy of the file, or remove it"


def check_link(file: Path, directory: Path) -> None:
    """Raise ``CheckpointError`` unless what ``file`` leads to is part of the model in ``directory``.

    Links may lead into the directory itself and to blobs of the Hub's cache (models--NAME/blobs/HASH): from
    models--NAME/snapshots/COMMIT, and from any directory that older versions of huggingface_hub downloaded a model
    to. Any other link could bring any file of this machine into an output that is published.
    """
    try:
        target, inside = file.resolve(), directory.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise CheckpointError(
            f"{file.name} is a symbolic link that cannot be followed",
            where=file,
            found=str(error),
            expected=_ALLOWED,
            fix=_FIX,
        ) from error
    if target.is_relative_to(inside) or target.parent in _blobs(inside) or _BLOB.search(target.as_posix()):
        return
    raise CheckpointError(
        f"{file.name} is a symbolic link that leaves the model's directory, and its content would be copied",
        where=file,
        found=f"a link to {target}",
        expected=_ALLOWED,
        fix=_FIX,
    )


def _blobs(inside: Path) -> list[Path]:
    return [
        snapshots.parent / "blobs"
        for snapshots in inside.parents
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")
    ]
