"""Tuned rounding: all quantized tensors of a file at once, by gradients of its divergence from the original's logits.

The file's layout, types and size stay. Every stored integer becomes a latent number that rounds to it; straight-through
gradients of the mean KL(original ‖ quantized) move the latents; what they round to in the end is stored. Text that
nothing is learned from decides whether that is nearer to the original than the file was.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bamba_quant.calibration.latents import LatentMatrix, LatentTensor, LatentVector
from bamba_quant.calibration.learner import Learner, WholeModel
from bamba_quant.calibration.student import model_of, products, sequences_of, states_of
from bamba_quant.calibration.texts import Text, read_texts
from bamba_quant.calibration.tune_data import TuneData, customary_steps, tune_data
from bamba_quant.calibration.tune_options import Tell, TuneError, TuneOptions
from bamba_quant.calibration.tune_run import Run
from bamba_quant.calibration.tune_state import state_belongs
from bamba_quant.checkpoint import ReadOptions
from bamba_quant.checkpoint.base import read_raw
from bamba_quant.codecs.arrays import U8
from bamba_quant.codecs.fields import Fields
from bamba_quant.inference.loading import LoadedModel, load_model, torch_device
from bamba_quant.inference.memory import available_memory, check_memory
from bamba_quant.inference.weights import weights_on
from bamba_quant.metadata.tune_record import Tuned
from bamba_quant.tokenizers.encoder import read_encoder
from bamba_reference.tensors import WIDE, tensor_shapes
from bamba_reference.torch.forward import Model, stored_dtype, to_tensor

_BATCH, _BATCH_ON_CPU = 24, 8
_MICRO_BATCH_ON_CPU = 4
# Of what the original's head is given, kept from epoch to epoch.
_KNOWN_BYTES = 1 << 30
# A layer at a time: tokens that pass a layer together where the weights are on the GPU, and where they are not; bytes
# of a GPU that are left to activations, one layer's weights and a block of logits; tensors that are unpacked ahead.
_LAYER_TOKENS = {False: 12288, True: 4096}
_BESIDES = 16_000_000_000
_AHEAD = 8
_MOST_REACH = 1.99  # of codes that int16 holds in 1/16384


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
    read = [text if isinstance(text, Text) else read_texts([Path(text)])[0] for text in texts]
    source = load_model(Path(original), reading=reading)
    target = load_model(Path(quantized), reading=replace(reading, strip_prefix=""))
    if tensor_shapes(source.config) != tensor_shapes(target.config):
        raise TuneError(
            "the quantized model is not made from the original",
            where=quantized,
            expected=f"the tensors of {original}",
            fix="give the checkpoint that the quantized model was made from",
        )
    options = replace(options, dtype=_dtype(options, device, _least_bytes(source, target)))
    by_layer = options.dtype == "bfloat16"
    if by_layer:
        _check_by_layer(options, device)
        note("tuning in bfloat16, a layer at a time")
    else:
        if options.max_memory is not None:
            raise TuneError(
                "a bound on the GPU's memory (--max-memory) is for tuning a layer at a time",
                found=f"device {device}, {options.dtype}",
                fix="give --tune-device cuda and --tune-dtype bfloat16, or leave the bound out",
            )
        fix = "tune on a GPU (--tune-device cuda --tune-dtype bfloat16), or without --tune"
        check_memory("tuning this model", _least_bytes(source, target), device, fix)
    batch = options.batch or (_BATCH_ON_CPU if device.type == "cpu" else _BATCH)
    with products("high"), ExitStack() as held:
        given = Given(source, target, read, options, device, batch, note, held)
        try:
            learner, data, steps, digest = (_by_layer if by_layer else _whole_model)(given)
            return Run(learner, data, options, digest, batch, steps, note).finish(progress, started)
        except torch.OutOfMemoryError as error:
            raise TuneError(
                "the GPU has too little memory for this tuning",
                found=str(error).splitlines()[0],
                fix="give a larger --max-memory, or leave it out; or tune on a GPU with more memory",
            ) from error


def _dtype(options: TuneOptions, device: torch.device, least: int) -> str:
    """The dtype to tune in: that of the options, of the run to go on from, or float32 where ``least`` bytes fit."""
    if options.dtype is not None:
        return options.dtype
    if options.resume and options.state is not None and (begun := state_belongs(options.state).get("dtype")):
        return str(begun)
    small = device.type == "cuda" and least > (available_memory(device) or least)
    return "bfloat16" if small or (device.type == "cuda" and options.max_memory is not None) else "float32"


def _check_by_layer(options: TuneOptions, device: torch.device) -> None:
    """Raise ``TuneError`` for what cannot be tuned a layer at a time."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise TuneError(
            "tuning in bfloat16, a layer at a time, runs on a GPU",
            found=f"device {device}",
            fix="give --tune-device cuda, or tune in float32 (--tune-dtype float32)",
        )
    if importlib.util.find_spec("triton") is None:
        raise TuneError("tuning in bfloat16, a layer at a time, needs Triton", fix="pip install triton")
    if "codes" not in options.train or options.reach > _MOST_REACH:
        raise TuneError(
            "tuning in bfloat16, a layer at a time, learns codes",
            found=f"parts {', '.join(options.train)}; reach {options.reach}",
            expected=f"codes among the parts, and a reach of at most {_MOST_REACH}",
            fix="tune in float32 (--tune-dtype float32)",
        )


