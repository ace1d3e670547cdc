"""Wall time and peak memory of a whole process, as the kernel counts them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# The kernel counts a parent's memory into the peak of what it starts, so a small process stands between.
_LAUNCHER = """
import json, os, sys, time
started = time.monotonic()
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(child, 0)
seconds = time.monotonic() - started
print(json.dumps([os.waitstatus_to_exitcode(status), seconds, usage.ru_stime, usage.ru_maxrss]), file=sys.stderr)
"""


def run(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident megabytes of ``command``; ends this process when it fails."""
    seconds, _, peak = run_with_system_time(command)
    return seconds, peak


def run_with_system_time(command: list[str]) -> tuple[float, float, float]:
    """Wall seconds, system seconds and peak resident megabytes of ``command``; ends this process when it fails."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _LAUNCHER, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode:  # before the command began
        raise SystemExit(done.stderr)
    *said, figures = done.stderr.strip().splitlines()
    code, seconds, system, peak = json.loads(figures)
    if code:
        raise SystemExit("\n".join([*said, f"{' '.join(command)} ended with {code}"]))
    return seconds, system, peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def compile_modules(directory: Path, modules: Sequence[str]) -> None:
    """Have the processes that follow find Python's modules compiled, as pip leaves them and some images do not.

    What is missing is kept in ``directory`` and found through PYTHONPYCACHEPREFIX.
    """
    found = importlib.util.find_spec(modules[0])
    if found is None or not found.origin or Path(importlib.util.cache_from_source(found.origin)).is_file():
        return
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(directory / "bytecode")
    print(f"{modules[0]} lies here without bytecode, so Python's modules are compiled first", flush=True)
    subprocess.run([sys.executable, "-c", f"import {', '.join(modules)}"], check=True)
