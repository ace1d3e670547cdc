"""The input of a quantization: a Hugging Face directory that is not quantized yet, or its configuration alone."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from bamba_quant.errors import PlanError
from bamba_quant.formats import format_named
from bamba_quant.source import Source, imagined_source, open_source

_CONFIG = "config.json"
_DTYPE_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def open_unquantized(model: Path, imagine: bool, ignore_config_keys: Collection[str]) -> tuple[Source, bool]:
    """The source, and whether its weights are imagined: ``imagine`` asks for that where there are none.

    ``model`` is a directory, or its config.json. Raises a ``BambaQuantError`` for an input that is quantized already,
    for a GGUF file, and for what is not supported.
    """
    if model.suffix == ".json" and model.name != _CONFIG and model.is_file():
        raise PlanError(
            "a configuration alone is given as a file called config.json",
            where=model,
            expected="a directory with config.json, or that file",
            fix="copy it under that name into a directory of its own",
        )
    directory = model.parent if model.name == _CONFIG and model.is_file() else model
    if directory.is_dir() and imagine and not _has_weights(directory):
        bare = open_source(directory, ignore_config_keys=ignore_config_keys, weights=False)
        _refuse_quantized(bare)
        stored = format_named(asked_dtype(bare))
        return imagined_source(directory, stored, ignore_config_keys=ignore_config_keys), True
    if directory.is_dir():
        bare = open_source(directory, ignore_config_keys=ignore_config_keys, weights=False)
        _refuse_quantized(bare)
    source = open_source(directory, ignore_config_keys=ignore_config_keys)
    if source.checkpoint.kind != "huggingface":
        raise PlanError(
            "quantized safetensors are made from a Hugging Face directory",
            where=source.checkpoint.path,
            found="a GGUF file",
            fix="make a directory of it first: bamba-quant export FILE.gguf DIRECTORY",
        )
    return source, False


def asked_dtype(source: Source) -> str:
    """The type that config.json has a model loaded in, float32 where it says nothing, as transformers has it."""
    metadata = source.checkpoint.metadata
    said = metadata.get("dtype", metadata.get("torch_dtype"))
    return _DTYPE_NAMES.get(str(said), "f32")


def _has_weights(directory: Path) -> bool:
    return any(any(directory.glob(pattern)) for pattern in ("*.safetensors", "*.bin"))


def _refuse_quantized(source: Source) -> None:
    found = source.checkpoint.metadata.get("quantization_config")
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else None
        raise PlanError(
            "the input is quantized already, and quantizing it again loses more than quantizing the original",
            where=source.checkpoint.path / _CONFIG,
            found=f"quantization_config, quant_method {method}",
            expected="f32, f16 or bf16 weights",
            fix="give the original",
        )
