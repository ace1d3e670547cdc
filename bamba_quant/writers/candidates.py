"""A quantized copy of a model by the name of what it becomes, whichever writer makes that."""

from __future__ import annotations

from pathlib import Path

from bamba_quant.codecs import SafetensorsCodec, codecs
from bamba_quant.metadata.model_name import name_of
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.writers import write_gguf
from bamba_quant.writers.quantized import write_quantized


def candidate_path(model: Path, kind: str, directory: Path) -> Path:
    """What ``make_candidate`` will make; reads headers only and raises as it does."""
    if kind in {scheme.name for scheme in codecs(SafetensorsCodec)}:
        return directory / f"{name_of(model).name}-{kind}"
    return plan_conversion(model, outtype=kind, outfile=directory).outfile


def make_candidate(model: Path, kind: str, directory: Path, *, threads: int | None = None) -> Path:
    """``model``, a Hugging Face directory, as ``kind`` in ``directory``; what is there under its name is replaced.

    ``kind`` is a recipe of GGUF (q4_k_m) or a scheme of safetensors (fp8-dynamic, w4a16-g128). Returns the file or
    the directory that was made. Raises a ``BambaQuantError`` for a kind that is neither and for whatever its writer
    refuses.
    """
    if kind in {scheme.name for scheme in codecs(SafetensorsCodec)}:
        target = candidate_path(model, kind, directory)
        write_quantized(plan_quantization(model, kind), target, threads=threads, overwrite=True)
        return target
    conversion = plan_conversion(model, outtype=kind, outfile=directory)
    return write_gguf(conversion.plan, conversion.outfile, threads=threads, overwrite=True)[0]
