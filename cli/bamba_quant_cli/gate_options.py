"""The options of ``bamba-quant evaluate`` that are gates."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from bamba_quant.evaluation.gates import Limit

# Options of ``evaluate``, in the order of its help.
GATES = {
    "max-kld": "Greatest mean KLD.",
    "max-kld-99": "Greatest 99 % KLD.",
    "max-kld-99-9": "Greatest 99.9 % KLD.",
    "max-ppl-ratio": "Greatest PPL(Q)/PPL(base).",
    "max-delta-p-rms": "Greatest RMS Δp, as a fraction.",
    "max-flips": "Greatest share of flips, as a fraction.",
    "min-same-top": "Least share of tokens with the same top p, as a fraction.",
}


def gate_option(name: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(help=GATES[name], rich_help_panel="Gates")
    return option


def given_limits(given: dict[str, float | None], more: list[str]) -> list[Limit]:
    """The limits of the options above by their names, and those of --gate."""
    from bamba_quant.evaluation.gates import GateError, limit

    limits = [limit(name, value, f"--{name}") for name, value in given.items() if value is not None]
    for each in more:
        name, equals, value = each.partition("=")
        number: object = value
        with suppress(ValueError):
            number = float(value)
        if not equals:
            raise GateError("a gate has no limit", where="--gate", found=each, expected="NAME=LIMIT")
        limits.append(limit(name.strip(), number, "--gate"))
    return limits
