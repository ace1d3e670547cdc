"""A run: its options, the command and versions that repeat it, its time and its memory."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bamba_quant import __version__
from bamba_quant.checkpoint import ReadOptions
from bamba_quant.evaluation.intervals import RESAMPLES
from bamba_quant.evaluation.provenance import Run, Timing
from bamba_quant.inference.distributed import SINGLE_PROCESS, Ranks
from bamba_quant.inference.weights import Timings
from bamba_reference.runtime import compilation
from bamba_reference.torch.backend import Backend


def command_line(
    base: Path,
    candidates: Sequence[Path],
    text: Path | None,
    options: EvaluationOptions,
    ranks: Ranks = SINGLE_PROCESS,
) -> str:
    """The command line for this evaluation, if it was started by a call of the library."""
    parts = ["evaluate", str(base), *map(str, candidates)]
    parts += ["--text", str(text)] if text else []
    usual = EvaluationOptions()
    for name, value in vars(options).items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, ReadOptions):
            parts += [word for key in value.ignore_config_keys for word in ("--ignore-config-key", key)]
            parts += ["--ignore-adapter"] if value.ignore_adapter else []
            parts += ["--strip-prefix", value.strip_prefix] if value.strip_prefix else []
        elif value is True:
            parts.append(option)
        elif value != getattr(usual, name):
            parts += [option, str(value)]
    return shlex.join(ranks.command(parts))


def run_record(
    command: str,
    options: EvaluationOptions,
    backend: str,
    started: datetime.datetime,
    ranks: Ranks = SINGLE_PROCESS,
) -> Run:
    """The report's record of how the figures were computed."""
    plain = {
        key: value if isinstance(value, (int, float, bool)) or value is None else str(value)
        for key, value in (vars(options) | vars(options.reading)).items()
        if key != "reading"
    }
    packages = {name: version(name) for name in ("numpy", "torch", "gguf", "tokenizers")}
    return Run(
        command=command,
        options=plain | {"ignore_config_keys": ",".join(options.reading.ignore_config_keys)},
        seed=options.seed,
        resamples=options.resamples,
        versions={"bamba-quant": __version__, **packages, "python": platform.python_version()},
        backend=backend,
        device=options.device if ranks.size == 1 else f"{options.device} in {ranks.size} processes",
        dtype=options.dtype,
        threads=torch.get_num_threads(),
        processor=f"{platform.machine()}, {os.cpu_count()} processors",
        started=started.isoformat(timespec="seconds"),
    )


@contextmanager
def time_compilation(timings: Timings, device: torch.device) -> Iterator[None]:
    """Add to ``timings`` the time in which kernels are compiled, or found in a cache and loaded.

    Numba's for the CPU and, with a GPU, Triton's.
    """

    def add(seconds: float) -> None:
        timings.compiling += seconds

    with compilation.listen(lambda: None, add), _time_triton(timings, device):
        yield


@contextmanager
def _time_triton(timings: Timings, device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    from triton import knobs

    compiled: float | None = None

    def compilation_done(*, times: Any, **about: Any) -> None:
        nonlocal compiled
        compiled = time.perf_counter()
        timings.compiling += times.total / 1e6

    def loaded(*about: Any) -> None:
        # A compiled kernel is loaded at once, after the C module that launches it. Triton does not say when it starts
        # to load a kernel from the cache.
        nonlocal compiled
        if compiled is not None:
            timings.compiling += time.perf_counter() - compiled
        compiled = None

    knobs.runtime.kernel_load_end_hook.add(loaded)
    try:
        with knobs.compilation.scope():
            knobs.compilation.listener = compilation_done
            yield
    finally:
        knobs.runtime.kernel_load_end_hook.remove(loaded)


def time_products(backend: Backend, timings: Timings, device: torch.device) -> Backend:
    """``backend`` with the time of its products added to ``timings``; on a GPU, which works by itself, as it is."""

    def timed(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*arguments: Any) -> torch.Tensor:
            with timings.spent("products"):
                return product(*arguments)

        return call

    if device.type != "cpu":
        return backend
    return backend.with_linear(timed(backend.linear), head=timed(backend.head))


def timing(
    seconds: float, hashing: float, timings: Timings, tokens: int, device: torch.device, workers: int
) -> Timing:
    """Where ``seconds`` of ``workers`` threads for ``tokens`` tokens went."""
    reading, decoding, products = (
        each / (seconds * workers) for each in (timings.reading, timings.decoding, timings.products)
    )
    compiling = timings.compiling / seconds  # for which the other threads wait
    return Timing(
        seconds=seconds,
        seconds_per_token=seconds / tokens,
        reading=reading,
        dequantizing=decoding,
        compiling=compiling,
        computing=1 - reading - decoding - compiling,
        products=products if device.type == "cpu" else None,
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


@dataclass(frozen=True)
class EvaluationOptions:
    """How to evaluate; ``chunks`` None is the whole text. ``floor_chunks`` and ``drift_chunks`` are watched.

    ``cache_type`` and ``state_type`` are ``stored_types.combinations``' lists, of which candidates are evaluated under
    every combination. Paths may be given as strings.
    """

    ctx: int = 512
    chunks: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    backend: str = "auto"
    seed: int = 0
    resamples: int = RESAMPLES
    noise_floor: str = "order"
    floor_chunks: int = 2
    drift_chunks: int = 2
    activations: str = "auto"
    cache_type: str = ""
    state_type: str = ""
    tokenizer: Path | None = None
    reading: ReadOptions = field(default_factory=ReadOptions)
    save_base: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("tokenizer", "save_base"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(given))
