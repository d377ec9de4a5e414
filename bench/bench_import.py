"""A file of events into the store, against ``psql \\copy`` of exactly the same rows, encoded beforehand.

By turns, each into an empty table of the same definition, after a CHECKPOINT so that neither pays for the other's dirty
pages. The import also reads and parses the lines, keeps a head per stream, and commits every quarter of a second
together with its checkpoint; ``\\copy`` is one transaction of bytes that are ready.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from hashlib import blake2b
from itertools import cycle, islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import psycopg
import pytest
from psycopg import sql

from contenders import ROUNDS, Contender, compare
from datasets import EVENTS, IMPORT_ID, DataSet
from expected import check_heads, stored_digest
from hindsight_fast import Cursor, EventStore, ImportReport
from hindsight_fast._core import EVENT_COLUMNS
from hindsight_fast.embedded import EmbeddedServer

CHECKED = (
    "count, order, and every byte of every row but its place, read back from the table, against a digest worked out by "
    "an oracle in plain Python; every stream's head against its last event"
)
COLUMNS = sql.SQL(", ").join(map(sql.Identifier, EVENT_COLUMNS))
TARGET_OF_COPY = 0.75
TARGET_OF_INITIAL = 1.4
MEMORY_EVENTS = sorted({min(100_000, EVENTS), EVENTS, 5 * EVENTS})
WEBHOOKS = min(EVENTS, 20_000)
FEW_ROUNDS = min(ROUNDS, 3)
"""Of the large ones: a round of a million events takes 40 seconds with its checks."""


class Arena:
    """A database where the rivals import, each into its own schema."""

    def __init__(self, server: EmbeddedServer, conninfo: str, data: DataSet, folder: Path) -> None:
        self._psql = [str(server.bin("psql")), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", conninfo, "-c"]
        self._data = data
        self._encoded = folder / f"{data.path.stem}.copy"
        self._admin = psycopg.connect(conninfo, autocommit=True)
        self._store = EventStore(conninfo).open()
        self._projected: list[float] = []

    @property
    def projected_seconds(self) -> float:
        """What the dry runs said an import would take."""
        return median(self._projected)

    def close(self) -> None:
        self._store.close()
        self._admin.close()
        self._encoded.unlink(missing_ok=True)

    def encode(self) -> None:
        """Import once, keep the rows as a file for \\copy, and a table without rows to make others like it."""
        self._empty_store()
        self._import(self._data.path)
        everything = sql.SQL("SELECT {} FROM hindsight.events ORDER BY transaction_no, sequence_no").format(COLUMNS)
        self._run_psql(f"\\copy ({everything.as_string()}) to '{self._encoded}' (format binary)")

    def ours(self, name: str, path: Path, **options: Any) -> Contender:
        check = self._check_by_stream if options.get("jobs", 1) > 1 else self._check_ours
        return Contender(
            name, lambda: self._import(path, **options), self._data.count, lambda _: check(), prepare=self._empty_store
        )

    def dry_run(self, name: str, path: Path) -> Contender:
        def check(report: ImportReport) -> None:
            self._projected.append(report.projected_seconds or 0.0)
            row = self._admin.execute("SELECT count(*) FROM hindsight.events").fetchone()
            assert row == (0,), "a dry run has stored something"

        return Contender(
            name, lambda: self._import(path, dry_run=True), self._data.count, check, prepare=self._empty_store
        )

    def copy(self, target: float | None = TARGET_OF_COPY) -> Contender:
        command = f"\\copy rival.events ({COLUMNS.as_string()}) from '{self._encoded}' (format binary)"
        return Contender(
            "psql \\copy of the same rows, encoded beforehand", lambda: self._run_psql(command), self._data.count,
            lambda _: self._check("rival"), prepare=self._empty_rival, target=target,
        )  # fmt: skip

    def _import(self, path: Path, **options: Any) -> ImportReport:
        report = self._store.import_events(path, import_id=IMPORT_ID, **options)
        assert report.events == self._data.count, f"{report.events} events were imported"
        return report

    def _empty_store(self) -> None:
        self._drop()
        self._store.create_schema()
        self._admin.execute("CHECKPOINT")

    def _empty_rival(self) -> None:
        self._drop()
        # The settings as well, which LIKE leaves out: autovacuum would treat the two tables differently.
        self._store.create_schema()
        row = self._admin.execute(
            "SELECT array_to_string(reloptions, ', ') FROM pg_class WHERE oid = 'hindsight.events'::regclass"
        ).fetchone()
        assert row is not None
        self._admin.execute("CREATE SCHEMA rival")
        self._admin.execute(f"CREATE TABLE rival.events (LIKE hindsight.events INCLUDING ALL) WITH ({row[0]})")
        self._admin.execute("CHECKPOINT")

    def _drop(self) -> None:
        self._admin.execute("SET client_min_messages = warning")
        self._admin.execute("DROP SCHEMA IF EXISTS hindsight, rival CASCADE")

    def _run_psql(self, command: str) -> None:
        done = subprocess.run([*self._psql, command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"psql failed: {done.stderr}")

    def _check(self, schema: str) -> None:
        assert stored_digest(self._admin, schema) == self._data.digest, "other rows are stored than expected"

    def _check_ours(self) -> None:
        self._check("hindsight")
        check_heads(self._admin)

    def _check_by_stream(self) -> None:
        found = stored_digest(self._admin, "hindsight", order="stream_id, stream_version")
        assert found == self._data.digest_by_stream, "other rows are stored than expected"
        check_heads(self._admin)


def _arena(server, database, data, folder):
    arena = Arena(server, database, data, folder)
    arena.encode()
    return arena


def bench_import_demo(benchmark, server, database, demo_data, folder):
    data = demo_data(EVENTS)
    arena = _arena(server, database, data, folder)
    try:
        compare(
            benchmark, arena.ours("import_events", data.path), arena.copy(),
            rounds=FEW_ROUNDS, unit="events", checked=CHECKED, warm_up=False,
        )  # fmt: skip
    finally:
        arena.close()


def bench_import_initial(benchmark, server, database, demo_data, folder):
    data = demo_data(EVENTS)
    arena = _arena(server, database, data, folder)
    try:
        compare(
            benchmark, arena.ours('import_events, mode="initial"', data.path, mode="initial"),
            arena.copy(TARGET_OF_INITIAL), rounds=FEW_ROUNDS, unit="events", checked=CHECKED, warm_up=False,
        )  # fmt: skip
    finally:
        arena.close()


def bench_import_webhooks(benchmark, server, database, real_webhooks, folder):
    path = folder / "webhooks.ndjson"
    with path.open("wb") as file:
        # With a time, which a digest needs that is the same for everybody.
        for line in islice(cycle(real_webhooks), WEBHOOKS):
            file.write(b'{"time":"2024-01-01T00:00:00Z",' + line.strip()[1:] + b"\n")
    data = DataSet("webhooks", path, WEBHOOKS)
    arena = _arena(server, database, data, folder)
    try:
        compare(
            benchmark, arena.ours("import_events", path), arena.copy(None),
            arena.ours('import_events, mode="initial"', path, mode="initial"),
            rounds=FEW_ROUNDS, unit="events", checked=CHECKED, warm_up=False,
        )  # fmt: skip
        size_mb = path.stat().st_size / 1e6
        rates = [
            f"{each['name']} {size_mb / median(each['seconds']):.0f} MB/s"
            for each in benchmark.extra_info["comparison"]["contenders"]
        ]
        benchmark.extra_info["comparison"]["note"] = f"{size_mb:.0f} MB of lines: {', '.join(rates)}"
    finally:
        arena.close()
        path.unlink()


def bench_import_git_history(benchmark, server, database, git_history, folder):
    arena = _arena(server, database, git_history, folder)
    try:
        compare(
            benchmark, arena.ours("import_events", git_history.path), arena.copy(),
            arena.ours("import_events of the file compressed by gzip", git_history.compressed),
            rounds=FEW_ROUNDS, unit="events", checked=CHECKED, warm_up=False,
        )  # fmt: skip
    finally:
        arena.close()


def bench_import_ways(benchmark, server, database, demo_data, folder):
    data = demo_data(min(EVENTS, 300_000))
    arena = _arena(server, database, data, folder)
    try:
        compare(
            benchmark, arena.ours("import_events, jobs=2", data.path, jobs=2),
            arena.ours("import_events", data.path),
            arena.dry_run("import_events, dry_run=True", data.path),
            rounds=FEW_ROUNDS, unit="events", warm_up=False,
            checked=CHECKED + "; with jobs in the order of streams; of a dry run that nothing is there",
        )  # fmt: skip
        comparison = benchmark.extra_info["comparison"]
        took = median(comparison["contenders"][1]["seconds"])
        comparison["note"] = f"the dry runs projected {arena.projected_seconds:.1f} s for what took {took:.1f} s"
    finally:
        arena.close()


def bench_import_gzip(benchmark, server, database, demo_data, folder):
    data = demo_data(min(EVENTS, 200_000))
    arena = _arena(server, database, data, folder)
    try:
        compare(
            benchmark, arena.ours("import_events", data.path),
            arena.ours("import_events of the file compressed by gzip", data.compressed),
            rounds=FEW_ROUNDS, unit="events", checked=CHECKED, warm_up=False,
        )  # fmt: skip
    finally:
        arena.close()


# VmHWM and not ru_maxrss: across exec the latter keeps the peak of the process that forked, which is this one.
_IMPORTER = """
import json, sys
from hindsight_fast import EventStore

