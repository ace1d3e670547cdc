"""Bits moved between tensors: the formats with the least predicted divergence within the exact bytes of a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bamba_quant.calibration.candidates import FORMATS
from bamba_quant.checkpoint import ReadOptions
from bamba_quant.checkpoint.gguf_header import padded_size
from bamba_quant.codecs import BlockCodec, codec_named
from bamba_quant.errors import PlanError
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.plan import Plan, PlanRow
from bamba_quant.printable import brief_repr
from bamba_quant.recipes import Recipe, recipe_named, recipes
from bamba_quant.recipes.assignments import with_formats
from bamba_quant.recipes.base import ALWAYS_F32
from bamba_quant.recipes.hybrid import HEADER_ROOM, estimated_costs
from bamba_quant.recipes.least_cost import Option, least_cost

Costs = Mapping[str, Mapping[str, float]]  # tensor by its GGUF name -> format -> nats a token

_FRONTIER = 33  # sizes


@dataclass(frozen=True)
class Move:
    """A tensor whose format the allocation changed, with what either costs in nats a token.

    ``cost_before`` is None where the format before is none of those that were measured.
    """

    tensor: str
    role: str
    layer: int | None
    before: str
    after: str
    more_bytes: int
    cost_before: float | None
    cost_after: float


@dataclass(frozen=True)
class Point:
    """A file's bytes and its predicted divergence; ``name`` is the plain recipe's, if it is one."""

    n_bytes: int
    predicted: float
    name: str = ""


@dataclass(frozen=True)
class Allocation:
    """A recipe, what it moved against the plain one that it is like, and both files' sizes and predictions."""

    recipe: Recipe
    like: Recipe
    moves: tuple[Move, ...]
    allocated: Point
    plain: Point | None
    others: tuple[Point, ...]
    frontier: tuple[Point, ...]

    __repr__ = brief_repr


def allocate(
    model: Path,
    costs: Costs,
    *,
    like: str | None = None,
    target_bytes: int | None = None,
    target_bpw: float | None = None,
    name: str | None = None,
    imatrix: Path | None = None,
    refine: bool = False,
    allow_config_only: bool = False,
    reading: ReadOptions = ReadOptions(),
) -> Allocation:
    """Choose a format for every tensor that ``costs`` knows so that the file takes at most the bytes asked for.

    These are ``target_bytes``, or ``target_bpw`` bits a weight, or those of the plain recipe ``like`` less room for
    the header of a tuned file. The recipe has ``refine`` as given. Without ``like`` the file is called like the type
    that is nearest in size. Raises ``PlanError`` when the smallest formats take more bytes.
    """

    def planned(recipe: Recipe) -> Plan:
        return plan_conversion(
            model, outtype=recipe, imatrix=imatrix, allow_config_only=allow_config_only, reading=reading
        )

    plain = {
        recipe.name: planned(recipe) for recipe in recipes() if _comparable(recipe) or recipe.name == like
    }
    points = {known: _point(plan, costs) for known, plan in plain.items()}
    sizes = {known: _file_bytes(plan) for known, plan in plain.items()}
    if like is not None:
        base = recipe_named(like, "--like")
        plan = plain.get(base.name) or planned(base)
        goal = _file_bytes(plan) - HEADER_ROOM
    if target_bpw is not None:
        if not (math.isfinite(target_bpw) and target_bpw > 0):
            raise PlanError(
                "the bits per weight are not a positive number",
                where="--target-bpw",
                found=target_bpw,
                expected="a number such as 4.5",
            )
        some = next(iter(plain.values()))
        goal = _file_bytes(some) - some.n_bytes + int(target_bpw * some.elements / 8)
    if target_bytes is not None:
        goal = target_bytes
    if like is None:
        base = recipe_named(min(sizes, key=lambda known: abs(sizes[known] - goal)))
        plan = plain[base.name]
    named = replace(base, name=name or f"{base.name}_a", refine=refine)
    recipe, point = _chosen(planned(named), costs, goal, named, thorough=True)
    made = planned(recipe)
    if (found := _file_bytes(made)) != point.n_bytes or found > goal:
        raise AssertionError(
            f"{recipe.name}: {found} bytes planned, {point.n_bytes} chosen, {goal} asked for"
        )
    frontier = _frontier(plan, costs, base, [*sizes.values(), goal])
    before = _point(plan, costs)
    return Allocation(
        recipe=recipe,
        like=base,
        moves=_moves(plan, made, costs),
        allocated=point,
        plain=before,
        others=tuple(each for each in points.values() if each),
        frontier=frontier,
    )


