"""``bamba-quant convert``: a Hugging Face directory to a GGUF file."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bamba_quant_cli import options as opt
from bamba_quant_cli.console import Progress, count, echo, print_json, print_table, size
from bamba_quant_cli.imatrix import calibrate_imatrix
from bamba_quant_cli.interrupts import announce_outputs
from bamba_quant_cli.plans import notes_of, print_conversion, summary, written_as_json
from bamba_quant_cli.tuning import TuneArguments, print_tuned, show_tuning, tuned_as_json, with_asked_options

if TYPE_CHECKING:
    from bamba_quant.metadata.tune_record import Tuned

_DEVICES = ("auto", "cpu", "cuda", "numpy")  # numpy quantizes without compiled kernels

EXAMPLES = """
Examples:

  bamba-quant convert ./Bamba-9B

  bamba-quant convert ./Bamba-9B --outtype q8_0 --outfile bamba-{ftype}.gguf

  bamba-quant convert ./Bamba-9B --outtype q4_k_m --imatrix imatrix.gguf

  bamba-quant convert ./Bamba-9B --outtype q4_k_m --calibrate calibration.txt

  bamba-quant convert ./Bamba-9B --outtype q4_k_m --tensor-type ssm_out=q6_k

  bamba-quant convert ./Bamba-9B --recipe mix.toml

  bamba-quant convert ./Bamba-9B --outtype q4_k_m --tune calib.txt --tune-device cuda

  bamba-quant convert bamba-BF16.gguf --outtype q5_k_m

  bamba-quant convert ./Bamba-9B/config.json --outtype q4_k_m --dry-run

  bamba-quant convert ./Bamba-9B --split-max-size 4G --outfile shards/bamba.gguf
