"""``generate`` and ``perplexity`` as users run them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bamba_quant.embedded import embedded_model
from bamba_quant.errors import BambaQuantError
from bamba_quant.inference.loading import load_model
from bamba_quant.inference.weights import LazyWeights, Timings
from bamba_quant_cli.app import app
from bamba_reference.runtime import stream
from tests.support.command import run
from tests.support.conversion import to_gguf

TEXT = "The function returns a list of the names that are bound in the module, in the order of their definition.\n"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT * 40)
    return file


def test_generate_from_directory_and_file(tmp_path: Path) -> None:
    arguments = ("--prompt", "The function", "--max-tokens", 12)
    said = run("generate", embedded_model(), *arguments).stdout
    assert said.startswith("The function")
    assert len(said) > len("The function") + 12
    file = to_gguf(embedded_model(), tmp_path / "f32.gguf")
    assert run("generate", file, *arguments).stdout == said
    result = json.loads(run("generate", file, *arguments, "--json").stdout)
    assert said.strip() == "The function" + result["text"].rstrip()
    assert 0 < len(result["tokens"]) <= 12


@pytest.mark.parametrize(
    "words",
    [
        "perplexity MODEL -f TEXT",
        "generate MODEL -p The",
        "evaluate MODEL OUT.gguf -f TEXT",
        "imatrix MODEL -f TEXT -o OUT",
        "allocate MODEL --text TEXT --like q4_k_m -o OUT.toml",
        "convert MODEL --outtype q4_k_m --outfile OUT.gguf --calibrate TEXT",
        "int4 MODEL OUT --calibrate TEXT",
        "fp8 MODEL OUT --tune TEXT",
    ],
)
def test_threads_are_torchs(words: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs a model sets them, before the work."""
    asked: list[int] = []

    def refuse(threads: int) -> None:
        asked.append(threads)
        raise BambaQuantError("enough")

    monkeypatch.setattr(torch, "set_num_threads", refuse)
    places = {"MODEL": embedded_model(), "TEXT": text, "OUT": tmp_path / "out"}
    for name, place in places.items():
        words = words.replace(name, str(place))
    run(*words.split(), "-t", 3, code=2)
    assert asked == [3] and sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]


def test_generate_draws_by_seed() -> None:
    arguments = (
        "generate",
        embedded_model(),
        "--prompt",
        "A",
        "--max-tokens",
        16,
        "--temperature",
        1.0,
        "--top-p",
        0.9,
    )
    first, again, other = (run(*arguments, "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again != other


def test_streaming_decodes_no_more_of_a_table_than_is_used(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head, some rows at a time, for each block of tokens; of the embedding the rows from first to last used."""
    file, decoded = to_gguf(embedded_model(), tmp_path / "q8_0.gguf", "q8_0"), dict[str, list[int]]()
    raw = LazyWeights.raw

    def watched(self: LazyWeights, name: str, start: int, stop: int, timings: Timings) -> Any:
        decoded.setdefault(name, []).append(stop - start)
        return raw(self, name, start, stop, timings)

    monkeypatch.setattr(LazyWeights, "raw", watched)
    monkeypatch.setattr(stream, "_HEAD_ROWS", 100)
    monkeypatch.setattr(stream, "_MOST_KEPT", 0)  # a small head is read once
    options = ("--text", str(text), "--ctx", "128", "--chunks", "3")
    done = CliRunner().invoke(app, ["perplexity", str(file), "--stream", *options])
    assert done.exit_code == 0, done.output
    vocab_size = load_model(file).config.vocab_size
    head = decoded["lm_head.weight"]
    assert max(head) == 100 and sum(head) == vocab_size
    assert sum(decoded["model.embed_tokens.weight"]) <= vocab_size


def test_perplexity_by_every_path(tmp_path: Path, text: Path) -> None:
    file = to_gguf(embedded_model(), tmp_path / "f32.gguf")
    arguments = ("--text", text, "--ctx", 128, "--chunks", 3, "--json")
    results = [
        json.loads(run("perplexity", model, *arguments, *options).stdout)
        for model, options in (
            (embedded_model(), ()),
            (embedded_model(), ("--stream",)),
            (embedded_model(), ("--backend", "numpy")),
            (file, ()),
            (file, ("--tokenizer", embedded_model())),
        )
    ]
    for result in results:
        assert result["perplexity"] == pytest.approx(results[0]["perplexity"], rel=1e-5)
        assert result["tokens_scored"] == 3 * 63
        assert len(result["text_sha256"]) == 64
    assert [result["backend"] for result in results] == ["numba", "numba", "numpy", "numba", "numba"]
    shown = run("perplexity", embedded_model(), "--text", text, "--ctx", 128, "--chunks", 3).stdout
    assert "backend numba" in shown
    assert f"perplexity {results[0]['perplexity']:.4f}" in shown


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--ctx", 4000), "too short"),
        (("--dtype", "float8"), "float8"),
        (("--backend", "jax"), "jax"),
        (("--backend", "mamba-ssm"), "mamba"),
        (("--backend", "numpy", "--stream"), "numpy backend"),
        (("--chunks", 0), "at least 1"),
    ],
)
def test_perplexity_refuses(arguments: tuple[object, ...], complaint: str, text: Path) -> None:
    assert complaint in run("perplexity", embedded_model(), "--text", text, *arguments, code=2).stderr


def test_texts_that_are_none(tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Müller\n".encode("latin-1") * 1000)
    assert "not UTF-8" in run("perplexity", embedded_model(), "--text", latin, code=2).stderr
    assert (
        "cannot be read" in run("perplexity", embedded_model(), "--text", tmp_path / "no.txt", code=2).stderr
    )


def test_generate_refuses(tmp_path: Path) -> None:
    assert (
        "temperature"
        in run("generate", embedded_model(), "--prompt", "x", "--temperature", -1, code=2).stderr
    )
    assert "no such file" in run("generate", tmp_path / "nowhere", "--prompt", "x", code=2).stderr
