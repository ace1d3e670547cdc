"""Measures the layers that Bamba's relatives add beside transformers' torch path, in one run, on this machine's CPU.

    python -m benchmarks.forward_family

prints tokens per second of both and their ratio for a mixer of FalconMamba-7B's and of Codestral-Mamba-7B's shape
and for 64 experts of which each token uses 6, in float32, and how far the two results are apart. The two take
turns; each figure is the median of --repeats, after a run of each that is not counted.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.forward import TOKENS, report, take_turns

FALCON_7B: dict[str, Any] = {
    "hidden_size": 4096,
    "state_size": 16,
    "time_step_rank": 256,
    "vocab_size": 65024,
}
CODESTRAL_7B: dict[str, Any] = {"hidden_size": 4096, "num_heads": 128, "head_dim": 64, "n_groups": 8}
EXPERTS: dict[str, Any] = {
    "hidden_size": 1536, "intermediate_size": 512, "shared_intermediate_size": 1024, "num_hidden_layers": 4,
    "num_attention_heads": 12, "num_local_experts": 64, "num_experts_per_tok": 6, "mamba_n_heads": 48,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    import torch
    from transformers import FalconMambaConfig, GraniteMoeHybridConfig, Mamba2Config
    from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
    from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMoE
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {TOKENS} tokens, float32")
    print(f"{'':52} {'transformers':>9} {'reference':>6}")
    falcon, codestral = FalconMambaConfig(**FALCON_7B), Mamba2Config(**CODESTRAL_7B)
    selective = FalconMambaMixer(
        falcon, 0, initialize_mixer_weights=False
    )  # which it cannot do as long as it is made
    selective.init_falcon_mamba_weights()
    mixer("FalconMamba-7B mixer", "mamba1", selective, falcon, repeats)
    mixer("Codestral-Mamba-7B mixer", "mamba2", Mamba2Mixer(codestral, 0), codestral, repeats)
    experts(GraniteMoeHybridMoE(GraniteMoeHybridConfig(**EXPERTS)), repeats)


def mixer(what: str, kind: Any, oracle: Any, hf: Any, repeats: int) -> None:
    """transformers' mixer and the reference's of the same weights."""
    weights = {f"mamba.{name}": value for name, value in oracle.eval().state_dict().items()}
    block(what, kind, oracle, hf, weights, repeats)


def experts(oracle: Any, repeats: int) -> None:
    """transformers' experts and the reference's of the same weights."""
    from transformers import GraniteMoeHybridConfig

    for parameter in oracle.eval().parameters():
        parameter.normal_(std=0.02)
    gate, up = oracle.experts.gate_up_proj.chunk(2, dim=1)
    stacked = {
        "router": oracle.router.weight,
        "gate_proj": gate,
        "up_proj": up,
        "down_proj": oracle.experts.down_proj,
    }
    hf = GraniteMoeHybridConfig(**EXPERTS)
    weights = {f"moe.{name}.weight": value.contiguous() for name, value in stacked.items()}
    block("64 experts of 512, 6 a token", "moe", oracle, hf, weights, repeats)


def block(what: str, kind: Any, oracle: Any, hf: Any, weights: dict[str, Any], repeats: int) -> None:
    import torch

    from bamba_reference.packing import layout
    from bamba_reference.torch.blocks import BLOCKS
    from bamba_reference.torch.forward import prepare

    w, u = layer_of(hf, weights), torch.randn(1, TOKENS, hf.hidden_size)
    sequences = prepare(w.model.config, layout((1, TOKENS)), torch.float32, w.model.device)
    compare(what, lambda: oracle(u), lambda: BLOCKS[kind](w.model, w, u, sequences, None), repeats)


def layer_of(hf: Any, weights: dict[str, Any]) -> Any:
    """One layer's weights as the reference takes them."""
    import json

    import torch

    from bamba_quant.families import read_config
    from bamba_reference.torch.backend import TORCH
    from bamba_reference.torch.blocks import LayerWeights, Model
    from bamba_reference.torch.forward import default_chunk

    config, cpu = read_config(json.loads(hf.to_json_string(use_diff=False))), torch.device("cpu")
    return LayerWeights(Model(config, weights, torch.float32, cpu, TORCH, default_chunk(cpu)), "")


def compare(what: str, theirs: Any, ours: Any, repeats: int) -> None:
    expected = theirs()
    difference = float((ours() - expected).norm() / expected.norm())
    report(
        f"{what} ({difference:.0e} apart)", take_turns({"transformers": theirs, "reference": ours}, repeats)
    )


if __name__ == "__main__":
    main()
