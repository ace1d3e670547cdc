"""Readers of what ``evaluate`` is given beside models: gates, a file of logits, a text."""

from __future__ import annotations

import lzma
import struct

import numpy as np
import torch

from bamba_quant.evaluation.gates import limits_for, read_gates
from bamba_quant.evaluation.logits_file import base_blocks, encode_rows, is_logits_file, read_logits_file
from bamba_quant.evaluation.models import describe_logits
from bamba_quant.inference.loading import read_text
from bamba_quant.report.json_report import read_report, to_json
from tests.fuzz.mutations.blind import files
from tests.fuzz.mutations.json_text import json_text
from tests.fuzz.mutations.structs import logits
from tests.fuzz.mutations.text import plain_text, toml_text
from tests.fuzz.registry import Case, reader
from tests.fuzz.tree import Tree
from tests.support.evaluations import make_evaluation

_GATES = b"""# Limits.
[default]
max-kld = 0.05
min-same-top = 0.9

[q4_k_m]
max-ppl-ratio = 1.01
max-kld-99 = 0.5

[model]
"""
_CTX, _VOCAB, _CHUNKS = 16, 33, 2


@reader("gates", seeds=lambda: [{"gates.toml": _GATES}], mutate=files({"gates.toml": toml_text}), weight=4)
def gates(case: Case) -> None:
    sections = read_gates(case.path / "gates.toml")
    for limit in limits_for(sections, make_evaluation(("q4_k_m",), chunks=8).candidates[0].model):
        _ = limit.name


def _logits() -> list[Tree]:
    scored = _CTX - 1 - _CTX // 2
    generator = np.random.default_rng(0)
    rows = encode_rows(generator.normal(size=(_CHUNKS * scored, _VOCAB)).astype(np.float32))
    tokens = (np.arange(_CHUNKS * _CTX, dtype="<i4") % _VOCAB).tobytes()
    return [
        {"base.logits": struct.pack("<8sIii", b"_logits_", _CTX, _VOCAB, _CHUNKS) + tokens + rows.tobytes()}
    ]


@reader("logits", seeds=_logits, mutate=files({"base.logits": logits}), weight=4)
def logits_file(case: Case) -> None:
    path = case.path / "base.logits"
    is_logits_file(path)
    given = read_logits_file(path)
    blocks = [given.scored] * min(given.chunks, 3)
    for _ in base_blocks(given, slice(0, len(blocks)), blocks, torch.device("cpu")):
        pass
    describe_logits(given)


@reader(
    "report",
    seeds=lambda: [{"report.json": to_json(make_evaluation(("q8_0",), chunks=8)).encode()}],
    mutate=files({"report.json": json_text}),
    weight=2,
)
def report(case: Case) -> None:
    to_json(read_report(case.path / "report.json"))


_TEXT = "A text of a few words, é and 日本.\n".encode() * 5


@reader(
    "text",
    seeds=lambda: [{"text.txt": form(_TEXT)} for form in (bytes, lzma.compress)],
    mutate=files({"text.txt": plain_text}, odd=0.2),
    weight=1,
)
def text(case: Case) -> None:
    read_text(case.path / "text.txt")
