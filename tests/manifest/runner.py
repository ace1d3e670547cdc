"""Runs cases in a directory of their own, and compares what they wrote with the manifest."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Mapping
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from tests.manifest import models
from tests.manifest.cases import Case
from tests.manifest.files import imatrix_figures, numbers_of, recorded, short_hash, write_faulty

MANIFEST = Path(__file__).with_name("manifest.json")
TOLERANCE = 2e-3  # relative; figures have five digits
SMALLEST = 2e-7  # figures below this are not told apart: they are sums in another order
Entry = str | float
Entries = dict[str, Entry]

_RECIPE = """
name = "mine"
like = "q4_k_m"

[roles]
ssm_out = "q6_k"
ffn_up = [{ format = "q8_0", layers = [0, 3] }, { format = "q5_k", when = "more_bits" }, "q3_k"]

[[tensors]]
name = "blk.1.ssm_out.weight"
format = "Q5_K"

[[tensors]]
pattern = "attn_[qk]"
format = "iq4_xs"
"""
_DIRECTORIES = {
    "fp8": "fp8 @mini {}",
    "fp8-block": "fp8 @mini {} --scheme block",
    "int4": "int4 @mini {}",
    "int4-asymmetric": "int4 @mini {} --asymmetric --group-size 32",
    "torchao": "int4 @mini {} --format torchao",
}
# Keys of printed JSON that hold text, times or paths.
_TEXT = {"seconds", "notes", "remarks", "backend", "about"}


class Runner:
    """Runs cases below ``work``, which becomes the current directory: outputs may hold relative paths only."""

    def __init__(self, work: Path) -> None:
        from bamba_quant_cli.app import app

        self._app = app
        self._work = work
        os.chdir(work)
        Path("in").mkdir()

    def run(self, case: Case) -> Entries:
        """What is recorded of the case. Raises ``RuntimeError`` if the command fails."""
        out = Path("out", case.name)
        out.parent.mkdir(parents=True, exist_ok=True)
        if "OUT/" in case.command:
            out.mkdir()
        printed = self.command(case.command, out)
        entries: Entries = {}
        if case.stdout == "hash":
            entries["stdout"] = short_hash(_canonical(json.loads(printed), str(out)).encode())
        elif case.stdout == "toml":
            import tomllib

            entries["stdout"] = short_hash(json.dumps(tomllib.loads(printed), sort_keys=True).encode())
        elif case.stdout == "figures":
            entries |= {f"stdout:{key}": value for key, value in numbers_of(json.loads(printed)).items()}
        for file in sorted(path for path in out.rglob("*") if path.is_file()) if case.files else ():
            parts: Mapping[str, Entry] = (
                recorded(file)
                if case.files == "hash"
                else {f":{key}": value for key, value in imatrix_figures(file).items()}
            )
            entries |= {f"{file.relative_to(out)}{part}": value for part, value in parts.items()}
        shutil.rmtree(out, ignore_errors=True)
        if not entries:
            raise RuntimeError(f"{case.name}: no output was recorded")
        return entries

    def command(self, line: str, out: Path) -> str:
        """Runs a command line with its inputs; what it printed on stdout."""
        arguments = [
            self._input(word[1:]) if word.startswith("@") else word.replace("OUT", str(out), 1)
            for word in shlex.split(line)
        ]
        result = CliRunner().invoke(self._app, arguments)
        if result.exit_code:
            raise RuntimeError(f"{shlex.join(arguments)}: exit code {result.exit_code}\n{result.exception!r}")
        return result.stdout

    def _input(self, name: str) -> str:
        path = Path("in", name)
        if name == "split.gguf":
            path = Path("in", "split-00001-of-00005.gguf")
        if not path.exists():
            self._make(name, path)
            if not path.exists():
                raise RuntimeError(f"{path} was not made: {sorted(map(str, Path('in').iterdir()))}")
        return str(path)

    def _make(self, name: str, path: Path) -> None:
        stem = name.removesuffix(".gguf")
        if name == "mini":
            shutil.copytree(str(package_files("bamba_quant") / "data" / "bamba-mini"), path)
        elif name == "text.txt":
            models.write_text(path)
        elif name == "recipe.toml":
            path.write_text(_RECIPE)
        elif name == "allocated.toml":
            self.command(f"allocate @mini --target-bpw 4.6 -o {path}", path)
        elif name == "metadata.json":
            path.write_text(
                '{"general.author": "Somebody", "general.version": "v2", "general.tags": ["a", "b"]}'
            )
        elif name == "imatrix.dat":
            mini = json.loads(Path(self._input("mini"), "config.json").read_text())
            models.write_imatrix(path, {"attention_bias": False} | mini)
        elif name == "imatrix-wide.dat":
            models.write_imatrix(path, models.MODELS["bamba-wide"][0])
        elif name == "imatrix.gguf":
            self.command(f"imatrix @mini --merge @imatrix.dat -o {path}", path)
        elif name.startswith("wrong-"):
            self._make_faulty(stem.removeprefix("wrong-"), path)
        elif name in _DIRECTORIES:
            self.command(_DIRECTORIES[name].format(path), path)
        elif name == "split.gguf":
            self.command("convert @mini --outtype bf16 --split-max-size 2M --outfile in/split.gguf", path)
        elif name == "bamba-with-tokenizer":
            models.with_tokenizer("bamba-vocabulary", path, Path(self._input("mini")))
        elif name == "state-spaces":
            models.write_state_spaces(path)
        elif name in models.MODELS:
            models.write_model(name, path)
        elif name == "measured-q4_k_m.gguf":
            self.command(f"convert @mini --outtype q4_k_m --imatrix @imatrix.dat --outfile {path}", path)
        elif stem.endswith("-q8_0"):
            family = stem.removesuffix("-q8_0")
            self.command(f"convert @{family} --outtype q8_0 --no-vocab --outfile {path}", path)
        else:
            self.command(f"convert @mini --outtype {stem} --outfile {path}", path)

    def _make_faulty(self, kind: str, path: Path) -> None:
        if kind == "bamba-biases":
            right = self._input("bamba-biases-q8_0.gguf")
            write_faulty(Path(right), path, {"attn_q": 4, "attn_k": 2}, rotated=8)
        else:
            write_faulty(Path(self._input(f"{kind}.gguf")), path, {"attn_q": 4, "attn_k": 2}, rotated=32)


def _canonical(value: Any, out: str) -> str:
    """Sorted JSON without text and times, in which the output directory is named OUT."""

    def cleaned(inner: Any) -> Any:
        if isinstance(inner, dict):
            return {key: cleaned(each) for key, each in inner.items() if key not in _TEXT}
        if isinstance(inner, list):
            return [cleaned(each) for each in inner]
        return inner

    text = json.dumps(cleaned(value), sort_keys=True).replace(out, "OUT")
    return re.sub(r'("bamba_quant\.version": ")[^"]*', r"\1VERSION", text)


def read_manifest() -> dict[str, Entries]:
    manifest: dict[str, Entries] = json.loads(MANIFEST.read_text())
    return manifest


def write_manifest(manifest: Mapping[str, Entries]) -> None:
    MANIFEST.write_text(json.dumps(dict(sorted(manifest.items())), indent=1, sort_keys=True) + "\n")


def differences(expected: Mapping[str, Entry], found: Mapping[str, Entry]) -> list[str]:
    """A line for each output that was expected and is absent, is new, or differs."""
    lines = [f"{key}: absent" for key in expected.keys() - found.keys()]
    lines += [f"{key}: new" for key in found.keys() - expected.keys()]
    for key in expected.keys() & found.keys():
        old, new = expected[key], found[key]
        if isinstance(old, str) or isinstance(new, str):
            same = old == new
        else:
            same = abs(new - old) <= max(TOLERANCE * max(abs(old), abs(new)), SMALLEST)
        if not same:
            lines.append(f"{key}: {new}, not {old}")
    return sorted(lines)
