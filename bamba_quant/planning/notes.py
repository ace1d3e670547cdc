"""What users and the card of a quantized directory are told of its plan."""

from __future__ import annotations

from collections import Counter
from typing import Any

from bamba_quant import __version__
from bamba_quant.errors import join_names
from bamba_quant.planning.model import Model, config_dtype
from bamba_quant.planning.plan import Plan, PlanRow


def notes_on(plan: Plan, model: Model, configuration: dict[str, Any], dtype: str) -> list[str]:
    """What a user would want to know before relying on the output."""
    notes: list[str] = []
    asked = config_dtype(model.checkpoint)
    experts = sum(row.source.elements for row in plan.others if _is_expert(row) and len(row.shape) == 3)
    if experts:
        notes.append(
            f"the experts, {experts / plan.elements:.0%} of the weights, stay as they are: transformers has no "
            "quantized layer for stacked experts in this form"
        )
    notes += model.notes
    if any(row.source.format.name == "f16" and row.codec.name == "bf16" for row in plan.others):
        notes.append(
            "float16 tensors that are not quantized lose three bits as bfloat16, which is not smaller: --dtype stored "
            "keeps them"
        )
    if asked == "f16":
        notes.append(
            "config.json asks for float16, to which loaders cast scales: below 2^-17 these lose digits"
        )
    if asked == "f32" and dtype == "bf16" and configuration["quant_method"] == "fp8":
        notes.append(
            "config.json asks for float32, and in this form transformers leaves all other tensors in the type they "
            "are stored in: load with dtype=torch.bfloat16, or write with --dtype stored"
        )
    return notes


def _is_expert(row: PlanRow) -> bool:
    return "_exps" in row.role


def weighs(plan: Plan) -> bool:
    """Whether any method of the plan uses importance."""
    return any(row.method.weighs for row in plan.matrices if row.method)


def account(plan: Plan, measured: bool) -> list[str]:
    """What was done, in the words of the card."""
    sizes = ", ".join(f"{n_bytes / 1e9:.3f} GB {dtype}" for dtype, n_bytes in plan.bytes_by_dtype.items())
    kept = sorted(
        row.name
        for row in plan.others
        if (len(row.shape) == 2 and row.name.endswith(".weight")) or _is_expert(row)
    )
    weights = " weighted by measured activations," if measured and weighs(plan) else ""
    counts = Counter((row.scheme, row.method) for row in plan.matrices if row.method)
    schemes = "; ".join(
        f"scheme `{codec.name}` ({codec.about}), method `{method.name}` ({method.about})"
        + (f", for {count} matrices" if len(counts) > 1 else "")
        for (codec, method), count in counts.items()
    )
    return [
        f"{len(plan.matrices)} matrices ({plan.quantized_elements:,} of {plan.elements:,} weights) were quantized by "
        f"bamba-quant {__version__}: {schemes},{weights} each code rounded once from the original in float32.",
        f"All other tensors are not quantized, these matrices among them: {join_names([f'`{n}`' for n in kept], 8)}.",
        f"Weights take {sizes}; the input took {plan.input_bytes / 1e9:.3f} GB.",
    ]
