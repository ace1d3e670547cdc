"""Model cards: YAML front matter read in bounded time and memory, and a card written from GGUF's ``general.*`` keys."""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Any

import yaml
from gguf import Keys

from bamba_quant.checkpoint.gguf_values import KeyValues
from bamba_quant.errors import PlanError, repr_short
from bamba_quant.files.reading import not_utf8, opened

_MOST_CHARACTERS = 1 << 19
_MOST_BYTES = 4 * _MOST_CHARACTERS + 16  # of UTF-8, with the lines "---"
_MOST_NESTED = 30
_MOST_ALIASES = 1000
# Sexagesimal integers take quadratic time, and Python does not print those of more than 4,300 digits.
_LONG_NUMBER = re.compile(r"[-+]?[0-9.][0-9a-fA-FoxX_:.]{1000,}")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, where PyYAML was built with it


def read_front_matter(file: Path) -> dict[str, Any]:
    """The object between ``---`` lines at the beginning of ``file``; empty where there is none.

    Tabs and the language ``no`` in a list are read as gguf-py reads them. Raises ``PlanError`` for what is not plain
    YAML, and ``CheckpointError`` for a file that is not UTF-8 text.
    """
    lines = _read_start(file).splitlines()
    if not lines or lines[0] != "---":
        return {}
    end = lines.index("---", 1) if "---" in lines[1:] else len(lines)
    text = ("\n".join(lines[1:end]) + "\n").replace("- no\n", '- "no"\n').replace("\t", "  ")
    if len(text) > _MOST_CHARACTERS:
        raise _not_plain_yaml(file, f"{len(text):,} characters", f"at most {_MOST_CHARACTERS:,}")
    try:
        _check(file, text)
        found = yaml.load(text, Loader=_LOADER)
    # PyYAML does not wrap the errors of its constructors: a date of month 99, an empty number.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise _not_plain_yaml(file, str(error)) from error
    return found if isinstance(found, dict) else {}


def _read_start(file: Path) -> str:
    """As much of a card as can hold front matter; the rest may be of any length."""
    with opened(file) as (stream, size):
        raw = stream.read(_MOST_BYTES)
    try:
        # A character that is cut in two at the end is left out.
        return codecs.getincrementaldecoder("utf-8")().decode(raw, final=size <= len(raw))
    except UnicodeDecodeError as error:
        raise not_utf8(file, error) from error


def _check(file: Path, text: str) -> None:
    """Raise for what takes more than linear time to load (deep nesting, merge keys, long numbers), and for tags."""
    depth = aliases = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.AliasEvent):
            aliases += 1
        elif isinstance(event, yaml.ScalarEvent) and event.implicit[0]:
            if event.value == "<<":
                raise _not_plain_yaml(file, "a merge key, <<", "keys written out")
            if _LONG_NUMBER.fullmatch(event.value):
                raise _not_plain_yaml(file, f"a number of {len(event.value)} characters", "text in quotes")
        tag = getattr(event, "tag", None)
        if tag not in (None, "!"):
            raise _not_plain_yaml(file, f"a tag, {repr_short(tag)}", "plain values")
        if depth > _MOST_NESTED or aliases > _MOST_ALIASES:
            raise _not_plain_yaml(
                file,
                f"nesting of {depth} levels, {aliases} aliases",
                f"at most {_MOST_NESTED} levels and {_MOST_ALIASES} aliases",
            )


def _not_plain_yaml(file: Path, found: str, expected: str | None = None) -> PlanError:
    return PlanError(
        "the model card's front matter cannot be read as plain YAML",
        where=file,
        found=found,
        expected=expected,
        fix="correct it, or move README.md away",
    )


# Front matter by GGUF's key: Hugging Face's names, else those of gguf-py (metadata.py, apply_metadata_heuristic).
_NAMES = {
    Keys.General.LICENSE: "license",
    Keys.General.LICENSE_NAME: "license_name",
    Keys.General.LICENSE_LINK: "license_link",
    Keys.General.LANGUAGES: "language",
    Keys.General.TAGS: "tags",
    Keys.General.NAME: "model_name",
    Keys.General.AUTHOR: "model_author",
    Keys.General.VERSION: "model_version",
    Keys.General.ORGANIZATION: "model_organization",
    Keys.General.DESCRIPTION: "model_description",
    Keys.General.FINETUNE: "model_finetune",
    Keys.General.BASENAME: "model_basename",
    Keys.General.SIZE_LABEL: "model_size_label",
    Keys.General.URL: "model_url",
    Keys.General.DOI: "model_doi",
    Keys.General.UUID: "model_uuid",
    Keys.General.REPO_URL: "model_repo_url",
}
_ON_THE_HUB = re.compile(r"https?://huggingface\.co/(?:datasets/)?([^/]+/[^/]+)/?$")


def render_model_card(values: KeyValues, title: str, origin: str) -> bytes:
    """README.md: front matter, the model's name (or ``title``), its description and ``origin``, a sentence.

    Raises ``CheckpointError`` for a ``general.*`` key of another type.
    """
    front: dict[str, Any] = {}
    for key, name in _NAMES.items():
        found = values.texts(key) if values.is_array(key) else values.text(key)
        if found:
            front[name] = found
    for name, count, address in (
        ("base_model", Keys.General.BASE_MODEL_COUNT, Keys.General.BASE_MODEL_REPO_URL),
        ("datasets", Keys.General.DATASET_COUNT, Keys.General.DATASET_REPO_URL),
    ):
        # A count in a header is bounded by the number of keys.
        numbers = range(min(values.integer(count) or 0, len(values)))
        addresses = [values.text(address.format(id=number)) for number in numbers]
        if any(addresses):
            front[name] = [_hub_name(found) for found in addresses if found]
    front["library_name"] = "transformers"
    body = [f"# {values.text(Keys.General.NAME) or title}", values.text(Keys.General.DESCRIPTION), origin]
    matter = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    text = f"---\n{matter}---\n\n" + "\n\n".join(filter(None, body)) + "\n"
    return text.encode("utf-8", "replace")


def _hub_name(address: str) -> str:
    match = _ON_THE_HUB.match(address)
    return match[1] if match else address
