"""Pages of the site that are made: the start page from README.md, and an API page for each package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
TOP = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not files of docs/."""
    for page, source in TOP.items():
        if (ROOT / source).exists():
            files.append(File.generated(config, page, content=_from_top((ROOT / source).read_text("utf-8"))))
    for page, content in _api_pages().items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Link to the page where a file of docs/ links to the file beside docs/."""
    for page, source in TOP.items():
        markdown = markdown.replace(f"](../{source}", f"]({page}")
    return markdown


def _from_top(text: str) -> str:
    """``text`` of a file beside docs/ with its links as they are from within docs/."""
    for page, source in TOP.items():
        text = text.replace(f"]({source}", f"]({page}")
    return re.sub(r"\]\(docs/", "](", text)


def _api_pages() -> dict[str, str]:
    packages = sorted(path.parent.name for path in (ROOT / "bamba_quant").glob("*/__init__.py"))
    pages = {f"api/{name}.md": f"# {name}\n\n::: bamba_quant.{name}\n" for name in packages}
    alone = "    options:\n      show_submodules: false\n"
    pages["api/bamba_quant.md"] = (
        f"# bamba_quant\n\n::: bamba_quant\n{alone}\n::: bamba_quant.api\n\n::: bamba_quant.errors\n"
    )
    pages["api/bamba_reference.md"] = "# bamba_reference\n\n::: bamba_reference\n"
    return pages
