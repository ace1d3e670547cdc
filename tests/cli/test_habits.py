"""What users type from habit: names with errors, llama.cpp's options, and help that shows where things are."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import typer

from bamba_quant.embedded import embedded_model
from bamba_quant_cli.app import app
from bamba_quant_cli.commands import LongCommand
from tests.support.command import run

GROUP = typer.main.get_command(app)
COMMANDS = GROUP.commands  # type: ignore[attr-defined]
TEXT = "The miller looked at the river, and the river went on turning his wheel. " * 20


def plain(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize(
    ("words", "closest"),
    [
        ("evalute a b", "'evaluate'"),
        ("convert MODEL --outtpe q8_0", "--outtype"),
        ("convert MODEL --outtype q4km", "; did you mean q4_k_m?"),
        ("convert MODEL --recipe q4kmh", "; did you mean q4_k_m_h?"),
        ("convert MODEL --output-tensor-type q6k", "; did you mean q6_k?"),
        ("convert MODEL --tensor-type outproj=q6_k", "; did you mean out_proj?"),
        ("convert MODEL --tensor-type out_proj=q6k", "; did you mean q6_k?"),
        ("convert MODEL --device gpu0 --calibrate x", "unknown device"),
        ("convert MODEL --device cudda", "; did you mean cuda?"),
        ("convert MODEL --pre lama3", "; did you mean llama3"),
        ("fp8 MODEL OUT --ignore ssm_inn", "; did you mean ssm_in"),
        ("fp8 MODEL OUT --scheme dinamic", "; did you mean dynamic?"),
        ("int4 MODEL OUT --method hq", "; did you mean hqq?"),
        ("int4 MODEL OUT --format torch-ao", "; did you mean torchao?"),
        ("export MODEL OUT --dtype fb16", "; did you mean f16 or bf16?"),
        ("allocate MODEL --like q4km", "; did you mean q4_k_m?"),
        ("allocate MODEL --like q4_k_m --types q4k,q7", "; did you mean q4_k?"),
        ("allocate MODEL --scheme fp8-dynamc --target-size 3MB --text TEXT", "; did you mean fp8-dynamic?"),
        ("evaluate MODEL COPY --text TEXT --noise-floor ordr", "; did you mean order?"),
        ("evaluate MODEL COPY --text TEXT --gate max-kdl=1", "; did you mean max-kld"),
        ("evaluate MODEL COPY --text TEXT --backend troch", "; did you mean torch?"),
        ("perplexity MODEL --text TEXT --activations chekpoint", "; did you mean checkpoint?"),
        ("perplexity MODEL --text TEXT --dtype float23", "; did you mean float32"),
        ("recipes q4km", "; did you mean q4_k_m?"),
    ],
)
def test_errors_name_what_is_closest(words: str, closest: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    copy = shutil.copytree(embedded_model(), tmp_path / "copy")
    places = {"MODEL": embedded_model(), "COPY": copy, "OUT": tmp_path / "o", "TEXT": tmp_path / "text"}
    done = run(*(places.get(word, word) for word in words.split()), code=2)
    assert closest in plain(done.stderr)
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "text"}


def test_a_recipe_file(tmp_path: Path) -> None:
    file = tmp_path / "mix.toml"
    for text, closest in (
        ('like = "q4km"', "q4_k_m"),
        ('like = "q4_k_m"\n[roles]\nssm_ot = "q6_k"', "ssm_out"),
        ('like = "q4_k_m"\n[roles]\nssm_out = "q6k"', "q6_k"),
        ('like = "q4_k_m"\n[roles]\nssm_out = {format = "q6_k", when = "morebits"}', "more_bits"),
        ('like = "q4_k_m"\ncandidate = ["q6_k"]', "candidates"),
    ):
        file.write_text(text)
        done = run("convert", embedded_model(), "--recipe", file, "--dry-run", code=2)
        assert f"; did you mean {closest}" in done.stderr


def test_options_of_llama_cpp(tmp_path: Path) -> None:
    """llama-imatrix's -m, -f, -c and -o, llama-quantize's -t, and those of convert_hf_to_gguf.py."""
    (tmp_path / "text").write_text(TEXT)
    words = (
        "-m",
        embedded_model(),
        "-f",
        tmp_path / "text",
        "-c",
        64,
        "--chunks",
        2,
        "-o",
        tmp_path / "i.gguf",
    )
    assert json.loads(run("imatrix", *words, "--json").stdout)["tokens"] == 128
    first = ("convert", embedded_model(), "--outtype", "q4_k_m", "--imatrix", tmp_path / "i.gguf")
    run(*first, "--outfile", tmp_path / "a.gguf", "--threads", 1)
    second = (
        "convert",
        "-o",
        tmp_path / "b.gguf",
        "--type",
        "Q4_K_M",
        "--imatrix",
        tmp_path / "i.gguf",
        "-t",
        2,
    )
    run(*second, f"--model={embedded_model()}")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    run("fp8", tmp_path / "out", "--model", embedded_model(), "-t", 1)
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_and_cuts_no_name(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    shown = run(*filter(None, [name]), "--help").stdout
    assert max(map(len, shown.splitlines())) <= width
    command = COMMANDS[name] if name else GROUP
    for each in command.params:
        for word in () if getattr(each, "hidden", False) else each.opts:
            assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", shown) or not word.startswith("-"), (
                word
            )
    if isinstance(command, LongCommand):
        titles = re.findall(r"^(?:╭─ )?(\w+)(?:: ?$| ─)", shown, re.MULTILINE)
        assert titles == ["Arguments", "Types", "Output", "Calibration", "Tuning", "Reading"]
    if name:
        assert re.search(rf"Examples:\s+bamba-quant {name}\b", shown)


def test_every_command_is_in_a_panel() -> None:
    shown = run().stdout
    assert re.findall(r"╭─ (.*?) ─", shown) == [
        "Options", "Convert and quantize", "Calibrate", "Measure and run"
    ]  # fmt: skip
    assert all(f" {name} " in shown for name in COMMANDS)
