"""Models whose matrices stay as their files store them compute what those converted to float32 do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bamba_quant.codecs import SafetensorsCodec, codec_named
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import BambaQuantError
from bamba_quant.inference import memory, ready
from bamba_quant.inference.loading import load_model
from bamba_quant.inference.memory import available_memory
from bamba_quant.inference.ready import ready_model
from bamba_quant.inference.stored import StoredMatrix
from bamba_reference.runtime.continuations import log_likelihoods
from bamba_reference.runtime.generate import generate, generate_batch
from bamba_reference.torch.forward import Model, forward, new_state
from tests.support.command import run
from tests.support.conversion import english_chunks, random_tokens, to_gguf
from tests.support.families import MIXERS_ALONE, SCALED, STACKED, random_case, save, wide_case
from tests.support.models import random_bamba, save_checkpoint
from tests.support.quantized import DIVIDES, save_quantized
from tests.support.shared import shared

CPU = torch.device("cpu")
# Rows of whole blocks of 256.
BLOCKS = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
    "mamba_n_heads": 16, "mamba_d_head": 32, "mamba_d_state": 16,
}  # fmt: skip


def of_type(outtype: str, **keys: object) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        model = save_checkpoint(random_bamba(**{**BLOCKS, **keys}), place / "m")
        return to_gguf(model, place / "m.gguf", outtype, vocab=False)

    return make


def of_scheme(name: str) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        base = save_checkpoint(random_bamba(**DIVIDES), place / "m", "bfloat16")
        return save_quantized(base, place / name, codec_named(name, SafetensorsCodec))

    return make


MODELS: dict[str, Callable[[Path], Path]] = {
    **{name: of_type(name) for name in ("q4_k_m", "q8_0", "iq4_xs", "f16")},
    "tied": of_type("q6_k", tie_word_embeddings=True),
    "fp8": of_scheme("fp8-block"),
    "int4": of_scheme("w4a16-g128"),
    "fp4": of_scheme("nvfp4a16"),
    "bf16 directory": lambda place: save_checkpoint(random_bamba(), place / "m", "bfloat16"),
    "experts": lambda place: save(random_case(*STACKED[0]), place / "m", "bfloat16"),
    "experts, mxfp4": lambda place: to_gguf(
        save(wide_case(*STACKED[0]), place / "m"),
        place / "m.gguf",
        "mxfp4_moe",
        vocab=False,
    ),
    "mamba": lambda place: save(random_case(*MIXERS_ALONE[0]), place / "m", "float16"),
    "rows that are scaled": lambda place: to_gguf(
        save(wide_case(*SCALED[0]), place / "m"), place / "m.gguf", "q4_0", vocab=False
    ),
}


def both(path: Path, dtype: torch.dtype = torch.float32, activations: str = "none") -> tuple[Model, Model]:
    loaded = load_model(path)
    converted, stored = (
        ready_model(loaded, CPU, dtype, weights=weights, activations=activations)
        for weights in ("converted", "stored")
    )
    matrices = [weight for weight in stored.weights.values() if isinstance(weight, StoredMatrix)]
    assert len(matrices) > len(stored.weights) / 4
    return converted, stored


def logits(model: Model, tokens: list[int], prompt: int) -> np.ndarray:
    """Of a prompt, and then of one token at a time."""
    state = new_state(model, 1)
    with torch.no_grad():
        found = [forward(model, [tokens[:prompt]], state=state).logits]
        found += [forward(model, [[token]], state=state).logits for token in tokens[prompt:]]
    return torch.cat(found, dim=1)[0].float().numpy()


@pytest.mark.parametrize("case", MODELS)
def test_every_format(case: str, tmp_path: Path) -> None:
    converted, stored = both(MODELS[case](tmp_path))
    tokens = random_tokens(converted.config.vocab_size, 48)
    expected, found = (logits(model, tokens, 40) for model in (converted, stored))
    if "experts" not in case:  # which get few tokens each
        np.testing.assert_array_equal(found[:40], expected[:40])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    drawn = [list(generate(model, tokens[:5], max_new_tokens=12, stop=())) for model in (converted, stored)]
    assert drawn[0] == drawn[1]


def test_other_dtypes_and_rounded_activations(tmp_path: Path) -> None:
    path = of_type("q4_k_m")(tmp_path)
    tokens = random_tokens(161, 44)
    for dtype, activations in (
        (torch.bfloat16, "none"),
        (torch.float64, "none"),
        (torch.float32, "llama.cpp"),
    ):
        expected, found = (logits(model, tokens, 40) for model in both(path, dtype, activations))
        if dtype == torch.float32:
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
        else:
            np.testing.assert_array_equal(found, expected)


def test_the_same_words_of_a_trained_model(tmp_path: Path) -> None:
    """From float32 weights and from the file's, for 40 tokens after each of three prompts."""
    model = shared("models/bamba-43m")
    converted, stored = both(to_gguf(model, tmp_path / "m.gguf", "q4_k_m"))
    prompts = english_chunks(model, 20, 3)
    drawn = [generate_batch(each, prompts, max_new_tokens=40, stop=()) for each in (converted, stored)]
    assert [len(tokens) for tokens in drawn[0]] == [40] * 3
    assert drawn[0] == drawn[1]


