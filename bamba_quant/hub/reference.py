"""What a user may call a model of the Hub, parsed: repository, revision, path in it, and llama.cpp's tag of a type."""

from __future__ import annotations

import re
from dataclasses import dataclass

VIEW = "bamba-quant-view-"  # of the names of directories that stand for snapshots

# ``Path`` makes hf:/ of hf://.
_SCHEME = re.compile(r"hf://?")
_NAME = r"[A-Za-z0-9][\w.-]*"
_REFERENCE = re.compile(
    rf"(?P<repository>{_NAME}/{_NAME})"
    r"(?:@(?P<revision>refs/(?:pr/\d+|convert/[\w.-]+)|[^/:@]+))?"
    r"(?:/(?P<path>[^:@]+?))?/?"
    r"(?::(?P<tag>[\w.-]+))?"
)
# Endings of files, of which no repository's name has one: such a string is a path that does not exist.
_FILE = re.compile(r"\.(gguf|json|safetensors|bin|pth?|txt|toml|dat|xz|md|html|ya?ml)$", re.IGNORECASE)


@dataclass(frozen=True)
class Reference:
    """A model of the Hub. ``path`` is a file or a folder of the repository, empty for its top."""

    repository: str
    revision: str | None = None
    path: str = ""
    tag: str = ""

    @property
    def key(self) -> str:
        """The repository's directory in huggingface_hub's cache."""
        return "models--" + self.repository.replace("/", "--")

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repository}{revision}{self.path and f'/{self.path}'}{self.tag and f':{self.tag}'}"


def parse_reference(text: str) -> Reference | None:
    """The model that ``text`` names, None where it cannot be a name: a path such as ./x or x.gguf.

    Forms are those of huggingface_hub's hf:// addresses (``utils/_hf_uris.py``), with or without hf://, and
    llama.cpp's org/name:TAG. A slash in a branch's name is written %2F, as there.
    """
    bare = _SCHEME.sub("", text, count=1) if (explicit := _SCHEME.match(text)) else text
    match = _REFERENCE.fullmatch(bare.removeprefix("models/") if explicit else bare)
    if match is None or (not explicit and _FILE.search(match["repository"])):
        return None
    found = {key: value for key, value in match.groupdict().items() if value}
    if any(part in (".", "..") for part in found.get("path", "").split("/")):
        return None
    if "revision" in found:
        found["revision"] = found["revision"].replace("%2F", "/")
    return Reference(**found)
