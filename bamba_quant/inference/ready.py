"""A model in memory, ready to run: converted to the dtype it computes in where that fits well, else as it is stored."""

from __future__ import annotations

import math

import torch

from bamba_quant.errors import BambaQuantError
from bamba_quant.evaluation.activations import with_activations
from bamba_quant.inference.loading import LoadedModel
from bamba_quant.inference.memory import available_memory, check_memory
from bamba_quant.inference.stored import held, held_bytes, with_stored
from bamba_quant.inference.weights import weights_on
from bamba_reference.backends import backend_named
from bamba_reference.tensors import EMBEDDING, head_name
from bamba_reference.torch.forward import Model, default_chunk, load, stored_dtype

WEIGHTS = ("auto", "converted", "stored")

_MARGIN = 1.05  # for activations and states


def ready_model(
    loaded: LoadedModel,
    device: torch.device,
    dtype: torch.dtype,
    *,
    backend: str = "auto",
    activations: str = "none",
    weights: str = "auto",
    instead: str = "",
) -> Model:
    """``loaded`` in memory, with the backend of that name and activations rounded as said (``activations.resolve``).

    ``weights`` "converted" holds them in ``dtype``, on any device; "stored" holds matrices in the bytes of their file,
    on a CPU; "auto" is "converted" on a GPU and where it takes at most half of the free memory, because few products
    are slower then. Raises ``BambaQuantError``, before anything is read, for what does not fit in memory; ``instead``
    is what the user may do then.
    """
    if weights not in WEIGHTS:
        raise BambaQuantError("unknown way to hold weights", found=weights, expected=", ".join(WEIGHTS))
    if weights == "stored" and device.type != "cpu":
        raise BambaQuantError(
            "weights are held as stored on a CPU only",
            found=f"device {device}",
            fix="take --weights converted",
        )
    kernels = backend_named(backend, device, dtype)
    converted, stored = _sizes(loaded, dtype)
    if weights == "auto":
        free = available_memory(device)
        roomy = device.type != "cpu" or free is None or 2 * converted <= free
        weights = "converted" if roomy or stored >= converted else "stored"
    ways = ["a smaller file of the model", "a --device with more memory", *([instead] if instead else [])]
    if weights == "converted" and stored < converted and device.type == "cpu":
        ways = [f"--weights stored, which needs {stored / 1e9:.1f} GB", *ways]
    check_memory(
        f"the model, {loaded.checkpoint.n_bytes / 1e9:.1f} GB on disk,",
        stored if weights == "stored" else converted,
        device,
        fix=f"take {', '.join(ways[:-1])} or {ways[-1]}",
    )
    if weights == "converted":
        kernels = with_activations(kernels, loaded, activations, device, dtype)
        return load(
            loaded.config,
            weights_on(loaded.weights, device, dtype),
            dtype=dtype,
            device=device,
            backend=kernels,
        )
    kernels = with_activations(with_stored(kernels, dtype), loaded, activations, device, dtype)
    return Model(
        loaded.config,
        held(loaded.weights, loaded.config, dtype),
        dtype,
        device,
        kernels,
        default_chunk(device),
    )


def _sizes(loaded: LoadedModel, dtype: torch.dtype) -> tuple[int, int]:
    """What a model takes converted to ``dtype``, and as stored with the buffer of the largest matrix, in bytes."""
    converted = stored = buffer = 0
    for name in loaded.weights:
        shape = loaded.weights.info(name).shape
        n_bytes = math.prod(shape) * stored_dtype(name, dtype).itemsize
        packed = held_bytes(loaded.weights, name, dtype)
        converted += n_bytes
        stored += n_bytes if packed is None else packed
        if packed is not None and name not in (EMBEDDING, head_name(loaded.config)):
            buffer = max(buffer, 4 * math.prod(shape[-2:]))
    return int(_MARGIN * converted), int(_MARGIN * (stored + buffer))
