"""Everything that only a GPU shows, in one run and one table: `python -m benchmarks.cuda`, or `make bench-cuda`.

Runs the tests that need a GPU and the benchmarks with requirements, each as a process of its own, prints what they
print, and then every figure beside what it must be. Weights are random, of Bamba-9B's exact shape, made on the
machine: 25 GB on its disk for a while. ``ranks`` takes two GPUs; on a machine with one, leave it out with --only. Exit
code 1 when a requirement is missed or a part fails. With --results what was measured is kept in a file, to which
another run, of other parts or on another machine, adds its own.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import points
from benchmarks.points import Point

# Tests that do on a GPU what they cannot do, or only interpret, without one.
TESTS = (
    "tests/reference/kernels", "tests/codecs/test_cuda_decoding.py",
    "tests/codecs/test_cuda_activations.py", "tests/codecs/test_integer_layouts.py",
    "tests/checkpoint/test_on_device.py",
    "tests/calibration/test_by_layer.py",
    "tests/inference/test_device_weights.py", "tests/inference/test_prefetch.py", "tests/evaluation/test_on_cuda.py",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--chunks", type=int, default=6144, help="of 512 tokens, for several GPUs")
    parser.add_argument("--directory", type=Path, help="where 25 GB of files go; a temporary one by default")
    parser.add_argument("--results", type=Path, metavar="FILE", help="JSON of this and earlier runs")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU")
    known = json.loads(options.results.read_text()) if options.results and options.results.is_file() else {}
    with tempfile.TemporaryDirectory() as temporary:
        options.directory = options.directory or Path(temporary)
        options.directory.mkdir(parents=True, exist_ok=True)
        for part in options.only:
            known[part] = measured(part, options)
            if options.results:
                options.results.write_text(json.dumps(known, indent=1))
    held = [Point(**point) for part in known.values() for point in part["points"]]
    print(f"\n{points.table(held)}\n")
    for part, about in known.items():
        where = f"{about['machine']}, {about['revision']}, {about['seconds']} s"
        print(f"{part}: {about['date']}, {where}, `{about['command']}`")
    sys.exit(0 if all(point.held is not False for point in held) else 1)


def measured(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """What one part found, and what it ran on."""
    file, began = options.directory / f"{part}.points", time.perf_counter()
    file.unlink(missing_ok=True)
    command, read = PARTS[part](options, file)
    words = [sys.executable, *command]
    print(f"\n## {part}: {' '.join(command)}", flush=True)
    code = subprocess.run(words, check=False).returncode
    found = read(file) if file.is_file() else []
    if (code or not found) and all(point.held is not False for point in found):
        told = f"exit code {code}, {len(found)} figures"
        found.append(Point(f"`{part}` runs to its end", "exit code 0, figures", told, False))
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}, torch {torch.__version__}",
        "seconds": round(time.perf_counter() - began),
        "revision": revision,
        "command": " ".join(["python", *(_general(word, options.directory) for word in command)]),
        "points": [asdict(point) for point in found],
    }


def _general(word: str, directory: Path) -> str:
    """A word of a command line in which the directory has no name of this machine."""
    option, equals, value = word.rpartition("=")
    path = Path(value)
    inside = path == directory or directory in path.parents
    return f"{option}{equals}{Path('DIRECTORY') / path.relative_to(directory)}" if inside else word


Part = Callable[[argparse.Namespace, Path], tuple[list[str], Callable[[Path], list[Point]]]]


def _tests(options: argparse.Namespace, file: Path) -> tuple[list[str], Callable[[Path], list[Point]]]:
    # Compiling takes the longest, which several processes do side by side where pytest-xdist is installed.
    several = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    return ["-m", "pytest", "-q", "-p", "no:cacheprovider", *several, f"--junit-xml={file}", *TESTS], _outcome


def _outcome(file: Path) -> list[Point]:
    """Of pytest's own report."""
    suite = ElementTree.parse(file).getroot().find("testsuite")
    assert suite is not None
    total, failed, errors, skipped = (
        int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")
    )
    told = f"{total - failed - errors - skipped} passed, {failed + errors} failed, {skipped} skipped"
    return [Point("tests that need a GPU", "none fails", told, total > skipped and not failed + errors)]


def _script(name: str, *words: str, files: bool = False, chunks: bool = False) -> Part:
    def part(options: argparse.Namespace, file: Path) -> tuple[list[str], Callable[[Path], list[Point]]]:
        more = ["--directory", str(options.directory)] if files else []
        more += ["--chunks", str(options.chunks)] if chunks else []
        return ["-m", f"benchmarks.{name}", *words, *more, "--points", str(file)], points.read

    return part


PARTS: dict[str, Part] = {
    "tests": _tests,
    "kernels": _script("kernels_cuda"),
    "gradients": _script("gradients_cuda"),
    "forward": _script("forward_cuda", "--repeats", "7"),
    "falcon-h1": _script("forward_cuda", "--repeats", "7", "--model", "falcon-h1-7b"),
    "experts": _script("nemotron_cuda", "--repeats", "7"),
    "evaluate": _script("evaluate_cuda", files=True),
    "tune": _script("tune_cuda", files=True),
    "ranks": _script("ranks_cuda", files=True, chunks=True),
}


if __name__ == "__main__":
    main()
