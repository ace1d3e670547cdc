"""``report.html`` holds everything it shows, asks for nothing, and takes no name for markup."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bamba_quant.evaluation.result import FIGURES
from bamba_quant.printable import printable
from bamba_quant.report import wording
from bamba_quant.report.html import NotebookEvaluation, to_html
from bamba_quant.report.markdown import to_markdown
from bamba_quant.report.markup import element
from tests.report.variants import EDGES, HOSTILE, relabelled
from tests.support.evaluations import RECIPES

FETCHING = {
    "src",
    "srcset",
    "data",
    "action",
    "formaction",
    "poster",
    "background",
    "xlink:href",
    "ping",
    "manifest",
}


class Parsed(HTMLParser):
    """Tags with their attributes, and the text outside style and script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self._raw = False
        self._cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._raw = tag in ("style", "script")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._raw = False
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if not self._raw:
            self.text += data
        if self._cell:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def pages() -> dict[str, tuple[str, Parsed]]:
    return {name: (page := to_html(evaluation), Parsed(page)) for name, evaluation in EDGES.items()}


@pytest.mark.parametrize("name", EDGES)
def test_it_is_whole(name: str, pages: dict[str, tuple[str, Parsed]]) -> None:
    page, parsed = pages[name]
    evaluation = EDGES[name]
    for tag, attributes in parsed.elements:
        assert not FETCHING & attributes.keys()
        assert tag not in ("link", "iframe", "object", "embed", "img", "image", "use", "base", "form")
        assert not any(key.startswith("on") for key in attributes)
        if "href" in attributes:
            assert (attributes["href"] or "").startswith("#")
    identifiers = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert {attributes["href"][1:] for _, attributes in parsed.elements if attributes.get("href")} <= set(
        identifiers
    )
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert evaluation.run.command in parsed.text
    assert not any(word in parsed.text for word in ("None", "nan", "inf ", "Markup("))
    assert not re.search(r'="(nan|inf|-inf|None)"', page)


@pytest.mark.parametrize("name", EDGES)
def test_every_picture_says_what_it_shows(name: str, pages: dict[str, tuple[str, Parsed]]) -> None:
    pictures = [a for tag, a in pages[name][1].elements if tag == "svg" and "aria-hidden" not in a]
    assert len(pictures) >= 6
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"] or "") > 20


@pytest.mark.parametrize("name", ["two", "all", "failing", "twenty"])
def test_the_tables_hold_every_figure(name: str, pages: dict[str, tuple[str, Parsed]]) -> None:
    rows = pages[name][1].rows
    candidates = sorted(EDGES[name].candidates, key=lambda candidate: candidate.model.file_bytes)
    for key, kind in FIGURES.items():
        (row,) = [row for row in rows if row and row[0] == wording.label(kind)]
        style = wording.column_style(kind, [candidate.figures[key] for candidate in candidates])
        for cell, candidate in zip(row[1:], candidates, strict=False):
            assert cell.startswith(wording.shown(kind, candidate.figures[key], style))
    for tensor in candidates[0].tensors:
        assert any(row[0] == tensor.stored_name for row in rows)


def test_rows_from_the_base_to_the_largest_file(pages: dict[str, tuple[str, Parsed]]) -> None:
    """The base with its own perplexity first, then the files by size, below each what it is worth."""
    evaluation = EDGES["all"]
    rows = pages["all"][1].rows
    first = next(i for i, row in enumerate(rows) if row[:3] == ["file", "size", "Mean KLD"])
    base, *files = rows[first + 1 : first + 2 + len(RECIPES)]
    assert base[0].startswith(evaluation.base.label)
    perplexity = rows[first].index("PPL")
    own = f"{evaluation.candidates[0].figures['ppl_base'].value:.2f}"
    assert [cell[: len(own)] for cell in base[2:-1]] == [
        own if i == perplexity else "–" for i in range(2, len(base) - 1)
    ]
    smallest_first = sorted(RECIPES, key=lambda name: RECIPES[name][2])
    assert [row[0].removesuffix("on the frontier") for row in files] == smallest_first


