"""``report.md`` begins with the verdict, and every name in it is text to a Markdown reader of other people's."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from bamba_quant.printable import printable
from bamba_quant.report.markdown import cell_code, code, literal, to_markdown
from bamba_quant.report.wording import short_names
from tests.report.variants import EDGES, HOSTILE, relabelled
from tests.support.evaluations import make_evaluation

READER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
TAGS = {
    *("h2", "h3", "p", "table", "thead", "tbody", "tr", "th", "td", "strong", "br", "sub", "details", "summary"),
    *("code", "ul", "li"),
}  # fmt: skip


class Read(HTMLParser):
    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(READER.render(markdown))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("name", EDGES)
def test_verdict_first_and_every_table_whole(name: str) -> None:
    evaluation = EDGES[name]
    text = to_markdown(evaluation)
    word = (
        "FAIL"
        if not evaluation.passed
        else "PASS"
        if any(c.gates for c in evaluation.candidates)
        else "NO GATES"
    )
    assert word in text.splitlines()[0]
    found = Read(text)
    assert set(found.tags) <= TAGS
    assert found.tags.count("h2") == 1
    for candidate in evaluation.candidates:
        assert candidate.model.variant in found.text
        assert candidate.model.tuned is None or candidate.model.tuned.line() in found.text
    assert evaluation.run.command in found.text
    assert evaluation.text.sha256 in found.text


def test_a_gate_that_failed_is_named_with_its_bound() -> None:
    evaluation = EDGES["failing"]
    (gate,) = [gate for candidate in evaluation.candidates for gate in candidate.gates if not gate.passed]
    text = to_markdown(evaluation)
    assert text.splitlines()[0] == "## ❌ FAIL: 1 of 10 gates failed"
    row = next(line for line in text.splitlines() if "**fail**" in line)
    assert "int4-gptq" in row
    assert "Mean KLD at most" in row
    assert f"{gate.bound:.5f}" in row


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_text(name: str) -> None:
    plain, hostile = (Read(to_markdown(relabelled(EDGES["tuned"], each))) for each in ("plain", name))
    assert hostile.tags == plain.tags
    assert hostile.attributes == plain.attributes
    shown = " ".join(printable(name).split())
    assert shown in " ".join(hostile.text.split())


@given(st.text(max_size=60))
@settings(deadline=None)
def test_any_text_stays_text(name: str) -> None:
    shown = " ".join(printable(name).split())
    for cell in (literal(name), cell_code(name)):
        row = f"| a | b |\n| -- | -- |\n| {cell} | end |\n"
        found = Read(row)
        assert set(found.tags) <= {"table", "thead", "tbody", "tr", "th", "td", "code", "p"}
        assert found.tags.count("td") == 2
        assert " ".join(found.text.split()) == " ".join(f"a b {shown} end".split())
    found = Read(f"- {code(name)}")
    assert set(found.tags) <= {"ul", "li", "code"}
    assert " ".join(found.text.split()) == shown


def test_a_gate_that_cannot_be_measured_is_no_pass() -> None:
    text = to_markdown(EDGES["refused"])
    assert "FAIL" in text.splitlines()[0]
    assert "❌ **refused**" in text
    assert "three noise floors" in text


def test_without_a_noise_floor_it_says_so() -> None:
    assert "No noise floor was measured" in to_markdown(EDGES["no floor"])
    assert "noise floor |" in to_markdown(EDGES["one"])


def test_candidates_of_one_recipe_are_told_apart() -> None:
    evaluation = EDGES["two"]
    alike = replace(
        evaluation,
        candidates=tuple(replace(c, model=replace(c.model, recipe="q4_0")) for c in evaluation.candidates),
    )
    text = to_markdown(alike)
    assert all(candidate.model.label in text for candidate in alike.candidates)


def test_what_was_not_judged_is_said() -> None:
    evaluation = make_evaluation()
    first, second, *others = evaluation.candidates
    assert not others and second.gates
    found = to_markdown(replace(evaluation, candidates=(replace(first, gates=()), second)))
    assert f"PASS: {len(second.gates)} gate" in found and "of 1 file: all hold" in found
    assert literal(f"No gate was set for {short_names(evaluation)[0]}.") in found


def test_a_gate_on_a_figure_without_interval_says_why() -> None:
    evaluation = make_evaluation()
    first, *others = evaluation.candidates
    unknown = replace(first.figures["kld_mean"], low=None, high=None, lower=None, upper=None)
    gate = replace(first.gates[0], passed=False, measurable=False)
    changed = replace(first, figures={**first.figures, "kld_mean": unknown}, gates=(gate,))
    found = to_markdown(replace(evaluation, candidates=(changed, *others)))
    assert "too few chunks differ" in found and "three noise floors" not in found
