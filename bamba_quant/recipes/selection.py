"""The format of each of a model's tensors, by a recipe and the user's overrides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bamba_quant.codecs import BlockCodec, codec_named
from bamba_quant.errors import PlanError
from bamba_quant.families import TensorRule
from bamba_quant.recipes.base import ALWAYS_F32, FALLBACKS, Recipe, TensorPosition, precedes
from bamba_quant.recipes.hybrid import move_bits
from bamba_quant.recipes.patterns import tensors_matching

# Experts and the shared feed-forward network have the rules of the plain feed-forward network (llama-quant.cpp,
# ``tensor_get_category``, looks for the first part of these names).
_SAME_RULES = {
    f"ffn_{which}_{kind}": f"ffn_{which}" for which in ("gate", "up", "down") for kind in ("exps", "shexp")
}


@dataclass(frozen=True)
class TypeOverrides:
    """What the user chose instead of a recipe's formats, under llama-quantize's names.

    ``tensor_types`` pairs patterns of tensor names (``patterns.tensors_matching``) with formats; the first that matches
    wins.
    """

    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    tensor_types: tuple[tuple[str, str], ...] = ()
    pure: bool = False
    leave_output_tensor: bool = False


@dataclass(frozen=True)
class Selected:
    """A format, and a note where it is not the one that was chosen."""

    format: BlockCodec
    note: str = ""


def select_formats(
    rules: Sequence[TensorRule],
    recipe: Recipe,
    overrides: TypeOverrides,
    stored: Sequence[BlockCodec],
    *,
    grouped_query: int,
    experts: int,
    imatrix: bool,
) -> list[Selected]:
    """The format of each tensor of ``rules``, in the order of llama-quantize's decisions.

    ``stored`` are the input's formats, which ``leave_output_tensor`` keeps. Raises ``PlanError`` for an override that
    has a format that cannot be written, or matches no tensor, and for a tensor of the recipe that the model lacks.
    """
    patterns = [
        (tensors_matching(pattern, rules), _writable(name)) for pattern, name in overrides.tensor_types
    ]
    _check_assignments(rules, recipe)
    counts = Counter(rule.role for rule in rules)
    layers = len({rule.layer for rule in rules} - {None})
    tied = counts["output"] == 0
    attention = {rule.layer for rule in rules if rule.role == "attn_q"}
    seen: Counter[str] = Counter()
    selected: list[Selected] = []
    movable: list[int] = []
    for rule, source in zip(rules, stored, strict=True):
        if rule.role in ALWAYS_F32:
            selected.append(Selected(codec_named("f32", BlockCodec)))
            continue
        if rule.role == "output" and overrides.leave_output_tensor:
            selected.append(Selected(source))
            continue
        override = _by_role(rule, overrides) or _by_pattern(rule, patterns)
        if override is not None:
            selected.append(_fitting(override, rule))
            continue
        name = recipe.default
        role = "output" if tied and rule.role == "token_embd" else _SAME_RULES.get(rule.role, rule.role)
        recipe_role = rule.role if rule.role in recipe.roles and role != "output" else role
        if role == "output" and overrides.output_tensor_type is not None and not overrides.pure:
            selected.append(_fitting(_writable(overrides.output_tensor_type), rule))
            continue
        if not overrides.pure:
            # llama-quantize numbers feed-forward matrices by layer, with several experts by the layer's own number, and
            # others by their role.
            feed_forward = role.startswith("ffn_")
            index = rule.layer if feed_forward and experts > 1 and rule.layer is not None else seen[role]
            count = layers if feed_forward else counts[role]
            position = TensorPosition(
                index, count, grouped_query, experts, imatrix, rule.layer, precedes(rule.layer, attention)
            )
            seen[role] += 1
            assigned = recipe.assigned(str(rule.gguf))
            name = assigned or recipe.format_for(recipe_role, position)
            if not assigned:
                movable.append(len(selected))
            if role == "output" and not assigned and not _fits(recipe.default, rule):
                name = "q8_0"
        selected.append(_fitting(codec_named(name, BlockCodec), rule))
    if recipe.candidates:
        formats = [selected[number].format.name for number in movable]
        moved = move_bits([rules[number] for number in movable], formats, recipe.candidates, layers, tied)
        for number, name in zip(movable, moved, strict=True):
            selected[number] = _fitting(codec_named(name, BlockCodec), rules[number])
    return selected


def _by_role(rule: TensorRule, overrides: TypeOverrides) -> BlockCodec | None:
    named = {"token_embd": overrides.token_embedding_type, "output": overrides.output_tensor_type}.get(
        rule.role
    )
    return None if named is None else _writable(named)


def _by_pattern(rule: TensorRule, patterns: Sequence[tuple[frozenset[str], BlockCodec]]) -> BlockCodec | None:
    return next((found for names, found in patterns if str(rule.gguf) in names), None)


def _fits(name: str, rule: TensorRule) -> bool:
    return codec_named(name, BlockCodec).fits(rule.gguf_shape[-1])


def _fitting(wanted: BlockCodec, rule: TensorRule) -> Selected:
    columns = rule.gguf_shape[-1]
    if wanted.fits(columns):
        return Selected(wanted)
    found = codec_named(FALLBACKS.get(wanted.name, "f16"), BlockCodec)
    if not found.fits(columns):
        found = codec_named("f16", BlockCodec)
    return Selected(
        found, f"{wanted.name} needs rows of a multiple of {wanted.block_size}, this one has {columns}"
    )


def _writable(name: str) -> BlockCodec:
    found = codec_named(name, BlockCodec)
    if not found.writable:
        raise PlanError(f"{found.name} can be read but not written", fix="choose another format")
    return found


def _check_assignments(rules: Sequence[TensorRule], recipe: Recipe) -> None:
    names = [str(rule.gguf) for rule in rules if rule.role not in ALWAYS_F32]
    for each in recipe.tensors:
        if not any(map(each.covers, names)):
            raise PlanError(
                "an entry of the recipe matches no tensor of this model that can be quantized",
                where=f"recipe {recipe.name}",
                found=each.name or f"pattern {each.pattern}",
                expected="names such as " + ", ".join(sorted(names)[:4]),
                fix="use the recipe with the model it was made for",
            )
