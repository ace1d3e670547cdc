"""Gates test bounds, not means; know their names; and refuse what the arithmetic alone could break."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bamba_quant.evaluation.gates import (
    GateError,
    Limit,
    check_enough,
    check_sections,
    judge,
    limit,
    limits_for,
    read_gates,
    refuse_unmeasurable,
)
from bamba_quant.evaluation.result import FIGURES, Figure
from bamba_quant.metadata.tune_record import TuneRecord
from tests.support.evaluations import make_evaluation
from tests.support.tuning import RECORD

KLD = Figure(value=0.02, low=0.017, high=0.024, lower=0.018, upper=0.023, floor=1e-4)
SAME = Figure(value=0.95, low=0.92, high=0.97, lower=0.93, upper=0.965, floor=1e-3)


@pytest.mark.parametrize(
    ("name", "value", "passed"),
    [("max-kld", 0.0231, True), ("max-kld", 0.0229, False), ("max-kld", 0.0201, False),
     ("min-same-top", 0.929, True), ("min-same-top", 0.931, False), ("min-same-top", 0.949, False)],
)  # fmt: skip
def test_the_bound_decides(name: str, value: float, passed: bool) -> None:
    (gate,) = judge([limit(name, value)], {"kld_mean": KLD, "same_top": SAME})
    assert (gate.passed, gate.measurable) == (passed, True)
    assert gate.bound == (0.023 if name == "max-kld" else 0.93)


def test_three_noise_floors_are_the_least() -> None:
    for each, wide, tight in (("max-kld", 3.1e-4, 2.9e-4), ("min-same-top", 0.9969, 0.9971)):
        perfect = {"kld_mean": replace(KLD, upper=0.0), "same_top": replace(SAME, lower=1.0)}
        assert judge([limit(each, wide)], perfect)[0].passed
        (gate,) = judge([limit(each, tight)], perfect)
        assert not gate.passed and not gate.measurable
    evaluation = make_evaluation()
    refuse_unmeasurable(evaluation)
    candidate = evaluation.candidates[0]
    unmeasurable = replace(candidate, gates=judge([limit("max-kld", 2e-4)], {"kld_mean": KLD}))
    with pytest.raises(GateError, match=r"too tight to be measured\n.*max-kld\n.*0\.0002, .*\n.*0\.0003"):
        refuse_unmeasurable(replace(evaluation, candidates=(unmeasurable,)))


@pytest.mark.parametrize("key", FIGURES)
def test_every_figure_with_a_direction_has_a_gate(key: str) -> None:
    worse = FIGURES[key].worse
    if worse is None or key.endswith(("_max", "_min")):
        for kind in ("max", "min"):
            with pytest.raises(GateError, match="unknown gate"):
                limit(f"{kind}-{key.replace('_', '-')}", 1)
        return
    kind = "max" if worse == "higher" else "min"
    made = Limit(key, "max" if kind == "max" else "min", 0.5)
    assert limit(made.name, 0.5) == made
    with pytest.raises(GateError, match="unknown gate"):
        limit(("min" if kind == "max" else "max") + made.name[3:], 0.5)


def test_limits_are_laid_over_each_other(tmp_path: Path) -> None:
    file = tmp_path / "gates.toml"
    file.write_text(
        "[default]\nmax-kld = 0.1\nmin-same-top = 0.8\n[q4_k_m]\nmax-kld = 0.05\n"
        '["q4_k_m tuned"]\nmax-kld = 0.045\n["my model"]\nmax-kld = 0.04\n'
    )
    sections = read_gates(file)

    def kld(recipe: str, label: str, *given: Limit, tuned: TuneRecord | None = None) -> float:
        model = replace(make_evaluation().base, recipe=recipe, label=label, tuned=tuned)
        limits = limits_for(sections, model, given)
        assert {each.figure for each in limits} == {"kld_mean", "same_top"}
        return next(each.limit for each in limits if each.figure == "kld_mean")

    assert kld("q8_0", "x") == 0.1
    assert kld("q4_k_m", "x") == 0.05
    assert kld("q4_k_m", "x", tuned=RECORD) == 0.045
    assert kld("q8_0", "x", tuned=RECORD) == 0.1
    assert kld("q4_k_m", "my model") == kld("q4_k_m", "my model", tuned=RECORD) == 0.04
    assert kld("q4_k_m", "my model", limit("max-kld", 0.03)) == 0.03


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("max-kld = 1", "outside of all sections"),
        ("[default]\nmax-kdl = 1", "unknown gate"),
        ("[default]\nmax-kld = '1'", "not a finite number"),
        ("[default]\nmax-kld = true", "not a finite number"),
        ("[default]\nmax-kld = nan", "not a finite number"),
        ("[default]\nmax-kld = -inf", "not a finite number"),
        ("[default]\nmax-kld = 1e400", "not a finite number"),
        (f"[default]\nmax-kld = {'1' * 400}", "an integer of 1,3[0-9]{2} bits"),
        (f"[default]\nmax-kld = {'1' * 5000}", "not TOML"),
        (f"[default]\nmax-kld = 0x{'f' * 5000}", "an integer of 20,000 bits"),
        ("[default]\nmax-kld = 2020-01-01", "not a finite number"),
        ("[default.max-kld]\nx = 1", "not a finite number"),
        (f"[default]\nmax-kld = {'[' * 100_000}{']' * 100_000}", "nested too deeply"),
        (f"[default]\nmax-kld = {'{a = ' * 100_000}1{'}' * 100_000}", "nested too deeply"),
        (f"[default]\nmax-kld = {'[' * 200}{']' * 200}", "not a finite number"),
        (f"{'.'.join('a' * 100_000)} = 1", "too many parts"),
        (f"[{'.'.join('a' * 100_000)}]", "too many parts"),
        (f"{'.'.join('a' * 100)} = 1", "unknown gate"),
        (f"# {'x' * (1 << 20)}\n[default]", "too large"),
        ('[default]\n"max-kld\\u001b[2K" = 1', "unknown gate"),
        (f'[default]\n"{"x" * 100_000}" = 1', "unknown gate"),
        ("[default", "not TOML"),
        ("[default]\nmax-kld = 1\nmax-kld = 2", "not TOML"),
        ("\0", "not TOML"),
    ],
    ids=lambda value: value[:40],
)
def test_files_that_say_nothing(text: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "gates.toml"
    file.write_text(text)
    with pytest.raises(GateError, match=complaint) as error:
        read_gates(file)
    assert str(file) in str(error.value)
    assert len(str(error.value)) < 4000


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("[Müller]".encode("latin-1"))
    for name in ("nowhere", "latin", "."):
        with pytest.raises(GateError, match="cannot be read"):
            read_gates(tmp_path / name)


def test_a_long_comment_is_none_of_a_keys_parts(tmp_path: Path) -> None:
    (tmp_path / "x").write_text(f"# {'.' * 300}\n[default]\nmax-kld = 1\n")
    assert read_gates(tmp_path / "x") == {"default": (limit("max-kld", 1),)}


def test_texts_too_short_for_a_bound_are_refused_first() -> None:
    check_enough([limit("max-kld", 1), limit("max-kld-99-9", 1)], 40, 10_200)
    check_enough([], 2, 510)
    with pytest.raises(GateError, match=r"7 chunks"):
        check_enough([limit("max-kld", 1)], 7, 10_200)
    with pytest.raises(GateError, match=r"max-kld-99-9\n.*7999 tokens"):
        check_enough([limit("max-kld-99-9", 1)], 40, 7999)


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), -float("inf"), "0.1", True, None, 10**400, 1 << 100_000],
    ids=lambda value: "huge" if isinstance(value, int) and value > 1 else str(value),
)
def test_what_is_no_limit(value: object) -> None:
    with pytest.raises(GateError, match="not a finite number"):
        limit("max-kld", value)


@pytest.mark.parametrize(
    ("name", "value"), [("min-same-top", 90), ("max-flips", 5), ("max-delta-p-rms", 1.01)]
)
def test_percents_are_no_fractions(name: str, value: float) -> None:
    with pytest.raises(GateError, match=rf"more than 1\n.*\n.*fraction of 1\n.*give {value / 100:g}"):
        limit(name, value)
    assert limit(name, value / 100).limit == value / 100
    assert limit("max-ppl", value).limit == value


def test_every_candidate_has_a_section_and_every_section_a_recipe() -> None:
    models = [candidate.model for candidate in make_evaluation().candidates]
    recipes = [model.recipe for model in models]
    limits = (limit("max-kld", 1),)
    check_sections({"default": limits}, models)
    check_sections(dict.fromkeys(recipes, limits), models)
    check_sections({**dict.fromkeys(recipes[1:], limits), models[0].label: ()}, models)
    tuned = [replace(model, tuned=RECORD) for model in models]
    check_sections({models[0].recipe: limits, models[1].recipe: limits}, [models[0], tuned[1]])
    check_sections({model.variant: limits for model in tuned}, tuned)
    check_sections(
        {"default": limits, "q2_k tuned": limits, "iq2_xs": limits, "int4": limits, "int8": limits}, models
    )
    with pytest.raises(GateError, match=r"no candidate and no recipe; did you mean q4_k_m\?\n.*\[q4_km\]\n"):
        check_sections({"default": limits, "q4_km": limits}, models)
    with pytest.raises(GateError, match=r"no section for a candidate\n") as error:
        check_sections(dict.fromkeys(recipes[1:], limits), models)
    assert f"[{recipes[0]}]" in str(error.value)
    with pytest.raises(GateError, match="no section"):
        check_sections({}, models)


def test_a_figure_without_interval_is_not_judged() -> None:
    unknown = Figure(value=0.01, low=None, high=None, lower=None, upper=None, floor=1e-4)
    (gate,) = gates = judge([limit("max-kld", 0.05)], {"kld_mean": unknown})
    assert (gate.passed, gate.measurable, gate.bound) == (False, False, 0.01)
    evaluation = make_evaluation()
    candidate = evaluation.candidates[0]
    figures = {**candidate.figures, "kld_mean": unknown}
    with pytest.raises(GateError, match="has no confidence interval"):
        refuse_unmeasurable(
            replace(evaluation, candidates=(replace(candidate, figures=figures, gates=gates),))
        )
