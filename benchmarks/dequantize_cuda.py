"""Prints how fast each format and scheme is read on a GPU: `python -m benchmarks.dequantize_cuda`.

One matrix of Bamba-9B's MLP to bfloat16 weights. Formats: raw blocks on the device; GB of weights written a second, the
median, and the share of a copy's rate that its traffic (blocks read, weights written) reaches. Schemes: codes and
scales of a file in the system's cache, the way over the bus included, the best of some runs; beside it one by the CPU.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bamba_quant.codecs import BlockCodec, codecs
from bamba_quant.codecs.gpu.decoding import decode

SHAPE = (4096, 14336)
RUNS = 5
SCHEMES = ("fp8-dynamic", "fp8-tensor", "fp8-block", "w4a16-g128", "w4a16-asym-g128", "torchao-int4-g128",
           "torchao-int4-tile-packed-g128")  # fmt: skip


def of_formats() -> None:
    from triton.testing import do_bench

    def seconds(run: Callable[[], object]) -> float:
        return 1e-3 * float(do_bench(run, warmup=10, rep=50, return_mode="median"))

    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    print(f"{torch.cuda.get_device_name()}; a copy moves {copy / 1e12:.2f} TB/s")
    x = torch.randn(SHAPE) * 0.02
    for codec in codecs(BlockCodec):
        if codec.dtype is not None:
            continue
        if codec.writable:
            raw = torch.from_numpy(codec.quantizer()(x.numpy())).cuda()
        else:  # nothing here writes it: any bytes
            raw = torch.randint(256, (SHAPE[0], codec.row_bytes(SHAPE[1])), device="cuda").byte()
        each = seconds(lambda raw=raw, codec=codec: decode(codec, raw, torch.bfloat16))
        moved = raw.nbytes + 2 * x.numel()
        print(f"{codec.name:8}{2e-9 * x.numel() / each:8.0f} GB/s{100 * moved / each / copy:6.0f} %")


def of_schemes() -> None:
    """Each of a file in the system's cache: as ``DeviceWeights`` reads it, and decoded by the CPU and sent."""
    from bamba_quant.checkpoint import PackedTensor, open_checkpoint, read_raw
    from bamba_quant.codecs.decoding import decode as decode_on_cpu
    from bamba_quant.inference.weights import Timings, read_packed

    device, dtype = torch.device("cuda"), torch.bfloat16
    print(f"{'scheme':30}{'GPU ms':>8}{'reading':>9}{'decoding':>9}{'CPU ms':>9}")
    for name in SCHEMES:
        with tempfile.TemporaryDirectory() as place:
            (tensor,) = open_checkpoint(random_matrix(Path(place), name)).tensors.values()
            assert isinstance(tensor, PackedTensor)
            best: list[tuple[float, Timings]] = []
            for _ in range(RUNS):
                timings, started = Timings(), time.perf_counter()
                found = read_packed(tensor, 0, tensor.rows, device, dtype, timings)
                torch.cuda.synchronize()
                best.append((time.perf_counter() - started, timings))
            seconds, timings = min(best, key=lambda each: each[0])
            started = time.perf_counter()
            truth = torch.from_numpy(decode_on_cpu(tensor.format, read_raw(tensor))).to(device).to(dtype)
            torch.cuda.synchronize()
            on_cpu = time.perf_counter() - started
            same = torch.equal(found.nan_to_num(), truth.nan_to_num())
            times = "".join(f"{1e3 * each:9.1f}" for each in (timings.reading, timings.decoding, on_cpu))
            print(f"{name:30}{1e3 * seconds:8.1f}{times}{'' if same else '  NOT THE SAME'}", flush=True)


def random_matrix(directory: Path, name: str) -> Path:
    """A directory that holds one matrix of a scheme: any codes, scales near 0.01."""
    from safetensors.torch import save_file

    from bamba_quant.codecs import Ignored, SafetensorsCodec, codec_named

    scheme, module = codec_named(name, SafetensorsCodec), "model.layers.0.feed_forward.down_proj"
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn, "I32": torch.int32,
              "I8": torch.int8, "I64": torch.int64}  # fmt: skip
    tensors = {}
    for part in scheme.parts(*SHAPE):
        dtype = dtypes[part.dtype]
        if part.dtype in ("BF16", "F32"):
            values = (0.01 * torch.rand(part.shape)).to(dtype)
        else:
            values = torch.randint(256, (part.n_bytes,)).byte().view(dtype).view(part.shape)
        tensors[module + part.suffix] = values
    if f"{module}.weight_shape" in tensors:
        tensors[f"{module}.weight_shape"] = torch.tensor(SHAPE)
    metadata = scheme.metadata({f"{module}.weight": SHAPE}, [])
    save_file(tensors, directory / "model.safetensors", metadata=metadata)
    config = {"architectures": ["BambaForCausalLM"], "quantization_config": scheme.configuration(Ignored())}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU")
    of_formats()
    of_schemes()


if __name__ == "__main__":
    main()
