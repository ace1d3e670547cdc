"""Scores of each token, computed from two blocks of logits, which are not kept.

The definitions are llama-perplexity's (llama.cpp, tools/perplexity/perplexity.cpp): per token the negative
log-likelihoods, the divergence KLD = Σ p_base (ln p_base - ln p) over the vocabulary, Δp = p(token) - p_base(token),
and whether both find the same token most likely. All sums are float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bamba_quant.errors import BambaQuantError
from bamba_reference.kernels.cpu import likelihoods

F64 = NDArray[np.float64]

# Logits worked on at once: what float64 makes of them stays in a core's cache; a GPU needs as many to be busy.
_ELEMENTS = 1 << 20
_ELEMENTS_ON_GPU = 1 << 25
TOP = 5
_MOST_NATS = 700.0  # whose exponential is still a float64


@dataclass(frozen=True)
class Scores:
    """One value a scored token, (chunks, scored) each: likelihoods and divergence in nats, float64.

    ``overlap`` is how many of the candidate's five likeliest tokens are among the base's; ``right`` whether the
    likeliest is the text's.
    """

    nll_base: F64
    nll: F64
    kld: F64
    delta_p: F64
    same_top: NDArray[np.bool_]
    overlap: NDArray[np.int64]
    right_base: NDArray[np.bool_]
    right: NDArray[np.bool_]

    def first(self, chunks: int) -> Scores:
        """The same of the first ``chunks`` chunks."""
        return Scores(**{name: values[:chunks] for name, values in vars(self).items()})


@dataclass(frozen=True)
class BaseBlock:
    """The base's side of a block of T tokens: ln p = ``logits`` - ``normalizer``.

    ``logits`` (T, V); ``normalizer`` (T, 1) float64; ``targets`` (T,), the text's next tokens; ``top`` (T, 5) the
    likeliest tokens, the first of them first. Entries with ln p at or below ``cut`` are left out of the divergence.
    """

    logits: Tensor
    normalizer: Tensor
    targets: Tensor
    top: Tensor
    cut: float | None = None

    def first(self, count: int) -> BaseBlock:
        """The same of the first ``count`` tokens."""
        return BaseBlock(
            self.logits[:count], self.normalizer[:count], self.targets[:count], self.top[:count], self.cut
        )


def base_block(logits: Tensor, targets: Any) -> BaseBlock:
    """A base's logits (T, V) before the tokens ``targets`` (T,)."""
    wanted = torch.as_tensor(targets, device=logits.device)
    if likelihoods.supports(logits):
        found, greatest = likelihoods.normalizers(logits, min(TOP, logits.shape[-1]))
        return BaseBlock(logits, found[:, None], wanted, greatest)
    normalizer, top = [], []
    for rows in logits.split(_rows(logits)):
        normalizer.append(torch.logsumexp(rows.double(), dim=-1, keepdim=True))
        top.append(_likeliest(rows))
    return BaseBlock(logits, torch.cat(normalizer), wanted, torch.cat(top))


def score(base: BaseBlock, logits: Tensor) -> dict[str, NDArray[Any]]:
    """``Scores``' fields, each (T,), of a candidate's logits (T, V) for the tokens of ``base``."""
    parts: dict[str, list[Tensor]] = {}
    step = _rows(logits)
    for start in range(0, len(logits), step):
        now = slice(start, start + step)
        for name, values in _score_rows(base, logits, now).items():
            parts.setdefault(name, []).append(values)
    return {name: torch.cat(values).cpu().numpy() for name, values in parts.items()}


def collect(blocks: Sequence[Mapping[str, NDArray[Any]]], chunks: int) -> Scores:
    """Blocks of tokens in the text's order to ``Scores`` of ``chunks`` chunks."""
    return Scores(
        **{name: np.concatenate([block[name] for block in blocks]).reshape(chunks, -1) for name in blocks[0]}
    )


def check_finite(scores: Scores, base: str, candidate: str) -> None:
    """Raise ``BambaQuantError`` where one of the two, by its name, has likelihoods that no figure can be made of."""
    for name, nll in ((base, scores.nll_base), (candidate, scores.nll)):
        unknown = ~np.isfinite(nll)
        if unknown.any():
            raise BambaQuantError(
                "a model's logits are not finite numbers",
                where=f"{name}, chunk {int(unknown.any(1).argmax())}",
                found=f"{int(unknown.sum()):,} of {nll.size:,} scored tokens without a likelihood",
                fix="look for what is damaged with bamba-quant compare; in float16, evaluate in a wider --dtype",
            )
        if float(nll.mean()) > _MOST_NATS:
            raise BambaQuantError(
                "a model's perplexity is larger than any number",
                where=name,
                found=f"{float(nll.mean()):.0f} nats a token",
                fix="look for what is damaged with bamba-quant compare",
            )


def _score_rows(base: BaseBlock, logits: Tensor, now: slice) -> dict[str, Tensor]:
    target = base.targets[now, None]  # (t, 1)
    theirs, ours = base.logits[now], logits[now]  # (t, V)
    top_base = base.top[now]  # (t, 5)
    if likelihoods.supports(theirs, ours):
        cut = -math.inf if base.cut is None else base.cut
        kld, normalizer, top = likelihoods.divergences(
            theirs, base.normalizer[now], ours, cut, top_base.shape[1]
        )
    else:
        normalizer, top = torch.logsumexp(ours.double(), dim=-1), _likeliest(ours)  # (t,), (t, 5)
        log_p_base = theirs.double() - base.normalizer[now]  # (t, V)
        p_base = log_p_base.exp()
        if base.cut is not None:
            p_base = p_base * (log_p_base > base.cut)
        kld = (p_base * (log_p_base - (ours.double() - normalizer[:, None]))).sum(-1)
    nll_base = (base.normalizer[now] - theirs.gather(1, target).double())[:, 0]
    nll = normalizer - ours.gather(1, target).double()[:, 0]
    return {
        "nll_base": nll_base,
        "nll": nll,
        "kld": kld,
        "delta_p": (-nll).exp() - (-nll_base).exp(),
        "same_top": top[:, 0] == top_base[:, 0],
        "overlap": (top[:, :, None] == top_base[:, None, :]).sum((1, 2)),
        "right_base": top_base[:, :1].eq(target)[:, 0],
        "right": top[:, :1].eq(target)[:, 0],
    }


def _likeliest(rows: Tensor) -> Tensor:
    """The numbers of the five greatest entries of each row (t, V), the greatest first; torch chooses among equals."""
    return rows.topk(min(TOP, rows.shape[-1])).indices


def _rows(logits: Tensor) -> int:
    return max(1, (_ELEMENTS_ON_GPU if logits.is_cuda else _ELEMENTS) // int(logits.shape[-1]))
