"""Evaluate candidates against a base in one pass over a text.

All models go through each layer together, so the base is read once and memory does not grow with the model. Then the
head is applied to blocks of tokens, and a few numbers are kept of each token. Several processes take a part of the text
each; the first one gathers the numbers and computes the figures, which are the same as those of one process.
"""

from __future__ import annotations

import datetime
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from bamba_quant.evaluation import models, result, scoring
from bamba_quant.evaluation.activations import resolve, with_activations
from bamba_quant.evaluation.drift import DriftWatch
from bamba_quant.evaluation.gates import Limit, check_enough, check_sections, limits_for
from bamba_quant.evaluation.input_files import FileHasher, input_files
from bamba_quant.evaluation.intervals import Bootstrap
from bamba_quant.evaluation.logits_file import is_logits_file, read_logits_file, writing
from bamba_quant.evaluation.noise_floor import OTHER, FloorWatch, floors
from bamba_quant.evaluation.provenance import FileHash, base_warning
from bamba_quant.evaluation.run import (
    EvaluationOptions,
    command_line,
    run_record,
    time_compilation,
    time_products,
    timing,
)
from bamba_quant.evaluation.scores import check_finite, collect
from bamba_quant.evaluation.stored_types import combinations
from bamba_quant.evaluation.tokens import file_tokens, text_tokens
from bamba_quant.inference.distributed import SINGLE_PROCESS, Ranks
from bamba_quant.inference.loading import first_product, torch_device, torch_dtype
from bamba_quant.inference.prefetch import prefetcher_for
from bamba_quant.inference.stream_weights import StreamWeights, prefetch_order
from bamba_quant.inference.weights import Timings
from bamba_reference.backends import backend_named
from bamba_reference.runtime.layer_passes import LayerPass
from bamba_reference.runtime.stream import final_hidden, workers

# Comparing all weights and measuring drift takes a GPU about as long as this many tokens (Bamba-9B's shape on an
# H200: 2 s), and a CPU less than a chunk.
_DRIFT_ON_GPU = 50 * 512


