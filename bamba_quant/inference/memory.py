"""Whether what a computation holds at once fits in a device's memory, asked before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from bamba_quant.errors import BambaQuantError

_PROC = Path("/proc")
_GROUPS = Path("/sys/fs/cgroup")
# Of control groups of version 2 and 1: where they are below _GROUPS, the files of the limit and of what is used, and
# the line in memory.stat of the page cache that is given up first.
_VERSIONS = (
    ("", "", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_memory(device: torch.device) -> int | None:
    """The bytes that are free on ``device``, or None where nothing says so.

    Of main memory it is what the system and the control groups of this process (a container's limit) leave to it.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = _numbers(_PROC / "meminfo").get("MemAvailable:")
    of_system = () if found is None else (found * 1024,)
    return min((*of_system, *_left_in_groups()), default=None)


def check_memory(what: str, n_bytes: int, device: torch.device, fix: str) -> None:
    """Raise ``BambaQuantError`` where ``n_bytes``, a lower bound of what is needed, are more than there is."""
    free = available_memory(device)
    if free is not None and n_bytes > free:
        raise BambaQuantError(
            f"{what} does not fit in the memory of {device}",
            found=f"{free / 1e9:.1f} GB free",
            expected=f"at least {n_bytes / 1e9:.1f} GB",
            fix=fix,
        )


def _left_in_groups() -> Iterator[int]:
    """What is left below the limit of each of this process's control groups that has one."""
    for line in _text(_PROC / "self" / "cgroup").splitlines():
        _, controllers, place = line.split(":", 2)
        for controller, root, limit, used, cache in _VERSIONS:
            if controller not in controllers.split(","):
                continue
            # Inside a container the path may be one of the host; then the root is the container's group.
            top = _GROUPS / root
            folder = top / place.lstrip("/")
            for group in (folder, *folder.parents):
                if not group.is_relative_to(top):
                    break
                most, now = _text(group / limit).strip(), _text(group / used).strip()
                if most.isdecimal() and now.isdecimal():
                    yield int(most) - int(now) + _numbers(group / "memory.stat").get(cache, 0)


def _numbers(file: Path) -> dict[str, int]:
    """The first number of each line of a file by the word before it; nothing of a file that cannot be read."""
    lines = (line.split() for line in _text(file).splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
