"""Everything one evaluation found, as frozen records of plain values: the contract between measuring and reporting.

Every number a report shows stands here, and in ``provenance`` what it takes to run the evaluation again. ``SCHEMA``
counts changes that break a reader. ``dataclasses.asdict`` makes it JSON: no value is infinite or NaN, what cannot be
given is None. Probabilities and shares are fractions of 1, divergences and likelihoods nats, ratios of signal to noise
decibels, times seconds, sizes bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bamba_quant.evaluation.provenance import FileHash, ModelFile, Run, Text, Timing, TypeTotal
from bamba_quant.metadata.tune_record import TuneRecord

SCHEMA = 5
_SHOWN = 8  # candidates in a ``repr``

Section = Literal["perplexity", "divergence", "probability", "agreement"]


@dataclass(frozen=True)
class FigureKind:
    """A figure's key, llama-perplexity's name for it where it has one, and how to show and judge it.

    ``percent`` figures are stored as fractions and shown times 100. ``worse`` is the direction of loss: a gate
    on a figure that is worse when higher is a maximum, and its noise floor is an absolute difference from
    ``perfect``, the value of a candidate that lost nothing.
    """

    key: str
    label: str
    section: Section
    percent: bool = False
    worse: Literal["higher", "lower"] | None = "higher"
    perfect: float | None = 0.0


_KLD = {
    "max": "Maximum", "99_9": "99.9%", "99": "99.0%", "95": "95.0%", "90": "90.0%", "median": "Median",
    "10": "10.0%", "5": " 5.0%", "1": " 1.0%", "0_1": " 0.1%", "min": "Minimum",
}  # fmt: skip
_DELTA_P = {
    "max": "Maximum", "99_9": "99.9%", "99": "99.0%", "95": "95.0%", "90": "90.0%", "75": "75.0%",
    "median": "Median", "25": "25.0%", "10": "10.0%", "5": " 5.0%", "1": " 1.0%", "0_1": " 0.1%",
    "min": "Minimum",
}  # fmt: skip

# In llama-perplexity's order and, where its table has them, under its names (tools/perplexity/perplexity.cpp);
# "Q" is the candidate. ln_ppl_ratio is the mean difference in negative log-likelihood per token.
FIGURES: Mapping[str, FigureKind] = {
    kind.key: kind
    for kind in (
        FigureKind("ppl", "Mean PPL(Q)", "perplexity", perfect=None),
        FigureKind("ppl_base", "Mean PPL(base)", "perplexity", worse=None, perfect=None),
        FigureKind(
            "correlation",
            "Cor(ln(PPL(Q)), ln(PPL(base)))",
            "perplexity",
            percent=True,
            worse="lower",
            perfect=1.0,
        ),
        FigureKind("ln_ppl_ratio", "Mean ln(PPL(Q)/PPL(base))", "perplexity"),
        FigureKind("ppl_ratio", "Mean PPL(Q)/PPL(base)", "perplexity", perfect=1.0),
        FigureKind("ppl_difference", "Mean PPL(Q)-PPL(base)", "perplexity"),
        FigureKind("kld_mean", "Mean    KLD", "divergence"),
        *(FigureKind(f"kld_{key}", f"{label:7} KLD", "divergence") for key, label in _KLD.items()),
        FigureKind("delta_p_mean", "Mean    Δp", "probability", percent=True, worse="lower"),
        *(
            FigureKind(f"delta_p_{key}", f"{label:7} Δp", "probability", percent=True, worse=None)
            for key, label in _DELTA_P.items()
        ),
        FigureKind("delta_p_rms", "RMS Δp", "probability", percent=True),
        FigureKind("same_top", "Same top p", "agreement", percent=True, worse="lower", perfect=1.0),
        FigureKind("top_5_overlap", "Top-5 overlap", "agreement", percent=True, worse="lower", perfect=1.0),
        FigureKind("flips", "Flips", "agreement", percent=True),
        FigureKind(
            "accuracy_difference", "Top-1 accuracy, Q - base", "agreement", percent=True, worse="lower"
        ),
    )
}


@dataclass(frozen=True)
class Figure:
    """A value and its intervals, by bootstrap over chunks; by binomials for shares with few exceptions.

    ``low`` to ``high`` is the two-sided 95 % interval; ``lower`` and ``upper`` are the one-sided 95 % bounds that
    gates test. They are None where too few chunks allow none. ``naive_error`` is what llama-perplexity prints
    behind ±, a standard error that takes tokens to be independent. ``floor`` is the same figure of the base
    against itself by another path, as a distance from ``FigureKind.perfect``.
    """

    value: float
    low: float | None
    high: float | None
    lower: float | None
    upper: float | None
    naive_error: float | None = None
    floor: float | None = None


@dataclass(frozen=True)
class Histogram:
    """``counts[i]`` tokens lie in ``edges[i]`` to ``edges[i + 1]``, ``below`` and ``above`` outside all."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    below: int
    above: int


@dataclass(frozen=True)
class ChunkMeans:
    """Means over the scored tokens of each chunk, in the text's order: what the bootstrap draws from."""

    nll_base: tuple[float, ...]
    nll: tuple[float, ...]
    kld: tuple[float, ...]
    delta_p: tuple[float, ...]
    same_top: tuple[float, ...]


@dataclass(frozen=True)
class Flips:
    """Tokens whose rightness changed (arXiv 2407.09141), and McNemar's exact test of lost against gained."""

    lost: int
    gained: int
    p_value: float


