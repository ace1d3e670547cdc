"""The base and the candidates: open them, check that they can be compared, and describe them for a report."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gguf import Keys, LlamaFileType

from bamba_quant.checkpoint import Checkpoint, ReadOptions
from bamba_quant.codecs import Ignored, SafetensorsCodec, codecs
from bamba_quant.errors import BambaQuantError, join_names
from bamba_quant.evaluation.input_files import hash_files
from bamba_quant.evaluation.logits_file import LogitsFile
from bamba_quant.evaluation.provenance import ModelFile, TypeTotal, tuned_name
from bamba_quant.evaluation.stored_types import AS_COMPUTED, StoredTypes
from bamba_quant.files.reading import TOKENIZER_BYTES, read_bytes
from bamba_quant.hub import local_path
from bamba_quant.inference.loading import LoadedModel, load_model
from bamba_quant.metadata.general import RECIPE_KEY
from bamba_quant.metadata.model_name import name_of
from bamba_quant.metadata.tune_record import read_record
from bamba_quant.recipes import plain_recipe, recipes
from bamba_reference.tensors import tensor_shapes

# Files of a directory that say what its weights mean.
_LONGEST_RECIPE = 40  # characters
_SMALL_FILES = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")


class ComparisonError(BambaQuantError):
    """Models that cannot be compared with each other."""


@dataclass(frozen=True)
class OpenedModel:
    """A model ready to be read, under a ``label`` that no other of the evaluation has, and how it stores its state."""

    label: str
    path: Path
    model: LoadedModel
    types: StoredTypes = AS_COMPUTED


def open_models(
    base: Path | None,
    candidates: Sequence[Path],
    reading: ReadOptions = ReadOptions(),
    types: Sequence[StoredTypes] = (AS_COMPUTED,),
) -> list[OpenedModel]:
    """The base, if it is a model, and each candidate under each of ``types``, in this order.

    With types the base may be a candidate too, and is the only one by default. Raises ``ComparisonError`` for a path
    given twice and for models of another architecture, vocabulary or shape.
    """
    named = any(map(str, types))
    if not candidates and not (named and base):
        raise ComparisonError(
            "no candidate to evaluate",
            fix="name a candidate, or with a model as the base types of its cache or state (--state-type)",
        )
    base = local_path(base) if base else None
    candidates = [local_path(path) for path in candidates] or ([base] if base else [])
    own = named and base is not None and base.resolve() in [path.resolve() for path in candidates]
    paths = [*([base] if base and not own else []), *candidates]
    places = [path.resolve() for path in paths]
    twice = [path for path, place in zip(paths, places, strict=True) if places.count(place) > 1]
    if twice:
        raise ComparisonError(
            "a model is given twice", found=", ".join(map(str, twice)), fix="name every model once"
        )
    models = {
        path.resolve(): OpenedModel(label, path, load_model(path, reading=reading))
        for label, path in zip(_labels(paths), paths, strict=True)
    }
    opened = [models[base.resolve()]] if base else []
    for path in candidates:
        plain = models[path.resolve()]
        labels = (f"{plain.label} ({each})" if str(each) else plain.label for each in types)
        opened += [replace(plain, label=name, types=each) for name, each in zip(labels, types, strict=True)]
    for other in opened[1:]:
        _check_comparable(opened[0], other)
    return opened


def tell_notes(opened: Iterable[OpenedModel], note: Callable[[str], None]) -> None:
    """Call ``note`` with what was tolerated in reading each model."""
    for each in {each.path: each for each in opened}.values():
        for text in each.model.checkpoint.notes:
            note(f"{each.label.removesuffix(f' ({each.types})')}: {text}")
    if any(each.types.state.endswith("-stochastic") for each in opened):
        note("states are rounded stochastically: figures depend on --seed, which draws the random numbers")


def describe(opened: OpenedModel) -> ModelFile:
    """What a report says of a model; the hashes of its files are added by ``FileHasher``."""
    checkpoint = opened.model.checkpoint
    weights = opened.model.weights
    totals: dict[str, list[int]] = {}
    for name in weights:
        info = weights.info(name)
        total = totals.setdefault(info.format, [0, 0, 0])
        for place, more in enumerate((1, math.prod(info.shape), info.n_bytes)):
            total[place] += more
    types = tuple(
        TypeTotal(name, *total) for name, total in sorted(totals.items(), key=lambda item: -item[1][2])
    )
    n_bytes, elements = sum(each.n_bytes for each in types), sum(each.weights for each in types)
    kind: Literal["huggingface", "gguf"] = "gguf" if checkpoint.kind == "gguf" else "huggingface"
    return ModelFile(
        label=opened.label,
        path=str(opened.path),
        kind=kind,
        architecture=opened.model.architecture,
        recipe=_recipe(checkpoint, types),
        types=types,
        weights=elements,
        n_bytes=n_bytes,
        file_bytes=sum(file.stat().st_size for file in checkpoint.files),
        bits_per_weight=8 * n_bytes / max(1, elements),
        files=(),
        tuned=read_record(checkpoint),
        stored_types=str(opened.types),
    )


def describe_logits(given: LogitsFile) -> ModelFile:
    """What a report says of a base that is a file of logits."""
    size = given.path.stat().st_size
    return ModelFile(
        label=given.path.name,
        path=str(given.path),
        kind="logits",
        architecture="",
        recipe="logits",
        types=(),
        weights=0,
        n_bytes=0,
        file_bytes=size,
        bits_per_weight=None,
        files=hash_files([given.path]),
    )


def files_of(opened: OpenedModel) -> tuple[Path, ...]:
    """The files that make the model what it is: weights, and a directory's configuration and tokenizer."""
    small = [opened.path / name for name in _SMALL_FILES] if opened.path.is_dir() else []
    return (*opened.model.checkpoint.files, *(file for file in small if file.is_file()))


