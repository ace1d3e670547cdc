"""Tuned rounding: nearer to the original on text it has not seen, never further, and repeatable."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bamba_quant.calibration import narrow_gradients
from bamba_quant.calibration.latents import LatentMatrix, LatentVector
from bamba_quant.calibration.student import HeldOut, gradients, model_of, passes, sequences_of, weights_now
from bamba_quant.calibration.texts import Text
from bamba_quant.calibration.tune import latents_of, tune
from bamba_quant.calibration.tune_data import Batches, customary_steps, tune_data, write_text
from bamba_quant.calibration.tune_options import TuneError, TuneOptions, TuneProgress
from bamba_quant.calibration.tune_run import evaluations_of
from bamba_quant.checkpoint.gguf_file import read_gguf
from bamba_quant.checkpoint.safetensors_file import read_safetensors
from bamba_quant.codecs import BlockCodec, SafetensorsCodec, codec_named, codecs
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import BambaQuantError
from bamba_quant.evaluation.scores import base_block, score
from bamba_quant.inference.loading import load_model
from bamba_quant.metadata.tune_record import TuneRecord
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.recipes.selection import TypeOverrides
from bamba_quant.tokenizers.encoder import read_encoder
from bamba_reference.packing import InputError
from bamba_reference.torch import forward as torch_forward
from bamba_reference.torch import ops as torch_ops
from tests.support.conversion import to_gguf
from tests.support.families import FAMILIES, ONE_BY_ONE, save
from tests.support.models import random_bamba
from tests.support.quantized import DIVIDES, read_all, save_quantized

FEW = TuneOptions(steps=4, ctx=64, batch=4, held_out=12, evaluations=2, seed=1)
CPU = torch.device("cpu")


@cache
def help_texts() -> tuple[Text, ...]:
    """Python's own help texts, which every machine has."""
    content = "\n\n".join(topics[name] for name in sorted(topics))
    return (Text(Path("topics.txt"), "0" * 64, content[:120_000]),)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedded_model()


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_gguf(model, tmp_path_factory.mktemp("gguf") / "q3.gguf", "q3_k_m")


def patched(source: Path, target: Path, tensors: dict[str, Any]) -> Path:
    raw = bytearray(source.read_bytes())
    stored = (
        read_gguf(source).tensors if source.suffix == ".gguf" else read_safetensors(source, quantized=True)
    )
    for name, values in tensors.items():
        content = np.ascontiguousarray(values).tobytes()
        raw[stored[name].offset : stored[name].offset + len(content)] = content
    target.write_bytes(raw)
    return target


def divergence(original: Path, quantized: Path, ids: np.ndarray) -> float:
    """What an evaluation gives on these chunks: every model run by itself, scores of the second halves."""
    first = ids.shape[1] // 2
    logits = []
    for path in (original, quantized):
        loaded = load_model(path)
        model = torch_forward.load(loaded.config, loaded.weights)
        with torch.no_grad():
            logits.append(torch_forward.forward(model, ids).logits[:, first:-1].flatten(0, 1))
    return float(score(base_block(logits[0], ids[:, first + 1 :].ravel()), logits[1])["kld"].mean())


def assert_measured_right(
    record: TuneRecord, original: Path, before: Path, after: Path, options: TuneOptions
) -> None:
    """The record's figures are those of the files on the text that was held out."""
    loaded = load_model(original)
    of = SimpleNamespace(config=loaded.config)
    data = tune_data(read_encoder(loaded.checkpoint), help_texts(), of, options, 1)  # type: ignore[arg-type]
    assert record.held_out_kld_before == pytest.approx(divergence(original, before, data.held_out), rel=1e-4)
    assert record.held_out_kld_after == pytest.approx(divergence(original, after, data.held_out), rel=1e-4)


def held_out_divergence(original: Path, ids: np.ndarray, weights_of: dict[str, torch.Tensor]) -> float:
    source = load_model(original)
    weights = {
        name: torch_forward.to_tensor(source.weights[name], torch.float32, CPU) for name in source.weights
    }
    sequences = sequences_of(source.config, ids.shape[1], CPU)
    teacher, student = (
        passes(model_of(source.config, each, CPU), sequences, 3) for each in (weights, weights_of)
    )
    return HeldOut(torch.from_numpy(ids), source.config.vocab_size, *teacher).divergence(*student)


