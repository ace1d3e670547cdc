"""Mixtures: which role of matrix a quantized directory stores in which scheme, built in or from a user's TOML file."""

from __future__ import annotations

import functools
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bamba_quant.codecs import SafetensorsCodec, codec_named, codecs
from bamba_quant.errors import BambaQuantError, FormatError, PlanError, did_you_mean
from bamba_quant.files.toml_file import read_toml
from bamba_quant.recipes.base import Choice, TensorPosition, precedes
from bamba_quant.recipes.matrices import QUANTIZED, MatrixCandidate
from bamba_quant.recipes.recipe_file import quoted, roles_text
from bamba_quant.recipes.tables import check_keys, name_in, role_choices, text_of
from bamba_reference.config import Config

IGNORE = "ignore"  # in place of a scheme: the matrix keeps 16 bits
_KEYS = frozenset({"name", "like", "about", "default", "roles"})
_BUILTIN = Path(__file__).with_name("mixtures.toml")


@dataclass(frozen=True)
class Mixture:
    """A scheme by role under one name: ``default`` for all that ``roles`` does not list, whose first fit counts.

    A choice's format is the name of a ``SafetensorsCodec``, or ``IGNORE``. A scheme alone is a mixture of one.
    """

    name: str
    about: str
    default: str
    roles: Mapping[str, tuple[Choice, ...]] = field(default_factory=dict)

    def schemes(
        self, candidates: Sequence[MatrixCandidate], config: Config, imatrix: bool = False
    ) -> dict[str, SafetensorsCodec]:
        """The scheme of each matrix by its name, without those that are ignored or not a matrix to quantize.

        ``imatrix`` says whether importance was measured. Experts are left out of schemes that do not have them.
        Raises ``PlanError`` where the roles of one matrix have different schemes.
        """
        matrices = [candidate for candidate in candidates if candidate.is_quantizable]
        counts = Counter(role for each in matrices for role in each.roles)
        seen: Counter[str] = Counter()
        found = {}
        for each in matrices:
            names = set()
            for role in each.roles:
                position = TensorPosition(
                    seen[role],
                    counts[role],
                    config.num_attention_heads // max(1, config.num_key_value_heads),
                    config.num_local_experts,
                    imatrix,
                    each.layer,
                    precedes(each.layer, config.attention_layers),
                )
                seen[role] += 1
                fitting = (choice.format for choice in self.roles.get(role, ()) if choice.when(position))
                names.add(next(fitting, self.default))
            if len(names) > 1:
                raise PlanError(
                    "the checkpoint has these roles in one matrix, which can have one scheme",
                    where=f"{self.name}, matrix {each.name}",
                    found=f"{', '.join(sorted(names))} for {', '.join(sorted(each.roles))}",
                    fix="give these roles the same scheme",
                )
            (name,) = names
            if name != IGNORE:
                codec = codec_named(name, SafetensorsCodec)
                if codec.experts or not each.is_expert:
                    found[each.name] = codec
        return found


@functools.cache
def mixtures() -> Mapping[str, Mixture]:
    """The built-in mixtures by name."""
    known: dict[str, Mixture] = {}
    for name, table in tomllib.loads(_BUILTIN.read_text()).items():
        known[name] = _mixture(table, name, f"{_BUILTIN.name}, {name}", known)
    return known


def mixture_named(name: str) -> Mixture:
    """The built-in mixture, or the scheme, of this name. Raises ``FormatError`` that lists both."""
    return _known(name, mixtures())


def read_mixture(file: Path) -> Mixture:
    """The mixture in a TOML file: ``name``, ``about``, ``default``, ``[roles]``; and ``like``, a mixture or scheme
    whose choices hold for what the file does not mention.

    Raises ``PlanError`` for unknown keys, roles and schemes, and for values of another type.
    """
    table = read_toml(file, "mixture's tables", PlanError)
    return _mixture(table, name_in(table, file), file, mixtures())


def mixture_text(mixture: Mixture) -> str:
    """``mixture`` as ``read_mixture`` reads it."""
    named = {"name": mixture.name, "about": mixture.about, "default": mixture.default}
    lines = [f"{key} = {quoted(value)}" for key, value in named.items()]
    return "\n".join([*lines, *roles_text(mixture.roles)]) + "\n"


def _known(name: str, built_in: Mapping[str, Mixture]) -> Mixture:
    try:
        if name.lower() in built_in:
            return built_in[name.lower()]
        codec = codec_named(name, SafetensorsCodec)
    except FormatError:
        names = [*(each.name for each in codecs(SafetensorsCodec)), *built_in]
        what = f"unknown type {name!r}{did_you_mean(name, names)}"
        raise FormatError(what, expected="one of " + ", ".join(names)) from None
    return Mixture(codec.name, codec.about, codec.name)


def _mixture(table: Mapping[str, Any], name: str, where: object, built_in: Mapping[str, Mixture]) -> Mixture:
    check_keys(table, _KEYS, where)
    if not {"like", "default"} & table.keys():
        raise PlanError(
            "the mixture sets neither 'default' nor 'like'",
            where=where,
            expected='a line such as default = "nvfp4a16" or like = "hybrid-nvfp4"',
        )
    like = _known(text_of(table, "like", where), built_in) if "like" in table else Mixture("", "", "")
    return Mixture(
        name,
        text_of(table, "about", where, ""),
        _scheme(table["default"], f"{where}, default") if "default" in table else like.default,
        {**like.roles, **role_choices(table, QUANTIZED, _scheme, where)},
    )


def _scheme(given: Any, where: object) -> str:
    """The name of a scheme that can stand beside others, or ``IGNORE``."""
    if given == IGNORE:
        return IGNORE
    if not isinstance(given, str):
        raise PlanError(
            "a scheme is not a name", where=where, expected=f'a string such as "nvfp4a16" or "{IGNORE}"'
        )
    try:
        return codec_named(given, SafetensorsCodec).name
    except BambaQuantError as error:
        raise PlanError(error.what, where=where, expected=f"{error.expected}; or {IGNORE}") from error
