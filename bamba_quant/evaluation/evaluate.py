"""One pass over a text for a base and all its candidates, and every figure from it; logits exist a block at a time.

All sources go through each layer side by side, so the base is read once and what is held does not grow with the
model; then the head is applied to blocks of tokens, and of each token a few numbers are kept.
"""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bamba_quant.errors import CheckpointError
from bamba_quant.evaluation import figures
from bamba_quant.evaluation.drift import DriftWatch, worst
from bamba_quant.evaluation.gates import Limit, check_enough, judge, limits_for
from bamba_quant.evaluation.intervals import RESAMPLES, Bootstrap
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
    files_of,
    hashes,
    open_models,
    tokenizer_hash,
)
from bamba_quant.evaluation.noise_floor import OTHER, FloorWatch, floors
from bamba_quant.evaluation.result import (
    SCHEMA,
    Candidate,
    Evaluation,
    ModelFile,
    NoiseFloor,
    Run,
    Text,
    Timing,
)
from bamba_quant.evaluation.scores import BaseBlock, Scores, base_block, collect, score
from bamba_quant.evaluation.sources import Source
from bamba_quant.running import read_text, torch_device, torch_dtype
from bamba_quant.tokenizers.encoder import Encoder, read_encoder
from bamba_quant.weights import Meter
from bamba_reference.backend import TORCH, Backend
from bamba_reference.perplexity import cut_chunks
from bamba_reference.stream import Pass, final_hidden, logit_blocks
from bamba_reference.tensors import FINAL_NORM

# Logits that exist together, of the base and of one candidate each.
_LOGITS = 1 << 26
_MOST_TOKENS = 2048


@dataclass(frozen=True)
class Options:
    """How to evaluate; ``chunks`` None is the whole text. ``floor_chunks`` and ``drift_chunks`` are watched."""

    ctx: int = 512
    chunks: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    resamples: int = RESAMPLES
    noise_floor: str = "order"
    floor_chunks: int = 8
    drift_chunks: int = 2
    tokenizer: Path | None = None
    ignore_config_keys: tuple[str, ...] = ()
    save_base: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Progress:
    """How far a ``stage`` is: ``done`` of ``total`` layers or scored tokens; ``estimates`` by label, once there are."""

    stage: str
    done: int
    total: int
    estimates: Mapping[str, Mapping[str, float]]


Tell = Callable[[Progress], None]


