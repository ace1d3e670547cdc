"""The key-values of a GGUF file, from a Hugging Face directory or from another GGUF, and the file's name."""

from __future__ import annotations

import re
from pathlib import Path

from gguf import GGML_QUANT_VERSION, Keys, fill_templated_filename

from bamba_quant.checkpoint import Checkpoint
from bamba_quant.checkpoint.gguf_file import split_stem
from bamba_quant.checkpoint.gguf_values import GgufValue, string, uint32
from bamba_quant.errors import OutputError
from bamba_quant.metadata.general import RECIPE_KEY, read_general
from bamba_quant.metadata.model_name import output_directory
from bamba_quant.metadata.tune_record import KEYS_PREFIX
from bamba_quant.planning.model import Model
from bamba_quant.planning.row_order import check_row_order
from bamba_quant.recipes import Recipe, plain_recipe, recipes
from bamba_quant.tokenizers import read_vocabulary

Described = tuple[
    dict[str, GgufValue], tuple[str, ...], str
]  # key-values, notes, stem of the default file name


def describe_directory(
    model: Model,
    recipe: Recipe,
    *,
    model_name: str | None,
    overrides: Path | None,
    pre: str | None,
    vocab: bool,
    vocab_only: bool,
) -> Described:
    """The key-values for the model in a directory, without a vocabulary unless ``vocab``."""
    checkpoint, architecture = model.checkpoint, model.architecture.gguf_architecture(model.config)
    general = read_general(
        checkpoint.path,
        checkpoint.elements,
        architecture=architecture,
        model_name=model_name,
        overrides=overrides,
    )
    values = dict(general.values)
    for key, value in model.architecture.gguf_metadata(model.config).items():
        values[f"{architecture}.{key}"] = value
    values |= _file_type(recipe)
    notes: tuple[str, ...] = ()
    if vocab:
        vocabulary = read_vocabulary(checkpoint.path, model.config.vocab_size, pre)
        values |= vocabulary.metadata()
        notes = vocabulary.notes
    else:
        # llama.cpp's name for a model that takes and gives token ids only.
        values[Keys.Tokenizer.MODEL] = string("none")
    notes = (*notes, *model.notes)
    if model.config_only and not vocab:
        notes = (*notes, "no vocabulary was planned")
    return values, notes, general.default_stem(recipe.name, vocab_only)


def describe_gguf(checkpoint: Checkpoint, recipe: Recipe) -> Described:
    """The key-values of a GGUF except those that describe its types, shards and layout."""
    check_row_order(checkpoint)
    dropped = (Keys.General.ALIGNMENT, "split.", "quantize.imatrix.", RECIPE_KEY, KEYS_PREFIX)
    values = {key: value for key, value in checkpoint.metadata.items() if not key.startswith(dropped)}
    stem = split_stem(checkpoint.path).name
    types = "|".join(re.escape(known.name) for known in recipes())
    stem = re.sub(rf"[-.]({types})$", "", stem, flags=re.IGNORECASE)
    return values | _file_type(recipe), (), f"{stem}-{recipe.name.upper()}"


def _file_type(recipe: Recipe) -> dict[str, GgufValue]:
    values: dict[str, GgufValue] = {
        Keys.General.FILE_TYPE: uint32(recipe.file_type),
        Keys.General.QUANTIZATION_VERSION: uint32(GGML_QUANT_VERSION),
    }
    return values if plain_recipe(recipe.file_type) == recipe else values | {RECIPE_KEY: string(recipe.name)}


def output_file(given: str | Path | None, model: Path, stem: str, file_type: str) -> Path:
    """The GGUF's path: ``given``, ``stem`` in the directory ``given``, or ``stem`` in the default directory.

    ``{ftype}`` in ``given`` stands for ``file_type``. Raises ``OutputError`` for a directory that does not exist, an
    unknown template, and a name like a shard's.
    """
    path = Path(given) if given is not None else output_directory(model)
    if _is_directory(path):
        return path / f"{stem}.gguf"
    if str(given).endswith("/"):
        raise OutputError("the directory of the output does not exist", where=path, fix="create it first")
    try:
        named = path.with_name(fill_templated_filename(path.name, file_type))
    except (KeyError, IndexError, ValueError) as error:
        raise OutputError(
            "the output's name contains an unknown template",
            where=path,
            expected="{ftype} alone between braces",
        ) from error
    if split_stem(named).name != named.name.removesuffix(".gguf"):
        raise OutputError(
            "the output is named like a shard of a split file",
            where=named,
            fix="leave the numbers out: --split-max-size adds them",
        )
    return named


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise OutputError("the output's path cannot be accessed", where=path, found=error.strerror) from error
