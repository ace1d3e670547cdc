"""A quantized directory is planned whole from headers, and what cannot be made is refused by name before it begins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bamba_quant.codecs import SafetensorsCodec, codecs
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import BambaQuantError, FormatError, PlanError
from bamba_quant.planning.plan import Plan
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.writers import write_plan
from tests.support import directories, vllm
from tests.support.conversion import to_gguf
from tests.support.models import random_bamba, save_checkpoint
from tests.support.shared import shared

BAMBA_9B = Path(__file__).parents[1] / "support" / "bamba_9b.json"
# Every side a multiple of 128, also of in_proj: 2 · 256 + 2 · 56 + 16 = 640.
WIDE = {"hidden_size": 128, "intermediate_size": 256, "mamba_n_heads": 16, "mamba_d_head": 16,
        "mamba_d_state": 56, "num_key_value_heads": 4}  # fmt: skip


def config_only(directory: Path, scheme: str, **options: Any) -> Plan:
    shutil.copy(BAMBA_9B, directory / "config.json")
    return plan_quantization(directory, scheme, allow_config_only=True, **options)


def written(model: Path, directory: Path, scheme: str, **options: Any) -> Plan:
    plan = plan_quantization(model, scheme, **options)
    write_plan(plan, directory)
    return plan


def test_the_table_of_the_model_card(tmp_path: Path) -> None:
    """ibm-ai-platform/Bamba-9B's card: 39.12 GB become 10.83 GB, of which 2.10 GB bf16 and 8.73 GB float8."""
    plan = config_only(tmp_path, "fp8-tensor")
    found = plan.bytes_by_dtype
    assert round(plan.input_bytes / 1e9, 2) == 39.12
    assert round(sum(found.values()) / 1e9, 2) == 10.83
    assert round(found["BF16"] / 1e9, 2) == 2.10
    assert round(found["F8_E4M3"] / 1e9, 2) == 8.73
    assert found["F8_E4M3"] == plan.quantized_elements == 8_727_822_336
    assert round(sum(config_only(tmp_path, "fp8-dynamic").bytes_by_dtype.values()) / 1e9, 2) == 10.84
    with pytest.raises(PlanError, match="no weights"):
        write_plan(plan, tmp_path / "out")


@pytest.mark.parametrize(
    "scheme", [scheme.name for scheme in codecs(SafetensorsCodec) if scheme.name.startswith("fp8")]
)
def test_vllm_would_load_bamba_9b(scheme: str, tmp_path: Path) -> None:
    for keep in ([], ["hybrid"], ["*.layers.0.*", "ssm_in"]):
        plan = config_only(tmp_path, scheme, keep=keep)
        shapes = {part.name: part.shape for shard in plan.shards for part in shard.parts}
        config = json.loads(plan.files["config.json"])
        scales = {name: np.ones(shape) for name, shape in shapes.items() if "scale" in name}
        assert vllm.check(config, shapes, scales) == len(plan.matrices)


@pytest.mark.parametrize("scheme", ["fp8-dynamic", "fp8-tensor", "fp8-block", "fp8-block-inv"])
def test_vllm_would_load_what_is_written(scheme: str, tmp_path: Path) -> None:
    model = save_checkpoint(random_bamba(**WIDE | {"mamba_d_state": 64, "mamba_n_groups": 2, "mamba_n_heads": 128,
                                                   "mamba_d_head": 2}), tmp_path / "m")  # fmt: skip
    plan = written(model, tmp_path / "out", scheme, keep=["hybrid"])
    stored = directories.tensors(tmp_path / "out")
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert vllm.check(config, shapes, stored) == len(plan.matrices)
    broken = json.loads(json.dumps(config).replace("in_proj", "inproj"))
    with pytest.raises(vllm.RefusalError, match="in_proj"):
        vllm.check(broken, shapes, stored)


