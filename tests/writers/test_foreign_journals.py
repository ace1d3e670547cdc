"""A journal that did not come from this user's run makes nothing be removed or replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bamba_quant.embedded import embedded_model
from bamba_quant.errors import OutputError
from bamba_quant.writers import journal, resumable
from tests.writers.test_quantized import write


@pytest.mark.parametrize("options", [{"overwrite": True}, {"resume": True}, {}])
@pytest.mark.parametrize("place", ["out.partial"])
@pytest.mark.parametrize("name", ["thesis.txt", "runs"])
def test_a_journal_does_not_make_other_files_a_runs(
    name: str, place: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """A directory with an empty journal may be a download."""
    (tmp_path / place).mkdir()
    (tmp_path / place / journal.NAME).touch()
    (tmp_path / place / "config.json").write_text("mine")
    if name == "runs":
        (tmp_path / place / name).mkdir()
        name = "runs/x"
    (tmp_path / place / name).write_text("mine")
    before = sorted((tmp_path / place).rglob("*"))
    with pytest.raises(OutputError, match=rf"not part of a model[\s\S]*{place}[\s\S]*{name[:4]}"):
        write(embedded_model(), tmp_path / "out", **options)
    assert sorted((tmp_path / place).rglob("*")) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["out", "out.partial"])
def test_a_journal_of_another_user_is_not_followed(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / place / ".bamba-quant-old").mkdir(parents=True)
    (tmp_path / place / journal.NAME).touch()
    monkeypatch.setattr(resumable, "is_own", lambda *_: False)
    action = "move it away" if place == "out.partial" else f"remove {journal.NAME}"
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(OutputError, match=rf"another user's interrupted run[\s\S]*fix: .*{action}"):
            write(embedded_model(), tmp_path / "out", **options)
    assert (tmp_path / place / ".bamba-quant-old").is_dir() and (tmp_path / place / journal.NAME).exists()
