"""Notes on loading a quantized directory: what vLLM 0.23 and transformers 5.23 get wrong or lack."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from typing import Any

from bamba_quant.codecs import SafetensorsCodec
from bamba_quant.families import Family
from bamba_quant.families.runtime_compat import EXPERTS, Loaders
from bamba_reference.config import Config

_DEQUANTIZED = "from_pretrained(..., quantization_config=CompressedTensorsConfig(dequantize=True))"


def loading_notes(
    family: Family,
    config: Config,
    hf_config: Mapping[str, Any],
    scheme: SafetensorsCodec,
    roles: Set[str],
) -> list[str]:
    """Notes for a directory of this ``scheme`` whose quantized matrices have ``roles``."""
    loaders = family.loaders
    notes: list[str] = []
    touched = sorted(loaders.initialized & set(roles))
    alone = any("*" in rule.hf for rule in family.tensors(config))
    if alone and scheme.packed and (scheme.zero_points or (scheme.experts and not roles & EXPERTS)):
        notes.append(
            "transformers 5.23 does not load packed weights beside experts that are not packed or have zero points: "
            "quantize the experts by a symmetric scheme, or choose an FP8 scheme"
        )
    elif scheme.zero_points:
        notes.append(
            "transformers 5.23 does not expect the packed zero points that compressed-tensors 0.20 defines: load with "
            + _DEQUANTIZED
        )
    elif scheme.packed and touched:
        notes.append(
            f"transformers 5.23 initializes {', '.join(touched)} of this family by a weight that packed layers lack: "
            f"load with {_DEQUANTIZED}, or keep these matrices: "
            + " ".join(f"--ignore {role}" for role in touched)
        )
    lost = roles & EXPERTS and any(part.suffix == ".weight_global_scale" for part in scheme.parts(64, 64))
    if lost:
        notes.append(
            "transformers 5.23 leaves out the global scales of experts, whose weights it then makes thousands of times "
            "too large: for transformers choose mxfp4a16 or another scheme"
        )
    if scheme.kernels:
        notes.append(
            f"computing with these weights takes {scheme.kernels}: on a CPU transformers loads them, and the first "
            "product fails"
        )
    if loaders.renamed and scheme.kernels:
        notes.append("transformers 5.23 does not load torchao's tensors of this family, which it renames")
    if "architectures" not in hf_config and "model_type" not in hf_config:
        notes.append(
            "config.json is state-spaces' own, which neither transformers nor vLLM reads: make one that they do "
            "with bamba-quant convert --outtype f32 and bamba-quant export, and quantize that"
        )
    if loaders.vllm is None:
        notes.append(
            "vLLM has no quantized layers for this family"
            + ("" if lost else ": transformers alone loads this")
        )
    else:
        notes += _cut_blocks(loaders, config, scheme, roles)
    if loaders.initialized and hf_config.get("rescale_prenorm_residual") is True:
        notes.append(
            "config.json sets rescale_prenorm_residual, and with it transformers 5.23 divides the out_proj that it "
            "has just loaded by the root of the number of layers: set it to false, as training is over"
        )
    return notes


def _cut_blocks(
    loaders: Loaders, config: Config, scheme: SafetensorsCodec, roles: Collection[str]
) -> list[str]:
    """Notes on merged matmuls that vLLM does not load, because the height of an output is not a multiple of a block."""
    notes: list[str] = []
    for merged in loaders.merged:
        quantized = [role for role in merged.roles if role in roles]
        outputs = merged.outputs(config)
        if not scheme.block_rows or not quantized or all(n % scheme.block_rows == 0 for n in outputs[:-1]):
            continue
        unit = set(quantized).union(*(unit for unit in loaders.units if unit & set(quantized)))
        notes.append(
            f"vLLM refuses to load this: it computes {', '.join(quantized)} as one product with outputs of "
            f"{', '.join(map(str, outputs))}, of which all but the last would have to be multiples of "
            f"{scheme.block_rows}; choose a scheme without blocks, or keep these matrices: "
            + " ".join(f"--ignore {role}" for role in sorted(unit & set(roles)))
        )
    return notes
