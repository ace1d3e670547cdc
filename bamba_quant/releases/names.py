"""Names of a release's files and repositories, by which the Hub, llama.cpp, Ollama and LM Studio find each file.

llama.cpp's ``-hf repository:TYPE`` takes the first file whose path has ``TYPE`` before a dot or a hyphen
(common/download.cpp, ``find_best_model``), and the Hub takes the last type in a name (huggingface.js,
packages/tasks/src/gguf.ts). So the type ends a name, and nothing before it may look like a type of the release.

Directories of safetensors get repositories of their own: transformers, vLLM and a model page load the top of a
repository, and a folder in it only where ``subfolder`` is given each time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from bamba_quant.errors import join_names
from bamba_quant.recipes import plain_recipe, recipe_named
from bamba_quant.releases.preset import ReleaseError

GGUF = "GGUF"
_SCHEMES = {"fp8-dynamic": "FP8", "w4a16-g128": "W4A16"}  # as such repositories are called
# llama.cpp does not take a file with one of these in its name as a model (common/download.cpp, gguf_filename_is_model).
_NO_MODELS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_MOST_CHARACTERS = 80  # with what is added, a repository's name may have 96


def gguf_name(name: str, recipe: str) -> str:
    """NAME-Q4_K_M.gguf; what a recipe adds to a type of llama.cpp stands before the type: NAME-h-Q4_K_M.gguf."""
    plain = plain_recipe(recipe_named(recipe).file_type)
    kind = plain.name if plain else recipe
    more = "" if kind == recipe else f"-{recipe.removeprefix(kind).strip('_') or recipe}"
    return f"{name}{more}-{kind.upper()}.gguf"


def type_of(file: str) -> str:
    """The type at the end of a name that ``gguf_name`` made."""
    return file.removesuffix(".gguf").rpartition("-")[2]


def scheme_suffix(scheme: str) -> str:
    """What a scheme adds to the name of its repository."""
    return _SCHEMES.get(scheme, scheme.upper())


def imatrix_name(name: str) -> str:
    return f"{name}-imatrix.gguf"


def check_names(name: str, files: Sequence[str], schemes: Sequence[str]) -> None:
    """Raise ``ReleaseError`` if ``name`` cannot name a repository, or a type would resolve to no file or another."""
    if not _NAME.fullmatch(name) or len(name) > _MOST_CHARACTERS or "--" in name or ".." in name:
        raise ReleaseError(
            "the name of the release cannot be a repository's",
            found=repr(name),
            expected=f"letters, digits, '-', '_' and '.', {_MOST_CHARACTERS} at most, no two '-' or '.' together",
            fix="give another one with --name",
        )
    if hidden := [word for word in _NO_MODELS if files and word in f"{name}-"]:
        raise ReleaseError(
            "llama.cpp takes no file with this name for a model",
            found=f"{hidden[0]!r} in {name!r}",
            fix="give another one with --name",
        )
    for file in files:
        kind = type_of(file)
        found = [each for each in files if re.search(rf"{re.escape(kind)}[.-]", each, re.IGNORECASE)]
        if found != [file]:
            raise ReleaseError(
                f"several files of the release answer to :{kind}",
                found=join_names(found),
                fix="leave out all but one of them, or give another --name if the type is part of it",
            )
    if len({scheme_suffix(scheme).lower() for scheme in schemes}) < len(schemes):
        raise ReleaseError(
            "two schemes of the release have the same repository", found=join_names(list(schemes))
        )


def repositories(name: str, schemes: Sequence[str], types: Sequence[str]) -> Mapping[str, str]:
    """The names of the release's repositories, and of their folders, by scheme; GGUF files are in that of "GGUF"."""
    gguf = {GGUF: f"{name}-{GGUF}"} if types else {}
    return gguf | {scheme: f"{name}-{scheme_suffix(scheme)}" for scheme in schemes}
