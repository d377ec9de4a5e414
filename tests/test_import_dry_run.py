"""A dry run: it finds what an import would, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psycopg
import pytest

from hindsight_fast import EventStore, ImportFailed


def line(n: int, *, stream: str = "s", **fields: Any) -> bytes:
    return json.dumps({"stream": stream, "type": "t", "data": {"n": n}, **fields}).encode()


ID = "018f3b1e-0000-7000-8000-0000000000aa"
OTHER_ID = "018f3b1e-0000-7000-8000-0000000000bb"
NOON = "2024-01-01T12:00:00Z"


def traces(connection: psycopg.Connection[Any]) -> list[Any]:
    """All that an import changes, and whatever temporary table there is."""
    tables = ("events", "stream_heads", "imports", "projections", "store_meta", "append_gate")
    found: list[Any] = [connection.execute(f"SELECT * FROM hindsight.{table}").fetchall() for table in tables]
    found.append(connection.execute("SELECT last_value, is_called FROM hindsight.transaction_no").fetchall())
    found.append(connection.execute("SELECT relname FROM pg_class WHERE relname LIKE 'hindsight_dry%'").fetchall())
    return found


@pytest.mark.essential
@pytest.mark.parametrize("jobs", [1, 3])
def test_a_dry_run_leaves_not_a_row_nor_a_number_drawn(
    store: EventStore, connection: psycopg.Connection[Any], jobs: int
) -> None:
    store.import_events([line(0, id=ID)], import_id="before")
    before = traces(connection)
    lines = [line(0, id=ID), line(0, id=OTHER_ID), *(line(n, stream=f"s{n % 9}") for n in range(500))]
    report = store.import_events(lines, import_id="a", dry_run=True, jobs=jobs, chunk_size=50)
    assert (report.events, report.known_events, report.lines) == (501, 1, 502)
    assert (report.first_cursor, report.last_cursor, report.new_streams) == (None, None, 0)
    assert report.projected_seconds is not None
    assert 0 < report.projected_seconds < 60
    with pytest.raises(ImportFailed):
        store.import_events([*lines, b"{"], import_id="a", dry_run=True, jobs=jobs, chunk_size=50)
    assert traces(connection) == before
    done = store.import_events(lines, import_id="a", jobs=jobs, chunk_size=50)
    assert (done.events, done.known_events, done.projected_seconds) == (501, 1, None)


# What brings an import to a halt, or not: the lines, and how many of them go aside.
SOURCES: dict[str, list[bytes]] = {
    "all good": [line(n) for n in range(9)],
    "not JSON": [line(0), b"hello", line(1)],
    "data is a list": [line(0), line(1), b'{"stream":"s","type":"t","data":[1]}'],
    "refused by the server": [line(0), line(1, type="forbidden"), line(2)],
    "known, the same": [line(n, id=ID) if n == 4 else line(n) for n in range(9)],
    "known, with other data": [line(0), line(1, id=OTHER_ID)],
    "known, with another time": [line(0), line(0, id=OTHER_ID, time=NOON)],
    "twice the same": [line(0, id=ID), line(1), line(0, id=ID), line(2), line(0, id=ID)],
    "twice, with other data": [line(0, id=ID), line(1), line(2, id=ID), line(3)],
    "twice, in other streams": [line(0, id=ID), line(1), line(0, id=ID, stream="other")],
    "twice, with other metadata": [line(0, id=ID), line(1), line(0, id=ID, metadata={})],
    "twice, the second with a time": [line(0, id=ID), line(1), line(0, id=ID, time=NOON)],
    "twice, the first with a time": [line(0, id=ID, time=NOON), line(1), line(0, id=ID)],
    "twice, with other times": [line(0, id=ID, time=NOON), line(0, id=ID, time="2024-01-01T12:00:01Z")],
    "twice, at one time": [line(0, id=ID, time=NOON), line(0, id=ID, time="2024-01-01T13:00:00+01:00")],
    "twice, both refused": [line(0, id=ID, type="forbidden")] * 2 + [line(0, id=OTHER_ID)],
}


@pytest.fixture
def with_history(store: EventStore) -> EventStore:
    """A store that knows an id, and refuses a type of events."""
    store.import_events([line(0, id=OTHER_ID)], import_id="history")
    with store.pool.connection() as connection:
        connection.execute("ALTER TABLE hindsight.events ADD CONSTRAINT mine CHECK (event_name <> 'forbidden')")
    return store


@pytest.mark.essential
@pytest.mark.parametrize("chunk_size", [1, 2, None])
@pytest.mark.parametrize("kind", SOURCES)
def test_a_dry_run_refuses_what_an_import_refuses(with_history: EventStore, kind: str, chunk_size: int | None) -> None:
    def outcome(**options: Any) -> tuple[Any, ...]:
        try:
            report = with_history.import_events(SOURCES[kind], import_id="a", chunk_size=chunk_size, **options)
        except ImportFailed as failure:
            return failure.line_no, failure.byte_offset
        return report.events, report.known_events, report.lines

    assert outcome(dry_run=True) == outcome()


@pytest.mark.parametrize("kind", SOURCES)
def test_how_lines_fall_into_chunks_decides_nothing(with_history: EventStore, kind: str, tmp_path: Path) -> None:
    """Neither what goes aside nor what counts as known, by an import and by a dry run."""
    found = set()
    for chunk_size in (1, 2, 3, None):
        for dry_run in (True, False):
            name = f"{chunk_size} {dry_run}"
            # Each against the same history: what an import stored is known to the next one.
            with with_history.pool.connection() as connection:
                connection.execute("DELETE FROM hindsight.events WHERE event_id <> %s", (OTHER_ID,))
                connection.execute("UPDATE hindsight.stream_heads SET stream_version = 0")
            report = with_history.import_events(
                SOURCES[kind], import_id=name, chunk_size=chunk_size, on_error=tmp_path / name, dry_run=dry_run
            )
            aside = sorted((tmp_path / name).read_bytes().split(b"\n"))
            found.add((report.events, report.known_events, report.bad_lines, tuple(aside)))
    assert len(found) == 1


def test_a_dry_run_and_then_the_import_share_a_file_of_bad_lines(store: EventStore, tmp_path: Path) -> None:
    lines = [line(0), b"{", line(1), b"["]
    for dry_run in (True, True, False, True):
        store.import_events(lines, import_id="a", on_error=tmp_path / "bad", dry_run=dry_run)
        assert (tmp_path / "bad").read_bytes() == b"{\n[\n"


def test_a_dry_run_goes_on_where_the_import_stopped(store: EventStore) -> None:
    lines = [line(n) for n in range(100)]
    store.import_events(lines[:60], import_id="a")
    report = store.import_events(lines, import_id="a", dry_run=True)
    assert (report.events, report.skipped_events, report.lines) == (40, 60, 40)
    with pytest.raises(ImportFailed, match="bytes differ"):
        store.import_events([line(7), *lines[1:]], import_id="a", dry_run=True)


def test_columns_of_somebody_elses_have_their_defaults(store: EventStore) -> None:
    with store.pool.connection() as connection:
        connection.execute("ALTER TABLE hindsight.events ADD COLUMN tenant text NOT NULL DEFAULT 'none'")
        connection.execute("ALTER TABLE hindsight.events ADD COLUMN n json GENERATED ALWAYS AS (payload -> 'n') STORED")
    lines = [line(n) for n in range(9)]
    for dry_run in (True, False):
        assert store.import_events(lines, import_id="a", chunk_size=2, dry_run=dry_run).events == 9


def test_a_store_that_takes_no_appends_refuses_a_dry_run(store: EventStore) -> None:
    with store.pool.connection() as connection:
        connection.execute("UPDATE hindsight.store_meta SET state = 'closed for a test'")
    refusals = set()
    for dry_run in (True, False):
        with pytest.raises(Exception, match="closed for a test") as caught:
            store.import_events([line(0)], import_id="a", dry_run=dry_run)
        refusals.add(str(caught.value))
    assert len(refusals) == 1
