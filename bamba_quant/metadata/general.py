"""GGUF's ``general.*`` keys, from the directory's name, its model card and options, as in llama.cpp's tools."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, GGUFWriter, Metadata, naming_convention
from gguf.gguf_writer import GGUFValue

from bamba_quant.checkpoint.gguf_values import GgufValue, string
from bamba_quant.errors import PlanError
from bamba_quant.files.json_file import read_json
from bamba_quant.metadata.model_name import ModelName, name_of
from bamba_quant.metadata.sources import checked_text, read_card, read_overrides, read_sampling


@dataclass(frozen=True)
class GeneralMetadata:
    """``values`` by key, and the file name stem they make (without the type): see ``default_stem``."""

    values: dict[str, GgufValue]
    metadata: Metadata

    def default_stem(self, file_type: str, vocab_only: bool) -> str:
        """llama.cpp's default name: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#gguf-naming-convention."""
        known = self.metadata
        stem: str = naming_convention(
            known.name,
            known.basename,
            known.finetune,
            known.version,
            None if vocab_only else known.size_label,
            None if vocab_only else file_type,
            "vocab" if vocab_only else None,
        )
        return stem


def read_general(
    directory: Path, elements: int, *, architecture: str, model_name: str | None, overrides: Path | None
) -> GeneralMetadata:
    """Who made the model, under what licence, how large it is.

    gguf-py's own heuristics work on what the module ``model_card`` has checked; ``overrides`` is a JSON object of
    ``general.*`` keys, of which null takes a key away. Raises ``PlanError`` naming file and key for values that
    a GGUF cannot store.
    """
    # It warns of what is checked and named here.
    logging.getLogger("metadata").setLevel(logging.CRITICAL)
    own = name_of(directory)
    card = read_card(directory / "README.md")
    metadata = Metadata.apply_metadata_heuristic(
        Metadata(),
        card,
        _name_or_path(directory / "config.json", own),
        Path(own.name),
        elements,
    )
    for attribute, value in (
        read_sampling(directory / "generation_config.json") | read_overrides(overrides)
    ).items():
        setattr(metadata, attribute, value)
    if model_name is not None:
        metadata.name = checked_text("--model-name", model_name, None)
    if metadata.name is None:
        metadata.name = own.name
    if not metadata.name.strip():
        raise PlanError("the model has no name", where=directory, fix="name it with --model-name")
    recorder = GGUFWriter(None, architecture)
    recorder.add_type("model")
    metadata.set_gguf_meta_model(recorder)
    return GeneralMetadata(
        {key: _to_gguf_value(value) for key, value in recorder.kv_data[0].items()}, metadata
    )


def _name_or_path(file: Path, own: ModelName) -> dict[str, Any]:
    """The model's name in config.json, else its name on the Hub.

    A path on its authors' disk is not a name: falcon-mamba-7b has "./".
    """
    name = read_json(file, "config.json is what says which model this is").get("_name_or_path") or None
    if name is not None:
        name = checked_text("_name_or_path", name, file)
        name = None if name.startswith((".", "/")) or name.endswith("/") else name
    if own.commit and (name is None or name.count("/") > 1):
        name = own.full_name
    return {} if name is None else {"_name_or_path": name}


def _to_gguf_value(recorded: GGUFValue) -> GgufValue:
    item = recorded.sub_type
    if recorded.type == GGUFValueType.ARRAY and item is None:
        item = GGUFValueType.get_type(recorded.value[0])
    return GgufValue(recorded.type, recorded.value, item)


def tool_version_key() -> dict[str, GgufValue]:
    """The key that tells files of this tool: their q/k rows are in the right order, so ``repair`` leaves them alone."""
    from bamba_quant import __version__

    return {TOOL_VERSION_KEY: string(__version__)}


TOOL_VERSION_KEY = "bamba_quant.version"
# Name of the file's recipe, where general.file_type has no number for it.
RECIPE_KEY = "bamba_quant.recipe"
