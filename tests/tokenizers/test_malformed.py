"""A tokenizer's files that are not what they should be are refused by name, with nothing decided in silence."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from bamba_quant.checkpoint import open_checkpoint
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import CheckpointError, TokenizerError
from bamba_quant.tokenizers import Vocabulary, read_vocabulary
from bamba_quant.tokenizers.encoder import read_encoder
from bamba_quant.tokenizers.library_guard import library_errors

GOOD: dict[str, Any] = json.loads((embedded_model() / "tokenizer.json").read_text())
SETTINGS: dict[str, Any] = json.loads((embedded_model() / "tokenizer_config.json").read_text())
ROWS = max(GOOD["model"]["vocab"].values()) + 101  # with rows to spare
FREE = ROWS - 50


def read(
    directory: Path,
    tokenizer: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    pre: str | None = None,
    **files: dict[str, Any],
) -> Vocabulary:
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer or GOOD))
    (directory / "tokenizer_config.json").write_text(json.dumps(SETTINGS | (settings or {})))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return read_vocabulary(directory, ROWS, pre)


def model(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tokenizer: tokenizer["model"].update(changes)


def entry(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tokenizer: tokenizer["model"]["vocab"].update(changes)


def merge(one: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tokenizer: tokenizer["model"]["merges"].append(one)


def added(one: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tokenizer: tokenizer["added_tokens"].append(one)


def top(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tokenizer: tokenizer.update(changes)


def nested(levels: int) -> dict[str, Any]:
    step: dict[str, Any] = {"type": "Nothing"}
    for _ in range(levels):
        step = {"type": "Sequence", "pretokenizers": [step]}
    return step


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (model(vocab=[["a", 0]]), "vocab"),
        (model(vocab=5), "vocab"),
        (model(type=["BPE"]), "BPE"),
        (model(merges=5), "merges"),
        (model(ignore_merges="no"), "ignore_merges"),
        (model(dropout=[1]), "dropout"),
        (top(model=[]), "model"),
        (top(model="BPE"), "model"),
        (entry(zz="5"), "zz"),
        (entry(zz=-1), "zz"),
        (entry(zz=1.0), "zz"),
        (entry(zz=True), "zz"),
        (entry(zz=700), r"two texts under one id[\s\S]*700[\s\S]*zz"),
        (merge(5), "two parts"),
        (merge(["a", "b", "c"]), "two parts"),
        (merge([None, "b"]), "two parts"),
        (merge("a b c"), "two parts"),
        (merge(["qqq", "zzz"]), "qqq"),
        (top(added_tokens={"a": 1}), "added_tokens"),
        (added("a"), "added_tokens"),
        (added({}), "id is missing"),
        (added({"id": "9", "content": "x"}), "id"),
        (added({"id": FREE, "content": 3}), "content"),
        (added({"id": FREE, "content": "x", "special": "yes"}), "special"),
        (added({"id": FREE, "content": "a"}), rf"one text under two ids[\s\S]*'a'[\s\S]*{FREE}"),
        (added({"id": 700, "content": "new"}), "two texts under one id"),
        (top(pre_tokenizer="x"), "pre_tokenizer"),
        (top(pre_tokenizer={}), "type"),
        (top(pre_tokenizer={"type": 5}), "type"),
        (top(pre_tokenizer={"type": "Sequence"}), "pretokenizers"),
        (top(pre_tokenizer={"type": "Sequence", "pretokenizers": [5]}), "pretokenizers"),
        (top(pre_tokenizer={"type": "Split", "pattern": "x", "behavior": "Isolated"}), "Split"),
        (top(pre_tokenizer={"type": "Split"}), "Split"),
        (top(pre_tokenizer=nested(30)), "Nothing"),
        (top(normalizer=[]), "normalizer"),
        (top(normalizer={"type": "Sequence"}), "normalizers"),
        (top(post_processor={"type": "Nope"}), "post-processor"),
        (top(post_processor="a"), "post-processor"),
    ],
)
def test_tokenizer_json(change: Callable[[dict[str, Any]], None], complaint: str, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(GOOD)
    change(tokenizer)
    with pytest.raises(TokenizerError, match=complaint) as error:
        read(tmp_path, tokenizer)
    assert "tokenizer.json" in str(error.value)


def template(*single: dict[str, Any], tokens: dict[str, Any] | None = None) -> dict[str, Any]:
    pair = [{"Sequence": {"id": each, "type_id": 0}} for each in "AB"]
    return {
        "type": "TemplateProcessing",
        "single": list(single),
        "pair": pair,
        "special_tokens": tokens or {},
    }


TEXT = {"Sequence": {"id": "A", "type_id": 0}}
UNKNOWN = {"SpecialToken": {"id": "<x>", "type_id": 0}}
PANICKING = [
    template(UNKNOWN, TEXT),
    template({"Sequence": {"id": "B", "type_id": 0}}),
    {"type": "Sequence", "processors": [{"type": "Sequence", "processors": [template(UNKNOWN)]}]},
]


@pytest.mark.parametrize("processor", PANICKING)
def test_a_post_processor_at_which_the_library_panics(
    processor: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither the panic, which is not an Exception, nor its backtrace reaches the user."""
    tokenizer = GOOD | {"post_processor": processor}
    with pytest.raises(TokenizerError, match="post-processor"):
        read(tmp_path, tokenizer)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TokenizerError, match="post-processor"):
        read_encoder(open_checkpoint(tmp_path, weights=False))
    assert capfd.readouterr().err == ""


