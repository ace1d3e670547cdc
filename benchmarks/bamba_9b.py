"""Bamba-9B's exact shape with random weights, and its own Q4_K_M file, for the benchmarks that evaluate the latter."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints import BAMBA_9B, make_checkpoint
from benchmarks.processes import compile_modules, run
from benchmarks.transformers_cuda import draw

LAYERS = BAMBA_9B["num_hidden_layers"]

# What a process that evaluates on a GPU imports most of.
_MODULES = ("torch", "torch.distributed.run", "triton", "bamba_quant_cli.app", "bamba_quant.evaluation.evaluate",
            "bamba_reference.kernels.backend", "bamba_quant.codecs.gpu.decoding")  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A checkpoint of 19.6 GB and its file of 5.5 GB, and the seconds they took to make."""

    model: Path
    q4_k_m: Path
    making: float
    converting: float


@contextmanager
def place(directory: Path | None) -> Iterator[Path]:
    """The directory, made if it is not there; without one, a temporary one that goes with what is in it."""
    if directory is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    directory.mkdir(parents=True, exist_ok=True)
    yield directory


def make_pair(directory: Path, layers: int, device: str) -> Pair:
    """Draw the weights on ``device``, as a trained model's, and quantize them; fewer ``layers`` for a trial.

    The processes that follow find Python's modules compiled.
    """
    compile_modules(directory, _MODULES)
    began = time.perf_counter()
    attention = tuple(i for i in BAMBA_9B["attn_layer_indices"] if i < layers) or (layers - 1,)
    model = make_checkpoint(directory / f"bamba-9b-shape-{layers}", layers, attention, draw=_drawn_on(device))
    making = time.perf_counter() - began
    if device == "cuda":
        torch.cuda.empty_cache()
    target = directory / f"{model.name}-q4_k_m.gguf"
    convert = [sys.executable, "-m", "bamba_quant_cli", "convert", str(model), "--outtype", "q4_k_m"]
    converting, _ = run([*convert, "--outfile", str(target), "--overwrite"])
    return Pair(model, target, making, converting)


def card(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def _drawn_on(device: str) -> Any:
    torch.manual_seed(9)

    def bytes_of(name: str, shape: tuple[int, ...]) -> Iterator[Any]:
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=device)
        draw(name, tensor)
        yield tensor.cpu().view(torch.uint8).numpy().data

    return bytes_of
