"""What is written about a model reaches its GGUF, or is refused naming file and key."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from bamba_quant.errors import BambaQuantError, PlanError
from bamba_quant.metadata.general import read_general


def general(
    directory: Path,
    *,
    card: str | bytes | None = None,
    generation: dict[str, Any] | None = None,
    overrides: str | bytes | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "config.json").exists():
        (directory / "config.json").write_text("{}")
    if card is not None:
        raw = card if isinstance(card, bytes) else card.encode()
        (directory / "README.md").write_bytes(b"---\n" + raw + b"\n---\n# A model\n")
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    file = None
    if overrides is not None:
        file = directory / "overrides.json"
        file.write_bytes(overrides if isinstance(overrides, bytes) else overrides.encode())
    found = read_general(directory, 10**9, architecture="bamba", model_name=name, overrides=file)
    return {key.removeprefix("general."): value.value for key, value in found.values.items()}


@pytest.mark.parametrize(
    ("card", "key", "expected"),
    [
        ("license: mit", "license", "mit"),
        ("license: [mit, apache-2.0]", "license", "mit,apache-2.0"),
        ("license: 3", "license", "3"),
        ("version: 1.0", "version", "1.0"),
        ("version: 2024-01-31", "version", "2024-01-31"),
        ("size_label: 7", "size_label", "7"),
        ("model_creator: ibm", "author", "ibm"),
        ("tags: [a, 2]", "tags", ["a", "2"]),
        ("pipeline_tag: text-generation", "tags", ["text-generation"]),
        ("language: no", "languages", ["no"]),
        ("language:\n- no\n- en", "languages", ["no", "en"]),
        ("base_model: ibm-ai-platform/Bamba-9B", "base_model.0.name", "Bamba 9B"),
        ("base_model: [{name: x, version: 2}]", "base_model.0.version", "2"),
        ("datasets: [a/b, c/d]", "dataset.count", 2),
        ("tags: []", "tags", None),
        ("author: null", "author", None),
        ("base_model: []", "base_model.count", None),
    ],
)
def test_model_card(card: str, key: str, expected: Any, tmp_path: Path) -> None:
    assert general(tmp_path / "m", card=card).get(key) == expected


@pytest.mark.parametrize(
    ("card", "complaint"),
    [
        ("author: [x]", "author"),
        ("author: {a: b}", "author"),
        ("author: true", "author"),
        ('author: "\\ud800"', "YAML"),
        ('author: "\\0"', "author"),
        ("tags: [null]", "tags"),
        ("tags: {a: b}", "tags"),
        ("tags: [a, [b]]", "tags"),
        ("base_model: [[x]]", "base_model"),
        ("base_model: {a: 1}", "base_model"),
        ("base_model: [{name: [x]}]", r"base_model\.name"),
        ("license: {a: b}", "license"),
        ('"unterminated', "YAML"),
        ("version: 2024-99-99", "YAML"),
        ("[" * 3000, "YAML"),
        ("author: " + "[" * 100_000, "nesting of"),
        ("author: !!python/object:os.system x", "a tag"),
        ("author: !!timestamp x", "a tag"),
        ("author: !!set {a}", "a tag"),
        ("a: &a {x: 1}\nb: {<<: *a}", "merge key"),
        ("author: " + "1:" * 100_000 + "1", "a number of"),
        ("author: 0x" + "f" * 100_000, "a number of"),
        (
            "a0: &a0 [x]\n"
            + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 400))
            + "author: *a399",
            "author",
        ),
        ("a: &a x\nb: [" + "*a, " * 2000 + "]", "aliases"),
        ("x: " + "a" * 600_000, "characters"),
        ("author: .inf", "author"),
        ("version: .nan", "version"),
        ("author: &a [*a]", "author"),
        ("tags:\n" + "- a\n" * 10_001, "tags"),
        ("description: x" + "a" * 70_000, "description"),
        ("author: é".encode("latin-1"), "UTF-8"),
    ],
)
def test_model_card_of_another_kind(card: str | bytes, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=complaint) as error:
        general(tmp_path / "m", card=card)
    assert "README.md" in str(error.value)


def test_generation_config(tmp_path: Path) -> None:
    settings = {"temperature": 0.6, "top_p": 1, "top_k": 50.0, "min_p": None, "eos_token_id": [1]}
    found = general(tmp_path / "m", generation=settings)
    assert found["sampling.top_k"] == 50
    assert (found["sampling.temp"], found["sampling.top_p"]) == (0.6, 1.0)
    assert "sampling.min_p" not in found


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", "x"),
        ("top_p", True),
        ("min_p", "0.1"),
        ("top_k", 1.5),
        ("top_k", 99999999999),
        ("temperature", float("nan")),
        ("temperature", 10**400),
        ("sequence", [5]),
    ],
)
def test_generation_config_of_another_kind(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=rf"{key}[\s\S]*generation_config\.json"):
        general(tmp_path / "m", generation={key: value})


def test_overrides(tmp_path: Path) -> None:
    overrides = {
        "general.license": "apache-2.0",
        "general.version": 1.5,
        "general.author": None,
        "general.tags": ["a"],
        "general.base_models": [{"name": "Base"}],
        "general.sampling.temp": 1,
        "general.source.url": "https://example.org",
    }
    card = "license: mit\nauthor: someone\ntags: [b]"
    found = general(tmp_path / "m", card=card, overrides=json.dumps(overrides))
    assert found["license"] == "apache-2.0"
    assert found["version"] == "1.5"
    assert "author" not in found
    assert found["tags"] == ["a"]
    assert found["base_model.0.name"] == "Base"
    assert found["sampling.temp"] == 1.0
    assert found["source.url"] == "https://example.org"


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ('{"general.author": [5]}', r"general\.author"),
        ('{"general.tags": [[1]]}', r"general\.tags"),
        ('{"general.base_models": 5}', r"general\.base_models"),
        ('{"general.base_models": [5]}', r"general\.base_models"),
        ('{"general.base_models": [{}]}', r"general\.base_models"),
        ('{"general.base_models": [{"nmae": "x"}]}', "nmae"),
        ('{"general.name": ""}', "no name"),
        ('{"general.name": ["x"]}', r"general\.name"),
        ('{"general.author": "\\ud800"}', "surrogate"),
        ('{"general.size_label": "\\u0000"}', r"general\.size_label"),
        ('{"general.sampling.temp": "x"}', r"general\.sampling\.temp"),
        ('{"general.architecture": "llama"}', r"unknown keys[\s\S]*general\.architecture"),
        ('{"general.alignment": 64}', "unknown keys"),
        ('{"general.file_type": 3}', "unknown keys"),
        ('{"general.author": "a", "general.author": "b"}', "twice"),
        ("[]", "JSON object"),
        (b"\xff", "JSON"),
    ],
)
def test_overrides_of_another_kind(overrides: str | bytes, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=complaint):
        general(tmp_path / "m", overrides=overrides)


def test_missing_overrides(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PlanError, match=r"nowhere\.json"):
        read_general(tmp_path, 1, architecture="bamba", model_name=None, overrides=tmp_path / "nowhere.json")


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert general(tmp_path / "my-model")["name"] == "My Model"
    monkeypatch.chdir(tmp_path / "my-model")
    assert general(Path())["name"] == "My Model"
    (tmp_path / "my-model" / "config.json").write_text('{"_name_or_path": ""}')
    assert general(Path())["name"] == "My Model"
    (tmp_path / "my-model" / "config.json").write_text('{"_name_or_path": "ibm/Bamba-9B"}')
    found = general(Path())
    assert (found["name"], found["organization"]) == ("Bamba 9B", "Ibm")
    assert general(Path(), name="X")["name"] == "X"
    for bad in ("", "\0", "\ud800"):
        with pytest.raises(PlanError, match="name"):
            general(Path(), name=bad)
    for place in ("./", ".", "..", "/raid", "/raid/me/out", "checkpoint/"):
        (tmp_path / "my-model" / "config.json").write_text(json.dumps({"_name_or_path": place}))
        assert general(Path())["name"] == "My Model", place
    (tmp_path / "my-model" / "config.json").write_text('{"_name_or_path": [1]}')
    with pytest.raises(BambaQuantError, match="_name_or_path"):
        general(Path())


def test_hugging_face_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--ibm-ai-platform--Bamba-9B-v2" / "snapshots" / ("0a1b2c3d" * 5)
    found = general(snapshot)
    assert found["name"] == "Bamba 9B v2"
    assert found["organization"] == "Ibm Ai Platform"
    (snapshot / "config.json").write_text('{"_name_or_path": "/home/someone/out/checkpoint"}')
    assert general(snapshot)["name"] == "Bamba 9B v2"


def test_gguf_py_prints_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        general(tmp_path / "m", card="- a")
    assert not [record for record in caplog.records if record.name == "metadata"]
