"""The packages that the kernels compete with on a GPU, each as far as it is installed.

``MAMBA_FORCE_BUILD=TRUE pip install --no-deps --no-build-isolation mamba-ssm`` installs mamba_ssm; with
MAMBA_SKIP_CUDA_BUILD=TRUE besides, all of it but what must be compiled, which is Mamba's selective scan.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any


def let_mamba_ssm_be_imported() -> bool:
    """Whether mamba_ssm's compiled module is there; its package imports that, though most of its kernels do without."""
    name = "selective_scan_cuda"
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        sys.modules[name] = types.ModuleType(name)  # which has no specification
    return name not in sys.modules or sys.modules[name].__spec__ is not None


def kernels() -> Any:
    """mamba_ssm's functions and causal_conv1d's; those are None that are not installed, or not compiled."""
    compiled = let_mamba_ssm_be_imported()
    selective_scan_fn = rms_norm_fn = rmsnorm_fn = selective_state_update = mamba_chunk_scan_combined = None
    if importlib.util.find_spec("mamba_ssm") is not None:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        from mamba_ssm.ops.triton.layer_norm import rms_norm_fn
        from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    conv = conv_step = None
    if importlib.util.find_spec("causal_conv1d_cuda") is not None:
        from causal_conv1d import causal_conv1d_fn as conv
        from causal_conv1d import causal_conv1d_update as conv_step
    return types.SimpleNamespace(
        rms_norm=rms_norm_fn,
        gated_norm=rmsnorm_fn,
        step=selective_state_update,
        scan=mamba_chunk_scan_combined,
        selective_scan=selective_scan_fn if compiled else None,
        conv=conv,
        conv_step=conv_step,
    )
