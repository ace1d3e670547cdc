"""The name of a model, from the path where it is stored."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

# huggingface_hub stores a model at models--ORGANIZATION--NAME/snapshots/COMMIT; some have no organization.
_CACHED = re.compile(
    r"/models--(?:(?P<organization>[^/]+?)--)?(?P<model>[^/]+)/snapshots/(?P<commit>[^/]+)(?:/(?P<folder>.+))?$"
)


@dataclass(frozen=True)
class ModelName:
    """``organization`` and ``commit`` are empty for a model outside of the Hub's cache.

    ``folder`` is the model's folder in its repository, empty for the top.
    """

    model: str
    organization: str = ""
    commit: str = ""
    folder: str = ""

    @property
    def name(self) -> str:
        """The name without the organization, with the folder."""
        return "-".join([self.model, *self.folder.split("/")]) if self.folder else self.model

    @property
    def full_name(self) -> str:
        """The name with the organization, if there is one."""
        return f"{self.organization}/{self.name}" if self.organization else self.name

    @property
    def repository(self) -> str:
        """The repository's name on the Hub, with the organization, if there is one."""
        return f"{self.organization}/{self.model}" if self.organization else self.model


def output_directory(path: Path) -> Path:
    """Where outputs of the model at ``path``, a file or a directory, go by default: beside it, never in a cache."""
    directory = path if path.is_dir() else path.parent
    return Path() if name_of(directory).commit else directory


def name_of(path: str | Path) -> ModelName:
    """The name of the model at ``path``, a directory or a .gguf file: the Hub's for a path in its cache.

    A symbolic link has its own name, unless it leads to a model in the Hub's cache.
    """
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links
    for found in (absolute, absolute.resolve()):
        match = _CACHED.search(found.as_posix())
        if match and (not match["folder"] or found.is_dir()):  # a file has a name of its own
            return ModelName(**match.groupdict(""))
    return ModelName(absolute.name.removesuffix(".gguf"))
