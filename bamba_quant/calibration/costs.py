"""From a model and texts to the costs of its tensors' formats: what is read, quantized and run for that."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bamba_quant.calibration.candidates import FORMATS, quantize_candidates, quantize_layers
from bamba_quant.calibration.texts import read_texts, token_chunks
from bamba_quant.checkpoint import ReadOptions
from bamba_quant.errors import PlanError, did_you_mean
from bamba_quant.inference.loading import load_model_and_tokenizer, torch_device, torch_dtype
from bamba_quant.inference.memory import check_memory
from bamba_reference.packing import check_tokens

METHODS = ("gradient", "direct")


@dataclass(frozen=True)
class Measuring:
    """How costs are measured: ``method`` "gradient" (an estimate, all tensors at once) or "direct" (one by one), over
    ``chunks`` chunks of ``ctx`` tokens spread over the texts, ``batch`` at once. ``memory`` bounds what the gradient
    method holds of the tensors' differences, in bytes. ``refine``: the candidates' scales are searched as a recipe
    with ``refine`` has them.
    """

    method: str = "gradient"
    ctx: int = 512
    chunks: int = 32
    batch: int = 1
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    memory: int = 2 << 30
    refine: bool = True


def text_costs(
    model: Path,
    texts: Sequence[Path],
    options: Measuring = Measuring(),
    *,
    formats: Sequence[str] = FORMATS,
    scheme: str | None = None,
    imatrix: Path | None = None,
    reading: ReadOptions = ReadOptions(),
    threads: int | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[str, dict[str, float]]:
    """What every tensor costs in each of ``formats``, nats a token: by GGUF name, by format.

    With ``scheme``, a codec of safetensors, that is the only format, and the tensors are the linear layers it takes.

    The candidates are written to the system's temporary directory, some 5 bytes a weight, and removed. Raises a
    ``BambaQuantError`` for models that cannot be run or held in memory, and texts that are too short.
    """
    if options.method not in METHODS:
        raise PlanError(
            f"unknown method to measure costs{did_you_mean(options.method, METHODS)}",
            where="--method",
            found=options.method,
            expected=", ".join(METHODS),
        )
    if options.batch < 1:
        raise PlanError(
            "the number of chunks in a batch is too small",
            where="--batch",
            found=options.batch,
            expected="at least 1",
        )
    device, dtype = torch_device(options.device), torch_dtype(options.dtype)
    loaded, encoder = load_model_and_tokenizer(model, reading=reading)
    held = loaded.checkpoint.elements * dtype.itemsize
    if options.method == "gradient":
        held += min(options.memory, 2 * (1 if scheme else len(formats)) * loaded.checkpoint.elements)
    check_memory(
        "measuring this model",
        held,
        device,
        "give --dtype bfloat16 or another --device, or leave out --text: then other models' costs decide",
    )
    chunks = spread(token_chunks(encoder, read_texts(texts), options.ctx), options.chunks)
    check_tokens(chunks, loaded.config.vocab_size)
    from bamba_quant.calibration.sensitivity import gradient_costs, measured_costs

    with tempfile.TemporaryDirectory(prefix="bamba-quant-") as scratch:
        if scheme is not None:
            progress(f"quantizing to {scheme}", 0, 1)
            candidates = quantize_layers(
                model, scheme, Path(scratch), imatrix=imatrix, reading=reading, threads=threads
            )
        else:
            candidates = quantize_candidates(
                model,
                formats,
                Path(scratch),
                imatrix=imatrix,
                reading=reading,
                refine=options.refine,
                threads=threads,
                progress=lambda name: progress(f"quantizing to {name}", formats.index(name), len(formats)),
            )

        def measured(done: int, total: int) -> None:
            progress("measuring", done, total)

        if options.method == "direct":
            return measured_costs(
                loaded, candidates, chunks, device=device, dtype=dtype, batch=options.batch, progress=measured
            )
        return gradient_costs(
            loaded,
            candidates,
            chunks,
            device=device,
            dtype=dtype,
            batch=options.batch,
            seed=options.seed,
            memory=options.memory,
            progress=measured,
        )


def spread(chunks: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """At most ``count`` of ``chunks``, at even distances. Raises ``PlanError`` for fewer than one."""
    if count < 1:
        raise PlanError(
            "the number of chunks is too small", where="--chunks", found=count, expected="at least 1"
        )
    chosen: NDArray[np.int64] = chunks[
        np.unique(np.linspace(0, len(chunks) - 1, min(count, len(chunks))).astype(int))
    ]
    return chosen