"""


def _list_types(wanted: bool) -> None:
    if not wanted:
        return
    from bamba_quant.recipes import recipes

    print_table(
        ("type", "matrices", "what it is"), [(known.name, known.default, known.about) for known in recipes()]
    )
    raise typer.Exit


@with_asked_options
def convert(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="Directory with config.json, weights and tokenizer; or a .gguf file."
        ),
    ],
    outfile: Annotated[
        str | None,
        typer.Option(
            "--outfile",
            "-o",
            metavar="PATH",
            help="File to write ({ftype} stands for the type), or a directory. By default llama.cpp's name, "
            "beside the model.",
        ),
    ] = None,
    outtype: Annotated[
        str,
        typer.Option(
            "--outtype",
            "--type",
            help="A type of llama-quantize's, such as q4_k_m (see --list-types), or auto: 16 bits.",
        ),
    ] = "auto",
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.toml|NAME",
            help="A recipe of your own or of allocate's in place of --outtype, or a built-in one (see recipes).",
        ),
    ] = None,
    list_types: Annotated[
        bool,
        typer.Option("--list-types", callback=_list_types, is_eager=True, help="List the types and exit."),
    ] = False,
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Importance matrix of llama-imatrix, .gguf or .dat.")
    ] = None,
    imatrix_strict: opt.ImatrixStrict = False,
    calibrate: opt.Calibrate = None,
    calibrate_chunks: opt.CalibrateChunks = None,
    pure: Annotated[bool, typer.Option("--pure", help="One type for all matrices, no mixture.")] = False,
    output_tensor_type: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Type of output.weight.")
    ] = None,
    token_embedding_type: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Type of token_embd.weight.")
    ] = None,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=TYPE",
            help="Type of tensors by name, GGUF's or Hugging Face's: a regular expression that is searched, as in "
            "llama-quantize, or a glob. The first that matches counts. Repeatable.",
        ),
    ] = None,
    leave_output_tensor: Annotated[
        bool, typer.Option("--leave-output-tensor", help="Leave output.weight in the input's type.")
    ] = False,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Quantize a GGUF that is quantized already, at a loss.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="Device that runs --calibrate: cpu, cuda or auto. Quantizing runs on the CPU.")
    ] = "cpu",
    vocab_only: Annotated[
        bool, typer.Option("--vocab-only", help="Write the vocabulary without weights.")
    ] = False,
    no_vocab: Annotated[
        bool, typer.Option("--no-vocab", help="Write no vocabulary: the file takes token ids.")
    ] = False,
    asked: TuneArguments = TuneArguments(),
    resume: opt.Resume = False,
    dry_run: opt.DryRun = False,
    tensors: opt.Tensors = False,
    split_max_size: Annotated[
        str | None,
        typer.Option(metavar="N(K|M|G)", help="Split into shards of at most this many bytes of weights."),
    ] = None,
    keep_split: Annotated[
        bool, typer.Option("--keep-split", help="Split as the GGUF input is split.")
    ] = False,
    model_name: Annotated[str | None, typer.Option(help="The model's name in the file.")] = None,
    metadata: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON object of general.* keys that override the model card."),
    ] = None,
    pre: Annotated[
        str | None, typer.Option(metavar="NAME", help="llama.cpp's pre-tokenizer, when it is not recognised.")
    ] = None,
    ignore_config_key: opt.IgnoreConfigKey = None,
    ignore_adapter: opt.IgnoreAdapter = False,
    strip_prefix: opt.StripPrefix = "",
    threads: opt.Threads = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.AsJson = False,
) -> None:
    """Convert a checkpoint to a GGUF file, in one pass to its final type.

    In f32 its logits in llama.cpp are the original's; in a quantized type its bytes are those that llama.cpp's own
    quantizer makes of a 16-bit file, unless --tune finds a rounding of its own with logits nearer to the original's.
    Reads safetensors, pytorch_model.bin or GGUF, streams it in bounded memory, and writes the file whole or not at all.
    """
    from bamba_quant.calibration.tuned_output import write_tuned_output
    from bamba_quant.checkpoint.gguf_file import other_splits
    from bamba_quant.checkpoint.imatrix import PlaceholderImatrix
    from bamba_quant.errors import PlanError, did_you_mean, join_names
    from bamba_quant.inference.threads import use_threads
    from bamba_quant.planning.convert import plan_conversion
    from bamba_quant.recipes import TypeOverrides, read_recipe
    from bamba_quant.writers import write_plan
    from bamba_quant.writers.atomic import check_target

    if resume and not asked.tune:
        raise typer.BadParameter("has no effect without --tune", param_hint="--resume")
    opt.check_tensors(tensors, dry_run)
    if vocab_only and no_vocab:
        raise PlanError("--vocab-only and --no-vocab leave nothing to write", fix="give one of them")
    recipe_file = Path(recipe) if recipe and recipe.lower().endswith(".toml") else None
    if recipe and outtype != "auto":
        raise PlanError("--recipe and --outtype exclude each other", fix="give one of them")
    overrides = TypeOverrides(
        output_tensor_type=output_tensor_type,
        token_embedding_type=token_embedding_type,
        tensor_types=tuple(map(_tensor_type, tensor_type or ())),
        pure=pure,
        leave_output_tensor=leave_output_tensor,
    )
    opt.check_one_imatrix(imatrix, calibrate, calibrate_chunks)
    if device not in _DEVICES:
        what = f"unknown device{did_you_mean(device, _DEVICES)}"
        raise PlanError(what, found=repr(device), expected="one of " + ", ".join(_DEVICES))
    if device == "cuda" and not calibrate:
        opt.print_note("--device cuda has no effect without --calibrate: quantizing runs on the CPU")
    reading = opt.read_options(ignore_config_key, ignore_adapter, strip_prefix)
    plan_with = partial(
        plan_conversion,
        model,
        outtype=read_recipe(recipe_file) if recipe_file else recipe or outtype,
        outfile=outfile,
        overrides=overrides,
        imatrix_strict=imatrix_strict,
        allow_requantize=allow_requantize,
        keep_split=keep_split,
        split_max_bytes=opt.parse_size(split_max_size, "--split-max-size") if split_max_size else None,
        model_name=model_name,
        metadata=metadata,
        pre=pre,
        vocab=not no_vocab,
        vocab_only=vocab_only,
        allow_config_only=dry_run,
        reading=reading,
    )
    plan = plan_with(imatrix=PlaceholderImatrix() if calibrate else imatrix)
    if calibrate and all(row.format.dtype is not None for row in plan.rows):
        raise PlanError(
            "nothing to calibrate: no tensor is quantized",
            found=plan.recipe,
            fix="choose a type such as q4_k_m, or leave out --calibrate",
        )
    if dry_run:
        print_conversion(plan, tensors, as_json)
        return
    tuning = asked.plan(plan.outfile, resume=resume, overwrite=overwrite)
    announce_outputs(*plan.paths(plan.outfile), unfinished=tuning.options.state if tuning else None)
    path = plan.checkpoint.path
    read = [path, *plan.checkpoint.files]
    if path.is_dir():
        read = [each for each in path.iterdir() if each.suffix != ".gguf"]
    others = [*read, *(calibrate or ()), *filter(None, (imatrix, metadata, recipe_file))]
    started = time.monotonic()
    if calibrate or tuning:
        use_threads(threads)
    if calibrate:
        for file in plan.paths(plan.outfile):
            check_target(file, overwrite, others)
        measured = calibrate_imatrix(
            path, calibrate, calibrate_chunks, device, reading, strict=imatrix_strict
        )
        plan = plan_with(imatrix=measured)
    writing: dict[str, Any] = {
        "threads": threads,
        "compiled": device != "numpy",
        "overwrite": overwrite,
        "inputs": others,
    }
    tuned: Tuned | None = None
    with Progress("converting", plan.work_bytes) as bar, Progress("tuning: step") as steps:
        writing["progress"] = bar.advance
        if tuning is None:
            written = write_plan(plan, plan.outfile, **writing)
        else:
            tell = show_tuning(steps, bar)
            written, tuned = write_tuned_output(
                plan, plan.outfile, tuning, **writing, reading=reading, tell=tell, note=opt.print_note
            )
    seconds = time.monotonic() - started
    found = written_as_json(written, seconds)
    notes = notes_of(plan, by_role=not as_json)
    if stale := other_splits(written):
        notes.append(f"shards of another split of this name are still there: {join_names(stale)}")
    if as_json:
        print_json({**found, **summary(plan), "notes": notes, **tuned_as_json(tuned)})
        return
    for note in notes:
        echo(f"note: {note}", err=True)
    print_tuned(tuned)
    for file in written:
        echo(file)
    echo(
        f"{len(plan.rows)} tensors, {count(plan.elements)} weights, {size(found['bytes'])}, "
        f"{plan.bits_per_weight:.2f} bits per weight, {seconds:.1f} s",
        err=True,
    )


def _tensor_type(text: str) -> tuple[str, str]:
    pattern, sign, name = text.rpartition("=")
    if not (pattern and sign and name):
        raise typer.BadParameter(
            f"{text!r} is not PATTERN=TYPE, such as ssm_out=q6_k or out_proj=q6_k", param_hint="--tensor-type"
        )
    return pattern, name