def test_a_file_that_another_beats_is_named_first() -> None:
    """q8_0 made smaller than fp8-dynamic, which diverges more."""
    evaluation = EDGES["all"]
    candidates = tuple(
        replace(
            c,
            gates=(),
            model=replace(c.model, file_bytes=c.model.file_bytes // (2 if c.model.recipe == "q8_0" else 1)),
        )
        for c in evaluation.candidates
    )
    for write in (to_html, to_markdown):
        text = write(replace(evaluation, candidates=candidates))
        shown = Parsed(text).text if write is to_html else text
        before = shown[: shown.index("99.9 % KLD" if write is to_html else "### Figures")]
        assert "On the frontier of size and divergence: q2_k, q8_0" in before
        assert re.search(r"fp8\S*dynamic[^.]* further from the original than q8_0", before)
        assert "No gates were set" in before


def test_files_that_cannot_be_told_apart_are_about_the_same() -> None:
    """The larger of two files that diverge alike in every chunk."""
    q8_0, q4_k_m = EDGES["two"].candidates
    larger = replace(q8_0, chunks=q4_k_m.chunks)
    page = Parsed(to_html(replace(EDGES["two"], candidates=(larger, q4_k_m))))
    assert "q8_0 is larger than q4_k_m, and this text cannot tell which is nearer" in page.text
    assert sum(row[0] == "q8_0about the same as q4_k_m" for row in page.rows if row) == 1


def test_absolute_paths_are_shortened() -> None:
    place = "/home/somebody/models with blanks"
    words = ["/opt/bin/bamba-quant", "evaluate", f"{place}/Bamba-9B", "x.gguf", f"--text={place}/t.txt"]
    command = shlex.join(words)
    evaluation = EDGES["all"]
    moved = replace(
        evaluation,
        base=replace(evaluation.base, path=f"{place}/Bamba-9B"),
        candidates=tuple(
            replace(c, model=replace(c.model, path=f"{place}/{c.model.path}")) for c in evaluation.candidates
        ),
        run=replace(evaluation.run, command=command, options={"tokenizer": f"{place}/tokenizer.json"}),
    )
    for text in (Parsed(to_html(moved)).text, to_markdown(moved)):
        assert "somebody" not in text and "with blanks" not in text and "/opt" not in text
        assert "…/bamba-quant evaluate …/Bamba-9B x.gguf --text=…/t.txt" in text
    assert wording.shortened_command("it's /a/b") == "it's …/b"


def test_all_maps_have_one_scale(pages: dict[str, tuple[str, Parsed]]) -> None:
    """Over the maps of all files, more decibels are never darker; and there is one legend."""
    page = pages["all"][0]
    cells = re.findall(
        r'class="cell" fill="#(\w+)"><title>[^<]*: weights ([\d.]+) dB(?:, output ([\d.]+) dB)?<', page
    )
    assert len(cells) > 50 * len(RECIPES)
    colours = sorted((float(output or weight), bytes.fromhex(fill)) for fill, weight, output in cells)
    light = [0.2126 * r + 0.7152 * g + 0.0722 * b for _, (r, g, b) in colours]
    assert all(next_one > one - 2 for one, next_one in pairwise(light)) and light[-1] - light[0] > 150
    assert page.count(">Colours of the maps<") == 1


def test_the_verdict_comes_first(pages: dict[str, tuple[str, Parsed]]) -> None:
    for name, word in (("all", "PASS"), ("failing", "FAIL"), ("no gates", "NO GATES")):
        text = pages[name][1].text
        assert text.index(word) < text.index("Size against divergence")
    failing = pages["failing"][1]
    assert "Gates that failed" in failing.text
    assert sum("✗ fail" in row for row in failing.rows) == 2  # among those that failed, and among all


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_text(name: str) -> None:
    evaluation = relabelled(EDGES["tuned"], name)
    page = to_html(evaluation)
    page.encode("utf-8")
    parsed, plain = Parsed(page), Parsed(to_html(EDGES["tuned"]))
    assert {tag for tag, _ in parsed.elements} <= {tag for tag, _ in plain.elements} | {"wbr"}
    known = {key for _, attributes in plain.elements for key in attributes}
    assert {key for _, attributes in parsed.elements for key in attributes} <= known
    assert page.count("<script") == 1
    assert printable(name) in parsed.text


@given(st.text())
def test_any_text_stays_text(text: str) -> None:
    parsed = Parsed(element("p", text, title=text))
    ((tag, attributes),) = parsed.elements
    assert (tag, attributes) == ("p", {"title": printable(text)})
    assert parsed.text == printable(text)


def test_it_grows_with_what_it_shows_and_no_more() -> None:
    size = {name: len(to_html(evaluation)) for name, evaluation in EDGES.items()}
    assert size["one"] < 300_000
    assert size["twenty"] < 20 * size["one"]


def test_a_notebook_shows_the_figures_and_the_picture_in_a_frame() -> None:
    evaluation = relabelled(EDGES["two"], '"><script>alert(1)</script>')
    frame = Parsed(NotebookEvaluation(**vars(evaluation))._repr_html_())
    ((tag, attributes),) = frame.elements
    assert tag == "iframe" and attributes["sandbox"] == "allow-scripts" and not frame.text
    page = Parsed(str(attributes["srcdoc"]))
    assert any(tag == "svg" for tag, _ in page.elements) and len(page.rows) > len(evaluation.candidates)


def test_drift_that_was_not_watched_is_said(pages: dict[str, tuple[str, Parsed]]) -> None:
    assert "not watched" in pages["logits as base"][1].text
    assert "exactly" in pages["nothing lost"][1].text
