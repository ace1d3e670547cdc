"""Where a text ends: transformers' rule for a directory, llama.cpp's own answers for a GGUF."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType, Keys, TokenType
from transformers import GenerationConfig
from typer.testing import CliRunner

from bamba_quant.checkpoint import open_checkpoint
from bamba_quant.checkpoint.gguf_values import array, uint32
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import BambaQuantError
from bamba_quant.tokenizers import read_vocabulary
from bamba_quant.tokenizers.encoder import read_encoder
from bamba_quant.tokenizers.gguf_vocabulary import read_gguf_vocabulary
from bamba_quant.tokenizers.llama_rules import END_OF_GENERATION_TEXTS, FILL_IN_MIDDLE_TEXTS
from bamba_quant.tokenizers.special_tokens import stop_tokens
from bamba_quant_cli.app import app
from tests.support.conversion import to_gguf
from tests.support.models import random_bamba, save_checkpoint
from tests.support.vocabularies import llama_vocabulary, write_vocabulary
from tests.tokenizers import test_sentencepiece

FILL_IN = [text for texts in FILL_IN_MIDDLE_TEXTS.values() for text in texts]
NAMED = [*sorted(END_OF_GENERATION_TEXTS), *FILL_IN]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "m"
    save_checkpoint(random_bamba(vocab_size=2064, num_hidden_layers=2, attn_layer_indices=[1]), made)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(embedded_model() / name, made / name)
    return made


def configure(
    directory: Path, generation: dict[str, Any] | None, config: dict[str, Any] | None = None
) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 1, **(config or {})}))
    (directory / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))


def add_tokens(directory: Path, *texts: str) -> None:
    (directory / "added_tokens.json").write_text(json.dumps({text: 2048 + i for i, text in enumerate(texts)}))


def stops_of(directory: Path) -> tuple[int, ...]:
    return stop_tokens(open_checkpoint(directory, weights=False))


@pytest.mark.parametrize("listed", [1, [1], [1, 576], [576, 1, 7], [1, 576, 7]])
def test_a_directory_and_its_gguf_stop_alike(listed: Any, directory: Path, tmp_path: Path) -> None:
    configure(directory, {"eos_token_id": listed})
    ours = stops_of(directory)
    theirs = GenerationConfig.from_pretrained(directory).eos_token_id
    assert list(ours) == (theirs if isinstance(theirs, list) else [theirs])
    file = write_vocabulary(directory, tmp_path / "m.gguf")
    assert set(ours) == set(llama_vocabulary(file).ending) == set(stops_of(file))
    assert not any("stops at" in note for note in read_vocabulary(directory, 2064).notes)


def test_generation_config_goes_first(directory: Path) -> None:
    configure(directory, None, {"eos_token_id": [1, 5]})
    assert stops_of(directory) == (1, 5)
    assert read_vocabulary(directory, 2064).special_ids["eot"] == 5
    configure(directory, {"eos_token_id": 1}, {"eos_token_id": [1, 5]})
    assert stops_of(directory) == (1,)
    assert "eot" not in read_vocabulary(directory, 2064).special_ids
    configure(directory, {"bos_token_id": 0}, {"eos_token_id": [1, 5]})
    assert stops_of(directory) == (1, 5)


def test_more_than_gguf_has_room_for(directory: Path, tmp_path: Path) -> None:
    """Tokens that llama.cpp knows by their text leave the room to others; what is lost is noted."""
    add_tokens(directory, "<|im_end|>", "<|eot_id|>")
    configure(directory, {"eos_token_id": [1, 2048, 2049, 576, 577]})
    file = write_vocabulary(directory, tmp_path / "m.gguf")
    assert set(stops_of(directory)) == set(stops_of(file)) == set(llama_vocabulary(file).ending)
    configure(directory, {"eos_token_id": [1, 576, 577, 578, 579]})
    ending = llama_vocabulary(write_vocabulary(directory, tmp_path / "n.gguf")).ending
    assert set(ending) == {1, 576, 577, 2048, 2049}
    notes = [note for note in read_vocabulary(directory, 2064).notes if "stops at" in note]
    assert "578, 579" in notes[0] and "2048, 2049" in notes[1]


def test_the_tokenizers_own_eos(directory: Path, tmp_path: Path) -> None:
    configure(directory, {"eos_token_id": [576]})
    file = write_vocabulary(directory, tmp_path / "m.gguf")
    assert set(llama_vocabulary(file).ending) == set(stops_of(file)) == {1, 576}
    assert any("stops at token 1," in note for note in read_vocabulary(directory, 2064).notes)


def check_types(file: Path, directory: Path, tmp_path: Path, *texts: str) -> None:
    """llama.cpp's types of tokens that are all normal ones in the file, and how it splits a text with them."""
    types = list(open_checkpoint(file).metadata[Keys.Tokenizer.TOKEN_TYPE].value)
    normal = array(GGUFValueType.INT32, [*types[:2048], *([1] * (len(types) - 2048))])
    file = write_vocabulary(directory, tmp_path / "normal.gguf", change={Keys.Tokenizer.TOKEN_TYPE: normal})
    text = "a " + " b".join(texts)
    llama = llama_vocabulary(file, [text])
    checkpoint = open_checkpoint(file)
    ours = read_gguf_vocabulary(file, checkpoint.metadata)
    assert ours is not None
    control = [token for token, bits in enumerate(llama.attributes) if bits & 8]  # LLAMA_TOKEN_ATTR_CONTROL
    assert control == [token for token, kind in enumerate(ours.types) if kind == TokenType.CONTROL]
    assert read_encoder(checkpoint).encode(text) == llama.tokens[0]


