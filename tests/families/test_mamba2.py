"""What checkpoints of Mamba-2 have besides: Codestral Mamba's names beside transformers' own, and state-spaces'."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bamba_quant.checkpoint import open_checkpoint
from bamba_quant.errors import PlanError
from bamba_quant.planning.convert import plan_conversion
from tests.support import llama
from tests.support.conversion import random_tokens, to_gguf, transformers_logits
from tests.support.families import random_case, save


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    directory = save(random_case("mamba2"), tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {"backbone.embedding.weight": torch.zeros(160, 64)}, directory / "model.safetensors")
    with pytest.raises(PlanError, match="under two names"):
        plan_conversion(directory, vocab=False)


def test_codestral_mambas_own_names(tmp_path: Path) -> None:
    model = random_case("mamba2", "groups 2")
    directory = save(model, tmp_path / "m")
    renamed = {
        f"model.{key.replace('embeddings', 'embedding')}": tensor
        for key, tensor in load_file(directory / "model.safetensors").items()
    }
    # The directory on the Hub has them beside transformers' own, which go first.
    save_file(renamed, directory / "consolidated.safetensors")
    assert open_checkpoint(directory).files == (directory / "model.safetensors",)
    (directory / "model.safetensors").unlink()
    file = to_gguf(directory, tmp_path / "m.gguf", vocab=False)
    tokens = random_tokens(model.config.vocab_size)
    reference = transformers_logits(model, tokens)
    assert np.abs(llama.logits(file, tokens) - reference).max() <= 1e-3 * reference.std()
