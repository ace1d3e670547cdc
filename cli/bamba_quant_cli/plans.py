"""A plan's rows as people and programs read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bamba_quant_cli.console import print_table

if TYPE_CHECKING:
    from bamba_quant.plan import Plan, PlanRow


def files_of(plan: Plan, outfile: Path) -> list[Path]:
    """The files that ``plan`` makes under the name ``outfile``."""
    from bamba_quant.checkpoint.gguf_file import split_name, split_stem

    count = plan.shard_count
    return [outfile] if count == 1 else [split_name(split_stem(outfile), i, count) for i in range(count)]


def rows_as_json(rows: Sequence[PlanRow]) -> list[dict[str, Any]]:
    return [
        {
            "source": row.source.name,
            "source_type": row.source.format.name,
            "name": row.name,
            "role": row.role,
            "transform": row.transform.name,
            "type": row.format.name,
            "shape": row.shape,
            "bytes": row.n_bytes,
            "shard": row.shard,
            "offset": row.offset,
        }
        for row in rows
    ]


def print_rows(rows: Sequence[PlanRow]) -> None:
    """One line a tensor: source, name, role, transform, type, shape, bytes."""
    print_table(
        ("source", "name", "role", "transform", "type", "shape", "bytes"),
        [
            (
                row.source.name,
                row.name,
                row.role,
                row.transform.name or "-",
                f"{row.source.format.name} → {row.format.name}"
                if row.format != row.source.format
                else row.format.name,
                " × ".join(map(str, row.shape)),
                f"{row.n_bytes:,}",
            )
            for row in rows
        ],
        right=(5, 6),
    )
