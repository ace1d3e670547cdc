"""Opens a model: its checkpoint, its architecture and configuration, and each tensor paired with its rule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from bamba_quant.checkpoint import Checkpoint, ReadOptions, StoredTensor, open_checkpoint
from bamba_quant.checkpoint.huggingface import ADAPTER_FILES, adapter_notes
from bamba_quant.checkpoint.quantized import is_quantized
from bamba_quant.codecs import BlockCodec, codec_named
from bamba_quant.errors import PlanError, join_names
from bamba_quant.families import Family, TensorRule, family_of, family_of_gguf, read_config
from bamba_quant.planning.matching import Pairs, match_gguf, match_huggingface
from bamba_quant.printable import brief_repr
from bamba_reference.config import Config

Weights = Literal["required", "optional", "none"]

CONFIG = "config.json"
_MOST_BYTES, _MOST_SIDE = 2**50, 2**31
_DTYPE_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class SkippedTensor:
    """A tensor of the input that the output does not need; ``equal_to`` must then hold the same bytes, if given."""

    source: StoredTensor
    reason: str
    equal_to: StoredTensor | None = None


@dataclass(frozen=True)
class Model:
    """An opened model. ``pairs`` are in the rules' order and include the tensors that outputs skip.

    A ``config_only`` model has the tensors that its configuration implies. They cannot be read.
    """

    checkpoint: Checkpoint
    architecture: Family
    config: Config
    pairs: Pairs
    config_only: bool = False

    __repr__ = brief_repr

    @property
    def notes(self) -> tuple[str, ...]:
        """What to tell the user about tensors that are not read."""
        unused = (unused_note(self.checkpoint),) if self.checkpoint.unused else ()
        return (*unused, self._config_only_note) if self.config_only else unused

    @property
    def _config_only_note(self) -> str:
        dtype = config_dtype(self.checkpoint)
        given = {"dtype", "torch_dtype"} & self.checkpoint.metadata.keys()
        return f"no weights were read: the input is taken to be {dtype}, " + (
            "as config.json says" if given else "since config.json gives no dtype"
        )

    def skipped(self) -> tuple[SkippedTensor, ...]:
        """The tensors that outputs do not need."""
        by_name = {rule.name: tensor for tensor, rule in self.pairs}
        return tuple(
            SkippedTensor(tensor, rule.skipped, by_name[rule.equal_to] if rule.equal_to else None)
            for tensor, rule in self.pairs
            if rule.skipped
        )


def open_model(
    path: str | Path,
    *,
    weights: Weights = "required",
    allow_quantized: bool = True,
    reading: ReadOptions = ReadOptions(),
) -> Model:
    """The model at ``path``: a Hugging Face directory, the config.json in one, or a GGUF file. Reads headers only.

    ``weights`` says what happens to a directory without weights: "required" is an error, "optional" gives a
    ``config_only`` model. "none" looks for no weights, and the model has no tensors. Raises a ``BambaQuantError``
    for an architecture that is not supported, for tensors that do not fit their configuration, and, unless
    ``allow_quantized``, for a directory that is quantized already.
    """
    path = directory_of(path)
    config_only = weights == "optional" and path.is_dir() and not has_weights(path)
    checkpoint = open_checkpoint(
        path,
        weights=weights != "none" and not config_only,
        allow_quantized=allow_quantized,
        reading=reading,
    )
    if checkpoint.kind == "gguf":
        architecture = family_of_gguf(checkpoint.key_values)
        config = architecture.config_of_gguf(checkpoint.key_values, checkpoint.tensors)
        return Model(checkpoint, architecture, config, match_gguf(checkpoint, architecture.tensors(config)))
    architecture = family_of(checkpoint.metadata)
    config = read_config(checkpoint.metadata, ignore=reading.ignore_config_keys)
    rules = architecture.tensors(config) if weights != "none" else ()
    if config_only:
        checkpoint = _with_implied_tensors(checkpoint, rules, reading)
    checkpoint = _without(checkpoint, architecture.left_out)
    return Model(checkpoint, architecture, config, match_huggingface(checkpoint, rules), config_only)


def _without(checkpoint: Checkpoint, beginnings: tuple[str, ...]) -> Checkpoint:
    """``checkpoint`` without the tensors whose names begin so, which a note counts."""
    names = [name for name in checkpoint.tensors if name.startswith(beginnings)]
    if not names:
        return checkpoint
    kept = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.startswith(beginnings)}
    note = f"{len(names)} tensors that predict further tokens are left out: {join_names(names, 2)}"
    return replace(checkpoint, tensors=kept, notes=(*checkpoint.notes, note))


def unused_note(checkpoint: Checkpoint) -> str:
    """What to tell the user about tensors that only quantized activations need."""
    names = join_names(checkpoint.unused, 2)
    return f"{len(checkpoint.unused)} tensors are for quantized activations alone: {names}"


def directory_of(path: str | Path) -> Path:
    """``path``, or its directory where ``path`` is a config.json. Raises ``PlanError`` for another JSON file."""
    path = Path(path)
    if path.suffix != ".json" or not path.is_file():
        return path
    if path.name != CONFIG:
        raise PlanError(
            "a configuration without weights must be a file called config.json",
            where=path,
            expected="a directory with config.json, or that file",
            fix="copy it under that name into a directory of its own",
        )
    return path.parent


def has_weights(directory: Path) -> bool:
    """Whether a directory holds files that look like weights."""
    return any(
        file.name not in ADAPTER_FILES
        for pattern in ("*.safetensors", "*.bin")
        for file in directory.glob(pattern)
    )


def config_dtype(checkpoint: Checkpoint) -> str:
    """The dtype in which config.json says to load the model; float32 by default, as in transformers."""
    named = checkpoint.metadata.get("dtype", checkpoint.metadata.get("torch_dtype"))
    return _DTYPE_NAMES.get(str(named), "f32")


def _with_implied_tensors(
    checkpoint: Checkpoint, rules: Iterable[TensorRule], reading: ReadOptions
) -> Checkpoint:
    """``checkpoint`` with the tensors that ``rules`` imply, whose file is the directory.

    Raises ``PlanError`` for a quantized model, whose tensors do not follow from its architecture, and for sizes that
    no file could hold.
    """
    directory, config = checkpoint.path, checkpoint.path / CONFIG
    if is_quantized(checkpoint.metadata):
        raise PlanError(
            "the tensors of a quantized model do not follow from its configuration",
            where=config,
            found="quantization_config",
            fix="fetch the weights",
        )
    stored = codec_named(config_dtype(checkpoint), BlockCodec)
    tensors = {
        name: StoredTensor(name, shape, stored, directory, 0)
        for rule in rules
        if not rule.skipped
        for name, shape in rule.stored(rule.hf).items()
    }
    total = longest = 0
    for tensor in tensors.values():
        total += tensor.n_bytes
        longest = max(longest, *tensor.shape)
    if total >= _MOST_BYTES or longest >= _MOST_SIDE:
        raise PlanError(
            "the model that the configuration describes is larger than any file",
            where=config,
            found=f"{total:,} bytes of weights, sides of up to {longest:,}",
            expected=f"less than {_MOST_BYTES:,} bytes, and sides below {_MOST_SIDE:,}",
            fix="correct the sizes in config.json",
        )
    notes = adapter_notes(directory, ignore=reading.ignore_adapter)
    return replace(checkpoint, tensors=tensors, notes=notes)
