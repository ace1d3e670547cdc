"""Commands and functions with names of models, against a server on loopback, through huggingface_hub's own client."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from huggingface_hub import constants
from safetensors.torch import load_file

import bamba_quant
from bamba_quant.checkpoint import open_checkpoint, read_tensor
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import CheckpointError
from bamba_quant.hub import local_path
from bamba_quant.metadata.model_name import name_of
from tests.hub.server import Files, Hub
from tests.support.command import run

NAME = "acme/Mill-4M"


@pytest.fixture(scope="module")
def files() -> Files:
    """bamba-mini's, and what nobody needs."""
    model = embedded_model()
    return {file.name: file.read_bytes() for file in model.iterdir()} | {
        "pytorch_model.bin": b"no",
        "a.png": b"",
    }


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return bamba_quant.convert(embedded_model(), "q4_k_m", tmp_path_factory.mktemp("gguf"))[0].read_bytes()


def test_every_form_of_a_name(hub: Hub, files: Files, gguf: bytes, tmp_path: Path) -> None:
    repository = hub.add(NAME, {"config.json": b"old"})
    old = repository.refs["main"]
    new = repository.commit({**files, "x-Q4_K_M.gguf": gguf, **{f"sub/{k}": v for k, v in files.items()}})
    repository.refs |= {"v1": old, "refs/pr/1": new}
    snapshot = tmp_path / "cache" / "models--acme--Mill-4M" / "snapshots"
    for text, path in (
        (NAME, new),
        (f"hf://{NAME}", new),
        (Path(f"hf://{NAME}"), new),
        (f"{NAME}@{new}", new),
        (f"{NAME}@refs/pr/1", new),
        (f"{NAME}@v1", old),
        (f"{NAME}@{old}", old),
        (f"{NAME}/sub", f"{new}/sub"),
        (f"{NAME}/config.json", f"{new}/config.json"),
        (f"{NAME}/x-Q4_K_M.gguf", f"{new}/x-Q4_K_M.gguf"),
        (f"{NAME}:q4_k_m", f"{new}/x-Q4_K_M.gguf"),
    ):
        assert local_path(text) == snapshot / path, text
    assert (snapshot / new / "x-Q4_K_M.gguf").read_bytes() == gguf
    for name, content in files.items():
        for place in (snapshot / new, snapshot / new / "sub"):
            assert (place / name).exists() == (name not in ("pytorch_model.bin", "a.png"))
            assert not (place / name).exists() or (place / name).read_bytes() == content
    assert (snapshot / old / "config.json").read_bytes() == b"old"
    assert name_of(snapshot / new / "sub").repository == NAME
    before = len(hub.fetched())
    assert local_path(NAME) == snapshot / new and len(hub.fetched()) == before


def test_headers_come_by_range(
    hub: Hub, files: Files, gguf: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bamba_quant.hub.snapshot._HEADER_BYTES", 1 << 14)
    hub.add(NAME, files)
    hub.add("acme/Mill-4M-GGUF", {"x-Q4_K_M.gguf": gguf})
    torch.save(load_file(embedded_model() / "model.safetensors"), tmp_path / "pytorch_model.bin")
    pickled = (tmp_path / "pytorch_model.bin").read_bytes()
    hub.add("acme/old", {"config.json": files["config.json"], "pytorch_model.bin": pickled})
    local = run("convert", embedded_model(), "--outtype", "q4_k_m", "--dry-run", "--json", "-o", "x.gguf")
    planned = run("convert", NAME, "--outtype", "q4_k_m", "--dry-run", "--json", "-o", "x.gguf")
    assert json.loads(planned.stdout)["plan"] == json.loads(local.stdout)["plan"]
    sha = hub.repositories[NAME].refs["main"]
    assert json.loads(planned.stdout)["model"] == f"hf://{NAME}@{sha}"
    run("int4", NAME, "out", "--dry-run")
    run("allocate", NAME, "--target-bpw", "5")
    assert run("inspect", NAME).stdout.startswith(
        f"hf://{NAME}@{sha}: BambaForCausalLM (Hugging Face)\n51 tensors"
    )
    assert "51 tensors" in run("inspect", "acme/Mill-4M-GGUF").stdout
    assert "51 tensors" in run("inspect", "acme/old").stdout
    run("convert", f"{NAME}/config.json", "--outtype", "q8_0", "--dry-run")
    weights = [each for each in hub.sent() if "/lfs/" in each.path]
    assert {each.path.rpartition("/")[2] for each in weights} == {
        "model.safetensors", "x-Q4_K_M.gguf", "pytorch_model.bin",
    }  # fmt: skip
    assert all(each.range for each in weights)
    for name, most in (("model.safetensors", 200_000), ("x-Q4_K_M.gguf", 1_200_000)):
        assert sum(each.sent for each in weights if each.path.endswith(name)) < most
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".bin") == ["cache"]