def machine(
    place: Path, monkeypatch: pytest.MonkeyPatch, available: int, groups: str = "", **files: str
) -> None:
    """A machine with so many bytes free, the process in ``groups``, which have ``files``."""
    (place / "self").mkdir(parents=True)
    (place / "meminfo").write_text(f"MemTotal:  99999999 kB\nMemAvailable:  {available // 1024} kB\n")
    (place / "self" / "cgroup").write_text(groups)
    for name, text in files.items():
        file = place / "groups" / name.replace("__", "/").replace("_0_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(memory, "_PROC", place)
    monkeypatch.setattr(memory, "_GROUPS", place / "groups")


def test_memory_that_a_container_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def free(name: str, *arguments: object, **files: str) -> int | None:
        machine(tmp_path / name, monkeypatch, *arguments, **files)  # type: ignore[arg-type]
        return available_memory(CPU)

    limit = {"memory_0_max": "900000\n", "memory_0_current": "500000\n"}
    cache = {"memory_0_stat": "anon 7\ninactive_file 100000\n"}
    assert free("no groups", 1 << 30) == 1 << 30
    assert free("no limit", 1 << 30, "0::/a\n", a__memory_0_max="max\n", a__memory_0_current="5\n") == 1 << 30
    assert free("a limit", 1 << 30, "0::/\n", **limit) == 400_000
    assert free("page cache", 1 << 30, "0::/\n", **limit, **cache) == 500_000
    assert free("a host's path", 1 << 30, "0::/docker/7\n", **limit) == 400_000
    inner = {f"inner__{name}": text.replace("9", "8") for name, text in limit.items()}
    assert free("nested", 1 << 30, "0::/inner\n", **limit, **inner) == 300_000
    old = {"memory__memory_0_limit_in_bytes": "700000\n", "memory__memory_0_usage_in_bytes": "100000\n"}
    assert free("version 1", 1 << 30, "5:cpu,memory:/\n4:pids:/\n", **old) == 600_000
    monkeypatch.setattr(memory, "_PROC", tmp_path / "nowhere")
    assert available_memory(CPU) is None


def test_the_choice_by_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converted where that takes half of it, else as stored; what does not fit is refused, with what would."""
    file = to_gguf(embedded_model(), tmp_path / "m.gguf", "q8_0")
    (tmp_path / "text").write_text("The function returns a list of names.\n" * 60)
    score = ("perplexity", file, "--text", tmp_path / "text", "--ctx", 64, "--chunks", 2)
    converted = int(ready._MARGIN * 4 * load_model(file).checkpoint.elements)
    found = []
    for number, (available, backend) in enumerate(
        ((2 * converted + 4096, "numba"), (2 * converted - 4096, "numba, weights as stored"))
    ):
        machine(tmp_path / str(number), monkeypatch, available)
        result = json.loads(run(*score, "--json").stdout)
        assert result["backend"] == backend
        found.append(result["perplexity"])
    assert found[0] == found[1]
    machine(tmp_path / "small", monkeypatch, converted // 5)
    said = run(*score, code=2).stderr
    assert "does not fit" in said and "--stream" in said
    assert "GB free" in run("generate", file, "--prompt", "x", code=2).stderr
    assert (
        "--weights stored" in run("generate", file, "--prompt", "x", "--weights", "converted", code=2).stderr
    )
    assert "--weights" in run(*score, "--stream", "--weights", "stored", code=2).stderr


def test_what_is_not_possible() -> None:
    loaded = load_model(embedded_model())
    with pytest.raises(BambaQuantError, match="unknown way to hold weights"):
        ready_model(loaded, CPU, torch.float32, weights="compressed")
    with pytest.raises(BambaQuantError, match="on a CPU only"):
        ready_model(loaded, torch.device("meta"), torch.float32, weights="stored")


def test_continuations_of_shared_contexts(tmp_path: Path) -> None:
    """Their contexts run without a position whose logits are wanted."""
    loaded = load_model(of_type("q8_0")(tmp_path))
    random = np.random.default_rng(0)

    def tokens(n: int) -> list[int]:
        return random.integers(loaded.config.vocab_size, size=n).tolist()

    contexts = [tokens(9), tokens(14)]
    requests = [(context, tokens(3)) for context in contexts for _ in range(4)]
    stored, converted = (
        [
            each.value
            for each in log_likelihoods(ready_model(loaded, CPU, torch.float32, weights=kind), requests)
        ]
        for kind in ("stored", "converted")
    )
    np.testing.assert_allclose(stored, converted, rtol=1e-5)
    model = ready_model(loaded, CPU, torch.float32, weights="stored")
    assert forward(model, [tokens(5)], logits_to_keep=[]).logits.shape == (1, 0, loaded.config.vocab_size)
