"""Chooses which linear layers of a quantized directory keep 16 bits: the least divergence within a size in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bamba_quant.checkpoint import ReadOptions
from bamba_quant.errors import PlanError
from bamba_quant.planning.plan import Plan, PlanRow
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.recipes.least_cost import Option, least_cost

_MOST_TRIES = 8


@dataclass(frozen=True)
class LayerAllocation:
    """The modules to ``ignore`` (in 16 bits), the directory's bytes, and its predicted divergence in nats a token.

    ``smallest_bytes`` and ``smallest_predicted`` are those of the directory in which every layer is quantized.
    """

    scheme: str
    ignore: tuple[str, ...]
    n_bytes: int
    predicted: float
    smallest_bytes: int
    smallest_predicted: float


def allocate_layers(
    model: Path,
    scheme: str,
    costs: Mapping[str, Mapping[str, float]],
    target_bytes: int,
    *,
    reading: ReadOptions = ReadOptions(),
) -> LayerAllocation:
    """Choose the layers of ``model`` to keep in bf16 so that the directory takes at most ``target_bytes``.

    ``costs`` are ``text_costs`` of the scheme. Layers that a runtime fuses stay together. Raises ``PlanError`` when
    the directory takes more with every layer quantized, and when it takes no more with none.
    """
    plan = plan_quantization(model, scheme, reading=reading)
    units = _units(plan)
    options = [
        (
            Option(sum(row.n_bytes for row in rows), sum(_cost(plan, row, costs) for row in rows)),
            Option(2 * sum(row.elements for row in rows), 0.0),
        )
        for rows in units
    ]
    smallest = sum(plan.sizes.values())
    fixed = smallest - sum(quantized.n_bytes for quantized, _ in options)
    # The header and the small files grow with the list of ignored layers, which is known after the choice.
    goal = target_bytes
    for _ in range(_MOST_TRIES):
        chosen = least_cost(options, goal - fixed, thorough=True)
        kept = [row for rows, number in zip(units, chosen, strict=True) if number for row in rows]
        if len(kept) == len(plan.matrices):
            raise PlanError(
                "the model fits in that size without quantization",
                found=f"{fixed + sum(other.n_bytes for _, other in options):,} bytes in bf16",
                expected=f"a size below, and of at least {smallest:,} bytes",
                fix="choose a smaller size, or keep the model in bf16",
            )
        ignore = tuple(row.source.name.removesuffix(".weight") for row in kept)
        n_bytes = sum(plan_quantization(model, scheme, keep=ignore, reading=reading).sizes.values())
        if n_bytes <= target_bytes:
            return LayerAllocation(
                scheme,
                ignore,
                n_bytes,
                sum(each[number].cost for each, number in zip(options, chosen, strict=True)),
                smallest,
                sum(quantized.cost for quantized, _ in options),
            )
        goal -= n_bytes - target_bytes
    raise PlanError(
        "no choice of layers fits in that size",
        found=f"{smallest:,} bytes with every layer quantized",
        expected=f"at most {target_bytes:,}",
        fix="choose a larger size",
    )


def _units(plan: Plan) -> list[Sequence[PlanRow]]:
    """The matrices in groups that are quantized together or not at all."""
    assert plan.model is not None
    rules = {part.name: rule for tensor, rule in plan.model.pairs for part in tensor.stored}
    fused = plan.model.architecture.loaders.units
    units: dict[object, list[PlanRow]] = {}
    for row in plan.matrices:
        roles = set(row.role.split("+"))
        number = next((n for n, unit in enumerate(fused) if roles & unit), None)
        key = row.name if number is None else (rules[row.source.name].layer, number)
        units.setdefault(key, []).append(row)
    return list(units.values())


def _cost(plan: Plan, row: PlanRow, costs: Mapping[str, Mapping[str, float]]) -> float:
    """What quantizing a tensor costs: the sum over a GGUF's tensors that are stacked in it, or its share of one."""
    return sum(
        costs[str(rule.gguf)][plan.recipe] / len(tensor.stored)
        for tensor, rule in plan.pairs
        if rule.gguf in costs and any(part.name == row.source.name for part in tensor.stored)
    )
