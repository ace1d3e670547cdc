"""``evaluate`` and ``compare`` as users run them: tables they recognise, exit codes, and errors that name the cause."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bamba_quant.embedded import embedded_model
from bamba_quant.errors import OutputError
from bamba_quant.evaluation.input_files import REPORTS
from bamba_quant.report.json_report import read_report
from bamba_quant_cli.app import app
from bamba_quant_cli.evaluation_screen import print_screen
from tests.support.command import run
from tests.support.conversion import to_gguf
from tests.support.evaluations import make_evaluation

SMALL = ("--ctx", 64, "--chunks", 8, "--resamples", 1000, "--floor-chunks", 2, "--drift-chunks", 1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pydoc_data.topics import topics

    file = tmp_path_factory.mktemp("text") / "help.txt"
    file.write_text("\n".join(topics[name] for name in sorted(topics))[:12_000], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def q8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_gguf(embedded_model(), tmp_path_factory.mktemp("files") / "mini-q8.gguf", "q8_0")


@pytest.fixture(scope="module")
def q4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_gguf(embedded_model(), tmp_path_factory.mktemp("files") / "mini-q4.gguf", "q4_k_m")


def test_the_full_tables_have_llama_perplexitys_names(q8: Path, q4: Path, text: Path) -> None:
    done = run(
        "evaluate", embedded_model(), q8, q4, "--text", text, *SMALL, "--max-kld", 0.9, "--full", "-t", 1
    )
    for name in (
        "Mean PPL(Q)/PPL(base)", "Cor(ln(PPL(Q)), ln(PPL(base)))", "Mean    KLD", "99.9%   KLD", "Median  Δp",
        "RMS Δp", "Same top p", "noise floor", "McNemar", "accumulated", "worst tensors of q8_0", "% reading",
        "PASS mini-q8: max-kld 0.9", "1 thread;",
    ):  # fmt: skip
        assert name in done.stdout, name


def test_failed_files_are_mended_by_the_line_that_is_printed(
    q8: Path, q4: Path, text: Path, tmp_path: Path
) -> None:
    """The table has a row a file, and the command that is printed for a file makes a better one."""
    arguments = ("evaluate", embedded_model(), "-f", text, *SMALL, "--noise-floor", "none")
    copy = tmp_path / "a file.gguf"
    copy.write_bytes(q4.read_bytes())
    done = run(*arguments, q8, copy, "--max-kld", 0.02, code=1)
    lines = done.stdout.splitlines()
    assert done.stderr == "" and max(map(len, lines)) <= 120
    assert "FAIL: 1 of 2 gates failed" in lines and done.stdout.count("max-kld") == 1
    assert "On the frontier of size and divergence: q4_k_m, q8_0." in lines
    rows = [
        line.split() for line in lines if line.lstrip("●○ ").startswith(("bamba-mini", "q4_k_m ", "q8_0 "))
    ]
    assert [row[0 if row[0].isascii() else 1] for row in rows] == ["bamba-mini", "q4_k_m", "q8_0"]
    start = next(i for i, line in enumerate(lines) if line.startswith("  bamba-quant convert"))
    command = " ".join(line.rstrip(" \\") for line in lines[start : start + 10] if line.startswith("  "))
    words = shlex.split(command)[1:]
    run(*words)
    better = Path(words[-1])
    assert better.name == "a file-mended.gguf" and better.stat().st_size > copy.stat().st_size
    found = json.loads(run(*arguments, copy, better, "--json").stdout)
    worse, mended = (candidate["figures"]["kld_mean"]["value"] for candidate in found["candidates"])
    assert mended < worse


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_screen_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five files: the verdict, a table and, on a terminal alone, a picture; no line is wider than the terminal."""
    evaluation = make_evaluation(("q8_0", "q4_k_m", "q2_k", "fp8-dynamic", "int4-gptq"), failing=True)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    screens = []
    for terminal in (False, True):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True))
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        print_screen(evaluation)
        screens.append(sys.stdout.buffer.getvalue().decode("utf-8"))
        monkeypatch.undo()
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("NO_COLOR", "1")
    piped, shown = screens
    assert "┤" in shown and "┤" not in piped and len(shown.splitlines()) < 50
    until = shown.index("worst tensors")  # a tensor's name and a command are never cut
    assert max(map(len, shown[:until].splitlines()[:-1])) <= columns
    head = next(line for line in piped.splitlines() if "mean KLD" in line)
    assert all(name in head for name in ("size", "PPL ratio", "same top", "gates"))
    assert ("  PPL  " in head) == (columns > 60) and ("bits/weight" in head) == (columns == 120)
    assert ("95 % interval" in head) == (columns == 120)
    table = piped.splitlines()[piped.splitlines().index(head) + 2 :][:6]
    assert "base" in table[0] and "22.2" in table[0]
    klds = [re.search(r"0\.\d+", row.split("MB")[1]) for row in table[1:]]
    assert {len(kld[0]) for kld in klds if kld} == {7}
    sizes = [float(re.search(r"([\d.]+) MB", row)[1]) for row in table[1:]]  # type: ignore[index]
    assert sizes == sorted(sizes)


