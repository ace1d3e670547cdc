"""Checkpoints of NVIDIA's ModelOpt (``quant_method`` "modelopt"): FP8 by tensor, NVFP4, and mixtures of both.

The dtype of a weight says which it is. Numbers are multiplied: an NVFP4 weight is code · ``weight_scale`` ·
``weight_scale_2``, and ``input_scale`` is the largest input over what the type holds (modelopt's
torch/quantization/qtensor/nvfp4_tensor.py; vLLM, layers/quantization/modelopt.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bamba_quant.checkpoint.assemble import E4M3, WeightAssembler
from bamba_quant.checkpoint.compressed_fp4 import add_nvfp4
from bamba_quant.checkpoint.hf_fp8 import assemble_by_tensor
from bamba_quant.checkpoint.packed import Activations
from bamba_quant.errors import repr_short
from bamba_quant.files.json_file import read_json

METHOD = "modelopt"
FILE = "hf_quant_config.json"
_ALGORITHMS = ("FP8", "NVFP4", "MIXED_PRECISION")
_UNUSED = ("input_scale", "k_scale", "v_scale", "k_proj.output_scale", "v_proj.output_scale")
_PARTS = (".weight_scale", ".weight_scale_2", ".pre_quant_scale")


def separate_configuration(directory: Path) -> dict[str, Any] | None:
    """The ``quantization_config`` that earlier releases wrote into a file of its own; None without that file."""
    file = directory / FILE
    if not file.is_file():
        return None
    found = read_json(file, "how the weights are quantized").get("quantization")
    return {"quant_method": METHOD, **(found if isinstance(found, dict) else {})}


def read_modelopt(quantization: Mapping[str, Any], stored: WeightAssembler) -> None:
    """Assemble every quantized matrix. Raises ``CheckpointError`` naming what cannot be read."""
    algorithm = quantization.get("quant_algo")
    if algorithm not in _ALGORITHMS:
        found = f"quant_algo {repr_short(algorithm)}"
        raise stored.unsupported("quantization_config", found, ", ".join(_ALGORITHMS), "the checkpoint")
    for name, codes in list(stored.remaining().items()):
        module = name.removesuffix(".weight")
        if module == name or len(codes.shape) != 2 or codes.format.name not in (E4M3, "u8"):
            continue
        scale = stored.number(f"{module}.input_scale")
        if codes.format.name == E4M3:
            assemble_by_tensor(stored, module, codes, ("weight_scale",), static=True)
        else:
            rounding = Activations("nvfp4", 16, scale=1 / scale) if scale else None
            add_nvfp4(
                stored, module, codes, name, "weight_scale_2", True,
                rounding or Activations(unknown="NVFP4 without input_scale"),
            )  # fmt: skip
    stored.unused |= {name for name in stored.remaining() if name.endswith(_UNUSED)}
    for name in stored.remaining():
        if name.endswith(_PARTS):
            expected = "scales of a weight in e4m3, or of one in pairs of e2m1"
            raise stored.unsupported(name, "a part without such a weight", expected, "a weight")
