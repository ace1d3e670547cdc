"""Inputs from public bug reports, made by the generators beside the repository, behave as their heads say."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import Keys, TokenType
from transformers import AutoTokenizer

from bamba_quant.checkpoint import Checkpoint, ReadOptions, open_checkpoint
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import BambaQuantError
from bamba_quant.inference.loading import load_model
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.inspection import inspect_path
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.tokenizers.encoder import read_encoder
from bamba_quant.tokenizers.special_tokens import stop_tokens
from bamba_quant.writers import write_plan
from tests.support.conversion import to_gguf
from tests.support.shared import shared

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Runs the generator whose name begins with a number; what it makes is ``out``, of a suffix if one is given."""

    def run(number: str, *arguments: str, suffix: str = "") -> Path:
        (script,) = shared("cases").glob(f"{number}-*.py")
        out = tmp_path / f"out{suffix}"
        monkeypatch.setattr(sys, "argv", [str(script), str(out), str(embedded_model()), *arguments])
        runpy.run_path(str(script), run_name="__main__")
        return out

    return run


def encoded(checkpoint: Checkpoint, text: str) -> list[int]:
    return read_encoder(checkpoint).encode(text)


@pytest.mark.parametrize("arguments", [(), ("--pad",)])
def test_truncation_and_padding_of_a_tokenizer(make: Make, arguments: tuple[str, ...]) -> None:
    text = "The old mill stood by the river. " * 200
    whole = encoded(open_checkpoint(embedded_model()), text)
    assert len(whole) > 600
    found = open_checkpoint(make("01", *arguments))
    assert encoded(found, text) == whole
    assert encoded(found, "The old mill") == encoded(open_checkpoint(embedded_model()), "The old mill")


@pytest.mark.parametrize("arguments", [(), ("--added-tokens-json",)])
def test_added_tokens_outside_of_tokenizer_json(
    make: Make, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    model = make("02", *arguments)
    text = "<|im_start|>user\nHello<|im_end|>\n"
    expected = AutoTokenizer.from_pretrained(model).encode(text)
    assert {2048, 2049} <= set(expected)
    file = open_checkpoint(to_gguf(model, tmp_path / "x.gguf"))
    for checkpoint in (open_checkpoint(model), file):
        assert encoded(checkpoint, text) == expected
        assert "<|im_start|>" in read_encoder(checkpoint).decode(expected)
    assert file.key_values[Keys.Tokenizer.LIST].value[2048] == "<|im_start|>"
    special = not arguments  # added_tokens.json says of no token that it is special
    kind = file.key_values[Keys.Tokenizer.TOKEN_TYPE].value[2048]
    assert kind == (TokenType.CONTROL if special else TokenType.USER_DEFINED)


def test_several_tokens_end_a_text(make: Make, tmp_path: Path) -> None:
    model = make("04")
    for path in (model, to_gguf(model, tmp_path / "x.gguf")):
        assert {1, 576} <= set(stop_tokens(open_checkpoint(path)))


def test_an_adapter_beside_weights(make: Make) -> None:
    model = make("05")
    for read in (load_model, plan_conversion, lambda path: plan_quantization(path, "fp8-dynamic")):
        with pytest.raises(BambaQuantError, match=r"adapter[\s\S]*merge[\s\S]*--ignore-adapter"):
            read(model)
    assert any("adapter" in remark for remark in inspect_path(model).remarks)
    assert load_model(model, reading=ReadOptions(ignore_adapter=True)).weights


def test_an_adapter_alone(make: Make) -> None:
    with pytest.raises(BambaQuantError, match="adapter, not a model"):
        load_model(make("05", "--alone"))


def test_the_hubs_cache_and_several_templates(make: Make, tmp_path: Path) -> None:
    (snapshot,) = make("08").glob("models--acme--Mill-1B/snapshots/*")
    (snapshot / "README.md").unlink()
    before = AutoTokenizer.from_pretrained(snapshot).chat_template
    assert before.keys() == {"default", "tool_use"}
    plan = plan_conversion(snapshot)
    assert plan.metadata[Keys.General.NAME].value == "Mill 1B"
    for key in (Keys.Tokenizer.CHAT_TEMPLATE, Keys.Tokenizer.CHAT_TEMPLATE_N.format(name="tool_use")):
        assert key in plan.metadata
    write_plan(plan_quantization(snapshot, "fp8-dynamic"), tmp_path / "fp8")
    assert AutoTokenizer.from_pretrained(tmp_path / "fp8").chat_template == before
    card = (tmp_path / "fp8" / "README.md").read_text()
    assert "base_model: acme/Mill-1B" in card
    assert not re.search("0123456789" * 4, card)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("rope_freqs", "unknown rope_freqs.weight"),
        ("i32", "unknown position_ids.weight"),
        ("f64", r"output_norm.weight[\s\S]*f64"),
        ("twice", "'blk.1.ffn_norm.weight' twice"),
        ("bigendian", "big-endian"),
        ("v1", "version 1"),
    ],
)
def test_files_of_other_tools(make: Make, mode: str, message: str) -> None:
    with pytest.raises(BambaQuantError, match=message):
        plan_conversion(make("14", mode, suffix=".gguf"), outtype="q8_0")


def test_a_file_that_does_not_say_whether_bos_is_added(make: Make) -> None:
    encoder = read_encoder(open_checkpoint(make("27", suffix=".gguf")))
    assert encoder.bos == 0
    assert encoder.encode("The")[0] == 0
