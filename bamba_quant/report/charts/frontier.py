"""File size against predicted divergence: the best that allocation finds at each size, and the plain types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bamba_quant.report.charts import canvas
from bamba_quant.report.charts.canvas import Frame
from bamba_quant.report.charts.layout import linear, logarithmic, place_labels, text_width
from bamba_quant.report.markup import Markup
from bamba_quant.report.wording import digits, plain, size

if TYPE_CHECKING:
    from bamba_quant.calibration.allocation import Allocation, Point

_TITLE = "File size against predicted divergence"


def frontier(allocation: Allocation, width: float = 800.0) -> Markup:
    """A line for the frontier, a mark for every plain type and one for what was chosen."""
    frame = Frame(width, 480.0, left=62, top=30)
    inner = frame.inner
    marked = [*allocation.others, allocation.allocated]
    names = [*(point.name for point in allocation.others), allocation.recipe.name]
    every = [*marked, *allocation.frontier]
    x = linear([point.n_bytes for point in every], inner.left, inner.right)
    y = logarithmic([point.predicted for point in every], inner.bottom, inner.top)
    places = [(x(point.n_bytes), y(point.predicted)) for point in marked]
    boxes = place_labels(places, [text_width(name, canvas.FONT) for name in names], 16.0, inner, [])
    labels = [
        canvas.text(name, box.left, box.bottom - 4, class_="strong")
        for name, box in zip(names, boxes or [], strict=bool(boxes))
    ]
    last = len(marked) - 1
    marks = [
        canvas.marker(3 if i == last else 0, *place, 7.0 if i == last else 5.0, canvas.hint(hint))
        for i, (place, hint) in enumerate(zip(places, _hints(names, marked), strict=True))
    ]
    return canvas.picture(
        frame.width,
        frame.height,
        _TITLE,
        "; ".join(_hints(names, marked)),
        canvas.bottom_axis(frame, x, "file size, MB", lambda n_bytes: plain(n_bytes / 1e6)),
        canvas.left_axis(frame, y, "predicted mean KL divergence, nats (lower is better)", plain),
        canvas.border(frame),
        canvas.path([(x(point.n_bytes), y(point.predicted)) for point in allocation.frontier], "trace s1"),
        *marks,
        *labels,
    )


def _hints(names: Sequence[str], points: Sequence[Point]) -> list[str]:
    return [
        f"{name}: {size(point.n_bytes)}, predicted KLD {digits(point.predicted, 3)}"
        for name, point in zip(names, points, strict=True)
    ]
