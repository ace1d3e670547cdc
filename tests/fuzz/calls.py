"""What the commands do with what they are given, as calls of one case."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bamba_quant.calibration.imatrix_writer import write_imatrix
from bamba_quant.checkpoint import open_checkpoint, read_tensor
from bamba_quant.checkpoint.activation_sums import checked_sums, merge_sums
from bamba_quant.checkpoint.imatrix import read_imatrix, read_sums
from bamba_quant.evaluation.models import OpenedModel, describe, files_of, tokenizer_hash
from bamba_quant.inference.loading import load_model
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.export import plan_export
from bamba_quant.planning.inspection import inspect_path
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.planning.repair import plan_repair
from bamba_quant.tokenizers.encoder import read_encoder
from bamba_quant_cli.app import main
from bamba_reference.errors import BambaQuantError
from tests.fuzz.runner import MOST_TEXT, WrongError
from tests.fuzz.seeds.tokenizers import TEXT

# What a terminal obeys: C0 without tab and newline, DEL, C1.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")


def inspected(path: Path) -> None:
    """``inspect``'s figures."""
    found = inspect_path(path)
    _ = found.formats, found.layers, found.attention_layers, found.bits_per_weight, found.remarks
    json.dumps(dict(found.metadata), default=str)


def read_weights(path: Path) -> None:
    """Every tensor of a model, mapped and read, as ``generate`` and ``evaluate`` do."""
    loaded = load_model(path)
    for name in loaded.weights:
        _ = loaded.weights.info(name)
        np.array(loaded.weights[name])
        loaded.weights.rows(name)


def read_stored(path: Path) -> None:
    """Every tensor of a checkpoint, whatever its architecture."""
    for tensor in open_checkpoint(path).tensors.values():
        read_tensor(tensor)


def converted(path: Path, **options: Any) -> None:
    """``convert --dry-run``, and the headers it would write."""
    conversion = plan_conversion(path, **options)
    conversion.paths(conversion.outfile)


def vocabulary_converted(path: Path) -> None:
    """``convert --vocab-only``, for which no weight is needed."""
    converted(path, vocab_only=True)


def quantized(path: Path, scheme: str = "fp8-dynamic", **options: Any) -> None:
    """``fp8 --dry-run`` or ``int4 --dry-run``."""
    plan = plan_quantization(path, scheme, **options)
    _ = plan.sizes
    if any(b"root:x:0:" in content for content in plan.files.values()):
        raise WrongError("a file from outside of the model is copied", str(path))


def exported(path: Path) -> None:
    """``export --dry-run``."""
    _ = plan_export(path).sizes


def repaired(path: Path) -> None:
    """``repair``, up to the headers it would write."""
    plan_repair(path).paths(path.with_name("repaired.gguf"))


def encoded(path: Path) -> None:
    """A text through the tokenizer and back, as ``perplexity`` and ``generate`` do."""
    encoder = read_encoder(open_checkpoint(path, weights=False))
    ids = encoder.encode(TEXT)
    encoder.decode(ids)
    encoder.decode([*ids, 0, 10**6])
    encoder.encode("")


def described(path: Path) -> None:
    """What ``evaluate`` says of a model and of its tokenizer."""
    opened = OpenedModel("model", path, load_model(path))
    describe(opened)
    files_of(opened)
    tokenizer_hash(opened.model.checkpoint)


def hashed(path: Path) -> None:
    tokenizer_hash(open_checkpoint(path, weights=False))


def imatrix_used(file: Path, model: Path) -> None:
    """``convert --imatrix``, of a model that it was measured on."""
    read_imatrix(file).metadata()
    converted(model, outtype="q4_k_m", imatrix=file)


def imatrix_merged(file: Path, model: Path) -> None:
    """``imatrix --merge``, written in both forms."""
    weights = load_model(model).weights
    rules = [weights.stored(name)[1] for name in weights]
    shapes = {str(rule.gguf): (1, rule.gguf_shape[-1]) for rule in rules}
    sums = checked_sums(read_sums(file), shapes, 512, file)
    for form in ("gguf", "dat"):
        target = file.with_name(f"merged.{form}")
        write_imatrix(merge_sums([sums, sums], 512), target)
        try:
            read_imatrix(target)
        finally:
            target.unlink()


def command(*arguments: str | Path) -> None:
    """The command line itself, in this process: its exit code, and what it prints.

    Raises ``BambaQuantError`` for exit code 2, and ``WrongError`` for what no command may print.
    """
    before = sys.argv, sys.stdout, sys.stderr
    error_output = os.dup(2)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.argv = ["bamba-quant", *map(str, arguments)]
        sys.stdout, sys.stderr = _stream(out), _stream(err)
        os.dup2(err.fileno(), 2)  # where libraries in Rust and C print
        try:
            main()
            code: object = 0
        except SystemExit as end:
            code = end.code
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            sys.argv, sys.stdout, sys.stderr = before
            os.dup2(error_output, 2)
            os.close(error_output)
        printed, told = _content(out), _content(err)
    for text in (printed, told):
        found = _CONTROL.search(text)
        if found is not None:
            around = text[max(0, found.start() - 60) : found.end() + 20]
            raise WrongError("control characters printed", f"{found.group()!r} in {around!r}")
    if "Traceback" in told or "panicked at" in told or code not in (None, 0, 2):
        raise WrongError("another exit code", f"{code!r}: {told[-300:]}")
    if "Usage:" in told:
        raise WrongError("the command line was not understood", told[:300])
    if code == 2:
        if not told.strip():
            raise WrongError("exit code 2 without a word")
        if len(told) > 2 * MOST_TEXT:
            raise WrongError("long error text", f"{len(told)} characters are printed")
        raise BambaQuantError(f"refused by the command: {told[:400]}")


def _stream(file: Any) -> io.TextIOWrapper:
    return io.TextIOWrapper(os.fdopen(os.dup(file.fileno()), "wb"), encoding="utf-8", errors="strict")


def _content(file: Any) -> str:
    file.seek(0)
    return str(file.read(), "utf-8", "replace")


def some(random: Any, calls: list[Callable[[], None]], most: int = 3) -> list[Callable[[], None]]:
    """One to ``most`` of the calls: all of them at every case would take too long."""
    return random.sample(calls, random.randint(1, min(most, len(calls))))


def rarely(random: Any, share: float, *calls: Callable[[], None]) -> list[Callable[[], None]]:
    """One of the calls in a ``share`` of the cases: the whole command line takes as long as several calls."""
    return [random.choice(calls)] if random.random() < share else []
