"""From a path to a plan for a GGUF file: the library's front door to conversion."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from bamba_reference.config import Config
from gguf import GGML_QUANT_VERSION, Keys, fill_templated_filename

from bamba_quant.architectures import architecture_of
from bamba_quant.checkpoint import Checkpoint, open_checkpoint
from bamba_quant.checkpoint.gguf_values import Value, string, uint32
from bamba_quant.errors import CheckpointError
from bamba_quant.general_metadata import read_general, tool_version_key
from bamba_quant.plan import Plan, plan_gguf, resolve_recipe
from bamba_quant.tokenizers import read_vocabulary


@dataclass(frozen=True)
class Conversion:
    """A plan, the checkpoint it reads and where it goes; ``writers.write_gguf(plan, outfile)`` executes it."""

    checkpoint: Checkpoint
    plan: Plan
    outfile: Path


def plan_conversion(
    model: str | Path,
    *,
    outtype: str = "auto",
    outfile: str | Path | None = None,
    split_max_bytes: int | None = None,
    model_name: str | None = None,
    metadata: Path | None = None,
    pre: str | None = None,
    vocab: bool = True,
    vocab_only: bool = False,
    ignore_config_keys: Collection[str] = (),
) -> Conversion:
    """Plan the conversion of a Hugging Face directory to GGUF, reading headers and small files only.

    ``outtype`` names a recipe or "auto"; ``outfile`` is a file (in which ``{ftype}`` stands for the type) or a
    directory, by default the model's own. Raises a ``BambaQuantError`` for whatever llama.cpp could not run.
    """
    checkpoint = open_checkpoint(model)
    if checkpoint.kind != "huggingface":
        raise CheckpointError(
            "convert reads a Hugging Face checkpoint directory",
            where=checkpoint.path,
            found=checkpoint.kind,
            fix="give the directory with config.json and the weights",
        )
    architecture = architecture_of(checkpoint.metadata)
    config = Config.from_hf(checkpoint.metadata, ignore=ignore_config_keys)
    architecture.check_gguf(config)
    rules = architecture.tensors(config)
    recipe = resolve_recipe(outtype, checkpoint)
    general = read_general(
        checkpoint.path,
        checkpoint.elements,
        architecture=architecture.gguf_architecture,
        model_name=model_name,
        overrides=metadata,
    )
    values: dict[str, Value] = dict(general.values)
    values |= {
        f"{architecture.gguf_architecture}.{key}": value
        for key, value in architecture.gguf_metadata(config).items()
    }
    values |= {
        Keys.General.FILE_TYPE: uint32(recipe.file_type),
        Keys.General.QUANTIZATION_VERSION: uint32(GGML_QUANT_VERSION),
    }
    notes: tuple[str, ...] = ()
    if vocab:
        vocabulary = read_vocabulary(checkpoint.path, config.vocab_size, pre)
        values |= vocabulary.metadata()
        notes = vocabulary.notes
    else:
        # llama.cpp's name for a model that takes and gives token ids only.
        values[Keys.Tokenizer.MODEL] = string("none")
    values |= tool_version_key()
    plan = plan_gguf(
        checkpoint, architecture, rules, recipe, values, split_max_bytes=split_max_bytes, notes=notes
    )
    if vocab_only:
        plan = Plan(plan.architecture, plan.recipe, (), plan.metadata, (), plan.notes)
    stem = general.default_stem(recipe.name, vocab_only)
    return Conversion(checkpoint, plan, _outfile(outfile, checkpoint.path, stem, recipe.name))


def _outfile(given: str | Path | None, model: Path, stem: str, file_type: str) -> Path:
    place = Path(given) if given is not None else model
    if place.is_dir():
        return place / f"{stem}.gguf"
    return place.with_name(fill_templated_filename(place.name, file_type))
