"""What an interrupted run must have in common with the one that continues it."""

from __future__ import annotations

import hashlib
from typing import Any

from bamba_quant import __version__
from bamba_quant.files.reading import identity
from bamba_quant.planning.plan import Plan
from bamba_quant.writers import stream


def fingerprint(plan: Plan) -> dict[str, Any]:
    """What an interrupted run must have in common with the one that continues it, by names that users know."""
    layout, weights = hashlib.sha256(), hashlib.sha256()
    for shard in plan.shards:
        layout.update(shard.header)
    small = hashlib.sha256(repr(sorted({**plan.files, **plan.constants}.items())).encode())
    for row in plan.rows:
        weights.update(b"" if row.importance is None else row.importance.tobytes())
        weights.update(b"".join(part.tobytes() for part in row.constants.values()))
    inputs = dict(map(identity, plan.inputs))
    return {
        "version": __version__,
        "type": plan.recipe,
        "method": plan.method,
        "layout": layout.hexdigest(),
        "configuration or card": small.hexdigest(),
        "importance matrix": weights.hexdigest(),
        "chunk size": stream.CHUNK_BYTES,
        "input": inputs,
    }
