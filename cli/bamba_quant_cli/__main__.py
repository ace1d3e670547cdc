"""``python -m bamba_quant_cli`` is ``bamba-quant``."""

import os

from bamba_quant_cli import interrupts

# Threads that wait give up their processor, instead of spinning on one that others need: libgomp's, Intel's and LLVM's
# OpenMP, and numpy's OpenBLAS, which read this when they are loaded.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "OPENBLAS_THREAD_TIMEOUT": "4"}


def main() -> None:
    """Run the command line; its modules are imported once a signal ends the process as it should."""
    for name, value in WAITING.items():
        os.environ.setdefault(name, value)
    interrupts.run(_run)


def _run() -> None:
    from bamba_quant_cli import app

    app.run()


if __name__ == "__main__":
    main()
