"""Layer streaming is the whole model, and perplexity is what a plain computation of its definition gives."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from bamba_reference.packing import InputError
from bamba_reference.runtime import stream
from bamba_reference.runtime.perplexity import (
    Estimate,
    cut_chunks,
    numpy_scorer,
    perplexity,
    stream_scorer,
    torch_scorer,
)
from bamba_reference.tensors import TensorError, head_name, tensor_shapes
from bamba_reference.torch import forward as torch_forward
from tests.reference.cases import (
    RANDOM,
    eval_tokens,
    oracle_logits,
    random_case,
    random_tokens,
    relative_error,
    trained_case,
)
from tests.reference.families import REPRESENTATIVE


class Lazy(Mapping[str, Any]):
    """A checkpoint that records the names of the tensors loaded from it and gives read-only copies."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        self.weights = weights
        self.loaded: list[str] = []

    def __getitem__(self, name: str) -> np.ndarray:
        self.loaded.append(name)
        array = self.weights[name].copy()
        array.flags.writeable = False
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


@pytest.mark.parametrize("name", RANDOM)
@torch.no_grad()
def test_streamed_is_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_MOST_KEPT", 0)  # a small head would be read once
    base, other = random_case(name), random_case(name, seed=1)
    tokens = random_tokens(base, 3, 40)
    sources, layers = [Lazy(base.weights), Lazy(other.weights)], []
    hidden = stream.final_hidden(
        base.config, sources, tokens, on_layer=lambda done, total: layers.append((done, total))
    )
    assert layers == [(i + 1, base.config.num_hidden_layers) for i in range(base.config.num_hidden_layers)]
    for case, source, found in zip((base, other), sources, hidden, strict=True):
        whole = torch_forward.forward(torch_forward.load(case.config, case.weights), tokens)
        assert relative_error(found, whole.last_hidden) <= 1e-6
        blocks = list(map(stream.Head(case.config, source), found.flatten(0, 1).split(50)))
        assert [len(block) for block in blocks] == [50, 50, 20]
        assert relative_error(torch.cat(blocks), whole.logits.flatten(0, 1)) <= 1e-6
        # Each tensor is loaded once; only the head is read again, some rows for each block of tokens.
        head = head_name(case.config)
        assert source.loaded.count(head) > len(blocks)
        expected = [name for name in tensor_shapes(case.config) if name != head]
        assert sorted(name for name in source.loaded if name != head) == sorted(expected)


@pytest.mark.parametrize("name", REPRESENTATIVE)
@torch.no_grad()
def test_streamed_in_bfloat16_is_whole(name: str) -> None:
    case = random_case(name)
    tokens = random_tokens(case, 3, 40)
    (hidden,) = stream.final_hidden(case.config, [case.weights], tokens, dtype=torch.bfloat16)
    whole = torch_forward.forward(torch_forward.load(case.config, case.weights, dtype=torch.bfloat16), tokens)
    assert hidden.dtype == torch.bfloat16
    assert relative_error(hidden, whole.last_hidden) <= 1e-6
    logits = stream.Head(case.config, case.weights)(hidden.flatten(0, 1))
    assert logits.dtype == torch.float32
    assert relative_error(logits, whole.logits.flatten(0, 1)) <= 1e-6


def test_layers_are_loaded_one_after_the_other() -> None:
    case = random_case("plain")
    source = Lazy(case.weights)
    stream.final_hidden(case.config, [source], random_tokens(case, 2, 10))
    layers = [int(name.split(".")[2]) for name in source.loaded if ".layers." in name]
    assert layers == sorted(layers)


def test_streaming_refuses_weights_that_do_not_fit() -> None:
    case = random_case("plain")
    lacking = {k: v for k, v in case.weights.items() if k != "model.layers.2.mamba.D"}
    with pytest.raises(TensorError, match=r"missing model\.layers\.2\.mamba\.D"):
        stream.final_hidden(case.config, [lacking], [[1, 2]])
    wrong = case.weights | {"model.layers.2.mamba.D": np.ones(7, np.float32)}
    with pytest.raises(TensorError, match="another shape") as error:
        stream.final_hidden(case.config, [wrong], [[1, 2]])
    assert (error.value.where, error.value.found) == ("model.layers.2.mamba.D", (7,))
    with pytest.raises(InputError, match="not a batch"):
        stream.final_hidden(case.config, [case.weights], [1, 2])