def test_a_panic_is_an_error_and_an_interrupt_is_not() -> None:
    processors = Tokenizer.from_str(json.dumps(GOOD | {"post_processor": PANICKING[0]}))
    with pytest.raises(TokenizerError, match="cannot be run"), library_errors("here"):
        processors.encode("a")
    for interrupt in (KeyboardInterrupt, SystemExit):
        with pytest.raises(interrupt), library_errors("here"):
            raise interrupt


def test_a_post_processor_that_adds_a_token_without_a_text(tmp_path: Path) -> None:
    tokens = {"<x>": {"id": "<x>", "ids": [2**31], "tokens": ["<x>"]}}
    tokenizer = GOOD | {"post_processor": template(UNKNOWN, TEXT, tokens=tokens)}
    with pytest.raises(TokenizerError, match="special tokens"):
        read(tmp_path, tokenizer)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TokenizerError, match="vocabulary does not have"):
        read_encoder(open_checkpoint(tmp_path, weights=False))


@pytest.mark.parametrize("token", [2**31, 2**32, 10**30, -1])
def test_ids_out_of_range(token: int, tmp_path: Path) -> None:
    """They are refused before anything of that size is made."""
    for change in (entry(zz=token), added({"id": token, "content": "<x>"})):
        tokenizer = copy.deepcopy(GOOD)
        change(tokenizer)
        with pytest.raises(TokenizerError, match="2147483647"):
            read(tmp_path, tokenizer)


def test_more_rows_than_any_vocabulary(tmp_path: Path) -> None:
    """Each row without a token gets a name, which a damaged vocab_size would make billions of."""
    read(tmp_path)
    with pytest.raises(TokenizerError, match="vocab_size = 2147483647"):
        read_vocabulary(tmp_path, 2**31 - 1)


def test_errors_are_short(tmp_path: Path) -> None:
    many = [{"type": "Split", "pattern": {"Regex": "x" * 10_000}, "behavior": "Isolated"}] * 1000
    long = "x" * 100_000
    changes = [
        top(pre_tokenizer={"type": "Sequence", "pretokenizers": many}),
        top(normalizer={"type": "Sequence", "normalizers": [{"type": long}] * 100}),
        top(pre_tokenizer={"type": long}),
        entry(**{long: "x"}),
        added({"id": 700, "content": long}),
        merge([long, long]),
        model(type=long),
        top(post_processor=template({"SpecialToken": {"id": long, "type_id": 0}})),
        top(post_processor={"type": long}),
    ]
    for change in changes:
        tokenizer = copy.deepcopy(GOOD)
        change(tokenizer)
        with pytest.raises(TokenizerError) as error:
            read(tmp_path, tokenizer)
        assert len(str(error.value)) < 6000
        assert len(str(error.value).splitlines()) < 14
    with pytest.raises(TokenizerError) as error:
        read(tmp_path, settings={"pad_token": [long] * 100})
    assert len(str(error.value)) < 1000