@dataclass(frozen=True)
class Given:
    """The arguments of ``tune``, read."""

    source: LoadedModel
    target: LoadedModel
    texts: list[Text]
    options: TuneOptions
    device: torch.device
    batch: int
    note: Callable[[str], None]
    held: ExitStack = field(default_factory=ExitStack)  # of what is let go in the end

    def data(self, teacher: Model, fixed: bool) -> TuneData:
        """The tokens; ``teacher`` writes what the options ask it to."""
        if self.options.self_tokens:
            self.note(f"the original writes {self.options.self_tokens:,} tokens to tune on")
        encoder = read_encoder(self.source.checkpoint)
        return tune_data(encoder, self.texts, teacher, self.options, self.batch, fixed)


def _whole_model(given: Given) -> tuple[Learner, TuneData, int, str]:
    """Everything in float32, and what the schedule needs to know: tokens, steps, a hash of what is learned."""
    source, options, device, batch = given.source, given.options, given.device, given.batch
    originals = weights_on(source.weights, device, torch.float32)
    weights = {name: to_tensor(originals[name], torch.float32, device) for name in source.weights}
    teacher = model_of(source.config, weights, device)
    # On a CPU the original's forward pass costs too much to cut the text anew in every epoch.
    fixed = device.type == "cpu"
    data = given.data(teacher, fixed)
    latents, constants, digest = latents_of(source, given.target, options, device)
    micro = options.micro_batch or (min(batch, _MICRO_BATCH_ON_CPU) if device.type == "cpu" else batch)
    sequences = sequences_of(source.config, options.ctx, device)
    steps = options.steps or customary_steps(data.batches.tokens)
    known = None
    n_bytes = 4 * data.batches.count * options.ctx * source.config.hidden_size
    if fixed and steps * batch > data.batches.count and n_bytes <= _KNOWN_BYTES:
        known = states_of(teacher, torch.from_numpy(data.batches.chunks()), sequences, micro)
    held_out = torch.from_numpy(data.held_out).to(device)
    learner = WholeModel(
        latents, constants, teacher, sequences, held_out, known, options, batch, micro, given.note
    )
    return learner, data, steps, digest


