"""The schedule of tuning: steps at a falling rate, states measured on held-out text, and a file to go on from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from bamba_quant.calibration.latents import LatentMatrix
from bamba_quant.calibration.learner import Learner
from bamba_quant.calibration.tune_data import TuneData
from bamba_quant.calibration.tune_options import Tell, TuneError, TuneOptions, TuneProgress
from bamba_quant.calibration.tune_state import read_state, write_state
from bamba_quant.checkpoint.repacking import repack
from bamba_quant.errors import OutputError
from bamba_quant.metadata.tune_record import Tuned, TuneRecord
from bamba_reference.errors import repr_short

_SAVE_SECONDS, _SAVE_SHARE = 120.0, 20  # between states kept, and times what keeping one takes
_WARM_STEPS = 6  # on a GPU, which say nothing about the time of others

_NUMBERS = ("factor", "before", "best_kld", "last_kld", "step", "remaining")  # of a state

# Measuring a chunk takes up to 40 % of the time that learning from it takes: a tenth of the whole.
_EVALUATIONS, _EVALUATION_SHARE = 10, 0.25


def evaluations_of(options: TuneOptions, chunks: int, held_out: int) -> int:
    """How often the held-out chunks are measured in a run that learns ``chunks`` times from one."""
    return options.evaluations or max(1, min(_EVALUATIONS, round(_EVALUATION_SHARE * chunks / held_out)))


class Run:
    """The schedule: steps at a falling rate, evaluations on the way, the best state, and a file to go on from.

    ``digest`` is a hash of the tensors that are learned, ``batch`` the chunks of a step.
    """

    def __init__(self, learner: Learner, data: TuneData, options: TuneOptions, digest: str, batch: int, steps: int,
                 note: Callable[[str], None]) -> None:  # fmt: skip
        self._learner, self._data, self._options, self._note = learner, data, options, note
        self.steps = steps
        self._every = -(-steps // evaluations_of(options, steps * batch, len(data.held_out)))
        self._loss: Tensor | float = math.nan
        self.step, self._remaining, self._factor = 0, self.steps, 1.0
        self._best = learner.snapshot()
        self._belongs = options.deciding() | {
            "sha256": list(data.sha256), "quantized": digest, "tokens": data.batches.tokens, "batch": batch,
            **learner.belongs,
        }  # fmt: skip
        self.before = self.best_kld = self.last_kld = math.inf

    def finish(self, progress: Tell, started: float) -> Tuned:
        """Run what is left of the schedule; the result. ``started`` is when the time that options give began."""
        options = self._options
        saved = time.monotonic()
        if options.resume:
            self._restore()
        else:
            self.before = self.best_kld = self.last_kld = self._learner.divergence()
        if not math.isfinite(self.before):
            raise TuneError(
                "the divergence of the quantized file from the original is not a finite number",
                found=self.before,
            )
        deadline = None if options.max_minutes is None else started + 60 * options.max_minutes
        on_gpu, state = self._learner.device.type == "cuda", options.state
        warm = self.step + (_WARM_STEPS if on_gpu else 0)
        stepping = evaluating = each = saving = 0.0
        while self._remaining > 0:
            clock = time.monotonic()
            self._advance()
            waited = not on_gpu or self.step % self._learner.together == 0
            if on_gpu and waited:
                torch.cuda.synchronize()
            if self.step > warm:
                stepping += time.monotonic() - clock
                each = stepping / (self.step - warm)
                if deadline is not None and waited:
                    self._fit(deadline - time.monotonic(), each, evaluating)
            if self.step % self._every == 0 or self._remaining == 0:
                clock = time.monotonic()
                self._evaluate()
                evaluating = time.monotonic() - clock
            since = time.monotonic() - saved
            if state is not None and self._remaining and since > max(_SAVE_SECONDS, _SAVE_SHARE * saving):
                clock = time.monotonic()
                try:
                    self.save(state)
                except OutputError as error:
                    self._note(f"the state cannot be saved, so an interrupted run starts again: {error}")
                    state = None
                saved = time.monotonic()
                saving = saved - clock
            if waited or self._remaining == 0:
                left = self._remaining * each + evaluating * (self._remaining / self._every)
                progress(TuneProgress(self.step, self.step + self._remaining, float(self._loss), self.last_kld,
                                      self.before, left))  # fmt: skip
        return self._tuned()

    def _fit(self, seconds: float, each: float, evaluating: float) -> None:
        """Shorten the schedule so that it ends in time."""
        possible = int(max(0.0, seconds - evaluating) / (each + evaluating / self._every))
        self._remaining = min(self._remaining, max(1, possible) if seconds > 0 else 0)

    def _advance(self) -> None:
        """One step of the optimizer."""
        self._learner.prepare(self.step + 1, self.step + self._remaining, self._factor)
        self._loss = self._learner.advance(*self._data.batches.batch(self.step))
        self.step += 1
        self._factor *= (self._remaining - 1) / self._remaining
        self._remaining -= 1

    def _evaluate(self) -> None:
        """Measure the state on held-out text, and keep it if it is the best."""
        self.last_kld = self._learner.divergence()
        if self.last_kld < self.best_kld:
            self.best_kld, self._best = self.last_kld, self._learner.snapshot()

    def _arrays(self) -> dict[str, Tensor]:
        """Everything that a later run needs, by name."""
        best = {f"best:{name}:{part}": t for name, parts in self._best.items() for part, t in parts.items()}
        return self._learner.arrays() | best

    def save(self, file: Path) -> None:
        """Write the state, from which a run with the same options goes on."""
        numbers = (self._factor, self.before, self.best_kld, self.last_kld, self.step, self._remaining)
        about = dict(zip(_NUMBERS, numbers, strict=True))
        write_state(file, self._arrays(), self._belongs, about)

    def _restore(self) -> None:
        file = self._options.state
        assert file is not None
        shapes = {name: tuple(tensor.shape) for name, tensor in self._arrays().items()}
        state = read_state(file, self._belongs, shapes)
        numbers: list[Any] = [state.about.get(key) for key in _NUMBERS]
        if not self._possible(numbers):
            raise TuneError(
                "the tuning state is damaged: impossible step or KLD values",
                where=file,
                found=repr_short(state.about),
                fix="tune without --resume",
            )
        self._factor, self.before, self.best_kld, self.last_kld, self.step, self._remaining = numbers
        with torch.no_grad():
            for name, tensor in self._arrays().items():
                tensor.copy_(torch.from_numpy(state.arrays[name]))

    def _possible(self, numbers: Sequence[Any]) -> bool:
        factor, *divergences, step, remaining = numbers
        return (
            all(type(number) in (int, float) and -1 < number < math.inf for number in (factor, *divergences))
            and factor <= 1
            and type(step) is type(remaining) is int
            and min(step, remaining) >= 0
            and step + remaining <= self.steps
        )

    def _tuned(self) -> Tuned:
        options, data = self._options, self._data
        changed: dict[str, int] = {}
        tensors: dict[str, NDArray[Any]] = {}
        codes = 0
        for latent in self._learner.latents:
            if isinstance(latent, LatentMatrix) and latent.learns_codes:
                codes += latent.count
        if self.best_kld < self.before:
            latents = self._learner.latents
            with ThreadPoolExecutor() as pool:
                packed = pool.map(lambda latent: latent.raw(self._best[latent.name]), latents)
                for latent, raw in zip(latents, packed, strict=True):
                    repack(latent.tensor, raw, tensors)
                    if isinstance(latent, LatentMatrix):
                        changed[latent.tensor.name] = latent.changed(self._best[latent.name])
        record = TuneRecord(
            data.names, data.sha256, data.batches.tokens, self.step, options.seed, self.before, self.best_kld,
            codes, sum(changed.values()),
        )  # fmt: skip
        return Tuned(tensors, record, changed)
