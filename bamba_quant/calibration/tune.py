"""Tuned rounding: all quantized tensors of a file at once, by gradients of its divergence from the original's logits.

The file's layout, types and size stay. Every stored integer becomes a latent number that rounds to it; straight-through
gradients of the mean KL(original ‖ quantized) move the latents; what they round to in the end is stored. Text that
nothing is learned from decides whether that is nearer to the original than the file was.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bamba_quant.calibration.latents import LatentMatrix, LatentTensor, LatentVector
from bamba_quant.calibration.student import HeldOut, gradients, model_of, products, sequences_of, states_of
from bamba_quant.calibration.texts import Text, read_texts
from bamba_quant.calibration.tune_data import customary_steps, tune_data
from bamba_quant.calibration.tune_options import Tell, TuneError, TuneOptions
from bamba_quant.calibration.tune_run import Run
from bamba_quant.checkpoint import ReadOptions
from bamba_quant.checkpoint.base import read_raw
from bamba_quant.inference.loading import LoadedModel, load_model, torch_device
from bamba_quant.inference.memory import check_memory
from bamba_quant.metadata.tune_record import Tuned
from bamba_quant.tokenizers.encoder import read_encoder
from bamba_reference.tensors import WIDE, tensor_shapes
from bamba_reference.torch.forward import to_tensor

_BATCH, _BATCH_ON_CPU = 24, 8
_MICRO_BATCH_ON_CPU = 4
# Of what the original's head is given, kept from epoch to epoch.
_KNOWN_BYTES = 1 << 30


def tune(
    original: str | Path,
    quantized: str | Path,
    texts: Sequence[Text | str | Path],
    options: TuneOptions = TuneOptions(),
    progress: Tell = lambda progress: None,
    note: Callable[[str], None] = lambda note: None,
    reading: ReadOptions = ReadOptions(),
) -> Tuned:
    """Tune the file or directory ``quantized`` that was made from the checkpoint ``original``; ``reading`` is of both.

    ``texts`` are read already, or files. Nothing is written but the state that ``options`` ask for; the result has the
    new bytes of every tensor that changed. Raises a ``BambaQuantError`` for models that do not belong together and
    texts that cannot be tuned on.
    """
    started = time.monotonic()
    device = torch_device(options.device)
    given = [text if isinstance(text, Text) else read_texts([Path(text)])[0] for text in texts]
    source = load_model(Path(original), reading=reading)
    target = load_model(Path(quantized), reading=replace(reading, strip_prefix=""))
    if tensor_shapes(source.config) != tensor_shapes(target.config):
        raise TuneError(
            "the quantized model is not made from the original",
            where=quantized,
            expected=f"the tensors of {original}",
            fix="give the checkpoint that the quantized model was made from",
        )
    check_memory(
        "tuning this model",
        _least_bytes(source, target),
        device,
        "tune on a device with more memory (--tune-device), or without --tune",
    )
    weights = {name: to_tensor(source.weights[name], torch.float32, device) for name in source.weights}
    teacher = model_of(source.config, weights, device)
    batch = options.batch or (_BATCH_ON_CPU if device.type == "cpu" else _BATCH)
    with products("high"):
        if options.self_tokens:
            note(f"the original writes {options.self_tokens:,} tokens to tune on")
        # On a CPU the original's forward pass costs too much to cut the text anew in every epoch.
        fixed = device.type == "cpu"
        data = tune_data(read_encoder(source.checkpoint), given, teacher, options, batch, fixed)
        latents, constants, digest = latents_of(source, target, options, device)
        micro = options.micro_batch or (min(batch, _MICRO_BATCH_ON_CPU) if device.type == "cpu" else batch)
        student = {name: constants[name] for name in constants}
        sequences = sequences_of(source.config, options.ctx, device)
        held_out = HeldOut(teacher, torch.from_numpy(data.held_out).to(device), sequences, micro)

        steps = options.steps or customary_steps(data.batches.tokens)
        known = None
        n_bytes = 4 * data.batches.count * options.ctx * source.config.hidden_size
        if fixed and steps * batch > data.batches.count and n_bytes <= _KNOWN_BYTES:
            known = states_of(teacher, torch.from_numpy(data.batches.chunks()), sequences, micro)

        def add_gradients(ids: Tensor, numbers: Tensor) -> Tensor:
            return gradients(
                target.config, teacher, student, latents, ids, sequences, micro, options.recompute,
                None if known is None else known[numbers],
            )  # fmt: skip

        run = Run(
            latents, student, data, held_out, options, digest, add_gradients, device, batch, steps, note
        )
        return run.finish(progress, started)


def _least_bytes(source: LoadedModel, target: LoadedModel) -> int:
    """Original and student in float32; of what is learned also latents, their mean, both moments and gradients."""
    tensors = (target.weights.stored(name)[0] for name in target.weights)
    learned = sum(tensor.rows * tensor.columns for tensor in tensors if tensor.format.fields is not None)
    shapes = tensor_shapes(source.config).values()
    return 8 * sum(map(math.prod, shapes)) + 20 * learned


def latents_of(
    source: LoadedModel, target: LoadedModel, options: TuneOptions, device: torch.device
) -> tuple[list[LatentTensor], dict[str, Tensor], str]:
    """The tensors of ``target`` that are learned, all others as the reference has them, and a hash of the first."""
    latents: list[LatentTensor] = []
    constants: dict[str, Tensor] = {}
    digest = hashlib.sha256()
    for name in target.weights:
        tensor, rule, moved = target.weights.stored(name)
        if tensor.format.fields is not None and set(options.train) - {"floats"}:
            raw = read_raw(tensor)
            matrix = LatentMatrix(
                tensor, rule, moved, source.weights[name], raw, options.train, options.reach, device
            )
            if matrix.parameters:
                digest.update(raw.data)
                latents.append(matrix)
                continue
        elif "floats" in options.train and tensor.format.name == "f32" and name.endswith((*WIDE, ".bias")):
            raw = read_raw(tensor)
            digest.update(raw.data)
            latents.append(LatentVector(tensor, rule, moved, raw, target.weights[name], device))
            continue
        constants[name] = to_tensor(target.weights[name], torch.float32, device)
    if not latents:
        raise TuneError(
            "the model has no tensor whose rounding can be tuned",
            where=target.checkpoint.path,
            expected="types from Q2_K to Q8_0, IQ4_NL, IQ4_XS, MXFP4, int4 or int8 groups, FP8 or FP4",
            fix="choose another type",
        )
    return latents, constants, digest.hexdigest()
