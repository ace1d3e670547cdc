"""Lists of the linear layers that a scheme leaves in 16 bits: ``fp8`` and ``int4`` read them by ``--ignore``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bamba_quant.errors import PlanError, repr_short
from bamba_quant.files.toml_file import read_toml

_KEYS = {"scheme", "ignore"}


def ignore_text(scheme: str, modules: Sequence[str], about: str) -> str:
    """The TOML file that lists ``modules`` for ``scheme``, with a first line that says where it comes from."""
    listed = "".join(f'    "{module}",\n' for module in modules)
    return f'# {about}\nscheme = "{scheme}"\nignore = [\n{listed}]\n'


def read_ignore_file(file: Path, scheme: str) -> tuple[str, ...]:
    """The entries of the list in ``file``, as ``select_matrices`` takes them.

    Raises ``PlanError`` for a file that is not such a list, and for one that was made for another scheme.
    """
    read = read_toml(file, "layers to ignore", PlanError)
    entries = read.get("ignore")
    if (
        set(read) != _KEYS
        or not isinstance(entries, list)
        or not all(isinstance(entry, str) for entry in entries)
    ):
        raise PlanError(
            "the file does not list layers to ignore",
            where=file,
            found=repr_short(read),
            expected='scheme = "NAME" and ignore = ["NAME OF A LAYER", …], as allocate --scheme writes them',
        )
    if read["scheme"] != scheme:
        raise PlanError(
            "the list of layers was chosen for another scheme",
            where=file,
            found=repr_short(read["scheme"]),
            expected=scheme,
            fix="choose the options of that scheme, or run allocate again",
        )
    return tuple(entries)
