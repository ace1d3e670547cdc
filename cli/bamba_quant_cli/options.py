"""Options that several commands share, each declared once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bamba_quant.hub import local_path
from bamba_quant_cli.console import echo

if TYPE_CHECKING:
    from bamba_quant.checkpoint import ReadOptions

_ACTIVATIONS = ("auto", "none", "checkpoint", "llama.cpp")
_OLD_ACTIVATIONS = {"exact": "none", "file": "checkpoint"}  # old names, still accepted


def _activations(value: str) -> str:
    value = _OLD_ACTIVATIONS.get(value, value)
    if value not in _ACTIVATIONS:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(map(repr, _ACTIVATIONS))}.")
    return value


Activations = Annotated[
    str,
    typer.Option(
        parser=_activations,
        metavar=f"<{'|'.join(_ACTIVATIONS)}>",
        autocompletion=lambda: list(_ACTIVATIONS),
        help="How the inputs of each matrix are rounded. none: not at all; llama.cpp: as its CPU backend does; "
        "checkpoint: as each checkpoint says, FP8 and FP4 by its configuration (FP8 on a GPU in bfloat16 by products), "
        "GGUF as llama.cpp; auto: llama.cpp if all models are GGUF, else none.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Backend = Annotated[
    str,
    typer.Option(
        help="Implementation of the operations: torch, numba (CPU, float32), triton and mamba-ssm (GPU), or auto: "
        "triton on a GPU, numba on a CPU in float32 except for small evaluations, else torch; for perplexity also "
        "numpy, the slow reference."
    ),
]
Device = Annotated[str, typer.Option(help="torch's name of the device.")]
Chunks = Annotated[int | None, typer.Option(help="Chunks at most; by default the whole text.")]
Ctx = Annotated[int, typer.Option("--ctx", "-c", help="Tokens of a chunk.")]
ScoredCtx = Annotated[int, typer.Option("--ctx", "-c", help="Tokens of a chunk; its second half is scored.")]
Texts = Annotated[
    list[Path] | None,
    typer.Option("--text", "-f", metavar="FILE", help="UTF-8 text, plain or .xz. Repeatable."),
]
Calibrate = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="TEXT",
        help="Measure the importance matrix on this text first (UTF-8, plain or .xz), instead of --imatrix. "
        "Repeatable.",
    ),
]
KvCache = Annotated[
    Literal["fp8"] | None,
    typer.Option(
        help="Add scales for a cache of keys and values in FP8, as compressed-tensors defines them: two for each "
        "attention layer, measured on the texts of --calibrate."
    ),
]
CacheTypes = Annotated[
    str,
    typer.Option(
        metavar="TYPE,…",
        help="Evaluate the candidates with keys and values stored as bf16, fp16, fp8 (e4m3), int8, q8_0 or f32; each "
        "of several.",
    ),
]
StateTypes = Annotated[
    str,
    typer.Option(
        metavar="TYPE,…",
        help="Evaluate the candidates with the recurrent state stored after each token as bf16, fp16, fp8, "
        "fp8-unscaled, int8 or f32; behind a type -stochastic rounds up or down at random (--seed). Each of several, "
        "with each --cache-type.",
    ),
]
CalibrateChunks = Annotated[
    int | None, typer.Option(help="Chunks of 512 tokens of --calibrate's texts at most; by default all.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan by roles and write nothing.")]
Tensors = Annotated[bool, typer.Option("--tensors", help="With --dry-run, list every tensor.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16", "float64"], typer.Option(help="Type to compute in.")
]
Directory = Annotated[
    Path, typer.Argument(metavar="OUT_DIR", help="Directory to write: a new name, or an empty directory.")
]
HuggingFaceModel = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="A checkpoint directory that is not quantized, or org/name on the Hub; for a --dry-run its config.json is "
        "enough.",
    ),
]
IgnoreConfigKey = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY",
        help="Accept this unknown key of config.json: you know that it changes no logit. Repeatable.",
    ),
]
IgnoreAdapter = Annotated[
    bool,
    typer.Option(
        "--ignore-adapter",
        help="Read the base model where an adapter is stored beside it, without the adapter.",
    ),
]
Imatrix = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Importance matrix of llama-imatrix, .gguf or .dat: weighs each column's errors."
    ),
]
ImatrixStrict = Annotated[
    bool,
    typer.Option(
        "--imatrix-strict",
        help="Make a tensor without an entry in the importance matrix an error, not a note.",
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ROLE|GLOB|hybrid|FILE.toml",
        help="Do not quantize these matrices: a role such as ssm_in, a glob of Hugging Face's or GGUF's names such as "
        "out_proj or '*.layers.0.*', hybrid: attention and the Mamba layer before it, or a list of allocate --scheme. "
        "Repeatable.",
    ),
]
OldIgnore = Annotated[list[str] | None, typer.Option("--keep", hidden=True)]  # the old name of --ignore
MaxShardSize = Annotated[
    str, typer.Option(metavar="N(K|M|G)", help="Split the weights into files of at most this many bytes.")
]
Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", help="A checkpoint directory, a .gguf file, or org/name on the Hub; also -m MODEL."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output file.")]
OtherDtype = Annotated[
    Literal["bf16", "stored"],
    typer.Option(
        "--dtype",
        help="Type of the tensors that are not quantized: bf16, or stored, their type in the input. A_log, D and "
        "dt_bias always keep theirs.",
    ),
]
OverwriteDirectory = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing model directory as a whole.")
]
Processes = Annotated[
    int,
    typer.Option(
        min=1,
        help="Split the text among this many processes, with --device cuda each on its own GPU; the figures are those "
        "of one process. A part has at least some thousand tokens. On several machines, start them with torchrun.",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run of the same command.")]
StreamFromHub = Annotated[
    bool,
    typer.Option(
        "--stream-from-hub",
        help="Fetch the files of a model of the Hub one by one and remove each when it is done: the disk needs room "
        "for the output and one of them.",
    ),
]
StripPrefix = Annotated[
    str,
    typer.Option(metavar="PREFIX", help="Remove this from the start of tensor names, such as _orig_mod."),
]
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", min=1, help="Threads; by default one a processor.")
]
Tokenizer = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Take the tokenizer of this checkpoint instead.")
]
Weights = Annotated[
    Literal["auto", "converted", "stored"],
    typer.Option(
        help="How weights are held in memory. converted: in --dtype; stored: matrices as in the file, dequantized when "
        "they are used, on a CPU; auto: converted on a GPU or where that takes at most half of the free memory, "
        "else stored."
    ),
]


def model_path(model: Path, *, headers: bool, stream: bool, several_times: Mapping[str, object]) -> Path:
    """MODEL, a path or a name on the Hub, as a path; with ``headers`` or ``stream`` without weights.

    Raises ``PlanError`` for a ``stream`` of a path, and with ``several_times``, options that read weights repeatedly.
    """
    from bamba_quant.errors import PlanError

    if stream and (model.exists() or model.is_symlink()):
        raise PlanError(
            "--stream-from-hub is for models of the Hub", found=model, fix="leave it out: this is a path"
        )
    if stream and (given := [option for option, value in several_times.items() if value]):
        raise PlanError(
            f"{given[0]} reads the weights several times, --stream-from-hub fetches them once",
            fix="leave one of them out",
        )
    return local_path(model, headers=headers or stream)


def check_tensors(tensors: bool, dry_run: bool) -> None:
    """Raise ``BadParameter`` for --tensors without --dry-run."""
    if tensors and not dry_run:
        raise typer.BadParameter("has no effect without --dry-run", param_hint="--tensors")


def check_one_imatrix(
    imatrix: Path | None, calibrate: list[Path] | None, chunks: int | None, kv_cache: str | None = None
) -> None:
    """Raise ``PlanError`` for options about calibration that do not go together."""
    from bamba_quant.errors import PlanError

    if imatrix and calibrate:
        raise PlanError("--imatrix and --calibrate exclude each other", fix="give --imatrix or --calibrate")
    if kv_cache and not calibrate:
        raise PlanError(
            "the scales of a cache are measured on a text",
            found="--kv-cache without --calibrate",
            fix="give a text with --calibrate",
        )
    if chunks is not None and not calibrate:
        raise PlanError(
            "--calibrate-chunks has no effect without --calibrate", fix="give one with --calibrate"
        )


_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9}


def read_options(ignore_config_key: list[str] | None, ignore_adapter: bool, strip_prefix: str) -> ReadOptions:
    """How a MODEL is read, from the options of this command line."""
    from bamba_quant.checkpoint import ReadOptions

    return ReadOptions(tuple(ignore_config_key or ()), ignore_adapter, strip_prefix)


def print_note(note: str) -> None:
    """A note on stderr."""
    echo(f"note: {note}", err=True)


def parse_size(text: str, option: str) -> int:
    """llama.cpp's sizes: a whole number with K, M or G for thousands, millions or thousands of millions."""
    match = re.fullmatch(r"(\d+)([KMG])", text)
    if match is None or int(match[1]) == 0:
        raise typer.BadParameter(
            f"invalid size {text!r}; write a whole number and K, M or G, such as 4G", param_hint=option
        )
    return int(match[1]) * _UNITS[match[2]]


def parse_file_size(text: str, option: str) -> int:
    """Bytes of a size such as 5.2GB, 800M or 4GiB."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise typer.BadParameter(f"invalid size {text!r}, such as 5.2GB", param_hint=option)
    number, unit = found.groups()
    power = " KMGT".index(unit.upper() or " ")
    return int(float(number) * (1024 if "i" in text.lower() else 1000) ** power)
