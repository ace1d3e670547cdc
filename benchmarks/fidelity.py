"""How much closer to the original files of the same bytes come: plain, allocated, tuned, and both.

    python -m benchmarks.fidelity --model DIR --text calib.txt [--text calib-large.txt.xz] --eval eval.txt
        [--types q4_k_m q2_k int4 fp8] [--only plain,allocated,tuned,both] [--calibrate TEXT]
        [--recipes DIR] [--set lr=5e-3 --set train=codes,scales]… [--sweep "eps=1e-8" --sweep "eps=1e-12"]…
        [--device cuda] [--jobs N] [--out DIR]

Mean KL divergence from MODEL in nats a token, weights alone, on the second halves of the first --chunks chunks of 512
of each --eval text: what ``bamba-quant evaluate --activations exact`` gives. A file is made by ``bamba-quant convert``
with an importance matrix of --calibrate (``int4`` and ``fp8`` for directories), an allocated one by its recipe
TYPE.toml in --recipes. --set holds for all tuning, every --sweep is tuned by itself; ``TuneOptions`` has the names.
Files and figures go to --out; a quantized file that is there is not made again.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CTX = 512
ONLY = ("plain", "allocated", "tuned", "both")


def main() -> None:
    options = _parsed()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.job:
        print(json.dumps(run(options, json.loads(options.job))))
        return
    only = options.only.split(",")
    sweeps = options.sweep or [""]
    if options.calibrate and not (options.out / "imatrix.gguf").exists():
        given = ["--text", options.calibrate, "--outfile", options.out / "imatrix.gguf", "--output-tensor"]
        _command("imatrix", options.model, *given, "--device", options.device)
    made: dict[tuple[str, str], Path] = {}
    for name in options.types:
        made[name, "plain"] = make(options, name, None)
        if options.recipes and {"allocated", "both"} & set(only):
            made[name, "allocated"] = make(options, name, options.recipes / f"{name}.toml")
    jobs: list[dict[str, Any]] = []
    for (name, variant), path in made.items():
        if "plain" in only or variant == "allocated":
            jobs.append({"type": name, "variant": variant, "path": str(path)})
        if {"plain": "tuned", "allocated": "both"}[variant] in only:
            jobs += [
                {"type": name, "variant": variant, "path": str(path), "sweep": sweep, "tune": True}
                for sweep in sweeps
            ]
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(lambda job: _in_process(options, job), jobs))
    (options.out / "fidelity.json").write_text(json.dumps(rows, indent=1))
    show(rows)


def make(options: argparse.Namespace, name: str, recipe: Path | None) -> Path:
    """The quantized file or directory, made unless it is there."""
    scheme = name if name in ("int4", "fp8") else None
    path: Path = options.out / f"{name}{'-allocated' if recipe else ''}{'' if scheme else '.gguf'}"
    if path.exists():
        return path
    imatrix = (
        [] if options.calibrate is None or scheme == "fp8" else ["--imatrix", options.out / "imatrix.gguf"]
    )
    if scheme:
        given = [scheme, options.model, path]
    else:
        given = [
            "convert",
            options.model,
            "--outfile",
            path,
            *(["--recipe", recipe] if recipe else ["--outtype", name]),
        ]
    _command(*given, *imatrix)
    return path


def _command(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "bamba_quant_cli", *map(str, words)], check=True)


def _in_process(options: argparse.Namespace, job: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.fidelity", *sys.argv[1:], "--job", json.dumps(job)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {**job, "failed": done.returncode}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def run(options: argparse.Namespace, job: dict[str, Any]) -> dict[str, Any]:
    """The figures of one file, tuned first where the job says so."""
    import torch

    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    path = Path(job["path"])
    found = dict(job)
    if job.get("tune"):
        from bamba_quant.calibration.texts import read_texts
        from bamba_quant.calibration.tune import tune
        from bamba_quant.calibration.tune_options import TuneOptions, TuneProgress

        settings = dict(each.split("=", 1) for each in [*options.set, *job["sweep"].split()])
        chosen = TuneOptions(device=options.device, **{name: _value(text) for name, text in settings.items()})

        def tell(progress: TuneProgress) -> None:
            if progress.step % max(1, progress.steps // 10) == 0:
                print(job["type"], job["variant"], job["sweep"], progress, file=sys.stderr, flush=True)

        texts = read_texts(options.text) if options.text else ()
        tuned = tune(options.model, path, texts, chosen, tell, lambda note: print(note, file=sys.stderr))
        found |= {"seconds": time.perf_counter() - started, **dataclasses.asdict(tuned.record)}
        label = "-".join(("tuned", *job["sweep"].split())).replace("/", "_")
        path = patched(path, path.with_name(f"{path.stem}-{label}{path.suffix}"), tuned.tensors)
    found["bytes"] = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
    found["kld"] = {text.name: divergence(options, path, text) for text in options.eval}
    return found


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return tuple(text.split(","))


def patched(source: Path, target: Path, tensors: Any) -> Path:
    """A copy of a quantized file or directory with other bytes in some tensors."""
    import numpy as np

    from bamba_quant.checkpoint.gguf_file import read_gguf
    from bamba_quant.checkpoint.safetensors_file import read_safetensors

    if target.is_dir():
        shutil.rmtree(target)
    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    stored: Any = dict(read_gguf(target).tensors) if target.is_file() else {}
    for file in target.glob("*.safetensors") if target.is_dir() else ():
        stored |= read_safetensors(file, quantized=True)
    for name, values in tensors.items():
        with stored[name].file.open("r+b") as stream:
            stream.seek(stored[name].offset)
            stream.write(np.ascontiguousarray(values).tobytes())
    return target


def divergence(options: argparse.Namespace, path: Path, text: Path) -> float:
    """Mean KL divergence of the model at ``path`` on a text."""
    import torch

    from bamba_quant.calibration.student import HeldOut, model_of, sequences_of
    from bamba_quant.evaluation.tokens import cut_chunks
    from bamba_quant.running import read_text
    from bamba_quant.tokenizers.encoder import read_encoder
    from bamba_quant.weights import load_model
    from bamba_reference.torch_forward import to_tensor

    device = torch.device(options.device)
    original, quantized = load_model(options.model), load_model(path)
    encoder = read_encoder(original.checkpoint)
    config = original.config
    ids = cut_chunks(
        encoder.encode(read_text(text)[0]),
        vocab_size=config.vocab_size,
        ctx=CTX,
        bos=encoder.bos,
        chunks=options.chunks,
    )
    weights = [
        {name: to_tensor(model.weights[name], torch.float32, device) for name in model.weights}
        for model in (original, quantized)
    ]
    teacher = model_of(config, weights[0], device)
    held_out = HeldOut(teacher, torch.as_tensor(ids).to(device), sequences_of(config, CTX, device), 8)
    return held_out.divergence(weights[1])


def show(rows: list[dict[str, Any]]) -> None:
    """A table: each figure and its ratio to the plain file of the type."""
    plain = {
        row["type"]: row["kld"]
        for row in rows
        if row["variant"] == "plain" and not row.get("tune") and "kld" in row
    }
    for row in rows:
        name = {"plain": "tuned", "allocated": "both"}[row["variant"]] if row.get("tune") else row["variant"]
        line = f"{row['type']:14} {name:10} {row.get('sweep', ''):40} "
        if "failed" in row:
            print(line + f"failed ({row['failed']})")
            continue
        line += f"{row['bytes']:>12,} "
        for text, kld in row["kld"].items():
            ratio = kld / plain[row["type"]][text] if row["type"] in plain else float("nan")
            line += f" {text} {kld:.5f} {ratio:.3f}"
        if row.get("tune"):
            line += (
                f"  held out {row['held_out_kld_after'] / row['held_out_kld_before']:.3f}, {row['steps']} steps, "
                f"{row['seconds']:.0f} s, {row['codes_changed'] / max(1, row['codes']):.1%} changed"
            )
        print(line)


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--eval", type=Path, action="append", required=True)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--types", nargs="+", default=["q4_k_m"])
    parser.add_argument("--only", default="plain,tuned")
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--recipes", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--sweep", action="append", default=[])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("fidelity"))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
