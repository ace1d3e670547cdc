"""Quantized model directories, by the definitions of schemes and by the product's own runs."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from random import Random

from bamba_quant.codecs import SafetensorsCodec, codec_named
from bamba_quant.planning.plan import Plan
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.writers import write_plan
from tests.fuzz.mutations.json_text import changed, dumped, json_text
from tests.fuzz.mutations.values import Pairs
from tests.fuzz.seeds import models
from tests.fuzz.tree import Tree, write_tree
from tests.support.quantized import save_quantized
from tests.support.tuning import RECORD


@cache
def wide() -> Tree:
    """A model directory whose matrices divide as every scheme wants."""
    return {
        **models.directory("bamba"),
        "config.json": models.as_json(models.WIDE),
        "model.safetensors": models.safetensors(models.plain(models.drawn(models.WIDE), "BF16")),
    }


# One of each way to store codes, scales and zeros.
SCHEMES = (
    "fp8-dynamic", "fp8-tensor", "fp8-block", "fp8-block-inv", "w4a16-g32", "w4a16-asym-g128",
    "w8a16-asym-g64", "torchao-int4-g32",
    "torchao-int4-tile-packed-g128", "nvfp4a16", "mxfp4a16",
)  # fmt: skip


@cache
def quantized(scheme: str) -> Tree:
    """The directory that the model becomes under a scheme, by the scheme's definition."""
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        (place / "in").mkdir()
        write_tree(wide(), place / "in")
        save_quantized(
            place / "in", place / "out", codec_named(scheme, SafetensorsCodec), bamba_quant=RECORD.plain()
        )
        tree = dict(read_tree(place / "out"))
    tree["model.safetensors"] = _ordered(tree["model.safetensors"])  # type: ignore[arg-type]
    return {**models.directory("bamba"), **tree}


def _ordered(raw: bytes) -> bytes:
    """A safetensors file with its metadata in order, which its library writes in any."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


@cache
def written(scheme: str) -> Tree:
    """What an undisturbed run writes."""
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        (place / "in").mkdir()
        write_tree(wide(), place / "in")
        write_plan(planned(place, scheme), place / "out", threads=1)
        return read_tree(place / "out")


def planned(place: Path, scheme: str) -> Plan:
    """The plan of a run that reads and writes below ``place``."""
    return plan_quantization(place / "in", scheme, max_shard_bytes=100_000)


def read_tree(place: Path, below: str = "") -> Tree:
    """The files of a directory and of those in it."""
    return {
        below + str(file.relative_to(place)): file.read_bytes()
        for file in sorted(place.rglob("*"))
        if file.is_file()
    }


def configuration(random: Random, raw: bytes) -> bytes:
    """A config.json whose quantization_config is changed, or is a kind of another scheme; the rest rarely."""
    try:
        config = json.loads(raw, object_pairs_hook=Pairs)
        at = [key for key, _ in config].index("quantization_config")
    except (ValueError, TypeError, RecursionError):
        return json_text(random, raw)
    if random.random() < 0.1:
        return json_text(random, raw)
    if random.random() < 0.1:
        other = json.loads(quantized(random.choice(SCHEMES))["config.json"], object_pairs_hook=Pairs)  # type: ignore[arg-type]
        config[at] = ("quantization_config", dict(other)["quantization_config"])
    else:
        config[at] = ("quantization_config", changed(random, config[at][1]))
    return dumped(config).encode("utf-8", "surrogatepass")
