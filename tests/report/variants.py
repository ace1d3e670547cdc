"""Evaluations at the edges of what a report must show."""

from __future__ import annotations

from dataclasses import replace

from bamba_quant.evaluation.result import FIGURES, Candidate, Evaluation, Figure, LayerDrift
from tests.support.evaluations import RECIPES, make_evaluation
from tests.support.tuning import RECORD

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\" onmouseover='alert(1)' x=\"",
    "a|b\\|c`d``e`[x](javascript:alert(1))",
    "](http://evil.example/)![i](http://evil.example/x.png)",
    "line\nbreak\r\n| --- |\n# heading",
    "\u202egnp.exe\u202c \x00\x1b[31m \ud800 \udcff",
    "&lt;b&gt; &amp; &#x3c;",
    "ünïcödé 模型 🤖",
    "x" * 400,
    "",
)


def relabelled(evaluation: Evaluation, name: str) -> Evaluation:
    """``evaluation`` with ``name`` wherever a user's own words can come to stand."""
    model = replace(evaluation.base, label=name, path=name, recipe=name, architecture=name)
    files = tuple(replace(file, name=name) for file in model.files)
    candidates = tuple(
        replace(
            candidate,
            model=replace(
                candidate.model, label=f"{name}{i}", path=name, recipe=f"{name}{i}", architecture=name, files=files,
                tuned=candidate.model.tuned and replace(RECORD, texts=(name, name)),
            ),
            tensors=tuple(
                replace(tensor, name=f"{name}{j}", stored_name=name, role=tensor.role + name, format=name)
                for j, tensor in enumerate(candidate.tensors)
            ),
            layers=tuple(replace(layer, kind=name) for layer in candidate.layers),
            worst=tuple(f"{name}{j}" for j in range(5)),
        )
        for i, candidate in enumerate(evaluation.candidates)
    )  # fmt: skip
    return replace(
        evaluation,
        base=replace(model, files=files),
        candidates=candidates,
        text=replace(evaluation.text, file=name),
        run=replace(
            evaluation.run,
            command=name,
            processor=name,
            device=name,
            versions={name: name},
            options={name: name},
        ),
    )


def without_gates(evaluation: Evaluation) -> Evaluation:
    return replace(evaluation, candidates=tuple(replace(c, gates=()) for c in evaluation.candidates))


def exact(candidate: Candidate) -> Candidate:
    """``candidate`` with nothing lost at all."""
    return replace(
        candidate,
        figures={
            key: Figure(value := kind.perfect if kind.perfect is not None else 22.0, value, value, value, value)
            for key, kind in FIGURES.items()
        },
        tensors=tuple(
            replace(tensor, weight_sqnr=None, output_sqnr=None, max_error=0.0, row_classes=())
            for tensor in candidate.tensors
        ),
        layers=tuple(replace(layer, local=None, accumulated=None) for layer in candidate.layers),
        worst=(),
    )  # fmt: skip


def _edges() -> dict[str, Evaluation]:
    plain = make_evaluation()
    one = make_evaluation(("q4_k_m",))
    (candidate,) = one.candidates
    unbounded = {
        key: replace(figure, low=None, high=None, lower=None, upper=None)
        for key, figure in candidate.figures.items()
    }
    logits = replace(
        one.base,
        kind="logits",
        weights=0,
        n_bytes=0,
        bits_per_weight=None,
        types=(),
    )
    many = make_evaluation(tuple(RECIPES) * 4, seed=3)
    deep = tuple(
        LayerDrift(
            i, "attention" if i % 7 == 3 else "mamba", None if i % 5 == 0 else 40.0 - i / 3, 38.0 - i / 2
        )
        for i in range(64)
    )
    return {
        "two": plain,
        "all": make_evaluation(tuple(RECIPES)),
        "failing": make_evaluation(tuple(RECIPES), failing=True),
        "one": one,
        "no gates": without_gates(one),
        "refused": replace(
            one,
            candidates=(
                replace(
                    candidate,
                    gates=tuple(replace(gate, passed=False, measurable=False) for gate in candidate.gates),
                ),
            ),
        ),
        "no floor": replace(one, noise_floor=None),
        "no intervals": replace(one, candidates=(replace(candidate, figures=unbounded, gates=()),)),
        "logits as base": replace(one, base=logits, candidates=(replace(candidate, tensors=(), layers=(), worst=()),)),
        "nothing lost": replace(plain, candidates=tuple(map(exact, plain.candidates))),
        "one lost nothing": replace(plain, candidates=(plain.candidates[0], exact(plain.candidates[1]))),
        "twenty": replace(
            many,
            candidates=tuple(
                replace(c, model=replace(c.model, label=f"{c.model.label}-{i}")) for i, c in enumerate(many.candidates)
            ),
        ),
        "tuned": replace(
            plain,
            candidates=(candidate, replace(candidate, model=replace(candidate.model, label="better", tuned=RECORD))),
        ),
        "deep": replace(one, candidates=(replace(candidate, layers=deep),)),
    }  # fmt: skip


EDGES = _edges()
