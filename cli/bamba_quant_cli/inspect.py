"""``bamba-quant inspect``: what a checkpoint directory or a GGUF file holds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bamba_quant.hub import address
from bamba_quant_cli.console import count, echo, echo_lines, print_json, print_table, size
from bamba_reference.config import has_attention

if TYPE_CHECKING:
    from bamba_quant.planning.inspection import Inspection

EXAMPLES = """
Examples:

  bamba-quant inspect ./Bamba-9B

  bamba-quant inspect bamba-9b-Q8_0.gguf --tensors

  bamba-quant inspect bamba-9b-Q8_0.gguf --json | jq .metadata
"""


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A checkpoint directory, a .gguf file (any shard of a split one), or org/name on the Hub.",
        ),
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, tensors included.")] = False,
) -> None:
    """Show architecture, layer map, number formats, sizes and metadata; reads headers only."""
    from bamba_quant.planning.inspection import inspect_path

    found = inspect_path(path)
    if as_json:
        print_json(_as_dict(found))
        return
    checkpoint = found.checkpoint
    echo(
        f"{address(checkpoint.path)}: {found.architecture} ({'GGUF' if checkpoint.kind == 'gguf' else 'Hugging Face'})"
    )
    echo(
        f"{len(checkpoint.tensors)} tensors in {len(checkpoint.files)} file(s), {count(checkpoint.elements)} "
        f"weights, {size(checkpoint.n_bytes)}, {found.bits_per_weight:.2f} bits per weight"
    )
    if found.layers:
        # One letter a layer: attention, Mamba, or both in parallel ("H").
        marks = "".join(
            "m" if not has_attention(kind) else "A" if kind == "attention" else "H" for kind in found.layers
        )
        echo(f"layers: {marks}  ({len(found.layers)}; attention in {list(found.attention_layers)})")
    if found.tuned:
        echo(found.tuned.line())
    for remark in found.remarks:
        echo_lines(f"remark: {remark}")
    echo()
    print_table(
        ("type", "tensors", "weights", "bytes", "share"),
        [
            (
                total.name,
                total.tensors,
                count(total.elements),
                f"{total.n_bytes:,}",
                f"{100 * total.n_bytes / max(1, checkpoint.n_bytes):.1f} %",
            )
            for total in found.formats
        ],
        right=(1, 2, 3, 4),
    )
    echo()
    print_table(("key", "value"), [(key, _short(value)) for key, value in found.metadata.items()])
    if tensors:
        echo()
        print_table(
            ("tensor", "type", "shape", "bytes"),
            [
                (tensor.name, tensor.format.name, " × ".join(map(str, tensor.shape)), f"{tensor.n_bytes:,}")
                for tensor in found.tensors
            ],
            right=(2, 3),
        )


def _short(value: Any, most: int = 100) -> str:
    try:
        text = value if isinstance(value, str) else repr(value)
    except RecursionError:
        text = "(nested too deeply to be shown)"
    return text if len(text) <= most else text[: most - 1] + "…"


def _as_dict(found: Inspection) -> dict[str, Any]:
    checkpoint = found.checkpoint
    return {
        "path": address(checkpoint.path),
        "kind": checkpoint.kind,
        "architecture": found.architecture,
        "layers": found.layers,
        "attention_layers": found.attention_layers,
        "weights": checkpoint.elements,
        "bytes": checkpoint.n_bytes,
        "bits_per_weight": round(found.bits_per_weight, 4),
        "types": {
            total.name: {"tensors": total.tensors, "weights": total.elements, "bytes": total.n_bytes}
            for total in found.formats
        },
        "tuned": asdict(found.tuned) if found.tuned else None,
        "remarks": found.remarks,
        "metadata": dict(found.metadata),
        "tensors": [
            {
                "name": tensor.name,
                "type": tensor.format.name,
                "shape": tensor.shape,
                "bytes": tensor.n_bytes,
                "file": tensor.file.name,
                "offset": tensor.offset,
            }
            for tensor in found.tensors
        ],
    }
