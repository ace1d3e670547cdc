"""Feed-forward blocks in torch; names, shapes and sources are those of ``mixers.feed_forward``, with a batch B."""

from __future__ import annotations

import torch
from torch import Tensor

from bamba_reference.torch.mixers.base import BatchTokens, LayerWeights, Model, TorchMixer
from bamba_reference.torch.ops import wide


def mlp(model: Model, w: LayerWeights, u: Tensor, sequences: BatchTokens, state: None) -> Tensor:
    return w.linear("feed_forward.down_proj", gated(model, w, u))


def gated(model: Model, w: LayerWeights, u: Tensor) -> Tensor:
    """What the down projection is given, (B, L, ffn)."""
    ops = model.backend
    if ops.gate_up is None:
        return ops.swiglu(w.linear("feed_forward.gate_proj", u), w.linear("feed_forward.up_proj", u))
    return ops.gate_up(u, w.given("feed_forward.gate_proj"), w.given("feed_forward.up_proj"))


def moe(model: Model, w: LayerWeights, u: Tensor, sequences: BatchTokens, state: None) -> Tensor:
    """The weighted sum of each token's experts, wide: (B, L, d) of u (B, L, d).

    The router's product is wide too: a logit rounded to bfloat16 chooses other experts. ``linear`` receives the
    matrix of expert e under the stacked tensor's name and ``[e]``.
    """
    ops, x = model.backend, u.flatten(0, -2)  # (T, d)
    logits = w.linear("moe.router", x.to(wide(x.dtype)))  # (T, E)
    largest, chosen = logits.topk(model.config.num_experts_per_tok, dim=-1)  # (T, k), (T, k)
    shares = largest.softmax(dim=-1)  # (T, k)
    y = torch.zeros_like(x, dtype=logits.dtype)
    for e in chosen.unique().tolist():
        tokens, place = (chosen == e).nonzero(as_tuple=True)  # (n,), (n,)

        def linear(name: str, x: Tensor, e: int = e) -> Tensor:
            return ops.linear(x, w[f"moe.{name}.weight"][e], None, f"{w.prefix}moe.{name}.weight[{e}]")

        some = x[tokens]  # (n, d)
        out = linear("down_proj", ops.swiglu(linear("gate_proj", some), linear("up_proj", some)))
        y.index_add_(0, tokens, out.to(y.dtype) * shares[tokens, place, None])
    return y.view(*u.shape[:-1], -1)


MLP = TorchMixer(mlp)
MOE = TorchMixer(moe)
