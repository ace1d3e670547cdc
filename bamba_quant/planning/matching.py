"""Pairs each tensor of a checkpoint with its rule, and stacks matrices that a checkpoint stores one by one."""

from __future__ import annotations

from collections.abc import Collection

from bamba_quant.checkpoint import Checkpoint, StoredTensor, stacked
from bamba_quant.checkpoint.stack import section_of
from bamba_quant.errors import PlanError, join_names
from bamba_quant.families import TensorRule

Pairs = tuple[tuple[StoredTensor, TensorRule], ...]


def match_huggingface(checkpoint: Checkpoint, rules: tuple[TensorRule, ...]) -> Pairs:
    """Pair every tensor of a Hugging Face checkpoint with its rule, in the rules' order.

    Raises ``PlanError`` naming tensors that no rule covers, that are missing, or whose shape is not the rule's.
    """
    stored = [{name: rule.stored(name) for name in rule.hf_names} for rule in rules]
    known = {part for forms in stored for parts in forms.values() for part in parts}
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
    found = [
        [name for name, parts in forms.items() if any(part in checkpoint.tensors for part in parts)]
        for forms in stored
    ]
    missing = [
        part
        for rule, names, forms in zip(rules, found, stored, strict=True)
        for part in forms[names[0] if names else rule.hf]
        if part not in checkpoint.tensors and rule.gguf is not None
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
                where=checkpoint.path,
                found=join_names(names),
                expected="one of them",
            )
    pairs: list[tuple[StoredTensor, TensorRule]] = []
    for rule, names, forms in zip(rules, found, stored, strict=True):
        for name in names:
            parts = [_of_shape(checkpoint.tensors[part], shape) for part, shape in forms[name].items()]
            tensor = stacked(name, parts) if "*" in name else parts[0]
            if rule.section is not None and "*" not in name:
                tensor = section_of(tensor, rule.shape, rule.section)
            pairs.append((tensor, rule))
    return tuple(pairs)


def _of_shape(tensor: StoredTensor, expected: tuple[int, ...]) -> StoredTensor:
    """``tensor``. Raises ``PlanError`` where it has another shape."""
    if tensor.shape != expected:
        raise PlanError(
            "a tensor has another shape than config.json implies",
            where=f"{tensor.file}, tensor {tensor.name}",
            found=tensor.shape,
            expected=expected,
            fix="check that config.json and the weights belong together",
        )
    return tensor


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


def match_gguf(checkpoint: Checkpoint, listed_rules: tuple[TensorRule, ...]) -> Pairs:
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
