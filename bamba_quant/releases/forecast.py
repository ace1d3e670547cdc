"""What a release will make and take, from headers alone: files and bytes, disk, memory and time; and what would fail.

Bytes are those of the plans. Memory and time are estimates: of what each step holds by its definition, and of the speed
at which this machine multiplies matrices now.
"""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bamba_quant.errors import join_names
from bamba_quant.planning.plan import Plan
from bamba_quant.releases.make import plan_of, planned_imatrix
from bamba_quant.releases.preset import ReleaseError
from bamba_quant.releases.tasks import Release, Task

_CALIBRATION_CTX = 512
# Measured on two cores with bamba-43m and Bamba-9B's shape (docs/release.md): the process itself, weights that a core
# quantizes in a second, and the share of a large product's speed that a model reaches.
_PROCESS_BYTES = 700 << 20
_WEIGHTS_A_SECOND = 40e6
_SHARE_OF_PRODUCTS = 0.5
_REPORT_BYTES = 4 << 20
_HEAD_TOKENS = 512


@dataclass(frozen=True)
class Forecast:
    """``files`` are the bytes of each file by task; ``disk`` and ``memory`` are peaks in bytes, ``seconds`` by task.

    ``disk`` counts what the release adds. The seconds of tuning are not known, and ``tuned`` names its tasks.
    """

    files: Mapping[str, Mapping[Path, int]]
    bits_per_weight: Mapping[str, float]
    notes: Mapping[str, tuple[str, ...]]
    disk: int
    memory: int
    seconds: Mapping[str, float]
    tuned: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        return sum(n_bytes for files in self.files.values() for n_bytes in files.values())


def forecast(release: Release, *, config_only: bool = False, timed: bool = True) -> Forecast:
    """Plan every output. With ``config_only`` a config.json is enough; ``timed`` measures the machine for a second.

    Raises a ``BambaQuantError`` for whatever could not be made.
    """
    imatrix = planned_imatrix(release)
    release.folders  # noqa: B018 - raises for names
    plans = {
        task: plan_of(release, task, imatrix, config_only=config_only)
        for task in release.tasks
        if task.kind in ("gguf", "directory")
    }
    files = {task.name: plan.paths(release.output(task)) for task, plan in plans.items()}
    plan = next(iter(plans.values()))
    if imatrix is not None:
        task = release.tasks[0]
        files = {task.name: {release.output(task): _imatrix_bytes(plan)}, **files}
    # Tuning a GGUF holds an untuned copy beside it.
    copies = [
        sum(files[task.name].values())
        for task in plans
        if task.kind == "gguf" and task.name in release.preset.tune
    ]
    total = sum(n_bytes for some in files.values() for n_bytes in some.values())
    return Forecast(
        files,
        {task.name: each.bits_per_weight for task, each in plans.items()},
        {task.name: each.notes for task, each in plans.items()},
        total + max(copies, default=0) + _REPORT_BYTES,
        _PROCESS_BYTES + max(_evaluation_bytes(release, plan, len(plans)), _largest_layer(plan)),
        _seconds(release, plan, plans) if timed else {},
        release.preset.tune,
    )


