"""``bamba-quant demo``: the main job, done on the model that travels with the package."""

from __future__ import annotations

import hashlib
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from bamba_quant_cli.console import Progress, echo
from bamba_quant_cli.evaluate import show_evaluation
from bamba_quant_cli.evaluation_screen import print_screen
from bamba_quant_cli.interrupts import set_interrupt_message
from bamba_quant_cli.terminal import echo_wrapped

EXAMPLES = """
Examples:

  bamba-quant demo

  bamba-quant demo --out /somewhere/else
"""

# Formats by the names of their recipes and schemes: GGUF, FP8, int4.
KINDS = ("bf16", "q8_0", "q4_k_m", "fp8-dynamic", "w4a16-g128")
_CONTEXT, _CHUNKS = 256, 32


def demo(
    out: Annotated[Path, typer.Option(help="Directory for the files it makes.")] = Path("demo"),
) -> None:
    """Convert the embedded bamba-mini to GGUF, FP8 and int4, and report what each file lost against the original.

    The text is Python's own help; figures are llama-perplexity's, by the reference forward pass. In the directory,
    files of an earlier demo are replaced, and no others. Without torch the files are made and not evaluated.
    """
    from bamba_quant.embedded import embedded_model
    from bamba_quant.errors import OutputError
    from bamba_quant.writers.candidates import make_candidate, plan_candidate

    if out.exists() and not out.is_dir():
        raise OutputError("--out exists already and is not a directory", where=out)
    set_interrupt_message(
        lambda: f"the files made so far are in {out}" if out.is_dir() else "nothing written"
    )
    out.mkdir(parents=True, exist_ok=True)
    source = embedded_model()
    text, report = out / "python-help.txt", out / "report"
    demo_files = DemoFiles(out)
    demo_files.check([text, report, *(plan_candidate(source, kind, out)[1] for kind in KINDS)])
    files = []
    for number, kind in enumerate(KINDS, start=1):
        with Progress("") as bar:
            bar.say(f"making {kind} ({number} of {len(KINDS)})")
            files.append(make_candidate(source, kind, out))
        demo_files.add(files[-1])
        echo(f"made {files[-1]}", err=True)
    if find_spec("torch") is None:
        echo(
            f"The files are in {out}. Evaluating them needs torch: pip install 'bamba-quant[torch]'", err=True
        )
        return
    from bamba_quant.evaluation.evaluate import evaluate
    from bamba_quant.evaluation.run import EvaluationOptions
    from bamba_quant.report.write import write_reports

    write_text(text, help_text())
    demo_files.add(text)
    echo(f"evaluating them on {_CHUNKS} chunks of {_CONTEXT} tokens of {text}", err=True)
    # As it was called: make demo runs it from an environment that is not activated.
    command = "bamba-quant" if shutil.which("bamba-quant") else sys.argv[0]
    again = [command, "evaluate", source, *files, "--text", text, "--ctx", _CONTEXT, "--chunks", _CHUNKS]
    with Progress("") as bar:
        bar.say("reading models and text")
        evaluation = evaluate(
            source,
            files,
            text,
            EvaluationOptions(ctx=_CONTEXT, chunks=_CHUNKS),
            command=shlex.join(map(str, again)),
            progress=show_evaluation(bar),
        )
    reports = write_reports(evaluation, report, overwrite=True, inputs=[source, *files, text])
    demo_files.add(report)
    echo(f"{evaluation.base.label}: {evaluation.base.weights:,} weights, trained for this project")
    print_screen(evaluation)
    echo()
    echo("With intervals, drift by layer and every tensor, in a browser:")
    echo(f"  {reports.html}")
    echo()
    echo_wrapped(
        f"The files are in {out}. GGUF runs in llama.cpp as it is, directories in transformers. Try also:"
    )
    smallest = shlex.quote(
        str(min(files, key=lambda path: path.stat().st_size if path.is_file() else 1 << 60))
    )
    echo(f"  {shlex.quote(command)} inspect {smallest} --tensors")
    echo(f'  {shlex.quote(command)} generate {smallest} --prompt "The function"')


class DemoFiles:
    """The files that demos made in a directory, by their SHA-256 in ``demo.sha256``, as sha256sum lists them."""

    def __init__(self, directory: Path) -> None:
        from bamba_quant.files.reading import read_text

        self._directory, self._list = directory, directory / "demo.sha256"
        self._known = self._list.is_file() and not self._list.is_symlink()
        self._lines = read_text(self._list, "what demos made").splitlines() if self._known else []

    def check(self, places: Sequence[Path]) -> None:
        """Raise ``OutputError`` where one of ``places``, or a file in it, is there and no demo made it."""
        from bamba_quant.errors import OutputError

        for file in self._files([*places, *([] if self._known else [self._list])]):
            if not file.is_file() or self._line(file) not in self._lines:
                raise OutputError(
                    "a file exists that no demo made, or that was changed since",
                    where=file,
                    fix="move it away, or give another directory with --out",
                )

    def add(self, place: Path) -> None:
        """List the files of ``place``, at once, so that a later demo knows them after an interrupt too."""
        more = [self._line(file) for file in self._files([place])]
        replaced = {line.partition("  ")[2] for line in more}
        self._lines = [line for line in self._lines if line.partition("  ")[2] not in replaced] + more
        write_text(self._list, "".join(f"{line}\n" for line in self._lines))

    def _files(self, places: Sequence[Path]) -> Iterator[Path]:
        for place in places:
            if place.is_dir() and not place.is_symlink():
                yield from self._files(sorted(place.iterdir()))
            elif place.exists() or place.is_symlink():
                yield place

    def _line(self, file: Path) -> str:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return f"{digest}  {file.relative_to(self._directory).as_posix()}"


def write_text(file: Path, text: str) -> None:
    """Replace ``file`` as a whole."""
    from bamba_quant.writers.atomic import atomic_files

    raw = text.encode("utf-8")
    with (
        atomic_files([(file, len(raw))], overwrite=True) as (descriptor,),
        open(descriptor, "wb", closefd=False) as stream,
    ):
        stream.write(raw)


def help_text() -> str:
    """Python's own help on its language, in the order of its topics."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))[: 16 * _CONTEXT * _CHUNKS]
