"""A quantized random model of every scheme, made once for the tests that read it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bamba_quant.codecs import SafetensorsCodec
from tests.support.models import random_bamba, save_checkpoint
from tests.support.quantized import DIVIDES, save_quantized

Made = Callable[[SafetensorsCodec], Path]


@pytest.fixture(scope="package")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A quantized random model of each scheme, in two shards, made once."""
    place = tmp_path_factory.mktemp("quantized")
    base = save_checkpoint(random_bamba(seed=9, **DIVIDES), place / "base", "bfloat16")
    found: dict[str, Path] = {}

    def make(scheme: SafetensorsCodec) -> Path:
        if scheme.name not in found:
            method = scheme.methods[-1].name
            found[scheme.name] = save_quantized(base, place / scheme.name, scheme, method, shards=2)
        return found[scheme.name]

    return make
