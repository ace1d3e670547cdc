"""The figures of benchmarks.fidelity as a picture: file size against divergence, a line for each kind of file.

    python -m benchmarks.fidelity_chart FIDELITY.json… --text eval.txt --out fidelity.svg

Of several figures for one file the last counts. Directories (int4, fp8) are left out: they keep two matrices in bf16.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bamba_quant.report.charts import canvas
from bamba_quant.report.charts.canvas import Frame
from bamba_quant.report.charts.layout import linear, logarithmic, place_labels, text_width
from bamba_quant.report.markup import Markup
from bamba_quant.report.page import as_svg
from bamba_quant.report.wording import digits, plain, size
from benchmarks.fidelity import SCHEMES, TUNED

Point = tuple[float, float]  # bytes and divergence
KINDS = {
    "plain": "llama-quantize, importance matrix",
    "tuned": "tuned",
    "allocated": "allocated",
    "both": "both",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--text", required=True, help="which of the texts' divergences")
    parser.add_argument("--out", type=Path, default=Path("fidelity.svg"))
    options = parser.parse_args()
    found: dict[str, dict[str, Point]] = {kind: {} for kind in KINDS}
    for row in (row for file in options.results for row in json.loads(file.read_text())):
        if row["type"] not in SCHEMES and "kld" in row:
            kind = TUNED[row["variant"]] if row.get("tune") else row["variant"]
            found[kind][row["type"]] = row["bytes"], row["kld"][options.text]
    options.out.write_text(as_svg(drawn(found)), "utf-8")


def drawn(found: dict[str, dict[str, Point]], width: float = 800.0) -> Markup:
    """The picture of points by kind and type."""
    frame = Frame(width, 480.0, left=62, top=30)
    inner = frame.inner
    every = [point for points in found.values() for point in points.values()]
    x = linear([n_bytes for n_bytes, _ in every], inner.left, inner.right)
    y = logarithmic([kld for _, kld in every], inner.bottom, inner.top)
    parts: list[Markup] = []
    for number, (kind, points) in enumerate(found.items()):
        places = {name: (x(n_bytes), y(kld)) for name, (n_bytes, kld) in points.items()}
        parts.append(canvas.path(sorted(places.values()), f"trace s{number}"))
        for name, place in places.items():
            n_bytes, kld = points[name]
            words = f"{name}, {KINDS[kind]}: {size(n_bytes)}, mean KLD {digits(kld, 3)}"
            parts.append(canvas.marker(number, *place, 5.0, canvas.hint(words)))
        parts.append(canvas.marker(number, inner.right - 225, inner.top + 20 + 20 * number, 5.0))
        parts.append(canvas.text(KINDS[kind], inner.right - 212, inner.top + 24 + 20 * number))
    names = list(found["plain"])
    at = [(x(n_bytes), y(kld)) for n_bytes, kld in found["plain"].values()]
    boxes = place_labels(at, [text_width(name, canvas.FONT) for name in names], 16.0, inner, [])
    labels = [
        canvas.text(name, box.left, box.bottom - 4, class_="strong")
        for name, box in zip(names, boxes or [], strict=bool(boxes))
    ]
    return canvas.picture(
        frame.width,
        frame.height,
        "File size against divergence",
        "Plain, tuned and allocated files of the same types",
        canvas.bottom_axis(frame, x, "file size, MB", lambda n_bytes: plain(n_bytes / 1e6)),
        canvas.left_axis(frame, y, "mean KL divergence from the original, nats (lower is better)", plain),
        canvas.border(frame),
        *parts,
        *labels,
    )


if __name__ == "__main__":
    main()
