"""What a GPU adds up is what a CPU does: on a GPU, else with the kernels that read for one interpreted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.kernels import DEVICE, needs_triton

needs_triton()

from bamba_quant.calibration import imatrix as module
from bamba_quant.calibration.imatrix import collect
from bamba_quant.inference.loading import load_model
from bamba_quant.inference.prefetch import Prefetcher
from tests.calibration.test_imatrix import random_chunks
from tests.support.conversion import to_gguf
from tests.support.families import MIXERS_ALONE, STACKED, random_case, save


@pytest.mark.parametrize(("name", "case"), [STACKED[0], MIXERS_ALONE[0]])
def test_prefetching(name: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save(random_case(name, case), tmp_path / "m")
    loaded = load_model(to_gguf(directory, tmp_path / "m.gguf", "q8_0", vocab=False))
    expected = collect(loaded, random_chunks(), (), output=True)
    monkeypatch.setattr(module, "prefetcher_for", lambda device: Prefetcher(device, 1 << 20))
    monkeypatch.setattr(module, "_HIDDEN_BYTES", 2 * 4 * 40 * 64)
    monkeypatch.setattr(module, "_HIDDEN_BYTES_ON_GPU", 2 * 4 * 40 * 64)
    found = collect(loaded, random_chunks(), (), output=True, device=DEVICE.type)
    assert found.entries.keys() == expected.entries.keys()
    for tensor, entry in expected.entries.items():
        np.testing.assert_array_equal(found.entries[tensor].counts, entry.counts, err_msg=tensor)
        np.testing.assert_allclose(
            found.entries[tensor].squares,
            entry.squares,
            rtol=1e-3,
            atol=1e-6 * entry.squares.max(),
            err_msg=tensor,
        )
