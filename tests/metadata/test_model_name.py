"""One name for a model from its path, in the Hub's cache and elsewhere, for whatever is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bamba_quant.evaluation.models import _labels
from bamba_quant.metadata.model_name import name_of

COMMIT = "0123456789" * 4


@pytest.mark.parametrize(
    ("folder", "name", "repository"),
    [
        ("models--acme--Mill-1B", "Mill-1B", "acme/Mill-1B"),
        ("models--gpt2", "gpt2", "gpt2"),
        ("models--acme--a--b", "a--b", "acme/a--b"),
    ],
)
def test_in_the_hubs_cache(folder: str, name: str, repository: str, tmp_path: Path) -> None:
    snapshot = tmp_path / folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    assert (name_of(snapshot).name, name_of(snapshot).repository) == (name, repository)
    assert name_of(f"{snapshot}/").repository == repository
    (tmp_path / "mine").symlink_to(snapshot)
    assert name_of(tmp_path / "mine").repository == repository


@pytest.mark.parametrize(
    ("stored", "folder", "names"),
    [
        ("models--acme--Mill-1B", "int8", ("Mill-1B-int8", "acme/Mill-1B-int8", "acme/Mill-1B")),
        ("models--gpt2", "a/b", ("gpt2-a-b", "gpt2-a-b", "gpt2")),
    ],
)
def test_in_a_folder_of_a_repository(
    stored: str, folder: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    place = tmp_path / stored / "snapshots" / COMMIT / folder
    place.mkdir(parents=True)
    (tmp_path / "mine").symlink_to(place)
    for path in (place, tmp_path / "mine"):
        found = name_of(path)
        assert (found.name, found.full_name, found.repository) == names
        assert found.commit == COMMIT
    (place / "x.gguf").touch()
    assert name_of(place / "x.gguf").name == "x"


def test_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "Mill-1B"
    (directory / "sub").mkdir(parents=True)
    monkeypatch.chdir(directory)
    assert name_of(".").repository == name_of("sub/..").name == name_of(directory).name == "Mill-1B"
    (tmp_path / "link").symlink_to(directory)
    assert name_of(tmp_path / "link").name == "link"
    assert name_of(tmp_path / "models--a--b" / COMMIT).name == COMMIT
    assert name_of(tmp_path / "x-Q4_K_M.gguf").name == "x-Q4_K_M"


def test_labels_of_an_evaluation(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--acme--Mill-1B" / "snapshots" / COMMIT
    other = tmp_path / "models--other--Mill-1B" / "snapshots" / COMMIT
    for place in (snapshot, other, tmp_path / "blobs"):
        place.mkdir(parents=True)
    (tmp_path / "blobs" / "hash").touch()
    (snapshot / "mill-q4.gguf").symlink_to(tmp_path / "blobs" / "hash")
    assert _labels([snapshot, snapshot / "mill-q4.gguf"]) == ["Mill-1B", "mill-q4"]
    assert _labels([snapshot, other]) == ["acme/Mill-1B", "other/Mill-1B"]
    assert _labels([tmp_path / "a" / "x", tmp_path / "b" / "x"]) == ["a/x", "b/x"]
    assert len(set(_labels([tmp_path / "x", tmp_path / "x.gguf"]))) == 2
