"""Patterns of tensor names as users write them: by GGUF's names or Hugging Face's, as globs or regular expressions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from bamba_quant.errors import PlanError, did_you_mean, join_names
from bamba_quant.families import TensorRule
from bamba_quant.recipes.base import ALWAYS_F32


def glob_matches(pattern: str, names: Iterable[str]) -> bool:
    """Whether a glob matches whole parts between dots of one of ``names``: out_proj, mamba.*, layers.1?.mamba."""
    return any(fnmatchcase(f".{name}.", f"*.{pattern}.*") for name in names)


def tensors_matching(pattern: str, rules: Sequence[TensorRule]) -> frozenset[str]:
    """The GGUF names of the tensors that a ``pattern`` of --tensor-type is for.

    As in llama-quantize it is a regular expression that is searched in GGUF names. If it finds none, it is a glob of
    whole parts of GGUF's or Hugging Face's names, and then a regular expression that is searched in Hugging Face's.
    Raises ``PlanError`` if it matches no tensor that can be quantized, with the names that are closest.
    """
    wrong = ""
    ways: list[Callable[[TensorRule], object]] = [
        lambda rule: glob_matches(pattern, (str(rule.gguf), *rule.hf_names))
    ]
    try:
        search = re.compile(pattern).search
        ways.insert(0, lambda rule: search(str(rule.gguf)))
        ways.append(lambda rule: any(map(search, rule.hf_names)))
    except (re.error, OverflowError, RecursionError) as error:
        wrong = f", which is not a regular expression ({error})"
    quantized = [rule for rule in rules if rule.role not in ALWAYS_F32]
    for matches in ways:
        found = frozenset(str(rule.gguf) for rule in quantized if matches(rule))
        if found:
            return found
    raise PlanError(
        "a pattern matches no tensor that can be quantized" + did_you_mean(pattern, likely_names(quantized)),
        found=f"--tensor-type {pattern}{wrong}",
        expected="a regular expression or a glob of GGUF's or Hugging Face's names, such as "
        + join_names(list(dict.fromkeys(likely_names(quantized))), 8),
    )


def likely_names(rules: Iterable[TensorRule]) -> Iterator[str]:
    """What patterns are likely to be meant for: roles and ends of Hugging Face's names, then whole names."""
    for rule in (rules := list(rules)):
        yield rule.role
        yield rule.hf.removesuffix(".weight").rpartition(".")[2]
    for rule in rules:
        yield from (rule.hf, str(rule.gguf))
