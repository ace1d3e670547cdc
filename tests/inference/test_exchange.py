"""A store that a stranger writes to: an error that names the rank, never code of the stranger's or a wrong value."""

from __future__ import annotations

import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.distributed import HashStore, TCPStore

from bamba_quant.inference import exchange as module
from bamba_quant.inference.exchange import Exchange, RankError

TOKEN = b"a secret of the run"
CHANGED = "changed by another process"


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 1000)
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_SIGNS", 0.02)


@pytest.fixture
def store() -> HashStore:
    return HashStore()


@pytest.fixture
def both(store: HashStore) -> Iterator[list[Exchange]]:
    found = [Exchange(store, rank, 2, TOKEN) for rank in range(2)]
    yield found
    for exchange in found:
        exchange.leave()


def gathered(both: list[Exchange], values: list[Any], late: float = 0.0) -> list[Any]:
    """What each of two processes gathers, the second of them later, or the error that it raised."""

    def work(rank: int) -> Any:
        time.sleep(late * rank)
        try:
            return both[rank].gather(values[rank])
        except RankError as error:
            both[rank].leave()
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, range(2)))


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def forgeries(tmp_path: Path) -> list[bytes]:
    harmful = pickle.dumps(Harmful(tmp_path / "ran"))
    with_another_token = Exchange(HashStore(), 1, 2, b"guessed")
    with_another_token.leave()
    return [
        harmful,
        b"\x00" * 32 + harmful,
        b"",
        with_another_token._sealed("1/1/length", b"\x08" + 7 * b"\x00"),
    ]


@pytest.mark.parametrize("key", ["1/1/length", "1/1/0", "1/1/1", "1/1/read"])
@pytest.mark.parametrize("number", range(4))
def test_a_value_of_a_stranger(
    key: str, number: int, both: list[Exchange], store: HashStore, tmp_path: Path
) -> None:
    forged = forgeries(tmp_path)[number]
    put = store.set

    def overwritten(name: str, value: bytes) -> None:
        put(name, forged if name == key else value)

    both[1]._store = _Store(store, set=overwritten)
    first, _ = gathered(both, [None, np.arange(200.0)])
    assert isinstance(first, RankError) and CHANGED in str(first) and "rank 1 of 2" in str(first)
    assert not (tmp_path / "ran").exists()


class _Store:
    """A store with some operations replaced."""

    def __init__(self, store: Any, **replaced: Callable[..., Any]) -> None:
        self.__dict__.update(replaced)
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_a_value_under_another_key(both: list[Exchange], store: HashStore) -> None:
    """What the run itself said earlier, or elsewhere, is not taken for what it says now."""
    assert gathered(both, ["a", "b"]) == [["a", "b"]] * 2
    store.set("2/1/length", store.get("1/1/length"))
    first = gathered(both, ["c", "d"], late=0.3)[0]
    assert isinstance(first, RankError) and CHANGED in str(first)


@pytest.mark.parametrize("key", ["1/1/length", "1/1/0", "1/1/read"])
def test_a_value_that_is_deleted(key: str, both: list[Exchange], store: HashStore) -> None:
    """The one who waits for it learns that it was there, instead of waiting for ever."""
    put = store.set

    def lost(name: str, value: bytes) -> None:
        if name != key:
            put(name, value)

    both[1]._store = _Store(store, set=lost)
    found = gathered(both, ["a", "b"])
    assert all(isinstance(each, RankError) for each in found)
    assert any(CHANGED in str(each) and "found: deleted" in str(each) for each in found)


def test_signs_of_life_of_a_stranger(both: list[Exchange], store: HashStore) -> None:
    store.set("signs/1", both[0]._sealed("signs/0", b"\x00" * 16))
    both[1].leave()
    with pytest.raises(RankError, match=CHANGED):
        both[0].gather("waiting")


def test_signs_of_life_are_not_shown_again(both: list[Exchange], store: HashStore) -> None:
    """Old signs do not keep a process alive that is gone."""
    while not store.check(["signs/1"]):
        time.sleep(0.01)
    time.sleep(0.2)
    both[1].leave()
    old = [both[1]._sealed("signs/1", bytes([n]) + b"\x00" * 15) for n in (1, 2)]
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(0.01):
            store.set("signs/1", old[int(time.monotonic() * 50) % 2])

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        with pytest.raises(RankError, match="does not respond"):
            both[0].gather("waiting")
    finally:
        ended.set()
        thread.join()


def test_which_error_is_told_is_nobody_else_s_choice(both: list[Exchange], store: HashStore) -> None:
    assert [exchange.is_first_to_fail() for exchange in both] == [True, False]
    store.set("failed", b"none of you")
    assert [exchange.is_first_to_fail() for exchange in both] == [True, True]


def test_a_process_of_another_run_is_not_taken_for_one_of_this(store: HashStore) -> None:
    exchanges = [Exchange(store, rank, 2, token) for rank, token in enumerate((TOKEN, b"another run's"))]
    first, second = gathered(exchanges, ["a", "b"])
    assert isinstance(first, RankError) and isinstance(second, RankError)
    assert CHANGED in str(first) or CHANGED in str(second)
    for exchange in exchanges:
        exchange.leave()


def test_a_stranger_at_the_port_of_a_run(tmp_path: Path) -> None:
    """Values arrive, or an error does, whatever another client of the same server does meanwhile."""
    listener = socket.create_server(("127.0.0.1", 0))
    host, port = listener.getsockname()
    server = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    clients = [TCPStore(host, port, is_master=False, wait_for_workers=False) for _ in range(3)]
    exchanges = [Exchange(store, rank, 2, TOKEN) for rank, store in enumerate(clients[:2])]
    harmful, ended = pickle.dumps(Harmful(tmp_path / "ran")), threading.Event()
    assert gathered(exchanges, [np.arange(3.0), "x"])[1][1] == "x"

    def disturb() -> None:
        while not ended.is_set():
            for key in ("length", "0", "read"):
                for rank in range(2):
                    clients[2].set(f"2/{rank}/{key}", harmful)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        found = gathered(exchanges, [np.arange(3.0), "y"])
    finally:
        ended.set()
        thread.join()
        for exchange in exchanges:
            exchange.leave()
    for each in found:
        assert isinstance(each, RankError) or (np.array_equal(each[0], np.arange(3.0)) and each[1] == "y")
    assert any(isinstance(each, RankError) and CHANGED in str(each) for each in found)
    assert not (tmp_path / "ran").exists()
    del server