def peak():
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])

conninfo, path, import_id = sys.argv[1:]
with EventStore(conninfo) as store:
    store.create_schema()
    before = peak()
    report = store.import_events(path, import_id=import_id)
print(json.dumps([report.events, before, peak()]))
"""


def bench_import_memory(benchmark, server, demo_data):
    peaks: dict[int, tuple[int, int]] = {}

    def measure(count):
        name = f"memory_{count}"
        with psycopg.connect(server.conninfo, autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE {name} TEMPLATE template0")
            try:
                conninfo = server.conninfo_for(name)
                data = demo_data(count)
                command = [sys.executable, "-c", _IMPORTER, conninfo, str(data.path), IMPORT_ID]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise RuntimeError(done.stderr)
                events, before, after = json.loads(done.stdout)
                with psycopg.connect(conninfo) as connection:
                    assert events == count
                    if count <= EVENTS:
                        assert stored_digest(connection, "hindsight") == data.digest
                    else:
                        # The oracle would take minutes.
                        stored = connection.execute("SELECT count(*) FROM hindsight.events").fetchone()
                        assert stored == (count,), f"{stored} events are stored"
            finally:
                admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        peaks[count] = (before, after)

    def measure_all():
        for count in MEMORY_EVENTS:
            measure(count)

    benchmark.pedantic(measure_all, rounds=1)
    benchmark.extra_info["figures"] = {
        "header": ["events imported", "peak memory of the importing process", "of it before the import began"],
        "rows": [
            [f"{count:,}", f"{after / 1024:.1f} MiB", f"{before / 1024:.1f} MiB"]
            for count, (before, after) in peaks.items()
        ],
        "checked": "the rows stored by each run, as for the imports above; of the largest only their number",
        "note": "The peak resident set (VmHWM) of a process of its own for each run.",
    }
    # Not the smallest: its second or two end before the chunks have come to their size, sometimes.
    *_, large, largest = (peaks[count] for count in MEMORY_EVENTS)
    if largest[1] > large[1] * 1.25:
        pytest.fail(f"memory grows with the number of events: {peaks} kB")


# The monotonic clock is one for all processes.
_TELLING_IMPORTER = """
import sys, time
from hindsight_fast import EventStore

