"""Symbolic links in a model directory: whose targets may be copied into an output."""

from __future__ import annotations

from pathlib import Path

from bamba_quant.errors import CheckpointError


def check_link(file: Path, directory: Path) -> None:
    """Raise ``CheckpointError`` unless what ``file`` leads to is part of the model in ``directory``.

    Links may lead into the directory itself and, in the Hub's cache, to the blobs of the same model
    (models--NAME/snapshots/COMMIT/FILE to models--NAME/blobs/HASH). Any other link could bring any file of this
    machine into an output that is published.
    """
    try:
        target, inside = file.resolve(), directory.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise CheckpointError(f"{file.name} is a symbolic link that leads nowhere", where=file) from error
    if target.is_relative_to(inside) or target.parent in _blobs(inside):
        return
    raise CheckpointError(
        f"{file.name} is a symbolic link that leaves the model's directory, and its content would be copied",
        where=file,
        found=f"a link to {target}",
        expected="a file, a link inside the directory, or one to the blobs of the same model in the Hub's cache",
        fix="replace the link by a copy of the file, or remove it",
    )


def _blobs(inside: Path) -> list[Path]:
    return [
        snapshots.parent / "blobs"
        for snapshots in inside.parents
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")
    ]