def tokenizer_hash(checkpoint: Checkpoint) -> str:
    """SHA-256 of a directory's tokenizer file, or of a GGUF's ``tokenizer.*`` key-values as sorted JSON."""
    if checkpoint.kind == "gguf":
        values: Mapping[str, Any] = checkpoint.metadata
        stored = {key: value.value for key, value in values.items() if key.startswith("tokenizer.")}
        raw = json.dumps(stored, sort_keys=True, default=str).encode()
        return hashlib.sha256(raw).hexdigest()
    from bamba_quant.tokenizers.settings import tokenizer_file

    raw = read_bytes(tokenizer_file(checkpoint.path), "the tokenizer", TOKENIZER_BYTES)
    return hashlib.sha256(raw).hexdigest()


def _labels(paths: Sequence[Path]) -> list[str]:
    """A label for each model: its name, with the organization or parts of its path if names are equal."""
    names = [name_of(path) for path in paths]
    places = [Path(os.path.abspath(path)) for path in paths]  # noqa: PTH100 - resolve() would follow links
    candidates = [[name.name for name in names], [name.full_name for name in names]]
    for depth in range(2, max(len(place.parts) for place in places) + 1):
        candidates.append(["/".join(place.parts[-depth:]).removesuffix(".gguf") for place in places])
    for labels in candidates:
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]  # a directory x and a file x.gguf


def _check_comparable(base: OpenedModel, other: OpenedModel) -> None:
    if base.model.architecture != other.model.architecture:
        raise ComparisonError(
            "a candidate has another architecture than the base",
            where=other.path,
            found=other.model.architecture,
            expected=base.model.architecture,
            fix="compare files that were made from the same model",
        )
    if base.model.config.vocab_size != other.model.config.vocab_size:
        raise ComparisonError(
            "a candidate has another vocabulary than the base",
            where=other.path,
            found=f"{other.model.config.vocab_size} tokens",
            expected=f"{base.model.config.vocab_size} tokens",
            fix="compare files that were made from the same model",
        )
    expected, found = tensor_shapes(base.model.config), tensor_shapes(other.model.config)
    if expected.keys() != found.keys():
        apart = sorted(expected.keys() ^ found.keys())
        raise ComparisonError(
            "a candidate has other layers than the base",
            where=other.path,
            found=f"{other.model.config.num_hidden_layers} layers; tensors of only one of the two: {join_names(apart)}",
            expected=f"the base's {base.model.config.num_hidden_layers} layers and their kinds",
            fix="compare files that were made from the same model",
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise ComparisonError(
                "a candidate has another shape than the base",
                where=f"{other.path}, tensor {name}",
                found=found[name],
                expected=shape,
                fix="compare files that were made from the same model",
            )


def variant_names() -> tuple[str, ...]:
    """What ``ModelFile.variant`` may say of GGUF files, and of the directories that this project writes."""
    types = (_type_name(each) for each in LlamaFileType)
    directories = [_quantization(scheme.configuration(Ignored())) for scheme in codecs(SafetensorsCodec)]
    names = (*(recipe.name for recipe in recipes()), *types, *directories)
    return tuple(dict.fromkeys((*names, *map(tuned_name, names))))


def _type_name(file_type: LlamaFileType) -> str:
    return str(file_type.name).lower().removeprefix("mostly_")


def _recipe(checkpoint: Checkpoint, types: Sequence[TypeTotal]) -> str:
    """The name that a file has for its mixture of types; else the type of most of its bytes."""
    if checkpoint.kind == "gguf":
        named = checkpoint.key_values.text(RECIPE_KEY)
        if named:
            return named[:_LONGEST_RECIPE]
        stored = checkpoint.key_values.integer(Keys.General.FILE_TYPE)
        if plain := plain_recipe(stored):
            return plain.name
        if stored in LlamaFileType._value2member_map_:
            return _type_name(LlamaFileType(stored))
    elif "quantization_config" in checkpoint.metadata:
        return _quantization(checkpoint.metadata["quantization_config"])[:_LONGEST_RECIPE]
    return Counter({each.name: each.n_bytes for each in types}).most_common(1)[0][0]


def _quantization(config: Any) -> str:
    """fp8, fp8-dynamic, int4, nvfp4, …, joined where a configuration has several groups; else the method's name."""
    if not isinstance(config, Mapping):
        return "quantized"
    groups = config.get("config_groups")
    described = [_group(each) for each in groups.values()] if isinstance(groups, Mapping) else []
    if not described or not all(described):
        return str(config.get("quant_method", "quantized"))
    return "+".join(sorted(set(described)))


def _group(group: Any) -> str:
    """The name of a group of compressed-tensors, "" for anything else."""
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(group, Mapping) or not isinstance(weights, Mapping):
        return ""
    kind = {"float": "fp"}.get(str(weights.get("type")), str(weights.get("type")))
    if kind == "fp" and weights.get("num_bits") == 4:
        kind = {"16": "nvfp", "32": "mxfp"}.get(str(weights.get("group_size")), kind)
    inputs = group.get("input_activations")
    dynamic = isinstance(inputs, Mapping) and inputs.get("dynamic")
    return f"{kind}{weights.get('num_bits')}" + ("-dynamic" if dynamic else "")
