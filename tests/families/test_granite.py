"""What Granite's tensors have besides: two of GGUF's are one in its checkpoints."""

from __future__ import annotations

from bamba_quant.families import family_of, read_config
from bamba_quant.recipes.base import ALWAYS_F32
from bamba_quant.recipes.patterns import tensors_matching
from tests.support.families import FAMILIES


def test_patterns_match_names_of_either_kind() -> None:
    model = FAMILIES["granitemoehybrid"].random(num_local_experts=4, num_experts_per_tok=2)
    hf = model.config.to_dict() | {"architectures": ["GraniteMoeHybridForCausalLM"]}
    rules = family_of(hf).tensors(read_config(hf))
    quantized = [rule for rule in rules if rule.gguf is not None and rule.role not in ALWAYS_F32]
    # One tensor of the checkpoint is two of the GGUF's; "output" is llama-quantize's, not output_linear.
    found = tensors_matching("block_sparse_moe.input_linear", quantized)
    assert {name.split(".")[2] for name in found} == {"ffn_gate_exps", "ffn_up_exps"}
    assert not any("exps" in name for name in tensors_matching("output", quantized))
