"""From a path to a plan for a GGUF file: the library's front door to conversion."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gguf import GGML_QUANT_VERSION, Keys, fill_templated_filename

from bamba_quant.checkpoint import ReadOptions
from bamba_quant.checkpoint.gguf_file import split_stem
from bamba_quant.checkpoint.gguf_values import GgufValue, string, uint32
from bamba_quant.checkpoint.imatrix import Imatrix, read_imatrix
from bamba_quant.errors import OutputError, PlanError
from bamba_quant.metadata.general import RECIPE_KEY, read_general, tool_version_key
from bamba_quant.metadata.tune_record import KEYS_PREFIX
from bamba_quant.planning.inspection import unread
from bamba_quant.planning.model import Model, open_model
from bamba_quant.planning.plan import Plan, plan_gguf, resolve_recipe
from bamba_quant.planning.repair import needs_repair
from bamba_quant.recipes import Recipe, TypeOverrides, plain_recipe, recipes
from bamba_quant.tokenizers import has_tokenizer, read_vocabulary


@dataclass(frozen=True)
class Conversion:
    """A plan, the model it reads and where it goes; ``writers.write_gguf(plan, outfile)`` executes it."""

    source: Model
    plan: Plan
    outfile: Path


def plan_conversion(
    model: str | Path,
    *,
    outtype: str | Recipe = "auto",
    outfile: str | Path | None = None,
    overrides: TypeOverrides | None = None,
    imatrix: Path | Imatrix | None = None,
    imatrix_strict: bool = False,
    allow_requantize: bool = False,
    split_max_bytes: int | None = None,
    keep_split: bool = False,
    model_name: str | None = None,
    metadata: Path | None = None,
    pre: str | None = None,
    vocab: bool = True,
    vocab_only: bool = False,
    allow_config_only: bool = False,
    reading: ReadOptions = ReadOptions(),
) -> Conversion:
    """Plan the conversion of a Hugging Face directory or a GGUF file to GGUF, reading headers and small files only.

    ``outtype`` is a recipe, the name of one, or "auto"; ``outfile`` is a file (in which ``{ftype}`` stands for the
    type) or a directory, by default the model's own. ``metadata``, ``model_name``, ``pre`` and ``vocab`` are for
    directories: a GGUF brings its own. With ``imatrix_strict`` a tensor that the file ``imatrix`` has no entry for is
    an error. With ``allow_config_only`` a directory with only a config.json will do, or that file, and the plan can
    only be shown. Raises a ``BambaQuantError`` for whatever llama.cpp could not run.
    """
    source = open_model(
        model,
        weights="none" if vocab_only else "optional" if allow_config_only else "required",
        reading=reading,
    )
    differences = source.architecture.check_gguf(source.config)
    recipe = outtype if isinstance(outtype, Recipe) else resolve_recipe(outtype, source.checkpoint)
    if source.checkpoint.kind == "gguf":
        if model_name or metadata or pre or not vocab or vocab_only:
            raise PlanError(
                "a GGUF input brings its metadata and vocabulary with it",
                where=source.checkpoint.path,
                fix="leave out --model-name, --metadata, --pre, --vocab-only and --no-vocab",
            )
        values, notes, stem = _of_gguf(source, recipe)
    else:
        if keep_split:
            raise PlanError("--keep-split is for GGUF inputs", fix="take --split-max-size for a directory")
        # Where there are no weights the tokenizer may be missing, too.
        vocab = vocab and not (source.config_only and not has_tokenizer(source.checkpoint.path))
        values, notes, stem = _of_directory(source, recipe, model_name, metadata, pre, vocab, vocab_only)
    weights = read_imatrix(imatrix, strict=imatrix_strict) if isinstance(imatrix, Path) else imatrix
    plan = plan_gguf(
        source,
        recipe,
        overrides or TypeOverrides(),
        values | (weights.metadata() if weights else {}) | tool_version_key(),
        imatrix=weights,
        allow_requantize=allow_requantize,
        split_max_bytes=split_max_bytes,
        keep_split=keep_split,
        notes=(*source.checkpoint.notes, *notes, *differences),
    )
    if vocab_only:
        plan = Plan(plan.architecture, plan.recipe, (), plan.metadata, (), plan.notes)
    return Conversion(source, plan, _outfile(outfile, source.checkpoint.path, stem, recipe.name))


Described = tuple[
    dict[str, GgufValue], tuple[str, ...], str
]  # key-values, notes, stem of the default file name


def _of_directory(
    source: Model,
    recipe: Recipe,
    model_name: str | None,
    metadata: Path | None,
    pre: str | None,
    vocab: bool,
    vocab_only: bool,
) -> Described:
    checkpoint, architecture = source.checkpoint, source.architecture.gguf_architecture(source.config)
    general = read_general(
        checkpoint.path,
        checkpoint.elements,
        architecture=architecture,
        model_name=model_name,
        overrides=metadata,
    )
    values = dict(general.values)
    for key, value in source.architecture.gguf_metadata(source.config).items():
        values[f"{architecture}.{key}"] = value
    values |= _file_type(recipe)
    notes: tuple[str, ...] = ()
    if vocab:
        vocabulary = read_vocabulary(checkpoint.path, source.config.vocab_size, pre)
        values |= vocabulary.metadata()
        notes = vocabulary.notes
    else:
        # llama.cpp's name for a model that takes and gives token ids only.
        values[Keys.Tokenizer.MODEL] = string("none")
    if checkpoint.unused:
        notes = (*notes, unread(checkpoint))
    if source.config_only:
        notes = (*notes, source.note, *(() if vocab else ("no vocabulary was planned",)))
    return values, notes, general.default_stem(recipe.name, vocab_only)


def _of_gguf(source: Model, recipe: Recipe) -> Described:
    """The input's own key-values but for what describes its types, shards and layout."""
    checkpoint = source.checkpoint
    if not isinstance(needs_repair(checkpoint.key_values), str):
        raise PlanError(
            "the input's q and k rows are in the wrong order, as llama.cpp's converter leaves them",
            where=checkpoint.path,
            fix="put them right first: bamba-quant repair FILE",
        )
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


def _outfile(given: str | Path | None, model: Path, stem: str, file_type: str) -> Path:
    place = Path(given) if given is not None else (model if model.is_dir() else model.parent)
    if _is_directory(place):
        return place / f"{stem}.gguf"
    if str(given).endswith("/"):
        raise OutputError("the directory of the output does not exist", where=place, fix="create it first")
    try:
        named = place.with_name(fill_templated_filename(place.name, file_type))
    except (KeyError, IndexError, ValueError) as error:
        raise OutputError(
            "the output's name holds a template that means nothing",
            where=place,
            expected="{ftype} alone between braces",
        ) from error
    if split_stem(named).name != named.name.removesuffix(".gguf"):
        raise OutputError(
            "the output is named like a shard of a split file",
            where=named,
            fix="leave the numbers out: --split-max-size adds them",
        )
    return named


def _is_directory(place: Path) -> bool:
    try:
        return place.is_dir()
    except OSError as error:
        raise OutputError("the output cannot be written", where=place, found=error.strerror) from error
