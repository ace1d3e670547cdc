"""llama-quantize's recipes for the architectures of this library, with exactly its choices.

Source: llama.cpp, src/llama-quant.cpp, ``llama_tensor_get_type_impl`` and ``llama_ftype_get_default_type``, at the
commit that llama-cpp-python 0.3.36 contains. Three of its choices are accidents, kept so that the files are the same:
the rules for grouped-query attention look at the first layer, which in Bamba is a Mamba layer without key-value heads,
so they never apply; the matrices of Mamba layers, 30 % of Bamba's weights and all of Mamba's, have no rule of their own
in any recipe and always take the default format; and the rules made for the eight experts of Mixtral meet any model
that has eight, and no other.
"""

from __future__ import annotations

from collections.abc import Mapping

from gguf import LlamaFileType as FileType

from bamba_quant.recipes.base import Choice, Condition, Recipe, TensorPosition, register

Q6 = Choice("q6_k")

# Recipes that store attn_output in q5_k among eight experts.
_ATTENTION_OUTPUT_Q5_K = {"q2_k", "q3_k_s", "q3_k_m", "iq4_nl", "q4_k_s", "q4_k_m", "iq4_xs"}


def more_bits(position: TensorPosition) -> bool:
    """The first and the last eighth, and every third between (``use_more_bits``)."""
    eighth = position.count // 8
    return (
        position.index < eighth
        or position.index >= 7 * position.count // 8
        or (position.index - eighth) % 3 == 2
    )


def first_eighth(position: TensorPosition) -> bool:
    return position.index < position.count // 8


def first_sixteenth(position: TensorPosition) -> bool:
    return position.index < position.count // 16


def first_two(position: TensorPosition) -> bool:
    return position.index < 2


def first_four(position: TensorPosition) -> bool:
    return position.index < 4


def grouped_query(position: TensorPosition) -> bool:
    return position.grouped_query >= 4


def eight_experts(position: TensorPosition) -> bool:
    return position.experts == 8


def several_experts(position: TensorPosition) -> bool:
    return position.experts > 1


def first_eighth_measured(position: TensorPosition) -> bool:
    return position.imatrix and first_eighth(position)


def first_eighth_unmeasured(position: TensorPosition) -> bool:
    return not position.imatrix and first_eighth(position)


CONDITIONS: Mapping[str, Condition] = {
    condition.__name__: condition
    for condition in (
        more_bits,
        first_eighth,
        first_sixteenth,
        first_two,
        first_four,
        grouped_query,
        eight_experts,
        several_experts,
        first_eighth_measured,
        first_eighth_unmeasured,
    )
}


def _recipe(
    name: str,
    file_type: FileType,
    default: str,
    about: str,
    *aliases: str,
    **roles: Choice | tuple[Choice, ...],
) -> None:
    """Register a recipe whose output matrix is q6_k, and whose attention has more bits among eight experts."""
    listed = {role: choices if isinstance(choices, tuple) else (choices,) for role, choices in roles.items()}
    needs = frozenset({"q2_k"} if name == "q2_k_s" else ())
    for role, among_eight in (
        ("attn_v", "q8_0"),
        ("attn_k", "q8_0"),
        ("attn_output", "q5_k" if name in _ATTENTION_OUTPUT_Q5_K else default),
    ):
        listed[role] = (Choice(among_eight, eight_experts), *listed.get(role, ()))
    register(Recipe(name, file_type, default, about, {"output": (Q6,)} | listed, needs), *aliases)


register(Recipe("f32", FileType.ALL_F32, "f32", "every weight as float32"))
register(Recipe("f16", FileType.MOSTLY_F16, "f16", "matrices as float16"))
register(Recipe("bf16", FileType.MOSTLY_BF16, "bf16", "matrices as bfloat16"))
register(Recipe("q8_0", FileType.MOSTLY_Q8_0, "q8_0", "8 bits, practically lossless"))

_recipe("q6_k", FileType.MOSTLY_Q6_K, "q6_k", "6 bits, very small loss")
_recipe("q5_k_m", FileType.MOSTLY_Q5_K_M, "q5_k", "5 bits, more for part of attn_v and ffn_down", "q5_k",
        attn_v=Choice("q6_k", more_bits), ffn_down=Choice("q6_k", more_bits))  # fmt: skip
