"""Quantized directories written in the plainest way: whole matrices, a definition of a scheme, safetensors' writer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from bamba_quant.checkpoint import open_checkpoint, read_tensor
from bamba_quant.codecs import Ignored, Method, SafetensorsCodec
from bamba_quant.codecs.base import Parts

# A model in which rows and columns of every matrix divide by 128.
DIVIDES = {
    "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2,
    "mamba_n_heads": 16, "mamba_d_head": 16, "mamba_d_state": 56,
}  # fmt: skip
LINEAR = tuple(f"{leaf}_proj.weight" for leaf in ("in", "out", "q", "k", "v", "o", "gate", "up", "down"))


def quantized_parts(scheme: SafetensorsCodec, method: Method, x: np.ndarray) -> Parts:
    """All parts of one matrix."""
    shared = None
    if method.measure is not None and method.share is not None:
        shared = method.share(method.measure(x, None))
    constants = {scheme.measured: np.ones(1, np.float32)} if scheme.measured else {}
    return {**method.encode(x, None, shared), **scheme.whole(*x.shape, shared), **constants}


def read_back(
    scheme: SafetensorsCodec, parts: Parts, shape: tuple[int, int], directory: Path | None = None
) -> np.ndarray:
    """The matrix that the checkpoint's reader finds in ``parts``, float32; in a temporary directory by default."""
    if directory is None:
        with TemporaryDirectory() as temporary:
            return read_back(scheme, parts, shape, Path(temporary))
    module = "model.layers.0.feed_forward.down_proj"
    tensors = {module + suffix: to_torch(part) for suffix, part in parts.items()}
    metadata = scheme.metadata({f"{module}.weight": shape}, [])
    save_file(tensors, directory / "model.safetensors", metadata=metadata)
    config = {"architectures": ["BambaForCausalLM"], "quantization_config": scheme.configuration(Ignored())}
    (directory / "config.json").write_text(json.dumps(config))
    (tensor,) = open_checkpoint(directory).tensors.values()
    return read_tensor(tensor)


def to_torch(array: np.ndarray) -> torch.Tensor:
    """A tensor of the same bytes: torch takes no numpy array of bfloat16 or e4m3."""
    array = np.ascontiguousarray(array)
    names = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}
    if array.dtype.name not in names:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(f"u{array.itemsize}")).view(names[array.dtype.name])


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory, as stored."""
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


def save_quantized(
    model: Path,
    directory: Path,
    scheme: SafetensorsCodec,
    method: str | None = None,
    shards: int = 1,
    **config: Any,
) -> Path:
    """Quantize every linear layer of the checkpoint ``model`` into ``directory``."""
    directory.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    matrices: dict[str, tuple[int, int]] = {}
    others: list[str] = []
    for name, tensor in read_all(model).items():
        if not name.endswith(LINEAR):
            others.append(name)
            tensors[name] = tensor.to(torch.bfloat16)
            continue
        matrices[name] = (tensor.shape[0], tensor.shape[1])
        parts = quantized_parts(scheme, scheme.method(method), tensor.float().numpy())
        tensors |= {name.removesuffix(".weight") + suffix: to_torch(part) for suffix, part in parts.items()}
    written = json.loads((model / "config.json").read_text()) | config
    written["quantization_config"] = scheme.configuration(Ignored(("lm_head",), ("lm_head",)))
    written["torch_dtype"] = "bfloat16"
    (directory / "config.json").write_text(json.dumps(written))
    write_shards(directory, tensors, scheme.metadata(matrices, others), shards)
    return directory


def write_shards(
    directory: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str], shards: int = 1
) -> None:
    """One file, or several with an index."""
    if shards == 1:
        save_file(dict(tensors), directory / "model.safetensors", metadata=metadata)
        return
    weight_map: dict[str, str] = {}
    names = list(tensors)
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        held = {name: tensors[name] for name in names[number::shards]}
        save_file(held, directory / file, metadata=metadata)
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@contextmanager
def int4_kernel() -> Iterator[None]:
    """A stand-in for the GPU kernel that torchao calls, by the meaning it gives scales and zeros."""
    library = torch.library.Library("mslk", "FRAGMENT")
    library.define("bf16i4bf16_rowwise(Tensor x, Tensor q, Tensor scale, Tensor zero) -> Tensor")

    def product(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        low, high = (q << 4) >> 4, q >> 4  # int8: shifts keep the sign
        codes = torch.stack((low, high), dim=-1).flatten(1).float()
        group = codes.shape[1] // len(scale)
        spread = (part.T.float().repeat_interleave(group, dim=1) for part in (scale, zero))
        weight = codes * next(spread) + next(spread)
        return x @ weight.to(x.dtype).T

    library.impl("bf16i4bf16_rowwise", product, "CPU")
    try:
        yield
    finally:
        library._destroy()
