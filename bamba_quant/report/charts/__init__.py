"""The report's pictures: pure functions from an evaluation to SVG."""