def test_the_start_is_the_quantized_file(model: Path, quantized: Path) -> None:
    ids = np.random.default_rng(0).integers(3, 2048, (4, 48))
    options = dataclasses.replace(FEW, train=("codes", "scales", "blocks", "floats"))
    source, target = load_model(model), load_model(quantized)
    latents, constants, _ = latents_of(source, target, options, CPU)
    assert {type(latent) for latent in latents} == {LatentMatrix, LatentVector}
    found = held_out_divergence(model, ids, weights_now(constants, latents))
    assert found == pytest.approx(divergence(model, quantized, ids), rel=1e-5)
    for latent in latents:
        before = read_gguf(quantized).tensors[latent.tensor.name]
        raw = latent.raw(latent.snapshot())
        with quantized.open("rb") as stream:
            stream.seek(before.offset)
            assert raw.tobytes() == stream.read(before.n_bytes), latent.name


def test_a_tuned_file_is_nearer_to_the_original(model: Path, quantized: Path, tmp_path: Path) -> None:
    seen: list[TuneProgress] = []
    tuned = tune(model, quantized, help_texts(), FEW, seen.append)
    record = tuned.record
    assert record.better and record.held_out_kld_after < 0.98 * record.held_out_kld_before
    assert [progress.step for progress in seen] == [1, 2, 3, 4]
    assert {progress.before for progress in seen} == {record.held_out_kld_before}
    assert seen[-1].seconds_left == 0
    assert 0 < record.codes_changed == sum(tuned.changed.values()) < 0.1 * record.codes
    file = patched(quantized, tmp_path / "tuned.gguf", dict(tuned.tensors))
    assert_measured_right(record, model, quantized, file, FEW)
    stored = read_gguf(quantized).tensors
    for name, values in tuned.tensors.items():
        assert values.nbytes == stored[name].n_bytes


@pytest.mark.parametrize("content", ["", "a few words"])
def test_texts_that_are_too_short(content: str, model: Path, quantized: Path) -> None:
    with pytest.raises(InputError, match="too short"):
        tune(model, quantized, [Text(Path("x"), "0" * 64, content)], FEW)


def test_tokens_that_the_model_lacks(model: Path) -> None:
    loaded = load_model(model)
    small = SimpleNamespace(config=dataclasses.replace(loaded.config, vocab_size=1000))
    with pytest.raises(InputError, match="out of the vocabulary's range"):
        tune_data(read_encoder(loaded.checkpoint), help_texts(), small, FEW, 1)  # type: ignore[arg-type]


def test_a_model_that_memory_cannot_hold(
    model: Path, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bamba_quant.inference.memory.available_memory", lambda device: 50_000_000)
    with pytest.raises(BambaQuantError, match="does not fit in the memory of cpu"):
        tune(model, quantized, help_texts(), FEW)


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), float("inf")])
def test_minutes_that_are_no_time_to_tune_in(minutes: float) -> None:
    with pytest.raises(TuneError, match="max_minutes"):
        TuneOptions(max_minutes=minutes)


def test_a_worse_state_is_not_taken(model: Path, quantized: Path) -> None:
    tuned = tune(model, quantized, help_texts(), dataclasses.replace(FEW, steps=2, lr=1.0))
    assert not tuned.record.better
    assert tuned.record.held_out_kld_after == tuned.record.held_out_kld_before
    assert not tuned.tensors and tuned.record.codes_changed == 0


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    model: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("_SAVE_SECONDS", "_SAVE_SHARE"):
        monkeypatch.setattr(f"bamba_quant.calibration.tune_run.{limit}", 0.0)
    options = dataclasses.replace(
        FEW, steps=4, evaluations=2, train=("codes", "scales", "floats"), ema=0.5, state=tmp_path / "state"
    )
    whole = tune(model, quantized, help_texts(), options)

    class Stopped(KeyboardInterrupt):
        pass

    def interrupt(progress: TuneProgress) -> None:
        if progress.step == 2:
            raise Stopped

    with pytest.raises(Stopped):
        tune(model, quantized, help_texts(), options, interrupt)
    going_on = dataclasses.replace(options, resume=True)
    seen: list[TuneProgress] = []
    resumed = tune(model, quantized, help_texts(), going_on, seen.append)
    assert [progress.step for progress in seen] == [3, 4]
    assert resumed.record == whole.record
    for name, values in whole.tensors.items():
        assert np.array_equal(resumed.tensors[name], values), name
    with pytest.raises(TuneError, match="another run"):
        tune(model, quantized, help_texts(), dataclasses.replace(going_on, seed=9))


