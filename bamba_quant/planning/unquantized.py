"""The input of a quantization: a Hugging Face directory that is not quantized yet, or its configuration alone."""

from __future__ import annotations

from pathlib import Path

from bamba_quant.checkpoint import ReadOptions
from bamba_quant.errors import PlanError
from bamba_quant.planning.source import (
    CONFIG,
    Source,
    config_only_model,
    directory_of,
    has_weights,
    open_source,
)
from bamba_reference.shown import shown


def open_unquantized(model: Path, allow_config_only: bool, reading: ReadOptions) -> Source:
    """The source, config_only where ``allow_config_only`` asks for that and there are no weights.

    ``model`` is a directory, or its config.json. Raises a ``BambaQuantError`` for an input that is quantized already,
    for a GGUF file, and for what is not supported.
    """
    if model.suffix == ".json" and model.name != CONFIG and model.is_file():
        raise PlanError(
            "a configuration alone is given as a file called config.json",
            where=model,
            expected="a directory with config.json, or that file",
            fix="copy it under that name into a directory of its own",
        )
    directory = directory_of(model)
    if directory.is_dir():
        _refuse_quantized(open_source(directory, reading=reading, weights=False))
        if allow_config_only and not has_weights(directory):
            return config_only_model(directory, reading=reading)
    source = open_source(directory, reading=reading)
    if source.checkpoint.kind != "huggingface":
        raise PlanError(
            "quantized safetensors are made from a Hugging Face directory",
            where=source.checkpoint.path,
            found="a GGUF file",
            fix="make a directory of it first: bamba-quant export FILE.gguf DIRECTORY",
        )
    return source


def _refuse_quantized(source: Source) -> None:
    found = source.checkpoint.metadata.get("quantization_config")
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else None
        raise PlanError(
            "the input is quantized already, and quantizing it again loses more than quantizing the original",
            where=source.checkpoint.path / CONFIG,
            found=f"quantization_config, quant_method {shown(method)}",
            expected="f32, f16 or bf16 weights",
            fix="give the original",
        )
