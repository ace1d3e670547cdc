"""GGUF's ``general.*`` keys, from the directory's name, its model card and the user's word, as llama.cpp's tools do."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import yaml
from gguf import GGUFValueType, GGUFWriter, Keys, Metadata, naming_convention
from gguf.gguf_writer import GGUFValue

from bamba_quant.checkpoint.gguf_values import Value, string
from bamba_quant.errors import PlanError


@dataclass(frozen=True)
class General:
    """``values`` by key, and the file name stem they make (without the type): see ``default_stem``."""

    values: dict[str, Value]
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
) -> General:
    """Who made the model, under what licence, how large it is.

    gguf-py's own heuristics read the directory; ``overrides`` is a JSON object of ``general.*`` keys. Raises
    ``PlanError`` for overrides that are no such object and for a model card whose front matter is no YAML.
    """
    _check_overrides(overrides)
    logging.getLogger("gguf").setLevel(logging.ERROR)
    try:
        metadata = Metadata.load(overrides, directory, model_name, elements)
    except yaml.YAMLError as error:
        raise PlanError(
            "the model card's front matter is no YAML",
            where=directory / "README.md",
            found=str(error),
            fix="correct it, or move README.md away",
        ) from error
    if metadata.name is None:
        metadata.name = directory.resolve().name
    recorder = GGUFWriter(None, architecture)
    recorder.add_type("model")
    metadata.set_gguf_meta_model(recorder)
    return General({key: _typed(value) for key, value in recorder.kv_data[0].items()}, metadata)


def _typed(recorded: GGUFValue) -> Value:
    item = recorded.sub_type
    if recorded.type == GGUFValueType.ARRAY and item is None:
        item = GGUFValueType.get_type(recorded.value[0])
    return Value(recorded.type, recorded.value, item)


def tool_version_key() -> dict[str, Value]:
    """The key that tells files of this tool: their q/k rows are in the right order, so ``repair`` leaves them alone."""
    from bamba_quant import __version__

    return {TOOL_VERSION: string(__version__)}


TOOL_VERSION = "bamba_quant.version"


def _check_overrides(file: Path | None) -> None:
    if file is None:
        return
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError("the metadata file cannot be read as JSON", where=file, found=str(error)) from error
    known = {
        value for name, value in vars(Keys.General).items() if not name.startswith("_") and "{" not in value
    }
    known |= {"general.base_models", "general.datasets"}
    if not isinstance(values, dict) or not values.keys() <= known:
        unknown = sorted(values.keys() - known) if isinstance(values, dict) else [type(values).__name__]
        raise PlanError(
            "the metadata file has keys that mean nothing",
            where=file,
            found=", ".join(unknown),
            expected="an object with keys among " + ", ".join(sorted(known)),
        )
