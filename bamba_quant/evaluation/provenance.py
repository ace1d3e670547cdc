"""What was evaluated and how: models, text, run and its time, as frozen records of plain values for a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bamba_quant.metadata.tune_record import TuneRecord

# Bits per weight: fewer mean a quantized model; and this many times the base's make a candidate the finer of the two.
_BITS_IF_PLAIN, _FINER = 15.0, 1.05


@dataclass(frozen=True)
class FileHash:
    name: str
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class TypeTotal:
    """Tensors, weights and bytes stored in one number format."""

    name: str
    tensors: int
    weights: int
    n_bytes: int


@dataclass(frozen=True)
class ModelFile:
    """A model on disk. ``label`` is unique in the evaluation; ``recipe`` is what the file calls its mixture of
    types (q4_k_m, fp8-dynamic), or its commonest type; ``tuned`` is what it says of how its rounding was tuned;
    ``stored_types`` are those that its cache and its state were evaluated in, such as "cache fp8, state fp16".

    ``n_bytes`` are those of its weights, which with ``weights`` give ``bits_per_weight``; ``file_bytes`` of the
    whole files, vocabulary included. A base given as a logits file has kind "logits" and neither weights nor types.
    """

    label: str
    path: str
    kind: Literal["huggingface", "gguf", "logits"]
    architecture: str
    recipe: str
    types: tuple[TypeTotal, ...]
    weights: int
    n_bytes: int
    file_bytes: int
    bits_per_weight: float | None
    files: tuple[FileHash, ...]
    tuned: TuneRecord | None = None
    stored_types: str = ""

    @property
    def variant(self) -> str:
        """The recipe and what was done besides, such as "q4_k_m tuned" or "q4_k_m (state fp16)"."""
        name = tuned_name(self.recipe) if self.tuned else self.recipe
        return f"{name} ({self.stored_types})" if self.stored_types else name

    @property
    def is_quantized(self) -> bool:
        """Whether its weights take clearly fewer than 16 bits on average."""
        return self.bits_per_weight is not None and self.bits_per_weight < _BITS_IF_PLAIN


def base_warning(base: ModelFile, *others: ModelFile) -> str | None:
    """A warning that base and candidate may be swapped: a quantized ``base`` with fewer bits than one of ``others``."""
    finer = [
        f"{other.label} ({other.bits_per_weight:.1f})"
        for other in others
        if base.is_quantized and (other.bits_per_weight or 0.0) > _FINER * (base.bits_per_weight or 0.0)
    ]
    if not finer:
        return None
    return (
        f"the base {base.label} is quantized, with {base.bits_per_weight:.1f} bits per weight, and has fewer than "
        f"{', '.join(finer)}: what the base lost is shown as the candidate's loss. Give the original model first"
    )


def tuned_name(recipe: str) -> str:
    """What ``ModelFile.variant`` calls tuned files of a recipe."""
    return f"{recipe} tuned"


@dataclass(frozen=True)
class Text:
    """What was scored: ``chunks`` of ``ctx`` tokens out of ``tokens``, of each the last ``ctx - 1 - ctx // 2``."""

    file: str
    sha256: str
    tokens: int
    ctx: int
    chunks: int
    scored: int
    bos: int | None
    tokenizer_sha256: str


@dataclass(frozen=True)
class Run:
    """Enough to run it again: ``command`` as typed or as it would be, ``options`` with their defaults filled in."""

    command: str
    options: Mapping[str, str | int | float | bool | None]
    seed: int
    resamples: int
    versions: Mapping[str, str]
    backend: str
    device: str
    dtype: str
    threads: int
    processor: str
    started: str


@dataclass(frozen=True)
class Timing:
    """Where the time of all threads went: shares of ``seconds``, which exclude hashing.

    ``reading``, ``dequantizing``, ``compiling`` and ``computing`` add up to 1; ``products`` is the part of computing in
    matrix products, which is not known of a GPU.
    ``compiling`` is what making the kernels took, or loading those made before. On a GPU, which files are read ahead
    for and which works on by itself, ``reading`` is what the run waited for bytes, and files are hashed beside:
    ``hashing_seconds`` is what was left of that. ``seconds_per_token`` counts each token once, whatever the number of
    candidates. ``peak_memory`` is the process's greatest resident size, ``device_memory`` the greatest allocated on an
    accelerator. Of several processes these are the first's, and ``computing`` has what it waited for the others.
    """

    seconds: float
    seconds_per_token: float
    reading: float
    dequantizing: float
    compiling: float
    computing: float
    products: float | None
    hashing_seconds: float
    peak_memory: int
    device_memory: int | None