def test_a_schedule_is_fitted_to_the_time(
    model: Path, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.count(0, 0.25)
    clock = SimpleNamespace(monotonic=lambda: next(seconds))  # a quarter of a second whenever it is looked at
    for module in ("tune", "tune_run"):
        monkeypatch.setattr(f"bamba_quant.calibration.{module}.time", clock)
    seen: list[TuneProgress] = []
    options = dataclasses.replace(
        FEW, steps=10_000, tokens=640, batch=1, evaluations=1, held_out=1, max_minutes=0.5
    )
    tune(model, quantized, help_texts(), options, seen.append)
    assert 20 < seen[-1].step == seen[-1].steps
    assert 25 < next(seconds) < 35


def test_every_type_is_tuned_in_one_file(model: Path, tmp_path: Path) -> None:
    types = [each.name for each in codecs(BlockCodec) if each.fields is not None and each.ggml_type >= 0]
    assert len(types) == 13
    conversion = plan_conversion(model, outtype="q4_k_m")
    matrices = [row.name for row in conversion.rows if row.format.fields is not None]
    mixed = dict(zip(matrices, itertools.cycle(types), strict=False))
    overrides = TypeOverrides(tensor_types=tuple((f"^{name}$", mixed[name]) for name in matrices))
    file = to_gguf(model, tmp_path / "mixed.gguf", overrides=overrides, outtype="q4_k_m")
    tuned = tune(str(model), str(file), help_texts(), dataclasses.replace(FEW, steps=2, evaluations=1))
    assert tuned.record.better and len(repr(tuned)) < 200
    changed: dict[str, int] = defaultdict(int)
    for name, count in tuned.changed.items():
        assert read_gguf(file).tensors[name].format.name == mixed[name]
        changed[mixed[name]] += count
    assert changed.keys() == set(types) and min(changed.values()) > 0
    after = patched(file, tmp_path / "tuned.gguf", dict(tuned.tensors))
    assert_measured_right(tuned.record, model, file, after, FEW)


def random_experts() -> Any:
    """A model whose experts are a tensor each."""
    family = FAMILIES[ONE_BY_ONE[0][0]]
    return family.random(4, **{**family.small.multiples_of_128, "vocab_size": 2048})


@pytest.mark.parametrize(
    ("name", "experts"),
    [
        *(
            (name, False)
            for name in (
                "w4a16-g128",
                "w4a16-asym-g64",
                "w8a16-g32",
                "torchao-int4-g64",
                "fp8-block",
                "nvfp4a16",
            )
        ),
        ("fp8-dynamic", True),
    ],
)
def test_directories_are_tuned_too(name: str, experts: bool, tmp_path: Path) -> None:
    network = random_experts() if experts else random_bamba(seed=4, vocab_size=2048, **DIVIDES)
    source = save(network, tmp_path / "model", dtype="bfloat16", spelling=5)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (source / file).write_bytes((embedded_model() / file).read_bytes())
    # The search for FP8 scales takes seconds in numpy.
    method = "absmax" if name.startswith("fp8") else None
    directory = save_quantized(source, tmp_path / "quantized", codec_named(name, SafetensorsCodec), method)
    steps = 4 if experts else 8  # through mixers whose scan is slow
    options = dataclasses.replace(FEW, steps=steps, held_out=8, train=("codes", "blocks"))
    tuned = tune(source, directory, help_texts(), options)
    assert tuned.record.better and tuned.record.codes_changed
    on_disk = read_all(directory)
    for stored, values in tuned.tensors.items():
        assert values.nbytes == on_disk[stored].nbytes, stored
    target = tmp_path / "tuned"
    target.mkdir()
    (target / "config.json").write_bytes((directory / "config.json").read_bytes())
    patched(directory / "model.safetensors", target / "model.safetensors", dict(tuned.tensors))
    assert_measured_right(tuned.record, source, directory, target, options)


def test_gradients_are_differences_of_the_divergence(model: Path, quantized: Path) -> None:
    source, target = load_model(model), load_model(quantized)
    options = dataclasses.replace(FEW, train=("floats",))
    latents, constants, _ = latents_of(source, target, options, CPU)
    weights = {
        name: torch_forward.to_tensor(source.weights[name], torch.float32, CPU) for name in source.weights
    }
    teacher, sequences = model_of(source.config, weights, CPU), sequences_of(source.config, 40, CPU)
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 2048, (3, 40)))

    def loss(micro: int) -> float:
        return float(gradients(target.config, teacher, constants, latents, ids, sequences, micro))

    loss(2)
    expected = {latent.name: latent.parameters["floats"].grad.clone() for latent in latents}  # type: ignore[union-attr]
    for latent in latents[::5]:
        parameter = latent.parameters["floats"]
        gradient = expected[latent.name]
        direction = gradient / gradient.norm()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 2e-2 * direction
            values.append(loss(3))
            with torch.no_grad():
                parameter -= sign * 2e-2 * direction
        assert (values[0] - values[1]) / 4e-2 == pytest.approx(float(gradient.norm()), rel=0.05, abs=2e-5), (
            latent.name
        )


