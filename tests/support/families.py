"""Every supported family as small random transformers models, in each spelling its checkpoints are found in.

transformers itself writes the files: the names and shapes on disk are its own.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from bamba_quant.families import Family, families, read_config
from bamba_quant.families.small_models import SmallModels
from bamba_reference.config import Config
from tests.support.models import drawn

Spelling = Literal[4, 5, "state-spaces"]


@dataclass(frozen=True)
class TransformersFamily:
    """A registered family's small models as transformers' classes."""

    family: Family

    @property
    def name(self) -> str:
        return self.family.name

    @property
    def small(self) -> SmallModels:
        return self.family.small_models

    @property
    def model(self) -> type[Any]:
        """The class of its models."""
        return getattr(transformers, self.small.transformers_class)  # type: ignore[no-any-return]

    def config(self, **overrides: Any) -> Any:
        """The configuration of its base model, with ``overrides``."""
        return self.model.config_class(**{**self.small.keys, **overrides})

    def reference(self, case: str) -> Config:
        """A case's configuration as the reference has it."""
        written = self.config(**self.small.cases[case]).to_dict()
        return read_config({**written, "architectures": [self.model.__name__]})

    def blocks(self, case: str) -> set[str]:
        """The kinds of blocks of a case's layers."""
        layers = self.reference(case).layers
        return {block for layer in layers for block in (*layer.blocks, *layer.feed_forward)}

    def random(self, seed: int = 0, **overrides: Any) -> Any:
        """A float32 model in eval mode; the same arguments give the same weights."""
        return drawn(self.model(self.config(**overrides)), seed)


FAMILIES = {family.name: TransformersFamily(family) for family in families()}
CASES = [(family.name, case) for family in FAMILIES.values() for case in family.small.cases]
# The cases that differ in the kinds of tensors, and of each family the one with the most.
KINDS = [(family.name, kind) for family in FAMILIES.values() for kind in family.small.kinds]
RICHEST = [(family.name, family.small.kinds[-1]) for family in FAMILIES.values()]
# Those of Mamba's mixers alone.
MIXERS_ALONE = [(name, kind) for name, kind in KINDS if FAMILIES[name].blocks(kind) == {"mamba1"}]
# Those with rows that GGUF scales.
SCALED = [
    (name, kind)
    for name, kind in KINDS
    if any(
        rule.transform.row_factors is not None
        for rule in FAMILIES[name].family.tensors(FAMILIES[name].reference(kind))
    )
]
# Those with experts, which checkpoints store as a stack or one by one.
STACKED, ONE_BY_ONE = (
    [
        (name, kind)
        for name, kind in KINDS
        if "moe" in FAMILIES[name].blocks(kind)
        and any("*" in stored for rule in FAMILIES[name].family.rules for stored in rule.hf) == alone
    ]
    for alone in (False, True)
)
SPELLED: list[tuple[str, str, Spelling]] = [
    (name, case, spelling) for name, case in CASES for spelling in (4, 5)
]
SPELLED += [
    (family.name, case, "state-spaces")
    for family in FAMILIES.values()
    for case in family.small.state_spaces_cases
]


def sampled(cases: Sequence[tuple[Any, ...]], values: Sequence[Any], count: int) -> list[tuple[Any, ...]]:
    """Each of the cases with ``count`` of the values in turn, so that every value meets some of the cases."""
    return [
        (*case, values[(count * i + k) % len(values)]) for i, case in enumerate(cases) for k in range(count)
    ]


def random_case(name: str, case: str = "plain", seed: int = 0) -> Any:
    """The model of a family's case."""
    return FAMILIES[name].random(seed, **FAMILIES[name].small.cases[case])


def wide_case(name: str, case: str = "plain", seed: int = 0) -> Any:
    """The model of a family's case with matrices of whole blocks of 128."""
    small = FAMILIES[name].small
    return FAMILIES[name].random(seed, **{**small.multiples_of_128, **small.cases[case]})


def save(
    model: Any,
    directory: Path,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    spelling: Spelling = 4,
    shards: int = 1,
) -> Path:
    """The checkpoint directory that transformers writes, its config.json put into an older spelling if wanted."""
    stored = copy.deepcopy(model).to(getattr(torch, dtype))
    size = sum(parameter.nbytes for parameter in stored.parameters())
    stored.save_pretrained(directory, max_shard_size=size // shards + 1 if shards > 1 else "5GB")
    config = json.loads((directory / "config.json").read_text())
    if spelling == 4:
        config = _of_version_4(config)
    elif spelling == "state-spaces":
        original = FAMILIES[config["model_type"]].small.state_spaces
        assert original is not None
        config = original(model.config)
        _as_state_spaces(stored, directory)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory


def _of_version_4(config: dict[str, Any]) -> dict[str, Any]:
    old = {key: value for key, value in config.items() if key != "transformers_version"}
    old["torch_dtype"] = old.pop("dtype")
    rope = old.pop("rope_parameters", None)
    if rope is not None:
        old["rope_theta"], old["rope_scaling"] = rope["rope_theta"], None
    if "partial_rotary_factor" in (rope or {}):
        old["attn_rotary_emb"] = int(
            old["hidden_size"] // old["num_attention_heads"] * rope["partial_rotary_factor"]
        )
    names = {"linear_attention": "mamba", "full_attention": "attention"}
    if "layer_types" in old:
        old["layer_types"] = [names.get(kind, kind) for kind in old["layer_types"]]
    if "time_step_limit" in old:
        old["time_step_limit"] = [0.0, math.inf]
    return old


def _as_state_spaces(model: Any, directory: Path) -> None:
    """Their own checkpoints are pickles, name the embedding otherwise and repeat it where it is tied."""
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    tensors = {name.replace("embeddings", "embedding"): value for name, value in model.state_dict().items()}
    torch.save(tensors, directory / "pytorch_model.bin")
