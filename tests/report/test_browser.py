"""The page as a browser shows it: quiet, offline, sortable, readable on a phone, in light and in dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bamba_quant.report.write import write_reports
from tests.report.variants import EDGES, HOSTILE, relabelled, without_gates
from tests.support.browser import Page, chromium, open_browser

PHONE, DESK = 360, 1280

# Contrast by WCAG 2.2, of every text that shows against the nearest background behind it; below the ratio, a list.
FAINT = """
(least) => {
  const probe = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    probe.clearRect(0, 0, 1, 1);
    probe.fillStyle = colour;
    probe.fillRect(0, 0, 1, 1);
    return [...probe.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (colour) => {
    const [r, g, b] = rgba(colour).map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (rgba(colour)[3] === 255) return colour;
    }
    return "white";
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest("script, title, desc")) continue;
    const style = getComputedStyle(node);
    const square = node.matches("text.on-dark, text.on-light") && node.previousElementSibling;
    const paper = square ? square.getAttribute("fill") : behind(node);
    const ink = node instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [luminance(ink), luminance(paper)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < least) found.push([walker.currentNode.data, ink, paper, ratio]);
  }
  return found;
}
"""
# Marks, lines and hills against the page: WCAG asks 3 of what must be seen to understand a picture.
PALE = """
() => {
  const style = getComputedStyle(document.documentElement);
  const paint = document.body.appendChild(document.createElement("i"));
  const probe = document.createElement("canvas").getContext("2d");
  const luminance = (name) => {
    paint.style.color = `var(${name})`;
    probe.fillStyle = getComputedStyle(paint).color;
    probe.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...probe.getImageData(0, 0, 1, 1).data].map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = luminance("--paper");
  return [0, 1, 2, 3, 4, 5, 6, 7].filter((i) => {
    const mark = luminance(`--s${i}`);
    return (Math.max(mark, paper) + 0.05) / (Math.min(mark, paper) + 0.05) < 3;
  });
}
"""


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with open_browser(chromium()) as opened:
        yield opened


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    judged = {"judged": without_gates(EDGES["all"])}
    evaluations = (
        EDGES | judged | {f"hostile {i}": relabelled(EDGES["two"], name) for i, name in enumerate(HOSTILE)}
    )
    directory = tmp_path_factory.mktemp("reports")
    return {
        name: write_reports(evaluation, directory / str(i)).html
        for i, (name, evaluation) in enumerate(evaluations.items())
    }


def column(page: Page, table: str, number: int) -> list[str]:
    """What the cells of a column say, from top to bottom, without what stands below in small type."""
    rows = f"[...document.querySelectorAll({table!r} + ' tbody:last-of-type tr')]"
    said = "[...cell.childNodes].filter(e => e.className !== 'range').map(e => e.textContent).join('')"
    return list(page.evaluate(f"{rows}.map(row => row.cells[{number}]).map(cell => {said})"))


SUMMARY = "table[aria-label^='Each file']"


@pytest.mark.parametrize("name", [*EDGES, *(f"hostile {i}" for i in range(len(HOSTILE)))])
def test_quiet_offline_and_never_wider_than_the_screen(
    name: str, page: Page, reports: dict[str, Path]
) -> None:
    page.requests.clear()
    page.complaints.clear()
    # On a phone every page, on wider screens every second one.
    wider = {700: [*EDGES][::2], DESK: [*EDGES][1::2]}
    for width in (PHONE, *(width for width, names in wider.items() if name in names)):
        page.screen(width)
        page.open(reports[name])
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert set(page.requests) == {reports[name].resolve().as_uri()}
    assert page.complaints == []
    assert page.evaluate("typeof alert") == "function"


@pytest.mark.parametrize("width", [390, 641, 821, 1161, 1280])
def test_summary_and_gates_fit(width: int, page: Page, reports: dict[str, Path]) -> None:
    """No column has to be scrolled to; divergence and perplexity are among those that show on a phone."""
    page.screen(width)
    for name in ("failing", "refused", "twenty", "tuned"):
        page.open(reports[name])
        rooms = page.evaluate(
            "[...document.querySelectorAll('table.summary, table.gates')].filter(e => e.checkVisibility())"
            ".map(e => [e.scrollWidth, e.parentElement.clientWidth])"
        )
        assert len(rooms) == 2 or name == "twenty"
        assert all(taken <= room for taken, room in rooms)
        heads = f"[...document.querySelectorAll({SUMMARY!r} + ' thead th')].filter(e => e.checkVisibility())"
        shown = page.evaluate(
            f"{heads}.map(e => (b => [e.textContent, b.left, b.right])(e.getBoundingClientRect()))"
        )
        assert all(0 <= left < right <= width for _, left, right in shown)
        assert [head for head, _, _ in shown][:4] == ["file", "size", "Mean KLD", "PPL"]


def test_the_first_screen_of_a_phone_judges(page: Page, reports: dict[str, Path]) -> None:
    """Without scrolling down: which files are on the frontier, in a box that fits."""
    page.screen(390, 844)
    page.open(reports["judged"])
    box = "document.getElementById('verdict')"
    edges = page.evaluate(f"(b => [b.left, b.top, b.right, b.bottom])({box}.getBoundingClientRect())")
    assert edges[0] >= 0 and edges[2] <= 390 and edges[1] < edges[3] <= 844
    assert page.evaluate(f"{box}.innerText").startswith("On the frontier of size and divergence: q2_k")


@pytest.mark.parametrize(
    ("name", "width", "dark"),
    [
        ("failing", PHONE, False),
        ("failing", DESK, True),
        ("no gates", PHONE, True),
        ("no gates", DESK, False),
    ],
)
def test_contrast(name: str, width: int, dark: bool, page: Page, reports: dict[str, Path]) -> None:
    page.screen(width, dark=dark)
    page.open(reports[name])
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.evaluate(f"({FAINT})(4.5)") == []
    assert len(page.evaluate(f"({FAINT})(22)")) > 100, "the measure itself must see the page's texts"
    assert page.evaluate(f"({PALE})()") == []


def test_a_click_sorts_and_another_turns_the_order(page: Page, reports: dict[str, Path]) -> None:
    page.screen(DESK)
    page.open(reports["all"])
    sizes = {c.model.recipe: c.model.file_bytes for c in EDGES["all"].candidates}
    click = f"document.querySelector({SUMMARY!r} + ' thead th:nth-child(2) button').click()"
    state = f"document.querySelector({SUMMARY!r} + ' thead th:nth-child(2)').getAttribute('aria-sort')"
    page.evaluate(click)
    assert column(page, SUMMARY, 0) == sorted(sizes, key=sizes.__getitem__)
    assert page.evaluate(state) == "ascending"
    page.evaluate(click)
    assert column(page, SUMMARY, 0) == sorted(sizes, key=sizes.__getitem__, reverse=True)
    assert page.evaluate(state) == "descending"
    ends = f"['thead + tbody', 'tfoot'].map(e => document.querySelector({SUMMARY!r} + ' ' + e).innerText)"
    first, last = page.evaluate(ends)
    assert first.startswith(EDGES["all"].base.label) and last.startswith("noise floor")


def test_what_is_exact_and_what_is_missing_sort_last(page: Page, reports: dict[str, Path]) -> None:
    page.screen(DESK)
    page.open(reports["one"])
    table = "table[aria-label^='All tensors']"
    for click in range(2):
        page.evaluate(f"document.querySelector({table!r} + ' thead th:nth-child(2) button').click()")
        layers = column(page, table, 1)
        empty = [not layer for layer in layers]
        assert empty == sorted(empty), click
        assert any(empty)
        numbers = [int(layer) for layer in layers if layer]
        assert numbers == sorted(numbers, reverse=bool(click))


def test_the_keyboard_reaches_everything(page: Page, reports: dict[str, Path]) -> None:
    page.screen(DESK)
    page.open(reports["all"])
    seen = []
    for _ in range(40):
        page.press("Tab", 9)
        seen.append(
            page.evaluate(
                "(e => e.id || e.closest('th')?.textContent || e.tagName + (e.textContent || '').slice(0, 20))"
                "(document.activeElement)"
            )
        )
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", seen[-1]
        if seen[-1] == "size":
            page.press("Enter", 13, "\r")
            break
    assert seen[0] == "theme"
    assert any(entry.startswith("SUMMARY") for entry in seen)
    assert any(entry.startswith("ASize against") for entry in seen)
    sizes = [c.model.file_bytes for c in EDGES["all"].candidates]
    smallest = min(EDGES["all"].candidates, key=lambda c: c.model.file_bytes).model.recipe
    assert len(set(sizes)) == len(sizes)
    assert column(page, SUMMARY, 0)[0] == smallest


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_button_turns_light_and_dark(dark: bool, page: Page, reports: dict[str, Path]) -> None:
    page.screen(DESK, dark=dark)
    page.open(reports["one"])
    paper = "getComputedStyle(document.body).backgroundColor"
    pressed = "document.getElementById('theme').getAttribute('aria-pressed')"
    before = page.evaluate(paper)
    assert page.evaluate(pressed) == str(dark).lower()
    page.evaluate("document.getElementById('theme').click()")
    assert page.evaluate(paper) != before
    assert page.evaluate(pressed) == str(not dark).lower()
    page.evaluate("document.getElementById('theme').click()")
    assert page.evaluate(paper) == before


def test_it_is_complete_without_scripts(page: Page, reports: dict[str, Path]) -> None:
    page.screen(DESK)
    page.open(reports["all"], scripts=False)
    tree = page.send("Accessibility.getFullAXTree")["nodes"]
    page.send("Emulation.setScriptExecutionDisabled", value=False)
    roles = [node["role"]["value"] for node in tree if not node.get("ignored")]
    names = {node["name"]["value"] for node in tree if not node.get("ignored") and node.get("name")}
    assert roles.count("table") >= 1
    assert roles.count("columnheader") >= 10
    assert not any(role == "button" for role in roles)
    assert any(name.startswith("File size against mean KL divergence") for name in names)
    assert "Dark" not in names


def test_one_drawing_of_each_chart_shows(page: Page, reports: dict[str, Path]) -> None:
    for width, shown in ((PHONE, "phone"), (800, "tablet"), (DESK, "desk")):
        page.screen(width)
        page.open(reports["all"])
        visible = page.evaluate(
            "[...document.querySelectorAll('.desk, .tablet, .phone')]"
            ".filter(e => e.checkVisibility()).map(e => e.className)"
        )
        assert visible == [shown] * 3
        smallest = page.evaluate(
            "Math.min(...[...document.querySelectorAll('svg.chart')].filter(e => e.checkVisibility())"
            ".map(e => e.getBoundingClientRect().width / e.viewBox.baseVal.width))"
        )
        assert smallest > 0.9, "a chart that is scaled down has letters too small to read"


def test_labels_that_are_drawn_do_not_touch(page: Page, reports: dict[str, Path]) -> None:
    for name in ("all", "twenty"):
        for width in (PHONE, DESK):
            page.screen(width)
            page.open(reports[name])
            boxes = page.evaluate(
                "[...document.querySelectorAll('#size + figure text.strong')].filter(e => e.checkVisibility())"
                ".map(e => (b => [b.left, b.top, b.right, b.bottom])(e.getBoundingClientRect()))"
            )
            assert len(boxes) == len(EDGES[name].candidates)
            for i, a in enumerate(boxes):
                for b in boxes[:i]:
                    assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] + 1 or b[3] <= a[1] + 1


def test_on_paper_it_is_light_and_fits(page: Page, reports: dict[str, Path]) -> None:
    page.screen(720, dark=True)
    page.send("Emulation.setEmulatedMedia", media="print")
    page.open(reports["all"])
    assert page.evaluate("document.documentElement.scrollWidth") <= 720
    assert not page.evaluate("document.getElementById('theme').checkVisibility()")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(253, 253, 252)"
