"""Apply the head to a part of the text, a block of tokens at a time; keep a few numbers a token, not the logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from bamba_quant.errors import BambaQuantError
from bamba_quant.evaluation import figures
from bamba_quant.evaluation.drift import worst
from bamba_quant.evaluation.gates import Limit, judge
from bamba_quant.evaluation.intervals import LEAST_CHUNKS, Bootstrap
from bamba_quant.evaluation.logits_file import LogitsFile, base_blocks
from bamba_quant.evaluation.models import OpenedModel
from bamba_quant.evaluation.noise_floor import FloorWatch
from bamba_quant.evaluation.provenance import ModelFile
from bamba_quant.evaluation.result import Candidate, LayerDrift, TensorLoss
from bamba_quant.evaluation.scores import BaseBlock, Scores, base_block, collect, score
from bamba_quant.evaluation.tokens import TokenizedText
from bamba_quant.inference.distributed import Ranks
from bamba_quant.inference.stream_weights import StreamWeights
from bamba_reference.config import Config
from bamba_reference.runtime.stream import Head, head_blocks, together
from bamba_reference.runtime.workers import Workers
from bamba_reference.tensors import FINAL_NORM, layer_tensors
from bamba_reference.torch.backend import Backend

# Logits that exist together, of the base and of one candidate each.
_LOGITS = 1 << 26
# Logits of one model in all blocks that are scored together.
_LOGITS_AT_ONCE = 1 << 27
_MOST_TOKENS, _MOST_TOKENS_ON_CPU = 2048, 512

_ESTIMATED = ("nll", "nll_base", "kld")

Block = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class EvaluationProgress:
    """How far a ``stage`` is: ``done`` of ``total`` layers or scored tokens; ``estimates`` by label, once there are.

    ``work`` is the part of all multiplications, of both stages, that are done: from 0 to 1.
    """

    stage: str
    done: int
    total: int
    estimates: Mapping[str, Mapping[str, float]]
    work: float = 0.0

    def with_work(self, in_layers: float) -> EvaluationProgress:
        """The same with ``work``, of which the stage "layers" does the part ``in_layers``."""
        before, share = (0.0, in_layers) if self.stage == "layers" else (in_layers, 1 - in_layers)
        return replace(self, work=before + share * self.done / self.total)


def work_in_layers(config: Config, tokens: TokenizedText) -> float:
    """The part of an evaluation's multiplications that layers do; the head does the rest."""
    used = config.num_experts_per_tok / max(1, config.num_local_experts)
    layers = tokens.cut.size * sum(
        math.prod(shape) * (used if name.startswith("moe.") and len(shape) == 3 else 1)
        for layer in range(config.num_hidden_layers)
        for name, shape in layer_tensors(config, layer).items()
    )
    return layers / (layers + config.vocab_size * config.hidden_size * tokens.targets.size)


ProgressCallback = Callable[[EvaluationProgress], None]


@dataclass(frozen=True)
class ScoreBlocks:
    """Blocks of ``scores.score`` in the text's order: one list a candidate, and the base's own by another path."""

    candidates: tuple[tuple[Block, ...], ...]
    floor: tuple[Block, ...]

    @classmethod
    def of_parts(cls, parts: Sequence[ScoreBlocks]) -> Self:
        """Join what was measured on the parts of a text."""
        candidates = zip(*(part.candidates for part in parts), strict=True)
        return cls(
            tuple(tuple(chain.from_iterable(blocks)) for blocks in candidates),
            tuple(chain.from_iterable(part.floor for part in parts)),
        )

    def scores(self, chunks: int) -> list[Scores]:
        """Each candidate's, of all ``chunks``."""
        return [collect(blocks, chunks) for blocks in self.candidates]


