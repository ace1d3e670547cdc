"""The commands that are killed: what they read, what they write, what stood there before, and who reads it."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bamba_quant.calibration import tune
from bamba_quant.checkpoint import open_checkpoint
from bamba_quant.checkpoint.imatrix import read_imatrix
from bamba_quant.embedded import embedded_model
from bamba_quant.evaluation import evaluate
from bamba_quant.releases import make, state
from bamba_quant.report.html import to_html
from bamba_quant.report.json_report import read_report
from bamba_quant.report.markdown import to_markdown
from bamba_quant.writers import commit, directory, resumable
from tests.fuzz.seeds.models import CONFIGS, as_json, drawn, plain, safetensors
from tests.support.conversion import faulty, to_gguf
from tests.support.tuning import tune_quickly

Tree = Mapping[str, bytes | None]  # by path; None is a directory

TINY: dict[str, Any] = {
    **CONFIGS["bamba"], "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 2048,
}  # fmt: skip
SPLIT = 150  # thousand bytes
RELEASE = 'types = ["q8_0"]\nschemes = ["fp8"]\nimatrix_chunks = 1\nctx = 16\nchunks = 2\n'
FIRST = "x-00001-of-00003.gguf"


def tree(place: Path) -> Tree:
    """All files and directories below ``place``."""
    return {
        os.fspath(path.relative_to(place)): path.read_bytes() if path.is_file() else None
        for path in sorted(place.rglob("*"))
    }


def build(place: Path, wanted: Tree) -> None:
    """Make ``place`` hold ``wanted`` and nothing else."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for name, content in wanted.items():
        (place / name).mkdir() if content is None else (place / name).write_bytes(content)


def without_exchange() -> None:
    """As on a file system that cannot exchange two names."""
    directory.exchange = lambda first, second: False


def without_links() -> None:
    """As on a file system without hard links."""

    def refuse(*arguments: Any, **options: Any) -> None:
        sys.audit("os.link", *arguments)
        raise OSError(errno.EPERM, "Operation not permitted")

    os.link = refuse


def shown_directory(found: Tree) -> Tree:
    """What a reader of the model directory ``out`` sees."""
    return {
        name: found[name] for name in found if name.startswith("out/") and not name.startswith("out/.bamba-")
    }


def shown_files(found: Tree) -> Tree:
    """What readers find under the names of the output."""
    hidden = (".partial", ".old", ".bamba-commit", ".tuning")
    return {
        name: content for name, content in found.items() if content is not None and not name.endswith(hidden)
    }


@dataclass(frozen=True)
class Command:
    """``read`` raises when what is there cannot be read; ``restore`` does what the next start does first.

    ``seeds`` are of the models that the old and the new output are made from, ``disturb`` what the system cannot do.
    ``between`` is what else than the old or the new may be seen until the next start: "refused" by readers, or, of
    files that no reader compares, "mixed". ``threads`` says that it leaves threads of torch's behind.
    """

    name: str
    words: Callable[[Path, Path, int], list[str]]  # of inputs, working directory and seed
    read: Callable[[Path], object]
    restore: Callable[[Path], None]
    shown: Callable[[Tree], Tree] = shown_files
    overwrite: tuple[str, ...] = ("--overwrite",)
    again: tuple[str, ...] = ()
    between: str = ""
    threads: bool = False
    before: Callable[[Path], Tree] = lambda inputs: {}
    variants: Mapping[str, Callable[[], None] | None] = field(default_factory=lambda: {"": None})


def inputs(place: Path) -> None:
    """Two tiny models under ``place``, their GGUFs, and such as llama.cpp's converter makes."""
    for seed in (0, 1):
        model = place / f"m{seed}"
        model.mkdir(parents=True)
        (model / "config.json").write_bytes(as_json(TINY))
        (model / "model.safetensors").write_bytes(safetensors(plain(drawn(TINY, seed))))
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(embedded_model() / name, model / name)
        (model / "additional_chat_templates").mkdir()
        (model / "additional_chat_templates" / "tool.jinja").write_text(f"{{{{ messages }}}} {seed}")
        to_gguf(model, place / f"m{seed}.gguf", "bf16")
        faulty(model, place / f"wrong{seed}.gguf", "bf16")
        (place / f"split{seed}").mkdir()
        faulty(model, place / f"split{seed}" / "x.gguf", "bf16", split_max_bytes=1000 * SPLIT)
    (place / "text.txt").write_text("The function returns a value. " * 60)
    (place / "calibration.txt").write_text("The value is a number, and the function returns it. " * 200)
    (place / "release.toml").write_text(RELEASE)
    _freeze_the_record()
    tune.tune = tune_quickly


def _freeze_the_record() -> None:
    """Reports of the same evaluation have the same bytes, whenever and however long it ran."""
    timing, record = evaluate.timing, evaluate.run_record

    def timed(seconds: float, hashing: float, *others: Any) -> Any:
        return dataclasses.replace(
            timing(1.0, 0.0, *others),
            reading=0.0,
            dequantizing=0.0,
            compiling=0.0,
            computing=1.0,
            products=0.0,
            peak_memory=0,
        )

    def recorded(command: str, options: Any, backend: str, started: datetime.datetime, *others: Any) -> Any:
        return record("", options, backend, datetime.datetime(2000, 1, 1), *others)

    evaluate.timing, evaluate.run_record = timed, recorded
    made, write = state.made_file, state.write_record
    state.made_file = lambda *given: dataclasses.replace(made(*given), mtime_ns=0)
    make.write_record = lambda *given: write(*given[:-1], 0.0)


