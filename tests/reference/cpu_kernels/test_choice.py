""" "auto" is the compiled backend on a CPU in float32; no other dtype or device gets it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bamba_reference.backends import backend_named
from bamba_reference.kernels.cpu.backend import NUMBA
from bamba_reference.torch.backend import TORCH, BackendError

CPU = torch.device("cpu")


def test_choice_by_name() -> None:
    assert backend_named("auto", CPU, torch.float32) is NUMBA
    assert backend_named("numba", CPU, torch.float32) is NUMBA
    assert backend_named("auto", CPU, torch.float32, work=1e12) is NUMBA
    assert backend_named("auto", CPU, torch.float32, work=1e10) is TORCH
    assert backend_named("numba", CPU, torch.float32, work=1e10) is NUMBA
    assert backend_named("torch", CPU, torch.float32) is TORCH
    with pytest.raises(BackendError, match=r"expected: auto, torch, numba, .*; for perplexity also numpy"):
        backend_named("trtion", CPU, torch.float32)
    for dtype in (torch.bfloat16, torch.float64):
        assert backend_named("auto", CPU, dtype) is TORCH
        with pytest.raises(BackendError, match=f"{dtype}".removeprefix("torch.")):
            backend_named("numba", CPU, dtype)
    with pytest.raises(BackendError, match=r"definition of its own.*\n.*numpy\n.*expected: auto, torch"):
        backend_named("numpy", CPU, torch.float32)
    with pytest.raises(BackendError, match="device cuda"):
        backend_named("numba", torch.device("cuda"), torch.float32)


COMPARED = """
import torch
from bamba_reference.torch import ops as torch_ops
from bamba_reference.kernels.cpu import tiles
from bamba_reference.kernels.cpu.backend import NUMBA
from bamba_reference.torch.scan import ScanArguments, scan
assert (tiles.LANES, tiles.ROWS) == {tile}, tiles.LANES
x, w = torch.randn(70, 100), torch.randn(90, 100)
assert torch.equal(NUMBA.linear(x, w, None, ""), torch_ops.linear(x, w, None, ""))
H, P, N = 3, 20, 24
args = [torch.randn(1, 50, H, P), torch.randn(1, 50, H), torch.rand(H), *torch.randn(2, 1, 50, 1, N), torch.randn(H),
        torch.randn(H), (0.0, float("inf")), torch.randn(1, H, P, N), 32, None, None]
pairs = [(NUMBA.scan(ScanArguments(*args))[0], scan(ScanArguments(*args))[0])]
if tiles.LANES == 8:  # seconds of compiling
    q = torch.randn(1, 70, 4, 20)
    pairs += [(NUMBA.attention(q, q, q, .2, None, None), torch_ops.attention(q, q, q, .2, None, None))]
for ours, theirs in pairs:
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
"""


@pytest.mark.parametrize(
    ("features", "tile"), [("+sse2,+avx,+avx2,+fma", (8, 4)), ("+sse2", (4, 4))], ids=["AVX2", "SSE2"]
)
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="compiles for other x86-64 processors")
def test_processors_without_avx512(features: str, tile: tuple[int, int], tmp_path: Path) -> None:
    """Their tiles are narrower, and their products torch's."""
    compiler = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", COMPARED.format(tile=tile)], check=True, env=os.environ | compiler, timeout=300
    )
