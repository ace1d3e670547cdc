"""What a run's run says took its time."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from bamba_quant.evaluation import run
from bamba_quant.evaluation.run import time_compilation
from bamba_quant.inference.weights import Timings
from bamba_reference.runtime import compilation
from tests.support.kernels import needs_triton


def test_compiling_while_decoding_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 6.0, 8.0, 9.0, 20.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timings = Timings()
    with time_compilation(timings, torch.device("cpu")), timings.spent("decoding"), compilation.timed():
        pass
    with compilation.timed():
        pass
    assert (timings.compiling, timings.decoding) == (5.0, 3.0)


def test_kernels_that_were_compiled_before_count_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is compiled for two seconds, then loaded for half of one; another is only loaded."""
    needs_triton()
    from triton import knobs

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
