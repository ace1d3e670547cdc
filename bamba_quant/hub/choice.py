"""Which files of a repository a model needs: one copy of its weights, its configuration, its tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from bamba_quant.checkpoint import modelopt
from bamba_quant.checkpoint.gguf_file import split_stem
from bamba_quant.checkpoint.huggingface import ADAPTER_CONFIG, LAYOUTS
from bamba_quant.errors import CheckpointError, did_you_mean, join_names
from bamba_quant.files.names import CARD, CHAT_TEMPLATES, CONFIG, COPIED
from bamba_quant.hub.reference import Reference

SMALL = (
    CONFIG,
    CARD,
    ADAPTER_CONFIG,
    modelopt.FILE,
    *COPIED,
)  # patterns of what decides a copy beside weights
# Parts of names of GGUF files that llama.cpp's -hf does not take for models.
_NO_MODEL = ("mmproj", "imatrix", "mtp-", "eagle3-")


@dataclass(frozen=True)
class Choice:
    """``path`` is the model's file or folder in the repository; ``small`` files come first, then ``weights``."""

    path: str
    small: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()


def choose(reference: Reference, names: Collection[str], read: Callable[[str], bytes]) -> Choice:
    """What the model needs of the files ``names``; ``read`` gives the content of one, an index of shards.

    A repository without weights of Hugging Face's layouts and with GGUF files is one of GGUF files. Raises
    ``CheckpointError`` for a path that is not there and, without a tag, for several models in GGUF.
    """
    path, inside = reference.path, f"{reference.path}/" if reference.path else ""
    if path in names:
        if path.endswith(".gguf"):
            return Choice(path, weights=_with_splits(path, names))
        if path.rpartition("/")[2] == CONFIG:
            folder = path.removesuffix(CONFIG)
            return Choice(path, _small(folder, names))
    local = {name.removeprefix(inside) for name in names if name.startswith(inside)}
    if path in names or not local:
        raise CheckpointError(
            "the repository has no such model" + did_you_mean(path, names),
            where=str(reference),
            found=path,
            expected="a folder of it, config.json or a .gguf file",
            fix="give one of: " + join_names([name for name in sorted(names) if _may_be_given(name)]),
        )
    weights = _weights(inside, local, read)
    models = [name for name in sorted(local) if _is_model(name)]
    if models and (reference.tag or not weights):
        chosen = inside + _tagged(reference, models)
        return Choice(chosen, weights=_with_splits(chosen, names))
    if reference.tag:
        raise CheckpointError(
            "the repository holds no GGUF files, of which a tag could choose one",
            where=str(reference),
            found=f":{reference.tag}",
            fix="leave the tag out",
        )
    return Choice(path, _small(inside, names), weights)


def _small(inside: str, names: Iterable[str]) -> tuple[str, ...]:
    """The model's small files in a folder of the repository."""
    found = []
    for name in names:
        if not name.startswith(inside):
            continue
        folder, _, file = name.removeprefix(inside).rpartition("/")
        if folder in ("", CHAT_TEMPLATES) and any(fnmatch(file, pattern) for pattern in SMALL):
            found.append(name)
    return tuple(sorted(found))


def _weights(inside: str, local: Collection[str], read: Callable[[str], bytes]) -> tuple[str, ...]:
    """The files of the first layout that is there, with its index: never pickles beside safetensors."""
    for index, single, pattern, _ in LAYOUTS:
        if index in local:
            try:
                shards = set(json.loads(read(inside + index))["weight_map"].values())
            except (ValueError, LookupError, TypeError, AttributeError):
                shards = set()  # the checkpoint's reader names the fault
            return (inside + index, *(inside + name for name in sorted(shards & set(local))))
        if single in local:
            return (inside + single,)
        if files := sorted(name for name in local if fnmatch(name, pattern) and "/" not in name):
            return tuple(inside + name for name in files)
    return ()


def _may_be_given(name: str) -> bool:
    return name.endswith(".gguf") or name.rpartition("/")[2] == CONFIG


def _is_model(name: str) -> bool:
    return name.lower().endswith(".gguf") and not any(part in name.lower() for part in _NO_MODEL)


def _tagged(reference: Reference, models: list[str]) -> str:
    """The model of the tag by llama.cpp's rule (``common/download.cpp``): the first whose path has TAG. or TAG-.

    llama.cpp takes Q4_K_M without a tag; here that is an error unless there is no choice.
    """
    firsts = [name for name in models if _with_splits(name, models)[0] == name]
    if not reference.tag and len(firsts) == 1:
        return firsts[0]
    wanted = re.compile(re.escape(reference.tag) + "[.-]", re.IGNORECASE)
    for name in firsts if reference.tag else ():
        if wanted.search(name):
            return name
    raise CheckpointError(
        "no GGUF file of the repository has that tag"
        if reference.tag
        else "the repository has several models",
        where=str(reference),
        found=join_names(firsts, 8),
        fix=f"name one, such as {reference.repository}/{firsts[0]}" if firsts else "give a file",
    )


def _with_splits(file: str, names: Collection[str]) -> tuple[str, ...]:
    """``file`` or, if it is a shard, those of its set that are there."""
    stem = split_stem(Path(file))
    if stem.name + ".gguf" == Path(file).name:
        return (file,)
    count = file.rpartition("-of-")[2]
    return tuple(sorted(name for name in names if name.endswith(count) and split_stem(Path(name)) == stem))
