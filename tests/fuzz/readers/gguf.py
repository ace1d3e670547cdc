"""Readers of GGUF files: header, key-values, tensors, vocabulary, splits, and imatrix in both forms."""

from __future__ import annotations

from functools import partial
from random import Random

from bamba_quant.checkpoint.imatrix import read_imatrix
from tests.fuzz import calls, oracles
from tests.fuzz.mutations.blind import files
from tests.fuzz.mutations.gguf import gguf
from tests.fuzz.mutations.structs import dat_imatrix
from tests.fuzz.registry import Case, reader
from tests.fuzz.runner import tried
from tests.fuzz.seeds import ggufs, models
from tests.fuzz.tree import Tree

_FILE = "model.gguf"


def _files() -> list[Tree]:
    return [
        *(ggufs.converted(family) for family in models.CONFIGS if "state-spaces" not in family),
        ggufs.converted("bamba", "bf16"),
        ggufs.converted("bamba", "q4_k_m", wide=True),
        ggufs.with_sentencepiece("bpe"),
        ggufs.with_sentencepiece("unigram"),
    ]


@reader("gguf", seeds=_files, mutate=files({_FILE: gguf}), weight=17)
def read_gguf(case: Case) -> None:
    path = case.path / _FILE
    tried(
        *calls.some(
            case.random,
            [
                partial(calls.inspected, path),
                partial(calls.converted, path, outtype="q8_0", allow_requantize=True),
                partial(calls.exported, path),
                partial(calls.read_weights, path),
                partial(calls.encoded, path),
                partial(calls.described, path),
                partial(calls.read_stored, path),
            ],
        ),
        *calls.rarely(case.random, 0.04, partial(calls.command, "inspect", path, "--tensors")),
        *calls.rarely(
            case.random, 0.02, partial(calls.command, "export", path, case.path / "out", "--dry-run")
        ),
    )
    if isinstance(case.tree.get(_FILE), bytes) and case.random.random() < 0.1:
        oracles.gguf_accepts(path)


@reader("gguf_to_repair", seeds=lambda: [ggufs.unrepaired()], mutate=files({_FILE: gguf}), weight=5)
def read_gguf_to_repair(case: Case) -> None:
    path = case.path / _FILE
    tried(partial(calls.repaired, path), partial(calls.inspected, path))


def _split() -> list[Tree]:
    return [ggufs.converted("bamba", "bf16", split=30_000), ggufs.converted("mamba", "f32", split=60_000)]


def _mutate_split(random: Random, tree: Tree) -> Tree:
    """A shard changed, missing, of another name, or of another set."""
    choice = random.random()
    if choice < 0.6:
        return files({"*.gguf": gguf}, odd=0.1)(random, tree)
    names = sorted(tree)
    changed = dict(tree)
    one, other = random.choice(names), random.choice(names)
    if choice < 0.65:
        del changed[one]
    elif choice < 0.72:
        changed[one], changed[other] = tree[other], tree[one]
    elif choice < 0.80:
        changed[one] = random.choice(list(random.choice(_split()).values()))
    elif choice < 0.85:
        changed[one] = next(iter(ggufs.converted("bamba", "bf16").values()))
    else:
        stem, count = "model", len(names)
        numbers = (
            (0, 0),
            (1, 0),
            (0, count),
            (count + 1, count),
            (1, 1),
            (1, 99_999),
            (99_999, 99_999),
            (1, count + 1),
            (2, 1),
        )
        number, of = random.choice(numbers)
        changed[f"{stem}-{number:05d}-of-{of:05d}.gguf"] = changed.pop(one)
    return changed


@reader("gguf_split", seeds=_split, mutate=_mutate_split, weight=5)
def read_gguf_split(case: Case) -> None:
    found = sorted(name for name in case.tree if name.endswith(".gguf"))
    path = case.path / (case.random.choice(found) if found else _FILE)
    tried(
        *calls.some(
            case.random,
            [
                partial(calls.inspected, path),
                partial(calls.converted, path, outtype="f16", keep_split=True),
                partial(calls.read_weights, path),
                partial(calls.exported, path),
                partial(calls.described, path),
            ],
        )
    )


def _with_model(name: str, imatrix: bytes) -> list[Tree]:
    return [{**ggufs.converted("bamba"), name: imatrix}]


def _imatrix_used(case: Case) -> None:
    (file,) = [case.path / name for name in case.tree if name.startswith("imatrix")] or [
        case.path / "imatrix"
    ]
    tried(
        partial(read_imatrix, file),
        *(
            [partial(use, file, case.path / _FILE) for use in (calls.imatrix_used, calls.imatrix_merged)]
            if case.random.random() < 0.3 or case.valid
            else []
        ),
    )


reader(
    "imatrix_gguf",
    seeds=lambda: _with_model("imatrix.gguf", ggufs.imatrix()),
    mutate=files({"imatrix.gguf": gguf}),
    weight=5,
)(_imatrix_used)
reader(
    "imatrix_dat",
    seeds=lambda: _with_model("imatrix.dat", ggufs.dat_imatrix()),
    mutate=files({"imatrix.dat": dat_imatrix}),
    weight=3,
)(_imatrix_used)
