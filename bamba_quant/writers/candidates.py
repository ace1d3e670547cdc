"""Writes a quantized copy of a model, given the name of a GGUF type or of a scheme."""

from __future__ import annotations

from pathlib import Path

from bamba_quant.codecs import SafetensorsCodec, codecs
from bamba_quant.metadata.model_name import name_of
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.plan import Plan
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.writers import write_plan


def plan_candidate(model: Path, kind: str, directory: Path) -> tuple[Plan, Path]:
    """The plan of ``model``, a Hugging Face directory, as ``kind``, and the path of its output in ``directory``.

    ``kind`` is a GGUF type (q4_k_m) or a scheme of safetensors (fp8-dynamic, w4a16-g128). Raises a
    ``BambaQuantError`` for a kind that is neither, and for a model that cannot be quantized so.
    """
    if kind in {scheme.name for scheme in codecs(SafetensorsCodec)}:
        return plan_quantization(model, kind), directory / f"{name_of(model).name}-{kind}"
    plan = plan_conversion(model, outtype=kind, outfile=directory)
    return plan, plan.outfile


def make_candidate(model: Path, kind: str, directory: Path, *, threads: int | None = None) -> Path:
    """Write what ``plan_candidate`` plans, replacing an older one; the file or directory. Raises likewise."""
    plan, output = plan_candidate(model, kind, directory)
    write_plan(plan, output, threads=threads, overwrite=True)
    return output
