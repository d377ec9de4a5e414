"""What rivals in appending have in common: a turn's account, and the check of what is stored after it.

A rival appends one event at a time to streams that exist, as ours does, in a schema of its own on the same server. It
does fewer appends a turn than ours, because it would take longer. eventsourcing has its connections open before the
clock runs; pgbench connects within its turn, as ours does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, LiteralString

import psycopg

from contenders import Contender
from expected import check_versions


@dataclass
class Turn:
    """What became of the appends of one turn; several threads may write to it.

    *latencies* has the seconds of every append that was acknowledged, *failures* the kind of error of every other one.
    """

    latencies: list[float]
    failures: list[str] = field(default_factory=list)
    retries: int = 0

    @contextmanager
    def append(self, failing_by: type[Exception]) -> Iterator[None]:
        """Time and note what is within as one append. It has failed if it raises *failing_by*, which does not pass."""
        began = time.perf_counter()
        try:
            yield
        except failing_by as error:
            self.failures.append(type(error).__name__)
        else:
            self.latencies.append(time.perf_counter() - began)


def rival(name: str, count: int, run: Callable[[Turn], None], check: Callable[[Turn, int], None]) -> Contender:
    """A contender whose *run* makes *count* appends and notes them in a Turn, which *check* takes."""
    latencies: list[float] = []

    def take_turn() -> Turn:
        turn = Turn(latencies)
        run(turn)
        return turn

    return Contender(name, take_turn, count, lambda turn: check(turn, count), latencies=latencies)


class Ledger:
    """How many rows *table* must have: *row_count* and one for every append. *columns*: stream's id, version."""

    def __init__(
        self, admin: psycopg.Connection[Any], table: LiteralString, columns: tuple[str, str], row_count: int
    ) -> None:
        self.appends = 0
        self.retries = 0
        self._admin = admin
        self._table = table
        self._columns = columns
        self._row_count = row_count

    def check(self, turn: Turn, count: int) -> None:
        """Raise AssertionError unless *count* appends were acknowledged, and they and no others are stored."""
        acknowledged = len(turn.latencies)
        self.appends += acknowledged
        self.retries += turn.retries
        kinds = ", ".join(sorted(set(turn.failures)))
        assert not turn.failures, f"{len(turn.failures)} of {count} appends failed: {kinds}"
        assert acknowledged == count, f"{acknowledged} of {count} appends were acknowledged"
        check_versions(self._admin, self._table, self._columns, self._row_count + self.appends)
