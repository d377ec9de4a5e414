"""Several shards at once: order within each stream, the same set, and no thread or connection left behind."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool

from hindsight_fast import EventStore, ImportFailed, ImportProgress, RecordedEvent, stream_uuid
from hindsight_fast.import_chunks import Checkpoint
from hindsight_fast.import_writer import Stored
from hindsight_fast.importer import ImportOptions, _Run
from hindsight_fast.statements import LIMIT_CHUNK

# Of two shards, the first and the second have these.
FIRST, SECOND = "a", "b"


@pytest.fixture
def store(database: str) -> Iterator[EventStore]:
    with EventStore(database) as store:
        store.create_schema()
        yield store
    for thread in threading.enumerate():
        if thread.name.startswith("hindsight-import"):
            thread.join(10)
            assert not thread.is_alive()


def line(n: int, stream: str = "s") -> bytes:
    return b'{"stream":"%s","type":"t","data":{"n":%d}}' % (stream.encode(), n)


def numbers(events: Iterable[RecordedEvent]) -> list[int]:
    return sorted(event.payload["n"] for event in events)


def by_stream(store: EventStore) -> dict[str, list[int]]:
    """The numbers of each stream in its order, which is also that of the log."""
    found: dict[Any, list[tuple[int, int]]] = defaultdict(list)
    for event in store.read():
        found[event.stream_id].append((event.stream_version, event.payload["n"]))
    for stream_id, events in found.items():
        assert [version for version, _ in events] == list(range(len(events)))
        assert store.stream_version(stream_id) == len(events) - 1
    return {str(stream_id): [n for _, n in events] for stream_id, events in found.items()}


def shards(store: EventStore) -> list[tuple[int, int]]:
    with store.pool.connection() as connection:
        return connection.execute("SELECT line_no, event_count FROM hindsight.imports ORDER BY shard").fetchall()


LINES = [line(n, f"s{n * n % 37}") for n in range(3000)]


@pytest.mark.essential
@pytest.mark.parametrize("jobs", [1, 2, 4, 10])
@pytest.mark.parametrize("chunk_size", [50, None])
def test_every_stream_keeps_its_order(store: EventStore, jobs: int, chunk_size: int | None) -> None:
    told: list[ImportProgress] = []
    report = store.import_events(LINES, import_id="a", jobs=jobs, chunk_size=chunk_size, progress=told.append)
    expected = defaultdict(list)
    for n in range(3000):
        expected[str(stream_uuid(f"s{n * n % 37}"))].append(n)
    assert by_stream(store) == expected
    events = list(store.read())
    assert (report.events, report.new_streams, report.lines) == (3000, len(expected), 3000)
    assert (report.first_cursor, report.last_cursor) == (events[0].cursor, events[-1].cursor)
    assert [each.events for each in told] == sorted(each.events for each in told)
    assert told[-1].events == 3000
    assert [line_no for line_no, _ in shards(store)] == [3000] * jobs
    assert sum(count for _, count in shards(store)) == 3000
    again = store.import_events(LINES, import_id="a", jobs=jobs)
    assert (again.events, again.skipped_events, again.lines, again.bytes) == (0, 3000, 0, 0)


@pytest.mark.parametrize(
    "source",
    [
        lambda folder: io.BytesIO(gzip.compress(b"\n".join(LINES))),
        lambda folder: iter(LINES),
        lambda folder: written(folder / "events.ndjson", b"\n".join(LINES)),
    ],
    ids=["gzip", "generator", "path"],
)
def test_every_kind_of_source_can_be_sharded(store: EventStore, source: Callable[[Path], Any], tmp_path: Path) -> None:
    assert store.import_events(source(tmp_path), import_id="a", jobs=3, chunk_size=100).events == 3000
    assert numbers(store.read()) == list(range(3000))


def written(path: Path, text: bytes) -> Path:
    path.write_bytes(text)
    return path


def test_a_resumed_import_needs_as_many_jobs(store: EventStore) -> None:
    store.import_events(LINES[:100], import_id="a", jobs=2)
    for jobs in (1, 3):
        for dry_run in (False, True):
            with pytest.raises(ImportFailed, match="begun with jobs=2: go on with as many"):
                store.import_events(LINES, import_id="a", jobs=jobs, dry_run=dry_run)
    assert len(shards(store)) == 2
    store.import_events(LINES, import_id="a", jobs=2)
    assert numbers(store.read()) == list(range(3000))


def held(database: str, stream: str) -> psycopg.Connection[Any]:
    """Somebody who holds a stream."""
    holder = psycopg.connect(database)
    holder.execute("SELECT hindsight.advance_heads_v1(ARRAY[%s::uuid], ARRAY[1::bigint])", (stream_uuid(stream),))
    return holder


def with_one_shard_ahead(store: EventStore, database: str, lines: Any, **options: Any) -> None:
    """Import until the second shard is done with some lines of which the first has none, and fail."""
    with held(database, FIRST) as holder:
        with pytest.raises(ImportFailed, match="stayed locked"):
            store.import_events(lines, import_id="a", jobs=2, chunk_size=1, **options)
        holder.rollback()
    (first, _), (second, _) = shards(store)
    assert first == 0
    assert second > 3


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hindsight_fast.import_writer.LOCK_PATIENCE_S", 0.1)
    hurried = LIMIT_CHUNK.replace("'2s'", "'100ms'")
    assert hurried != LIMIT_CHUNK
    monkeypatch.setattr("hindsight_fast.import_writer.LIMIT_CHUNK", hurried)


@pytest.mark.essential
@pytest.mark.usefixtures("no_patience")
def test_a_bad_line_between_two_checkpoints_is_set_aside_once(store: EventStore, database: str, tmp_path: Path) -> None:
    """Its stream's shard has passed it; the shard that notes bad lines has not."""
    bad = b'{"stream":"%s","type":"t","data":[]}' % SECOND.encode()
    lines = [line(0, FIRST), line(1, SECOND), bad, *(line(n, SECOND) for n in range(3, 100))]
    path = tmp_path / "bad"
    with_one_shard_ahead(store, database, lines, on_error=path)
    report = store.import_events(lines, import_id="a", jobs=2, chunk_size=1, on_error=path)
    assert path.read_bytes() == bad + b"\n"
    assert report.bad_lines == 1
    assert numbers(store.read()) == [0, 1, *range(3, 100)]