_recipe("q5_k_s", FileType.MOSTLY_Q5_K_S, "q5_k", "5 bits")
_recipe("q5_1", FileType.MOSTLY_Q5_1, "q5_1", "5 bits with an offset, legacy")
_recipe(
    "q5_0", FileType.MOSTLY_Q5_0, "q5_0", "5 bits, legacy", ffn_down=Choice("q5_1", first_eighth_measured)
)
_recipe("q4_k_m", FileType.MOSTLY_Q4_K_M, "q4_k", "4 bits, more for part of attn_v and ffn_down", "q4_k",
        attn_v=Choice("q6_k", more_bits), ffn_down=Choice("q6_k", more_bits))  # fmt: skip
_recipe("q4_k_s", FileType.MOSTLY_Q4_K_S, "q4_k", "4 bits, more for the first attn_v and ffn_down",
        attn_v=Choice("q5_k", first_four), ffn_down=Choice("q5_k", first_eighth))  # fmt: skip
_recipe("iq4_nl", FileType.MOSTLY_IQ4_NL, "iq4_nl", "4 bits on a curve, blocks of 32",
        attn_v=Choice("q5_k", grouped_query), ffn_down=Choice("q5_k", first_eighth_unmeasured))  # fmt: skip
_recipe("iq4_xs", FileType.MOSTLY_IQ4_XS, "iq4_xs", "4.25 bits on a curve",
        attn_v=Choice("q5_k", grouped_query), ffn_down=Choice("q5_k", first_eighth_unmeasured))  # fmt: skip
_recipe("q4_1", FileType.MOSTLY_Q4_1, "q4_1", "4 bits with an offset, legacy")
_recipe(
    "q4_0", FileType.MOSTLY_Q4_0, "q4_0", "4 bits, legacy", ffn_down=Choice("q4_1", first_eighth_measured)
)
_recipe("q3_k_l", FileType.MOSTLY_Q3_K_L, "q3_k", "3 bits, 5 for attn_v, attn_output and ffn_down",
        attn_v=Choice("q5_k"), attn_output=Choice("q5_k"), ffn_down=Choice("q5_k"))  # fmt: skip
_recipe("q3_k_m", FileType.MOSTLY_Q3_K_M, "q3_k", "3 bits, 4 or 5 for attn_v, attn_output and ffn_down", "q3_k",
        attn_v=(Choice("q5_k", first_two), Choice("q4_k")), attn_output=Choice("q4_k"),
        ffn_down=(Choice("q5_k", first_sixteenth), Choice("q4_k")))  # fmt: skip
_recipe("q3_k_s", FileType.MOSTLY_Q3_K_S, "q3_k", "3 bits")
_recipe("q2_k", FileType.MOSTLY_Q2_K, "q2_k", "2 bits, 3 for attn_v, attn_output and ffn_down",
        attn_v=(Choice("q4_k", grouped_query), Choice("q3_k")), attn_output=Choice("q3_k"),
        ffn_down=Choice("q3_k"))  # fmt: skip
_recipe("q2_k_s", FileType.MOSTLY_Q2_K_S, "q2_k", "2 bits, needs an importance matrix",
        attn_v=Choice("q4_k", grouped_query), ffn_down=Choice("q4_k", first_eighth))  # fmt: skip
_recipe(
    "tq2_0",
    FileType.MOSTLY_TQ2_0,
    "tq2_0",
    "ternary, 2 bits, for models trained so",
    token_embd=Choice("q4_k"),
)
_recipe(
    "tq1_0",
    FileType.MOSTLY_TQ1_0,
    "tq1_0",
    "ternary, 1.7 bits, for models trained so",
    token_embd=Choice("q4_k"),
)

# In this one alone experts are told from the feed-forward network beside them.
_NO_EXPERTS = """
    token_embd output attn_q attn_k attn_v attn_output ssm_in ssm_out ssm_x ssm_dt_proj ffn_gate ffn_up ffn_down
    ffn_gate_shexp ffn_up_shexp ffn_down_shexp
""".split()
register(
    Recipe(
        "mxfp4_moe",
        FileType.MOSTLY_MXFP4_MOE,
        "mxfp4",
        "experts in four-bit floats, everything else in q8_0",
        {role: (Choice("q8_0"),) for role in _NO_EXPERTS}
        | {
            f"ffn_{which}_exps": (Choice("mxfp4", several_experts), Choice("q8_0"))
            for which in ("gate", "up", "down")
        },
    )
)
