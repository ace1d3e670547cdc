"""What is read ahead is what the files hold, whatever is asked for in which order and however little may be held."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bamba_quant.checkpoint import StoredTensor, read_raw
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import CheckpointError
from bamba_quant.inference.loading import load_model
from bamba_quant.inference.prefetch import Prefetcher, PrefetchRequest
from tests.support.conversion import to_gguf

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> list[StoredTensor]:
    file = to_gguf(embedded_model(), tmp_path_factory.mktemp("ahead") / "model.gguf", "q4_k_m")
    weights = load_model(file).weights
    return [weights.stored(name)[0] for name in weights]


def check(tensor: StoredTensor, found: torch.Tensor | None) -> None:
    assert found is not None and found.device.type == DEVICE.type
    np.testing.assert_array_equal(found.cpu().numpy(), read_raw(tensor))


@pytest.mark.parametrize(
    ("budget", "threads", "piece"), [(1, 1, 1), (100_000, 3, 4096), (1 << 30, 8, 1 << 24)]
)
def test_in_order(tensors: list[StoredTensor], budget: int, threads: int, piece: int) -> None:
    with Prefetcher(DEVICE, budget, threads, piece) as ahead:
        ahead.begin([PrefetchRequest(tensor, True) for tensor in tensors])
        for tensor in tensors:
            check(tensor, ahead.take(tensor))
        assert ahead.take(tensors[0]) is None


def test_no_more_is_held_than_the_budget(
    tensors: list[StoredTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    budget, held, most = 50_000, {}, 0
    read = Prefetcher._start

    def start(self: Prefetcher, wanted: PrefetchRequest) -> object:
        nonlocal most
        held[wanted.tensor.name] = wanted.tensor.n_bytes
        most = max(most, sum(held.values()) if len(held) > 1 else 0)
        return read(self, wanted)

    monkeypatch.setattr(Prefetcher, "_start", start)
    with Prefetcher(DEVICE, budget) as ahead:
        ahead.begin([PrefetchRequest(tensor, True) for tensor in tensors])
        for tensor in tensors:
            assert len(held) >= 1
            del held[tensor.name]
            check(tensor, ahead.take(tensor))
    assert budget / 4 < most <= budget


def test_out_of_order(tensors: list[StoredTensor]) -> None:
    """The last is not on its way yet; the first two are, and one of them is wanted twice."""
    order = [*tensors[:2], tensors[0], *tensors[2:]]
    with Prefetcher(DEVICE, sum(tensor.n_bytes for tensor in order[:3])) as ahead:
        ahead.begin([PrefetchRequest(tensor, True) for tensor in order])
        assert ahead.take(tensors[-1]) is None
        check(tensors[1], ahead.take(tensors[1]))
        check(tensors[0], ahead.take(tensors[0]))
        check(tensors[0], ahead.take(tensors[0]))
        for tensor in tensors[2:-1]:
            check(tensor, ahead.take(tensor))
        assert ahead.take(tensors[-1]) is None


def test_what_the_cpu_decodes_is_not_brought(tensors: list[StoredTensor]) -> None:
    with Prefetcher(DEVICE) as ahead:
        ahead.begin([PrefetchRequest(tensor, number % 2 == 0) for number, tensor in enumerate(tensors)])
        for number, tensor in enumerate(tensors):
            found = ahead.take(tensor)
            assert (found is None) == (number % 2 == 1)


def test_a_file_that_ends_too_early(tmp_path: Path) -> None:
    file = to_gguf(embedded_model(), tmp_path / "model.gguf", "q8_0")
    weights = load_model(file).weights
    tensors = [weights.stored(name)[0] for name in weights]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with Prefetcher(DEVICE) as ahead:
        ahead.begin([PrefetchRequest(tensor, True) for tensor in tensors])
        with pytest.raises(CheckpointError, match="changed while it was read"):
            for tensor in tensors:
                ahead.take(tensor)


def test_what_is_never_taken_is_given_up(tensors: list[StoredTensor]) -> None:
    with Prefetcher(DEVICE, 1 << 30, 1) as ahead:
        ahead.begin([PrefetchRequest(tensor, True) for tensor in tensors])
    assert ahead.take(tensors[0]) is None
