"""Which matrices a scheme quantizes, by role, and the names of the others as each runtime matches them.

What a family's runtimes fuse is quantized as a whole or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from bamba_quant.codecs import Ignored
from bamba_quant.errors import PlanError, did_you_mean, join_names
from bamba_quant.families import TensorRule
from bamba_quant.families.runtime_compat import ATTENTION_INPUTS, Loaders
from bamba_quant.recipes.patterns import glob_matches, likely_names
from bamba_reference.config import Config

# The linear layers that hold nearly all weights of every family, experts among them where each is a tensor. Embedding,
# output, convolutions, routers, stacked experts, norms, biases and the parameters of the recurrence (A, D, dt) are not
# quantized.
QUANTIZED = frozenset(
    "ssm_in ssm_out attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down "
    "ffn_gate_shexp ffn_up_shexp ffn_down_shexp ffn_gate_exps ffn_up_exps ffn_down_exps".split()
)
# Roles of a layer, or of an expert, that share what a scheme measures of a matrix.
SHARED = (
    ATTENTION_INPUTS,
    *(frozenset({f"ffn_gate{kind}", f"ffn_up{kind}"}) for kind in ("", "_shexp", "_exps")),
)


@dataclass(frozen=True)
class MatrixCandidate:
    """A tensor of the checkpoint, its shape, and the rules of the tensors that it holds, all of one layer.

    ``matrix`` is its number in the stack that its rule describes, None where it holds whole tensors.
    """

    name: str
    shape: tuple[int, ...]
    rules: tuple[TensorRule, ...]
    matrix: int | None = None

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def roles(self) -> frozenset[str]:
        return frozenset(rule.role for rule in self.rules)

    @property
    def layer(self) -> int | None:
        return self.rules[0].layer

    @property
    def is_linear(self) -> bool:
        """Whether transformers runs it as a linear layer, which a configuration lists if it is not quantized."""
        return self.name.endswith(".weight") and len(self.shape) == 2 and self.roles != {"token_embd"}

    @property
    def is_expert(self) -> bool:
        """Whether it holds an expert's matrix, or that of every expert, stacked."""
        return all(role.endswith("_exps") for role in self.roles)

    @property
    def is_quantizable(self) -> bool:
        return self.is_linear and self.roles <= QUANTIZED

    def group(self, groups: Sequence[frozenset[str]]) -> tuple[int | None, int] | None:
        """The layer and the number of the group that its roles belong to."""
        found = (n for n, group in enumerate(groups) if self.roles & group)
        number = next(found, None)
        return None if number is None else (self.layer, number)


Preset = Callable[[MatrixCandidate, Config], bool]


def _hybrid(candidate: MatrixCandidate, config: Config) -> bool:
    """Attention, and the Mamba-2 mixer of the layer before each attention layer; no feed-forward matrices."""
    layer = candidate.layer
    if layer is None:
        return False
    if candidate.roles & {"attn_q", "attn_k", "attn_v", "attn_output"}:
        return True
    return bool(layer + 1 in config.attention_layers and candidate.roles & {"ssm_in", "ssm_out"})


# What Nemotron's quantized hybrids do not quantize.
PRESETS: Mapping[str, Preset] = {"hybrid": _hybrid}


def select_matrices(
    candidates: Sequence[MatrixCandidate],
    config: Config,
    keep: Sequence[str],
    units: Sequence[frozenset[str]],
    schemes: Mapping[str, str] | None = None,
) -> frozenset[str]:
    """The names of the tensors to quantize: all quantizable ones without those that ``keep`` lists.

    With ``schemes``, their names by tensor, only those that have one.

    An entry of ``keep`` is a preset, a role, or a glob that a tensor's or module's name matches as a whole; if there is
    none, a glob of whole parts of GGUF's or Hugging Face's names (``patterns.glob_matches``). Raises ``PlanError`` for
    one that matches nothing, and for one of ``units``, roles of a layer, that would be split between
    schemes, or between a scheme and 16 bits.
    """
    kept: set[str] = set()
    for entry in keep:
        found = _matching(entry, candidates, config)
        if not found:
            rules = [rule for candidate in candidates if candidate.is_quantizable for rule in candidate.rules]
            raise PlanError(
                f"no matrix of the model matches --ignore{did_you_mean(entry, (*PRESETS, *likely_names(rules)))}",
                found=f"--ignore {entry}",
                expected=f"a preset ({', '.join(PRESETS)}), a role ({', '.join(sorted({r.role for r in rules}))}) or a "
                "glob of Hugging Face's or GGUF's names such as out_proj, '*.layers.0.*' or 'blk.0.*'",
            )
        kept |= found
    chosen = {
        c.name: "" if schemes is None else schemes[c.name]
        for c in candidates
        if c.is_quantizable and c.name not in kept and (schemes is None or c.name in schemes)
    }
    _check_units(candidates, chosen, units)
    return frozenset(chosen)


