"""Limits for a candidate, tested on the bound of the interval; a limit within the noise is an error.

A gate passes when the one-sided 95 % bound of its figure, in the direction of loss, keeps the limit: it
shows that the loss is not larger, not merely that none was found. A limit within three noise floors of no loss cannot
be measured, and is an error.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bamba_quant.errors import BambaQuantError, did_you_mean, join_names
from bamba_quant.evaluation.figures import least_tokens_for
from bamba_quant.evaluation.intervals import LEAST_CHUNKS
from bamba_quant.evaluation.models import variant_names
from bamba_quant.evaluation.provenance import ModelFile
from bamba_quant.evaluation.result import FIGURES, Evaluation, Figure, Gate
from bamba_quant.files.toml_file import read_toml

FLOORS = 3

# The section of a file whose limits hold for every candidate.
EVERY = "default"

_SHORT = {"kld": "kld_mean", "ln-ppl-ratio": "ln_ppl_ratio"}


class GateError(BambaQuantError):
    """A gate that does not exist, contradicts itself, or cannot be measured."""


@dataclass(frozen=True)
class Limit:
    """One limit: the greatest value of a figure that grows with loss, or the least of one that falls."""

    figure: str
    kind: Literal["max", "min"]
    limit: float

    @property
    def name(self) -> str:
        """As an option or a file spells it: max-kld, min-same-top."""
        short = {figure: name for name, figure in _SHORT.items()}
        return f"{self.kind}-{short.get(self.figure, self.figure.replace('_', '-'))}"


def limit(name: str, value: Any, where: object = None) -> Limit:
    """The limit called ``name``, such as max-kld or min-same-top. Raises ``GateError`` listing the names."""
    known = {
        each.name: each
        for key, figure in FIGURES.items()
        if figure.worse is not None and not key.endswith(("_max", "_min"))  # extremes have no interval
        for each in (Limit(key, "max" if figure.worse == "higher" else "min", 0.0),)
    }
    if name not in known:
        what = f"unknown gate{did_you_mean(name, known)}"
        raise GateError(what, where=where, found=name, expected=", ".join(known))
    number = _finite(value)
    if number is None:
        raise GateError(
            "a gate's limit is not a finite number",
            where=where,
            found=f"{name} = {_repr(value)}",
            expected="a finite number, such as 0.05",
        )
    if FIGURES[known[name].figure].percent and abs(number) > 1:
        raise GateError(
            "a gate's limit is more than 1",
            where=where,
            found=f"{name} = {number:g}",
            expected="a fraction of 1",
            fix=f"for {number:g} % give {number / 100:g}" if abs(number) <= 100 else None,
        )
    return Limit(known[name].figure, known[name].kind, number)


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of 400 digits
        return None
    return number if math.isfinite(number) else None


def _repr(value: Any) -> str:
    """A short ``repr``; Python does not convert integers of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length():,} bits"
    return reprlib.repr(value)


def read_gates(file: Path) -> dict[str, tuple[Limit, ...]]:
    """A TOML file's limits by section: ``[default]`` for every candidate, others for a recipe or a label.

    Files whose rounding is tuned may have a section of their own, such as ``["q4_k_m tuned"]``. A limit that a
    candidate's own section repeats takes the default's place. Raises ``GateError``.
    """
    return gate_sections(read_toml(file, "gates", GateError), file)


def gate_sections(parsed: Mapping[str, Any], where: object) -> dict[str, tuple[Limit, ...]]:
    """The limits of ``read_gates`` from tables that are ``parsed`` already. Raises ``GateError`` likewise."""
    loose = [name for name, section in parsed.items() if not isinstance(section, dict)]
    if loose:
        raise GateError(
            "limits are outside of all sections",
            where=where,
            found=join_names(loose),
            expected=f"sections such as [{EVERY}] or [q4_k_m] with limits below them",
        )
    return {
        name: tuple(limit(key, value, f"{where}, [{name}]") for key, value in section.items())
        for name, section in parsed.items()
    }


def limits_for(
    sections: Mapping[str, Sequence[Limit]], model: ModelFile, given: Sequence[Limit] = ()
) -> tuple[Limit, ...]:
    """The limits of one candidate: those given on the command line over its own over its recipe's over the default.

    Limits for tuned files of a recipe override those of the recipe.
    """
    chosen: dict[tuple[str, str], Limit] = {}
    for found in (*(sections.get(name, ()) for name in _names(model)), given):
        chosen |= {(each.figure, each.kind): each for each in found}
    return tuple(chosen.values())


