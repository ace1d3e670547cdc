"""A model card from GGUF's ``general.*`` keys, in the front matter that conversion reads them back from."""

from __future__ import annotations

import re
from typing import Any

import yaml
from gguf import Keys

from bamba_quant.checkpoint.gguf_values import KeyValues

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
        # A number in a header is believed only as far as there are keys.
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