@pytest.mark.usefixtures("no_patience")
def test_a_bad_line_that_one_shard_has_passed_stops_who_sets_nothing_aside(
    store: EventStore, database: str, tmp_path: Path
) -> None:
    bad = b'{"stream":"%s","type":"t","data":[]}' % SECOND.encode()
    lines = [line(0, FIRST), line(1, SECOND), bad, *(line(n, SECOND) for n in range(3, 100))]
    with_one_shard_ahead(store, database, lines, on_error=tmp_path / "bad")
    with pytest.raises(ImportFailed, match="data must be") as caught:
        store.import_events(lines, import_id="a", jobs=2, chunk_size=1)
    assert caught.value.line_no == 3


@pytest.mark.usefixtures("no_patience")
def test_a_bad_line_that_was_set_aside_for_good_stops_nobody(store: EventStore, database: str, tmp_path: Path) -> None:
    lines = [line(0, SECOND), b"{", *(line(n, FIRST) for n in range(2, 100))]
    with held(database, SECOND) as holder:
        with pytest.raises(ImportFailed, match="stayed locked"):
            store.import_events(lines, import_id="a", jobs=2, chunk_size=1, on_error=tmp_path / "bad")
        holder.rollback()
    assert shards(store)[0][0] > shards(store)[1][0] == 0
    store.import_events(lines, import_id="a", jobs=2)
    assert (tmp_path / "bad").read_bytes() == b"{\n"
    assert numbers(store.read()) == [0, *range(2, 100)]