def known_costs(
    model: Path, formats: Sequence[str] | None = None, reading: ReadOptions = ReadOptions()
) -> dict[str, dict[str, float]]:
    """Costs by role as ``recipes.hybrid`` has them of other models, in ``formats`` or ``FORMATS``.

    A configuration without weights will do.
    """
    plan = plan_conversion(
        model, outtype="bf16", vocab=not model.is_dir(), allow_config_only=True, reading=reading
    )
    assert plan.model is not None
    config = plan.model.config
    layers, tied = config.num_hidden_layers, config.tie_word_embeddings
    return {
        str(rule.gguf): estimated_costs(rule, layers, formats or FORMATS, tied)
        for _, rule in plan.pairs
        if rule.gguf is not None and rule.role not in ALWAYS_F32
    }


def _comparable(recipe: Recipe) -> bool:
    """Whether a recipe is a plain one, of formats of 2 to 8 bits that people choose between."""
    return recipe.name.startswith(("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0", "iq4_xs")) and (
        not recipe.needs_importance and not recipe.candidates
    )


def _file_bytes(plan: Plan) -> int:
    return sum(shard.n_bytes for shard in plan.shards)


def row_bytes(row: PlanRow, name: str) -> int:
    """What a tensor takes in a file in the format ``name``, padding included."""
    rows, columns = row.matrix
    return padded_size(rows * codec_named(name, BlockCodec).row_bytes(columns))


def _point(plan: Plan, costs: Costs) -> Point | None:
    """The file as planned; None where a tensor has a format of unknown cost."""
    predicted = 0.0
    for row in plan.rows:
        if row.name in costs and row.format.dtype is None:
            if row.format.name not in costs[row.name]:
                return None
            predicted += costs[row.name][row.format.name]
    return Point(_file_bytes(plan), predicted, plan.recipe)


def _options(row: PlanRow, costs: Costs) -> dict[str, Option]:
    return {name: Option(row_bytes(row, name), cost) for name, cost in costs[row.name].items()}


def _chosen(
    plan: Plan, costs: Costs, goal: int, recipe: Recipe, thorough: bool = False
) -> tuple[Recipe, Point]:
    movable = [row for row in plan.rows if costs.get(row.name)]
    if not movable:
        raise PlanError(
            "no tensor of this model has a known cost",
            where=plan.checkpoint.path,
            fix="measure the costs of this model",
        )
    fixed = _file_bytes(plan) - sum(padded_size(row.n_bytes) for row in movable)
    options = [_options(row, costs) for row in movable]
    numbers = least_cost([list(each.values()) for each in options], goal - fixed, thorough=thorough)
    names = [list(each)[number] for each, number in zip(options, numbers, strict=True)]
    picked = [each[name] for each, name in zip(options, names, strict=True)]
    point = Point(fixed + sum(each.n_bytes for each in picked), sum(each.cost for each in picked))
    rules = {rule.gguf: rule for _, rule in plan.pairs}
    formats = {row.name: name for row, name in zip(movable, names, strict=True)}
    return with_formats(recipe, [rules[row.name] for row in movable], formats), point


def _frontier(plan: Plan, costs: Costs, base: Recipe, sizes: Sequence[int]) -> tuple[Point, ...]:
    """The least predicted divergence at sizes from the smallest to the largest of ``sizes``, where there is one."""
    low, high = min(sizes), max(sizes)
    points = []
    for step in range(_FRONTIER):
        goal = int(low * (high / low) ** (step / (_FRONTIER - 1)))
        try:
            points.append(_chosen(plan, costs, goal, base)[1])
        except PlanError:
            continue
    return tuple(points)


def _moves(before: Plan, after: Plan, costs: Costs) -> tuple[Move, ...]:
    layers = {rule.gguf: rule.layer for _, rule in before.pairs}
    moves = []
    for old, new in zip(before.rows, after.rows, strict=True):
        if old.format != new.format:
            known = costs[old.name]
            moves.append(
                Move(
                    old.name,
                    old.role,
                    layers[old.name],
                    old.format.name,
                    new.format.name,
                    padded_size(new.n_bytes) - padded_size(old.n_bytes),
                    known.get(old.format.name, 0.0 if old.format.dtype is not None else None),
                    known[new.format.name],
                )
            )
    return tuple(moves)
