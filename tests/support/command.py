"""The command line in this process, which has imported torch and compiled the kernels already."""

from __future__ import annotations

import io
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest.mock import patch

from bamba_quant_cli import app


@dataclass(frozen=True)
class Completed:
    """How a command ended and what it wrote, as of ``subprocess``."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments: object, code: int = 0) -> Completed:
    """Run ``bamba-quant`` with these arguments; its exit code must be ``code``. Errors are printed as for users."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    with (
        patch.object(sys, "argv", ["bamba-quant", *map(str, arguments)]),
        patch.object(warnings, "showwarning", warnings.showwarning),
        redirect_stdout(streams[0]),
        redirect_stderr(streams[1]),
    ):
        try:
            app.run()
            returncode = 0
        except SystemExit as end:
            returncode = end.code if isinstance(end.code, int) else int(end.code is not None)
    out, err = (stream.buffer.getvalue().decode("utf-8") for stream in streams)  # type: ignore[attr-defined]
    assert returncode == code, err
    return Completed(returncode, out, err)
