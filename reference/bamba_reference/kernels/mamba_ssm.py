"""The scan and the gated norm of the package mamba_ssm, where it is installed; the rest is the Triton backend's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from bamba_reference.backend import Backend, BackendError

_CHUNK = 256  # mamba_ssm's own default, and the one its kernels are tuned for


def backend() -> Backend:
    """The Triton backend with mamba_ssm's scan and gated norm. Raises ``BackendError`` where it is not installed."""
    try:
        from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError as error:
        raise BackendError(
            "mamba_ssm is not installed, or not whole",
            found=str(error),
            fix="MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation mamba-ssm (it compiles CUDA)",
        ) from error
    from bamba_reference.kernels.backend import TRITON

    def scan(
        x: Tensor,
        dt: Tensor,
        A_log: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        dt_bias: Tensor,
        dt_limit: tuple[float, float],
        h: Tensor,
        chunk: int,
        fresh: Tensor | None,
        real: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if real is not None:
            # Its softplus makes this nothing, where the lower limit lets it.
            if dt_limit[0] > 0:
                raise BackendError(
                    "mamba_ssm cannot skip padding where dt has a lower limit",
                    found=f"time_step_limit {dt_limit}",
                    fix="take --backend triton or torch, or a batch without padding",
                )
            dt = dt.masked_fill(~real[..., None], -1e4)
        y, after = mamba_chunk_scan_combined(
            x,
            dt,
            -A_log.exp(),
            B,
            C,
            chunk_size=_CHUNK,
            D=D,
            dt_bias=dt_bias,
            initial_states=h,
            seq_idx=None if fresh is None else fresh.cumsum(1, dtype=dt_bias.new_empty(0).int().dtype),
            dt_softplus=True,
            dt_limit=dt_limit,
            return_final_states=True,
        )
        return y, after.to(h.dtype)

    def gated_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
        result: Any = rmsnorm_fn(
            y, weight, None, z=z, eps=eps, group_size=y.shape[-1] // groups, norm_before_gate=False
        )
        return result.to(z.dtype)

    return replace(TRITON, name="mamba-ssm", scan=scan, gated_norm=gated_norm)
