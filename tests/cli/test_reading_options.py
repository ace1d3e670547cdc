"""Every command that reads a model directory takes the options that allow what is refused by default."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bamba_quant.errors import BambaQuantError
from bamba_quant_cli.app import app
from tests.support.models import random_bamba, save_checkpoint

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
READ_ONLY_GGUF_OR_SHOW = {"export", "repair", "inspect", "demo", "recipes", "history"}
OF_OTHERS = {"lm-eval"}  # whose options are the harness' own
OPTIONS = {"--ignore-config-key", "--ignore-adapter", "--strip-prefix"}


@pytest.mark.parametrize("name", COMMANDS)
def test_options(name: str) -> None:
    found = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    assert found & OPTIONS == (set() if name in READ_ONLY_GGUF_OR_SHOW | OF_OTHERS else OPTIONS)


def test_they_reach_the_reader_and_notes_are_printed(tmp_path: Path) -> None:
    directory = save_checkpoint(random_bamba(), tmp_path / "m")
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    command = ["compare", str(directory), str(save_checkpoint(random_bamba(), tmp_path / "n"))]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, BambaQuantError)
    assert "--ignore-adapter" in str(refused.exception)
    done = CliRunner().invoke(app, [*command, "--ignore-adapter"])
    assert done.exit_code == 0
    assert "note: m: the adapter beside the model is not applied" in done.stderr
    assert "all weights" in done.stdout or "of them the same" in done.stdout
