"""The formats a tensor could take: each quantized once, as a whole model, into a file that is thrown away later."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import LlamaFileType

from bamba_quant.checkpoint import ReadOptions
from bamba_quant.checkpoint.imatrix import Imatrix, read_imatrix
from bamba_quant.inference.loading import load_model
from bamba_quant.inference.weights import LazyWeights
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.plan import Plan
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.recipes import Recipe, TypeOverrides
from bamba_quant.writers import write_plan

# Rows that blocks of 256 do not fill take q4_0, q5_0, q5_1, q8_0 and iq4_nl in their place.
FORMATS = ("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0")


@dataclass(frozen=True)
class Candidates:
    """A model's tensors in several formats: ``formats`` names those of each tensor by its GGUF name."""

    formats: Mapping[str, Mapping[str, str]]  # tensor -> format -> the file that has it so
    files: Mapping[str, LazyWeights]

    def weights(self, tensor: str, codec: str) -> LazyWeights:
        """The weights among which ``tensor`` has this format."""
        return self.files[self.formats[tensor][codec]]


def plan_candidate(
    model: Path,
    asked: str,
    outfile: Path,
    imatrix: Path | Imatrix | None = None,
    reading: ReadOptions = ReadOptions(),
    refine: bool = False,
) -> Plan:
    """The conversion of ``model`` to the format ``asked`` alone, as far as rows can take it."""
    return plan_conversion(
        model,
        outtype=Recipe(asked, LlamaFileType.GUESSED, asked, "", refine=refine),
        outfile=outfile,
        overrides=TypeOverrides(pure=True),
        imatrix=imatrix,
        vocab=not model.is_dir(),  # which nothing here needs; a GGUF brings its own
        reading=reading,
    )


def quantize_layers(
    model: Path,
    scheme: str,
    directory: Path,
    *,
    imatrix: Path | None = None,
    reading: ReadOptions = ReadOptions(),
    threads: int | None = None,
) -> Candidates:
    """Quantize every linear layer of ``model`` by ``scheme``, a codec of safetensors, in a directory in ``directory``.

    Raises a ``BambaQuantError`` as ``plan_quantization`` and ``write_plan`` do.
    """
    weighing = read_imatrix(imatrix) if imatrix else None
    plan = plan_quantization(model, scheme, imatrix=weighing, reading=reading)
    write_plan(plan, directory / scheme, threads=threads)
    quantized = {row.source.name for row in plan.matrices}
    formats = {
        str(rule.gguf): {scheme: scheme}
        for tensor, rule in plan.pairs
        if rule.gguf is not None and quantized.issuperset(part.name for part in tensor.stored)
    }
    return Candidates(formats, {scheme: load_model(directory / scheme).weights})


def quantize_candidates(
    model: Path,
    asked: Sequence[str],
    directory: Path,
    *,
    imatrix: Path | Imatrix | None = None,
    reading: ReadOptions = ReadOptions(),
    refine: bool = False,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> Candidates:
    """Quantize ``model`` to each of the formats ``asked``, as files in ``directory``, 1 to 9 bits a weight each.

    Raises a ``BambaQuantError`` as ``plan_conversion`` and ``write_plan`` do.
    """
    formats: dict[str, dict[str, str]] = defaultdict(dict)
    files: dict[str, LazyWeights] = {}
    for name in asked:
        progress(name)
        plan = plan_candidate(model, name, directory / f"{name}.gguf", imatrix, reading, refine)
        write_plan(plan, plan.outfile, threads=threads)
        files[name] = load_model(plan.outfile).weights
        for row in plan.rows:
            if row.format.dtype is None:
                formats[row.name].setdefault(row.format.name, name)
    return Candidates(formats, files)
