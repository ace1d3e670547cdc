"""A page with the report's looks: one file that holds all it shows and makes no network request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files

from bamba_quant.report.markup import Markup, element, joined, unbroken

_WIDTHS = {"desk": 1132.0, "tablet": 600.0, "phone": 328.0}  # page.css shows the one that fits
# No script, style or picture from elsewhere can run or load, even if a name in the report contains markup.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def as_page(title: str, lead: str, content: Sequence[Markup], footer: str = "") -> str:
    """The whole HTML document: a heading, ``lead`` below it, a button for light and dark, and ``content``."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", _packaged("page.css")),
    )
    body = element(
        "body",
        element(
            "header",
            element("div", element("h1", title), element("p", lead, class_="lead") if lead else Markup()),
            element("button", "Dark", id="theme", type="button", aria_pressed="false", hidden=True),
        ),
        element("main", *content),
        element("footer", footer),
        _patterns(),
        element("script", _packaged("page.js")),
    )
    return str(joined((Markup("<!doctype html>\n"), element("html", head, body, lang="en"), Markup("\n"))))


def as_svg(picture: Markup) -> str:
    """A picture as a file of its own."""
    style = element("style", _packaged("page.css"))
    opened = '<svg xmlns="http://www.w3.org/2000/svg"'
    return str(picture).replace("<svg", opened, 1).replace("><title>", f">{style}<title>", 1) + "\n"


def every_width(draw: Callable[[float], Markup]) -> Markup:
    """A chart drawn for every width, since one scaled down to a phone could not be read."""
    return joined(element("div", draw(width), class_=name) for name, width in _WIDTHS.items())


def figure(picture: Markup, caption: str) -> Markup:
    """A picture over its caption."""
    return element("figure", picture, element("figcaption", unbroken(caption)))


def _patterns() -> Markup:
    """The hatching of exact tensors, which all charts refer to."""
    stroke = element("path", d="M0 6L6 0", stroke="currentColor", stroke_opacity=0.35)
    pattern = element("pattern", stroke, id="exact", width=6, height=6, patternUnits="userSpaceOnUse")
    return element("svg", pattern, width=0, height=0, aria_hidden="true", style="position:absolute")


def _packaged(name: str) -> Markup:
    return Markup((files("bamba_quant.report") / name).read_text("utf-8"))