def _matching(entry: str, candidates: Sequence[MatrixCandidate], config: Config) -> set[str]:
    if entry in PRESETS:
        return {candidate.name for candidate in candidates if PRESETS[entry](candidate, config)}
    whole = {
        candidate.name
        for candidate in candidates
        if entry in candidate.roles
        or fnmatchcase(candidate.name, entry)
        or fnmatchcase(candidate.module, entry)
    }
    return whole or {
        candidate.name
        for candidate in candidates
        if glob_matches(entry, (candidate.name, *(str(rule.gguf) for rule in candidate.rules)))
    }


def _check_units(
    candidates: Sequence[MatrixCandidate], chosen: Mapping[str, str], units: Sequence[frozenset[str]]
) -> None:
    found: dict[tuple[int | None, int], list[MatrixCandidate]] = {}
    for candidate in candidates:
        unit = candidate.group(units)
        if unit is not None and candidate.is_quantizable:
            found.setdefault(unit, []).append(candidate)
    for members in found.values():
        kept = [member.module for member in members if member.name not in chosen]
        schemes = {chosen[member.name]: member.module for member in members if member.name in chosen}
        if len(schemes) > 1:
            raise PlanError(
                "matrices that a loader fuses would have different schemes",
                found=join_names([f"{module} in {scheme}" for scheme, module in schemes.items()]),
                expected="one scheme",
                fix="give these roles the same scheme: "
                + ", ".join(sorted({role for member in members for role in member.roles})),
            )
        if kept and len(kept) < len(members):
            others = [member.module for member in members if member.name in chosen]
            raise PlanError(
                "a part of the matrices that a loader fuses would be ignored",
                found=f"{join_names(kept)} kept, {join_names(others)} quantized",
                expected="all of them ignored, or none",
                fix="ignore these, too: "
                + " ".join(f"--ignore {module}" for module in others[:8])
                + (f" and {len(others) - 8} more" if len(others) > 8 else "")
                + "; or in every layer: "
                + " ".join(
                    dict.fromkeys(
                        f"--ignore {role}" for m in members if m.name in chosen for role in sorted(m.roles)
                    )
                ),
            )


def ignored_modules(candidates: Sequence[MatrixCandidate], rules: Sequence[TensorRule],
                    chosen: Collection[str], loaders: Loaders) -> Ignored:  # fmt: skip
    """The linear layers that are not ``chosen``, with the output, even where it is tied and has no tensor.

    Experts stacked in one tensor are not a linear layer, and are listed for the loaders that make several of them.
    """
    linear = {candidate.module: candidate for candidate in candidates if candidate.is_linear}
    kept = [module for module, candidate in linear.items() if candidate.name not in chosen]
    listed = listed_modules(candidates, [linear[module] for module in kept], loaders)
    tied = [rule.hf.removesuffix(".weight") for rule in rules if rule.role == "output"]
    stacked = dict.fromkeys(c.layer for c in candidates if c.is_expert and c.name not in chosen)
    experts = [name.format(i=layer) for layer in stacked for name in loaders.experts]
    return Ignored(
        tuple(dict.fromkeys([*tied, *listed.modules])),
        (*listed.patterns, *(_pattern_below(name) for name in loaders.experts[:1] if stacked)),
        (*listed.aliases, *experts),
    )


