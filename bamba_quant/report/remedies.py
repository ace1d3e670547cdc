"""From a report to the next file: the command that stores a candidate's worst tensors with more bits."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from bamba_quant.codecs import BlockCodec, codecs
from bamba_quant.evaluation.result import Candidate, Evaluation, TensorLoss
from bamba_quant.families.runtime_compat import EXPERTS
from bamba_quant.recipes import recipes
from bamba_quant.recipes.matrices import SHARED

_MOST = 3  # tensors of one command
_NEAR = 3.0  # dB above the worst one: at most half its share of noise
_STEP = 1.8  # bits a weight, at least, by which a type must be wider: q4_k becomes q6_k, q6_k becomes q8_0
_WIDER = ("q4_k", "q5_k", "q6_k", "q8_0", "bf16")
_FP8 = {"e4m3 by channel": "dynamic", "e4m3 by tensor": "tensor", "e4m3 by block": "block"}


@dataclass(frozen=True)
class Remedy:
    """``tensors``, the worst first, and a command that makes a file of the candidate's type with more bits for them.

    ``parts`` are the command and its options, quoted for a shell, without an importance matrix or other options of the
    command that made the candidate. ``complete`` is False where that command is not known, or tuned the file: ``parts``
    are then the options to add to it.
    """

    tensors: tuple[TensorLoss, ...]
    parts: tuple[str, ...]
    complete: bool

    @property
    def command(self) -> str:
        return " ".join(self.parts)


def worst_tensors(candidate: Candidate) -> tuple[TensorLoss, ...]:
    """The records of ``candidate.worst``, worst first."""
    known = {loss.name: loss for loss in candidate.tensors}
    return tuple(known[name] for name in candidate.worst if name in known)


def remedy(evaluation: Evaluation, candidate: Candidate) -> Remedy | None:
    """What to run for the candidate's worst tensors; None where nothing was lost or no wider type is left."""
    lossy = [loss for loss in worst_tensors(candidate) if loss.output_sqnr is not None]
    if not lossy or evaluation.base.kind == "logits":
        return None
    least = lossy[0].output_sqnr or 0.0
    near = [loss for loss in lossy if (loss.output_sqnr or 0.0) <= least + _NEAR][:_MOST]
    make = _for_gguf if candidate.model.kind == "gguf" else _for_directory
    return make(evaluation, candidate, near)


def _for_gguf(evaluation: Evaluation, candidate: Candidate, near: list[TensorLoss]) -> Remedy | None:
    wider = {loss.stored_name: (loss, found) for loss in near if (found := _wider(loss.format))}
    if not wider:
        return None
    words = [f"--tensor-type {shlex.quote(f'{name}={found}')}" for name, (_, found) in wider.items()]
    tensors, model = tuple(loss for loss, _ in wider.values()), candidate.model
    plain = not model.tuned and not evaluation.base.is_quantized
    if plain and model.recipe in {recipe.name for recipe in recipes()}:
        outfile = f"{model.path.removesuffix('.gguf')}-mended.gguf"
        made = f"bamba-quant convert {shlex.quote(evaluation.base.path)} --outtype {model.recipe}"
        return Remedy(tensors, (made, *words, f"--outfile {shlex.quote(outfile)}"), True)
    return Remedy(tensors, tuple(words), False)


def _wider(name: str) -> str | None:
    """The narrowest type of ``_WIDER`` with enough more bits than the type ``name``; None where there is none."""
    bits = {codec.name: codec.bits_per_weight for codec in codecs(BlockCodec)}
    return next((each for each in _WIDER if bits[each] >= bits.get(name, 99.0) + _STEP), None)


def _for_directory(evaluation: Evaluation, candidate: Candidate, near: list[TensorLoss]) -> Remedy:
    names = dict.fromkeys(name for loss in near for name in _ignored_together(candidate, loss))
    words = [f"--ignore {shlex.quote(name.removesuffix('.weight'))}" for name in names]
    command = _command(near[0].format, candidate.model.recipe)
    plain = evaluation.base.kind == "huggingface" and not evaluation.base.is_quantized
    if command and plain and not candidate.model.tuned:
        subcommand, *options = command
        places = (evaluation.base.path, f"{candidate.model.path.rstrip('/')}-mended")
        made = f"bamba-quant {subcommand} {shlex.join(places)}"
        return Remedy(tuple(near), (made, *options, *words), True)
    return Remedy(tuple(near), tuple(words), False)


def _ignored_together(candidate: Candidate, loss: TensorLoss) -> Iterator[str]:
    """The tensor's own name in the file, and those of its layer that loaders need in the same form."""
    fused = next((group for group in (*SHARED, EXPERTS) if loss.role in group), frozenset({loss.role}))
    for other in candidate.tensors:
        if other.name == loss.name or (other.layer == loss.layer and other.role in fused - {loss.role}):
            yield other.stored_name


def _command(stored: str, recipe: str) -> list[str] | None:
    """The subcommand and options that store matrices as ``stored``; None for a format of other tools."""
    if stored == "e4m3 by block" and recipe == "fp8":  # transformers' own form, by its quant_method
        return ["fp8", "--format fp8"]
    if stored in _FP8:
        return ["fp8", f"--scheme {_FP8[stored]}"]
    if found := re.fullmatch(r"w([48])a16(-asym)?-g(128|64|32)", stored):
        options = [f"--bits {found[1]}"] * (found[1] != "4") + [f"--group-size {found[3]}"]
        return ["int4", *options, *(["--asymmetric"] if found[2] else [])]
    if stored in ("nvfp4a16", "mxfp4a16"):
        return ["fp4", f"--scheme {stored}"]
    if found := re.fullmatch(r"torchao-int4(-tile-packed)?-g(128|64|32)", stored):
        return ["int4", f"--format torchao{found[1] or ''}", f"--group-size {found[2]}"]
    return None
