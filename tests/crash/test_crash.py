"""A killed command leaves the old output or the new one, and the next run ends as if nothing had happened.

In a process of its own, since one that forks must have no threads; ``python -m tests.crash`` does more of it.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.crash.commands import COMMANDS


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_every_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash", "--cases", "1", "--points", "4"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    killed = {line[:26].strip(): int(line[26:].split()[1]) for line in done.stdout.splitlines()[1:]}
    assert killed.keys() == {command.name for command in COMMANDS}
    assert all(count >= 3 for count in killed.values()), done.stdout