def test_narrow_gradients_are_those_of_the_same_product() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 50, 64, generator=generator)
    weight, bias = (torch.randn(*shape, generator=generator) for shape in ((32, 64), (32,)))
    direction = torch.randn(3, 50, 32, generator=generator)
    found = []
    for linear in (narrow_gradients.linear, torch_ops.linear):
        inputs = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = linear(*inputs, "name")
        (y * direction).sum().backward()
        found.append([y.detach(), *(t.grad for t in inputs)])
    for ours, theirs, tolerance in zip(*found, (0, 1e-2, 1e-2, 0), strict=True):
        assert float((ours - theirs).norm()) <= tolerance * float(theirs.norm())


@pytest.mark.parametrize("fixed", [True, False])
def test_batches_go_through_all_chunks_each_epoch(fixed: bool) -> None:
    stream, whole = np.arange(1000, 2000), np.arange(64).reshape(4, 16)
    batches = Batches(stream, whole, 9, 5, 7, fixed)
    assert batches.tokens == 1064
    steps = -(-batches.count // 5)
    first, numbers = (np.concatenate(part) for part in zip(*map(batches.batch, range(steps)), strict=True))
    first, numbers = first[: batches.count], numbers[: batches.count]
    assert sorted(numbers) == list(range(batches.count))
    assert (first[:, 0] == 9).all() and {17, 33, 49} <= set(first[:, 1])
    assert np.array_equal(first, batches.chunks()[numbers])
    assert np.array_equal(batches.batch(3)[0], batches.batch(3)[0])
    assert np.array_equal(batches.chunks(0), batches.chunks(1)) == fixed


def test_states_of_the_original_that_are_kept_change_nothing(
    model: Path, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dataclasses.replace(FEW, tokens=256)  # four chunks, so that every step sees all of them again
    kept = tune(model, quantized, help_texts(), options)
    monkeypatch.setattr("bamba_quant.calibration.tune._KNOWN_BYTES", 0)
    computed = tune(model, quantized, help_texts(), options)
    assert kept.record.steps == 4 and kept.changed == computed.changed
    assert kept.record.held_out_kld_after == pytest.approx(computed.record.held_out_kld_after, rel=1e-6)


def test_measuring_takes_a_small_share_of_the_time() -> None:
    assert evaluations_of(FEW, 16, 12) == 2
    usual = TuneOptions()
    assert [evaluations_of(usual, chunks, 64) for chunks in (8, 800, 28_800)] == [1, 3, 10]


def test_customary_steps_are_the_measured_ones() -> None:
    assert customary_steps(3_700_000) == 1200
    assert 350 < customary_steps(230_000) < 450
    assert customary_steps(1000) == 50


def test_a_model_writes_text_that_it_finds_likely(model: Path) -> None:
    loaded = load_model(model)
    weights = {
        name: torch_forward.to_tensor(loaded.weights[name], torch.float32, CPU) for name in loaded.weights
    }
    teacher = model_of(loaded.config, weights, CPU)
    written = write_text(teacher, 3, 40, 0, 5)
    assert written.shape == (3, 40) and (written[:, 0] == 0).all()
    assert np.array_equal(written, write_text(teacher, 3, 40, 0, 5))
    random = np.random.default_rng(0).integers(3, 2048, written.shape)

    def likelihood(ids: np.ndarray) -> float:
        log_p = torch_forward.forward(teacher, ids).logits.log_softmax(-1)[:, :-1]
        return float(log_p.gather(2, torch.from_numpy(ids)[:, 1:, None]).mean())

    assert likelihood(written) > likelihood(random) + 2


def test_text_of_the_model_alone_will_do(model: Path, quantized: Path) -> None:
    options = dataclasses.replace(FEW, steps=2, evaluations=1, self_tokens=800, held_out=4)
    record = tune(model, quantized, (), options).record
    assert record.texts == ("self",) and record.tokens == 832
    with pytest.raises(TuneError, match="no text"):
        tune(model, quantized, (), FEW)
