"""Files whose rounding is tuned end to end: the library's front door to ``calibration.tune`` and its writers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bamba_quant.calibration.texts import Text, read_texts
from bamba_quant.calibration.tune_options import Tell, TuneOptions
from bamba_quant.calibration.tune_state import is_state
from bamba_quant.checkpoint import ReadOptions, open_checkpoint
from bamba_quant.errors import CheckpointError, OutputError, PlanError
from bamba_quant.metadata.tune_record import SELF, Tuned, read_record
from bamba_quant.planning.convert import Conversion
from bamba_quant.planning.model import CONFIG
from bamba_quant.planning.quantize import Quantization
from bamba_quant.writers.tasks import Progress
from bamba_quant.writers.tuned import Tune, write_tuned_gguf, write_tuned_quantized

Note = Callable[[str], None]

SELF_TOKENS = 500_000  # that a model writes unless it is told how many


@dataclass(frozen=True)
class Tuning:
    """On which texts rounding is tuned, and how."""

    texts: tuple[Text, ...]
    options: TuneOptions

    def fingerprint(self) -> dict[str, Any]:
        """What an interrupted run must have in common with the one that goes on."""
        return self.options.deciding() | {"texts": [text.sha256 for text in self.texts]}


def plan_tuning(
    texts: Sequence[str | Path],
    options: TuneOptions = TuneOptions(),
    *,
    output: Path,
    resume: bool = False,
    overwrite: bool = False,
) -> Tuning:
    """Read ``texts``, files or "self", which stands for text that the model writes; see what was left of ``output``.

    The state of an interrupted tuning is kept in ``options.state``, by default beside ``output``; with ``resume`` it is
    gone on from if there is one. Raises ``CheckpointError`` for a text that cannot be read, and ``OutputError`` for a
    state that was left, unless ``resume`` or ``overwrite``, and for a file there that is not a state.
    """
    files = [Path(text) for text in texts if str(text) != SELF]
    state = options.state or output.with_name(f"{output.name}.tuning")
    if options.state is not None:
        _check_state(state, output)
    if resume and not overwrite and _was_finished(output, state):
        _remove(state)
    left = state.exists()
    if left and not (resume or overwrite):
        raise OutputError(
            "an interrupted run left its tuning",
            where=state,
            fix="go on with --resume, or begin anew with --overwrite",
        )
    if len(files) < len(texts):
        options = replace(options, self_tokens=options.self_tokens or options.tokens or SELF_TOKENS)
    options = replace(options, state=state, resume=resume and left)
    return Tuning(read_texts(files) if files else (), options)


def convert_tuned(
    conversion: Conversion,
    tuning: Tuning,
    *,
    reading: ReadOptions = ReadOptions(),
    threads: int | None = None,
    compiled: bool = True,
    overwrite: bool = False,
    inputs: Collection[Path] = (),
    progress: Progress = lambda n_bytes: None,
    tell: Tell = lambda at: None,
    note: Note = lambda note: None,
) -> tuple[tuple[Path, ...], Tuned]:
    """Write the GGUF that ``conversion`` plans, tuned; the files, and what the tuning made.

    ``progress`` is told input bytes that are quantized, ``tell`` how the tuning goes, ``note`` what it chose on its
    own; ``reading`` is ``plan_conversion``'s, and other arguments are ``write_gguf``'s. The file is never worse on the
    text that is held out: where tuning did not help it is the one without. Raises as ``write_gguf`` and ``tune`` do;
    then no file has appeared.
    """
    if all(row.format.fields is None for row in conversion.plan.rows):
        raise PlanError(
            "there is nothing to tune: no tensor is quantized",
            found=conversion.plan.recipe,
            fix="choose a type such as q4_k_m",
        )
    written = write_tuned_gguf(
        conversion.plan,
        conversion.outfile,
        _tune(conversion.source.checkpoint.path, tuning, reading, tell, note),
        threads=threads,
        compiled=compiled,
        overwrite=overwrite,
        inputs={*inputs, *(text.path for text in tuning.texts)},
        progress=progress,
    )
    _remove(tuning.options.state)
    return written


def quantize_tuned(
    plan: Quantization,
    directory: Path,
    tuning: Tuning,
    *,
    reading: ReadOptions = ReadOptions(),
    threads: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = lambda n_bytes: None,
    tell: Tell = lambda at: None,
    note: Note = lambda note: None,
) -> tuple[tuple[Path, ...], Tuned | None]:
    """Write the directory that ``plan`` describes, tuned: ``convert_tuned`` with ``write_quantized``'s arguments."""
    written = write_tuned_quantized(
        plan,
        directory,
        _tune(plan.source.checkpoint.path, tuning, reading, tell, note),
        begun=tuning.fingerprint(),
        threads=threads,
        overwrite=overwrite,
        resume=resume,
        progress=progress,
    )
    _remove(tuning.options.state)
    return written


def _tune(original: Path, tuning: Tuning, reading: ReadOptions, tell: Tell, note: Note) -> Tune:
    from bamba_quant.calibration.tune import tune  # which needs torch, and says so before anything is written

    return lambda quantized: tune(original, quantized, tuning.texts, tuning.options, tell, note, reading)


def _was_finished(output: Path, state: Path) -> bool:
    """Whether a tuned ``output`` came after ``state``, whose run was killed before it could remove that."""
    with suppress(OSError, CheckpointError):
        file = output / CONFIG if output.is_dir() else output
        newer = file.stat().st_mtime_ns >= state.stat().st_mtime_ns
        return newer and read_record(open_checkpoint(output)) is not None
    return False


def _check_state(state: Path, output: Path) -> None:
    """Raise ``OutputError`` where the state cannot be written, or would replace a file that is something else."""
    if state.resolve() == output.resolve():
        raise OutputError(
            "the tuning's state and the output have the same name",
            where=state,
            fix="choose another name (--tune-state)",
        )
    if not state.parent.is_dir():
        raise OutputError(
            "the directory of the tuning's state does not exist", where=state.parent, fix="create it first"
        )
    if (state.exists() or state.is_symlink()) and not is_state(state):
        raise OutputError(
            "the file for the tuning's state is there already and holds something else",
            where=state,
            expected="the state of an interrupted tuning, or no file",
            fix="choose another name (--tune-state)",
        )


def _remove(state: Path | None) -> None:
    if state is not None:
        with suppress(OSError):
            state.unlink(missing_ok=True)
