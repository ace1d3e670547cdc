"""What a run's run says took its time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bamba_quant.evaluation import run
from bamba_quant.evaluation.run import time_compilation
from bamba_quant.inference.weights import Timings
from tests.support.kernels import needs_triton

needs_triton()

from triton import knobs  # noqa: E402


def test_kernels_that_were_compiled_before_count_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is compiled for two seconds, then loaded for half of one; another is only loaded."""
    clock = iter([100.0, 100.5])
    monkeypatch.setattr(run.time, "perf_counter", lambda: next(clock))
    timings, before = Timings(), knobs.compilation.listener
    with time_compilation(timings, torch.device("cuda")):
        loaded = knobs.runtime.kernel_load_end_hook
        loaded(None, None, None, None, None)
        assert timings.compiling == 0
        knobs.compilation.listener(src=None, metadata={}, metadata_group={}, times=SimpleNamespace(total=2e6))
        loaded(None, None, None, None, None)
        loaded(None, None, None, None, None)
    loaded(None, None, None, None, None)
    assert timings.compiling == 2.5
    assert knobs.compilation.listener is before
