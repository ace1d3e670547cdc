"""What every form of the report says first: whether gates hold, and which files are worth their size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bamba_quant.evaluation.provenance import base_warning
from bamba_quant.evaluation.result import Evaluation
from bamba_quant.report.frontier import Standing, frontier_lines
from bamba_quant.report.wording import counted, figure_label, named_candidates


@dataclass(frozen=True)
class Verdict:
    """A headline, and sentences below it; ``state`` is "none" where no gate was set."""

    state: Literal["pass", "fail", "none"]
    headline: str
    sentences: tuple[str, ...]


def verdict(evaluation: Evaluation) -> Verdict:
    """Whether every gate of every candidate holds, which do not, and which file another beats."""
    gates = [(name, gate) for name, candidate in named_candidates(evaluation) for gate in candidate.gates]
    swapped = base_warning(evaluation.base, *(candidate.model for candidate in evaluation.candidates))
    warned = (f"{swapped[0].upper()}{swapped[1:]}.",) if swapped else ()
    judged = frontier_lines(evaluation)
    if not gates:
        none = "No gates were set: no file passes or fails."
        if not judged:
            return Verdict(
                "none", f"NO GATES: {counted(len(evaluation.candidates), 'file')} measured", (*warned, none)
            )
        return Verdict("none", judged[0].removesuffix("."), (*warned, *judged[1:], none))
    failed = [(name, gate) for name, gate in gates if not gate.passed]
    files = counted(sum(bool(candidate.gates) for candidate in evaluation.candidates), "file")
    without = [name for name, candidate in named_candidates(evaluation) if not candidate.gates]
    left = (f"No gate was set for {', '.join(without)}.",) if without else ()
    if not failed:
        kept = "Every limit is kept by the worse end of its figure's interval, not merely by its mean."
        return Verdict(
            "pass",
            f"PASS: {counted(len(gates), 'gate')} of {files}: all hold",
            (*warned, kept, *left, *judged),
        )
    named = "; ".join(f"{name}: {figure_label(gate.figure)}" for name, gate in failed)
    headline = f"FAIL: {len(failed)} of {counted(len(gates), 'gate')} failed"
    return Verdict("fail", headline, (*warned, f"What failed: {named}.", *left, *judged))


def standing_words(standing: Standing, names: tuple[str, ...]) -> str | None:
    """A candidate's standing in a few words, for below its name; None where there is nothing to say."""
    if standing.by is None:
        return "on the frontier" if standing.state == "frontier" and len(names) > 1 else None
    return f"{'dominated by' if standing.state == 'dominated' else 'about the same as'} {names[standing.by]}"