def tell(progress):
    print(progress.events, time.monotonic())

conninfo, path, import_id, jobs = sys.argv[1:]
with EventStore(conninfo) as store:
    store.import_events(path, import_id=import_id, jobs=int(jobs), progress=tell)
"""
POLL_S = 0.02
LAG_SLACK_S = 0.05
"""How long a reader may take beside the time of one chunk."""
LAG_JOBS = (1, 2)


def bench_import_lag(benchmark, server, demo_data):
    data = demo_data(min(EVENTS, 300_000))
    rows = []

    def measure(jobs):
        name = f"lag_{jobs}"
        with psycopg.connect(server.conninfo, autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE {name} TEMPLATE template0")
            try:
                rows.append(_lag_beside(server.conninfo_for(name), data, jobs))
            finally:
                admin.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def measure_all():
        for jobs in LAG_JOBS:
            measure(jobs)

    benchmark.pedantic(measure_all, rounds=1)
    benchmark.extra_info["figures"] = {
        "header": ["a reader beside an import", "a chunk commits every", "the reader has it after", "reads"],
        "rows": rows,
        "checked": "the rows stored; that the reader was given all of them in their order; that no read lacked what "
        "one job had told of before it began",
        "note": f"Seconds: median (least to most). The reader polls {POLL_S * 1000:.0f} ms after its last read and "
        "looks at every event's id. Its lag is from the importer's report of a commit to the end of the read with it.",
    }


def _lag_beside(conninfo: str, data: DataSet, jobs: int) -> list[str]:
    reads: list[tuple[float, float, int]] = []  # when each began and ended, and how many events there were by then
    seen, count, position = blake2b(), 0, Cursor.BEGINNING
    with EventStore(conninfo) as store:
        store.create_schema()
        command = [sys.executable, "-c", _TELLING_IMPORTER, conninfo, str(data.path), IMPORT_ID, str(jobs)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as importer:
            has_ended = False
            while not has_ended:
                # Asked before the last read, which then finds all.
                has_ended = importer.poll() is not None
                began_s = time.monotonic()
                for batch in store.read_batches(after=position):
                    for event in batch:
                        seen.update(event.event_id.bytes)
                    count, position = count + len(batch), batch[-1].cursor
                reads.append((began_s, time.monotonic(), count))
                time.sleep(POLL_S)
            output, errors = importer.communicate()
            if importer.returncode:
                raise RuntimeError(errors)
    told = [(int(events), float(at_s)) for events, at_s in map(str.split, output.splitlines())]
    # Now and then the reader is there before the report.
    lags = [max(next(ended_s for _, ended_s, had in reads if had >= events) - at_s, 0.0) for events, at_s in told]
    if jobs == 1:
        for began_s, _, had in reads:
            assert had >= max((events for events, at_s in told if at_s < began_s), default=0), "a read lacked a chunk"
    with psycopg.connect(conninfo) as connection, connection.cursor("ids") as ids:
        digest = stored_digest(connection, "hindsight", **({} if jobs == 1 else {"order": "stream_id, stream_version"}))
        assert digest == (data.digest if jobs == 1 else data.digest_by_stream), "other rows are stored than expected"
        stored = blake2b()
        ids.execute("SELECT event_id FROM hindsight.events ORDER BY transaction_no, sequence_no")
        for (event_id,) in ids:
            stored.update(event_id.bytes)
    assert (count, seen.digest()) == (data.count, stored.digest()), "the reader was given something else"
    gaps = [later - earlier for (_, earlier), (_, later) in pairwise(told)]
    if median(lags) > median(gaps) * jobs + LAG_SLACK_S:
        pytest.fail(f"jobs={jobs}: the reader has a chunk {median(lags):.3f} s after its commit")

    def spread(seconds: list[float]) -> str:
        return f"{median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"

    return [f"of {data.count:,} events, jobs={jobs}", spread(gaps), spread(lags), f"{len(reads):,}"]
