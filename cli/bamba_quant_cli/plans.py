"""A plan as people and programs read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bamba_quant.hub import address
from bamba_quant_cli.console import count, echo, print_json, print_table, size

if TYPE_CHECKING:
    from bamba_quant.planning.plan import Plan, PlanRow


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
            "shard": row.parts[0].shard,
            "offset": row.parts[0].offset,
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
        dispensable=(2, 0, 3, 5),
    )


def print_roles(rows: Sequence[PlanRow]) -> None:
    """One line a role and type of the output, roles in the order of their first tensors."""
    groups: dict[str, dict[str, list[PlanRow]]] = {}
    for row in rows:
        groups.setdefault(row.role, {}).setdefault(row.codec.name, []).append(row)
    print_table(
        ("role", "type", "tensors", "weights", "bytes"),
        [
            (
                role,
                name,
                len(found),
                count(sum(row.elements for row in found)),
                f"{sum(row.n_bytes for row in found):,}",
            )
            for role, types in groups.items()
            for name, found in types.items()
        ],
        right=(2, 3, 4),
        dispensable=(3,),
    )
    echo("(--tensors lists every tensor)")


def files_as_json(plan: Plan, output: Path) -> list[dict[str, Any]]:
    """The files that ``plan`` makes, with their bytes."""
    return [{"file": file, "bytes": n_bytes} for file, n_bytes in plan.paths(output).items()]


def written_as_json(written: Sequence[Path], seconds: float) -> dict[str, Any]:
    """The files that were written, for a command's JSON."""
    sizes = [{"file": file, "bytes": file.stat().st_size} for file in written]
    return {"files": sizes, "bytes": sum(each["bytes"] for each in sizes), "seconds": round(seconds, 3)}


def print_files(plan: Plan, output: Path) -> None:
    """One line a file that ``plan`` makes."""
    for file, n_bytes in plan.paths(output).items():
        echo(f"{file}  {n_bytes:,} bytes ({size(n_bytes)})")


def notes_of(plan: Plan, *, by_role: bool = False) -> list[str]:
    """What was decided without being asked, of the whole and of single tensors, or with ``by_role`` of roles."""
    noted = [row for row in plan.rows if row.note]
    each = [f"{row.name} is stored as {row.format.name}: {row.note}" for row in noted]
    if by_role:
        found = Counter((row.role, row.format.name, row.note) for row in noted)
        each = [f"{n} of {role} as {name}: {note}" for (role, name, note), n in found.items()]
    return [*plan.notes, *each, *numpy_notes(plan)]


def numpy_notes(plan: Plan) -> list[str]:
    """Which codecs numpy quantizes, since they have no compiled version."""
    codecs = {row.codec.name: row.codec for row in plan.rows if row.codec is not row.source.format}
    return [
        f"{name} has no compiled version: numpy quantizes it, which is slower"
        for name, codec in codecs.items()
        if not codec.compiled
    ]


def summary(plan: Plan) -> dict[str, Any]:
    """What a conversion is, for a command's JSON."""
    return {
        "model": address(plan.checkpoint.path),
        "architecture": plan.architecture,
        "type": plan.recipe,
        "tensors": len(plan.rows),
        "weights": plan.elements,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "skipped": {skipped.source.name: skipped.reason for skipped in plan.skipped},
        "notes": notes_of(plan),
    }


def print_conversion(plan: Plan, tensors: bool, as_json: bool) -> None:
    """The plan by roles or with all ``tensors``, and its files with their bytes."""
    if as_json:
        files = files_as_json(plan, plan.outfile)
        print_json({"files": files, **summary(plan), "plan": rows_as_json(plan.rows)})
        return
    (print_rows if tensors else print_roles)(plan.rows)
    for skipped in plan.skipped:
        echo(f"left out: {skipped.source.name} ({skipped.reason})")
    for note in notes_of(plan, by_role=not tensors):
        echo(f"note: {note}")
    echo()
    echo(
        f"{plan.recipe}: {len(plan.rows)} tensors, {count(plan.elements)} weights, {plan.bits_per_weight:.2f} bits per "
        f"weight, {len(plan.metadata)} key-values"
    )
    print_files(plan, plan.outfile)
