"""The reader of pytorch_model.bin."""

from __future__ import annotations

import io
import zipfile
from functools import cache, partial

import torch

from bamba_quant.checkpoint.torch_file import read_torch_file
from tests.fuzz import calls
from tests.fuzz.mutations.archive import packed, torch_archive
from tests.fuzz.mutations.blind import files
from tests.fuzz.registry import Case, reader
from tests.fuzz.runner import tried
from tests.fuzz.seeds import models
from tests.fuzz.tree import Tree


@cache
def _saved(family: str) -> bytes:
    buffer = io.BytesIO()
    torch.save({name: torch.from_numpy(array) for name, array in models.weights(family).items()}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        # Without the identity that every file is given anew.
        members = [
            (name, archive.read(name)) for name in archive.namelist() if "serialization_id" not in name
        ]
    return packed(members)


def _directories() -> list[Tree]:
    return [
        {
            **{
                name: content
                for name, content in models.directory(family).items()
                if name != "model.safetensors"
            },
            "pytorch_model.bin": _saved(family),
        }
        for family in ("mamba", "mamba2 of state-spaces")
    ]


@reader("torch_file", seeds=_directories, mutate=files({"pytorch_model.bin": torch_archive}), weight=5)
def read(case: Case) -> None:
    path = case.path
    tried(
        partial(read_torch_file, path / "pytorch_model.bin"),
        *([partial(calls.read_weights, path)] if case.random.random() < 0.2 or case.valid else []),
    )