def _by_layer(given: Given) -> tuple[Learner, TuneData, int, str]:
    """A layer at a time in bfloat16; results as of ``_whole_model``."""
    from bamba_quant.calibration.by_layer import ByLayer
    from bamba_quant.calibration.units import DTYPE, Codes, Original

    source, options, device = given.source, given.options, given.device
    free = available_memory(device) or 0
    if options.max_memory is not None:
        free = min(free, options.max_memory)
        share = options.max_memory / torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
        given.held.callback(torch.cuda.set_per_process_memory_fraction, 1.0, device)
    weights, learned = _counts(source, given.target)
    on_host = free < (n_bytes := 2 * weights + 8 * learned) + _BESIDES
    if on_host:
        fix = "tune on a machine with more memory, or without --tune"
        check_memory("what the GPU does not hold", n_bytes, torch.device("cpu"), fix)
        given.note(f"codes, moments and the original ({n_bytes / 1e9:.1f} GB) stay in main memory")
        if options.self_tokens:
            what = "the original is in main memory and cannot write text"
            raise TuneError(what, found="--tune self", fix="give a text (--tune TEXT)")
    original, codes = Original(source, device, on_host), Codes(given.target, device, on_host)
    given.held.callback(original.close)
    given.held.callback(codes.residence.close)
    data = given.data(original.model(), False)
    latents, constants, digest = latents_of(
        source, given.target, options, device, codes.matrix, lambda name: stored_dtype(name, DTYPE)
    )
    micro = options.micro_batch or max(1, min(given.batch, _LAYER_TOKENS[on_host] // options.ctx))
    held_out = torch.from_numpy(data.held_out).to(device)
    steps = options.steps or customary_steps(data.batches.tokens)
    learner = ByLayer(original, codes, latents, constants, held_out, options, micro, device, on_host)
    return learner, data, steps, digest


def _counts(source: LoadedModel, target: LoadedModel) -> tuple[int, int]:
    """How many weights the model has, and how many of them have codes that are learned."""
    tensors = (target.weights.stored(name)[0] for name in target.weights)
    learned = sum(tensor.rows * tensor.columns for tensor in tensors if tensor.format.fields is not None)
    return sum(map(math.prod, tensor_shapes(source.config).values())), learned


def _least_bytes(source: LoadedModel, target: LoadedModel) -> int:
    """Original and student in float32; of what is learned also latents, their mean, both moments and gradients."""
    weights, learned = _counts(source, target)
    return 8 * weights + 20 * learned


def latents_of(
    source: LoadedModel,
    target: LoadedModel,
    options: TuneOptions,
    device: torch.device,
    matrix_of: Callable[..., LatentMatrix] = LatentMatrix,
    dtype_of: Callable[[str], torch.dtype] = lambda name: torch.float32,
) -> tuple[list[LatentTensor], dict[str, Tensor], str]:
    """The tensors of ``target`` that are learned, all others as the reference has them, and a hash of the first.

    ``matrix_of`` takes the arguments of ``LatentMatrix``; ``dtype_of`` is asked for the dtypes of tensors that are not
    learned.
    """
    latents: list[LatentTensor] = []
    constants: dict[str, Tensor] = {}
    digest = hashlib.sha256()
    originals = weights_on(source.weights, device, torch.float32)
    parts = set(options.train) - {"floats"}
    for name, raw, fields in _unpacked(target, bool(parts)):
        tensor, rule, moved = target.weights.stored(name)
        if fields is not None:
            matrix = matrix_of(
                tensor, rule, moved, originals[name], fields, options.train, options.reach, device
            )
            if matrix.learns_codes or matrix.parameters:
                digest.update(raw.data)
                latents.append(matrix)
                continue
        elif "floats" in options.train and tensor.format.name == "f32" and name.endswith((*WIDE, ".bias")):
            raw = read_raw(tensor)
            digest.update(raw.data)
            latents.append(LatentVector(tensor, rule, moved, raw, target.weights[name], device))
            continue
        constants[name] = to_tensor(target.weights[name], dtype_of(name), device)
    if not latents:
        raise TuneError(
            "the model has no tensor whose rounding can be tuned",
            where=target.checkpoint.path,
            expected="types from Q2_K to Q8_0, IQ4_NL, IQ4_XS, MXFP4, int4 or int8 groups, FP8 or FP4",
            fix="choose another type",
        )
    return latents, constants, digest.hexdigest()


def _unpacked(target: LoadedModel, wanted: bool) -> Iterator[tuple[str, U8, Fields | None]]:
    """Every tensor's name, bytes and fields in order; the latter of formats that have them, if they are ``wanted``.

    Some are read and unpacked ahead, by threads.
    """

    def unpack(name: str) -> tuple[str, U8, Fields | None]:
        tensor = target.weights.stored(name)[0]
        if tensor.format.fields is None or not wanted:
            return name, np.empty(0, np.uint8), None
        raw = read_raw(tensor)
        return name, raw, tensor.format.fields.unpack(raw)

    with ThreadPoolExecutor() as pool:
        ahead: deque[Future[tuple[str, U8, Fields | None]]] = deque()
        for name in target.weights:
            ahead.append(pool.submit(unpack, name))
            if len(ahead) > _AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
