"""--stream-from-hub: the bytes are those of a local conversion, and the disk never holds more than a shard or two."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bamba_quant.embedded import embedded_model
from bamba_quant.writers import shards
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
    assert contents(tmp_path / "hub") == {
        name: content.replace(b"local", b"hub") for name, content in contents(tmp_path / "local").items()
    }
    assert not place.exists()
    fetched = [name for name in hub.fetched() if name.endswith(".safetensors")]
    assert set(fetched) == {f"model-0000{n}-of-00004.safetensors" for n in range(1, 5)}
    assert most <= 3  # the first waits for its tied copy in the last, one is used, one is fetched meanwhile
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
