"""Jamba's config.json; defaults are those of transformers' ``JambaConfig``.

Attention stands in every ``attn_layer_period``-th layer from ``attn_layer_offset`` on, experts in every
``expert_layer_period``-th from ``expert_layer_offset`` on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bamba_quant.errors import ArchitectureError
from bamba_quant.families import hf_keys
from bamba_quant.families import hf_schema as schema
from bamba_reference.config import Config, Layer


def _period(chosen: Sequence[int], layers: int) -> tuple[int, int]:
    """A period and an offset below it for which ``chosen`` are the layers that have one block.

    Raises ``ArchitectureError`` where there are none.
    """
    offset = chosen[0] if chosen else layers
    period = chosen[1] - offset if len(chosen) > 1 else layers + 1
    if offset >= period or tuple(chosen) != tuple(range(offset, layers, period)):
        raise ArchitectureError(
            "these layers do not follow each other as Jamba's configuration can say",
            found=f"layers {', '.join(map(str, chosen))} of {layers}",
            expected="every n-th layer, the first of them below n",
        )
    return period, offset


def _attention(config: Config) -> tuple[int, int]:
    return _period(config.attention_layers, config.num_hidden_layers)


def _experts(config: Config) -> tuple[int, int]:
    return _period(config.layers_of("moe"), config.num_hidden_layers)


def _periodic(name: str, period: int, offset: int, found: Callable[[Config], tuple[int, int]]) -> Any:
    return {
        f"{name}_layer_period": schema.count(period, write=lambda config: found(config)[0]),
        f"{name}_layer_offset": schema.count(offset, least=0, write=lambda config: found(config)[1]),
    }


_KEYS = {
    "vocab_size": schema.count(65536, most=schema.MOST_TOKENS),
    "hidden_size": schema.count(4096),
    "intermediate_size": schema.count(14336),
    "num_hidden_layers": schema.count(
        32, most=schema.MOST_LAYERS, write=lambda config: config.num_hidden_layers
    ),
    "num_attention_heads": schema.count(32),
    # Without the key there are 8, with null as many as heads.
    "num_key_value_heads": schema.count_or_null(8),
    "head_dim": hf_keys.attention()["head_dim"],
    **_periodic("attn", 8, 4, _attention),
    **_periodic("expert", 2, 1, _experts),
    "num_local_experts": schema.count(
        16, most=schema.MOST_EXPERTS, key="num_experts", write=lambda config: config.num_local_experts or 1
    ),
    "num_experts_per_tok": schema.count(2, write=lambda config: config.num_experts_per_tok or 1),
    "mamba_expand": schema.count(2),
    "mamba_d_state": schema.count(16),
    "mamba_d_conv": schema.count(4),
    "mamba_time_step_rank": schema.count_or_auto(key="mamba_dt_rank"),
    "mamba_conv_bias": schema.flag(True),
    "mamba_proj_bias": schema.flag(False),
    # Of the class that came with the first checkpoint.
    "mamba_inner_layernorms": schema.only(True, expected="true"),
    "hidden_act": hf_keys.SILU,
    "rms_norm_eps": schema.positive(1e-6),
    "tie_word_embeddings": schema.flag(False),
    "max_position_embeddings": schema.count(262144, other_key="n_ctx"),
    **hf_keys.SPECIAL_TOKENS,
    **hf_keys.USE_CACHE,
}


def _complete(values: dict[str, Any], hf: Mapping[str, Any]) -> dict[str, Any]:
    layers = range(values["num_hidden_layers"])
    attention, experts = (_chosen(values, name, layers) for name in ("attn", "expert"))
    count, used = values["num_local_experts"], values["num_experts_per_tok"]
    if count == 1:  # transformers makes no router for a single expert
        experts = ()
    if experts and used > count:
        raise schema.unsupported("num_experts_per_tok", used, f"at most num_experts, {count}")
    return {
        "layers": tuple(
            Layer(("attention" if i in attention else "mamba1",), ("moe" if i in experts else "mlp",))
            for i in layers
        ),
        **hf_keys.complete_attention(values),
        "mamba_time_step_rank": values["mamba_time_step_rank"] or -(-values["hidden_size"] // 16),
        "mixer_rms_eps": values["rms_norm_eps"],
        "mixer_norm_weights": True,
        "num_local_experts": count if experts else 0,
        "num_experts_per_tok": used if experts else 0,
        "expert_intermediate_size": values["intermediate_size"] if experts else 0,
        "norm_topk_prob": False,
    }


def _chosen(values: Mapping[str, Any], name: str, layers: range) -> Sequence[int]:
    period, offset = values[f"{name}_layer_period"], values[f"{name}_layer_offset"]
    if offset >= period:
        raise schema.unsupported(
            f"{name}_layer_offset", offset, f"a number below {name}_layer_period, {period}"
        )
    return layers[offset::period]


SCHEMA = schema.HfSchema(
    "transformers' JambaConfig",
    _KEYS,
    _complete,
    inert=frozenset({"use_mambapy", "use_associative_scan", "calc_logits_for_entire_prompt"}),
)
