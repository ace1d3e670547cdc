"""The group of all subcommands: errors of usage with the closest names, llama.cpp's -m, and options in panels."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from bamba_quant.errors import did_you_mean
from bamba_quant.printable import printable

# Which typer has from click, or brings along, by its version.
_UsageError: Any = typer.BadParameter.__base__

_NARROW = 80  # columns

# Panels of the help of commands with many options, in their order, by the names of parameters.
_PANELS = {
    "Types": "outtype recipe list_types scheme layout bits group_size symmetric scales method ignore dtype tensor_type "
    "output_tensor_type token_embedding_type leave_output_tensor pure allow_requantize",
    "Output": "outfile dry_run tensors overwrite resume stream_from_hub threads max_shard_size split_max_size "
    "keep_split model_name metadata vocab_only no_vocab as_json help",
    "Calibration": "imatrix imatrix_strict calibrate calibrate_chunks kv_cache device",
    "Tuning": "tune tune_tokens tune_steps max_minutes tune_seed tune_device tune_dtype max_memory tune_state",
    "Reading": "pre ignore_config_key ignore_adapter strip_prefix",
}
_PLACES = {
    name: (panel, place)
    for panel, names in _PANELS.items()
    for place, name in enumerate(names.split(), 100 * list(_PANELS).index(panel))
}


class _Help:
    """Help that fits the terminal: where the tables of rich would cut names, plain sections instead of its panels."""

    help: str | None
    rich_markup_mode: Any

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for each in params:
            if getattr(each, "is_flag", False):
                vars(each)["metavar"] = ""  # instead of <bool>
        return params

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.help = re.sub(r"(?<!\n)\n(?!\n)", " ", self.help or "")  # of the docstring's lines
        if shutil.get_terminal_size().columns < _NARROW:
            self.rich_markup_mode = None
        super().format_help(ctx, formatter)  # type: ignore[misc]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for each in self.get_params(ctx):
            if record := each.get_help_record(ctx):
                usual = "Arguments" if each.param_type_name == "argument" else "Options"
                title = getattr(each, "rich_help_panel", None) or usual
                sections.setdefault(title, []).append((record[0], record[1].replace("\\[", "[")))
        for name, command in getattr(self, "commands", {}).items():
            if not command.hidden:
                text = " ".join(command.help.partition("\n\n")[0].split())
                sections.setdefault(command.rich_help_panel or "Commands", []).append((name, text))
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


class Command(_Help, TyperCommand):
    """A command; its help has a panel of the options about reading."""

    panels: Collection[str] = ("Reading",)

    def get_params(self, ctx: Any) -> list[Any]:
        params: dict[int, list[Any]] = {}
        for each in super().get_params(ctx):
            panel, place = _PLACES.get(each.name or "", ("", -1))
            if panel in self.panels:
                vars(each)["rich_help_panel"] = panel
            params.setdefault(place if panel in self.panels else -1, []).append(each)
        return [each for place in sorted(params) for each in params[place]]


class LongCommand(Command):
    """A command whose help has all its options in panels."""

    panels = _PANELS


class Commands(_Help, TyperGroup):
    """The group; errors of usage, which typer prints, show the user's words as codes where they act on a terminal."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        return super().parse_args(ctx, args or ["--help"])

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _readable_usage_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _readable_usage_errors():
            return super().invoke(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        first = command.params[0].name if command and command.params else None
        return name, command, _model_first(rest) if first == "model" else rest


def _model_first(words: list[str]) -> list[str]:
    """``words`` with the value of llama.cpp's ``-m`` or ``--model`` in the place of the argument MODEL."""
    for place, word in enumerate(words):
        if word in ("-m", "--model") and place + 1 < len(words):
            return [words[place + 1], *words[:place], *words[place + 2 :]]
        if word.startswith("--model="):
            return [word.removeprefix("--model="), *words[:place], *words[place + 1 :]]
    return words


@contextmanager
def _readable_usage_errors() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        if found := re.fullmatch(
            r"(?:Value error, )?('(.*)' is not one of (.*))\.", error.message, re.DOTALL
        ):
            error.message = found[1] + did_you_mean(found[2], re.findall("'(.*?)'", found[3]))
        error.message = printable(error.message)
        raise
