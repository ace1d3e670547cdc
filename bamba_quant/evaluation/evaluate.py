"""One pass over a text for a base and all its candidates, and every figure from it; logits exist a block at a time.

All sources go through each layer side by side, so the base is read once and what is held does not grow with the
model; then the head is applied to blocks of tokens, and of each token a few numbers are kept.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bamba_quant.evaluation import figures
from bamba_quant.evaluation.activations import resolve, with_activations
from bamba_quant.evaluation.drift import DriftWatch, worst
from bamba_quant.evaluation.gates import Limit, check_enough, check_sections, judge, limits_for
from bamba_quant.evaluation.hashing import Hashing
from bamba_quant.evaluation.intervals import Bootstrap
from bamba_quant.evaluation.logits_file import (
    LogitsFile,
    base_blocks,
    is_logits_file,
    read_logits_file,
    writing,
)
from bamba_quant.evaluation.models import (
    ComparisonError,
    Opened,
    describe,
    describe_logits,
    files_of,
    open_models,
)
from bamba_quant.evaluation.noise_floor import OTHER, FloorWatch, floors
from bamba_quant.evaluation.options import Options
from bamba_quant.evaluation.record import command_line, compiling, run_record, timing
from bamba_quant.evaluation.result import SCHEMA, Candidate, Evaluation, NoiseFloor
from bamba_quant.evaluation.scores import BaseBlock, Scores, base_block, check_finite, collect, score
from bamba_quant.evaluation.sources import Source, reading_order
from bamba_quant.evaluation.tokens import Tokens, file_tokens, text_tokens
from bamba_quant.read_ahead import read_ahead_for
from bamba_quant.running import first_product, torch_device, torch_dtype
from bamba_quant.weights import Meter
from bamba_reference.backend import Backend
from bamba_reference.kernels import backend_named
from bamba_reference.stream import Pass, final_hidden, logit_blocks
from bamba_reference.tensors import FINAL_NORM

# Logits that exist together, of the base and of one candidate each.
_LOGITS = 1 << 26
_MOST_TOKENS = 2048


@dataclass(frozen=True)
class Progress:
    """How far a ``stage`` is: ``done`` of ``total`` layers or scored tokens; ``estimates`` by label, once there are."""

    stage: str
    done: int
    total: int
    estimates: Mapping[str, Mapping[str, float]]


Tell = Callable[[Progress], None]


@dataclass(frozen=True)
class _Measured:
    scores: list[Scores]
    floor: Scores | None


def evaluate(
    base: Path,
    candidates: Sequence[Path],
    text: Path | None,
    options: Options = Options(),
    *,
    gates: Mapping[str, Sequence[Limit]] | None = None,
    limits: Sequence[Limit] = (),
    command: str | None = None,
    progress: Tell = lambda progress: None,
) -> Evaluation:
    """Evaluate ``candidates`` against ``base`` on a UTF-8 text.

    Each is a Hugging Face directory or a GGUF file; the base may be a file of llama-perplexity's logits, which
    brings its own tokens and then needs no text. ``gates`` are ``gates.read_gates``' sections, ``limits`` hold for
    every candidate. ``command`` is what a report shows as the way to run this again. Raises a ``BambaQuantError``
    for models that cannot be compared and texts that cannot be scored.
    """
    started = datetime.datetime.now(datetime.UTC)
    given = read_logits_file(base) if is_logits_file(base) else None
    if given and options.save_base:
        raise ComparisonError(
            "the base is a file of logits already",
            where=base,
            fix="leave out --save-base, or give a model as base",
        )
    opened = open_models(None if given else base, candidates, options.ignore_config_keys)
    others = opened if given else opened[1:]
    kinds = [each.model.checkpoint.kind for each in opened]
    options = replace(options, activations=resolve(options.activations, kinds))
    dtype, device = torch_dtype(options.dtype), torch_device(options.device)
    backend = backend_named(options.backend, device, dtype)
    with ThreadPoolExecutor(1) as beside:
        beside.submit(first_product, device, dtype)
        tokens = file_tokens(given, opened, text, options) if given else text_tokens(opened, text, options)
    files = [describe(each) for each in others]
    if gates is not None:
        check_sections(gates, files)
    chosen = [limits_for(gates or {}, file.recipe, file.label, limits) for file in files]
    check_enough([each for some in chosen for each in some], tokens.text.chunks, tokens.text.scored)

    clock = time.perf_counter()
    meter = Meter()
    ahead = read_ahead_for(device)
    sources = [Source(each.model.weights, each.model.config, dtype, device, meter, ahead) for each in opened]
    floor_chunks = 0 if given or options.noise_floor == "none" else min(options.floor_chunks, len(tokens.cut))
    drift_chunks = 0 if given else min(options.drift_chunks, len(tokens.cut))
    backends = [with_activations(backend, each.model, options.activations, device, dtype) for each in opened]
    floor = None
    if floor_chunks:
        other = with_activations(OTHER, opened[0].model, options.activations, device, torch.float32)
        floor = FloorWatch(opened[0].model.config, options.noise_floor, floor_chunks, other)
    drift = (
        DriftWatch(opened[0].model.config, [each.exact for each in sources], drift_chunks, meter, device)
        if drift_chunks
        else None
    )

    def watch(passed: Pass) -> None:
        for each in (drift, floor):
            if each:
                each(passed)

    hashing: Hashing | None = None

    def layer_done(done: int, total: int) -> None:
        nonlocal hashing
        if ahead and not hashing:
            # A GPU leaves the cores to it once the kernels are made, and what one has read the other finds cached.
            hashing = stack.enter_context(Hashing(map(files_of, opened)))
        progress(Progress("layers", done, total, {}))

    with ExitStack() as stack:
        stack.enter_context(compiling(meter, device))
        write = None
        if ahead:
            stack.enter_context(ahead).begin(reading_order(sources, drift is not None))
        if options.save_base:
            inputs = [*(file for each in opened for file in files_of(each)), *([text] if text else [])]
            write = stack.enter_context(
                writing(
                    options.save_base,
                    tokens.own,
                    opened[0].model.config.vocab_size,
                    overwrite=options.overwrite,
                    inputs=inputs,
                )
            )
        hidden = final_hidden(
            [each.model.config for each in opened],
            sources,
            tokens.cut,
            dtype=dtype,
            device=device,
            backend=backends,
            on_layer=layer_done,
            on_pass=watch if floor or drift else None,
            watched=max(floor_chunks, drift_chunks),
        )
        measured = _score(given, opened, sources, hidden, tokens, floor, write, backends, progress)
        for file, scores in zip(files, measured.scores, strict=True):
            check_finite(scores, base.name, file.label)
        losses = drift.finish() if drift else [()] * len(others)
        seconds = time.perf_counter() - clock
        hashing = hashing or stack.enter_context(Hashing(map(files_of, opened)))
        hashed = hashing.finish()
        hashing_seconds = time.perf_counter() - clock - seconds

    measured_floors = floors(measured.floor) if measured.floor else None
    bootstrap = Bootstrap(tokens.text.chunks, options.seed, options.resamples)
    found = []
    for number, (file, scores) in enumerate(zip(files, measured.scores, strict=True)):
        table = figures.figures(scores, bootstrap, measured_floors)
        source = number + len(opened) - len(others)
        found.append(
            Candidate(
                model=replace(file, files=hashed[source]),
                figures=table,
                flips=figures.flips(scores),
                kld_histogram=figures.histogram(scores.kld, figures.KLD_EDGES),
                delta_p_histogram=figures.histogram(scores.delta_p, figures.DELTA_P_EDGES),
                chunks=figures.chunk_means(scores),
                tensors=losses[number],
                layers=tuple(drift.layers[source]) if drift else (),
                worst=worst(losses[number]),
                gates=judge(chosen[number], table),
            )
        )
    return Evaluation(
        schema=SCHEMA,
        run=run_record(
            command or command_line(base, candidates, text, options),
            replace(options, ctx=tokens.text.ctx),
            "; ".join(dict.fromkeys(each.name for each in backends)),
            started,
        ),
        text=tokens.text,
        base=describe_logits(given) if given else replace(describe(opened[0]), files=hashed[0]),
        candidates=tuple(found),
        noise_floor=NoiseFloor(floor.described, floor_chunks, measured_floors, tuple(floor.layers))
        if floor and measured_floors
        else None,
        drift_chunks=drift_chunks,
        timing=timing(seconds, hashing_seconds, meter, tokens.cut.size, device),
    )


def _score(
    given: LogitsFile | None,
    opened: Sequence[Opened],
    sources: Sequence[Source],
    hidden: list[torch.Tensor],
    tokens: Tokens,
    floor: FloorWatch | None,
    write: Callable[[NDArray[np.float32]], None] | None,
    backends: Sequence[Backend],
    progress: Tell,
) -> _Measured:
    """The head over blocks of tokens: the base's logits once, then each candidate's against them."""
    first, scored = tokens.first, tokens.text.scored
    vocab_size = opened[0].model.config.vocab_size
    block = max(1, min(_MOST_TOKENS, _LOGITS // vocab_size))
    kept = []
    while hidden:  # so that what is not scored is let go, one source after the other
        states = hidden.pop(0)
        kept.append(states[:, first:-1].reshape(-1, states.shape[-1]).clone())
        del states
    logits = [
        logit_blocks(each.model.config, source, states, backend=ops, block=block)
        for each, ops, source, states in zip(opened, backends, sources, kept, strict=True)
    ]
    floor_logits: Iterator[torch.Tensor] = iter(())
    if floor:
        states = floor.final(sources[0][FINAL_NORM])[:, first:-1]
        floor_logits = logit_blocks(
            opened[0].model.config,
            sources[0],
            states.reshape(-1, states.shape[-1]),
            backend=floor.other,
            block=block,
        )
    candidates = logits if given else logits[1:]
    labels = [each.label for each in (opened if given else opened[1:])]
    blocks: list[list[dict[str, NDArray[Any]]]] = [[] for _ in candidates]
    floor_blocks: list[dict[str, NDArray[Any]]] = []
    done = 0
    for base in _base_blocks(given, None if given else logits[0], tokens, block, kept[0].device):
        if write:
            write(base.logits.float().cpu().numpy())
        for number, ours in enumerate(candidates):
            blocks[number].append(score(base, next(ours)))
        by_another_path = next(floor_logits, None)
        if by_another_path is not None:
            floor_blocks.append(score(base.first(len(by_another_path)), by_another_path))
        done += len(base.targets)
        progress(Progress("tokens", done, scored, _estimates(labels, blocks)))
    chunks = tokens.text.chunks
    return _Measured(
        [collect(each, chunks) for each in blocks],
        collect(floor_blocks, floor.texts) if floor else None,
    )


def _base_blocks(
    given: LogitsFile | None,
    logits: Iterator[torch.Tensor] | None,
    tokens: Tokens,
    block: int,
    device: torch.device,
) -> Iterator[BaseBlock]:
    if given:
        yield from base_blocks(given, tokens.text.chunks, block, device)
        return
    assert logits is not None
    targets, at = tokens.targets, 0
    for each in logits:
        yield base_block(each, targets[at : at + len(each)])
        at += len(each)


def _estimates(
    labels: Sequence[str], blocks: Sequence[Sequence[Mapping[str, NDArray[Any]]]]
) -> dict[str, dict[str, float]]:
    found = {}
    for label, scored in zip(labels, blocks, strict=True):
        means = {
            name: float(np.concatenate([block[name] for block in scored]).mean())
            for name in ("nll", "nll_base", "kld")
        }
        found[label] = {
            "ppl_ratio": float(np.exp(np.minimum(means["nll"] - means["nll_base"], 700))),
            "kld_mean": means["kld"],
        }
    return found
