"""Parts that tile a text, values that come together in order, and the end of a wait for a process that is gone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore

from bamba_quant.errors import BambaQuantError
from bamba_quant.inference import distributed as ranks_module
from bamba_quant.inference import exchange as module
from bamba_quant.inference.distributed import (
    SINGLE_PROCESS,
    FailedElsewhereError,
    RankError,
    Ranks,
    join_ranks,
    spread_over_ranks,
)
from bamba_quant.inference.exchange import Exchange
from bamba_quant.inference.loading import torch_device
from bamba_reference.runtime.stream import head_blocks, together


@given(st.integers(1, 300), st.integers(1, 20), st.integers(1, 9), st.integers(0, 40))
def test_parts_tile_the_text(count: int, at_once: int, size: int, first: int) -> None:
    groups, kept = -(-count // at_once), max(1, -(-min(first, count) // at_once))
    if size > 1 and size > 1 + groups - kept:
        with pytest.raises(RankError, match="more processes than parts") as caught:
            Ranks(0, size).part(count, at_once, first=first)
        least = int(str(caught.value).partition("expected: ")[2].split()[0])
        Ranks(0, size).part(least, at_once, first=first)
        with pytest.raises(RankError):
            Ranks(0, size).part(least - 1, at_once, first=first)
        return
    parts = [Ranks(rank, size).part(count, at_once, first=first) for rank in range(size)]
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == count and parts[0].stop >= min(first, count)
    assert all(part.start % at_once == 0 and part.stop > part.start for part in parts)
    groups_of = [-(-(part.stop - part.start) // at_once) for part in parts]
    assert max(groups_of[1:], default=0) - min(groups_of[1:], default=0) <= 1
    assert groups_of[0] == max(kept, groups // size) if size > 1 else groups_of == [groups]


@given(st.integers(100, 300), st.integers(1, 20), st.integers(2, 5), st.integers(0, 10))
def test_the_first_has_less_by_what_it_does_besides(groups: int, at_once: int, size: int, more: int) -> None:
    parts = [
        Ranks(rank, size).part(groups * at_once, at_once, besides=more * at_once) for rank in range(size)
    ]
    work = [(part.stop - part.start) // at_once for part in parts]
    assert sum(work) == groups and max(work) - 1 <= work[0] + more <= min(work[1:])


@given(
    st.integers(3, 700),
    st.integers(1, 3000),
    st.integers(1, 9),
    st.integers(0, 40),
    st.sampled_from(["cpu", "cuda"]),
)
def test_a_part_goes_through_the_head_in_the_blocks_of_the_whole(
    ctx: int, most: int, before: int, after: int, device: str
) -> None:
    step, scored = together(ctx, device, most), ctx - 1 - ctx // 2
    whole = head_blocks(before * step + after, ctx, device, most)
    assert whole == head_blocks(before * step, ctx, device, most) + head_blocks(after, ctx, device, most)
    assert sum(whole) == scored * (before * step + after) and max(whole) <= most


def test_what_a_rank_is() -> None:
    assert (
        SINGLE_PROCESS.first
        and SINGLE_PROCESS.device("cuda") == "cuda"
        and SINGLE_PROCESS.command(["x"]) == ["bamba-quant", "x"]
    )
    rank = Ranks(5, 8, 1, 4)
    assert not rank.first and rank.device("cuda") == "cuda:1" and rank.device("cpu") == "cpu"
    expected = ["torchrun", "--nnodes", "2", "--nproc-per-node", "4", "-m", "bamba_quant_cli", "x"]
    assert rank.command(["x"]) == expected
    assert Ranks(1, 2, 1, 2).command([]) == ["torchrun", "--nproc-per-node", "2", "-m", "bamba_quant_cli"]


def test_variables_that_torchrun_did_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_ranks() as alone:
        assert alone is SINGLE_PROCESS
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RankError, match="did not connect") as error, join_ranks():
        pass
    assert "RANK" in str(error.value.found) and "torchrun" in str(error.value.fix)
    for rank, port in (("0", None), ("x", "1"), ("0", "x"), ("0", "99999")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", port) if port else monkeypatch.delenv("MASTER_PORT", raising=False)
        with pytest.raises(RankError, match="did not connect"), join_ranks():
            pass


Together = Callable[[Callable[[Ranks], Any]], list[Any]]


@pytest.fixture(params=[2, 3])
def in_threads(request: pytest.FixtureRequest) -> Iterator[Together]:
    """Runs a function as each of several ranks at once, over a store in memory."""
    store, size = HashStore(), request.param
    exchanges = [Exchange(store, rank, size) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        yield lambda work: list(
            pool.map(
                work, [Ranks(rank, size, rank, size, exchange) for rank, exchange in enumerate(exchanges)]
            )
        )
    for exchange in exchanges:
        exchange.leave()


def test_values_come_together_in_the_order_of_ranks(
    in_threads: Together, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PIECE", 1000)

    def work(ranks: Ranks) -> list[Any]:
        time.sleep(0.02 * (ranks.size - ranks.rank))
        large = np.arange(5000.0) + ranks.rank
        return [
            ranks.gather(ranks.rank),
            ranks.gather(large),
            ranks.share(f"of {ranks.rank}"),
            ranks.gather([]),
        ]

    for numbers, arrays, shared, empty in in_threads(work):
        size = len(numbers)
        assert numbers == list(range(size)) and shared == "of 0" and empty == [[]] * size
        assert all(np.array_equal(array, np.arange(5000.0) + i) for i, array in enumerate(arrays))


def test_scores_come_in_the_texts_order(in_threads: Together) -> None:
    cut = np.arange(7 * 4).reshape(7, 4)

    def score(part: np.ndarray) -> Iterator[np.ndarray]:
        yield from (row / 3 for row in part)

    for scores in in_threads(lambda ranks: list(spread_over_ranks(score, lambda ctx: 2, ranks)(cut))):
        np.testing.assert_array_equal(scores, cut / 3)


def test_a_process_that_falls_silent_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_SIGNS", 0.02)
    store = HashStore()
    first, second = (Exchange(store, rank, 2) for rank in range(2))
    second.leave()
    with pytest.raises(RankError, match="does not respond") as error:
        first.gather("waiting")
    assert "rank 1 of 2" in str(error.value.found)
    with pytest.raises(RankError):
        Ranks(0, 2, _exchange=first).check()
    first.leave()


def test_slow_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_SIGNS", 0.02)
    store = HashStore()
    first, second = (Exchange(store, rank, 2) for rank in range(2))
    late = threading.Timer(1.0, second.gather, ["late"])
    late.start()
    assert first.gather("early") == ["early", "late"]
    late.join()
    first.leave()
    second.leave()


def test_the_first_leaves_last(in_threads: Together) -> None:
    """It may hold the store that the others still look into."""
    left: list[int] = []

    def work(ranks: Ranks) -> None:
        assert ranks._exchange is not None
        time.sleep(0.1 * ranks.rank)
        if ranks.rank:
            left.append(ranks.rank)
        ranks._exchange.finish()
        if not ranks.rank:
            left.append(0)

    in_threads(work)
    assert left[-1] == 0 and len(left) == len(set(left)) > 1


def test_processes_without_torchrun() -> None:
    """The first holds the store itself."""
    program = (
        "from bamba_quant.inference.distributed import join_ranks\n"
        "with join_ranks() as ranks: print(ranks.gather(ranks.rank))"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ | address | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [process.communicate(timeout=120)[0] for process in processes] == ["[0, 1]\n"] * 2
    assert [process.returncode for process in processes] == [0, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_store_for_one_machine_listens_on_loopback_alone(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    store = ranks_module._store(host, port, 0, 1)
    tables = (Path(f"/proc/net/{table}").read_text().splitlines()[1:] for table in ("tcp", "tcp6"))
    sockets = [line.split() for table in tables for line in table]
    listening = [each[1] for each in sockets if each[3] == "0A" and each[1].endswith(f":{port:04X}")]
    assert listening == [f"0100007F:{port:04X}"]
    del store


def test_a_device_is_called_what_the_user_called_it() -> None:
    with pytest.raises(BambaQuantError) as error:
        torch_device(Ranks(99, 100, 99, 100).device("cuda"), "cuda")
    assert str(error.value.found).startswith("cuda (cuda:99 in this process): ")


def test_one_of_several_errors_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    monkeypatch.setenv("WORLD_SIZE", "2")
    exchanges = iter([Exchange(store, rank, 2) for rank in range(2)])
    monkeypatch.setattr(ranks_module, "_meet", lambda: next(exchanges))
    with pytest.raises(ZeroDivisionError), join_ranks():
        raise ZeroDivisionError
    with pytest.raises(FailedElsewhereError), join_ranks():
        raise ZeroDivisionError
