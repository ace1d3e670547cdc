"""``bamba-quant allocate``: which tensor of a model gets how many bits, as a recipe that ``convert`` takes."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bamba_quant.hub import local_path
from bamba_quant_cli import options as opt
from bamba_quant_cli.console import Progress, echo, print_json, print_table, size
from bamba_quant_cli.interrupts import announce_outputs

if TYPE_CHECKING:
    from bamba_quant.calibration.allocation import Allocation, Move
    from bamba_quant.checkpoint import ReadOptions

EXAMPLES = """
Examples:

  bamba-quant allocate ./Bamba-9B --like q4_k_m --text calib.txt --device cuda -o mix.toml

  bamba-quant convert ./Bamba-9B --recipe mix.toml

  bamba-quant allocate ./Bamba-9B --target-size 5.2GB --text calib.txt --imatrix imatrix.gguf -o mix.toml

  bamba-quant allocate ./Bamba-9B --target-bpw 4.6 -o mix.toml --chart frontier.html

  bamba-quant allocate ./Bamba-9B --scheme w4a16-g128 --target-size 6.5GB --text calib.txt -o keep.toml

  bamba-quant int4 ./Bamba-9B ./Bamba-9B-w4a16 --ignore keep.toml
"""


def allocate(
    model: opt.Model,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Recipe to write, for convert --recipe; with --scheme, for --ignore of fp8 and int4.",
        ),
    ] = None,
    like: Annotated[
        str | None, typer.Option(metavar="TYPE", help="At most the bytes of this type, such as q4_k_m.")
    ] = None,
    target_size: Annotated[
        str | None, typer.Option(metavar="BYTES", help="At most this size of the file, such as 5.2GB.")
    ] = None,
    target_bpw: Annotated[
        float | None, typer.Option(metavar="BITS", help="At most this many bits per weight.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="UTF-8 text, plain or .xz, to measure the tensors on. Repeatable. Without one, what other models "
            "of the kind lost decides.",
        ),
    ] = None,
    imatrix: opt.Imatrix = None,
    types: Annotated[
        str | None,
        typer.Option(metavar="TYPE,…", help="The formats to choose from, such as q3_k,q4_k,q5_k,q6_k."),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            metavar="SCHEME",
            help="Choose the linear layers that a directory of fp8 or int4 keeps in 16 bits instead: a scheme's name, "
            "such as fp8-dynamic or w4a16-g128, with --target-size and --text.",
        ),
    ] = None,
    method: Annotated[
        Literal["gradient", "direct"],
        typer.Option(
            help="gradient: an estimate of all tensors at once by gradients; direct: one tensor at a time."
        ),
    ] = "gradient",
    refine: Annotated[
        bool,
        typer.Option(
            help="Search scales further than llama-quantize does, here and in what convert makes of the recipe."
        ),
    ] = True,
    ctx: opt.Ctx = 512,
    chunks: Annotated[int, typer.Option(help="Chunks at most, spread over the text.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Chunks that are run together.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the labels that the gradient method draws.")] = 0,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    chart: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Picture of size against predicted divergence: .svg or .html."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The recipe's name; by default the type's with _a.")
    ] = None,
    threads: opt.Threads = None,
    ignore_config_key: opt.IgnoreConfigKey = None,
    ignore_adapter: opt.IgnoreAdapter = False,
    strip_prefix: opt.StripPrefix = "",
    overwrite: opt.Overwrite = False,
    as_json: opt.AsJson = False,
) -> None:
    """Move bits between tensors to where the model needs them, within the exact bytes of the final file.

    Measures what each tensor costs in divergence in each format, chooses the formats that together cost least, and
    writes them as a recipe.
    """
    from bamba_quant.calibration.allocation import allocate as choose
    from bamba_quant.codecs import SafetensorsCodec, codec_named
    from bamba_quant.errors import PlanError
    from bamba_quant.metadata.model_name import name_of
    from bamba_quant.writers.atomic import check_target, write_text

    scheme = codec_named(scheme, SafetensorsCodec).name if scheme else None
    if sum(given is not None for given in (like, target_size, target_bpw)) != 1:
        raise PlanError(
            "the size of the file must be given exactly once",
            fix="give one of --like, --target-size and --target-bpw",
        )
    if scheme and (not target_size or not text or types or chart or name):
        raise PlanError(
            "layers are chosen for a size on a text",
            found=f"--scheme {scheme}",
            expected="--target-size and --text, without --types, --chart and --name",
        )
    if chart is not None and chart.suffix not in (".svg", ".html"):
        raise PlanError("a chart is an .svg or an .html file", found=chart.name)
    target_bytes = opt.parse_file_size(target_size, "--target-size") if target_size else None
    reading = opt.read_options(ignore_config_key, ignore_adapter, strip_prefix)
    model = local_path(model, headers=not text)
    inputs = [*(text or ()), *filter(None, (imatrix,)), model]
    for file in filter(None, (output, chart)):
        check_target(file, overwrite, inputs)
    started = time.monotonic()
    asked = [each.strip().lower() for each in types.split(",")] if types else None
    if text:
        from bamba_quant.calibration.candidates import FORMATS
        from bamba_quant.calibration.costs import Measuring, text_costs
        from bamba_quant.inference.threads import use_threads

        use_threads(threads)
        options = Measuring(method, ctx, chunks, batch, seed, device, dtype, refine=refine)
        with Progress("") as bar:
            costs = text_costs(
                model,
                text,
                options,
                formats=asked or FORMATS,
                scheme=scheme,
                imatrix=imatrix,
                reading=reading,
                threads=threads,
                progress=lambda stage, done, total: bar.update(done, total, doing=f"{stage}:"),
            )
        how = f"measured by {method} on {', '.join(each.name for each in text)}, {chunks} chunks of {ctx} tokens"
    else:
        from bamba_quant.calibration.allocation import known_costs

        costs = known_costs(model, asked, reading)
        how = "by what other models of the kind lost"
    measured = time.monotonic()
    if scheme and target_bytes:
        _choose_layers(model, scheme, costs, target_bytes, reading, output, how, overwrite, inputs, as_json)
        return
    allocation = choose(
        model,
        costs,
        like=like,
        target_bytes=target_bytes,
        target_bpw=target_bpw,
        name=name,
        imatrix=imatrix,
        refine=refine,
        allow_config_only=not text,
        reading=reading,
    )
    searched, called = time.monotonic(), name_of(model).name
    files: dict[Path, str] = {}
    if output is not None:
        from bamba_quant.recipes import recipe_text

        about = f"{size(allocation.allocated.n_bytes)}, bits moved between the tensors of {called}"
        files[output] = recipe_text(
            replace(allocation.recipe, about=about),
            allocation.like.name,
            f"Written by bamba-quant allocate, {how}.",
        )
    if chart is not None:
        from bamba_quant.report.charts.frontier import frontier
        from bamba_quant.report.page import as_page, as_svg

        picture = frontier(allocation)
        is_svg = chart.suffix == ".svg"
        files[chart] = as_svg(picture) if is_svg else as_page(f"{called}, {how}", "", [picture])
    announce_outputs(*files)
    for file, content in files.items():
        write_text(file, content, overwrite=overwrite, inputs=inputs)
    seconds = {"measuring": round(measured - started, 2), "search": round(searched - measured, 2)}
    if as_json:
        print_json({**_summary(allocation), "seconds": seconds, "files": list(files)})
        return
    _print(allocation)
    for file in files:
        echo(file)


def _choose_layers(
    model: Path,
    scheme: str,
    costs: dict[str, dict[str, float]],
    target_bytes: int,
    reading: ReadOptions,
    output: Path | None,
    how: str,
    overwrite: bool,
    inputs: list[Path],
    as_json: bool,
) -> None:
    """Choose the layers that keep 16 bits, write their list, and print what that costs."""
    from bamba_quant.calibration.layer_allocation import allocate_layers
    from bamba_quant.recipes.ignore_file import ignore_text
    from bamba_quant.writers.atomic import write_text

    found = allocate_layers(model, scheme, costs, target_bytes, reading=reading)
    if output is not None:
        announce_outputs(output)
        text = ignore_text(scheme, found.ignore, f"Written by bamba-quant allocate, {how}.")
        write_text(output, text, overwrite=overwrite, inputs=inputs)
    if as_json:
        print_json({**asdict(found), "files": [output] if output else []})
        return
    for module in found.ignore:
        echo(f"bf16  {module}")
    echo(f"{scheme}: {found.n_bytes:,} bytes, predicted mean KLD {found.predicted:.4g}")
    echo(f"with every layer quantized: {found.smallest_bytes:,} bytes, {found.smallest_predicted:.4g}")
    if output is not None:
        echo(output)


def _print(allocation: Allocation) -> None:
    rows: dict[tuple[str, str, str], list[Move]] = defaultdict(list)
    for move in allocation.moves:
        rows[move.role, move.before, move.after].append(move)
    table = []
    for (role, before, after), moves in sorted(rows.items(), key=lambda item: item[0]):
        costs = [move.cost_before for move in moves if move.cost_before is not None]
        table.append(
            (
                role,
                _layers([move.layer for move in moves]),
                f"{before} → {after}",
                f"{sum(move.more_bytes for move in moves):+,}",
                f"{sum(costs):.3g}" if len(costs) == len(moves) else "-",
                f"{sum(move.cost_after for move in moves):.3g}",
            )
        )
    if table:
        print_table(("role", "layers", "moved", "bytes", "cost before", "after"), table, right=(3, 4, 5))
        echo()
    chosen, plain = allocation.allocated, allocation.plain
    echo(f"{allocation.recipe.name}: {chosen.n_bytes:,} bytes, predicted mean KLD {chosen.predicted:.4g}")
    if plain is not None:
        share = chosen.predicted / plain.predicted if plain.predicted else 1.0
        echo(
            f"{allocation.like.name}: {plain.n_bytes:,} bytes, predicted mean KLD {plain.predicted:.4g}: "
            f"{share:.2f} of it remains"
        )


def _layers(layers: list[int | None]) -> str:
    """0-3, 7: runs of neighbours together."""
    runs: list[list[int]] = []
    for layer in sorted(layer for layer in layers if layer is not None):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "-"


def _summary(allocation: Allocation) -> dict[str, Any]:
    return {
        "recipe": allocation.recipe.name,
        "like": allocation.like.name,
        "bytes": allocation.allocated.n_bytes,
        "predicted_kld": allocation.allocated.predicted,
        "plain": asdict(allocation.plain) if allocation.plain else None,
        "moves": [asdict(move) for move in allocation.moves],
        "frontier": [asdict(point) for point in allocation.frontier],
        "types": [asdict(point) for point in allocation.others],
    }
