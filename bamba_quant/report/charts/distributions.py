"""How loss is spread over tokens: the divergence's histogram and the quantiles of the probability's change."""

from __future__ import annotations

from bamba_quant.evaluation.result import Candidate, Evaluation, Histogram
from bamba_quant.report.charts import canvas
from bamba_quant.report.charts.canvas import Frame
from bamba_quant.report.charts.layout import Box, Scale, linear, shortened, text_width
from bamba_quant.report.markup import Markup, coordinate_text, element
from bamba_quant.report.wording import digits, plain, short_names

_ROW = 58.0
_LONGEST_NAME = 26
_NESTED = (
    ("0_1", "99_9", 5.0, 0.28),
    ("1", "99", 9.0, 0.45),
    ("5", "95", 13.0, 0.65),
    ("25", "75", 17.0, 1.0),
)


def divergence_histograms(evaluation: Evaluation, width: float) -> Markup:
    """A hill a candidate over one logarithmic axis; ticks under it mark median, 99 % and 99.9 %."""
    names, candidates = short_names(evaluation), evaluation.candidates
    frame = Frame(width, 54 + _ROW * len(names), left=_gutter(names, width), right=8, top=0, bottom=46)
    x = _divergence_axis(candidates, frame.inner)
    tallest = max((max(c.kld_histogram.counts, default=0) for c in candidates), default=1) or 1
    rows = [
        _hill(i, name, candidate, x, frame, tallest)
        for i, (name, candidate) in enumerate(zip(names, candidates, strict=True))
    ]
    return canvas.picture(
        frame.width,
        frame.height,
        "Distribution of KL divergence over tokens",
        "; ".join(_divergence_words(name, c) for name, c in zip(names, candidates, strict=True)),
        canvas.bottom_axis(frame, x, "KL divergence of a token, nats", plain, most=5 if frame.narrow else 11),
        *rows,
    )


def probability_strips(evaluation: Evaluation, width: float) -> Markup:
    """A strip a candidate: nested bars for the middle 50, 90, 98 and 99.8 % of tokens, and a tick at the median."""
    names, candidates = short_names(evaluation), evaluation.candidates
    row = 44.0 if width < 500 else 32.0
    frame = Frame(width, 54 + row * len(names), left=_gutter(names, width), right=8, top=0, bottom=46)
    inner = frame.inner
    ends = [100 * c.figures[f"delta_p_{key}"].value for c in candidates for key in ("0_1", "99_9")]
    reach = max(map(abs, ends), default=1.0) or 1.0
    x = linear((-reach, reach), inner.left + 12, inner.right - 12, most=5 if frame.narrow else 9)
    rows = [
        _strip(i, name, candidate, x, inner.top + row * (i + 1) - 14, frame)
        for i, (name, candidate) in enumerate(zip(names, candidates, strict=True))
    ]
    return canvas.picture(
        frame.width,
        frame.height,
        "Change of the correct token's probability",
        "; ".join(_probability_words(name, c) for name, c in zip(names, candidates, strict=True)),
        canvas.bottom_axis(frame, x, "Δp, percentage points", _signed, most=5 if frame.narrow else 9),
        canvas.line(x(0.0), inner.top, x(0.0), inner.bottom, "leader"),
        *rows,
    )


def _divergence_axis(candidates: tuple[Candidate, ...], inner: Box) -> Scale:
    """From the least to the greatest bin that holds a thousandth of a candidate's tokens."""
    edges = [
        edge
        for histogram in (candidate.kld_histogram for candidate in candidates)
        for i, count in enumerate(histogram.counts)
        if count * 1000 >= sum(histogram.counts)
        for edge in histogram.edges[i : i + 2]
        if edge > 0
    ]
    tails = [candidate.figures["kld_99_9"].value for candidate in candidates]
    low, high = min(edges, default=1e-6), max(*edges, *tails, 1e-5) if edges else 1.0
    return Scale(low, high * 1.3, inner.left, inner.right, log=True)