def check_sections(sections: Mapping[str, Sequence[Limit]], models: Sequence[ModelFile]) -> None:
    """Raise ``GateError`` for a candidate without a section, and for a section that matches nothing."""
    known = {*variant_names(), *(name for each in models for name in _names(each))}
    strange = [name for name in sections if name not in known]
    if strange:
        raise GateError(
            "a section in the gates file names no candidate and no recipe" + did_you_mean(strange[0], known),
            found=join_names([f"[{name}]" for name in strange]),
            expected=f"[{EVERY}], a recipe such as [q4_k_m], or one of: " + _sections_of(models, ", "),
            fix="correct or remove the section",
        )
    left = [each for each in models if sections.keys().isdisjoint(_names(each))]
    if left:
        raise GateError(
            "the gates have no section for a candidate",
            found=join_names([f"[{name}]" for name in sections]) or "no section",
            expected=_sections_of(left),
            fix="add a section; an empty one sets no limits",
        )


def _names(model: ModelFile) -> tuple[str, ...]:
    """The sections that are for a model, the more special the later."""
    return tuple(dict.fromkeys((EVERY, model.recipe, model.variant, model.label)))


def _sections_of(models: Sequence[ModelFile], between: str = " or ") -> str:
    return ", ".join(between.join(f"[{name}]" for name in _names(each)[1:]) for each in models)


def check_enough(limits: Sequence[Limit], chunks: int, scored: int) -> None:
    """Raise ``GateError`` when there are limits and too few chunks or tokens to test them, before anything is run."""
    for each in limits:
        needed = least_tokens_for(each.figure)
        if chunks < LEAST_CHUNKS or scored < needed:
            raise GateError(
                "the text is too short for the confidence interval that a gate tests",
                where=each.name,
                found=f"{chunks} chunks, {scored} tokens scored",
                expected=f"at least {LEAST_CHUNKS} chunks" + (f" and {needed} tokens" if needed else ""),
                fix="use a longer text, or a shorter context (--ctx) if the chunks are too few",
            )


def judge(limits: Sequence[Limit], figures: Mapping[str, Figure]) -> tuple[Gate, ...]:
    """The results of the gates, in order.

    A gate that cannot be measured does not pass: its limit is too close to no loss, or its figure has no interval.
    """
    gates = []
    for each in limits:
        figure = figures[each.figure]
        bound = figure.upper if each.kind == "max" else figure.lower
        perfect, floor = FIGURES[each.figure].perfect, figure.floor
        wide = perfect is None or floor is None or abs(each.limit - perfect) >= FLOORS * floor
        measurable = wide and bound is not None
        bound = figure.value if bound is None else bound
        passed = bound <= each.limit if each.kind == "max" else bound >= each.limit
        gates.append(
            Gate(
                each.figure,
                each.kind,
                each.limit,
                figure.value,
                bound,
                floor,
                measurable and passed,
                measurable,
            )
        )
    return tuple(gates)


def refuse_unmeasurable(evaluation: Evaluation) -> None:
    """Raise ``GateError`` for the first gate that could not be measured, with its limit and its floor."""
    for candidate in evaluation.candidates:
        for gate in candidate.gates:
            if not gate.measurable:
                floor = gate.floor or 0.0
                where = f"{candidate.model.label}: {Limit(gate.figure, gate.kind, gate.limit).name}"
                figure = candidate.figures[gate.figure]
                if (figure.upper if gate.kind == "max" else figure.lower) is None:
                    raise GateError(
                        "a gate's figure has no confidence interval, since too few chunks differ",
                        where=where,
                        found=f"{gate.value:.6g}",
                        fix="use a longer text, or set a gate on another figure",
                    )
                raise GateError(
                    "a gate is too tight to be measured",
                    where=where,
                    found=f"{gate.limit:g}, {abs(gate.limit - (FIGURES[gate.figure].perfect or 0)):.3g} from "
                    "losing nothing",
                    expected=f"at least {FLOORS * floor:.3g}, three times the noise floor: what the base differs "
                    "from itself by another path",
                    fix="set a wider limit, or evaluate in a wider --dtype",
                )
