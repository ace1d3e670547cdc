"""A release uploaded to a server that speaks the Hub's paths, by huggingface_hub's client, and read back."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

import bamba_quant
from bamba_quant.report.json_report import read_report
from tests.hub.server import Hub, serving
from tests.hub.uploads import UploadHandler, stored
from tests.release.conftest import REPOSITORY, Material, published
from tests.release.resolving import llama_file
from tests.support.command import run

TOKEN = "hf_writer"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The client reads its environment when it is imported, so its constants are set."""
    with serving(UploadHandler) as server:
        server.tokens = {TOKEN}
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the server speaks LFS
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def directory(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished release."""
    subprocess.run(["cp", "-a", finished, tmp_path / "release"], check=True)
    return tmp_path / "release"


def test_upload_and_download_again(directory: Path, material: Material, hub: Hub, tmp_path: Path) -> None:
    (directory / "mini-GGUF" / "mini-F16.gguf").write_bytes(b"of an earlier preset")
    hub.failures = [501]  # which the client does not try again
    refused = material.make(directory, "--upload", REPOSITORY, code=2)
    assert (
        "error: the upload failed" in refused.stderr and "what was sent is not sent again" in refused.stderr
    )
    sent = set(stored(hub))
    done = material.make(directory, "--upload", REPOSITORY)
    puts = [each.path.rpartition("/")[2] for each in hub.sent("PUT")]
    assert sent and all(puts.count(digest) == 1 for digest in sent)
    assert set(hub.repositories) == {f"{REPOSITORY}-GGUF", f"{REPOSITORY}-FP8"}
    assert all(repository.private for repository in hub.repositories.values())
    assert done.stdout.count(f"{hub.endpoint}/{REPOSITORY}-") == 2
    expected = {name: sha256 for name, sha256 in published(directory).items() if "F16" not in name}
    found = {
        f"mini-{kind}/{name}": hashlib.sha256(content).hexdigest()
        for kind in ("GGUF", "FP8")
        for name, content in _files(hub, f"{REPOSITORY}-{kind}").items()
        if name != ".gitattributes"
    }
    assert found == expected
    before = len(hub.sent("PUT"))
    material.make(directory, "--upload", REPOSITORY)
    assert len(hub.sent("PUT")) == before and len(hub.repositories[f"{REPOSITORY}-GGUF"].commits) == 2

    card = _files(hub, f"{REPOSITORY}-GGUF")["README.md"].decode()
    assert f"llama-cli -hf {REPOSITORY}-GGUF:Q4_K_M" in card and f"hf.co/{REPOSITORY}-GGUF:Q4_K_M" in card
    _same_figures_from_the_hub(directory, material, hub)


def _same_figures_from_the_hub(directory: Path, material: Material, hub: Hub) -> None:
    """The files that the cards name, loaded by these names, lose what the cards say."""
    listed = sorted(_files(hub, f"{REPOSITORY}-GGUF"))
    chosen = llama_file(listed, "Q4_K_M")
    assert chosen == "mini-h-Q4_K_M.gguf"
    gguf = huggingface_hub.hf_hub_download(f"{REPOSITORY}-GGUF", chosen)
    fp8 = huggingface_hub.snapshot_download(f"{REPOSITORY}-FP8")
    base, text = material.place / "mini", material.place / "text.txt"
    again = bamba_quant.evaluate(base, [gguf, fp8], text, ctx=64, chunks=36)
    reported = read_report(directory / "report" / "report.json")
    expected = [reported.candidates[1], reported.candidates[2]]
    assert [each.model.variant for each in expected] == ["q4_k_m_h", "fp8-dynamic"]
    for one, other in zip(again.candidates, expected, strict=True):
        assert {key: figure.value for key, figure in one.figures.items()} == {
            key: figure.value for key, figure in other.figures.items()
        }


def test_what_the_hub_refuses(
    directory: Path, material: Material, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    refused = material.make(directory, "--upload", REPOSITORY, code=2)
    assert "error: the upload failed" in refused.stderr and "401" in refused.stderr
    assert "hf auth login" in refused.stderr and "Traceback" not in refused.stderr
    for name in ("mini", "a/b/c", "org/na me", "org/.."):
        assert "not a name of a repository" in material.make(directory, "--upload", name, code=2).stderr
    long, preset = "org/" + "m" * 91, tmp_path / "p.toml"  # short enough with -GGUF, not with -W4A16
    preset.write_text("schemes = ['w4a16-g128']\nimatrix_chunks = 0\nctx = 64\nchunks = 36\n")
    refused = material.make(directory / "new", "--preset", preset, "--upload", long, code=2)
    assert "not a name of a repository" in refused.stderr and not (directory / "new").exists()
    hub.shutdown()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the upload failed" in material.make(directory, "--upload", REPOSITORY, code=2).stderr


def test_the_model_may_be_a_name(material: Material, hub: Hub, tmp_path: Path) -> None:
    """A dry run reads its headers alone; the cards name it as the base."""
    hub.add("org/base", {file.name: file.read_bytes() for file in (material.place / "mini").iterdir()})
    words = [
        "org/base" if word == material.place / "mini" else word for word in material.words(tmp_path / "r")
    ]
    at = words.index("--base-model")
    told = run(*words[:at], *words[at + 2 :], "--dry-run")
    assert "base-h-Q4_K_M.gguf" in told.stdout
    assert not any(
        "model.safetensors" in str(file) for file in (tmp_path / "cache").rglob("*") if file.is_file()
    )


def _files(hub: Hub, name: str) -> dict[str, bytes]:
    repository = hub.repositories[name]
    return repository.commits[repository.refs["main"]]
