"""Which group of a compressed-tensors configuration describes a module: by name, regular expression or class."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Mapping
from typing import Any

import regex

from bamba_quant.checkpoint.assemble import WeightAssembler
from bamba_reference.errors import repr_short

_MOST_PATTERNS, _MOST_LENGTH = 1000, 1000
_SECONDS = 2.0  # for all matches of a checkpoint: some expressions take exponential time


class ConfigGroups:
    """The groups of ``config_groups``, found by module. Regular expressions follow ``re:`` and match as re.match."""

    def __init__(self, quantization: Mapping[str, Any], stored: WeightAssembler) -> None:
        groups = quantization.get("config_groups")
        self._stored = stored
        self._groups = [
            group
            for group in (groups.values() if isinstance(groups, dict) else ())
            if isinstance(group, dict) and isinstance(group.get("targets"), list)
        ]
        self._names: dict[str, set[int]] = {}
        self._patterns: list[tuple[regex.Pattern[str], int]] = []
        self._left = _SECONDS
        for index, group in enumerate(self._groups):
            for target in group["targets"]:
                if isinstance(target, str) and target.startswith("re:"):
                    self._patterns.append((self._compiled(target), index))
                elif isinstance(target, str):
                    self._names.setdefault(target, set()).add(index)
        if len(self._patterns) > _MOST_PATTERNS:
            raise self._unsupported(f"{len(self._patterns)} regular expressions", f"at most {_MOST_PATTERNS}")

    def find(self, module: str, kind: str) -> Mapping[str, Any]:
        """The group for a module whose weights are of type ``kind``: one that names it, else one for its class.

        Raises ``CheckpointError`` when there is none.
        """
        named = self._names.get(module, set()) | {
            index for pattern, index in self._patterns if self._matches(pattern, module)
        }
        for index in (*sorted(named), *sorted(self._names.get("Linear", ()))):
            weights = self._groups[index].get("weights")
            if isinstance(weights, dict) and weights.get("type") == kind:
                return self._groups[index]
        raise self._stored.unsupported(
            "a weight",
            f"module {module}",
            f"no group of quantization_config for it with weights of type {kind}",
            "config_groups whose targets name the module or Linear",
        )

    def _compiled(self, target: str) -> regex.Pattern[str]:
        if len(target) > _MOST_LENGTH:
            raise self._unsupported(repr_short(target), f"at most {_MOST_LENGTH} characters")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                re.compile(target[3:])  # regex accepts expressions that re, which loaders use, refuses
                return regex.compile(target[3:])
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise self._unsupported(
                f"{repr_short(target)}: {error}", "a regular expression after re:"
            ) from None

    def _matches(self, pattern: regex.Pattern[str], module: str) -> bool:
        started = time.monotonic()
        try:
            return pattern.match(module[:_MOST_LENGTH], timeout=max(1e-3, self._left)) is not None
        except TimeoutError:
            raise self._unsupported(
                f"re:{pattern.pattern}", f"expressions that match all modules within {_SECONDS:.0f} s"
            ) from None
        finally:
            self._left -= time.monotonic() - started

    def _unsupported(self, found: str, expected: str) -> Exception:
        return self._stored.unsupported("a target", "quantization_config", found, expected)