@dataclass(frozen=True)
class RowClass:
    """Rows of one matrix that mean one thing, such as those of dt in ssm_in; fields as in ``TensorLoss``."""

    name: str
    rows: int
    weight_sqnr: float | None
    output_sqnr: float | None


@dataclass(frozen=True)
class TensorLoss:
    """How far one tensor of a candidate is from the base's, both as the forward pass sees them.

    ``name`` is that of every file of the model, Hugging Face's; ``stored_name`` is the candidate file's own, such as
    ``blk.3.ssm_in.weight`` of a GGUF. Tensors that a file stores as one, such as fused matrices, share it.
    ``weight_sqnr`` is 10 log10(Σw² / Σ(ŵ - w)²) and ``output_sqnr`` the same of its product with the base's own
    activations; both in dB, None where nothing differs, ``output_sqnr`` also for a tensor that is not a layer's matrix.
    """

    name: str
    stored_name: str
    layer: int | None
    role: str
    shape: tuple[int, ...]
    base_format: str
    format: str
    n_bytes: int
    weight_sqnr: float | None
    max_error: float
    cosine: float | None
    output_sqnr: float | None
    row_classes: tuple[RowClass, ...] = ()


@dataclass(frozen=True)
class LayerDrift:
    """How far a layer's activations are from the base's, in dB; None where nothing differs.

    ``local``: what the layer adds to the stream when it gets the base's own input. ``accumulated``: the stream
    after the layer, with everything before it lost as well.
    """

    layer: int
    kind: str
    local: float | None
    accumulated: float | None


@dataclass(frozen=True)
class Gate:
    """One limit and its verdict: ``bound``, the one-sided 95 % bound of ``figure``, against ``limit``.

    A limit within three noise ``floor``s of losing nothing is not ``measurable``, and then has not passed.
    Nor is a figure without an interval, whose ``bound`` is then its ``value``.
    """

    figure: str
    kind: Literal["max", "min"]
    limit: float
    value: float
    bound: float
    floor: float | None
    passed: bool
    measurable: bool = True


@dataclass(frozen=True)
class Candidate:
    """A candidate against the base. ``figures`` has FIGURES' keys in their order.

    ``layers`` and ``tensors`` are empty for a base given as a logits file; ``worst`` names the tensors of lowest
    ``output_sqnr``, worst first. ``layers`` were watched on the first ``Evaluation.drift_chunks`` chunks.
    """

    model: ModelFile
    figures: Mapping[str, Figure]
    flips: Flips
    kld_histogram: Histogram
    delta_p_histogram: Histogram
    chunks: ChunkMeans
    tensors: tuple[TensorLoss, ...]
    layers: tuple[LayerDrift, ...]
    worst: tuple[str, ...]
    gates: tuple[Gate, ...]

    def __repr__(self) -> str:
        model, shown = self.model, ("ppl_ratio", "kld_mean", "same_top")
        figures = (f"{key} {self.figures[key].value:.5g}" for key in shown if key in self.figures)
        return f"Candidate({', '.join((repr(model.label), model.variant, f'{model.file_bytes:,} bytes', *figures))})"

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)


@dataclass(frozen=True)
class NoiseFloor:
    """The base against itself: ``path`` says by which other way, over the first ``chunks`` chunks."""

    path: str
    chunks: int
    figures: Mapping[str, float]
    layers: tuple[LayerDrift, ...]


@dataclass(frozen=True)
class TaskScore:
    """One model's score on a task, with its standard error, and the difference from the base.

    Errors and ``flips`` (questions, where each is right or wrong) are those of the questions, base and candidate on the
    same ones; None where the metric is not the mean of its questions, and for the base itself.
    """

    label: str
    value: float | None
    error: float | None
    difference: float | None
    difference_error: float | None
    flips: Flips | None


@dataclass(frozen=True)
class TaskResult:
    """A metric of a task of lm-evaluation-harness, under its names: ``scores`` of the base and each candidate."""

    task: str
    version: str
    metric: str
    filter: str
    higher_is_better: bool | None
    questions: int
    scores: tuple[TaskScore, ...]


@dataclass(frozen=True)
class Evaluation:
    """One base, its candidates, and all that was found; ``tasks`` where any were asked for."""

    schema: int
    run: Run
    text: Text
    base: ModelFile
    candidates: tuple[Candidate, ...]
    noise_floor: NoiseFloor | None
    drift_chunks: int
    timing: Timing
    tasks: tuple[TaskResult, ...] = ()

    def __repr__(self) -> str:
        text, left = self.text, len(self.candidates) - _SHOWN
        head = f"Evaluation({self.base.label!r}, {text.chunks} chunks of {text.ctx} of {text.file!r}"
        more = [f"and {left} more"] if left > 0 else []
        return ",\n  ".join([head, *map(repr, self.candidates[:_SHOWN]), *more]) + ")"

    @property
    def passed(self) -> bool:
        return all(candidate.passed for candidate in self.candidates)


# Every record of which an evaluation consists.
RECORDS = (
    *(Evaluation, Candidate, ChunkMeans, Figure, Flips, Gate, Histogram, LayerDrift, NoiseFloor, RowClass),
    *(TaskResult, TaskScore, TensorLoss, FileHash, ModelFile, Run, Text, Timing, TuneRecord, TypeTotal),
)
