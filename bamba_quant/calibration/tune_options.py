"""What tuned rounding is asked for, and what it tells while it runs; without torch, for commands to import."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bamba_quant.errors import BambaQuantError, did_you_mean

_RUNNING = ("device", "graph", "max_memory", "micro_batch", "recompute", "max_minutes", "state", "resume")
_CLI = {"steps": "--tune-steps", "tokens": "--tune-tokens", "seed": "--tune-seed"}
DTYPES = ("float32", "bfloat16")
PARTS = ("codes", "scales", "blocks", "floats")


class TuneError(BambaQuantError):
    """Models, texts or options that rounding cannot be tuned with."""


@dataclass(frozen=True)
class TuneOptions:
    """How to tune.

    ``steps`` of the optimizer, by default as many as the tokens are worth; ``tokens`` of the texts are learned from at
    most; ``self_tokens`` more are written by the original itself. ``batch`` sequences of ``ctx`` tokens are a step,
    ``micro_batch`` of them are in memory together.

    ``train`` says what is learned: "codes", "scales" (integers of groups: scales and minima), "blocks" (their floats d
    and dmin), "floats" (norms, convolutions, A, D, dt's bias where they are stored in F32). ``lr`` is in steps of a
    code, by default 3.5 over the number of optimizer steps, but at most 1e-2 for codes of 2 and 3 bits and 5e-3 for
    others; ``lr_scales`` is in steps of a scale's code; ``lr_blocks`` is relative to a float, by default 2e-3, and half
    of that for every bit that a code has above 4; ``lr_floats`` is in a tensor's mean magnitude, by default 3e-3 and
    likewise less, by the mean number of bits. All fall linearly to 0.

    ``reach`` is how many steps a code may move from the file's. What is evaluated and kept is a running mean of the
    latents, whose decay is ``ema``: by default its window is a fifth of the steps, and 100 at most; 0 takes the latents
    themselves. ``recompute`` saves memory: activations of a layer are
    computed again in its backward pass.

    ``dtype`` is "float32", by whole-model gradients, or "bfloat16", on a GPU a layer at a time in 10 bytes a weight
    (``by_layer``); by default the first where it fits. ``max_memory`` bytes of the GPU are used at most: what does not
    fit stays in main memory.

    ``held_out`` chunks of text that is learned from nowhere choose the best of the file as it is and ``evaluations``
    states on the way, by default 10 or as many as take a tenth of the time. With ``max_minutes`` the schedule is fitted
    to the time, and still finished. ``state`` is a file that keeps what a later run with ``resume`` goes on from.
    """

    steps: int | None = None
    tokens: int | None = None
    self_tokens: int = 0
    ctx: int = 512
    batch: int | None = None
    micro_batch: int | None = None
    train: tuple[str, ...] = ("codes", "blocks", "floats")
    lr: float | None = None
    lr_scales: float = 1e-2
    lr_blocks: float | None = None
    lr_floats: float | None = None
    reach: float = 1.5
    eps: float = 1e-8
    ema: float | None = None
    recompute: bool = False
    held_out: int = 64
    evaluations: int | None = None
    seed: int = 0
    device: str = "cpu"
    dtype: str | None = None
    max_memory: int | None = None
    graph: bool = True
    max_minutes: float | None = None
    state: Path | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        wrong = sorted(set(self.train) - set(PARTS))
        if wrong or not self.train:
            raise TuneError("unknown part to train" + did_you_mean(wrong[0] if wrong else "", PARTS),
                            found=", ".join(wrong) or "nothing", expected=", ".join(PARTS))  # fmt: skip
        for name, least in (("steps", 1), ("tokens", self.ctx), ("batch", 1), ("micro_batch", 1), ("ctx", 3),
                            ("held_out", 1), ("evaluations", 1), ("seed", 0), ("self_tokens", 0)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                option = f"{name} ({_CLI[name]})" if name in _CLI else name
                raise TuneError(
                    f"the tuning option {option} is too small",
                    found=value,
                    expected=f"at least {least}"
                    + (", one sequence of ctx tokens" if name == "tokens" else ""),
                )
        if self.max_minutes is not None and not 0 < self.max_minutes < math.inf:
            raise TuneError(
                "the tuning option max_minutes (--max-minutes) is not a positive number",
                found=self.max_minutes,
                expected="a number of minutes, more than 0",
            )
        if self.dtype not in (None, *DTYPES):
            raise TuneError("unknown dtype to tune in (--tune-dtype)" + did_you_mean(str(self.dtype), DTYPES),
                            found=self.dtype, expected=", ".join(DTYPES))  # fmt: skip
        if self.resume and self.state is None:
            raise TuneError(
                "resume needs a state file", fix="give the state file of the interrupted run (--tune-state)"
            )

    def deciding(self) -> dict[str, Any]:
        """The options that decide the result; the others say where, how fast and until when."""
        return {name: value for name, value in asdict(self).items() if name not in _RUNNING}


@dataclass(frozen=True)
class TuneProgress:
    """How far tuning is: ``step`` of ``steps``; ``loss`` is the last step's divergence, in nats a token, and
    ``held_out_kld`` that of the held-out text at the last evaluation; ``before`` is the untuned file's.
    """

    step: int
    steps: int
    loss: float
    held_out_kld: float
    before: float
    seconds_left: float


Tell = Callable[[TuneProgress], None]
