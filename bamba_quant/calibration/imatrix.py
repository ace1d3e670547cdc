"""Measures an importance matrix: the squares of what enters each matrix, summed over a text, layer by layer.

The definition is llama-imatrix's (tools/imatrix/imatrix.cpp, ``collect_imatrix``): every matrix product in a layer,
each expert's over the tokens that are routed to it, the output only on request, all tokens of a chunk.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bamba_quant.calibration.cache_ranges import CacheRanges
from bamba_quant.calibration.texts import Text, read_texts, token_chunks
from bamba_quant.checkpoint import ReadOptions
from bamba_quant.checkpoint.activation_sums import ActivationSums, TensorSums, checked_sums, merge_sums
from bamba_quant.checkpoint.imatrix import Imatrix, imatrix_from_sums, read_sums
from bamba_quant.errors import BambaQuantError, CheckpointError, join_names
from bamba_quant.inference.loading import LoadedModel, load_model_and_tokenizer, torch_device, torch_dtype
from bamba_quant.inference.prefetch import prefetcher_for
from bamba_quant.inference.stream_weights import StreamWeights, prefetch_order
from bamba_quant.inference.weights import LazyWeights, Timings
from bamba_quant.printable import brief_repr
from bamba_reference.backends import backend_named
from bamba_reference.runtime.stream import final_hidden, rows_together
from bamba_reference.runtime.workers import piece_number
from bamba_reference.tensors import head_name, stack_of
from bamba_reference.torch.backend import Backend

# Of all chunks' hidden states and a layer's sums: what does not fit goes through the layers in several rounds.
_HIDDEN_BYTES = 1 << 28
_HIDDEN_BYTES_ON_GPU = 1 << 32


@dataclass(frozen=True)
class Round:
    """How far collecting has come: layers of this round, and rounds."""

    layer: int
    layers: int
    round: int
    rounds: int


class Collector:
    """Σ a², Σ a and counts by GGUF name, added to by the products of ``backend`` and of ``head``.

    With ``bounds`` also the largest magnitude of all inputs of a tensor, those of each expert together: what an expert
    gets later differs little from what others get, and runtimes take one scale for all (vLLM, ``w13_input_scale.max``).
    """

    def __init__(self, weights: LazyWeights, kernels: Backend, bounds: bool = False) -> None:
        self._weights, self._kernels = weights, kernels
        self.largest: dict[str, float] | None = {} if bounds else None
        # (2, matrices, columns) on the products' device, float64; tokens by matrix
        self._totals: dict[str, tuple[Tensor, NDArray[np.int64]]] = {}
        # Of a layer, from several threads: the piece of work, the reference's name, sums and tokens of each product.
        self._waiting: list[tuple[int, str, Tensor, int]] = []
        self._last = threading.local()
        self._bounding = threading.Lock()
        self.backend = kernels.with_linear(self._linear, name=kernels.name)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> Tensor:
        if self.largest is not None and x.numel():
            tensor, most = str(self._weights.stored(stack_of(name)[0])[1].gguf), float(x.abs().max())
            with self._bounding:
                self.largest[tensor] = max(most, self.largest.get(tensor, 0.0))
        self._waiting.append((piece_number(), name, self._sums(x), x.numel() // x.shape[-1]))
        product: Tensor = self._kernels.linear(x, weight, bias, name)
        return product

    def _sums(self, x: Tensor) -> Tensor:
        """Σ x² and Σ x over tokens: (2, columns) float64; computed once where several matrices share their input."""
        if getattr(self._last, "x", None) is not x:
            self._last.x, self._last.sums = x, self._kernels.column_sums(x)
        sums: Tensor = self._last.sums
        return sums

    def end_layer(self) -> None:
        """Add what a layer's products saw, in the order of the pieces of work, so that every run has the same bits."""
        for _, name, sums, tokens in sorted(self._waiting, key=lambda waiting: waiting[0]):
            self._add(name, sums, tokens)
        self._waiting.clear()

    def add(self, x: Tensor, name: str) -> None:
        """Count tokens x (…, columns) that enter the matrix the reference calls ``name``."""
        self._add(name, self._sums(x), x.numel() // x.shape[-1])

    def _add(self, name: str, sums: Tensor, tokens: int) -> None:
        stack, expert = stack_of(name)
        rule = self._weights.stored(stack)[1]
        tensor = str(rule.gguf)
        if tensor not in self._totals:
            matrices = math.prod(rule.shape[:-2])
            zeros = torch.zeros(2, matrices, rule.shape[-1], dtype=torch.float64, device=sums.device)
            self._totals[tensor] = zeros, np.zeros(matrices, np.int64)
        totals, counts = self._totals[tensor]
        totals[:, expert or 0] += sums
        counts[expert or 0] += tokens

    def entries(self) -> dict[str, TensorSums]:
        """What was added up. Raises ``BambaQuantError`` for sums that are not finite."""
        found = {}
        for name, (totals, counts) in self._totals.items():
            squares, sums = totals.cpu().numpy()
            if not (np.isfinite(squares).all() and np.isfinite(sums).all()):
                raise BambaQuantError(
                    "the model's activations are not finite",
                    where=f"what enters {name}",
                    fix="calibrate in float32 (--dtype)",
                )
            found[name] = TensorSums(squares, counts, sums)
        return found


def collect(
    model: LoadedModel,
    chunks: NDArray[np.int64],
    datasets: tuple[str, ...],
    *,
    output: bool = False,
    bounds: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
    backend: str = "auto",
    cache: CacheRanges | None = None,
    progress: Callable[[Round], None] = lambda now: None,
) -> ActivationSums:
    """The sums over ``chunks`` (n, ctx) of token ids; with ``output`` those of an output that is not tied as well.
    With ``bounds`` the largest inputs too.

    ``cache`` sees the keys and values. One layer's weights are in memory at a time. Raises a ``BambaQuantError`` for
    tokens beyond the vocabulary, a device or dtype that is not to be had, and activations that are not finite.
    """
    config = model.config
    number, where = torch_dtype(dtype), torch_device(device)
    collector = Collector(model.weights, backend_named(backend, where, number), bounds)
    count, ctx = chunks.shape
    room = _HIDDEN_BYTES_ON_GPU if where.type == "cuda" else _HIDDEN_BYTES
    of_a_chunk = 4 * ctx * config.hidden_size + _sums_bytes(model.weights) // rows_together(ctx, where)
    rounds = -(-count // (at_once := max(1, room // of_a_chunk)))
    for i in range(rounds):

        def tell(layer: int, layers: int, i: int = i) -> None:
            collector.end_layer()
            progress(Round(layer, layers, i, rounds))

        ahead = prefetcher_for(where)
        with ahead or nullcontext():
            source = StreamWeights(model.weights, config, number, where, Timings(), ahead)
            if ahead:
                ahead.begin(prefetch_order([source], compared=False))
            (hidden,) = final_hidden(
                config,
                [source],
                chunks[i * at_once : (i + 1) * at_once],
                dtype=number,
                device=where,
                backend=replace(collector.backend, cached=cache),
                on_layer=tell,
            )
        if output and not config.tie_word_embeddings:
            for some in hidden:
                collector.add(some, head_name(config))
    return ActivationSums(collector.entries(), datasets, count, ctx, collector.largest)


def _sums_bytes(weights: LazyWeights) -> int:
    """The most bytes of what a layer's products see in one piece of work."""
    layers: Counter[int | None] = Counter()
    for rule in (weights.stored(name)[1] for name in weights):
        if rule.layer is not None and len(rule.shape) > 1:
            layers[rule.layer] += 16 * math.prod(rule.shape[:-2]) * rule.shape[-1]
    return max(layers.values())


CTX = 512
_SHOWN = 8  # experts of a tensor


@dataclass(frozen=True)
class Measured:
    """``sums`` over ``tokens`` tokens of ``texts``, and over those of earlier files; ``notes`` say what is missing."""

    sums: ActivationSums
    texts: tuple[Text, ...]
    tokens: int
    notes: tuple[str, ...]

    __repr__ = brief_repr


def measure_imatrix(
    model: str | Path,
    texts: Sequence[str | Path],
    *,
    chunks: int | None = None,
    ctx: int = CTX,
    output: bool = False,
    bounds: bool = False,
    merge: Sequence[str | Path] = (),
    tokenizer: str | Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    cache: CacheRanges | None = None,
    reading: ReadOptions = ReadOptions(),
    progress: Callable[[Round], None] = lambda now: None,
) -> Measured:
    """Measure the importance matrix of a model of any kind and format that can be run.

    ``texts`` are cut into chunks of ``ctx`` tokens, of which at most ``chunks`` are run; ``output`` measures the
    output matrix as well, ``bounds`` the largest inputs, of these texts alone, and ``cache`` sees their keys and
    values. The sums in the files ``merge`` are added. Raises a ``BambaQuantError`` for texts, models and files that
    cannot be read or do not belong together.
    """
    if not texts and not merge:
        raise CheckpointError("there is nothing to measure", fix="give a text with --text")
    loaded, encoder = load_model_and_tokenizer(Path(model), tokenizer, reading)
    rules = [loaded.weights.stored(name)[1] for name in loaded.weights]
    shapes = {
        rule.gguf: (math.prod(rule.shape[:-2]), rule.shape[-1])
        for rule in rules
        if rule.gguf and len(rule.shape) > 1
    }
    earlier = [checked_sums(read_sums(file), shapes, ctx, file) for file in map(Path, merge)]
    notes, given, tokens = (
        list(loaded.checkpoint.notes),
        read_texts(list(map(Path, texts))) if texts else (),
        0,
    )
    if texts:
        cut = token_chunks(encoder, given, ctx, chunks)
        names = tuple(str(text.path) for text in given)
        how: dict[str, Any] = {
            "output": output,
            "bounds": bounds,
            "device": device,
            "dtype": dtype,
            "cache": cache,
        }
        earlier.append(collect(loaded, cut, names, progress=progress, **how))
        tokens = cut.size
    sums = replace(merge_sums(earlier, ctx), largest=earlier[-1].largest)
    if output and loaded.config.tie_word_embeddings:
        notes.append(
            "the output is tied to the embedding, which has no entry (llama.cpp's quantizer has none for it)"
        )
    notes += _without_data(sums)
    if without := [name for name, entry in sums.entries.items() if entry.sums is None]:
        notes.append(
            f"{len(without)} entries have no means (in_sum), since a merged file has none: {join_names(without, 3)}"
        )
    return Measured(sums, given, tokens, tuple(notes))


def calibrated(
    model: str | Path,
    texts: Sequence[Path],
    *,
    chunks: int | None = None,
    bounds: bool = False,
    device: str = "cpu",
    strict: bool = False,
    cache: CacheRanges | None = None,
    reading: ReadOptions = ReadOptions(),
    progress: Callable[[Round], None] = lambda now: None,
) -> tuple[Imatrix, tuple[str, ...]]:
    """The importance matrix that ``measure_imatrix`` would write, for quantizing at once, and its notes."""
    measured = measure_imatrix(
        model,
        texts,
        chunks=chunks,
        bounds=bounds,
        device=device,
        cache=cache,
        reading=reading,
        progress=progress,
    )
    return imatrix_from_sums(measured.sums, strict=strict), measured.notes


def _without_data(sums: ActivationSums) -> list[str]:
    notes = []
    for name, experts in sums.experts_without_data.items():
        shown = join_names([str(expert) for expert in experts], _SHOWN)
        notes.append(
            f"{name}: no token reached {len(experts)} of {len(sums.entries[name].counts)} experts ({shown}); "
            "quantizers will weigh their columns alike. More text reaches more experts"
        )
    return notes
