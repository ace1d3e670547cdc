"""Figures to JSON, Markdown and HTML: for programs, for a CI summary and for people."""
