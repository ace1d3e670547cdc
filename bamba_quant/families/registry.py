"""The registry of model families, and which of them a configuration or a GGUF file belongs to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from bamba_quant.checkpoint.gguf_values import KeyValues
from bamba_quant.errors import ArchitectureError, ConfigError
from bamba_quant.families.gguf_keys import gguf_architecture_of
from bamba_quant.families.hf_schema import MOST, HfSchema
from bamba_quant.families.rules import Metadata, Rule, TensorRule, Tensors, fill_rules
from bamba_quant.families.runtime_compat import Loaders
from bamba_quant.families.small_models import SmallModels
from bamba_reference.config import Config
from bamba_reference.errors import repr_short

# The class of state-spaces' own code, for any of the families that have a ``state_spaces_layer``.
_STATE_SPACES = "MambaLMHeadModel"


@dataclass(frozen=True, repr=False)
class Family:
    """A model family: how its configuration and its tensors are written in checkpoints and in GGUF.

    ``name`` is transformers' ``model_type``; ``hf_architectures`` are the class names under ``architectures``.
    ``state_spaces_layer`` is the family's name in the ``ssm_cfg`` of state-spaces' own configurations, if any.

    ``hf_schema`` has the keys of its config.json.

    ``gguf_architectures`` are the values of ``general.architecture``; ``gguf_name`` chooses one for a configuration,
    the first by default. ``reads_gguf`` tells a file from another family's with the same architecture.
    ``gguf_metadata`` gives the keys below the architecture's name, ``config_of_gguf`` reads key-values and tensors by
    name back. ``check_gguf`` raises ``ArchitectureError`` for what llama.cpp cannot represent, and returns notes on
    what it computes slightly differently.

    ``left_out`` are beginnings of the names of tensors that no output gets.

    ``loaders`` describes vLLM and transformers as loaders of quantized checkpoints. ``small_models`` are the
    configurations that the tests run on.
    """

    name: str
    hf_architectures: tuple[str, ...]
    gguf_architectures: tuple[str, ...]
    rules: tuple[Rule, ...]
    hf_schema: HfSchema
    gguf_metadata: Callable[[Config], Metadata]
    check_gguf: Callable[[Config], tuple[str, ...]]
    config_of_gguf: Callable[[KeyValues, Tensors], Config]
    small_models: SmallModels
    reads_gguf: Callable[[KeyValues], bool] = lambda values: True
    gguf_name: Callable[[Config], str] | None = None
    state_spaces_layer: str | None = None
    left_out: tuple[str, ...] = ()
    loaders: Loaders = field(default_factory=Loaders)

    def __repr__(self) -> str:
        return f"<Family {self.name}>"

    def to_hf_config(self, config: Config) -> dict[str, Any]:
        """The config.json that transformers 4 and 5 both read, without the dtype."""
        names = {"architectures": [self.hf_architectures[0]], "model_type": self.name}
        return {**names, **self.hf_schema.write(config)}

    def gguf_architecture(self, config: Config) -> str:
        """The ``general.architecture`` of a model of this shape."""
        return self.gguf_architectures[0] if self.gguf_name is None else self.gguf_name(config)

    def tensors(self, config: Config) -> tuple[TensorRule, ...]:
        """Every tensor of a model of this shape: in file order, those of a layer together."""
        return fill_rules(self.rules, config)


_registry: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Add a family to the registry, under its name."""
    _registry[family.name] = family
    return family


def families() -> tuple[Family, ...]:
    return tuple(_registry.values())


def family_of(hf: Mapping[str, Any]) -> Family:
    """The family of a config.json, by ``architectures``, state-spaces' own keys or ``model_type``.

    Raises ``ArchitectureError`` with the supported classes.
    """
    classes, model_type, found = hf.get("architectures"), hf.get("model_type"), []
    classes = [] if classes is None else classes
    supported = ", ".join(name for family in families() for name in family.hf_architectures)
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ArchitectureError(
            "the configuration's architectures is not a list of names",
            where="config.json",
            found=repr_short(classes),
            expected=f"null, or a list of one of {supported}",
        )
    if classes != [_STATE_SPACES]:
        found = [family for family in families() if any(name in family.hf_architectures for name in classes)]
    if not found and classes in ([], [_STATE_SPACES]):
        ssm_cfg = hf.get("ssm_cfg")
        if "d_model" in hf and "n_layer" in hf:
            layer = ssm_cfg.get("layer", "Mamba1") if isinstance(ssm_cfg, Mapping) else "Mamba1"
            found = [
                family
                for family in families()
                if family.state_spaces_layer and family.state_spaces_layer == layer
            ]
        elif isinstance(model_type, str):
            found = [family for family in families() if family.name == model_type]
    if found:
        return found[0]
    raise ArchitectureError(
        "this model's architecture is not supported",
        found=", ".join(classes) or f"model_type {repr_short(model_type)} and no architectures",
        expected=supported,
    )


def read_config(hf: Mapping[str, Any], *, ignore: Collection[str] = ()) -> Config:
    """Read a parsed ``config.json``, written by transformers 4 or 5 or by state-spaces' own code.

    ``ignore`` names keys that the caller knows to change no logit. Raises ``ArchitectureError`` for a family that is
    not supported, and ``ConfigError`` with the key, the value found and what is supported.
    """
    config = family_of(hf).hf_schema.read(hf, ignore)
    sides = {
        "the mixer's width": config.mamba_d_inner,
        "the channels of its convolution": config.mamba_conv_dim,
        "the rows of its input projection": config.mamba_in_proj_dim,
        "attention heads times head size": config.num_attention_heads * config.head_dim,
    }
    for name, size in sides.items():
        if size > MOST:
            raise ConfigError(
                "the product of sizes in the configuration is too large",
                found=f"{name}: {size:,}",
                expected=f"at most {MOST:,}",
                fix="correct the sizes in config.json",
            )
    return config


def family_of_gguf(values: KeyValues) -> Family:
    """The family of a GGUF file. Raises ``ArchitectureError`` with the supported architectures."""
    name = gguf_architecture_of(values)
    for family in families():
        if name in family.gguf_architectures and family.reads_gguf(values):
            return family
    raise ArchitectureError(
        "this file's architecture is not supported",
        where=values.file,
        found=name or "no general.architecture",
        expected=", ".join(sorted({kind for known in families() for kind in known.gguf_architectures})),
    )
