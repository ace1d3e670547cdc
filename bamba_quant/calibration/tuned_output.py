"""Plans a tuning of the rounding, and writes outputs that are tuned: the API to ``calibration.tune``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bamba_quant.calibration.texts import Text, read_texts
from bamba_quant.calibration.tune_options import Tell, TuneOptions
from bamba_quant.calibration.tune_state import is_state
from bamba_quant.calibration.tuned_writer import write_tuned_directory, write_tuned_gguf
from bamba_quant.checkpoint import ReadOptions, open_checkpoint
from bamba_quant.errors import CheckpointError, OutputError, PlanError
from bamba_quant.metadata.tune_record import SELF, Tuned, read_record
from bamba_quant.planning.model import CONFIG
from bamba_quant.planning.plan import Plan

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
            "the state of an interrupted tuning exists",
            where=state,
            fix="continue with --resume, or start again with --overwrite",
        )
    if len(files) < len(texts):
        options = replace(options, self_tokens=options.self_tokens or options.tokens or SELF_TOKENS)
    options = replace(options, state=state, resume=resume and left)
    return Tuning(read_texts(files) if files else (), options)


def write_tuned_output(
    plan: Plan,
    output: Path,
    tuning: Tuning,
    *,
    reading: ReadOptions = ReadOptions(),
    inputs: Collection[Path] = (),
    resume: bool = False,
    tell: Tell = lambda at: None,
    note: Note = lambda note: None,
    **writing: Any,
) -> tuple[tuple[Path, ...], Tuned | None]:
    """Write ``plan`` to the file or directory ``output``, tuned; the files, and what the tuning made.

    ``tell`` is called with the progress of the tuning, ``note`` with what it chose on its own; ``reading`` is that of
    the plan, and ``writing`` other arguments of ``write_plan``. The output is never worse on the held-out text: if
    tuning did not help, it is the untuned one. Raises as ``write_plan`` and ``tune`` do; then no file has appeared.
    """
    from bamba_quant.calibration.tune import tune  # which needs torch, and says so before anything is written

    def tune_output(quantized: Path) -> Tuned:
        return tune(plan.checkpoint.path, quantized, tuning.texts, tuning.options, tell, note, reading)

    if plan.container == "safetensors":
        written = write_tuned_directory(
            plan, output, tune_output, begun=tuning.fingerprint(), resume=resume, **writing
        )
    elif all(row.format.fields is None for row in plan.rows):
        raise PlanError(
            "there is nothing to tune: no tensor is quantized",
            found=plan.recipe,
            fix="choose a type such as q4_k_m",
        )
    else:
        read = {*inputs, *(text.path for text in tuning.texts)}
        written = write_tuned_gguf(plan, output, tune_output, inputs=read, **writing)
    _remove(tuning.options.state)
    return written


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
            "the file for the tuning's state exists and has other content",
            where=state,
            expected="the state of an interrupted tuning, or no file",
            fix="choose another name (--tune-state)",
        )


def _remove(state: Path | None) -> None:
    if state is not None:
        with suppress(OSError):
            state.unlink(missing_ok=True)
