"""What tuned rounding made, and what a file says of it: on which texts, how long, and what that changed.

A GGUF has it as key-values ``bamba_quant.tune.*``; a directory in config.json as ``bamba_quant.tune``, which
transformers and vLLM keep and do not read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gguf import GGUFValueType
from numpy.typing import NDArray

from bamba_quant.checkpoint import Checkpoint
from bamba_quant.checkpoint.gguf_values import GgufValue, array, float32
from bamba_quant.errors import CheckpointError, repr_short
from bamba_quant.printable import printable

CONFIG_KEY = "bamba_quant"
SELF = "self"  # instead of a text's name: what the model itself wrote
KEYS_PREFIX = f"{CONFIG_KEY}.tune."
_MOST_TEXTS, _MOST_CHARACTERS = 1000, 4096


@dataclass(frozen=True)
class TuneRecord:
    """``texts`` are names, without directories, and ``sha256`` their contents' hashes; ``tokens`` those tuned on, each
    counted once, in ``steps`` steps of the optimizer.

    ``held_out_kld_before`` and ``_after`` are mean divergences from the original, in nats a token, of the file without
    and with tuning, on the part of the texts that was held out. ``codes_changed`` of ``codes`` integers differ.
    """

    texts: tuple[str, ...]
    sha256: tuple[str, ...]
    tokens: int
    steps: int
    seed: int
    held_out_kld_before: float
    held_out_kld_after: float
    codes: int
    codes_changed: int

    @property
    def better(self) -> bool:
        """Whether the tuned file is nearer to the original than the one without tuning, on what was held out."""
        return self.held_out_kld_after < self.held_out_kld_before

    def key_values(self) -> dict[str, GgufValue]:
        """The record as key-values of a GGUF."""
        found: dict[str, GgufValue] = {}
        for name, value in asdict(self).items():
            if isinstance(value, tuple):
                typed = array(GGUFValueType.STRING, value)
            elif isinstance(value, float):
                typed = float32(value)
            else:
                typed = GgufValue(GGUFValueType.UINT64, value)
            found[KEYS_PREFIX + name] = typed
        return found

    def plain(self) -> dict[str, Any]:
        """The record as plain values, for config.json under ``bamba_quant``."""
        return {"tune": {**asdict(self), "texts": list(self.texts), "sha256": list(self.sha256)}}

    def account(self) -> str:
        """What was done, in the words of a model card."""
        each = zip(self.texts, self.sha256, strict=True)
        return (
            f"The rounding was tuned end to end against the original's logits: {self.steps:,} steps over "
            f"{self.tokens:,} tokens, seed {self.seed}, of "
            + ", ".join(f"{_described(name)} (SHA-256 `{sha256}`)" for name, sha256 in each)
            + f". {self.codes_changed:,} of {self.codes:,} codes changed. On text that was held out from tuning the "
            f"mean KL divergence from the original went from {self.held_out_kld_before:.6g} to "
            f"{self.held_out_kld_after:.6g} nats a token."
        )

    def line(self) -> str:
        """The record in one line, for people."""
        changed = self.codes_changed / max(1, self.codes)
        return (
            f"tuned on {', '.join(map(_described, self.texts))}: {self.steps:,} steps, {self.tokens:,} tokens, "
            f"held-out KLD {self.held_out_kld_before:.4g} → {self.held_out_kld_after:.4g}, {changed:.2%} of the codes "
            "changed"
        )


@dataclass(frozen=True)
class Tuned:
    """New contents of a quantized checkpoint's tensors by their stored names, each of the bytes it had.

    ``changed`` counts the codes that changed, by tensor.
    """

    tensors: Mapping[str, NDArray[Any]]
    record: TuneRecord
    changed: Mapping[str, int]

    def __repr__(self) -> str:
        return f"Tuned({len(self.tensors)} tensors, {self.record.line()})"


def read_record(checkpoint: Checkpoint) -> TuneRecord | None:
    """What ``checkpoint`` says of its tuning; None where it says nothing.

    Raises ``CheckpointError`` for a record of other fields or values.
    """
    if checkpoint.kind == "gguf":
        values: Any = {
            key.removeprefix(KEYS_PREFIX): value.value
            for key, value in checkpoint.metadata.items()
            if key.startswith(KEYS_PREFIX)
        }
    else:
        ours = checkpoint.metadata.get(CONFIG_KEY)
        values = ours.get("tune") if isinstance(ours, Mapping) else None
    if not values:
        return None
    wrong = _wrong(values)
    if wrong is not None:
        raise CheckpointError(
            "the record of tuning is invalid",
            where=checkpoint.path,
            found=wrong,
            expected=", ".join(_CHECKS),
            fix="convert the original checkpoint again",
        )
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return TuneRecord(**{**values, **lists})


def _texts(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 0 < len(value) <= _MOST_TEXTS
        and all(isinstance(text, str) and len(text) <= _MOST_CHARACTERS for text in value)
    )


def _hashes(value: Any) -> bool:
    return _texts(value) and all(re.fullmatch(r"[0-9a-f]{64}", text) for text in value)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**64


def _kld(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > -1


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "texts": _texts,
    "sha256": _hashes,
    "tokens": _count,
    "steps": _count,
    "seed": _count,
    "held_out_kld_before": _kld,
    "held_out_kld_after": _kld,
    "codes": _count,
    "codes_changed": _count,
}


def _wrong(values: Any) -> str | None:
    if not isinstance(values, Mapping) or values.keys() != _CHECKS.keys():
        return repr_short(sorted(values) if isinstance(values, Mapping) else values)
    for name, fits in _CHECKS.items():
        if not fits(values[name]):
            return f"{name} = {repr_short(values[name])}"
    if len(values["texts"]) != len(values["sha256"]):
        return f"{len(values['texts'])} texts and {len(values['sha256'])} hashes"
    return None


def _described(name: str) -> str:
    return "text the model wrote itself" if name == SELF else printable(name)
