"""The harness without what takes it long and no test needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.tasks import quick_harness


@pytest.fixture(scope="session", autouse=True)
def quick() -> Iterator[None]:
    with quick_harness():
        yield