def test_what_stays_and_in_which_type(tmp_path: Path) -> None:
    model = save_checkpoint(random_bamba(), tmp_path / "m", shards=3)
    original = directories.tensors(tmp_path / "m")
    plan = written(model, tmp_path / "out", "fp8-dynamic", keep=["attn_output"], max_shard_bytes=40_000)
    stored = directories.tensors(tmp_path / "out")
    quantized = {matrix.source.name for matrix in plan.matrices}
    for name, tensor in original.items():
        if name in quantized:
            assert stored[name].dtype == torch.float8_e4m3fn
            continue
        small = name.endswith(("A_log", "D", "dt_bias"))
        expected = tensor if small else tensor.to(torch.bfloat16)
        assert stored[name].dtype == expected.dtype
        assert torch.equal(stored[name], expected), name
    assert not any("o_proj" in name or "conv1d" in name for name in quantized)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert all(shard.n_bytes - len(shard.header) <= 40_000 for shard in plan.shards if len(shard.parts) > 2)
    for name, values in directories.dequantized(plan, stored).items():
        assert np.square(values - original[name].numpy()).mean() < 2e-3 * original[name].square().mean()
    kept = written(model, tmp_path / "kept", "fp8-dynamic", dtype="stored")
    stored = directories.tensors(tmp_path / "kept")
    assert all(torch.equal(stored[row.name], original[row.name]) for row in kept.others)


def test_float16_is_not_rounded_unsaid(tmp_path: Path) -> None:
    model = save_checkpoint(random_bamba(), tmp_path / "m")
    state = {name: tensor.half() for name, tensor in directories.tensors(model).items()}
    save_file(state, model / "model.safetensors", {"format": "pt"})
    for dtype, said in (("bf16", True), ("stored", False)):
        plan = written(model, tmp_path / dtype, "fp8-dynamic", dtype=dtype)
        assert any("--dtype stored" in note for note in plan.notes) == said
        stored = directories.tensors(tmp_path / dtype)
        for row in plan.others:
            small = row.name.endswith(("A_log", "D", "dt_bias"))
            expected = state[row.name] if small or not said else state[row.name].to(torch.bfloat16)
            assert stored[row.name].dtype == expected.dtype
            assert torch.equal(stored[row.name], expected), row.name


def test_fused_matrices_share_the_scale_of_a_tensor(tmp_path: Path) -> None:
    model = save_checkpoint(random_bamba(), tmp_path / "m")
    for method in ("search", "absmax"):
        written(model, tmp_path / method, "fp8-tensor", method=method)
        stored = directories.tensors(tmp_path / method)
        scale = {name: tensor for name, tensor in stored.items() if name.endswith("weight_scale")}
        assert all(tensor.shape == (1,) and tensor.dtype == torch.bfloat16 for tensor in scale.values())
        layer = "model.layers.1."
        assert len({float(scale[f"{layer}self_attn.{leaf}_proj.weight_scale"]) for leaf in "qkv"}) == 1
        gate, up, down = (
            float(scale[f"{layer}feed_forward.{leaf}_proj.weight_scale"]) for leaf in ("gate", "up", "down")
        )
        assert gate == up != down


