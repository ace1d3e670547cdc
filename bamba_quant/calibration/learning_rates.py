"""The learning rates of tuning, by what is learned and by the length of the schedule; the decay of its running mean."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from bamba_quant.calibration.latents import LatentMatrix, LatentTensor
from bamba_quant.calibration.optimizer import Group
from bamba_quant.calibration.tune_options import TuneOptions

# As measured on bamba-43m: how far a latent code may travel over a schedule, the window of the running mean, and the
# learning rates of block scales and float tensors.
_TRAVEL, _MEAN_STEPS, _BLOCKS, _FLOATS = 3.5, 100.0, 2e-3, 3e-3


def code_rate(bits: float, steps: int) -> float:
    """The default learning rate of codes, in steps of a code: a schedule moves them equally far, however long it is."""
    return min(_TRAVEL / steps, 5e-3 if bits > 3.5 else 1e-2)


def finer(rate: float, bits: float) -> float:
    """A learning rate of scales or floats beside codes of so many bits: halved for each bit above 4."""
    return rate * min(1.0, float(2.0 ** (4 - bits)))


def mean_decay(options: TuneOptions, steps: int) -> float:
    """The decay of the running mean of the latents in a schedule of so many steps."""
    return 1 - 1 / max(1.0, min(_MEAN_STEPS, steps / 5)) if options.ema is None else options.ema


def groups_of(latents: Sequence[LatentTensor], options: TuneOptions) -> list[Group]:
    """The parameters by their learning rates; a name is the tensor's and the part's."""
    matrices = [latent for latent in latents if isinstance(latent, LatentMatrix)]
    weights = sum(matrix.count for matrix in matrices)
    mean_bits = sum(matrix.bits * matrix.count for matrix in matrices) / weights if weights else 4.0
    groups: dict[tuple[str, float], Group] = {}
    for latent in latents:
        bits = latent.bits if isinstance(latent, LatentMatrix) else mean_bits
        for part, parameter in latent.parameters.items():
            group = groups.setdefault((part, bits), Group({}, partial(rate_of, options, part, bits)))
            group.parameters[f"{latent.name}:{part}"] = parameter
    return list(groups.values())


def rate_of(options: TuneOptions, part: str, bits: float, steps: int) -> float:
    """The learning rate at the beginning of a schedule of so many steps, of a part beside codes of so many bits."""
    if part == "codes":
        return code_rate(bits, steps) if options.lr is None else options.lr
    if part in ("scales", "minima"):
        return options.lr_scales
    if part == "floats":
        return finer(_FLOATS, bits) if options.lr_floats is None else options.lr_floats
    return finer(_BLOCKS, bits) if options.lr_blocks is None else options.lr_blocks