def test_what_stands_for_weights_is_never_read_as_weights(hub: Hub, files: Files, tmp_path: Path) -> None:
    """A path of a dry run that is used again, in this process or in a later one."""
    hub.add(NAME, files)
    place = local_path(NAME, headers=True)
    expected = open_checkpoint(embedded_model()).tensors
    for name, tensor in list(open_checkpoint(place).tensors.items())[:3]:
        np.testing.assert_array_equal(read_tensor(tensor), read_tensor(expected[name]))
    copied = shutil.copytree(place, tmp_path / "copied")
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        open_checkpoint(copied)
    assert local_path(NAME, headers=True) == place


def test_two_models_of_one_repository(hub: Hub, files: Files) -> None:
    """The one in a folder comes first: its view makes the directories of the other's."""
    hub.add(NAME, {**files, **{f"sub/{name}": content for name, content in files.items()}})
    for name in (f"{NAME}/sub", NAME, f"{NAME}/sub"):
        assert len(open_checkpoint(local_path(name, headers=True)).tensors) == 51


def test_outputs_have_the_right_names_and_stay_out_of_the_cache(
    hub: Hub, files: Files, gguf: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.add(NAME, {**files, "README.md": b"# No front matter\n"})
    hub.add("acme/Mill-4M-GGUF", {"x-BF16.gguf": gguf})
    text = tmp_path / "text.txt"
    text.write_text("The old mill stood by the river. " * 200)
    run("convert", NAME, "--outtype", "q8_0")
    fields = GGUFReader("Mill-4M-Q8_0.gguf").fields
    assert (
        fields["general.name"].contents() == "Mill 4M" and fields["general.organization"].contents() == "Acme"
    )
    run("convert", "acme/Mill-4M-GGUF", "--outtype", "q8_0", "--allow-requantize")
    run("fp8", NAME, "fp8")
    assert "base_model: acme/Mill-4M" not in (tmp_path / "fp8" / "README.md").read_text()  # the card's own
    made = {"Mill-4M-Q8_0.gguf", "x-Q8_0.gguf", "fp8", "text.txt", "cache"}
    assert {path.name for path in tmp_path.iterdir()} == made
    out = run("evaluate", NAME, "Mill-4M-Q8_0.gguf", "--text", text, "--ctx", "64", "--chunks", "2", "--json")
    base = json.loads(out.stdout)["base"]
    assert base["label"] == "Mill-4M" and "models--acme--Mill-4M" in base["path"]
    assert bamba_quant.inspect(NAME).architecture == "BambaForCausalLM"
    run("imatrix", NAME, "--text", text, "--ctx", "64")
    run("export", f"{NAME}-GGUF", "exported")
    assert not [path for path in (tmp_path / "cache").rglob("*.gguf") if "GGUF" not in str(path)]


@pytest.mark.parametrize("offline", [False, True])
def test_a_private_repository(hub: Hub, files: Files, monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    hub.tokens |= {"mine", "weak", "other"}
    hub.add(NAME, files, private=True, readers={"mine", "weak"}, forbidden={"weak"})
    for token, message in (
        ("", "the Hub has no such repository or it is private"),
        ("other", "the Hub has no such repository or it is private"),
        ("wrong", "the Hub does not accept the token"),
        ("weak", "the token may not read the repository"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        failed = run("inspect", NAME, code=2)
        assert message in failed.stderr and "HF_TOKEN" in failed.stderr, failed.stderr
    monkeypatch.setenv("HF_TOKEN", "mine")
    run("inspect", NAME)
    place = local_path(NAME)
    # The token goes to the Hub, and not to the host where large files are.
    assert {each.token for each in hub.requests if "/lfs/" in each.path} == {""}
    if offline:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        before = len(hub.requests)
        assert local_path(NAME) == place and len(hub.requests) == before
        with pytest.raises(CheckpointError, match="unset HF_HUB_OFFLINE"):
            local_path("acme/other")
        shutil.rmtree(place.parents[1] / "trees")  # as older clients and llama.cpp leave the cache
        assert local_path(NAME) == place


def test_a_gated_repository(hub: Hub, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.tokens |= {"asked", "granted"}
    hub.add(NAME, files, gated=True, readers={"granted"})
    for token, login in (("", True), ("asked", False)):
        monkeypatch.setenv("HF_TOKEN", token)
        for arguments in (("inspect", NAME), ("convert", NAME, "-o", "x.gguf")):
            failed = run(*arguments, code=2).stderr
            assert (
                f"accept its terms at {hub.endpoint}/{NAME}" in failed
                and ("hf auth login" in failed) == login
            )
    monkeypatch.setenv("HF_TOKEN", "granted")
    assert (local_path(NAME) / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_connections_that_break(hub: Hub, files: Files) -> None:
    """Every 3 MB, also while a header is read: the download goes on, and what arrived is not sent again."""
    hub.add(NAME, files)
    hub.drop_every = 3_000_000
    hub.failures = [503, 429]
    assert (local_path(NAME) / "model.safetensors").read_bytes() == files["model.safetensors"]
    sent = [each for each in hub.sent() if "/lfs/" in each.path]
    assert len(sent) == 3 and sum(each.sent for each in sent) < len(files["model.safetensors"]) + 2 * (
        1 << 20
    )


def test_a_server_that_is_not_there_or_fails(
    hub: Hub, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, files)
    hub.failures = [500] * 100
    failed = run("convert", NAME, "-o", tmp_path / "x.gguf", code=2).stderr
    assert "Hub" in failed and "again" in failed, failed
    hub.failures = []
    hub.drop_every = 1000  # never gets any further
    failed = run("convert", NAME, "-o", tmp_path / "x.gguf", code=2).stderr
    assert "broke off" in failed and "HF_ENDPOINT" in failed, failed
    hub.drop_every = None
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    failed = run("convert", "acme/other", "-o", tmp_path / "x.gguf", code=2).stderr
    assert "there is no such file or directory, and the Hub cannot be reached" in failed, failed
    assert not [path for path in tmp_path.iterdir() if path.name != "cache"]


def test_what_is_not_there(hub: Hub, files: Files) -> None:
    hub.add(NAME, {**files, "x-Q8_0.gguf": b"", "x-Q6_K.gguf": b""})
    hub.add("acme/outside", {"../x.gguf": b"", "/y.gguf": b""})
    for text, message in (
        (f"{NAME}@v9", "the repository has no such revision"),
        (f"{NAME}/y.gguf", "did you mean x-Q8_0.gguf or x-Q6_K.gguf?"),
        (f"{NAME}:Q4_0", "no GGUF file of the repository has that tag"),
        ("acme/other", "the Hub has no such repository"),
        ("acme/outside", "the repository has no such model"),
        ("acme/a--b", "not a name of a model on the Hub"),
        ("x.gguf", "org/name of a model on the Hub"),
    ):
        assert message in run("inspect", text, code=2).stderr, text


def test_full_disks(hub: Hub, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, files)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("bamba_quant.hub.snapshot.shutil.disk_usage", lambda path: usage(9, 9, 1000))
    failed = run("convert", NAME, code=2).stderr
    assert "1,000 bytes free" in failed and "HF_HOME" in failed and "--stream-from-hub" in failed
    monkeypatch.undo()


def test_a_disk_that_fills_while_a_file_is_fetched(
    hub: Hub, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, files)

    def fail(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    failed = run("inspect", NAME, code=2).stderr
    assert "the disk is full" in failed and "HF_HOME" in failed


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'bamba-quant[hub]'" in run("inspect", NAME, code=2).stderr


def test_the_environments_variables(hub: Hub, files: Files, tmp_path: Path) -> None:
    """In a process of its own, in which huggingface_hub reads HF_ENDPOINT, HF_TOKEN and HF_HOME itself."""
    hub.tokens |= {"mine"}
    hub.add(NAME, files, private=True, readers={"mine"})
    environment = {**os.environ, "HF_TOKEN": "mine", "HF_HOME": str(tmp_path / "elsewhere")}
    command = [sys.executable, "-m", "bamba_quant_cli", "convert", NAME, "--outtype", "bf16"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "Mill-4M-BF16.gguf\n", done.stderr
    assert (tmp_path / "elsewhere" / "hub" / "models--acme--Mill-4M").is_dir()
