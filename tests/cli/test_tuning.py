"""``--tune`` as users give it: what reaches the tuning, what is told of it, and what an interrupt leaves."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from bamba_quant.calibration import tune as tuning
from bamba_quant.calibration.tune_options import TuneOptions, TuneProgress
from bamba_quant.calibration.tune_state import write_state
from bamba_quant.calibration.tuned_output import SELF_TOKENS
from bamba_quant.checkpoint import open_checkpoint
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import BambaQuantError, OutputError, PlanError
from bamba_quant.metadata.tune_record import Tuned, read_record
from bamba_quant_cli import interrupts
from bamba_quant_cli.app import app
from bamba_quant_cli.console import Progress
from bamba_quant_cli.tuning import show_tuning
from tests.support.tuning import RECORD, WORSE, StandIn, names_left

MODEL = str(embedded_model())


class Asked:
    """Stands in for ``tune``: notes what it is asked, tells one step, and may be interrupted there."""

    def __init__(self) -> None:
        self.stand_in = StandIn()
        self.texts: list[str] = []
        self.options: list[TuneOptions] = []
        self.interrupted = False

    def __call__(
        self,
        original: Path,
        quantized: Path,
        texts: Sequence[Any],
        options: TuneOptions,
        tell: Any,
        note: Any,
        reading: Any,
    ) -> Tuned:
        assert original == embedded_model()
        self.texts = [text.path.name for text in texts]
        self.options.append(options)
        tell(TuneProgress(1, 2, 0.5, 0.25, 0.75, 61.0))
        if self.interrupted:
            assert options.state is not None
            write_state(options.state, {"x": torch.zeros(1)}, {}, {})
            raise interrupts.Interrupted(signal.SIGINT)
        return self.stand_in(quantized)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Asked:
    asked = Asked()
    monkeypatch.setattr(tuning, "tune", asked)
    (tmp_path / "text.txt").write_text("The miller looked at the river.")
    return asked


def run(*words: object) -> None:
    app([*map(str, words)], standalone_mode=False)


def convert(place: Path, *words: object) -> None:
    run("convert", MODEL, "--outtype", "q4_k_m", "--no-vocab", "--outfile", place / "x.gguf", *words)


def test_options_reach_the_tuning(asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    convert(
        tmp_path,
        "--tune",
        text,
        "--tune-tokens",
        9000,
        "--tune-steps",
        7,
        "--tune-seed",
        3,
        "--max-minutes",
        2.5,
    )
    (options,) = asked.options
    assert (options.tokens, options.steps, options.seed, options.max_minutes) == (9000, 7, 3, 2.5)
    assert (options.device, options.self_tokens, options.resume) == ("cpu", 0, False)
    assert asked.texts == ["text.txt"]
    told = capsys.readouterr().err
    assert "tuning: step 1 of 2, loss 0.5, held-out KLD 0.25 (0.75 without), 1:01 left" in told
    assert RECORD.line() in told
    assert names_left(tmp_path) == ["text.txt", "x.gguf"]
    assert read_record(open_checkpoint(tmp_path / "x.gguf")) == RECORD


@pytest.mark.parametrize("tokens", [None, 4096])
def test_self_is_text_that_the_model_writes(tokens: int | None, asked: Asked, tmp_path: Path) -> None:
    convert(tmp_path, "--tune", "self", *(() if tokens is None else ("--tune-tokens", tokens)))
    assert asked.options[0].self_tokens == (tokens or SELF_TOKENS)
    assert asked.texts == []
    convert(tmp_path, "--tune", "self", "--tune", tmp_path / "text.txt", "--overwrite")
    assert asked.options[1].self_tokens == SELF_TOKENS
    assert asked.texts == ["text.txt"]


@pytest.mark.parametrize("command", ["int4", "fp8"])
def test_directories_are_tuned_too(
    command: str, asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(command, MODEL, tmp_path / "out", "--tune", tmp_path / "text.txt", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["tuned"]["better"] is True
    assert found["tuned"]["sha256"] == list(RECORD.sha256)
    assert found["tuned"]["changed"] == dict.fromkeys(asked.stand_in.tensors, 1)
    assert found["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert read_record(open_checkpoint(tmp_path / "out")) == RECORD
    assert names_left(tmp_path) == ["out", "text.txt"]


def test_it_says_when_nothing_became_better(
    asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked.stand_in = StandIn(WORSE)
    convert(tmp_path, "--tune", tmp_path / "text.txt")
    assert "note: tuning did not improve" in capsys.readouterr().err
    assert read_record(open_checkpoint(tmp_path / "x.gguf")) is None


@pytest.mark.parametrize("command", ["convert", "int4"])
def test_an_interrupt_says_how_to_go_on(
    command: str, asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(*words: str) -> None:
        text = tmp_path / "text.txt"
        if command == "convert":
            convert(tmp_path, "--tune", text, *words)
        else:
            run("int4", MODEL, tmp_path / "x.gguf", "--tune", text, *words)

    asked.interrupted = True
    with pytest.raises(interrupts.Interrupted):
        start()
    assert "continue with --resume" in interrupts._message()
    left = names_left(tmp_path)
    assert "x.gguf" not in left
    assert "x.gguf.tuning" in left
    with pytest.raises(OutputError, match="the state of an interrupted tuning exists"):
        start()
    asked.interrupted = False
    start("--resume")
    assert [options.resume for options in asked.options] == [False, True]
    assert names_left(tmp_path) == ["text.txt", "x.gguf"]
    assert "written and complete" in interrupts._message()


def test_what_was_left_may_be_begun_anew(asked: Asked, tmp_path: Path) -> None:
    state = tmp_path / "elsewhere"
    words = ("--tune", tmp_path / "text.txt", "--tune-state", state)
    asked.interrupted = True
    with pytest.raises(interrupts.Interrupted):
        convert(tmp_path, *words)
    asked.interrupted = False
    convert(tmp_path, *words, "--overwrite")
    assert [options.resume for options in asked.options] == [False, False]
    assert not state.exists()


@pytest.mark.parametrize(
    "words", [("--tune-steps", "3"), ("--tune-seed", "1"), ("--max-minutes", "1"), ("--resume",), ("--tune-state", "x")]
)  # fmt: skip
def test_options_without_a_text_are_errors(words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="has no effect without --tune"):
        convert(tmp_path, *words)
    assert names_left(tmp_path) == []


def test_what_cannot_be_tuned_is_an_error_before_anything_is_done(asked: Asked, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    with pytest.raises(PlanError, match="nothing to tune"):
        run("convert", MODEL, "--outtype", "bf16", "--outfile", tmp_path / "x.gguf", "--tune", text)
    with pytest.raises(BambaQuantError, match="cannot be read"):
        convert(tmp_path, "--tune", tmp_path / "no.txt")
    with pytest.raises(OutputError, match="exists already"):
        (tmp_path / "x.gguf").touch()
        convert(tmp_path, "--tune", text)
    assert not asked.options


@pytest.mark.parametrize("words", [(), ("--overwrite",), ("--resume",)])
def test_a_file_that_is_not_a_state_is_kept(words: tuple[str, ...], asked: Asked, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    for wrong, complaint in (
        (text, "has other content"),
        (tmp_path / "no" / "x", "does not exist"),
        (tmp_path / "x.gguf", "the same name"),
    ):
        with pytest.raises(OutputError, match=complaint):
            convert(tmp_path, "--tune", text, "--tune-state", wrong, *words)
    assert not asked.options
    assert names_left(tmp_path) == ["text.txt"]


def test_a_dry_run_tunes_nothing(asked: Asked, tmp_path: Path) -> None:
    convert(tmp_path, "--tune", tmp_path / "text.txt", "--dry-run")
    assert not asked.options
    assert names_left(tmp_path) == ["text.txt"]


def test_the_first_and_the_last_step_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    show = show_tuning(Progress("tuning: step"), Progress("converting", 1))
    for step in range(1, 101):
        show(TuneProgress(step, 100, 0.1, 0.2, 0.3, 0.0))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["tuning: step 1 of 100", "tuning: step 100 of 100"]
    assert not sys.stderr.isatty()