def test_a_gate_that_fails_is_named_and_exits_1(q8: Path, q4: Path, text: Path, tmp_path: Path) -> None:
    gates = tmp_path / "gates.toml"
    gates.write_text("[default]\nmax-kld = 0.02\n[q4_k_m]\nmin-same-top = 0.1\n")
    done = run(
        "evaluate", embedded_model(), q8, q4, "--text", text, *SMALL, "--gates", gates, "--gate", "max-flips=0.9",
        "--json", code=1,
    )  # fmt: skip
    assert "FAIL mini-q4: max-kld 0.02, upper bound" in done.stderr and "mini-q8" not in done.stderr
    found = json.loads(done.stdout)
    verdicts = {
        (candidate["model"]["label"], gate["figure"]): gate["passed"]
        for candidate in found["candidates"]
        for gate in candidate["gates"]
    }
    assert verdicts == {
        ("mini-q8", "kld_mean"): True, ("mini-q8", "flips"): True, ("mini-q4", "kld_mean"): False,
        ("mini-q4", "same_top"): True, ("mini-q4", "flips"): True,
    }  # fmt: skip
    assert found["run"]["command"].startswith("bamba-quant evaluate ")


@pytest.mark.parametrize(
    ("section", "complaint", "expected"),
    [
        ("q4_km", "names no candidate and no recipe", "[q8_0], [mini-q8]"),
        ("q4_k_m", "have no section for a candidate", "[q8_0] or [mini-q8]"),
    ],
)
def test_gates_for_nobody_are_refused_before_the_work(
    section: str, complaint: str, expected: str, q8: Path, text: Path, tmp_path: Path
) -> None:
    gates, saved = tmp_path / "gates.toml", tmp_path / "base.kld"
    gates.write_text(f"[{section}]\nmax-kld = 0.1\n")
    done = run(
        "evaluate",
        embedded_model(),
        q8,
        "--text",
        text,
        *SMALL,
        "--gates",
        gates,
        "--save-base",
        saved,
        code=2,
    )
    assert complaint in done.stderr and f"[{section}]" in done.stderr and expected in done.stderr
    assert not done.stdout and not saved.exists()


def test_a_gate_within_the_noise_is_refused(q8: Path, text: Path) -> None:
    done = run(
        "evaluate", embedded_model(), q8, "--text", text, *SMALL, "--noise-floor", "bfloat16", "--max-kld", 1e-5,
        "--drift-chunks", 0, code=2,
    )  # fmt: skip
    assert (
        "too tight to be measured" in done.stderr
        and "max-kld" in done.stderr
        and "noise floor" in done.stderr
    )
    assert "same top" in done.stdout and done.stdout.count("max-kld") == 1


def test_bases_saved_and_used(q8: Path, text: Path, tmp_path: Path) -> None:
    saved = tmp_path / "base.kld"
    arguments = ("--noise-floor", "none", "--drift-chunks", 0, "--activations", "exact", "--json")
    first = run("evaluate", embedded_model(), q8, "--text", text, *SMALL, "--save-base", saved, *arguments)
    again = run("evaluate", embedded_model(), q8, "--text", text, *SMALL, "--save-base", saved, code=2)
    assert "exists already" in again.stderr
    second = run("evaluate", saved, q8, *arguments)
    klds = [
        json.loads(done.stdout)["candidates"][0]["figures"]["kld_mean"]["value"] for done in (first, second)
    ]
    assert klds[0] == pytest.approx(klds[1], abs=3e-5)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--max-kld", "nan"), "not a finite number"),
        (("--max-kld", "inf"), "not a finite number"),
        (("--min-same-top", "90"), "for 90 % give 0.9"),
        (("--gate", "max-flips=5"), "for 5 % give 0.05"),
        (("--gate", "max-kdl=1"), "unknown gate"),
        (("--gate", "max-kld"), "NAME=LIMIT"),
        (("--noise-floor", "gpu"), "'gpu' is not one of"),
        (("--activations", "int8"), "'int8' is not one of"),
        (("--chunks", "7", "--max-kld", "1"), "too short for the confidence interval"),
        (("--dtype", "int8"), "'int8' is not one of"),
    ],
)  # fmt: skip
def test_bad_usage(words: tuple[str, ...], complaint: str, q8: Path, text: Path) -> None:
    done = run("evaluate", embedded_model(), q8, "--text", text, *SMALL, *words, code=2)
    assert complaint in done.stderr and not done.stdout