def evaluate(
    base: str | Path,
    candidates: Sequence[str | Path],
    text: str | Path | None,
    options: EvaluationOptions = EvaluationOptions(),
    *,
    gates: Mapping[str, Sequence[Limit]] | None = None,
    limits: Sequence[Limit] = (),
    command: str | None = None,
    progress: scoring.ProgressCallback = lambda progress: None,
    note: Callable[[str], None] = lambda note: None,
    quick: Callable[[result.Evaluation], None] | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> result.Evaluation:
    """Evaluate ``candidates`` against ``base`` on a UTF-8 text.

    Each is a Hugging Face directory or a GGUF file; the base may be a file of llama-perplexity's logits, which
    brings its own tokens and then needs no text. ``gates`` are ``gates.read_gates``' sections, ``limits`` hold for
    every candidate. ``quick`` receives the evaluation of the first chunks of a longer text, without gates, before the
    rest is measured. ``note`` is called with what was tolerated in reading. ``command`` is the command line in the
    report. Every process of ``ranks`` gets the same arguments, reports its own ``progress`` and returns the same
    result. Raises a ``BambaQuantError`` for models that cannot be compared and texts that cannot be scored.
    """
    started = datetime.datetime.now(datetime.UTC)
    base, paths, text = Path(base), [Path(each) for each in candidates], Path(text) if text else None
    given = read_logits_file(base) if is_logits_file(base) else None
    if given and options.save_base:
        raise models.ComparisonError(
            "the base is already a file of logits",
            where=base,
            fix="leave out --save-base, or give a model as the base",
        )
    opened = models.open_models(
        None if given else base, paths, options.reading, combinations(options.cache_type, options.state_type)
    )
    if ranks.first:
        models.tell_notes(opened, note)
        if not given and (warning := base_warning(*map(models.describe, opened))):
            warnings.warn(warning, stacklevel=2)
    others = opened if given else opened[1:]
    kinds = [each.model.checkpoint.kind for each in opened]
    options = replace(options, activations=resolve(options.activations, kinds))
    dtype, device = torch_dtype(options.dtype), torch_device(ranks.device(options.device), options.device)
    backend_named(options.backend, device, dtype)  # raises for a name before the text is read
    with ThreadPoolExecutor(1) as warm_up:
        warm_up.submit(first_product, device, dtype)
        tokens = file_tokens(given, opened, text, options) if given else text_tokens(opened, text, options)
    files = [models.describe(each) for each in others]
    # Of one model, so that the number of candidates does not change the choice. Recurrences token by token are long.
    work = None if options.state_type else 2.0 * max(file.weights for file in files) * tokens.cut.size
    backend = backend_named(options.backend, device, dtype, work=work)
    if gates is not None:
        check_sections(gates, files)
    chosen = [limits_for(gates or {}, file, limits) for file in files]
    check_enough([each for some in chosen for each in some], tokens.text.chunks, tokens.text.scored)

    clock = time.perf_counter()
    timings = Timings()
    ahead = prefetcher_for(device)
    sources = [
        StreamWeights(each.model.weights, each.model.config, dtype, device, timings, ahead) for each in opened
    ]
    floor_chunks = 0 if given or options.noise_floor == "none" else min(options.floor_chunks, len(tokens.cut))
    drift_chunks = 0 if given else min(options.drift_chunks, len(tokens.cut))
    rounded = [
        with_activations(backend, each.model, options.activations, device, dtype, each.types, options.seed)
        for each in opened
    ]
    # The same record for the same functions, so that equal weights are seen to give equal states.
    timed = {id(each): time_products(each, timings, device) for each in rounded}
    backends = [timed[id(each)] for each in rounded]
    vocab_size = opened[0].model.config.vocab_size
    watched = max(floor_chunks, drift_chunks)
    at_once = scoring.chunks_together(tokens.text.ctx, device, vocab_size)
    besides = floor_chunks + drift_chunks
    if drift_chunks and device.type == "cuda":
        besides += _DRIFT_ON_GPU // tokens.text.ctx
    part = ranks.part(tokens.text.chunks, at_once, first=watched, besides=besides)
    floor = None
    if floor_chunks and ranks.first:
        other = with_activations(OTHER, opened[0].model, options.activations, device, torch.float32)
        floor = FloorWatch(opened[0].model.config, options.noise_floor, floor_chunks, other)
    drift = (
        DriftWatch(opened[0].model.config, [each.exact for each in sources], drift_chunks, timings, device)
        if drift_chunks and ranks.first
        else None
    )

    in_layers = scoring.work_in_layers(opened[0].model.config, tokens)

    def tell(now: scoring.EvaluationProgress) -> None:
        ranks.check()
        progress(now.with_work(in_layers))

    def watch(passed: LayerPass) -> None:
        for each in (drift, floor):
            if each:
                each(passed)

    hashing: FileHasher | None = None

    def layer_done(done: int, total: int) -> None:
        nonlocal hashing
        if ahead and ranks.first and not hashing:
            # With a GPU the cores are idle once kernels are compiled; files that both read are in the page cache.
            hashing = stack.enter_context(FileHasher(map(models.files_of, opened)))
        tell(scoring.EvaluationProgress("layers", done, total, {}))

    def check(measured: scoring.ScoreBlocks, chunks: int) -> None:
        for file, scores in zip(files, measured.scores(chunks), strict=True):
            check_finite(scores, base.name, file.label)

    def assembled(
        measured: scoring.ScoreBlocks,
        chunks: int,
        hashed: Sequence[Sequence[FileHash]],
        limits: Sequence[Sequence[Limit]],
        hashing_seconds: float,
    ) -> result.Evaluation:
        """The evaluation of the first ``chunks`` chunks."""
        seconds = time.perf_counter() - clock - hashing_seconds
        whole = chunks == tokens.text.chunks
        bootstrap = drawn.result() if drawn and whole else Bootstrap(chunks, options.seed, options.resamples)
        scored = measured.scores(chunks)
        measured_floors = floors(collect(measured.floor, floor_chunks)) if floor_chunks else None
        first = len(opened) - len(others)
        results = tuple(
            scoring.candidate_result(
                replace(file, files=tuple(hashed[source])),
                scores,
                bootstrap,
                measured_floors,
                losses[source - first],
                tuple(drift.layers[source]) if drift else (),
                limits[source - first],
            )
            for source, (file, scores) in enumerate(zip(files, scored, strict=True), first)
        )
        described = models.describe_logits(given) if given else models.describe(opened[0])
        return result.Evaluation(
            schema=result.SCHEMA,
            run=run_record(
                command or command_line(base, paths, text, options, ranks),
                replace(options, ctx=tokens.text.ctx),
                "; ".join(dict.fromkeys(each.name for each in backends)),
                started,
                ranks,
            ),
            text=replace(
                tokens.text, chunks=chunks, scored=tokens.text.scored // tokens.text.chunks * chunks
            ),
            base=described if given else replace(described, files=tuple(hashed[0])),
            candidates=results,
            noise_floor=result.NoiseFloor(floor.described, floor_chunks, measured_floors, tuple(floor.layers))
            if floor and measured_floors
            else None,
            drift_chunks=drift_chunks,
            timing=timing(
                seconds,
                hashing_seconds,
                timings,
                tokens.cut.size,
                device,
                workers(len(tokens.cut[part]), tokens.text.ctx, len(sources), device).count,
            ),
        )

    drawn = write = None
    with ExitStack() as stack:
        stack.enter_context(time_compilation(timings, device))
        if ranks.first:
            pool = stack.enter_context(ThreadPoolExecutor(1))
            drawn = pool.submit(Bootstrap, tokens.text.chunks, options.seed, options.resamples)
        if ahead:
            stack.enter_context(ahead).begin(prefetch_order(sources, drift is not None))
        if options.save_base:
            inputs = input_files([base, *paths, text, options.tokenizer])
            write = stack.enter_context(
                writing(
                    options.save_base,
                    tokens.own,
                    vocab_size,
                    overwrite=options.overwrite,
                    inputs=inputs,
                    part=part,
                    ranks=ranks,
                )
            )

        def measure(some: slice, watching: bool) -> scoring.ScoreBlocks:
            hidden = final_hidden(
                [each.model.config for each in opened],
                sources,
                tokens.cut[some],
                dtype=dtype,
                device=device,
                backend=backends,
                on_layer=layer_done,
                on_pass=watch if watching and (floor or drift) else None,
                watched=watched if watching else 0,
                first_text=some.start or 0,
            )
            watcher = floor if watching else None
            return scoring.score_part(
                given, opened, sources, hidden, tokens, some, watcher, write, backends, tell
            )

        first_part, rest = scoring.quick_parts(part, watched, at_once, quick is not None, ranks)
        found = measure(first_part, watching=True)
        losses = drift.finish() if drift else [()] * len(others)
        if quick and rest:
            check(found, first_part.stop)
            quick(assembled(found, first_part.stop, [()] * len(opened), [()] * len(files), 0.0))
        if rest:
            found = scoring.ScoreBlocks.of_parts([found, measure(rest, watching=False)])
        measured = scoring.ScoreBlocks.of_parts(ranks.gather(found, scoring.ScoreBlocks))
        check(measured, tokens.text.chunks)
        seconds = time.perf_counter() - clock
        if ranks.first:
            hashing = hashing or stack.enter_context(FileHasher(map(models.files_of, opened)))
            hashed = hashing.finish()
        hashing_seconds = time.perf_counter() - clock - seconds
    if not drawn:
        return ranks.share(None, *result.RECORDS)

    return ranks.share(
        assembled(measured, tokens.text.chunks, hashed, chosen, hashing_seconds), *result.RECORDS
    )
