"""Run ``fp8``, ``int4``, ``fp4`` and ``quantize`` once their options are turned into a scheme and a method."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bamba_quant.hub import address
from bamba_quant_cli import options as opt
from bamba_quant_cli.console import Progress, count, echo, print_json, print_table, size
from bamba_quant_cli.imatrix import calibrate_imatrix
from bamba_quant_cli.interrupts import announce_outputs
from bamba_quant_cli.plans import files_as_json, numpy_notes, print_files, print_roles, written_as_json
from bamba_quant_cli.tuning import TuneArguments, print_tuned, show_tuning, tuned_as_json

if TYPE_CHECKING:
    from bamba_quant.metadata.tune_record import Tuned
    from bamba_quant.planning.plan import Plan
    from bamba_quant.recipes.mixtures import Mixture


@dataclass(frozen=True)
class DirectoryArguments(TuneArguments):
    """The options that these commands share, as typed."""

    ignore: opt.Ignore = None
    keep: opt.OldIgnore = None
    dtype: opt.OtherDtype = "bf16"
    imatrix: opt.Imatrix = None
    imatrix_strict: opt.ImatrixStrict = False
    calibrate: opt.Calibrate = None
    calibrate_chunks: opt.CalibrateChunks = None
    kv_cache: opt.KvCache = None
    device: opt.Device = "cpu"
    max_shard_size: opt.MaxShardSize = "5G"
    dry_run: opt.DryRun = False
    tensors: opt.Tensors = False
    resume: opt.Resume = False
    stream_from_hub: opt.StreamFromHub = False
    ignore_config_key: opt.IgnoreConfigKey = None
    ignore_adapter: opt.IgnoreAdapter = False
    strip_prefix: opt.StripPrefix = ""
    threads: opt.Threads = None
    overwrite: opt.OverwriteDirectory = False
    as_json: opt.AsJson = False


def quantize(
    model: Path, directory: Path, scheme: str | Mixture, method: str | None, asked: DirectoryArguments
) -> None:
    """Plan, then print the plan or execute it."""
    from bamba_quant.calibration.cache_ranges import CacheRanges
    from bamba_quant.calibration.tuned_output import write_tuned_output
    from bamba_quant.checkpoint.imatrix import PlaceholderImatrix, read_imatrix
    from bamba_quant.inference.threads import use_threads
    from bamba_quant.planning.quantize import plan_quantization
    from bamba_quant.recipes.ignore_file import read_ignore_file
    from bamba_quant.writers import write_plan
    from bamba_quant.writers.resumable import check_output, partial_of

    opt.check_tensors(asked.tensors, asked.dry_run)
    announce_outputs(directory, unfinished=partial_of(directory))
    opt.check_one_imatrix(asked.imatrix, asked.calibrate, asked.calibrate_chunks, asked.kv_cache)
    ignored: list[str] = []
    for entry in (*(asked.ignore or ()), *(asked.keep or ())):
        name = scheme if isinstance(scheme, str) else scheme.name
        ignored += read_ignore_file(Path(entry), name) if entry.endswith(".toml") else [entry]
    reading = opt.read_options(asked.ignore_config_key, asked.ignore_adapter, asked.strip_prefix)
    plan_with = partial(
        plan_quantization,
        opt.model_path(
            model,
            headers=asked.dry_run,
            stream=asked.stream_from_hub,
            several_times={"--tune": asked.tune, "--calibrate": asked.calibrate},
        ),
        scheme,
        method=method,
        keep=ignored,
        dtype=asked.dtype,
        max_shard_bytes=opt.parse_size(asked.max_shard_size, "--max-shard-size"),
        allow_config_only=asked.dry_run,
        reading=reading,
    )
    given = read_imatrix(asked.imatrix, strict=asked.imatrix_strict) if asked.imatrix else None
    cache = CacheRanges() if asked.kv_cache else None
    plan = plan_with(
        imatrix=PlaceholderImatrix() if asked.calibrate else given,
        cache_scales=cache.scales() if cache else None,
    )
    if asked.dry_run:
        _print_plan(plan, directory, asked.tensors, asked.as_json)
        return
    n_bytes = sum(plan.sizes.values())
    going_on: dict[str, Any] = {"overwrite": asked.overwrite, "resume": asked.resume}
    tuning = asked.plan(directory, **going_on)
    check_output(directory, inputs=plan.inputs, n_bytes=n_bytes, **going_on)
    started = time.monotonic()
    if asked.calibrate or tuning:
        use_threads(asked.threads)
    if asked.calibrate:
        measured = calibrate_imatrix(
            plan.checkpoint.path, asked.calibrate, asked.calibrate_chunks, asked.device, reading,
            bounds=any(row.scheme.measured for row in plan.matrices), strict=asked.imatrix_strict, cache=cache,
        )  # fmt: skip
        plan = plan_with(imatrix=measured, cache_scales=cache.scales() if cache else None)
    writing = going_on | {"threads": asked.threads}
    tuned: Tuned | None = None
    with Progress("quantizing", plan.work_bytes) as bar, Progress("tuning: step") as steps:
        writing["progress"] = bar.advance
        if tuning is None:
            written = write_plan(plan, directory, **writing, stream_from_hub=asked.stream_from_hub)
        else:
            tell = show_tuning(steps, bar)
            written, tuned = write_tuned_output(
                plan, directory, tuning, **writing, reading=reading, tell=tell, note=opt.print_note
            )
    seconds = time.monotonic() - started
    found = written_as_json(written, seconds)
    if asked.as_json:
        print_json({"directory": directory, **found, **_summary(plan), **tuned_as_json(tuned)})
        return
    for note in _notes(plan):
        echo(f"note: {note}", err=True)
    print_tuned(tuned)
    echo(directory)
    echo(
        f"{len(plan.matrices)} matrices in {plan.recipe}, {count(plan.quantized_elements)} of "
        f"{count(plan.elements)} weights, {size(found['bytes'])} in {len(written)} files, {seconds:.1f} s",
        err=True,
    )


def _notes(plan: Plan) -> list[str]:
    return [
        *plan.notes,
        *numpy_notes(plan),
        *(f"left out: {skipped.source.name} ({skipped.reason})" for skipped in plan.skipped),
    ]


def _summary(plan: Plan) -> dict[str, Any]:
    return {
        "model": address(plan.checkpoint.path),
        "architecture": plan.architecture,
        "scheme": plan.recipe,
        "method": plan.method,
        "matrices": len(plan.matrices),
        "quantized_weights": plan.quantized_elements,
        "weights": plan.elements,
        "input_bytes": plan.input_bytes,
        "bytes_by_dtype": plan.bytes_by_dtype,
        "notes": _notes(plan),
    }


def _print_plan(plan: Plan, directory: Path, tensors: bool, as_json: bool) -> None:
    if as_json:
        files = files_as_json(plan, directory)
        print_json({"files": files, **_summary(plan), "plan": _rows_as_json(plan)})
        return
    if tensors:
        _print_tensors(plan)
    else:
        print_roles(plan.rows)
    for note in _notes(plan):
        echo(f"note: {note}")
    stored: dict[str, int] = {}
    for row in plan.rows:
        name = row.source.format.name
        stored[name] = stored.get(name, 0) + row.source.n_bytes
    echo()
    echo(
        f"{len(plan.matrices)} matrices in {plan.recipe} by {plan.method}, {count(plan.quantized_elements)} of "
        f"{count(plan.elements)} weights, {plan.bits_per_weight:.2f} bits per weight"
    )
    echo()
    written = sum(plan.bytes_by_dtype.values())
    print_table(
        ("weights", "bytes", ""),
        [
            ("input", f"{plan.input_bytes:,}", size(plan.input_bytes)),
            *((f"  {name}", f"{n:,}", size(n)) for name, n in stored.items()),
            ("output", f"{written:,}", size(written)),
            *((f"  {name}", f"{n:,}", size(n)) for name, n in plan.bytes_by_dtype.items()),
        ],
        right=(1, 2),
    )
    echo()
    print_files(plan, directory)


def _print_tensors(plan: Plan) -> None:
    """One line a tensor of the input: source, role, type, shape, what it becomes, bytes."""
    print_table(
        ("source", "role", "type", "shape", "becomes", "bytes"),
        [
            (
                row["source"],
                row["role"],
                row["source_type"],
                " × ".join(map(str, row["shape"])),
                " + ".join(
                    f"{part['dtype']} {' × '.join(map(str, part['shape']))}" for part in row["tensors"]
                )
                if row["scheme"]
                else row["tensors"][0]["dtype"],
                f"{sum(part['bytes'] for part in row['tensors']):,}",
            )
            for row in _rows_as_json(plan)
        ],
        right=(3, 5),
        dispensable=(3, 4, 2, 1),
    )


def _rows_as_json(plan: Plan) -> list[dict[str, Any]]:
    """A row for each tensor of the input: the matrices, then the others."""
    return [
        {
            "source": row.source.name,
            "source_type": row.source.format.name,
            "role": row.role,
            "shape": row.source.shape,
            "scheme": row.codec.name if row.method else "",
            "tensors": [
                {
                    "name": part.name,
                    "dtype": part.dtype,
                    "shape": part.shape,
                    "bytes": part.n_bytes,
                    "shard": part.shard,
                    "offset": part.offset,
                }
                for part in row.parts
            ],
        }
        for row in plan.rows
    ]
