"""Whether what a computation holds at once fits in a device's memory, asked before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from bamba_quant.errors import BambaQuantError

_MEMINFO = Path("/proc/meminfo")


def free_memory(device: torch.device) -> int | None:
    """The bytes that are free on ``device``, or None where nothing says so."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def check_memory(what: str, n_bytes: int, device: torch.device, fix: str) -> None:
    """Raise ``BambaQuantError`` where ``n_bytes``, a lower bound of what is needed, are more than there is."""
    free = free_memory(device)
    if free is not None and n_bytes > free:
        raise BambaQuantError(
            f"{what} does not fit in the memory of {device}",
            found=f"{free / 1e9:.1f} GB free",
            expected=f"at least {n_bytes / 1e9:.1f} GB",
            fix=fix,
        )
