"""Tuning a layer at a time: the gradients of the whole model, in kernels and buffers that may be in main memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bamba_quant.calibration import tune as tuning
from bamba_quant.calibration.tune import Given, tune
from bamba_quant.calibration.tune_options import TuneError, TuneOptions, TuneProgress
from bamba_quant.codecs import BlockCodec, codec_named, codecs
from bamba_quant.inference.loading import load_model
from benchmarks.checkpoints import write_tokenizer
from tests.calibration.test_latents import BOTH, rule, stored, weights
from tests.calibration.test_tune import help_texts
from tests.support.conversion import to_gguf
from tests.support.families import save
from tests.support.kernels import DEVICE, needs_triton
from tests.support.models import random_bamba

needs_triton()

from bamba_quant.calibration import by_layer, units  # noqa: E402
from bamba_quant.calibration.coded_latents import UNIT, CodedMatrix, Rates  # noqa: E402
from bamba_quant.calibration.latents import LatentMatrix  # noqa: E402
from bamba_quant.calibration.optimizer import Adam, Group  # noqa: E402
from bamba_quant.calibration.residence import Residence  # noqa: E402

SIZES: dict[str, Any] = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16,
}  # fmt: skip
FEW = TuneOptions(
    steps=3, ctx=16, batch=4, micro_batch=3, held_out=4, evaluations=1, seed=1, dtype="bfloat16"
)
TRAIN = ("codes", "scales", "blocks")
every_format = pytest.mark.parametrize(
    "codec", [f for f in codecs(BlockCodec) if f.fields], ids=lambda f: f.name
)


def both(codec: BlockCodec, seed: int) -> tuple[LatentMatrix, CodedMatrix]:
    """The same matrix, whose rows are moved and scaled, held by either class."""
    w = weights(seed)
    raw = codec.quantize(BOTH.apply(w, 0), None)
    assert codec.fields is not None
    fields = codec.fields.unpack(raw)
    arguments = (stored(codec, raw), rule(BOTH), True, torch.from_numpy(w), fields, TRAIN, 1.5, DEVICE)
    return LatentMatrix(*arguments), CodedMatrix(*arguments)


@every_format
def test_weights_and_learning_are_the_other_class_s(codec: BlockCodec) -> None:
    plain, coded = both(codec, 1)
    # bfloat16's rounding of a weight is the same wherever it is done.
    assert torch.equal(plain.weight().detach(), coded.weight())
    g = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    plain.weight().backward(g)
    adam = Adam([Group({"codes": plain.parameters["codes"]}, lambda steps: 0.2)], eps=1e-8)
    expected = plain.parameters["codes"].grad.clone()  # type: ignore[union-attr]
    adam.prepare(1, 1, 1.0)
    adam.step()
    plain.clamp()
    rate = 0.2 * (1 - 0.99) ** 0.5 / (1 - 0.9)
    coded.learn(g, Rates(rate, 1e-8, 0.5, 7))
    for name, parameter in coded.parameters.items():
        torch.testing.assert_close(parameter.grad, plain.parameters[name].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(coded.arrays["first"].float() / 0.1, expected, rtol=1e-2, atol=1e-6)
    found = coded.arrays["latents"].float() / UNIT
    # A latent that went against its bound may lie on either side of a rounding.
    torch.testing.assert_close(found, plain.parameters["codes"].detach(), rtol=0, atol=0.05)
    raw = coded.raw(coded.snapshot())
    decoded = torch.from_numpy(codec.dequantize(raw)) if hasattr(codec, "dequantize") else None
    if decoded is not None and DEVICE.type == "cpu":
        mean = coded.weight(mean=True)
        torch.testing.assert_close(torch.from_numpy(BOTH.invert(decoded.numpy(), 0)), mean, rtol=1e-6, atol=0)


def test_small_steps_add_up() -> None:
    """A step far below the latents' resolution moves them by its size on average, whatever the seeds."""
    _, coded = both(codec_named("q8_0", BlockCodec), 2)
    g = torch.ones(coded.shape, device=DEVICE)
    coded.learn(g, Rates(0.0, 1e-30, 0.0, 0))  # brings latents back to where they may be
    before = coded.arrays["latents"].float()
    for step in range(1, 20):
        coded.learn(g, Rates(0.1 / UNIT, 1e-30, 0.0, step))
    moved = (coded.arrays["latents"].float() - before)[0].mean()
    # The moments of equal gradients are sums of geometric series.
    rates = [(1 - 0.9**t) / (1 - 0.99**t) ** 0.5 for t in range(2, 21)]
    assert float(moved) == pytest.approx(-0.1 * sum(rates), rel=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_buffers_in_main_memory_are_as_those_on_the_device(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = [1024, 4096, 512, 2048]
    residence, expected = Residence(DEVICE, on_host=True), []
    for number, size in enumerate(sizes):
        expected.append(torch.full((size,), number, dtype=torch.uint8))
        residence.add(size).copy_(expected[-1])
    number = 0
    for _ in range(40):
        following = int(rng.integers(len(sizes)))
        part = int(rng.choice([256, sizes[following]]))
        whole = rng.random() < 0.5
        found = residence.take(number, None if whole else 256, then=(following, part))
        assert torch.equal(found.cpu(), expected[number][: len(found)])
        if whole:
            found[256:] += 1
            expected[number][256:] += 1
            residence.give_back(number, 256)
        number = following
    residence.settle()
    assert all(torch.equal(home, each) for home, each in zip(residence.homes, expected, strict=True))


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied, biases"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("pair")
    model = save(
        random_bamba(seed=4, tie_word_embeddings=request.param, mlp_bias=request.param, **SIZES),
        directory / "model",
        dtype="bfloat16",
    )
    write_tokenizer(model, 256)
    return model, to_gguf(model, directory / "q4_0.gguf", "q4_0")


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (units, by_layer):
        monkeypatch.setattr(module, "DTYPE", torch.float32)
    yield


def learners(pair: tuple[Path, Path], options: TuneOptions) -> tuple[Any, Any, Any]:
    def given() -> Given:
        model, quantized = (load_model(path) for path in pair)
        return Given(model, quantized, list(help_texts()), options, DEVICE, 4, lambda note: None)

    layered, data, *_ = tuning._by_layer(given())
    whole, _, steps, _ = tuning._whole_model(given())
    assert steps == options.steps
    return layered, whole, data


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("on_host", [False, True], ids=["device", "host"])
def test_gradients_are_the_whole_model_s(
    pair: tuple[Path, Path], on_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_host:
        monkeypatch.setattr(tuning, "_BESIDES", 1 << 60)
    layered, whole, data = learners(pair, FEW)
    assert layered.divergence() == pytest.approx(whole.divergence(), rel=1e-4)
    found: list[dict[str, torch.Tensor]] = []
    for learner in (layered, whole):
        gradients: dict[str, torch.Tensor] = {}
        move = learner._move

        def kept(learner: Any = learner, gradients: Any = gradients, move: Any = move) -> None:
            for name, p in zip(learner.adam.names, learner.adam.parameters, strict=True):
                gradients[name] = p.grad.clone()
            move()

        monkeypatch.setattr(learner, "_move", kept)
        learner.prepare(1, 2, 1.0)
        gradients["loss"] = learner.advance(*data.batches.batch(0)).clone()
        found.append(gradients)
    for units_matrices in layered._codes.matrices:
        for matrix in units_matrices:
            layered._codes.take(layered._codes._unit[matrix.name], None, whole=True)
            found[0][f"{matrix.name}:codes"] = matrix.arrays["first"].float() / 0.1
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[1].items():
        bound = 5e-3 if name.endswith(":codes") else 1e-3  # moments are bfloat16
        assert float((found[0][name] - gradient).norm()) <= bound * float(gradient.norm()) + 1e-12, name
    assert layered.divergence() == pytest.approx(whole.divergence(), rel=1e-2)


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("_SAVE_SECONDS", "_SAVE_SHARE"):
        monkeypatch.setattr(f"bamba_quant.calibration.tune_run.{limit}", 0.0)
    options = dataclasses.replace(FEW, state=tmp_path / "state", device=DEVICE.type)
    whole = tune(*pair, help_texts(), options)
    monkeypatch.setattr(tuning, "_BESIDES", 1 << 60)

    def interrupt(progress: TuneProgress) -> None:
        if progress.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(*pair, help_texts(), options, interrupt)
    # Without a dtype a run goes on in that of its state.
    resumed = tune(*pair, help_texts(), dataclasses.replace(options, resume=True, dtype=None))
    assert whole.record.better and resumed.record == whole.record
    for name, values in whole.tensors.items():
        assert np.array_equal(values, resumed.tensors[name])


def test_what_cannot_be_tuned_a_layer_at_a_time(pair: tuple[Path, Path]) -> None:
    for wrong in ({"train": ("blocks",)}, {"reach": 2.5}):
        with pytest.raises(TuneError, match="learns codes"):
            tune(*pair, help_texts(), dataclasses.replace(FEW, **wrong))
    with pytest.raises(TuneError, match="unknown dtype to tune in"):
        dataclasses.replace(FEW, dtype="float16")
    with pytest.raises(TuneError, match="a bound on the GPU's memory"):
        tune(*pair, help_texts(), dataclasses.replace(FEW, dtype=None, device="cpu", max_memory=1 << 30))