@pytest.mark.parametrize("text", [*NAMED, "<|start|>"])
def test_every_text_that_llama_cpp_knows(text: str, directory: Path, tmp_path: Path) -> None:
    """Whatever its type: of normal, user-defined and control tokens."""
    configure(directory, {"eos_token_id": 1})
    if text != "<|end_of_text|>":  # which the vocabulary has
        add_tokens(directory, text)
    file = write_vocabulary(directory, tmp_path / "m.gguf")
    ending = llama_vocabulary(file).ending
    in_table = text in END_OF_GENERATION_TEXTS or any(
        text in FILL_IN_MIDDLE_TEXTS[f"fim_{kind}"] for kind in ("pad", "rep", "sep")
    )
    stops = in_table and text != "<|end_of_text|>"
    check_types(file, directory, tmp_path, text)
    assert stops_of(file) == ending == ((1, 2048) if stops else (1,))


@pytest.mark.parametrize(
    "texts",
    [
        ("<|end|>", "<|return|>", "<|call|>"),
        ("<|end|>", "<|flush|>", "<|calls|>"),
        ("<|end|>", "<|return|>"),
        ("<|end|>", "<|call|>"),
        ("</s>", "<|tool_response>"),
        ("</s>", "<|plamo:eos|>"),
        ("</s>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>"),
    ],
)
def test_texts_that_change_each_other(texts: tuple[str, ...], directory: Path, tmp_path: Path) -> None:
    configure(directory, {"eos_token_id": 1})
    add_tokens(directory, *texts)
    file = write_vocabulary(directory, tmp_path / "m.gguf")
    assert stops_of(file) == llama_vocabulary(file).ending
    check_types(file, directory, tmp_path, *texts)


def test_nothing_names_an_end_of_text(directory: Path) -> None:
    configure(directory, None, {"eos_token_id": None})
    assert stops_of(directory) == ()
    notes = read_vocabulary(directory, 2064).notes
    assert any("no eos_token_id is given; llama.cpp stops at token 1," in note for note in notes)


@pytest.mark.parametrize("kind", ["eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"])
def test_every_key(kind: str, directory: Path, tmp_path: Path) -> None:
    configure(directory, {"eos_token_id": 1})
    key = f"tokenizer.ggml.{kind}_token_id"
    file = write_vocabulary(directory, tmp_path / "m.gguf", change={key: uint32(700)})
    assert stops_of(file) == llama_vocabulary(file).ending
    assert 700 in llama_vocabulary(file).ending
    dropped = write_vocabulary(directory, tmp_path / "n.gguf", drop=(Keys.Tokenizer.EOS_ID,))
    assert stops_of(dropped) == llama_vocabulary(dropped).ending


@pytest.mark.parametrize("options", [test_sentencepiece.LLAMA, test_sentencepiece.UNIGRAM])
def test_sentencepiece_models(options: dict[str, Any], tmp_path: Path) -> None:
    test_sentencepiece.train(tmp_path, **options)
    rows = test_sentencepiece.ROWS
    save_checkpoint(random_bamba(vocab_size=rows, num_hidden_layers=2, attn_layer_indices=[1]), tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 77]}))
    for number, drop in enumerate(((), (Keys.Tokenizer.EOS_ID,))):
        file = write_vocabulary(tmp_path, tmp_path / f"{number}.gguf", drop=drop)
        assert stops_of(file) == llama_vocabulary(file).ending
        assert 77 in llama_vocabulary(file).ending


@pytest.mark.parametrize("value", ["x", [1, "2"], 1.5, True, -2, {}, 2**31, [10**40]])
def test_ids_of_another_kind(value: Any, directory: Path) -> None:
    configure(directory, {"eos_token_id": value})
    with pytest.raises(BambaQuantError, match=r"eos_token_id[\s\S]*generation_config\.json"):
        stops_of(directory)


def test_many_ids_make_short_notes(directory: Path) -> None:
    configure(directory, {"eos_token_id": list(range(100_000))})
    notes = read_vocabulary(directory, 2064).notes
    assert max(map(len, notes)) < 300
    assert read_vocabulary(directory, 2064).types[1] == TokenType.CONTROL


def test_generate_stops_there(tmp_path: Path) -> None:
    """At the second id of the list, in the directory, in its GGUF, and in one whose vocabulary is the directory's."""
    directory = shutil.copytree(embedded_model(), tmp_path / "m")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 576]}))
    file = to_gguf(directory, tmp_path / "m.gguf", "bf16")
    bare = to_gguf(directory, tmp_path / "bare.gguf", "bf16", vocab=False)
    arguments = ["--prompt", "The old mill", "--max-tokens", "24", "--json"]
    free = ["generate", str(embedded_model()), *arguments, "--stop", "1"]
    going_on = json.loads(CliRunner().invoke(app, free, catch_exceptions=False).stdout)["tokens"]
    expected = going_on[: going_on.index(576)]
    for model in ([str(directory)], [str(file)], [str(bare), "--tokenizer", str(directory)]):
        done = CliRunner().invoke(app, ["generate", *model, *arguments], catch_exceptions=False)
        said = json.loads(done.stdout)
        assert (said["tokens"], said["finish_reason"]) == (expected, "stop")