def listed_modules(
    candidates: Sequence[MatrixCandidate], members: Sequence[MatrixCandidate], loaders: Loaders
) -> Ignored:
    """The linear layers ``members`` as a configuration lists them; its patterns match no other linear layer."""
    linear = [candidate for candidate in candidates if candidate.is_linear]
    names = {member.name for member in members}
    others = [candidate.module for candidate in linear if candidate.name not in names]
    layered = [member for member in members if member.layer is not None]
    layers = {candidate.layer for candidate in linear} - {None}
    aliases = (name for member in layered for name in _names_in_vllm(member, len(layers), loaders))
    return Ignored(
        tuple(member.module for member in members), _patterns(layered, others, layers), tuple(aliases)
    )


def group_modules(
    candidates: Sequence[MatrixCandidate], members: Sequence[MatrixCandidate], loaders: Loaders
) -> Ignored:
    """The layers ``members`` of a group of a configuration, as ``listed_modules``, but for experts, all of a layer.

    transformers finds the group of experts by that word (integrations/compressed_tensors.py, ``get_experts_scheme``),
    and vLLM asks for matrices that an expert without a gate does not have (``get_moe_method``).
    """
    found = listed_modules(candidates, [member for member in members if not member.is_expert], loaders)
    experts = [member for member in members if member.is_expert]
    layers = "|".join(map(str, sorted({int(member.layer or 0) for member in experts})))
    below = {_split(member.module)[0] for member in experts}
    patterns = (rf".*{re.escape(stack)}\.({layers})\.(.*\.)?experts\..*$" for stack in sorted(below))
    return replace(found, patterns=(*found.patterns, *patterns))


def _pattern_below(name: str) -> str:
    """A regular expression for a module of every layer and all modules in it."""
    return ".*" + re.escape(name).replace(re.escape("{i}"), r"\d+").replace(r"model\.", "", 1) + r"(\..*)?$"


def _patterns(
    kept: Sequence[MatrixCandidate], taken: Sequence[str], layers: Collection[int | None]
) -> tuple[str, ...]:
    """A regular expression for each kind of module in ``kept``, with any names between the layer and the leaf."""
    beside: dict[str, list[str]] = {}
    for module in taken:
        for number in set(filter(str.isdecimal, module.split("."))):
            beside.setdefault(number, []).append(module)
    tails: dict[str, list[MatrixCandidate]] = {}
    for candidate in kept:
        tail = _tail(candidate.module, beside.get(str(candidate.layer), ()))
        tails.setdefault(tail, []).append(candidate)
    patterns: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for tail, found in tails.items():
        stack = _split(found[0].module)[0]
        numbers = tuple(sorted({candidate.layer for candidate in found if candidate.layer is not None}))
        patterns.setdefault((stack, numbers), []).append(re.escape(tail))
    return tuple(
        rf".*{re.escape(stack)}\.({'|'.join(map(str, numbers))})\.(.*\.)?({'|'.join(leaves)})$"
        if set(numbers) != set(layers)
        else rf".*{re.escape(stack)}\.\d+\.(.*\.)?({'|'.join(leaves)})$"
        for (stack, numbers), leaves in patterns.items()
    )


def _split(module: str) -> tuple[str, str]:
    """``layers`` and ``mamba.in_proj`` of ``model.layers.3.mamba.in_proj``."""
    parts = module.split(".")
    index = next(i for i, part in enumerate(parts) if part.isdecimal())
    return parts[index - 1], ".".join(parts[index + 1 :])


def _tail(module: str, beside: Sequence[str]) -> str:
    """The shortest end of a module's name that none of ``beside``, quantized modules of its layer, has."""
    parts = _split(module)[1].split(".")
    for length in range(1, len(parts)):
        tail = ".".join(parts[-length:])
        if not any(other.endswith(f".{tail}") for other in beside):
            return tail
    return ".".join(parts)


def _names_in_vllm(candidate: MatrixCandidate, layers: int, loaders: Loaders) -> tuple[str, ...]:
    """The name of a matrix' module in vLLM, if it differs, in a model of so many layers."""
    name, layer = candidate.module, candidate.layer or 0
    for word, other in (loaders.vllm or {}).items():
        name = name.replace(word.format(i=layer), other.format(beside=layers + layer))
    return () if name == candidate.module else (name,)
