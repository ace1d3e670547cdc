"""Two models tensor by tensor: the same in any container, and errors as numpy finds them."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from bamba_quant.checkpoint import PackedTensor
from bamba_quant.codecs import BlockCodec, codecs
from bamba_quant.codecs.decoding import decode
from bamba_quant.embedded import embedded_model
from bamba_quant.evaluation import tensor_loss, weights_compare
from bamba_quant.evaluation.models import ComparisonError
from bamba_quant.evaluation.tensor_loss import tensor_difference
from bamba_quant.evaluation.weights_compare import compare_weights
from bamba_quant.inference.loading import load_model
from bamba_quant.inference.weights import Timings
from bamba_quant.writers.candidates import make_candidate
from tests.support.conversion import to_gguf
from tests.support.models import random_bamba, save_checkpoint


def test_one_model_in_two_containers_is_the_same(tmp_path: Path) -> None:
    directory = save_checkpoint(random_bamba(tie_word_embeddings=True), tmp_path / "m")
    found = compare_weights(directory, to_gguf(directory, tmp_path / "m.gguf", "f32", vocab=False))
    apart = [loss.name for loss in found.tensors if loss.max_error > 0]
    assert all(name.endswith("A_log") for name in apart), "GGUF stores -exp(A_log), nothing else is computed"
    assert found.sqnr is None or found.sqnr > 120
    assert compare_weights(
        directory, save_checkpoint(random_bamba(tie_word_embeddings=True), tmp_path / "n")
    ).same


@pytest.mark.parametrize("outtype", ["q8_0", "q4_k_m"])
def test_errors_are_numpys(outtype: str, tmp_path: Path) -> None:
    file = to_gguf(embedded_model(), tmp_path / "q.gguf", outtype)
    done: list[int] = []
    found = compare_weights(embedded_model(), file, progress=done.append)
    base, other = load_model(embedded_model()).weights, load_model(file).weights
    signal = noise = 0.0
    for loss in found.tensors:
        w, v = (np.asarray(weights[loss.name], np.float32).astype(np.float64) for weights in (base, other))
        s, n = (w**2).sum(), ((v - w) ** 2).sum()
        signal, noise = signal + s, noise + n
        assert (loss.weight_sqnr is None) == (n == 0)
        if n:
            assert loss.weight_sqnr == pytest.approx(10 * np.log10(s / n), abs=1e-3)
        assert loss.max_error == pytest.approx(np.abs(v - w).max(), rel=1e-6)
        assert loss.cosine == pytest.approx((w * v).sum() / np.sqrt(s * (v**2).sum()), abs=1e-9)
        if loss.role == "ssm_in":
            parts = np.split(((v - w) ** 2).sum(1), np.cumsum([part.rows for part in loss.row_classes])[:-1])
            for part, square in zip(loss.row_classes, parts, strict=True):
                assert part.weight_sqnr is not None
                lost = 10 ** (-part.weight_sqnr / 10)
                assert 0.2 * n / s < lost < 5 * n / s and square.sum() > 0
            assert sum(part.rows for part in loss.row_classes) == loss.shape[0]
    assert found.sqnr == pytest.approx(10 * np.log10(signal / noise), abs=1e-3)
    assert sum(done) == found.other.n_bytes


@pytest.mark.parametrize("kind", ["q4_k_m", "iq4_xs", "fp8-dynamic", "w4a16-asym-g32", "torchao-int4-g128"])
def test_codes_that_differ_are_counted(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_compare, "_BYTES", 1 << 14)
    first = make_candidate(embedded_model(), kind, tmp_path)
    second = tmp_path / f"b-{first.name}"
    shutil.copytree(first, second) if first.is_dir() else shutil.copy(first, second)
    codes = {each.name: each for each in compare_weights(first, second).codes}
    assert len(codes) >= 20
    assert all(each.changed == each.beside_changed == 0 < each.beside for each in codes.values())
    loaded = load_model(second)
    commonest = Counter(loaded.weights.info(name).format for name in codes).most_common(1)[0][0]
    name = next(name for name in codes if loaded.weights.info(name).format == commonest)
    tensor = loaded.weights.stored(name)[0]
    part = tensor.codes.tensor if isinstance(tensor, PackedTensor) else tensor
    with part.file.open("r+b") as file:
        file.seek(part.offset + {"q4_k": 16, "iq4_xs": 8}.get(commonest, 0))
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    found = compare_weights(first, second)
    assert [each.changed for each in found.codes] == [int(each.name == name) for each in found.codes]
    assert not any(each.beside_changed for each in found.codes)
    assert sum(each.codes for each in found.codes) == sum(
        math.prod(loaded.weights.info(n).shape) for n in codes
    )
    assert compare_weights(embedded_model(), first).codes == ()


@pytest.mark.parametrize("elements", [1000, 1 << 12])
def test_blocks_of_rows_change_nothing(
    elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = to_gguf(embedded_model(), tmp_path / "q.gguf", "q4_k_m")
    base, other = load_model(embedded_model()).weights, load_model(file).weights
    names = (
        "model.layers.2.self_attn.k_proj.weight",
        "model.layers.0.mamba.conv1d.weight",
        "model.layers.0.mamba.A_log",
    )
    whole = [tensor_difference(base, other, name) for name in names]
    monkeypatch.setattr(tensor_loss, "_ELEMENTS", elements)
    for name, expected in zip(names, whole, strict=True):
        found = tensor_difference(base, other, name)
        np.testing.assert_allclose(found.noise, expected.noise, rtol=1e-12)
        assert found.max_error == expected.max_error


def test_models_of_other_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match="another vocabulary"):
        compare_weights(embedded_model(), save_checkpoint(random_bamba(), tmp_path / "m"))


@pytest.mark.parametrize("codec", [f for f in codecs(BlockCodec) if f.writable], ids=lambda f: f.name)
def test_decoding_in_pieces_is_decoding(codec: BlockCodec) -> None:
    x = np.random.default_rng(0).standard_normal((700, 1024)).astype(np.float32)
    raw = codec.quantizer()(x)
    np.testing.assert_array_equal(decode(codec, raw), codec.dequantize(raw))
    np.testing.assert_array_equal(decode(codec, raw[:1]), codec.dequantize(raw[:1]))


@pytest.mark.parametrize("outtype", ["", "f32", "bf16", "q8_0", "q4_k_m"])
def test_rows_are_those_of_the_whole_tensor(outtype: str, tmp_path: Path) -> None:
    path = to_gguf(embedded_model(), tmp_path / "m.gguf", outtype) if outtype else embedded_model()
    weights, timings = load_model(path).weights, Timings()
    for name in weights:
        whole = np.asarray(weights[name])
        length = len(whole)
        for start, stop in ((0, None), (0, 1), (3, 8), (length // 2, length), (length - 1, length)):
            found = weights.rows(name, start, stop, timings)
            np.testing.assert_array_equal(found, whole[start:stop], err_msg=name)
            assert found.dtype == whole.dtype
        assert weights.info(name).shape == whole.shape
    assert timings.reading > 0 and torch.isfinite(torch.tensor(timings.decoding))
