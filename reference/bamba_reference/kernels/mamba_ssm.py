"""The backend of the packages mamba_ssm and causal_conv1d, completed by the Triton backend.

The packages compute the convolution, both scans and the gated norm; in decoding, which runs in a recorded graph, the
convolution and Mamba-2's recurrence are Triton's. What they do not support is an error; nothing falls back silently.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bamba_reference.kernels.backend import TRITON
from bamba_reference.torch.backend import Backend, BackendError
from bamba_reference.torch.scan import ScanArguments, SelectiveScanArguments

_CHUNK = 256  # mamba_ssm's own default, and the one its kernels are tuned for
_CHANNELS = 8  # which causal_conv1d reads at once
_TAPS = (2, 3, 4)
_OTHERWISE = "use --backend triton or torch"


def backend() -> Backend:
    """The Triton backend with both packages' operations. Raises ``BackendError`` where one is not installed."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError as error:
        raise _missing("mamba_ssm", "mamba-ssm", error) from error
    try:
        from causal_conv1d import causal_conv1d_fn
    except ImportError as error:
        raise _missing("causal_conv1d", "causal-conv1d", error) from error

    def conv(
        xBC: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, sequence_starts: Tensor | None
    ) -> Tensor:
        W, K = weight.shape
        if K not in _TAPS or W % _CHANNELS:
            raise BackendError(
                "causal_conv1d does not support a convolution of this shape",
                found=f"{W} channels, {K} taps",
                expected=f"channels in multiples of {_CHANNELS}, 2 to 4 taps",
                fix=_OTHERWISE,
            )
        if any(stride % _CHANNELS for stride in xBC.stride()[:2]) or xBC.stride(2) != 1:
            xBC = xBC.contiguous()
        y: Tensor = causal_conv1d_fn(
            xBC.transpose(1, 2),
            weight.contiguous(),
            bias,
            # Packed sequences have no state before them (``packing.layout``), and the package does not take both.
            seq_idx=None if sequence_starts is None else _segments(sequence_starts),
            initial_states=tail.contiguous().transpose(1, 2) if sequence_starts is None else None,
            activation="silu",
        )
        return y.transpose(1, 2)

    def scan(
        arguments: ScanArguments,
    ) -> tuple[Tensor, Tensor]:
        x, dt, A_log, B, C, D, dt_bias, dt_limit, h, _, sequence_starts, real = arguments
        if real is not None and dt_limit[0] > 0:
            raise BackendError(
                "mamba_ssm cannot skip padding where dt has a lower limit",
                found=f"time_step_limit {dt_limit}",
                fix=f"{_OTHERWISE}, or a batch without padding",
            )
        y, after = mamba_chunk_scan_combined(
            x,
            _without_padding(dt, real),
            -A_log.exp(),
            B,
            C,
            chunk_size=_CHUNK,
            D=D,
            dt_bias=dt_bias,
            initial_states=h,
            seq_idx=None if sequence_starts is None else _segments(sequence_starts),
            dt_softplus=True,
            dt_limit=dt_limit,
            return_final_states=True,
        )
        return y, after.to(h.dtype)

    def selective_scan(
        arguments: SelectiveScanArguments,
    ) -> tuple[Tensor, Tensor]:
        x, dt, A_log, B, C, D, z, dt_bias, h, _, sequence_starts, real = arguments
        A, dtype = -A_log.exp(), z.dtype
        # The package wants one dtype, and B and C are wide after a norm.
        x, dt, z = (v.to(B.dtype) for v in (x, _without_padding(dt, real), z))
        if x.shape[1] == 1 and sequence_starts is None:
            after = h.clone()
            now = (v[:, 0] for v in (x, dt, B, C, z))
            x, dt, B, C, z = now
            y = selective_state_update(after, x, dt, A, B, C, D, z, dt_bias, dt_softplus=True)
            return y[:, None].to(dtype), after
        if sequence_starts is not None or h.any():
            raise BackendError(
                "mamba_ssm's selective scan supports one sequence a row, from its beginning",
                found="packed sequences" if sequence_starts is not None else "a state before the first token",
                fix=_OTHERWISE,
            )
        x, dt, B, C, z = (v.transpose(1, 2).contiguous() for v in (x, dt, B, C, z))  # (B, I or N, L)
        y, after = selective_scan_fn(
            x, dt, A, B, C, D, z, dt_bias, delta_softplus=True, return_last_state=True
        )
        return y.transpose(1, 2).to(dtype), after

    def gated_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
        result: Any = rmsnorm_fn(
            y, weight, None, z=z, eps=eps, group_size=y.shape[-1] // groups, norm_before_gate=False
        )
        return result.to(z.dtype)

    return replace(
        TRITON, name="mamba-ssm", conv=conv, scan=scan, selective_scan=selective_scan, gated_norm=gated_norm
    )


def _missing(package: str, distribution: str, error: ImportError) -> BackendError:
    build = "MAMBA_FORCE_BUILD=TRUE " if package == "mamba_ssm" else ""
    return BackendError(
        f"{package} is not installed, or incompletely",
        found=str(error),
        fix=f"{build}pip install --no-build-isolation {distribution} (it compiles CUDA)",
    )


def _segments(sequence_starts: Tensor) -> Tensor:
    """The number of each token's sequence in its row (B, L)."""
    return sequence_starts.cumsum(1, dtype=torch.int32)


def _without_padding(dt: Tensor, real: Tensor | None) -> Tensor:
    """Raw dt (B, L, …) whose softplus is 0 at padding."""
    return dt if real is None else dt.masked_fill(~real[..., None], -1e4)