def _hill(index: int, name: str, candidate: Candidate, x: Scale, frame: Frame, tallest: int) -> Markup:
    foot = frame.inner.top + _ROW * (index + 1) - 12
    room = _ROW - 16
    outline = _outline(candidate.kld_histogram, x, foot, room / tallest)
    steps = "L".join(f"{coordinate_text(px)} {coordinate_text(py)}" for px, py in outline)
    quantiles = [
        canvas.group(
            canvas.line(x(value), foot, x(value), foot + 7, f"whisker s{index % canvas.SERIES}"),
            canvas.hint(f"{name}: {words} {digits(value, 3)}"),
        )
        for key, words in (("median", "median"), ("99", "99 %"), ("99_9", "99.9 %"))
        if (value := candidate.figures[f"kld_{key}"].value) > x.low
    ]
    return canvas.group(
        element(
            "path",
            canvas.hint(_divergence_words(name, candidate)),
            d=f"M{steps}Z",
            class_=f"hill s{index % canvas.SERIES}",
        ),
        canvas.line(frame.inner.left, foot, frame.inner.right, foot, "grid"),
        *quantiles,
        _below(candidate.kld_histogram, x, frame, foot),
        _name(name, frame, beside=foot - 6, above=foot - room + 10),
    )  # fmt: skip


def _outline(histogram: Histogram, x: Scale, foot: float, per_token: float) -> list[tuple[float, float]]:
    """The histogram's steps from its first bin inside the axis to its last."""
    points: list[tuple[float, float]] = []
    for i, count in enumerate(histogram.counts):
        left, right = histogram.edges[i], histogram.edges[i + 1]
        if right <= x.low or left >= x.high:
            continue
        top = foot - count * per_token
        points += [(x(max(left, x.low)), top), (x(right), top)]
    if not points:
        return [(x.start, foot)]
    return [(points[0][0], foot), *points, (points[-1][0], foot)]


def _below(histogram: Histogram, x: Scale, frame: Frame, foot: float) -> Markup:
    """What to say in place of a hill that lies left of the axis altogether."""
    if histogram.above or any(
        count and histogram.edges[i + 1] > x.low for i, count in enumerate(histogram.counts)
    ):
        return Markup()
    words = f"every token below {plain(float(f'{x.low:.0e}'))}"
    return canvas.text(words, frame.inner.left + 6, foot - (6 if not frame.narrow else 10), class_="tick")


def _strip(index: int, name: str, candidate: Candidate, x: Scale, middle: float, frame: Frame) -> Markup:
    bars = []
    for low, high, thickness, opacity in _NESTED:
        ends = [100 * candidate.figures[f"delta_p_{key}"].value for key in (low, high)]
        left, right = x(ends[0]), x(ends[1])
        box = Box(left, middle - thickness / 2, max(right, left + 1), middle + thickness / 2)
        bars.append(canvas.rectangle(box, f"bar s{index % canvas.SERIES}", opacity=opacity))
    median = x(100 * candidate.figures["delta_p_median"].value)
    return canvas.group(
        canvas.hint(_probability_words(name, candidate)),
        *bars,
        canvas.line(median, middle - 11, median, middle + 11, "median"),
        _name(name, frame, beside=middle + 4, above=middle - 15),
    )


def _gutter(names: tuple[str, ...], width: float) -> float:
    """Room left of the plot for names; a narrow picture has them above the rows instead."""
    if width < 500:
        return 8.0
    return 16 + max((text_width(shortened(name, _LONGEST_NAME), canvas.FONT) for name in names), default=0.0)


def _name(name: str, frame: Frame, *, beside: float, above: float) -> Markup:
    words = shortened(name, _LONGEST_NAME)
    if frame.narrow:
        return canvas.text(words, frame.inner.left + 2, above, class_="strong halo")
    return canvas.text(words, frame.inner.left - 10, beside, anchor="end", class_="strong")


def _divergence_words(name: str, candidate: Candidate) -> str:
    found = {key: digits(candidate.figures[f"kld_{key}"].value, 2) for key in ("median", "99", "99_9")}
    return (
        f"{name}: median {found['median']}, 99 % of tokens below {found['99']}, 99.9 % below {found['99_9']}"
    )


def _probability_words(name: str, candidate: Candidate) -> str:
    low, high = (digits(100 * candidate.figures[f"delta_p_{key}"].value, 2) for key in ("5", "95"))
    return f"{name}: 90 % of tokens change by {low} to {high} percentage points"


def _signed(value: float) -> str:
    return f"+{plain(value)}" if value > 0 else plain(value).replace("-", "−")
