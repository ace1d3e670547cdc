"""Input files that are on the Hub: each is fetched when its rows are due, and removed when the last of them is done."""

from __future__ import annotations

import shutil
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from bamba_quant.checkpoint import RawReader
from bamba_quant.errors import FetchError, OutputError
from bamba_quant.files.reading import REMOTE
from bamba_quant.planning.model import SkippedTensor
from bamba_quant.planning.plan import Plan


@dataclass(eq=False)
class Group:
    """Rows of a plan, by their numbers, and copies to be checked, for which all ``files`` must be there."""

    rows: list[int] = field(default_factory=list)
    skipped: list[SkippedTensor] = field(default_factory=list)
    files: set[Path] = field(default_factory=set)


def whole(plan: Plan) -> list[Group]:
    """All rows in one group."""
    return [Group(list(range(len(plan.rows))), list(plan.skipped), set(plan.inputs))]


def by_shard(plan: Plan) -> list[Group]:
    """Rows in groups by the last of the files that they need; rows that are measured together stay together."""
    pairs = {id(each): each.equal_to for each in plan.skipped if each.equal_to}
    copies = [
        (each, {*each.source.files, *pairs[id(each)].files}) for each in plan.skipped if id(each) in pairs
    ]
    files = [set(row.source.files) for row in plan.rows]
    units: defaultdict[str, set[Path]] = defaultdict(set)
    for row, needed in zip(plan.rows, files, strict=True):
        if row.method is not None:
            units[row.unit] |= needed
    groups: defaultdict[Path, Group] = defaultdict(Group)
    for number, row in enumerate(plan.rows):
        needed = files[number] if row.method is None else units[row.unit]
        group = groups[max(needed)]
        group.rows.append(number)
        group.files |= needed
    for skipped, needed in copies:
        group = groups[max(needed)]
        group.skipped.append(skipped)
        group.files |= needed
    return [groups[file] for file in sorted(groups)]


class ShardStream:
    """The files of ``groups``, which are used in this order, in the directory ``place`` while they are needed.

    The next group's are fetched meanwhile if the disk has room for them. Files that a killed run of the same output
    left in ``place`` are not fetched again. Without ``place`` files stay where they are.
    """

    def __init__(self, place: Path | None, groups: Sequence[Group], reader: RawReader) -> None:
        self._place, self._waiting, self._reader = place, list(groups), reader
        self._fetched: dict[Path, Future[Path]] = {}

    def __enter__(self) -> Self:
        place = self._place
        if place is not None:
            if place.is_dir() and any(place.iterdir()) and not (place / ".cache").is_dir():
                raise OutputError(
                    "the directory for shards exists and is not that of an interrupted run",
                    where=place,
                    fix="move it away, or give another name for the output",
                )
            place.mkdir(exist_ok=True)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Remove the files, but not where others could not be fetched: a later run takes those that are whole."""
        if self._place is not None and not isinstance(error, FetchError):
            shutil.rmtree(self._place, ignore_errors=True)

    @contextmanager
    def ready(self, group: Group) -> Iterator[None]:
        """The files of a group, open in the reader until the block ends, and those that later groups need longer."""
        if group not in self._waiting:  # an earlier run finished it
            yield
            return
        self._waiting.remove(group)
        self._begin(group)
        for file in sorted(group.files):
            fetched = self._fetched.get(file)
            self._reader.open(file, fetched.result() if fetched else None)
        if self._place is not None and self._waiting:
            missing = self._remote(self._waiting[0]) - self._fetched.keys()
            if sum(REMOTE[file].size for file in missing) < shutil.disk_usage(self._place).free:
                self._begin(self._waiting[0])
        yield
        needed = {file for later in self._waiting for file in later.files}
        for file in self._fetched.keys() - needed:
            self._reader.close(file)
            self._fetched.pop(file).result().unlink()

    def _remote(self, group: Group) -> set[Path]:
        return group.files & REMOTE.keys() if self._place is not None else set()

    def _begin(self, group: Group) -> None:
        """Start to fetch the files of a group; in threads that do not keep the process from ending."""
        for file in sorted(self._remote(group) - self._fetched.keys()):
            self._fetched[file] = future = Future[Path]()
            threading.Thread(target=self._fetch, args=(file, future), name="shards", daemon=True).start()

    def _fetch(self, file: Path, future: Future[Path]) -> None:
        try:
            future.set_result(REMOTE[file].fetch(self._place))
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            future.set_exception(error)