@dataclass(frozen=True)
class _Tokens:
    """The text as every model sees it: ``own`` (n, ctx) as it is, ``cut`` with BOS in the first places."""

    own: NDArray[np.int64]
    cut: NDArray[np.int64]
    text: Text

    @property
    def first(self) -> int:
        """The place in a chunk whose logits are the first that count."""
        return self.text.ctx // 2

    @property
    def targets(self) -> NDArray[np.int64]:
        return self.cut[:, self.first + 1 :].reshape(-1)


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
    backend: Backend = TORCH,
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
    opened = open_models(None if given else base, candidates, options.ignore_config_keys)
    others = opened if given else opened[1:]
    dtype, device = torch_dtype(options.dtype), torch_device(options.device)
    tokens = _file_tokens(given, opened, text, options) if given else _text_tokens(opened, text, options)
    files = [describe(each) for each in others]
    chosen = [limits_for(gates or {}, file.recipe, file.label, limits) for file in files]
    check_enough(chosen, tokens.text.chunks)

    clock = time.perf_counter()
    meter = Meter()
    sources = [Source(each.model.weights, each.model.config, dtype, device, meter) for each in opened]
    floor_chunks = 0 if given or options.noise_floor == "none" else min(options.floor_chunks, len(tokens.cut))
    drift_chunks = 0 if given else min(options.drift_chunks, len(tokens.cut))
    floor = FloorWatch(opened[0].model.config, options.noise_floor, floor_chunks) if floor_chunks else None
    drift = (
        DriftWatch(opened[0].model.config, [each.model.weights for each in opened], drift_chunks, meter)
        if drift_chunks
        else None
    )

    def watch(passed: Pass) -> None:
        for each in (drift, floor):
            if each:
                each(passed)

    hidden = final_hidden(
        [each.model.config for each in opened],
        sources,
        tokens.cut,
        dtype=dtype,
        device=device,
        backend=backend,
        on_layer=lambda done, total: progress(Progress("layers", done, total, {})),
        on_pass=watch if floor or drift else None,
        watched=max(floor_chunks, drift_chunks),
    )
    measured = _score(given, opened, sources, hidden, tokens, floor, options, backend, progress)
    losses = drift.finish() if drift else [()] * len(others)
    seconds = time.perf_counter() - clock
    hashing = time.perf_counter()
    hashed = [hashes(files_of(each)) for each in opened]
    hashing = time.perf_counter() - hashing

    measured_floors = floors(measured.floor) if measured.floor else None
    bootstrap = Bootstrap(tokens.text.chunks, options.seed, options.resamples)
    found = []
    for number, (file, scores) in enumerate(zip(files, measured.scores, strict=True)):
        table = figures.figures(scores, bootstrap, measured_floors)
        source = number + len(opened) - len(others)
        found.append(
            Candidate(
                model=_with_hashes(file, hashed[source]),
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
        run=_run(command or _command(base, candidates, text, options), options, backend, started),
        text=tokens.text,
        base=_logits_model(given) if given else _with_hashes(describe(opened[0]), hashed[0]),
        candidates=tuple(found),
        noise_floor=NoiseFloor(floor.described, floor_chunks, measured_floors, tuple(floor.layers))
        if floor and measured_floors
        else None,
        drift_chunks=drift_chunks,
        timing=_timing(seconds, hashing, meter, tokens.cut.size, device),
    )


def _score(
    given: LogitsFile | None,
    opened: Sequence[Opened],
    sources: Sequence[Source],
    hidden: list[torch.Tensor],
    tokens: _Tokens,
    floor: FloorWatch | None,
    options: Options,
    backend: Backend,
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
        logit_blocks(each.model.config, source, states, backend=backend, block=block)
        for each, source, states in zip(opened, sources, kept, strict=True)
    ]
    floor_logits: Iterator[torch.Tensor] = iter(())
    if floor:
        states = floor.final(sources[0][FINAL_NORM])[:, first:-1]
        floor_logits = logit_blocks(
            opened[0].model.config,
            sources[0],
            states.reshape(-1, states.shape[-1]),
            backend=OTHER,
            block=block,
        )
    candidates = logits if given else logits[1:]
    labels = [each.label for each in (opened if given else opened[1:])]
    blocks: list[list[dict[str, NDArray[Any]]]] = [[] for _ in candidates]
    floor_blocks: list[dict[str, NDArray[Any]]] = []
    with ExitStack() as stack:
        write = None
        if options.save_base and not given:
            write = stack.enter_context(
                writing(options.save_base, tokens.own, vocab_size, overwrite=options.overwrite)
            )
        done = 0
        for base in _base_blocks(given, None if given else logits[0], tokens, block, kept[0].device):
            if write:
                write(base.logits.float().cpu().numpy())
            for number, ours in enumerate(candidates):
                blocks[number].append(score(base, next(ours)))
            for found in [next(floor_logits, None)]:
                if found is not None:
                    floor_blocks.append(score(base.first(len(found)), found))
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
    tokens: _Tokens,
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


def _text_tokens(opened: Sequence[Opened], text: Path | None, options: Options) -> _Tokens:
    """The text by the base's tokenizer, once every candidate's is found to read it alike."""
    if text is None:
        raise CheckpointError("there is no text to evaluate on", fix="give one with --text")
    words, digest = read_text(text)
    if options.tokenizer:
        from bamba_quant.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(options.tokenizer)
        encoder = read_encoder(checkpoint)
        ids = encoder.encode(words)
    else:
        checkpoint = opened[0].model.checkpoint
        encoder = read_encoder(checkpoint)
        ids = encoder.encode(words)
        for other in opened[1:]:
            _check_same_tokens(ids, encoder, other, words)
    own, cut = _cut(ids, encoder.bos, opened, options)
    return _Tokens(own, cut, _text(text.name, digest, len(ids), own, encoder.bos, tokenizer_hash(checkpoint)))


def _check_same_tokens(ids: list[int], encoder: Encoder, other: Opened, words: str) -> None:
    theirs = read_encoder(other.model.checkpoint)
    found = theirs.encode(words)
    if found == ids and theirs.bos == encoder.bos:
        return
    place = next(
        (i for i, (a, b) in enumerate(zip(ids, found, strict=False)) if a != b), min(len(ids), len(found))
    )
    raise ComparisonError(
        "a candidate's tokenizer reads the text otherwise than the base's",
        where=f"{other.path}, token {place}",
        found=f"{len(found)} tokens, {found[place : place + 4]} here; BOS {theirs.bos}",
        expected=f"{len(ids)} tokens, {ids[place : place + 4]} here; BOS {encoder.bos}",
        fix="compare files that were made from the same model, or vouch for one tokenizer with --tokenizer",
    )


def _file_tokens(given: LogitsFile, opened: Sequence[Opened], text: Path | None, options: Options) -> _Tokens:
    """The tokens of a file of logits, which must be the text's where one is given too."""
    for each in opened:
        if each.model.config.vocab_size != given.vocab_size:
            raise ComparisonError(
                "a candidate has another vocabulary than the file of logits",
                where=each.path,
                found=f"{each.model.config.vocab_size} tokens",
                expected=f"{given.vocab_size} tokens",
            )
    from bamba_quant.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(options.tokenizer) if options.tokenizer else opened[0].model.checkpoint
    encoder = read_encoder(checkpoint)
    own = given.tokens[: options.chunks].astype(np.int64)
    name, digest, count = given.path.name, "", given.tokens.size
    if text is not None:
        words, digest = read_text(text)
        ids = encoder.encode(words)
        if ids[: own.size] != own.ravel().tolist():
            raise ComparisonError(
                "the file of logits was made of another text, or with another tokenizer",
                where=given.path,
                fix="give its own text, or none",
            )
        name, count = text.name, len(ids)
    cut = own.copy()
    if encoder.bos is not None:
        cut[:, 0] = encoder.bos
    return _Tokens(own, cut, _text(name, digest, count, own, encoder.bos, tokenizer_hash(checkpoint)))


def _cut(
    ids: list[int], bos: int | None, opened: Sequence[Opened], options: Options
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    vocab_size = opened[0].model.config.vocab_size
    cut = cut_chunks(ids, vocab_size=vocab_size, ctx=options.ctx, bos=bos, chunks=options.chunks)
    return np.asarray(ids[: cut.size], np.int64).reshape(cut.shape), cut


def _text(
    name: str, digest: str, count: int, own: NDArray[np.int64], bos: int | None, tokenizer: str
) -> Text:
    chunks, ctx = own.shape
    return Text(name, digest, count, ctx, chunks, chunks * (ctx - 1 - ctx // 2), bos, tokenizer)


def _estimates(
    labels: Sequence[str], blocks: Sequence[Sequence[Mapping[str, NDArray[Any]]]]
) -> dict[str, dict[str, float]]:
    found = {}
    for label, scored in zip(labels, blocks, strict=True):
        means = {
            name: float(np.mean([block[name].mean() for block in scored]))
            for name in ("nll", "nll_base", "kld")
        }
        found[label] = {
            "ppl_ratio": float(np.exp(means["nll"] - means["nll_base"])),
            "kld_mean": means["kld"],
        }
    return found


def _with_hashes(file: ModelFile, files: Any) -> ModelFile:
    from dataclasses import replace

    return replace(file, files=files)


def _logits_model(given: LogitsFile) -> ModelFile:
    size = given.path.stat().st_size
    return ModelFile(
        label=given.path.name,
        path=str(given.path),
        kind="logits",
        architecture="",
        recipe="logits",
        types=(),
        weights=0,
        n_bytes=0,
        file_bytes=size,
        bits_per_weight=None,
        files=hashes([given.path]),
    )


def _command(base: Path, candidates: Sequence[Path], text: Path | None, options: Options) -> str:
    parts = ["bamba-quant", "evaluate", str(base), *map(str, candidates)]
    parts += ["--text", str(text)] if text else []
    parts += ["--ctx", str(options.ctx), "--seed", str(options.seed), "--dtype", options.dtype]
    parts += ["--chunks", str(options.chunks)] if options.chunks else []
    return shlex.join(parts)


def _run(command: str, options: Options, backend: Backend, started: datetime.datetime) -> Run:
    plain = {
        key: value if isinstance(value, (int, float, bool)) or value is None else str(value)
        for key, value in vars(options).items()
    }
    versions = {name: version(name) for name in ("bamba-quant", "numpy", "torch", "gguf", "tokenizers")}
    return Run(
        command=command,
        options=plain | {"ignore_config_keys": ",".join(options.ignore_config_keys)},
        seed=options.seed,
        resamples=options.resamples,
        versions=versions | {"python": platform.python_version()},
        backend=backend.name,
        device=options.device,
        dtype=options.dtype,
        threads=torch.get_num_threads(),
        processor=f"{platform.machine()}, {os.cpu_count()} processors",
        started=started.isoformat(timespec="seconds"),
    )


def _timing(seconds: float, hashing: float, meter: Meter, tokens: int, device: torch.device) -> Timing:
    reading, decoding = meter.reading / seconds, meter.decoding / seconds
    return Timing(
        seconds=seconds,
        seconds_per_token=seconds / tokens,
        reading=reading,
        dequantizing=decoding,
        computing=1 - reading - decoding,
        hashing_seconds=hashing,
        peak_memory=peak_memory(),
        device_memory=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def peak_memory() -> int:
    """The greatest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # where getrusage counts the parent's memory as well
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