@pytest.mark.usefixtures("no_patience")
def test_a_resumed_import_gives_each_shard_what_it_lacks(store: EventStore, database: str) -> None:
    lines = [line(n, FIRST if n % 5 == 0 else SECOND) for n in range(200)]
    with_one_shard_ahead(store, database, lines)
    before = len(numbers(store.read()))
    report = store.import_events(lines, import_id="a", jobs=2, chunk_size=7)
    assert (report.events, report.skipped_events, report.lines) == (200 - before, before, 200)
    assert report.known_events == 0  # nothing was sent again
    assert list(by_stream(store).values()) in (
        [[n for n in range(200) if n % 5], list(range(0, 200, 5))],
        [list(range(0, 200, 5)), [n for n in range(200) if n % 5]],
    )


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize("changed_line", [0, 2, 50])
def test_a_change_before_any_shards_checkpoint_is_refused(store: EventStore, database: str, changed_line: int) -> None:
    lines = [line(0, FIRST), *(line(n, SECOND) for n in range(1, 100))]
    with_one_shard_ahead(store, database, lines)
    (_, _), (ahead, _) = shards(store)
    changed = [*lines]
    changed[changed_line] = line(777, SECOND)
    if changed_line < ahead:
        with pytest.raises(ImportFailed, match="bytes differ now"):
            store.import_events(changed, import_id="a", jobs=2, chunk_size=1000)
        with pytest.raises(ImportFailed, match="shorter now"):
            store.import_events(lines[: ahead - 1], import_id="a", jobs=2, chunk_size=1000)
        assert 0 not in numbers(store.read())
    store.import_events(lines, import_id="a", jobs=2)
    assert numbers(store.read()) == list(range(100))


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize("ending", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_a_source_that_grew_after_one_shard_had_come_to_its_end_is_gone_on_with(
    store: EventStore, database: str, ending: bytes
) -> None:
    """Its last line had no newline then."""
    lines = [line(0, FIRST), *(line(n, SECOND) for n in range(1, 8))]
    with_one_shard_ahead(store, database, io.BytesIO(ending.join(lines)))
    grown = [*lines, line(8, FIRST), line(9, SECOND)]
    store.import_events(io.BytesIO(ending.join(grown) + ending), import_id="a", jobs=2)
    assert numbers(store.read()) == list(range(10))


# What goes wrong


def test_a_failing_writer_ends_an_import_that_waits_for_its_source(store: EventStore) -> None:
    with store.pool.connection() as connection:
        connection.execute("ALTER TABLE hindsight.events ADD CONSTRAINT mine CHECK (event_name <> 't')")
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "wb", buffering=0) as pipe, os.fdopen(read_end, "rb") as source:
        pipe.write(line(0, FIRST) + b"\n" + line(1, FIRST) + b"\n")  # a chunk, and then nothing
        began = time.monotonic()
        ending = threading.Timer(60, pipe.close)  # what would end it, were the failure not noticed
        ending.start()
        with pytest.raises(ImportFailed, match="mine"):
            store.import_events(source, import_id="a", jobs=2, chunk_size=2)
        assert time.monotonic() - began < 50
        ending.cancel()
        pipe.close()  # closing the other end would wait for the thread that reads there
    assert store.head() is None


@pytest.mark.parametrize("leaving", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["progress", "source"])
def test_what_is_raised_ends_all_jobs_and_the_next_call_goes_on(
    store: EventStore, leaving: type[BaseException], where: str
) -> None:
    def lines() -> Iterator[bytes]:
        for n, each in enumerate(LINES):
            if where == "source" and n == 2500:
                raise leaving
            yield each

    def progress(done: ImportProgress) -> None:
        if where == "progress" and done.events > 500:
            raise leaving

    with pytest.raises(leaving):
        store.import_events(lines(), import_id="a", jobs=3, chunk_size=40, progress=progress)
    store.import_events(LINES, import_id="a", jobs=3)
    assert numbers(store.read()) == list(range(3000))
    assert store.pool.get_stats().get("connections_lost", 0) == 0


INTERRUPTED_PROGRAM = """
import sys
from hindsight_fast import EventStore
with EventStore(sys.argv[1]) as store:
    print("begun", flush=True)
    lines = [b'{"stream":"%s","type":"t","data":{}}' % stream for stream in (b"a", b"b") for _ in range(50)]
    store.import_events(lines, import_id="a", jobs=2, chunk_size=1)
"""