def test_fused_matrices_share_the_global_scale(tmp_path: Path) -> None:
    model = save_checkpoint(random_bamba(**WIDE), tmp_path / "m")
    plan = written(model, tmp_path / "out", "nvfp4a16")
    stored = directories.tensors(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    assert vllm.check(config, shapes, stored) == len(plan.matrices)
    q = "model.layers.1.self_attn.q_proj.weight_global_scale"
    original = directories.tensors(tmp_path / "m")
    largest = max(
        original[q.replace("q_proj.weight_global_scale", f"{leaf}_proj.weight")].abs().max() for leaf in "qkv"
    )
    assert float(stored[q]) == pytest.approx(448 * 6 / float(largest), rel=1e-6)
    with pytest.raises(vllm.RefusalError, match="different scales"):
        vllm.check(config, shapes, stored | {q: stored[q] * 2})


def test_small_files(tmp_path: Path) -> None:
    model = tmp_path / "m"
    shutil.copytree(embedded_model(), model)
    (model / "LICENSE").write_text("free")
    (model / "notes.txt").write_text("mine")
    (model / "pytorch_model.bin.index.json").write_text("{}")
    plan = written(model, tmp_path / "out", "fp8-dynamic")
    out = tmp_path / "out"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert not (out / "notes.txt").exists()
    assert any("notes.txt" in note for note in plan.notes)
    card = (out / "README.md").read_text()
    assert card.startswith((model / "README.md").read_text())
    assert "fp8-dynamic" in card
    assert "`lm_head.weight`" in card
    config, before = (out / "config.json").read_text(), (model / "config.json").read_text()
    assert config.startswith(before[: before.rindex("}")].rstrip())
    (model / "README.md").unlink()
    titled = plan_quantization(model, "fp8-dynamic").files["README.md"].decode()
    assert "library_name: transformers" in titled


def test_what_is_written_is_read_back_as_it_decodes(tmp_path: Path) -> None:
    from bamba_quant.inference.loading import load_model

    model = save_checkpoint(random_bamba(**WIDE), tmp_path / "m")
    for scheme in ("fp8-dynamic", "fp8-tensor", "fp8-block", "fp8-block-inv"):
        plan = written(model, tmp_path / scheme, scheme)
        weights = load_model(tmp_path / scheme).weights
        for name, values in directories.dequantized(plan, directories.tensors(tmp_path / scheme)).items():
            np.testing.assert_array_equal(np.asarray(weights[name], np.float32), values, err_msg=name)


def test_inputs_that_are_refused(tmp_path: Path) -> None:
    model = save_checkpoint(random_bamba(), tmp_path / "m")
    with pytest.raises(FormatError, match="in_proj"):
        plan_quantization(model, "fp8-block-inv")
    with pytest.raises(FormatError, match="multiple of 128"):
        plan_quantization(model, "fp8-block")
    with pytest.raises(PlanError, match="float8"):
        plan_quantization(model, "fp8-dynamic", dtype="float8")
    with pytest.raises(PlanError, match="ignore fewer matrices"):
        plan_quantization(model, "fp8-dynamic", keep=["*"])
    with pytest.raises(PlanError, match="bamba-quant export"):
        plan_quantization(to_gguf(model, tmp_path / "m.gguf", vocab=False), "fp8-dynamic")
    written(model, tmp_path / "once", "fp8-dynamic")
    with pytest.raises(PlanError, match="quantized already"):
        plan_quantization(tmp_path / "once", "fp8-dynamic")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BambaQuantError, match=r"config\.json"):
        plan_quantization(tmp_path / "empty", "fp8-dynamic", allow_config_only=True)
    state = load_file(model / "model.safetensors")
    state["model.layers.0.mamba.in_proj.weight"] = state["model.layers.0.mamba.in_proj.weight"].double()
    save_file(state, model / "model.safetensors")
    with pytest.raises(BambaQuantError, match="F64"):
        plan_quantization(model, "fp8-dynamic")


def test_the_trained_models(tmp_path: Path) -> None:
    """bamba-43m's in_proj has 2320 rows: the last blocks are cut short."""
    plan = written(shared("models/bamba-43m"), tmp_path / "out", "fp8-block")
    stored = directories.tensors(tmp_path / "out")
    assert stored["model.layers.0.mamba.in_proj.weight_scale"].shape == (19, 4)
    original = directories.tensors(shared("models/bamba-43m"))
    for name, values in directories.dequantized(plan, stored).items():
        expected = original[name].float()
        assert np.square(values - expected.numpy()).mean() < 8e-4 * expected.square().mean()


@pytest.mark.parametrize("scheme", ["fp8-dynamic", "fp8-tensor"])
def test_importance_weighs_the_columns(scheme: str, tmp_path: Path) -> None:
    from bamba_quant.checkpoint.imatrix import read_imatrix
    from tests.recipes.test_llama_quantize import random_imatrix

    model = save_checkpoint(random_bamba(), tmp_path / "m")
    random_imatrix(model, tmp_path / "imatrix.gguf")
    imatrix = read_imatrix(tmp_path / "imatrix.gguf")
    original = directories.tensors(model)
    errors: dict[str, float] = {}
    for name, weights in (("alike", None), ("weighted", imatrix)):
        plan = written(model, tmp_path / name, scheme, imatrix=weights)
        found = directories.dequantized(plan, directories.tensors(tmp_path / name))
        weighed = plan_quantization(model, scheme, imatrix=imatrix).matrices
        errors[name] = sum(
            float((np.square(found[m.source.name] - original[m.source.name].numpy()) * m.importance).sum())
            for m in weighed
        )
    assert errors["weighted"] < errors["alike"]
