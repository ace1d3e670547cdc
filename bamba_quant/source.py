"""A model found: its checkpoint, its architecture and configuration, and every tensor paired with its rule."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from bamba_quant.architectures import Architecture, TensorRule, architecture_of, architecture_of_gguf
from bamba_quant.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from bamba_quant.errors import PlanError, listed
from bamba_quant.formats import Format
from bamba_reference.config import Config

Pairs = tuple[tuple[StoredTensor, TensorRule], ...]


@dataclass(frozen=True)
class LeftOut:
    """A tensor of the input that the output does not need; ``equal_to`` must then hold the same bytes, if given."""

    source: StoredTensor
    reason: str
    equal_to: StoredTensor | None = None


@dataclass(frozen=True)
class Source:
    """A model of either kind; ``pairs`` are in the rules' order, tensors that are left out among them."""

    checkpoint: Checkpoint
    architecture: Architecture
    config: Config
    pairs: Pairs

    def left_out(self) -> tuple[LeftOut, ...]:
        """The tensors an output does not need."""
        return tuple(
            LeftOut(tensor, rule.left_out, self.checkpoint.tensors[rule.equal_to] if rule.equal_to else None)
            for tensor, rule in self.pairs
            if rule.left_out
        )


def open_source(
    path: str | Path, *, ignore_config_keys: Collection[str] = (), weights: bool = True
) -> Source:
    """The model at ``path``, a Hugging Face directory or a GGUF file; reads headers only.

    Without ``weights`` a directory needs none: its source has a configuration and no tensor. Raises a
    ``BambaQuantError`` for an architecture that is not supported and for tensors that do not fit their
    configuration.
    """
    checkpoint = open_checkpoint(path, weights=weights)
    if checkpoint.kind == "huggingface":
        architecture = architecture_of(checkpoint.metadata)
        config = Config.from_hf(checkpoint.metadata, ignore=ignore_config_keys)
        rules = architecture.tensors(config) if weights else ()
        return Source(checkpoint, architecture, config, _match_huggingface(checkpoint, rules))
    architecture = architecture_of_gguf(checkpoint.metadata)
    config = architecture.config_of_gguf(checkpoint.metadata, checkpoint.tensors)
    return Source(checkpoint, architecture, config, _match_gguf(checkpoint, architecture.tensors(config)))


def imagined_source(
    path: str | Path, number_format: Format, *, ignore_config_keys: Collection[str] = ()
) -> Source:
    """The model that ``path``, a directory with a config.json, would hold in ``number_format``; for plans only.

    Its tensors name ``path`` as their file. Raises a ``BambaQuantError`` for an architecture that is not supported.
    """
    found = open_source(path, ignore_config_keys=ignore_config_keys, weights=False)
    rules = found.architecture.tensors(found.config)
    directory = found.checkpoint.path
    tensors = {
        rule.hf: StoredTensor(rule.hf, rule.shape, number_format, directory, 0)
        for rule in rules
        if not rule.left_out
    }
    checkpoint = replace(found.checkpoint, tensors=tensors)
    return replace(found, checkpoint=checkpoint, pairs=_match_huggingface(checkpoint, rules))


def _match_huggingface(checkpoint: Checkpoint, rules: tuple[TensorRule, ...]) -> Pairs:
    """Pair every tensor of a Hugging Face checkpoint with its rule, in the rules' order.

    Raises ``PlanError`` naming tensors that no rule covers, that are missing, or whose shape is not the rule's.
    """
    by_name = {rule.hf: rule for rule in rules}
    uncovered = [tensor for name, tensor in checkpoint.tensors.items() if name not in by_name]
    if uncovered:
        raise PlanError(
            "the checkpoint has tensors that the architecture does not know",
            where=uncovered[0].file,
            found=listed([tensor.name for tensor in uncovered]),
            expected="the tensors that config.json implies",
            fix="check config.json (biases, layer types); adapters must be merged before conversion",
        )
    missing = [rule.hf for rule in rules if rule.hf not in checkpoint.tensors and rule.gguf is not None]
    if missing:
        raise PlanError(
            "the checkpoint lacks tensors that config.json implies",
            where=checkpoint.path,
            found=listed(missing) + " missing",
            fix="fetch all shards, or correct config.json (tie_word_embeddings, biases, layer types)",
        )
    pairs = tuple((checkpoint.tensors[rule.hf], rule) for rule in rules if rule.hf in checkpoint.tensors)
    for tensor, rule in pairs:
        if tensor.shape != rule.shape:
            raise PlanError(
                "a tensor has another shape than config.json implies",
                where=f"{tensor.file}, tensor {tensor.name}",
                found=tensor.shape,
                expected=rule.shape,
                fix="check that config.json and the weights belong together",
            )
    return pairs


def _match_gguf(checkpoint: Checkpoint, listed_rules: tuple[TensorRule, ...]) -> Pairs:
    """Pair every tensor of a GGUF with its rule. Raises ``PlanError`` naming tensors missing, unknown or misshapen."""
    rules = {rule.gguf: rule for rule in listed_rules if rule.gguf is not None}
    missing = sorted(rules.keys() - checkpoint.tensors.keys())
    unknown = sorted(checkpoint.tensors.keys() - rules.keys())
    if missing or unknown:
        raise PlanError(
            "the file's tensors are not those its key-values imply",
            where=checkpoint.path,
            found="; ".join(
                f"{what} {listed(names)}"
                for what, names in (("missing", missing), ("unknown", unknown))
                if names
            ),
        )
    for name, rule in rules.items():
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
