"""How much closer to the original files of the same bytes come: plain, allocated, tuned, and both.

    python -m benchmarks.fidelity --model DIR --text calib.txt [--text calib-large.txt.xz] --eval eval.txt
        [--types q4_k_m q2_k int4 fp8] [--only plain,allocated,tuned,both] [--calibrate TEXT]
        [--recipes DIR] [--set "lr=5e-3 train=codes,scales"]… [--sweep "q2_k:eps=1e-8"] [--sweep "eps=1e-12"]…
        [--device cuda] [--jobs N] [--out DIR]

Mean KL divergence from MODEL in nats a token, weights alone, on the second halves of the first --chunks chunks of 512
of each --eval text: what ``bamba-quant evaluate --activations none`` gives. A file is made by ``bamba-quant convert``
with an importance matrix of --calibrate (``int4`` and ``fp8`` for directories), an allocated one by its recipe
TYPE.toml in --recipes. --set holds for all tuning, every --sweep is tuned by itself; ``TuneOptions`` has the names.
What begins with a type's first letters and a colon is for those types alone. --jobs run on each GPU that is visible.
Files go to --out, and all figures so far to fidelity.json in it; a quantized file that is there is not made again.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any

CTX = 512
SCHEMES = ("int4", "fp8")
TUNED = {"plain": "tuned", "allocated": "both"}  # what a tuned file of each kind is called
Job = dict[str, Any]


def main() -> None:
    options = _parsed()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.job:
        print(json.dumps(run(options, json.loads(options.job))))
        return
    if options.calibrate and not (options.out / "imatrix.gguf").exists():
        given = ["--text", options.calibrate, "--outfile", options.out / "imatrix.gguf", "--output-tensor"]
        _command("imatrix", options.model, *given, "--device", options.device)
    places: SimpleQueue[str | None] = SimpleQueue()
    for gpu in _gpus(options.device) * options.jobs:
        places.put(gpu)
    rows: list[Job] = []
    with ThreadPoolExecutor(places.qsize()) as pool:
        made = {pool.submit(_made, options, job): job for job in files(options)}
        jobs: dict[Future[Job], Job] = {}
        for file in as_completed(made):
            if (error := file.exception()) is not None:
                rows.append(made[file] | {"failed": str(error)})
                continue
            jobs |= {pool.submit(_measured, options, job, places): job for job in file.result()}
        for done in as_completed(jobs):
            error = done.exception()
            rows.append(done.result() if error is None else jobs[done] | {"failed": str(error)})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            (options.out / "fidelity.json").write_text(json.dumps(rows, indent=1))
    kinds = list(TUNED)
    rows.sort(key=lambda row: (options.types.index(row["type"]), kinds.index(row["variant"]), "tune" in row))
    show(rows)


def files(options: argparse.Namespace) -> list[Job]:
    """The quantized files that are needed."""
    only = set(options.only.split(","))
    return [
        {"type": name, "variant": variant}
        for name in options.types
        for variant, tuned in TUNED.items()
        if variant == "plain" or (options.recipes and name not in SCHEMES and {variant, tuned} & only)
    ]


def _made(options: argparse.Namespace, job: Job) -> list[Job]:
    """What is to be measured of a file, which is made unless it is there."""
    only, name, variant = options.only.split(","), job["type"], job["variant"]
    path: Path = (
        options.out
        / f"{name}{'' if variant == 'plain' else '-allocated'}{'' if name in SCHEMES else '.gguf'}"
    )
    if not path.exists():
        given = (
            [name, options.model, path] if name in SCHEMES else ["convert", options.model, "--outfile", path]
        )
        if variant == "allocated":
            given += ["--recipe", options.recipes / f"{name}.toml"]
        elif name not in SCHEMES:
            given += ["--outtype", name]
        if options.calibrate and name != "fp8":
            given += ["--imatrix", options.out / "imatrix.gguf"]
        _command(*given)
    job = job | {"path": str(path)}
    tuned = [] if TUNED[variant] not in only else options.sweep or [""]
    sweeps = [words for words in tuned if all(map(_for(name), words.split()))]
    return [job] * (variant == "allocated" or "plain" in only) + [
        job | {"sweep": words, "tune": True} for words in sweeps
    ]


def _for(name: str) -> Callable[[str], bool]:
    """Whether a word of --set or --sweep, or its part before "=", is for this type."""
    return lambda word: name.startswith(word.split("=")[0].rpartition(":")[0])


def _command(*words: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bamba_quant_cli", *map(str, words)], stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{words[0]}: {done.stderr.strip()[-500:]}")


def _gpus(device: str) -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES is to be for each GPU that may be used."""
    if device != "cuda":
        return [None]
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return list(given.split(",")) if given else [str(i) for i in range(torch.cuda.device_count())]


def _measured(options: argparse.Namespace, job: Job, places: SimpleQueue[str | None]) -> Job:
    """The figures of a job, computed by a process of its own on a GPU that is free."""
    gpu = places.get()
    try:
        command = [sys.executable, "-m", "benchmarks.fidelity", *sys.argv[1:], "--job", json.dumps(job)]
        environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    finally:
        places.put(gpu)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}")
    found: Job = json.loads(done.stdout.splitlines()[-1])
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

        words = [word.split("=", 1) for given in [*options.set, job["sweep"]] for word in given.split()]
        settings = {name.rpartition(":")[2]: value for name, value in words if _for(job["type"])(name)}
        chosen = TuneOptions(device=options.device, **{name: _value(text) for name, text in settings.items()})

        def tell(progress: TuneProgress) -> None:
            if progress.step % max(1, progress.steps // 10) == 0:
                print(job["type"], job["variant"], job["sweep"], progress, file=sys.stderr, flush=True)

        texts = read_texts(options.text) if options.text else ()
        tuned = tune(options.model, path, texts, chosen, tell, lambda note: print(note, file=sys.stderr))
        found |= {"seconds": time.perf_counter() - started, **dataclasses.asdict(tuned.record)}
        label = "-".join(("tuned", *job["sweep"].split())).replace("/", "_").replace(":", "_")
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

    from bamba_quant.calibration.student import HeldOut, model_of, passes, sequences_of
    from bamba_quant.evaluation.tokens import cut_chunks
    from bamba_quant.inference.loading import load_model, read_text
    from bamba_quant.tokenizers.encoder import read_encoder
    from bamba_reference.torch.forward import to_tensor

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
    sequences = sequences_of(config, CTX, device)
    teacher, student = (passes(model_of(config, each, device), sequences, 8) for each in weights)
    return HeldOut(torch.as_tensor(ids).to(device), config.vocab_size, *teacher).divergence(*student)


def show(rows: list[Job]) -> None:
    """A table: bytes and figures, each with its ratio to the plain file of the type."""
    plain = {
        row["type"]: row for row in rows if row["variant"] == "plain" and not row.get("tune") and "kld" in row
    }
    for row in rows:
        name = TUNED[row["variant"]] if row.get("tune") else row["variant"]
        line = f"{row['type']:14} {name:10} {row.get('sweep', ''):40} "
        if "failed" in row:
            print(line + f"failed: {row['failed']}")
            continue
        beside = plain.get(row["type"])
        line += f"{row['bytes']:>12,}" + (f" {row['bytes'] / beside['bytes']:.4f}" if beside else "")
        for text, kld in row["kld"].items():
            line += f"  {text} {kld:.5f}" + (f" {kld / beside['kld'][text]:.3f}" if beside else "")
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
    parser.add_argument("--jobs", type=int, default=1, help="on a GPU together")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("fidelity"))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
