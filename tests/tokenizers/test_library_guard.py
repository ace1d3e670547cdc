"""While tokenizers are loaded the process's stderr is quiet, and it is whole again afterwards."""

from __future__ import annotations

import os
import threading
import time

import pytest

from bamba_quant.tokenizers.library_guard import quiet_stderr


def test_stderr_is_back_after_several_threads(capfd: pytest.CaptureFixture[str]) -> None:
    """Threads that enter and leave in any order, one of them twice."""
    before = os.fstat(2)

    def load(start: float, stop: float) -> None:
        time.sleep(start)
        with quiet_stderr(), quiet_stderr():
            os.write(2, b"panic")
            time.sleep(stop - start)

    threads = [threading.Thread(target=load, args=times) for times in ((0, 0.05), (0.02, 0.1), (0.04, 0.07))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.path.samestat(os.fstat(2), before)
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"
