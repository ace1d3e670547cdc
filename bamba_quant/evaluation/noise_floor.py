"""The noise floor: every figure of the base against itself, computed by another path of arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bamba_quant.errors import BambaQuantError, did_you_mean
from bamba_quant.evaluation import figures
from bamba_quant.evaluation.drift import drift
from bamba_quant.evaluation.result import FIGURES, LayerDrift
from bamba_quant.evaluation.scores import Scores
from bamba_reference.config import Config
from bamba_reference.runtime.layer_passes import LayerPass
from bamba_reference.torch.backend import TORCH, Backend
from bamba_reference.torch.forward import Model, layer, stored_dtype
from bamba_reference.torch.ops import wide

PATHS = {
    "order": "the same dtype, sums in another order",
    "bfloat16": "arithmetic in bfloat16",
    "none": "no noise floor",
}

# Texts that go through a layer together.
_TOKENS = 2048


def _linear_of_halves(x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> Tensor:
    """torch's products of both halves of the terms: another order of the sums than any backend's."""
    half = x.shape[-1] // 2
    first, second = (weight[:, part].to(x.dtype) for part in (slice(half), slice(half, None)))
    y = F.linear(x[..., :half], first, None if bias is None else bias.to(x.dtype))
    return y + F.linear(x[..., half:], second)


def _head_of_halves(x: Tensor, weight: Tensor, name: str) -> Tensor:
    return _linear_of_halves(x.to(wide(x.dtype)), weight, None, name)


OTHER = replace(TORCH, name="torch with terms in halves", linear=_linear_of_halves, head=_head_of_halves)


@dataclass
class FloorWatch:
    """Called after each ``LayerPass``; runs the base's first ``texts`` texts through every layer by another path."""

    config: Config
    path: str
    texts: int
    other: Backend = OTHER
    layers: list[LayerDrift] = field(default_factory=list)
    hidden: Tensor | None = None
    dtype: torch.dtype | None = None
    described: str = ""

    def __post_init__(self) -> None:
        if self.path not in PATHS:
            what = f"unknown noise floor{did_you_mean(self.path, PATHS)}"
            raise BambaQuantError(what, where="--noise-floor", found=self.path, expected=", ".join(PATHS))

    def __call__(self, passed: LayerPass) -> None:
        if passed.source != 0:
            return
        x = passed.before[: self.texts].clone() if self.hidden is None else self.hidden
        model = self._other(passed.model)
        sequences = passed.sequences
        self.dtype = model.dtype
        if model.dtype != passed.model.dtype and not self.config.residual_in_fp32:
            x = x.to(model.dtype)
        for some in x.split(max(1, _TOKENS // x.shape[1])):
            some.copy_(layer(model, passed.layer, some, sequences))
        self.hidden = x
        self.layers.append(
            LayerDrift(
                passed.layer,
                self.config.layer_types[passed.layer],
                None,
                drift(passed.after[: self.texts].double(), x.double()),
            )
        )

    def _other(self, model: Model) -> Model:
        if self.path == "bfloat16":
            weights = {
                name: weight.to(stored_dtype(name, torch.bfloat16)) for name, weight in model.weights.items()
            }
            self.described = "arithmetic in bfloat16"
            return replace(model, weights=weights, dtype=torch.bfloat16)
        self.described = (
            f"{str(model.dtype).removeprefix('torch.')}, scan in chunks of {2 * model.chunk} instead of "
            f"{model.chunk}, products by {self.other.name} instead of {model.backend.name}"
        )
        return replace(model, chunk=2 * model.chunk, backend=self.other)

    def final(self, norm: Tensor) -> Tensor:
        """The final hidden states (texts, L, d) after the final norm of weight ``norm``."""
        assert self.hidden is not None and self.dtype is not None
        return self.other.rms_norm(self.hidden, norm, self.config.rms_norm_eps).to(self.dtype)


def floors(scores: Scores) -> dict[str, float]:
    """Each figure of the base against itself, as a distance from that of a candidate that lost nothing."""
    found = figures.values(scores)
    return {
        key: abs(value - (found["ppl_base"] if kind.perfect is None else kind.perfect))
        for key, value in found.items()
        for kind in (FIGURES[key],)
    } | {"ppl_base": abs(found["ppl"] - found["ppl_base"])}
