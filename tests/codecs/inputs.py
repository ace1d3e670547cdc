"""Rows of weights and importance that between them reach every branch of ggml's quantizers."""

from __future__ import annotations

import numpy as np

from bamba_quant.codecs.arrays import F32

ROWS, COLUMNS = 7, 768  # 21 blocks of 256: a full set of sixteen lanes and one that is not


def weights() -> dict[str, F32]:
    """Named arrays of shape (ROWS, COLUMNS)."""
    rng = np.random.default_rng(4)
    shape = (ROWS, COLUMNS)
    normal = rng.normal(size=shape)
    arrays = {
        "normal": 0.02 * normal,
        "heavy-tailed": 0.01 * rng.standard_t(1.5, size=shape),
        "constant": np.full(shape, 0.37),
        "negative constant": np.full(shape, -0.37),
        "all zero": np.zeros(shape),
        "zeros of both signs": np.where(normal < 0, -0.0, 0.0),
        "subnormal": 1e-40 * normal,
        "smallest subnormal": np.sign(normal) * 1.4e-45,
        "near the zero threshold": 1e-15 * normal,
        "huge": 1e30 * normal,
        "near overflow": np.clip(1.5e38 * normal, -3.4e38, 3.4e38),
        "beyond float16": 1e5 * normal,
        "positive": rng.random(shape),
        "negative": -1 - rng.random(shape),
        "integers": rng.integers(-8, 9, shape),
        "sparse": normal * (rng.random(shape) < 0.03),
        "one outlier": np.where(np.arange(COLUMNS) % 256 == 77, 1000.0, 0.02 * normal),
        "powers of two": np.ldexp(1.0, rng.integers(-30, 30, shape)) * np.sign(normal),
    }
    mixed = normal.copy()
    mixed[1] = 0
    mixed[2] *= 1e-42
    mixed[3] *= 1e35
    mixed[4, :300] = 5
    mixed[5] = np.abs(mixed[5])
    mixed[6] *= np.exp(8 * rng.normal(size=COLUMNS))
    arrays["mixed"] = mixed
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def importances() -> dict[str, F32 | None]:
    """Named importance of shape (COLUMNS,), or none."""
    rng = np.random.default_rng(5)
    spread = 3 * rng.random(COLUMNS) ** 2
    with_zeros = np.where(rng.random(COLUMNS) < 0.3, 0, spread)
    with_zeros[256:512] = 0
    named = {"importance": spread, "importance with zeros": with_zeros, "importance all zero": 0 * spread}
    return {"no importance": None} | {name: array.astype(np.float32) for name, array in named.items()}
