"""Nothing that comes from a file or a command line acts on a terminal, whichever command prints it."""

from __future__ import annotations

import ast
import io
import json
import re
import shutil
import signal
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from safetensors.numpy import load_file, save_file

import bamba_quant_cli
from bamba_quant.embedded import embedded_model
from bamba_quant.printable import printable, printable_json
from bamba_quant_cli import console
from bamba_quant_cli.app import main
from bamba_quant_cli.console import Progress, echo, echo_lines, echo_text, print_json, print_table
from bamba_reference.runtime import compilation

# A title, an erased line, a return, C1 controls, DEL, turned directions, a line separator and a lone surrogate.
HOSTILE = "\x1b]0;x\x07\x1b[2K\r\b\x9b2K\x85\x7f\u202e\u2066\u2028\udc80\n\t"
# The same as UTF-8 holds it.
TEXT = HOSTILE.replace("\udc80", "")
# As a file's name may hold it.
NAME = HOSTILE.replace("\udc80", "\udcff")
# The console's code, or Python's.
SHOWN = re.compile(r"\\u001b|\\x1b")


def unsafe(text: str) -> str:
    return "".join(c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c != "\n")


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What ``main`` sets for the whole process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(monkeypatch: pytest.MonkeyPatch, *words: object, encoding: str = "utf-8") -> tuple[int, str, str]:
    """The command's exit code and what it wrote, decoded."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "argv", ["bamba-quant", *map(str, words)])
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    code: Any = 0
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(encoding))  # type: ignore[attr-defined]
    monkeypatch.undo()
    assert "Traceback" not in texts[1]
    return code, *texts


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Names, keys and values as no one has them, written by gguf-py."""
    file = tmp_path_factory.mktemp("x") / f"{NAME}.gguf"
    writer = GGUFWriter(file, "x")
    writer.add_string("general.architecture", f"arch{TEXT}")
    writer.add_string("general.name", TEXT)
    writer.add_string(f"key{TEXT}", TEXT)
    writer.add_array("list", [TEXT, "plain"])
    for key, value in (("nan", float("nan")), ("inf", float("-inf"))):
        writer.add_float32(key, value)
    writer.add_tensor(f"tensor{TEXT}", np.zeros((2, 2), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    return file


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bamba-mini under a name and with a card that act on terminals."""
    place = tmp_path_factory.mktemp("x") / NAME
    shutil.copytree(embedded_model(), place)
    (place / "README.md").write_text(
        f"---\nlicense: {json.dumps(TEXT)}\nmodel_name: {json.dumps(TEXT)}\n---\n# {TEXT}\n"
    )
    return place


def changed(directory: Path, place: Path, **values: object) -> Path:
    shutil.copytree(directory, place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | values))
    return place


@pytest.mark.parametrize("options", [(), ("--tensors",), ("--json",)], ids=str)
def test_inspecting_a_file(options: tuple[str, ...], gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run(monkeypatch, "inspect", gguf, *options)
    assert (code, err) == (0, "") and not unsafe(out)
    if options == ("--json",):
        found = json.loads(out, parse_constant=pytest.fail)
        assert found["metadata"]["general.name"] == TEXT and f"key{TEXT}" in found["metadata"]
        assert found["tensors"][0]["name"] == f"tensor{TEXT}" and found["path"] == str(gguf)
        assert (found["metadata"]["nan"], found["metadata"]["inf"]) == ("nan", "-inf")
    else:
        assert "\\u001b[2K\\r" in out


@pytest.mark.parametrize("command", ["convert", "repair", "export", "compare", "generate", "perplexity"])
def test_files_that_are_refused(
    command: str, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {
        "export": (tmp_path / "out",),
        "compare": (gguf.with_name(f"no{NAME}"),),
        "generate": ("--prompt", "x"),
        "perplexity": ("--text", tmp_path / NAME),
    }
    code, out, err = run(monkeypatch, command, gguf, *more.get(command, ()))
    assert code == 2 and not out and err.startswith("error: ")
    assert not unsafe(err) and "\\u001b" in err


@pytest.mark.parametrize(
    "words",
    [
        ("inspect",),
        ("inspect", "--json"),
        ("convert", "--dry-run", "--model-name", TEXT),
        ("convert", "--dry-run", "--json"),
        ("fp8", "OUT", "--dry-run"),
        ("int4", "OUT", "--dry-run", "--json"),
        ("convert", "--outfile", f"OUT{NAME}.gguf"),
        ("fp8", f"OUT{NAME}"),
    ],
    ids=str,
)
def test_directories(
    words: tuple[str, ...], directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, *rest = (word.replace("OUT", f"{tmp_path}/out") for word in words)
    code, out, err = run(monkeypatch, command, directory, *rest)
    assert code == 0, err
    assert not unsafe(out) and not unsafe(err)
    if "--json" in words:
        assert str(directory) in json.loads(out, parse_constant=pytest.fail).values()
    if "--dry-run" not in words and command != "inspect":
        assert out.strip().endswith(printable(words[-1].removeprefix("OUT"), keep=""))


@pytest.mark.parametrize(
    "values",
    [
        {"architectures": [TEXT]},
        {"architectures": None, "model_type": TEXT},
        {f"key{TEXT}": TEXT},
        {"hidden_act": TEXT},
        {"attn_layer_indices": [TEXT]},
        {"quantization_config": {"quant_method": TEXT}},
    ],
    ids=lambda values: next(iter(values))[:10],
)
def test_configurations(
    values: dict[str, Any], directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = changed(directory, tmp_path / NAME, **values)
    for words in (["convert", place, "--dry-run"], ["convert", place, "--dry-run", "--json"]):
        code, out, err = run(monkeypatch, *words)
        assert code == 2 and not out and not unsafe(err) and SHOWN.search(err)
    code, out, err = run(monkeypatch, "inspect", place)
    assert not unsafe(out) and not unsafe(err) and SHOWN.search(out + err)


def test_names_of_tensors(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = shutil.copytree(directory, tmp_path / "m")
    tensors = load_file(place / "model.safetensors")
    save_file(tensors | {f"x{TEXT}": np.zeros(3, np.float32)}, place / "model.safetensors")
    for words in (
        ("convert", place, "--dry-run"),
        ("fp8", place, tmp_path / "o"),
        ("inspect", place, "--tensors"),
    ):
        code, out, err = run(monkeypatch, *words)
        assert code == (0 if words[0] == "inspect" else 2)
        assert not unsafe(out) and not unsafe(err) and "x\\u001b]0;x" in out + err


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "a", NAME),
        ("inspect", f"--x{NAME}"),
        (f"x{NAME}",),
        ("convert", "a", "--threads", NAME),
        ("convert", "a", "--tensor-type", NAME),
        ("convert", "a", "--split-max-size", NAME),
        ("fp8", "a", "b", "--scheme", NAME),
        ("--version", NAME),
    ],
    ids=lambda words: words[0][:10],
)
def test_errors_of_usage(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run(monkeypatch, *words)
    assert code == (0 if words[0] == "--version" else 2)
    assert not unsafe(out) and not unsafe(err)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_encodings_that_lack_characters(
    encoding: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = changed(directory, tmp_path / "模型 ünï", note="🤖 ×")
    for words in (("--help",), ("inspect", place, "--tensors"), ("inspect", place / "nowhere"), ("x🤖",)):
        run(monkeypatch, *words, encoding=encoding)
    code, out, _ = run(monkeypatch, "inspect", place, "--json", encoding=encoding)
    found = json.loads(out)
    assert code == 0 and found["path"] == str(place) and found["metadata"]["note"] == "🤖 ×"


def test_warnings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    console.prepare()
    warnings.showwarning(UserWarning(HOSTILE), UserWarning, "x", 1)
    assert capsys.readouterr().err.startswith("warning: \\u001b]0;x")


def test_lines(capsys: pytest.CaptureFixture[str]) -> None:
    echo(f"a{HOSTILE}b")
    echo()
    echo_lines(f"error: {HOSTILE}x")
    print_table(("key", HOSTILE), [(HOSTILE, 1), ("x" * 1000, 2)], right=(1,))
    out = capsys.readouterr().out
    assert not unsafe(out)
    line, empty, first, second, header, rule, *rows = out.splitlines()
    assert line.startswith("a\\u001b]0;x\\u0007") and line.endswith("\\n\\tb")
    assert (empty, second) == ("", "\\tx") and first.startswith("error: \\u001b")
    assert header.startswith("key ") and len(rule) < 300
    assert len(rows) == 2 and len(rows[1]) > 1000 and len(rows[0]) < 300


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


GENERATED = f"שלום\u200f {TEXT}"


def test_generated_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    echo_text(GENERATED)
    assert capsys.readouterr().out == GENERATED
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    echo_text(GENERATED)
    shown = terminal.getvalue()
    assert shown.startswith("שלום\u200f \\u001b]0;x") and shown.endswith("\n\t")
    assert set(unsafe(shown)) == {"\u200f", "\t"}


def test_progress_of_steps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with Progress(f"{HOSTILE}step") as bar:
        for step in range(1, 8):
            bar.update(step, 2000, f"; {HOSTILE}")
        bar.update(1, 2, doing="next:", seconds_left=61, print_now=True)
        bar.update(2, 2, doing="next:")
    err = capsys.readouterr().err
    first, *more, last = err.splitlines()
    assert not unsafe(err) and "of 2,000; \\u001b" in first and first.endswith(" left")
    assert 1 <= len(more) < 4 and last == "next: 1 of 2, 1:01 left"


def test_the_bar_shows_how_much_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_on_terminal", lambda: True)
    with Progress("") as bar:
        bar.update(5, 6, doing="layer", work=0.5)
        (task,) = bar._bar.tasks
        assert (task.completed, task.total) == (5, 6)


def test_time_left_of_several_stages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stage that is nearly done is not nearly the end of all."""
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with Progress("") as bar:
        for stage, step, work in (
            ("layer", 1, 0.0), ("layer", 9, 0.2), ("scoring", 1, 0.25), ("layer", 1, 0.0), ("layer", 5, 0.5),
        ):  # fmt: skip
            bar.update(step, 10, doing=stage, work=work, print_now=True)
            now += 40.0
    assert capsys.readouterr().err.splitlines() == [
        "layer 1 of 10",
        "layer 9 of 10, 2:40 left",
        "scoring 1 of 10, 4:00 left",
        "layer 1 of 10",
        "layer 5 of 10, 0:40 left",
    ]


def test_progress_of_bytes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter(range(0, 100, 3))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with Progress("copying", 4000) as bar:
        for _ in range(4):
            bar.advance(1000)
    assert capsys.readouterr().err.splitlines() == [
        "copying: 50 % (2.00 kB of 4.00 kB, 333 B/s)",
        "copying: 100 % (4.00 kB of 4.00 kB, 333 B/s)",
    ]


@pytest.mark.parametrize("hidden", [False, True])
def test_compiling_is_announced_and_counts_for_no_time_left(
    hidden: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    for clock in ("monotonic", "perf_counter"):
        monkeypatch.setattr(console.time, clock, lambda: now[0])
    with Progress("step", hidden=hidden) as bar:
        bar.update(1, 10)
        now[0] = 10.0
        with compilation.timed():
            compilation.tell()
            now[0] = 30.0
        now[0] = 34.0
        bar.update(2, 10)
    lines = capsys.readouterr().err.splitlines()
    if hidden:
        assert lines == ["step 2 of 10, 4:32 left"]
    else:
        assert lines == ["compiling kernels (once on this machine)", "step 2 of 10, 1:52 left"]


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with Progress("step") as bar, Progress("copying", 2000) as copying:
        bar.say("reading")
        compilation.tell()
        bar.update(1, 2, f"; {HOSTILE}", doing="step")
        bar.update(2, 2)
        copying.advance(1000)
    written = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    for words in ("reading", "compiling kernels", "step", "1/2", "copying", "1.00 kB of 2.00 kB"):
        assert words in written, words
    assert not unsafe(written.replace("\r", "")) and terminal.getvalue().endswith("\x1b[2K")


def test_json_of_any_value(capsys: pytest.CaptureFixture[str]) -> None:
    every = "".join(map(chr, range(0x3000))) + "\udfff\ud800\U000e0001\U0001f916"
    value = {every: [every, float("nan"), {"x": (float("inf"), Path("p"))}, 2**70]}
    print_json(value)
    out = capsys.readouterr().out
    assert not set(unsafe(out)) - {"\u200c", "\u200d", "\u00ad"}
    assert json.loads(out) == {every: [every, "nan", {"x": ["inf", "p"]}, 2**70]}


def test_every_character() -> None:
    kept = {"\u200c", "\u200d", "\u00ad", "\n", "\t"}
    for number in range(sys.maxunicode + 1):
        shown = printable(chr(number))
        assert shown == chr(number) if chr(number) in kept else not unsafe(shown), hex(number)
        assert shown.isascii() or shown == chr(number)
    assert json.loads(printable_json(json.dumps("\U000e0001", ensure_ascii=False))) == "\U000e0001"


SOURCES = sorted(Path(bamba_quant_cli.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.name)
def test_the_console_alone_prints(file: Path) -> None:
    if file.name == "console.py":
        return
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not any(name.split(".")[0] in ("rich", "click", "logging") for name in names), node.lineno
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("print", "typer.echo", "typer.secho", "typer.echo_via_pager"), node.lineno
            assert not called.endswith((".write", ".writelines")) or called.startswith("stream."), node.lineno