def _read_reports(work: Path) -> None:
    found = read_report(work / "rep" / "report.json")
    for name, text in (("report.md", to_markdown(found)), ("report.html", to_html(found))):
        file = work / "rep" / name
        if not file.exists() or file.read_text("utf-8") != text:
            raise AssertionError(f"{name} is of another evaluation than report.json")


def _wrong_split(inputs: Path) -> Tree:
    return tree(inputs / "split0")


def _model_command(
    name: str, read: Callable[[Path], object] = lambda work: open_checkpoint(work / "out"), **more: Any
) -> Command:
    return Command(
        name,
        read=read,
        restore=lambda work: resumable.settle(work / "out"),
        shown=shown_directory,
        variants={"": None, "no exchange": without_exchange},
        **more,
    )


def _file_command(name: str, first: str, **more: Any) -> Command:
    return Command(
        name,
        read=more.pop("read", lambda work: open_checkpoint(work / first)),
        restore=lambda work: commit.restore(work / first),
        variants={"": None, "no links": without_links},
        **more,
    )


COMMANDS = (
    _file_command(
        "convert",
        "x.gguf",
        words=lambda i, w, seed: ["convert", f"{i}/m{seed}", "--outfile", f"{w}/x.gguf"],
    ),
    _file_command(
        "convert, split",
        "x.gguf",
        words=lambda i, w, seed: [
            "convert", f"{i}/m{seed}", "--outtype", "bf16", "--outfile", f"{w}/x.gguf", "--split-max-size", f"{SPLIT}K",
        ],
        read=lambda work: open_checkpoint(work / FIRST),
        between="refused",
    ),
    _file_command(
        "convert --tune",
        "x.gguf",
        words=lambda i, w, seed: [
            "convert", f"{i}/m{seed}", "--outtype", "q8_0", "--outfile", f"{w}/x.gguf", "--tune", f"{i}/text.txt",
        ],
        again=("--resume",),
    ),
    _model_command(
        "int4 --tune",
        words=lambda i, w, seed: [
            "int4", f"{i}/m{seed}", f"{w}/out", "--group-size", "32", "--tune", f"{i}/text.txt",
        ],
        again=("--resume",),
    ),
    _model_command("fp8", words=lambda i, w, seed: ["fp8", f"{i}/m{seed}", f"{w}/out"], again=("--resume",)),
    _model_command(
        "int4",
        words=lambda i, w, seed: [
            "int4", f"{i}/m{seed}", f"{w}/out", "--group-size", "32", "--max-shard-size", "200K",
        ],
        again=("--resume",),
    ),
    _file_command(
        "repair",
        "x.gguf",
        words=lambda i, w, seed: ["repair", f"{i}/wrong{seed}.gguf", "--outfile", f"{w}/x.gguf"],
    ),
    _file_command(
        "repair --in-place",
        "x.gguf",
        words=lambda i, w, seed: ["repair", f"{w}/x.gguf", "--in-place"],
        before=lambda inputs: {"x.gguf": (inputs / "wrong0.gguf").read_bytes()},
    ),
    _file_command(
        "repair --in-place, split",
        "x.gguf",
        words=lambda i, w, seed: ["repair", f"{w}/{FIRST}", "--in-place"],
        read=lambda work: open_checkpoint(work / FIRST),
        before=_wrong_split,
        between="refused",
    ),
    _file_command(
        "imatrix",
        "x.gguf",
        words=lambda i, w, seed: [
            "imatrix", f"{i}/m{seed}", "--text", f"{i}/text.txt", "--ctx", "16", "--chunks", "2", "--outfile",
            f"{w}/x.gguf",
        ],
        read=lambda work: read_imatrix(work / "x.gguf"),
        threads=True,
    ),
    _model_command("export", words=lambda i, w, seed: ["export", f"{i}/m{seed}.gguf", f"{w}/out"], again=("--resume",)),
    Command(
        "evaluate --report-dir",
        words=lambda i, w, seed: [
            "evaluate", f"{i}/m{seed}", f"{i}/m0.gguf", "--text", f"{i}/text.txt", "--ctx", "16", "--chunks", "2",
            "--resamples", "1000", "--noise-floor", "none", "--drift-chunks", "0", "--backend", "torch",
            "--report-dir", f"{w}/rep",
        ],
        read=_read_reports,
        restore=lambda work: commit.restore(*(work / "rep" / f"report.{kind}" for kind in ("json", "md", "html"))),
        between="mixed",
        threads=True,
        variants={"": None, "no links": without_links},
    ),
    Command(
        "release",
        words=lambda i, w, seed: [
            "release", f"{i}/m{seed}", f"{w}/rel", "--name", "m", "--preset", f"{i}/release.toml",
            "--text", f"{i}/text.txt", "--calibrate", f"{i}/calibration.txt",
        ],
        read=lambda work: None,
        restore=lambda work: None,
        shown=lambda found: {},  # its parts are those of the commands above; what matters is what it ends with
        threads=True,
    ),
)  # fmt: skip
