"""Which experts a token uses, and with which weights, in numpy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bamba_reference.config import Config
from bamba_reference.numpy_ops import Array, sigmoid, softmax
from bamba_reference.packing import Ints


def routed(config: Config, w: Mapping[str, Array], logits: Array) -> tuple[Ints, Array]:
    """The experts of each token and their weights, (L, k) each, of the router's logits (L, E).

    ``expert_scores`` "softmax": the largest logits choose; weights are the softmax of these alone where
    ``norm_topk_prob``, else of all E (transformers' ``modeling_granitemoehybrid.py``, ``modeling_jamba.py``).

    "sigmoid" (DeepSeek-V3, 2412.19437, section 2.1.2; transformers' ``modeling_nemotron_h.py``): experts have the
    scores sigmoid(logits). Scores plus ``moe.router.correction`` choose, among the experts of the
    ``used_expert_groups`` of ``expert_groups`` equal groups whose two largest have the largest sums. Weights are the
    scores alone, divided by their sum where ``norm_topk_prob``, times ``expert_weights_scale``.
    """
    k = config.num_experts_per_tok
    if config.expert_scores == "softmax":
        chosen = _largest(logits, k)
        if config.norm_topk_prob:
            return chosen, softmax(np.take_along_axis(logits, chosen, axis=-1))
        return chosen, np.take_along_axis(softmax(logits), chosen, axis=-1)
    scores = sigmoid(logits)
    corrected = scores + w["moe.router.correction"]  # (L, E)
    groups = corrected.reshape(len(logits), config.expert_groups, -1)  # (L, G, E/G)
    used = _largest(np.sort(groups, axis=-1)[..., -2:].sum(-1), config.used_expert_groups)  # (L, used groups)
    unused = np.ones(groups.shape[:2], bool)  # (L, G)
    np.put_along_axis(unused, used, False, axis=-1)
    chosen = _largest(np.where(unused[..., None], -np.inf, groups).reshape(logits.shape), k)
    weights = np.take_along_axis(scores, chosen, axis=-1)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + weights.dtype.type(1e-20))
    return chosen, weights * weights.dtype.type(config.expert_weights_scale)


def _largest(values: Array, k: int) -> Ints:
    """The indices of the k largest of each row, the largest first: (L, k)."""
    return np.argsort(-values, axis=-1, kind="stable")[:, :k]