def test_texts_and_models_that_do_not_do(q8: Path, tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("Grüße ".encode("latin-1") * 100)
    assert "not UTF-8" in run("evaluate", embedded_model(), q8, "--text", file, code=2).stderr
    file.write_text("")
    assert "too short" in run("evaluate", embedded_model(), q8, "--text", file, code=2).stderr
    assert "given twice" in run("evaluate", embedded_model(), q8, q8, "--text", file, code=2).stderr
    assert "--text" in run("evaluate", embedded_model(), q8, code=2).stderr


def test_compare(q8: Path, q4: Path, tmp_path: Path) -> None:
    done = run("compare", embedded_model(), q4)
    assert "rows of dt" in done.stdout and "all weights together" in done.stdout and "q6_k" in done.stdout
    found = json.loads(run("compare", q8, q4, "--json").stdout)
    assert not found["same"] and len(found["tensors"]) == 51 and 10 < found["sqnr"] < 40
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(q8.read_bytes())
    assert "51 tensors, 51 of them the same" in run("compare", q8, copy).stdout
    assert "given twice" in run("compare", q8, q8, code=2).stderr


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--text DIR/report.md --report-dir DIR", "would replace"),
        ("--text DIR/report.md --report-dir DIR --overwrite", "would replace"),
        ("--text TEXT --gates DIR/report.md --report-dir DIR --overwrite", "would replace"),
        ("--text TEXT --tokenizer DIR/model --report-dir DIR --overwrite", "would replace"),
        ("--text TEXT --report-dir DIR", "exists already"),
        ("--text TEXT --save-base DIR/report.md", "exists already"),
        ("--text TEXT --save-base DIR/new/report.json --report-dir DIR/new", "two outputs"),
        ("--text TEXT --save-base TEXT --overwrite", "would replace"),
        ("--text TEXT --save-base DIR/report.md --gates DIR/report.md --overwrite", "would replace"),
        ("--text TEXT --save-base DIR/model/tokenizer.json --tokenizer DIR/model --overwrite", "would replace"),
    ],
)  # fmt: skip
def test_no_output_replaces_an_input(
    options: str, complaint: str, q8: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.md").write_text("mine")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").hardlink_to(tmp_path / "report.md")

    def refuse(*arguments: object, **more: object) -> None:
        pytest.fail("this is to be refused before the work")

    monkeypatch.setattr("bamba_quant.evaluation.evaluate.evaluate", refuse)
    before = text.read_bytes()
    words = options.replace("DIR", str(tmp_path)).replace("TEXT", str(text)).split()
    done = CliRunner().invoke(app, ["evaluate", str(embedded_model()), str(q8), *words])
    assert isinstance(done.exception, OutputError) and complaint in str(done.exception)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "report.md"]
    assert (tmp_path / "report.md").read_text() == "mine" and text.read_bytes() == before


def test_a_report_of_more_files_stays(q8: Path, q4: Path, text: Path, tmp_path: Path) -> None:
    options = ("--text", text, *SMALL, "--drift-chunks", 0, "--noise-floor", "none", "--report-dir", tmp_path)
    done = run("evaluate", embedded_model(), q8, q4, *options)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert done.stdout.split()[-3:] == [str(tmp_path / name) for name in REPORTS] and files.keys() == set(
        REPORTS
    )
    assert "exists already" in run("evaluate", embedded_model(), q8, *options, code=2).stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    run("evaluate", embedded_model(), q8, *options, "--overwrite")
    assert len(read_report(tmp_path / "report.json").candidates) == 1