def test_an_interrupt_waits_for_no_lock(store: EventStore, database: str) -> None:
    with held(database, FIRST):
        process = subprocess.Popen(
            [sys.executable, "-c", INTERRUPTED_PROGRAM, database], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        with process:
            deadline = time.monotonic() + 30
            with psycopg.connect(database, autocommit=True) as watcher:
                while watcher.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchone() is None:
                    assert time.monotonic() < deadline
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        assert b"KeyboardInterrupt" in errors
        assert time.monotonic() - began < 40  # and not the minute for which a chunk is patient


def test_the_figures_of_a_failure_are_those_of_all_shards(store: EventStore, database: str, no_patience: None) -> None:
    lines = [line(0, FIRST), *(line(n, SECOND) for n in range(1, 100))]
    with held(database, FIRST), pytest.raises(ImportFailed) as caught:
        store.import_events(lines, import_id="a", jobs=2, chunk_size=1)
    assert caught.value.stored_lines == min(line_no for line_no, _ in shards(store)) == 0
    forbidden = [line(n, f"s{n}") for n in range(40)]
    forbidden[30] = b'{"stream":"s","type":"t","data":[]}'
    with pytest.raises(ImportFailed) as caught:
        store.import_events(forbidden, import_id="b", jobs=2, chunk_size=2)
    with store.pool.connection() as connection:
        row = connection.execute("SELECT min(line_no) FROM hindsight.imports WHERE import_id = 'b'").fetchone()
    assert row == (caught.value.stored_lines,)
    assert caught.value.line_no == 31


# Whose connections


@pytest.mark.parametrize("options", [{}, {"jobs": 3}, {"dry_run": True}, {"jobs": 2, "on_error": "bad"}])
def test_a_lent_pool_may_have_any_mode_and_row_factory(
    store: EventStore, database: str, tmp_path: Path, options: dict[str, Any]
) -> None:
    if "on_error" in options:
        options = {**options, "on_error": tmp_path / "bad"}
    brought = b'{"stream":"s","type":"t","data":{"n":1},"id":"018f3b1e-0000-7000-8000-0000000000aa"}'
    with ConnectionPool(
        database, kwargs={"autocommit": False, "row_factory": dict_row}, min_size=1, max_size=4, open=True
    ) as pool:
        with EventStore(pool=pool) as borrower:
            report = borrower.import_events([*LINES, brought, brought], import_id="a", chunk_size=500, **options)
        assert (report.events, report.known_events) == (3001, 1)
        with pool.connection() as connection:
            assert not connection.autocommit
            assert connection.execute("SELECT 1 AS one").fetchone() == {"one": 1}
    assert len(list(store.read())) == (0 if "dry_run" in options else 3001)


# How fast, and how much at a time


def test_the_rate_holds_for_all_jobs_together(store: EventStore) -> None:
    report = store.import_events(LINES[:160], import_id="a", jobs=4, max_rate=320, chunk_size=20)
    assert report.seconds >= 0.49  # the last chunk counts, though it may still wait to be stored
    assert report.events == 160


@pytest.mark.parametrize("rate", [float("inf"), float("nan"), -1, 0])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="max_rate"):
        EventStore("host=/nonexistent").import_events([], import_id="a", max_rate=rate)


def stored(events: int, seconds: float, *, known: int = 0, rejected: int = 0) -> Stored:
    return Stored(events, 0, known, rejected, None, seconds)


def test_a_shard_with_few_events_does_not_make_the_chunks_of_others_small() -> None:
    maker = SimpleNamespace(most_events=5000)
    run = _Run(ImportOptions("a", jobs=4), maker, SimpleNamespace(), Checkpoint.at_start(), 0)  # type: ignore[arg-type]
    run.take([stored(3, 0.01)])
    assert maker.most_events == 5000
    run.take([stored(3, 1.0)])
    assert maker.most_events < 5000
    maker.most_events = 5000
    run.take([stored(0, 1.0, rejected=5000)])  # all of them bad: that is slow work, too
    assert maker.most_events == 2500
    run.take([stored(0, 0.01, known=2500)])
    assert maker.most_events == 5000


def test_shards_share_the_memory(store: EventStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hindsight_fast.import_chunks.MOST_CHUNK_BYTES", 40_000)
    told: list[ImportProgress] = []
    # Sorted by stream, as an export of streams is: each shard's turn comes after the other's.
    lines = [json.dumps({"stream": f"s{n // 500}", "type": "t", "data": {"n": n}}).encode() for n in range(5000)]
    store.import_events(lines, import_id="a", jobs=4, chunk_size=10**6, progress=told.append)
    steps = [after.events - before.events for before, after in pairwise(told)]
    # An encoded event takes some 150 bytes; a share is 10,000 bytes, and a step of 1,000 lines more.
    assert max(steps) <= 1100
    assert numbers(store.read()) == list(range(5000))
