"""What the commands do, as functions. Paths are strings or ``Path``, one or a list; errors are ``BambaQuantError``.

``imatrix``, ``tune``, ``evaluate`` and running a loaded model need torch (``pip install bamba-quant[torch]``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bamba_quant.checkpoint import ReadOptions

if TYPE_CHECKING:
    from bamba_quant.calibration.imatrix import Measured
    from bamba_quant.evaluation.gates import Limit
    from bamba_quant.evaluation.result import Evaluation
    from bamba_quant.inference.loading import LoadedModel
    from bamba_quant.metadata.tune_record import Tuned
    from bamba_quant.planning.inspection import Inspection
    from bamba_quant.planning.plan import Plan

StrPath = str | Path
StrPaths = StrPath | Sequence[StrPath]


def convert(
    model: StrPath,
    outfile: StrPath | None = None,
    *,
    outtype: str = "auto",
    imatrix: StrPath | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    **options: Any,
) -> tuple[Path, ...]:
    """Convert ``model``, a Hugging Face directory or a GGUF file, to GGUF; return the files, several if it is split.

    ``outfile`` is a file (``{ftype}`` in its name stands for the type) or a directory, by default llama.cpp's name
    beside the model. ``outtype`` is a recipe's name such as "q4_k_m", or "auto" for 16 bits; ``imatrix`` a file of
    llama-imatrix. Other ``options`` are arguments of ``planning.convert.plan_conversion``. Raises ``PlanError`` for
    what llama.cpp could not run, ``OutputError`` for a file that exists unless ``overwrite``.
    """
    plan = _plan_gguf(model, outfile, outtype, imatrix, options)
    from bamba_quant.writers import write_plan

    return write_plan(plan, plan.outfile, threads=threads, overwrite=overwrite)


def quantize(
    model: StrPath,
    directory: StrPath,
    scheme: str = "fp8-dynamic",
    *,
    ignore: str | Sequence[str] = (),
    imatrix: StrPath | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    **options: Any,
) -> tuple[Path, ...]:
    """Quantize ``model``, a Hugging Face directory, to ``directory`` for transformers and vLLM; return its files.

    ``scheme`` is a name such as "fp8-dynamic", "fp8-tensor", "w4a16-g128", "torchao-int4-g128", "nvfp4a16" or
    "mxfp4a16", a mixture such as "hybrid-nvfp4", or "fp8", "int4" or "fp4" for what these commands write by default.
    ``ignore`` names matrices that stay:
    roles, globs of Hugging Face's or GGUF's names, or "hybrid". Other ``options`` are arguments of
    ``planning.quantize.plan_quantization``.
    Raises ``PlanError`` for a model that the scheme cannot hold, ``OutputError`` for a directory that is not empty
    unless ``overwrite``, or ``resume`` after an interrupted run.
    """
    from bamba_quant.writers import write_plan

    plan = _plan_directory(model, scheme, ignore, imatrix, options)
    return write_plan(plan, Path(directory), threads=threads, overwrite=overwrite, resume=resume)


def tune(
    model: StrPath,
    output: StrPath,
    texts: StrPaths = "self",
    *,
    outtype: str | None = None,
    scheme: str | None = None,
    ignore: str | Sequence[str] = (),
    imatrix: StrPath | None = None,
    overwrite: bool = False,
    resume: bool = False,
    tune_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[tuple[Path, ...], Tuned | None]:
    """``convert`` to ``outtype``, or ``quantize`` to ``scheme``, with rounding tuned on ``texts``.

    ``texts`` are UTF-8 files, or "self" for text that the model writes. ``tune_options`` are fields of
    ``calibration.tune_options.TuneOptions``. Returns the files, and what tuning found: on held-out text the output is
    never worse than untuned. Raises ``TuneError`` for models and texts that cannot be tuned on, and the errors of
    ``convert`` and ``quantize``; ``ValueError`` unless one of ``outtype`` and ``scheme`` is given.
    """
    from bamba_quant.calibration.tune_options import TuneOptions
    from bamba_quant.calibration.tuned_output import plan_tuning, write_tuned_output

    if (outtype is None) == (scheme is None):
        raise ValueError("give outtype for a GGUF file, or scheme for a directory")
    output = Path(output)
    if outtype is not None:
        plan = _plan_gguf(model, output, outtype, imatrix, options)
        output = plan.outfile
    else:
        plan = _plan_directory(model, str(scheme), ignore, imatrix, options)
    wanted = TuneOptions(**(tune_options or {}))
    words = [texts] if isinstance(texts, str | Path) else texts
    tuning = plan_tuning(words, wanted, output=output, resume=resume, overwrite=overwrite)
    return write_tuned_output(plan, output, tuning, overwrite=overwrite, resume=resume)


def imatrix(
    model: StrPath,
    texts: StrPaths,
    outfile: StrPath = "imatrix.gguf",
    *,
    overwrite: bool = False,
    **options: Any,
) -> Measured:
    """Measure the importance matrix of ``model`` on UTF-8 ``texts``, plain or .xz, and write it as llama-imatrix does.

    A name that ends in .dat gives the older format. ``options`` are arguments of
    ``calibration.imatrix.measure_imatrix``, such as ``ctx``, ``chunks``, ``device`` and ``merge``. Raises
    ``CheckpointError`` for texts that cannot be read, ``OutputError`` for a file that exists unless ``overwrite``.
    """
    from bamba_quant.calibration.imatrix import measure_imatrix
    from bamba_quant.calibration.imatrix_writer import check_imatrix_target, write_imatrix

    files, target = _paths(texts), Path(outfile)
    check_imatrix_target(target, overwrite=overwrite, inputs=files)
    measured = measure_imatrix(model, files, **options)
    write_imatrix(measured.sums, target, overwrite=overwrite, inputs=files)
    return measured


def evaluate(
    base: StrPath,
    candidates: StrPaths,
    text: StrPath | None = None,
    *,
    report_dir: StrPath | None = None,
    gates: StrPath | None = None,
    limits: Sequence[Limit] = (),
    **options: Any,
) -> Evaluation:
    """Measure what ``candidates`` lost against ``base`` on a UTF-8 ``text``: perplexity, divergence, drift.

    Models are directories or GGUF files; ``base`` may be a file of llama-perplexity's logits, which has its own text.
    ``gates`` is a TOML file of limits by recipe, ``limits`` hold for every candidate. ``report_dir`` gets report.json,
    report.md and report.html. ``options`` are fields of ``evaluation.run.EvaluationOptions``. A notebook shows the
    result as a table and a picture. Raises ``ComparisonError`` for models that do not belong together, ``GateError``
    for limits that cannot be tested.
    """
    from bamba_quant.evaluation.evaluate import evaluate as measure
    from bamba_quant.evaluation.gates import read_gates
    from bamba_quant.evaluation.run import EvaluationOptions
    from bamba_quant.report.html import NotebookEvaluation
    from bamba_quant.report.write import prepared_directory, write_reports

    chosen = EvaluationOptions(**options)
    models = _paths(candidates)
    words = Path(text) if text else None
    inputs = [Path(base), *models, *([words] if words else [])]
    with ExitStack() as stack:
        if report_dir:
            stack.enter_context(prepared_directory(report_dir, overwrite=chosen.overwrite, inputs=inputs))
        sections = read_gates(Path(gates)) if gates else None
        evaluation = measure(Path(base), models, words, chosen, gates=sections, limits=limits)
    if report_dir:
        write_reports(evaluation, report_dir, overwrite=chosen.overwrite, inputs=inputs)
    return NotebookEvaluation(**vars(evaluation))


def inspect(path: StrPath) -> Inspection:
    """Architecture, layers, number formats, sizes and metadata of a directory or a GGUF file, from headers alone.

    Raises ``CheckpointError`` for a file that is not what it claims to be.
    """
    from bamba_quant.planning.inspection import inspect_path

    return inspect_path(path)


def repair(
    file: StrPath, outfile: StrPath | None = None, *, threads: int | None = None, overwrite: bool = False
) -> tuple[Path, ...]:
    """Correct the order of the q and k rows in a Bamba GGUF of llama.cpp's converter; return the files written.

    ``outfile`` is by default the input's name with -repaired. Raises ``CheckpointError`` for a file that does not need
    it, ``OutputError`` for a file that exists unless ``overwrite``.
    """
    from bamba_quant.checkpoint.gguf_file import split_stem
    from bamba_quant.planning.repair import plan_repair
    from bamba_quant.writers import write_plan

    stem = split_stem(Path(file))
    target = Path(outfile) if outfile else stem.with_name(f"{stem.name}-repaired.gguf")
    return write_plan(plan_repair(Path(file)), target, threads=threads, overwrite=overwrite)


def export(
    file: StrPath,
    directory: StrPath,
    *,
    threads: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    **options: Any,
) -> tuple[Path, ...]:
    """Export a GGUF file to a Hugging Face directory; return its files.

    ``options`` are arguments of ``planning.export.plan_export``: ``dtype``, ``max_shard_bytes`` and ``vocab``. Raises
    ``PlanError`` for a file that cannot be exported, ``OutputError`` for a directory that is not empty.
    """
    from bamba_quant.planning.export import plan_export
    from bamba_quant.writers import write_plan

    plan = plan_export(file, **options)
    return write_plan(plan, Path(directory), threads=threads, overwrite=overwrite, resume=resume)


def load_model(path: StrPath, *, reading: ReadOptions = ReadOptions()) -> LoadedModel:
    """Configuration and weights of a directory or a GGUF file; a weight is read when it is looked up.

    Raises ``ArchitectureError`` for an architecture that is not supported, ``CheckpointError`` for damaged files.
    """
    from bamba_quant.inference.loading import load_model as load

    return load(path, reading=reading)


def _paths(given: StrPaths) -> list[Path]:
    return [Path(each) for each in ([given] if isinstance(given, str | Path) else given)]


def _plan_gguf(
    model: StrPath,
    outfile: StrPath | None,
    outtype: str,
    imatrix: StrPath | None,
    options: Mapping[str, Any],
) -> Plan:
    from bamba_quant.planning.convert import plan_conversion

    weights = Path(imatrix) if imatrix else None
    return plan_conversion(model, outtype=outtype, outfile=outfile, imatrix=weights, **options)


def _plan_directory(
    model: StrPath,
    scheme: str,
    ignore: str | Sequence[str],
    imatrix: StrPath | None,
    options: Mapping[str, Any],
) -> Plan:
    from bamba_quant.checkpoint.imatrix import read_imatrix
    from bamba_quant.planning.quantize import plan_quantization

    weights = read_imatrix(Path(imatrix)) if imatrix else None
    keep = [ignore] if isinstance(ignore, str) else ignore
    return plan_quantization(model, scheme, keep=keep, imatrix=weights, **options)
