"""A small release of the embedded model, made once by the command, and what it was made from."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from bamba_quant.embedded import embedded_model
from bamba_quant_cli.demo import help_text
from tests.support.command import Completed, run

PRESET = """
types = ["q8_0", "q4_k_m_h"]
schemes = ["fp8"]
imatrix_chunks = 2
ctx = 64
chunks = 36
[gates]
default = { max-kld = 2.0 }
q8_0 = { max-kld = 0.1 }
"""
CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\ntags:\n- base\n---\n# Mini\n"
REPOSITORY = "some-org/mini"


@dataclass(frozen=True)
class Material:
    """The model, the preset and the texts of a release."""

    place: Path

    def words(self, directory: Path, *more: object) -> list[object]:
        """A command line that makes the release in ``directory``."""
        text, calibrate = self.place / "text.txt", self.place / "calibration.txt"
        return [
            "release", self.place / "mini", directory, "--preset", self.place / "preset.toml", "--text", text,
            "--calibrate", calibrate, "--base-model", REPOSITORY, *more,
        ]  # fmt: skip

    def make(self, directory: Path, *more: object, code: int = 0) -> Completed:
        return run(*self.words(directory, *more), code=code)


def published(directory: Path) -> dict[str, str]:
    """SHA-256 of every file of a release that is for others, without its state and its report, which tells times."""
    return {
        file.relative_to(directory).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for folder in sorted(directory.glob("mini-*"))
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    place = tmp_path_factory.mktemp("material")
    shutil.copytree(embedded_model(), place / "mini", ignore=shutil.ignore_patterns("README.md"))
    (place / "mini" / "README.md").write_text(CARD)
    (place / "preset.toml").write_text(PRESET)
    words = help_text()
    (place / "text.txt").write_text(words[:12_000])
    (place / "calibration.txt").write_text(words[12_000:40_000])
    return Material(place)


@pytest.fixture(scope="session")
def finished(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release that an undisturbed run makes."""
    directory = tmp_path_factory.mktemp("finished") / "release"
    material.make(directory)
    return directory
