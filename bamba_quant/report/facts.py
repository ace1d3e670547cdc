"""The report's lists of terms: what its figures mean, and what was run."""

from __future__ import annotations

from bamba_quant.evaluation.provenance import ModelFile
from bamba_quant.evaluation.result import Evaluation
from bamba_quant.report import wording
from bamba_quant.report.markup import Markup, element, escaped

DEFINITIONS = (
    ("KLD", "Kullback-Leibler divergence of the candidate's next-token distribution from the base's, in nats."),
    ("PPL", "Perplexity: exp of the mean negative log-likelihood. The ratio to the base's is what was lost."),
    ("Same top p", "Share of tokens whose most probable continuation is the same."),
    ("Top-5 overlap", "Share of the base's five most probable continuations among the candidate's five."),
    ("Δp", "Change of the probability given to the token that really follows, candidate minus base."),
    ("Flips", "Share of tokens whose top guess turned from right to wrong or from wrong to right."),
    ("SQNR", "Signal to quantization noise: 10 log10(Σw² / Σ(ŵ−w)²), in decibels; 6 dB are about one bit."),
    (
        "Interval",
        "Tokens of one chunk depend on one another, so whole chunks are drawn, for base and candidate alike. Shares "
        "with exceptions in fewer than eight chunks, which most draws would miss, have exact binomial intervals.",
    ),
    (
        "Frontier",
        "Every smaller file diverges more. A file is dominated if another one is not larger and diverges less. Files "
        "are compared chunk by chunk: if the 95 % interval of the difference of their mean KLDs contains 0, they are "
        "about the same, and the larger one is not on the frontier.",
    ),
    ("Noise floor", "The base against itself by another path of computation; nothing smaller can be measured."),
    ("Gate", "A limit on the worse end of the one-sided 95 % interval: chance alone passes it in one of twenty runs."),
)  # fmt: skip


def definitions() -> Markup:
    return _terms([(term, escaped(meaning)) for term, meaning in DEFINITIONS])


def facts(evaluation: Evaluation) -> Markup:
    """Text, tokenizer, seed, device, versions and options."""
    text, run = evaluation.text, evaluation.run
    models = (evaluation.base, *(candidate.model for candidate in evaluation.candidates))
    listed = [
        ("base", f"{evaluation.base.label} ({evaluation.base.kind}, {evaluation.base.variant})"),
        *(
            ("candidate", f"{c.model.label} ({c.model.kind}, {c.model.variant}, {_types(c.model)})")
            for c in evaluation.candidates
        ),
        *((f"how {model.label} came about", model.tuned.line()) for model in models if model.tuned),
        ("text", f"{text.file}, {text.tokens:,} tokens"),
        ("text SHA-256", text.sha256),
        ("tokenizer SHA-256", text.tokenizer_sha256),
        ("seed", f"{run.seed}, {run.resamples:,} resamples"),
        ("computed on", f"{run.processor}, {run.device}, {run.threads} threads, {run.backend}, {run.dtype}"),
        ("started", run.started),
        ("versions", ", ".join(f"{name} {version}" for name, version in run.versions.items())),
        (
            "options",
            ", ".join(
                f"{name}={wording.shortened_path(str(value))}"
                for name, value in run.options.items()
                if value is not None
            ),
        ),
    ]
    return _terms([(term, escaped(value)) for term, value in listed])


def _types(model: ModelFile) -> str:
    return ", ".join(f"{total.name} {wording.size(total.n_bytes)}" for total in model.types)


def _terms(entries: list[tuple[str, Markup]]) -> Markup:
    return element(
        "dl",
        *(piece for term, value in entries for piece in (element("dt", term), element("dd", value))),
    )
