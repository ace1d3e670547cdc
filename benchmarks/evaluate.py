"""``evaluate`` as a whole process: memory and where the time goes on a large model, and several candidates in one call.

    python benchmarks/evaluate.py [--model DIR --text FILE] [--types q8_0 q4_k_m …] [--chunks N] [--only WHICH]

The large model has random weights in Bamba-9B's layer shapes, 1.83 billion: bf16 safetensors against its q4_k_m. The
other measurement takes --model against each of --types, in one call and in as many calls.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from checkpoints import make_checkpoint, random_text
from processes import run


def convert(model: Path, target: Path, outtype: str) -> Path:
    if not target.is_file():
        command = [sys.executable, "-m", "bamba_quant_cli", "convert", str(model), "--outtype", outtype]
        subprocess.run([*command, "--outfile", str(target)], check=True, stdout=subprocess.DEVNULL)
    return target


def evaluate(base: Path, candidates: list[Path], text: Path, chunks: int, *more: str) -> list[str]:
    command = [sys.executable, "-m", "bamba_quant_cli", "evaluate", str(base), *map(str, candidates)]
    return [*command, "--text", str(text), "--chunks", str(chunks), *more]


def large(directory: Path, chunks: int) -> None:
    model = make_checkpoint(directory / "bamba-9b-shapes-3", 3, (1,))
    candidate = convert(model, directory / "bamba-9b-shapes-3-q4_k_m.gguf", "q4_k_m")
    text = random_text(directory / "random.txt", 512 * (chunks + 1))
    report = directory / "evaluation.json"
    command = evaluate(
        model, [candidate], text, chunks, "--json", "--drift-chunks", "1", "--floor-chunks", "1"
    )
    wall, peak = run(["sh", "-c", 'out=$1; shift; "$@" > "$out"', "sh", str(report), *command])
    timing = json.loads(report.read_text())["timing"]
    shares = ", ".join(
        f"{100 * timing[what]:.1f} % {what}" for what in ("reading", "dequantizing", "computing")
    )
    print(
        f"1.83 billion weights, bf16 against q4_k_m, {chunks} chunks of 512: {wall:.0f} s, peak {peak:.0f} MB "
        f"({timing['peak_memory'] / 1e6:.0f} MB by its own report), {1000 * timing['seconds_per_token']:.1f} ms a "
        f"token: {shares}; {timing['hashing_seconds']:.1f} s more for hashes"
    )


def several(directory: Path, model: Path, text: Path, types: list[str], chunks: int) -> None:
    files = [convert(model, directory / f"{model.name}-{name}.gguf", name) for name in types]
    together, _ = run(evaluate(model, files, text, chunks))
    apart = [run(evaluate(model, [file], text, chunks))[0] for file in files]
    print(
        f"{model.name}, {len(files)} candidates ({', '.join(types)}), {chunks} chunks of 512: {together:.1f} s in one "
        f"call, {sum(apart):.1f} s in {len(files)} calls: {together / sum(apart):.2f} of the time"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, default=Path("bench"), help="where the files go")
    parser.add_argument("--model", type=Path, help="a checkpoint directory, for several candidates")
    parser.add_argument("--text", type=Path, help="a UTF-8 text for it")
    parser.add_argument("--types", nargs="+", default=["q8_0", "q6_k", "q4_k_m", "q2_k"])
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--only", choices=["large", "several"])
    options = parser.parse_args()
    options.directory.mkdir(exist_ok=True)
    if options.only != "several":
        large(options.directory, options.chunks)
    if options.only != "large":
        if not options.model or not options.text:
            parser.error("several candidates need --model and --text")
        several(options.directory, options.model, options.text, options.types, options.chunks)


if __name__ == "__main__":
    main()