def plain_perplexity(logits: np.ndarray, tokens: np.ndarray, ctx: int) -> tuple[float, float, int]:
    """The definition once more, over the logits (n, ctx, V) of chunks that already begin with BOS."""
    nll = []
    for chunk in range(len(logits)):
        for place in range(ctx // 2, ctx - 1):
            row = logits[chunk, place] - logits[chunk, place].max()
            nll.append(math.log(np.exp(row).sum()) - row[tokens[chunk * ctx + place + 1]])
    mean = sum(nll) / len(nll)
    variance = sum((value - mean) ** 2 for value in nll) / len(nll)
    return math.exp(mean), math.exp(mean) * math.sqrt(variance / (len(nll) - 1)), len(nll)


@pytest.mark.parametrize("name", REPRESENTATIVE)
@pytest.mark.parametrize(("ctx", "bos", "limit"), [(32, None, None), (33, 7, None), (16, 0, 3)])
def test_perplexity_is_its_definition(name: str, ctx: int, bos: int | None, limit: int | None) -> None:
    case = random_case(name)
    tokens = random_tokens(case, 150)
    count = min(150 // ctx, limit or 150)
    chunks = tokens[: count * ctx].reshape(count, ctx).copy()
    if bos is not None:
        chunks[:, 0] = bos
    value, error, scored = plain_perplexity(oracle_logits(case, chunks), tokens, ctx)
    model = torch_forward.load(case.config, case.weights)
    for score in (
        numpy_scorer(case.config, case.weights),
        torch_scorer(model),
        stream_scorer(case.config, Lazy(case.weights)),
    ):
        seen: list[Estimate] = []
        found = perplexity(
            score,
            tokens,
            vocab_size=case.config.vocab_size,
            ctx=ctx,
            bos=bos,
            chunks=limit,
            progress=seen.append,
        )
        assert found.perplexity == pytest.approx(value, rel=1e-5)
        assert found.error == pytest.approx(error, rel=1e-4)
        assert (found.scored, found.chunks, found.total, found.ctx) == (scored, count, count, ctx)
        assert [estimate.chunks for estimate in seen] == list(range(1, count + 1))
        assert seen[-1] == found


def test_a_context_of_512_scores_255_tokens() -> None:
    case = trained_case("bamba-mini")
    tokens = eval_tokens("bamba-mini", 1024 + 100)
    found = perplexity(
        torch_scorer(torch_forward.load(case.config, case.weights)),
        tokens,
        vocab_size=case.config.vocab_size,
    )
    assert (found.scored, found.chunks) == (510, 2)
    value, error, _ = plain_perplexity(oracle_logits(case, tokens[:1024].reshape(2, 512)), tokens, 512)
    assert found.perplexity == pytest.approx(value, rel=1e-5)
    assert found.error == pytest.approx(error, rel=1e-4)


def test_bad_texts_are_refused() -> None:
    options = {"vocab_size": 100, "ctx": 16}
    with pytest.raises(InputError, match="text is too short") as error:
        cut_chunks(np.arange(31), **options)
    assert error.value.found == "31 tokens" and "32" in str(error.value.expected)
    with pytest.raises(InputError, match="out of the vocabulary's range") as error:
        cut_chunks([*range(40), 100, 101], **options)
    assert error.value.where == "token 40"
    assert error.value.found == "100 (2 such of 42)" and error.value.expected == "0 to 99"
    with pytest.raises(InputError, match="out of the vocabulary's range"):
        cut_chunks(np.arange(40), **options, bos=100)
    with pytest.raises(InputError, match="context is too short"):
        cut_chunks(np.arange(40), vocab_size=100, ctx=2)
    with pytest.raises(InputError, match="number of chunks"):
        cut_chunks(np.arange(40), **options, chunks=0)


def test_a_scorer_that_loses_chunks_is_noticed() -> None:
    with pytest.raises(ValueError, match="1 of 2 chunks"):
        perplexity(lambda cut: [np.ones(7)], np.arange(32), vocab_size=100, ctx=16)
