"""What quantized directories lost, weights alone: mean Kullback-Leibler divergence of next-token distributions.

    python benchmarks/divergence.py MODEL TEXT [DIRECTORY …] [--chunks N] [--threads N]

MODEL is quantized by every FP8 scheme (or those of --schemes) and method into a directory of its own; every further
DIRECTORY, such as one that another tool made of MODEL, is measured beside them. The reference's forward pass runs each
in float32 on the weights its file stands for, on the same chunks of TEXT. Activations are not quantized: runtimes that
do so add a loss of their own. The figure after ± is the standard error over chunks, where there are several.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

CHUNK = 512


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("directories", type=Path, nargs="*")
    parser.add_argument("--schemes", default="fp8", help="beginning of the names of those to measure")
    parser.add_argument("--chunks", type=int, help="spread over the text; by default all of it")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    import torch

    from bamba_quant.codecs import SafetensorsCodec, codecs
    from bamba_quant.errors import FormatError
    from bamba_quant.inference.loading import load_model
    from bamba_quant.planning.quantize import plan_quantization
    from bamba_quant.tokenizers.encoder import read_encoder
    from bamba_quant.writers import write_plan
    from bamba_reference.torch import forward as torch_forward

    torch.set_num_threads(options.threads)
    original = load_model(options.model)
    ids = read_encoder(original.checkpoint).encode(options.text.read_text(encoding="utf-8"))
    available = len(ids) // CHUNK
    count = available if options.chunks is None else options.chunks
    if not 1 <= count <= available:
        parser.error(f"--chunks {count}: {options.text.name} has {available} chunks of {CHUNK} tokens")
    starts = [(len(ids) - CHUNK) * number // max(1, count - 1) for number in range(count)]
    reference = torch_forward.load(original.config, original.weights)
    models = {}
    with tempfile.TemporaryDirectory() as scratch:
        for scheme in codecs(SafetensorsCodec):
            if not scheme.name.startswith(options.schemes):
                continue
            for method in scheme.methods:
                name = f"{scheme.name} {method.name}"
                try:
                    plan = plan_quantization(options.model, scheme.name, method=method.name)
                except FormatError as error:
                    print(f"{name}: {error}".splitlines()[0])
                    continue
                directory = Path(scratch) / name
                write_plan(plan, directory)
                found = load_model(directory)
                models[name] = torch_forward.load(found.config, found.weights)
        for directory in options.directories:
            found = load_model(directory)
            models[str(directory)] = torch_forward.load(found.config, found.weights)
    divergences: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for start in starts:
            tokens = torch.tensor([ids[start : start + CHUNK]])
            expected = torch.log_softmax(torch_forward.forward(reference, tokens).logits[0].double(), -1)
            for name, model in models.items():
                got = torch.log_softmax(torch_forward.forward(model, tokens).logits[0].double(), -1)
                divergences[name].append(float((expected.exp() * (expected - got)).sum(-1).mean()))
    print(f"{count * CHUNK:,} tokens of {options.text.name}")
    for name, values in divergences.items():
        # One chunk says nothing of how much chunks differ.
        error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.0e}" if len(values) > 1 else ""
        print(f"{name:40} {statistics.mean(values):.3e}{error}")


if __name__ == "__main__":
    main()