def check_release(release: Release, planned: Forecast) -> None:
    """Raise a ``BambaQuantError`` for what would fail after hours: texts, gates, and the space on the disk."""
    from bamba_quant.evaluation.gates import check_enough
    from bamba_quant.inference.loading import load_model_and_tokenizer

    preset = release.preset
    wanted = [
        name
        for name, asked in (("an importance matrix", preset.imatrix_chunks), ("tuning", preset.tune))
        if asked
    ]
    if wanted and not release.calibrate:
        raise ReleaseError(
            f"the preset {preset.name} asks for {' and '.join(wanted)}, which take a text to learn from",
            fix="give --calibrate FILE, another text than --text, or a preset with imatrix_chunks = 0 and without tune",
        )
    same = [str(each) for each in release.calibrate if each.exists() and each.samefile(release.text)]
    if same:
        raise ReleaseError(
            "the text to measure on is one that the files learn from",
            found=join_names(same),
            fix="give different texts with --text and --calibrate",
        )
    _, encoder = load_model_and_tokenizer(release.model, None, release.reading)
    if release.calibrate and preset.imatrix_chunks:
        from bamba_quant.calibration.texts import read_texts, token_chunks

        token_chunks(encoder, read_texts(release.calibrate), _CALIBRATION_CTX, preset.imatrix_chunks)
    from bamba_quant.inference.loading import read_text

    content, _ = read_text(release.text)
    there = len(encoder.encode(content)) // preset.ctx
    chunks = min(preset.chunks, there)
    limits = [each for section in preset.gates.values() for each in section]
    if there < 2:
        raise ReleaseError(
            "the text has less than two chunks", where=release.text, expected=f"{2 * preset.ctx} tokens"
        )
    check_enough(limits, chunks, chunks * (preset.ctx - 1 - preset.ctx // 2))
    made = sum(file.stat().st_size for some in planned.files.values() for file in some if file.is_file())
    place = next(each for each in (release.directory, *release.directory.parents) if each.exists())
    free = shutil.disk_usage(place).free
    if planned.disk - made > free:
        raise ReleaseError(
            "the disk has too little space for the release",
            where=place,
            found=f"{free:,} bytes free",
            expected=f"{planned.disk - made:,} bytes",
            fix="free some space, or leave out types of the preset",
        )


def _imatrix_bytes(plan: Plan) -> int:
    """Two sums a column in float32, for every matrix of a layer."""
    model = plan.model
    assert model is not None
    rules = [rule for _, rule in model.pairs if rule.gguf and len(rule.gguf_shape) > 1]
    return sum(8 * rule.gguf_shape[-1] * math.prod(rule.gguf_shape[:-2]) for rule in rules)


def _layers(plan: Plan) -> Counter[int]:
    """The weights of each layer."""
    assert plan.model is not None
    layers: Counter[int] = Counter()
    for _, rule in plan.model.pairs:
        if rule.layer is not None:
            layers[rule.layer] += math.prod(rule.shape)
    return layers


def _largest_layer(plan: Plan) -> int:
    """Bytes in float32 of the layer with the most weights."""
    return 4 * max(_layers(plan).values())


def _evaluation_bytes(release: Release, plan: Plan, candidates: int) -> int:
    """Hidden states and the logits of a block of tokens of every model, and three weight sets of a layer."""
    assert plan.model is not None
    config, preset = plan.model.config, release.preset
    hidden = 4 * (candidates + 1) * preset.ctx * preset.chunks * config.hidden_size
    logits = 4 * (candidates + 1) * _HEAD_TOKENS * config.vocab_size
    return hidden + 3 * _largest_layer(plan) + logits


def _seconds(release: Release, plan: Plan, plans: Mapping[Task, Plan]) -> dict[str, float]:
    from bamba_quant.writers.tasks import default_threads

    assert plan.model is not None
    preset, config, rate = (
        release.preset,
        plan.model.config,
        _SHARE_OF_PRODUCTS * _products_a_second(release.device),
    )
    layers = 2.0 * sum(_layers(plan).values())  # operations for a token
    head = config.hidden_size * config.vocab_size  # twice that for the half of the tokens that is scored
    found = {
        task.name: each.elements / (_WEIGHTS_A_SECOND * default_threads()) for task, each in plans.items()
    }
    if preset.imatrix_chunks:
        found["imatrix"] = layers * preset.imatrix_chunks * _CALIBRATION_CTX / rate
    found["evaluate"] = (layers + head) * (len(plans) + 1) * preset.chunks * preset.ctx / rate
    return found


def _products_a_second(device: str) -> float:
    """Floating-point operations a second of a large float32 product on ``device``."""
    import torch

    n = 1024 if device == "cpu" else 8192
    a = torch.ones(n, n, device=device)
    (a @ a).sum().item()  # the first one loads the library
    started, rounds = time.perf_counter(), 0
    while time.perf_counter() - started < 0.3:
        (a @ a).sum().item()
        rounds += 1
    return rounds * 2.0 * n**3 / (time.perf_counter() - started)
