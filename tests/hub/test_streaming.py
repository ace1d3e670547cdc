"""--stream-from-hub: the bytes are those of a local conversion, and the disk never holds more than a shard or two."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import save_file

from bamba_quant.embedded import embedded_model
from bamba_quant.writers import shards
from bamba_quant_cli.interrupts import Interrupted
from tests.hub.server import Hub
from tests.support.command import run

NAME = "acme/Mill-4M"
COUNT = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bamba-mini in shards: neighbours, matrices that are measured together, in different ones; and a tied copy."""
    source = embedded_model()
    directory = tmp_path_factory.mktemp("cache") / "models--acme--Mill-4M" / "snapshots" / "0123"
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    with safe_open(source / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in sorted(set(file.keys()) - {"lm_head.weight"})}
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(COUNT)]
    for number, (name, tensor) in enumerate(tensors.items()):
        parts[number * COUNT // len(tensors)][name] = tensor
    parts[0]["model.embed_tokens.weight"] = embedding = tensors["model.embed_tokens.weight"]
    parts[-1]["lm_head.weight"] = embedding.clone()
    for part in parts[1:]:
        part.pop("model.embed_tokens.weight", None)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weight_map = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{COUNT:05d}.safetensors"
        save_file(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


COMMANDS: Mapping[str, tuple[str, ...]] = {
    "convert": ("convert", "--outtype", "q4_k_m"),
    "split": ("convert", "--outtype", "q8_0", "--split-max-size", "2M"),
    "fp8": ("fp8", "--scheme", "tensor"),
    "int4": ("int4",),
    "fp4": ("fp4",),
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_the_same_bytes_with_one_shard_at_a_time(
    hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    hub.add(NAME, contents(model))
    for name in ("local", "hub"):
        (tmp_path / name).mkdir()
    command, *options = COMMANDS[kind]
    file = "out.gguf" if command == "convert" else "out"
    outputs = {name: tmp_path / name / file for name in ("local", "hub")}
    target = ["-o"] if command == "convert" else []
    run(command, model, *target, outputs["local"], *options)
    place = outputs["hub"].with_name(outputs["hub"].name + ".hub")
    most = 0
    ready = shards.ShardStream.ready

    def watched(self: shards.ShardStream, group: shards.Group) -> Any:
        nonlocal most
        most = max(most, len(list(place.glob("*.safetensors"))))
        return ready(self, group)

    monkeypatch.setattr(shards.ShardStream, "ready", watched)
    run(command, NAME, *target, outputs["hub"], *options, "--stream-from-hub")
    assert contents(tmp_path / "hub") == contents(tmp_path / "local")
    assert not place.exists()
    fetched = [name for name in hub.fetched() if name.endswith(".safetensors")]
    assert set(fetched) == {f"model-0000{n}-of-00004.safetensors" for n in range(1, 5)}
    assert most <= 3  # the first waits for its tied copy in the last, one is used, one is fetched meanwhile
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize(("kind", "killed"), [("convert", True), ("convert", False), ("fp8", True)])
def test_an_interrupted_run_goes_on(
    hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, killed: bool
) -> None:
    """After a kill the shards that were there are used, after an interrupt nothing but finished parts is kept."""
    hub.add(NAME, contents(model))
    monkeypatch.chdir(tmp_path)
    command, *options = COMMANDS[kind]
    outfile = tmp_path / ("out.gguf" if command == "convert" else "out")
    arguments = [
        command,
        NAME,
        *(["-o"] if command == "convert" else []),
        outfile,
        *options,
        "--stream-from-hub",
    ]
    with monkeypatch.context() as patch:
        ready, calls = shards.ShardStream.ready, 0

        def stopped(self: shards.ShardStream, group: shards.Group) -> Any:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise Interrupted(signal.SIGINT)
            return ready(self, group)

        patch.setattr(shards.ShardStream, "ready", stopped)
        if killed:
            patch.setattr(shards.ShardStream, "__exit__", lambda *error: None)
        run(*arguments, code=130)
    assert not outfile.exists()
    assert (tmp_path / f"{outfile.name}.hub").exists() == killed
    assert "continue with --resume" in run(*arguments, code=2).stderr
    hub.requests.clear()
    run(*arguments, "--resume")
    # The last, and the first for its tied copy.
    whole = [each for each in hub.sent() if "/lfs/" in each.path and not each.range]
    assert len(whole) == (0 if killed else 2)
    assert {path.name for path in tmp_path.iterdir()} == {outfile.name, "cache"}
    run(command, model, *(["-o"] if command == "convert" else []), tmp_path / "x", *options)
    made = outfile.read_bytes() if outfile.is_file() else contents(outfile)
    assert made == ((tmp_path / "x").read_bytes() if outfile.is_file() else contents(tmp_path / "x"))


def test_what_does_not_go_together(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.add(NAME, contents(model))
    for arguments, message in (
        (["convert", model, "--stream-from-hub"], "is for models of the Hub"),
        (
            ["convert", NAME, "--stream-from-hub", "--tune", "self", "--outtype", "q4_k_m"],
            "--tune reads the weights",
        ),
        (["int4", NAME, "out", "--stream-from-hub", "--calibrate", "x"], "--calibrate reads the weights"),
        (
            [
                "convert",
                NAME,
                "-o",
                tmp_path / "y.gguf",
                "--stream-from-hub",
                "--resume",
                "--split-max-size",
                "2M",
            ],
            "only one GGUF file",
        ),
    ):
        assert message in run(*arguments, code=2).stderr
    foreign = tmp_path / "x.gguf.hub"
    foreign.mkdir()
    (foreign / "mine").touch()
    failed = run("convert", NAME, "-o", tmp_path / "x.gguf", "--stream-from-hub", code=2).stderr
    assert "is not that of an interrupted run" in failed and (foreign / "mine").exists()


@pytest.mark.parametrize(
    ("kind", "said"),
    [("convert", "the model is gated"), ("fp8", "the Hub cannot be reached"), ("split", "the Hub failed")],
)
def test_a_shard_that_cannot_be_fetched(
    hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, said: str
) -> None:
    """The error is the Hub's, and what is finished is kept."""
    repository = hub.add(NAME, contents(model))
    command, *options = COMMANDS[kind]
    outfile = tmp_path / ("out" if kind == "fp8" else "out.gguf")
    target = [*(["-o"] if command == "convert" else []), outfile]
    fetch, calls = shards.ShardStream._fetch, 0

    def gone(self: shards.ShardStream, file: Path, future: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            if kind == "convert":
                repository.gated = True
            elif kind == "fp8":
                template = "http://127.0.0.1:9/{repo_id}/{revision}/{filename}"
                patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
                patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
            else:
                hub.failures = [500] * 100
        fetch(self, file, future)

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardStream, "_fetch", gone)
        failed = run(command, NAME, *target, *options, "--stream-from-hub", code=2).stderr
    repository.gated, hub.failures = False, []
    assert said in failed and ("continue with --resume" in failed) == (kind != "split"), failed
    left = {path.name for path in tmp_path.iterdir()} - {"cache"}
    assert left == {f"{outfile.name}.hub"} | (set() if kind == "split" else {f"{outfile.name}.partial"})
    hub.requests.clear()
    run(command, NAME, *target, *options, "--stream-from-hub", *(["--resume"] if kind != "split" else []))
    (tmp_path / "x").mkdir()
    run(command, model, *target[:-1], tmp_path / "x" / outfile.name, *options)
    assert len([each for each in hub.sent() if "/lfs/" in each.path and not each.range]) < COUNT
    made = {path.name for path in tmp_path.iterdir()} - {"cache", "x"}
    assert made == {path.name for path in (tmp_path / "x").iterdir()}
    for name, content in contents(tmp_path / "x").items():
        assert (tmp_path / name).read_bytes() == content
