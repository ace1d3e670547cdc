"""Wall time and peak memory of a whole process, as the kernel counts them."""

from __future__ import annotations

import json
import subprocess
import sys

# The kernel counts a parent's memory into the peak of what it starts, so a small process stands between.
_LAUNCHER = """
import json, os, sys, time
started = time.monotonic()
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(child, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), time.monotonic() - started, usage.ru_maxrss]), file=sys.stderr)
"""


def run(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident megabytes of ``command``; ends this process when it fails."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _LAUNCHER, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, check=False,
    )  # fmt: skip
    *said, figures = done.stderr.strip().splitlines()
    code, seconds, peak = json.loads(figures)
    if code:
        raise SystemExit("\n".join([*said, f"{' '.join(command)} ended with {code}"]))
    return seconds, peak * (1 if sys.platform == "darwin" else 1024) / 1e6