def test_a_lone_surrogate(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(GOOD)
    tokenizer["added_tokens"].append({"id": FREE, "content": "\ud800", "special": False})
    with pytest.raises(CheckpointError, match=r"surrogate[\s\S]*tokenizer\.json"):
        read(tmp_path, tokenizer)


def test_a_token_with_an_unused_rows_name(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(GOOD)
    tokenizer["added_tokens"].append({"id": FREE, "content": f"[PAD{FREE + 1}]", "special": False})
    tokens = read(tmp_path, tokenizer).tokens
    assert tokens[FREE] == f"[PAD{FREE + 1}]"
    assert tokens[FREE + 2] == f"[PAD{FREE + 2}]"
    assert len(set(tokens)) == ROWS


def test_pre_does_not_switch_off_the_normalizers_check(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="Lowercase"):
        read(tmp_path, GOOD | {"normalizer": {"type": "Lowercase"}}, pre="llama-bpe")
    noted = read(tmp_path, GOOD | {"normalizer": {"type": "NFC"}}, pre="llama-bpe").notes
    assert any("NFC" in note for note in noted)
    with pytest.raises(TokenizerError, match="--pre"):
        read(tmp_path, pre="")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bos_token", 5),
        ("bos_token", ["x"]),
        ("bos_token", {"content": 5}),
        ("bos_token", {}),
        ("bos_token", "nowhere"),
        ("add_bos_token", "x"),
        ("add_eos_token", 1),
        ("chat_template", 5),
        ("chat_template", [1]),
        ("chat_template", {"a": 1}),
        ("chat_template", [{"name": "a"}]),
        ("chat_template", [{"name": 5, "template": "x"}]),
        ("chat_template", [{"name": "a", "template": "x"}, {"name": "a", "template": "y"}]),
    ],
)
def test_tokenizer_config(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=f"{key}|template|name is not a string"):
        read(tmp_path, settings={key: value})


def test_chat_templates(tmp_path: Path) -> None:
    def found(**settings: Any) -> dict[str, str]:
        return dict(read(tmp_path, settings=settings).chat_templates)

    assert found(chat_template=None) == {}
    assert found(chat_template="x") == {"default": "x"}
    both = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}]
    assert found(chat_template=both) == {"default": "x", "tool_use": "y"}
    (tmp_path / "chat_template.json").write_text('{"chat_template": "z"}')
    assert found(chat_template=None) == {"default": "z"}
    assert found(chat_template="x") == {"default": "x"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("r")
    (tmp_path / "chat_template.jinja").write_text("j\N{WAVING HAND SIGN}")
    assert found(chat_template="x") == {"default": "j\N{WAVING HAND SIGN}", "rag": "r"}
    (tmp_path / "additional_chat_templates" / "default.jinja").write_text("d")
    with pytest.raises(TokenizerError, match="default"):
        found()


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/x.jinja"])
def test_a_template_that_is_no_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"\.jinja is not UTF-8"):
        read(tmp_path)


def test_a_template_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text('{"chat_template": [1]}')
    with pytest.raises(TokenizerError, match=r"chat_template\.json"):
        read(tmp_path, settings={"chat_template": None})


def stops(
    directory: Path, settings: dict[str, Any], *configs: dict[str, Any]
) -> tuple[dict[str, int], list[str]]:
    files = dict(zip(("config", "generation_config"), configs, strict=False))
    vocabulary = read(directory, settings=settings, **files)
    return dict(vocabulary.special_ids), [note for note in vocabulary.notes if "token" in note]


def test_stop_tokens(tmp_path: Path) -> None:
    settings = {f"{kind}_token": None for kind in ("eos", "unk", "sep", "pad", "mask")}
    ids, notes = stops(tmp_path, settings, {"eos_token_id": 1}, {"eos_token_id": [1, 5]})
    assert (ids, notes) == ({"bos": 0, "eos": 1, "eot": 5}, [])
    # A token that pads may also stop.
    ids, notes = stops(tmp_path, settings, {"eos_token_id": 1, "pad_token_id": 2}, {"eos_token_id": [1, 2]})
    assert (ids, notes) == ({"bos": 0, "eos": 1, "pad": 2, "eot": 2}, [])
    ids, notes = stops(tmp_path, settings, {}, {"eos_token_id": [1, 5, 6, 7]})
    assert ids == {"bos": 0, "eos": 1, "eot": 5, "eom": 6}
    assert len(notes) == 1 and "token 7" in notes[0]
    ids, notes = stops(tmp_path, settings, {"eos_token_id": ROWS, "pad_token_id": -1}, {})
    assert ids == {"bos": 0}
    assert len(notes) == 2 and str(ROWS) in notes[0] and "stops at token 1," in notes[1]


@pytest.mark.parametrize("value", ["x", [1, "2"], 1.5, True, -2, {}])
@pytest.mark.parametrize("name", ["config", "generation_config"])
def test_stop_tokens_of_another_kind(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=rf"eos_token_id[\s\S]*{name}\.json"):
        read(tmp_path, **{name: {"eos_token_id": value}})


@pytest.mark.parametrize(("name", "content"), [("tokenizer.json", b"{}"), ("tokenizer.model", b"IQ== 0\n")])
def test_an_encoder_that_cannot_be_run(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match="cannot be run"):
        read_encoder(open_checkpoint(tmp_path, weights=False))
