"""Which ids are special, which end a text, and which chat templates there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bamba_quant.checkpoint import Checkpoint
from bamba_quant.errors import TokenizerError, join_names, repr_short
from bamba_quant.files.json_file import object_list, read_json, required
from bamba_quant.files.reading import check_link, lexists, read_text
from bamba_quant.tokenizers.gguf_vocabulary import read_gguf_vocabulary
from bamba_quant.tokenizers.llama_rules import END_OF_GENERATION_TEXTS, end_of_generation_tokens
from bamba_quant.tokenizers.settings import TokenizerConfig
from bamba_quant.tokenizers.vocabulary import LARGEST_ID, Vocabulary

_STOPS = ("eos", "eot", "eom")  # where llama.cpp looks for tokens that end a text
_KINDS = ("bos", "eos", "unk", "sep", "pad", "mask")


def special_ids(
    config: TokenizerConfig,
    vocab_size: int,
    ids: Mapping[str, int],
    own: Mapping[str, int],
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Ids by kind, and notes: as the settings name them, then the tokenizer itself, then the model's settings.

    ``ids`` maps text to id. A model that stops at several tokens gets the first as "eos", the next two as "eot" and
    "eom". Notes name those beyond, ids that the embedding has no row for, and where llama.cpp stops besides. Raises
    ``TokenizerError`` for a special token that is not in the vocabulary and for settings of another kind.
    """
    named = ((kind, special_id(config, kind, ids, own)) for kind in (*own, *_KINDS))
    special = {kind: token for kind, token in named if token is not None}
    notes: list[str] = []
    for name in ("config.json", "generation_config.json"):
        file = config.directory / name
        if not lexists(file):
            continue
        values = read_json(file, "the model's settings")
        for kind in _KINDS:
            given = token_ids(values, f"{kind}_token_id", file)
            tokens = [token for token in given if token < vocab_size]
            outside = [token for token in given if token >= vocab_size]
            if outside:
                notes.append(
                    f"{name} says {kind}_token_id = {join_names(outside)}, which no row of the embedding has; it was "
                    "left out"
                )
            if kind != "eos" and tokens:
                special.setdefault(kind, tokens[0])
    source, stops = directory_stop_tokens(config.directory)
    stops = [token for token in stops if token < vocab_size]
    return special, (*notes, *_assign_stop_kinds(special, stops, source, ids))


def special_id(
    config: TokenizerConfig, kind: str, ids: Mapping[str, int], own: Mapping[str, int]
) -> int | None:
    """The id of a special token: as the settings name it, else the tokenizer's ``own``.

    Raises ``TokenizerError`` for one that is not in the vocabulary.
    """
    text = config.special_token(kind)
    if text is None:
        return own.get(kind)
    if text not in ids:
        raise TokenizerError(
            f"the {kind} token is not in the vocabulary",
            where=config.directory,
            found=repr_short(text),
            fix=f"correct {kind}_token in tokenizer_config.json",
        )
    return ids[text]


def _assign_stop_kinds(
    ids: dict[str, int], stops: list[int], source: str, texts: Mapping[str, int]
) -> Iterator[str]:
    """Add ``stops`` to ``ids`` under the kinds that end a text in llama.cpp; notes on what differs there."""
    if stops:
        ids.setdefault("eos", stops[0])
    by_text = {texts[text] for text in END_OF_GENERATION_TEXTS if text in texts}
    wanted = [token for token in stops if token not in (ids.get(kind) for kind in _STOPS)]
    free = [kind for kind in _STOPS if kind not in ids]
    if len(wanted) > len(free):
        wanted.sort(key=lambda token: token in by_text)  # llama.cpp finds those by their text
    ids.update(zip(free, wanted, strict=False))
    placed = {ids[kind] for kind in _STOPS if kind in ids}
    lost = [token for token in wanted if token not in placed | by_text]
    if lost:
        yield (
            f"{source} stops at token {join_names(lost)} too; GGUF has room for three such tokens, so llama.cpp "
            "will not"
        )
    more = sorted((placed | by_text) - set(stops))
    if more:
        several = f"token {join_names(more)}, which the tokenizer or its text says"
        yield (
            f"llama.cpp also stops at {several}; {source} does not"
            if source
            else f"no eos_token_id is given; llama.cpp stops at {several}"
        )
    if "eos" not in ids:
        yield "nothing in the directory says where a text ends"


def chat_templates(config: TokenizerConfig) -> dict[str, str]:
    """Templates by name, the usual one under "default": from chat_template.jinja, .json or the tokenizer's settings."""
    directory, found, where = config.directory, config.values.get("chat_template"), config.file
    if lexists(directory / "chat_template.jinja"):
        check_link(directory / "chat_template.jinja", directory)
        found = read_text(directory / "chat_template.jinja", "a chat template")
    elif found is None and lexists(directory / "chat_template.json"):
        where = directory / "chat_template.json"
        found = read_json(where, "a chat template").get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(found, str):
        templates["default"] = found
    elif isinstance(found, list):
        for entry in object_list({"chat_template": found}, "chat_template", where, TokenizerError):
            name = required(entry, "name", str, where, TokenizerError)
            _add_template(templates, name, required(entry, "template", str, where, TokenizerError), where)
    elif found is not None:
        raise TokenizerError(
            "the chat template is invalid",
            where=where,
            found=repr_short(found),
            expected="a string, or a list of objects with name and template",
        )
    for extra in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        check_link(extra, directory)
        _add_template(templates, extra.stem, read_text(extra, "a chat template"), extra)
    return templates


def _add_template(templates: dict[str, str], name: str, text: str, where: Path) -> None:
    if name in templates or any("\ud800" <= letter <= "\udfff" for letter in name):
        raise TokenizerError(
            "a chat template's name is repeated, or is not text",
            where=ascii(str(where)),
            found=ascii(repr_short(name)),
            expected="names that differ",
        )
    templates[name] = text


def stop_tokens(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The tokens that end a text, empty where no file names one."""
    if checkpoint.kind != "gguf":
        return tuple(directory_stop_tokens(checkpoint.path)[1])
    vocabulary = read_gguf_vocabulary(checkpoint.path, checkpoint.metadata)
    return () if vocabulary is None else llama_stop_tokens(vocabulary)


def directory_stop_tokens(directory: Path) -> tuple[str, list[int]]:
    """``eos_token_id`` and the file that has it: generation_config.json goes before config.json."""
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        values = read_json(file, "the model's settings") if lexists(file) else {}
        if values.get("eos_token_id") is not None:
            return name, token_ids(values, "eos_token_id", file)
    return "", []


def token_ids(values: Mapping[str, Any], key: str, file: Path) -> list[int]:
    """One id or a list of them without repetitions; -1 means none."""
    listed = values.get(key)
    tokens = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(type(token) is int and -1 <= token <= LARGEST_ID for token in tokens):
        raise TokenizerError(
            f"{key} is not a token id",
            where=file,
            found=repr_short(listed),
            expected="an id, or a list of ids",
        )
    return list(dict.fromkeys(token for token in tokens if token >= 0))


def llama_stop_tokens(vocabulary: Vocabulary) -> tuple[int, ...]:
    """The tokens for which llama.cpp's ``llama_vocab_is_eog`` is true, smallest first."""
    ids = {text: token for token, text in enumerate(vocabulary.tokens)}
    return tuple(sorted(end_of_generation_tokens(ids, vocabulary.all_special)))
