"""``report.html``: one file that holds everything it shows and makes no network request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bamba_quant.evaluation.result import Candidate, Evaluation
from bamba_quant.report import tables, wording
from bamba_quant.report.charts.distributions import divergence_histograms, probability_strips
from bamba_quant.report.charts.drift import drift_scale, layer_drift
from bamba_quant.report.charts.size_divergence import size_divergence
from bamba_quant.report.charts.tensors import LossScale, loss_scale, tensor_cells, tensor_key, tensor_map
from bamba_quant.report.facts import definitions, facts
from bamba_quant.report.markup import Markup, element, joined, unbroken
from bamba_quant.report.page import as_page, every_width, figure
from bamba_quant.report.remedies import remedy, worst_tensors
from bamba_quant.report.verdict import verdict
from bamba_quant.report.wording import listed, named_candidates, short_names

_FEW_GATES = 6


def to_html(evaluation: Evaluation) -> str:
    """The whole page."""
    evaluation = wording.by_size(evaluation)
    text, run = evaluation.text, evaluation.run
    sections = [
        ("figures", "Figures", _figures(evaluation)),
        ("size", "Size against divergence", _size(evaluation)),
        ("tasks", "Tasks", tables.tasks(evaluation)),
        ("spread", "Spread over tokens", _spread(evaluation)),
        ("layers", "Drift by layer", _layers(evaluation)),
        ("tensors", "Tensors", _tensors(evaluation)),
        ("repeat", "Run it again", _repeat(evaluation)),
    ]
    shown = [section for section in sections if section[2]]
    links = [element("li", element("a", name, href=f"#{key}")) for key, name, _ in shown]
    return as_page(
        f"What {listed(short_names(evaluation))} lost against {evaluation.base.label}",
        f"{text.scored:,} tokens of {text.file} scored in {text.chunks} chunks of {text.ctx}; "
        f"{run.started[:10]}, {run.processor}, {run.device}, {run.dtype}.",
        (
            _verdict(evaluation),
            element("nav", element("ul", *links), aria_label="Sections"),
            *(element("section", element("h2", name, id=key), content) for key, name, content in shown),
        ),
        f"bamba-quant {run.versions.get('bamba-quant', '')}, report schema {evaluation.schema}.",
    )


@dataclass(frozen=True, repr=False, eq=False)
class NotebookEvaluation(Evaluation):
    """An evaluation that a notebook shows as the verdict, the figures and the picture of size against divergence."""

    def to_pandas(self) -> Any:
        """A pandas ``DataFrame`` with a row a candidate, by its label, and a column for each figure and its interval.

        Columns are named as in report.json, with ``_low`` and ``_high`` for the 95 % interval; bytes, bits per weight
        and whether all gates hold come first. pandas is not installed with this package.
        """
        from pandas import DataFrame

        rows = {
            candidate.model.label: {
                "recipe": candidate.model.variant,
                "bytes": candidate.model.file_bytes,
                "bits_per_weight": candidate.model.bits_per_weight,
                "passed": candidate.passed,
                **{
                    f"{key}{end}": value
                    for key, figure in candidate.figures.items()
                    for end, value in (("", figure.value), ("_low", figure.low), ("_high", figure.high))
                },
            }
            for candidate in self.candidates
        }
        return DataFrame.from_dict(rows, orient="index")

    def _repr_html_(self) -> str:
        evaluation = wording.by_size(self)
        title = f"What {listed(short_names(evaluation))} lost against {evaluation.base.label}"
        page = as_page(title, "", (_verdict(evaluation), tables.summary(evaluation), _size(evaluation)))
        # In a frame, so that the looks of page and notebook stay apart.
        height = 960 + 60 * len(evaluation.candidates)
        return element(
            "iframe", srcdoc=page, sandbox="allow-scripts", width="100%", height=height, style="border: 0"
        )


def _verdict(evaluation: Evaluation) -> Markup:
    found = verdict(evaluation)
    return joined(
        (
            element(
                "div",
                element("strong", f"{_SIGNS[found.state]}{found.headline}"),
                element("ul", *(element("li", unbroken(sentence)) for sentence in found.sentences)),
                class_=f"verdict {found.state}",
                id="verdict",
            ),
            _gates(evaluation),
        )
    )


def _gates(evaluation: Evaluation) -> Markup:
    """The gates that failed in full view, and all of them at hand; in full view too where they are few."""
    found = [
        (name, candidate, gate)
        for name, candidate in named_candidates(evaluation)
        for gate in candidate.gates
    ]
    if len(found) <= _FEW_GATES:
        return tables.gates("Gates", found) if found else Markup()
    failed = [entry for entry in found if not entry[2].passed]
    return joined(
        (
            tables.gates("Gates that failed", failed) if failed else Markup(),
            element(
                "details", element("summary", f"All {len(found)} gates"), tables.gates("All gates", found)
            ),
        )
    )


_SIGNS = {"pass": "✓ ", "fail": "✗ ", "none": ""}


def _size(evaluation: Evaluation) -> Markup:
    return figure(
        every_width(lambda width: size_divergence(evaluation, width)),
        "Each mark is a file, its upright line the 95 % interval (often shorter than the mark). Down and to the "
        "left is better: the line joins the files on the frontier, and a hollow mark is a file that another dominates. "
        f"The base takes {wording.size(evaluation.base.file_bytes)}. "
        + (
            "Below the dashed line the base cannot be told from itself."
            if evaluation.noise_floor
            else "No noise floor was measured."
        ),
    )


def _figures(evaluation: Evaluation) -> Markup:
    floor = evaluation.noise_floor
    said = (
        f"Noise floor: {floor.path}, over {floor.chunks} chunks." if floor else "No noise floor was measured."
    )
    return joined(
        (
            tables.summary(evaluation),
            element(
                "p",
                f"Intervals: 95\u00a0%, paired bootstrap over {evaluation.text.chunks} chunks, "
                f"{evaluation.run.resamples:,} resamples. {said}",
                element("span", " On a wide screen the table has more columns.", class_="narrow"),
                class_="note",
            ),
            element("details", element("summary", "All figures"), tables.all_figures(evaluation)),
            element("details", element("summary", "What the figures mean"), definitions()),
        )
    )  # fmt: skip


def _spread(evaluation: Evaluation) -> Markup:
    return joined(
        (
            element("h3", "KL divergence"),
            figure(
                every_width(lambda width: divergence_histograms(evaluation, width)),
                "How many tokens diverge how much. Ticks below each hill: median, 99 % and 99.9 % of tokens.",
            ),
            element("h3", "Probability of the correct token"),
            figure(
                every_width(lambda width: probability_strips(evaluation, width)),
                "Change from the base. From the thickest bar to the thinnest: the middle 50, 90, 98 and 99.8 % of "
                "tokens; the tick is the median. A strip that leans left lost more than it gained.",
            ),
        )
    )


def _layers(evaluation: Evaluation) -> Markup:
    span = drift_scale(evaluation)
    watched = [
        (i, name, candidate)
        for i, (name, candidate) in enumerate(named_candidates(evaluation))
        if candidate.layers
    ]
    if span is None or not watched:
        return element("p", "Activations were not watched, or nothing differs in any layer.")
    floor = evaluation.noise_floor
    quietest = (
        min(values)
        if floor and (values := [v.accumulated for v in floor.layers if v.accumulated is not None])
        else None
    )
    panels = [
        element("div", element("h3", name), _drift(name, candidate, i, span))
        for i, name, candidate in watched
    ]
    return figure(
        element("div", *panels, class_="panels"),
        "Signal to noise of activations against the base's, in decibels: higher is closer. Full line: the stream "
        "after each layer, with everything lost before it (accumulated). Dashed line: what the layer itself loses "
        "when it is given the base's own input (local). Grey columns are attention layers. "
        f"Watched on the first {evaluation.drift_chunks} chunks."
        + (f" The noise floor lies at {wording.decibels(quietest)} dB or higher." if quietest else ""),
    )


def _drift(name: str, candidate: Candidate, kind: int, span: tuple[float, float]) -> Markup:
    if all(layer.local is None and layer.accumulated is None for layer in candidate.layers):
        return element("p", "Nothing differs in any layer.", class_="note")
    return layer_drift(name, candidate, kind, span)


def _tensors(evaluation: Evaluation) -> Markup:
    named = [(name, c) for name, c in named_candidates(evaluation) if c.tensors]
    if not named:
        return Markup()
    scale = loss_scale(evaluation)
    maps = [element("div", element("h3", name), *_map(evaluation, name, c, scale)) for name, c in named]
    said = "Dark is most lost; the colours mean the same in every map."
    pictures = figure(
        joined(
            (tensor_key(scale), element("p", said, class_="note"), element("div", *maps, class_="panels"))
        ),
        "Signal to quantization noise (SQNR), a row a kind of tensor and a column a layer. Of matrices: of their "
        "product with the base's own activations (output SQNR), which weighs every error by what passes through it; of "
        "embedding and output: of the weights. ssm_in is shown by what its rows mean: gate z, input x, B, C and time "
        "step dt. Hatched: stored exactly; kinds of tensors that are exact in every layer are left out.",
    )
    complete = [
        element("details", element("summary", f"All tensors of {name}"), tables.tensors(name, candidate))
        for name, candidate in named
    ]
    return joined((pictures, *complete))


def _map(evaluation: Evaluation, name: str, candidate: Candidate, scale: LossScale) -> list[Markup]:
    if not tensor_cells(candidate):
        return [element("p", "Every tensor is stored exactly.", class_="note")]
    drawn = [tensor_map(name, candidate, scale)]
    if worst_tensors(candidate):
        drawn += [element("p", "Lost most, by output SQNR:", class_="note"), tables.worst(candidate)]
    if mended := remedy(evaluation, candidate):
        said = "To store them with more bits:" if mended.complete else "To store them with more bits, add:"
        command = element("code", " \\\n  ".join(map(wording.shortened_command, mended.parts)))
        drawn += [element("p", said, class_="note"), element("pre", command, tabindex="0", aria_label=said)]
    return drawn


def _repeat(evaluation: Evaluation) -> Markup:
    return joined(
        (
            element(
                "pre",
                element("code", wording.shortened_command(evaluation.run.command)),
                tabindex="0",
                aria_label="Command",
            ),
            element("p", unbroken(_time(evaluation)), class_="note"),
            element("h3", "What was run"),
            facts(evaluation),
            element("details", element("summary", "Files and their SHA-256"), tables.hashes(evaluation)),
        )
    )


def _time(evaluation: Evaluation) -> str:
    timing = evaluation.timing
    device = (
        f", {wording.size(timing.device_memory)} on the device" if timing.device_memory is not None else ""
    )
    return (
        f"It took {wording.seconds(timing.seconds)}, {wording.seconds(timing.seconds_per_token)} a token: "
        f"{wording.time_shares(timing)}; "
        f"hashing {wording.seconds(timing.hashing_seconds)} more. Peak memory "
        f"{wording.size(timing.peak_memory)}{device}."
    )
