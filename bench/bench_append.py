"""Appends of one event each: by one caller, by many at once, and all to one stream; against pgbench and two rivals.

pgbench's bare INSERT is one row with the same payload into a table without any index, by as many connections as the
line says, prepared; every append of ours locks its stream's head, draws a number, and keeps three indexes. The rivals
are the seed's statements by pgbench (seed_statements.py) and the package eventsourcing (eventsourcing_store.py).
100,000 streams exist, in each of the stores. Latency is what one caller waits for one append.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest

from contenders import ROUNDS, Contender, compare
from datasets import EVENTS
from eventsourcing_store import IS_INSTALLED, EventsourcingStore, not_installed
from expected import check_heads, check_versions
from hindsight_fast import ANY, AsyncEventStore, EventStore, NewEvent
from hindsight_fast.embedded import EmbeddedServer
from seed_statements import SeedStore

STREAMS = min(EVENTS, 100_000)
APPENDS = min(EVENTS, 20_000)
"""Of many callers; one caller makes a tenth of them."""
RIVAL_APPENDS, RIVAL_APPENDS_HOT = max(APPENDS // 20, 64), max(APPENDS // 100, 64)
"""Of a rival, and of a rival on one stream: both rivals together add about two minutes in five rounds."""
PAYLOAD = {
    "order": 4711, "customer": "06c65999-798a-47d3-a095-6715e646e123", "total": "129.90", "channel": "app",
    "lines": [[1, 2], [3, 4]], "note": "leave it with the neighbours, please",
}  # fmt: skip
CHECKED = (
    "after every turn, of all but pgbench: as many events are stored as appends were acknowledged, each stream's "
    "versions have no hole, and its head, where there are heads, is its last event"
)
TARGET_OF_ONE, TARGETS_OF_MANY = 0.55, {16: 1.0, 64: 1.5}


def _pgbench() -> str:
    found = shutil.which("pgbench") or next(map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/pgbench"))), None)
    if found is None:
        pytest.skip("needs pgbench (Debian: the package postgresql)")
    return found


class Arena:
    """A database with streams that exist, in the stores of all contenders, and the table of the bare INSERT."""

    def __init__(self, server: EmbeddedServer, conninfo: str, folder: Path) -> None:
        self.conninfo = conninfo
        # As pgbench can name them too: md5(n).
        self.streams = [UUID(hashlib.md5(b"%d" % n).hexdigest()) for n in range(1, STREAMS + 1)]
        self._admin = psycopg.connect(conninfo, autocommit=True)
        self._script = folder / "insert.sql"
        payload = NewEvent("order_placed", PAYLOAD).data.decode()
        self._script.write_text(f"INSERT INTO bare VALUES (1, 1, '{payload}');\n")
        with EventStore(conninfo) as store:
            store.create_schema()
            lines = (b'{"stream":"%s","type":"begun","data":{}}' % str(each).encode() for each in self.streams)
            store.import_events(lines, import_id="streams")
        self._admin.execute("CREATE TABLE bare (a integer, b integer, payload json)")
        self.seed = SeedStore(conninfo, self.streams, PAYLOAD, _pgbench(), folder)
        self.eventsourcing = EventsourcingStore(conninfo, self.streams, PAYLOAD) if IS_INSTALLED else None
        self._admin.execute("VACUUM (FREEZE, ANALYZE)")
        self._stored = STREAMS

    def close(self) -> None:
        self.seed.close()
        if self.eventsourcing is not None:
            self.eventsourcing.close()
        self._admin.close()

    def insert(self, clients: int, count: int, target: float | None) -> Contender:
        command = [_pgbench(), "-n", "-M", "prepared", "-c", str(clients), "-j", str(min(clients, 2))]
        command += ["-t", str(count // clients), "-f", str(self._script), self.conninfo]

        def run() -> str:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        def check(said: str) -> None:
            assert f"{count // clients * clients}/" in said, "pgbench made another number of INSERTs"

        return Contender(f"pgbench, bare INSERT, {clients} connections", run, count, check, target=target)

    def check(self, count: int) -> None:
        self._stored += count
        check_versions(self._admin, "hindsight.events", ("stream_id", "stream_version"), self._stored)
        check_heads(self._admin)

    def one_caller(self, store: EventStore, count: int) -> Contender:
        latencies: list[float] = []

        def run() -> None:
            for _ in range(count):
                began = time.perf_counter()
                store.append(random.choice(self.streams), [NewEvent("order_placed", PAYLOAD)], expected=ANY)
                latencies.append(time.perf_counter() - began)

        name = "EventStore.append, one caller"
        return Contender(name, run, count, lambda _: self.check(count), latencies=latencies)

    def many_callers(self, callers: int, count: int, streams: list[UUID], name: str) -> Contender:
        latencies: list[float] = []

        async def call(store: AsyncEventStore) -> None:
            for _ in range(count // callers):
                began = time.perf_counter()
                await store.append(random.choice(streams), [NewEvent("order_placed", PAYLOAD)], expected=ANY)
                latencies.append(time.perf_counter() - began)

        async def run() -> None:
            async with AsyncEventStore(self.conninfo) as store:
                await store.append(streams[0], [], expected=ANY)
                await asyncio.gather(*[call(store) for _ in range(callers)])

        made = count // callers * callers
        return Contender(name, lambda: asyncio.run(run()), made, lambda _: self.check(made), latencies=latencies)

    def rivals_of_one_caller(self, count: int) -> list[Contender]:
        eventsourcing = not_installed() if self.eventsourcing is None else self.eventsourcing.one_caller(count)
        return [self.seed.append(1, count, len(self.streams)), eventsourcing]

    def rivals_of_many_callers(self, callers: int, count: int, streams: list[UUID]) -> list[Contender]:
        seed = self.seed.append(callers, count, len(streams))
        if self.eventsourcing is None:
            return [seed, not_installed()]
        return [seed, self.eventsourcing.many_callers(callers, count, streams)]

    def note(self, benchmark: Any) -> None:
        benchmark.extra_info["comparison"]["note"] = self.seed.note()


@pytest.fixture
def arena(server: EmbeddedServer, database: str, folder: Path) -> Iterator[Arena]:
    arena = Arena(server, database, folder)
    yield arena
    arena.close()


def bench_append_one_caller(benchmark, arena):
    count = APPENDS // 10
    with EventStore(arena.conninfo) as store:
        compare(
            benchmark, arena.one_caller(store, count), arena.insert(1, count, TARGET_OF_ONE),
            *arena.rivals_of_one_caller(RIVAL_APPENDS),
            rounds=ROUNDS, unit="appends", checked=CHECKED,
        )  # fmt: skip
    arena.note(benchmark)


@pytest.mark.parametrize("callers", [16, 64])
def bench_append_many_callers(benchmark, arena, callers):
    ours = arena.many_callers(callers, APPENDS, arena.streams, f"AsyncEventStore.append, {callers} callers")
    compare(
        benchmark, ours, arena.insert(16, APPENDS, TARGETS_OF_MANY[callers]),
        *arena.rivals_of_many_callers(callers, RIVAL_APPENDS, arena.streams),
        rounds=ROUNDS, unit="appends", checked=CHECKED,
    )  # fmt: skip
    arena.note(benchmark)


def bench_append_hot_stream(benchmark, arena):
    ours = arena.many_callers(64, APPENDS, arena.streams[:1], "AsyncEventStore.append, 64 callers, one stream")
    compare(
        benchmark, ours, arena.insert(16, APPENDS, None),
        *arena.rivals_of_many_callers(64, RIVAL_APPENDS_HOT, arena.streams[:1]),
        rounds=ROUNDS, unit="appends", checked=CHECKED,
    )  # fmt: skip
    arena.note(benchmark)