def most_tokens(vocab_size: int, device: torch.device) -> int:
    """How many tokens' logits exist together, on a CPU in each thread."""
    return max(1, min(_MOST_TOKENS_ON_CPU if device.type == "cpu" else _MOST_TOKENS, _LOGITS // vocab_size))


def chunks_together(ctx: int, device: torch.device, vocab_size: int) -> int:
    """How many chunks run together; splitting a text between such groups changes no bit of the result."""
    return together(ctx, device, most_tokens(vocab_size, device))


def quick_parts(
    part: slice, watched: int, at_once: int, quick: bool, ranks: Ranks
) -> tuple[slice, slice | None]:
    """The chunks of ``part`` whose figures are shown first, if ``quick``, at least ``watched`` ones, and the rest.

    Raises ``BambaQuantError`` for several processes.
    """
    if not quick:
        return part, None
    if ranks.size > 1:
        raise BambaQuantError(
            "--quick supports one process only", found=f"{ranks.size} processes", fix="leave out --quick"
        )
    few = -(-max(LEAST_CHUNKS, watched) // at_once) * at_once
    return (slice(0, few), slice(few, part.stop)) if few < part.stop else (part, None)


def score_part(
    given: LogitsFile | None,
    opened: Sequence[OpenedModel],
    sources: Sequence[StreamWeights],
    hidden: list[torch.Tensor],
    tokens: TokenizedText,
    part: slice,
    floor: FloorWatch | None,
    write: Callable[[NDArray[np.float32]], None] | None,
    backends: Sequence[Backend],
    progress: ProgressCallback,
) -> ScoreBlocks:
    """The base's logits of the chunks ``part`` once, then each candidate's against them.

    ``hidden`` are these chunks' final states (n, ctx, d) under each model; the list is emptied on the way.
    """
    first, ctx = tokens.first, tokens.text.ctx
    config = opened[0].model.config
    targets, device = tokens.targets[part], hidden[0].device  # targets (n, scored)
    blocks = head_blocks(len(targets), ctx, device, most_tokens(config.vocab_size, device))
    kept = []
    while hidden:  # so that states that are not scored are freed, one source after the other
        states = hidden.pop(0)
        kept.append(states[:, first:-1].reshape(-1, states.shape[-1]).clone())
        del states

    def head(number: int, states: torch.Tensor, backend: Backend) -> Head:
        of = opened[number].model.config
        return Head(of, sources[number], dtype=states.dtype, device=states.device, backend=backend)

    heads = [head(i, states, ops) for i, (states, ops) in enumerate(zip(kept, backends, strict=True))]
    inputs = list(zip(*(states.split(blocks) for states in kept), strict=True))
    floor_inputs: Sequence[torch.Tensor] = ()
    if floor:
        states = floor.final(sources[0][FINAL_NORM])[:, first:-1].flatten(0, 1)
        floor_head = head(0, states, floor.other)
        floor_inputs = states.split(_begin(blocks, len(states)))
    wanted = np.split(targets.reshape(-1), np.cumsum(blocks)[:-1])
    labels = [each.label for each in (opened if given else opened[1:])]

    def measure(at: int, base: BaseBlock | None) -> tuple[list[Block], Block | None, torch.Tensor | None]:
        if base is None:
            base = base_block(heads[0](inputs[at][0]), wanted[at])
        ours = range(len(heads) - len(labels), len(heads))
        scored: list[Block] = [score(base, heads[number](inputs[at][number])) for number in ours]
        if at >= len(floor_inputs):
            return scored, None, base.logits if write else None
        floors = score(base.first(len(floor_inputs[at])), floor_head(floor_inputs[at]))
        return scored, floors, base.logits if write else None

    found: list[list[Block]] = [[] for _ in labels]
    floor_blocks: list[Block] = []
    done, sums = 0, np.zeros((len(labels), len(_ESTIMATED)))
    # Lazily: a file of logits is read a block at a time.
    bases = base_blocks(given, part, blocks, device) if given else repeat(None)
    at_once = max(1, _LOGITS_AT_ONCE // (blocks[0] * config.vocab_size))
    with Workers(device, min(len(blocks), at_once)) as workers:
        for scored, by_another_path, written in workers.map(
            lambda piece: measure(*piece), zip(range(len(blocks)), bases, strict=False)
        ):
            if write and written is not None:
                write(written.float().cpu().numpy())
            for number, block in enumerate(scored):
                found[number].append(block)
                sums[number] += [block[name].sum() for name in _ESTIMATED]
            if by_another_path is not None:
                floor_blocks.append(by_another_path)
            done += len(scored[0]["kld"])
            progress(EvaluationProgress("tokens", done, targets.size, _estimates(labels, sums / done)))
    return ScoreBlocks(tuple(map(tuple, found)), tuple(floor_blocks))


def _begin(blocks: Sequence[int], tokens: int) -> list[int]:
    """The lengths of the blocks that cover the first ``tokens`` tokens."""
    found: list[int] = []
    for length in blocks:
        if tokens > 0:
            found.append(min(length, tokens))
            tokens -= length
    return found


def _estimates(labels: Sequence[str], means: NDArray[np.float64]) -> dict[str, dict[str, float]]:
    """The figures so far of the candidates' ``means`` (candidates, ``_ESTIMATED``)."""
    return {
        label: {"ppl_ratio": float(np.exp(np.minimum(nll - nll_base, 700))), "kld_mean": float(kld)}
        for label, (nll, nll_base, kld) in zip(labels, means, strict=True)
    }


def candidate_result(
    model: ModelFile,
    scores: Scores,
    bootstrap: Bootstrap,
    noise_floors: Mapping[str, float] | None,
    losses: tuple[TensorLoss, ...],
    layers: tuple[LayerDrift, ...],
    limits: Sequence[Limit],
) -> Candidate:
    """A candidate's part of the report: the figures of its scores, and the results of its gates."""
    table = figures.figures(scores, bootstrap, noise_floors)
    return Candidate(
        model=model,
        figures=table,
        flips=figures.flips(scores),
        kld_histogram=figures.histogram(scores.kld, figures.KLD_EDGES),
        delta_p_histogram=figures.histogram(scores.delta_p, figures.DELTA_P_EDGES),
        chunks=figures.chunk_means(scores),
        tensors=losses,
        layers=layers,
        worst=worst(losses),
        gates=judge(limits, table),
    )
