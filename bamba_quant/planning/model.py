"""Opens a model: its checkpoint, its architecture and configuration, and each tensor paired with its rule."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from bamba_quant.checkpoint import Checkpoint, ReadOptions, StoredTensor, open_checkpoint
from bamba_quant.checkpoint.huggingface import ADAPTER_FILES, adapter_notes
from bamba_quant.checkpoint.quantized import is_quantized
from bamba_quant.codecs import BlockCodec, codec_named
from bamba_quant.errors import PlanError, join_names
from bamba_quant.families import Family, TensorRule, family_of, family_of_gguf, read_config
from bamba_quant.printable import brief_repr
from bamba_reference.config import Config

Pairs = tuple[tuple[StoredTensor, TensorRule], ...]
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
        return Model(checkpoint, architecture, config, _match_gguf(checkpoint, architecture.tensors(config)))
    architecture = family_of(checkpoint.metadata)
    config = read_config(checkpoint.metadata, ignore=reading.ignore_config_keys)
    rules = architecture.tensors(config) if weights != "none" else ()
    if config_only:
        checkpoint = _with_implied_tensors(checkpoint, rules, reading)
    return Model(checkpoint, architecture, config, _match_huggingface(checkpoint, rules), config_only)


def unused_note(checkpoint: Checkpoint) -> str:
    """What to tell the user about tensors that only quantized activations need."""
    names = join_names(checkpoint.unused, 2)
    return f"{len(checkpoint.unused)} tensors for quantized activations are not read: {names}"


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
        rule.hf: StoredTensor(rule.hf, rule.hf_shape, stored, directory, 0)
        for rule in rules
        if not rule.skipped
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


def _match_huggingface(checkpoint: Checkpoint, rules: tuple[TensorRule, ...]) -> Pairs:
    """Pair every tensor of a Hugging Face checkpoint with its rule, in the rules' order.

    Raises ``PlanError`` naming tensors that no rule covers, that are missing, or whose shape is not the rule's.
    """
    known = {name for rule in rules for name in rule.hf_names}
    uncovered = [tensor for name, tensor in checkpoint.tensors.items() if name not in known]
    if uncovered:
        _refuse_prefix(uncovered, known)
        raise PlanError(
            "the checkpoint has tensors that the architecture does not know",
            where=uncovered[0].file,
            found=join_names([tensor.name for tensor in uncovered]),
            expected="the tensors that config.json implies",
            fix="check config.json (biases, layer types); merge an adapter before conversion",
        )
    found = [[name for name in rule.hf_names if name in checkpoint.tensors] for rule in rules]
    missing = [
        rule.hf for rule, names in zip(rules, found, strict=True) if not names and rule.gguf is not None
    ]
    if missing:
        raise PlanError(
            "the checkpoint lacks tensors that config.json implies",
            where=checkpoint.path,
            found=join_names(missing) + " missing",
            fix="fetch all shards, or correct config.json (tie_word_embeddings, biases, layer types)",
        )
    for names in found:
        if len(names) > 1:
            raise PlanError(
                "the checkpoint holds one tensor under two names",
                where=checkpoint.tensors[names[1]].file,
                found=join_names(names),
                expected="one of them",
            )
    pairs: list[tuple[StoredTensor, TensorRule]] = []
    for rule, names in zip(rules, found, strict=True):
        for tensor in (checkpoint.tensors[name] for name in names):
            if tensor.shape != rule.hf_shape:
                raise PlanError(
                    "a tensor has another shape than config.json implies",
                    where=f"{tensor.file}, tensor {tensor.name}",
                    found=tensor.shape,
                    expected=rule.hf_shape,
                    fix="check that config.json and the weights belong together",
                )
            if rule.section is not None:
                tensor = replace(tensor, shape=rule.shape, section=rule.section)
            pairs.append((tensor, rule))
    return tuple(pairs)


def _refuse_prefix(uncovered: list[StoredTensor], known: Collection[str]) -> None:
    """Raise ``PlanError`` if all these names are known names after one prefix, as wrapper modules write them."""
    name = uncovered[0].name
    for end in (position + 1 for position, letter in enumerate(name) if letter == "."):
        prefix = name[:end]
        if all(tensor.name.startswith(prefix) and tensor.name[end:] in known for tensor in uncovered):
            raise PlanError(
                "the tensor names have a prefix",
                where=uncovered[0].file,
                found=f"{prefix!r} before {len(uncovered)} names, such as {name}",
                expected=name[end:],
                fix=f"--strip-prefix {prefix} removes it",
            )


def _match_gguf(checkpoint: Checkpoint, listed_rules: tuple[TensorRule, ...]) -> Pairs:
    """Pair every tensor of a GGUF with its rule. Raises ``PlanError`` naming tensors missing, unknown or misshapen."""
    rules = {rule.gguf: rule for rule in listed_rules if rule.gguf is not None}
    missing = sorted(rules.keys() - checkpoint.tensors.keys())
    unknown = sorted(checkpoint.tensors.keys() - rules.keys())
    if missing or unknown:
        raise PlanError(
            "the file's tensors do not match its key-values",
            where=checkpoint.path,
            found="; ".join(
                f"{what} {join_names(names)}"
                for what, names in (("missing", missing), ("unknown", unknown))
                if names
            ),
        )
    for name, rule in rules.items():
        if not checkpoint.tensors[name].format.readable:
            raise PlanError(
                "a tensor has a type that weights cannot be read from",
                where=f"{checkpoint.path}, tensor {name}",
                found=checkpoint.tensors[name].format.name,
                expected="a type of llama-quantize's, or f32, f16, bf16",
                fix="convert the original checkpoint again",
            )
        # Writers differ in whether they count leading axes of one row.
        if _squeezed(checkpoint.tensors[name].shape) != _squeezed(rule.gguf_shape):
            raise PlanError(
                "a tensor has another shape than the file's key-values imply",
                where=f"{checkpoint.path}, tensor {name}",
                found=checkpoint.tensors[name].shape,
                expected=rule.gguf_shape,
            )
    return tuple((checkpoint.tensors[name], rule) for name, rule in rules.items())


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(length for length in shape if length != 1)
