"""What a model is called, from the place where it is stored."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

# huggingface_hub stores a model at models--ORGANIZATION--NAME/snapshots/COMMIT; some have no organization.
_CACHED = re.compile(r"/models--(?:(?P<organization>[^/]+?)--)?(?P<name>[^/]+)/snapshots/(?P<commit>[^/]+)$")


@dataclass(frozen=True)
class ModelName:
    """``organization`` and ``commit`` are empty for a model outside of the Hub's cache."""

    name: str
    organization: str = ""
    commit: str = ""

    @property
    def repository(self) -> str:
        """The name as the Hub has it, with the organization if there is one."""
        return f"{self.organization}/{self.name}" if self.organization else self.name


def name_of(path: str | Path) -> ModelName:
    """The name of the model at ``path``, a directory or a .gguf file: the Hub's for a path in its cache.

    A symbolic link has its own name, unless it leads to a model in the Hub's cache.
    """
    place = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links
    for found in (place, place.resolve()):
        if match := _CACHED.search(found.as_posix()):
            return ModelName(match["name"], match["organization"] or "", match["commit"])
    return ModelName(place.name.removesuffix(".gguf"))
