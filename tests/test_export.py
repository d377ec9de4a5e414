"""Exporting: what comes out goes back in as the same events, and a file that has its name is whole."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from psycopg import sql

from event_strategies import moments
from exports import exported
from hindsight_fast import Cursor, EventStore, ExportProgress, ImportFailed, MalformedRow, stream_uuid
from hindsight_fast.demo_events import demo_lines

SOAK = bool(os.environ.get("HINDSIGHT_SOAK"))


@pytest.fixture
def copy(database: str) -> Iterator[EventStore]:
    """A second, empty store: another schema of the same database."""
    with EventStore(database, schema="the copy") as copy:
        copy.create_schema()
        yield copy


# --- There and back -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A row of the table but for its cursor and its stream's version. JSON is text, as the server keeps it."""

    event_id: UUID
    stream_id: UUID
    correlation_id: UUID | None
    created_at: datetime
    event_name: str
    event_version: int
    payload: str
    metadata: str | None


def append_by_sql(store: EventStore, appends: list[list[Stored]]) -> None:
    """Store events past the importer's checks, as an append does: lock, number, insert, in one transaction each."""
    schema = sql.Identifier(store.schema)
    insert = sql.SQL("INSERT INTO {}.events VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)").format(schema)
    with psycopg.connect(store.conninfo, autocommit=True) as connection:
        for events in appends:
            with connection.transaction():
                streams = sorted({event.stream_id for event in events}, key=lambda stream: stream.bytes)
                counts = [sum(event.stream_id == stream for event in events) for stream in streams]
                begin = sql.SQL("SELECT transaction_no, head_versions FROM {}.begin_copy_v1(%s, %s::bigint[])")
                begun = connection.execute(begin.format(schema), (streams, counts)).fetchone()
                assert begun is not None
                number, heads = begun
                versions = {s: head - count + 1 for s, head, count in zip(streams, heads, counts, strict=True)}
                for sequence_no, event in enumerate(events):
                    connection.execute(
                        insert,
                        (
                            number, sequence_no, event.event_id, event.stream_id, versions[event.stream_id],
                            event.correlation_id, event.created_at, event.event_name, event.event_version,
                            event.payload, event.metadata,
                        ),
                    )  # fmt: skip
                    versions[event.stream_id] += 1


def contents(store: EventStore) -> list[tuple[Any, ...]]:
    """Every column but the cursor, in the order of the log, read without any code of ours."""
    with psycopg.connect(store.conninfo) as connection:
        return connection.execute(
            sql.SQL("""
                SELECT event_id, stream_id, stream_version, correlation_id, created_at::timestamptz, event_name,
                    event_version, payload::text, metadata::text
                FROM {}.events ORDER BY transaction_no, sequence_no
            """).format(sql.Identifier(store.schema))
        ).fetchall()


def empty(*stores: EventStore) -> None:
    for store in stores:
        with psycopg.connect(store.conninfo, autocommit=True) as connection:
            connection.execute(
                sql.SQL("TRUNCATE {0}.events, {0}.stream_heads, {0}.imports").format(sql.Identifier(store.schema))
            )


def on_one_line(json_text: str) -> str:
    """What a line can hold of stored JSON: no break between tokens, nothing around the value."""
    return json_text.strip(" \t\r\n").replace("\n", " ").replace("\r", " ")


spaces = st.text(" \t\r\n", max_size=3)
# What PostgreSQL takes inside a JSON string and somebody might stumble over: surrogate pairs and escapes that only look
# like them; NUL; what other formats take for line breaks.
letters = [
    r"\u0000", r"\uD83D\ude00", r"\\ud800", r"\"", r"\\", r"\/", r"\n", r"\u000A",
    "\x7f", "~", "^", "\u2028", "\x85", "\ufeff", "ß", "😀", "a", "u", "d800", "/", "{",
]  # fmt: skip
strings = st.lists(st.sampled_from(letters), max_size=6).map(lambda parts: '"' + "".join(parts) + '"')
numbers = st.sampled_from(["0", "-0", "1e400", "-1.50E+05", "123456789012345678901234567890", "0.1", "1e-7"])


def spaced(value: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(spaces, value, spaces).map("".join)


def lists_of(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(spaced(values), max_size=4).map(lambda items: "[" + ",".join(items) + "]")


def objects_of(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    # A key may be there twice.
    members = st.tuples(spaced(strings), spaced(values)).map(":".join)
    return st.lists(members, max_size=4).map(lambda items: "{" + ",".join(items) + "}")


scalars = strings | numbers | st.sampled_from(["true", "false", "null"])
values = st.recursive(scalars, lambda inner: lists_of(inner) | objects_of(inner), max_leaves=6)
objects = spaced(objects_of(values))
few_streams = st.sampled_from([UUID(int=0), UUID(int=2**128 - 1), stream_uuid("a"), stream_uuid("b")])
names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12) | (
    st.text('"\\/\x01\x1f\x7f\n\r\t\u2028ß😀', min_size=1, max_size=6)
)
stored_events = st.builds(
    Stored,
    event_id=st.uuids(),
    stream_id=few_streams | st.uuids(),
    correlation_id=st.none() | st.uuids(),
    created_at=moments,
    event_name=names,
    event_version=st.integers(0, 3) | st.integers(0, 2**31 - 1),
    payload=objects,
    metadata=st.none() | spaced(st.just("null")) | objects,
)
PLAIN = Stored(UUID(int=1), UUID(int=2), None, datetime.fromisoformat("2024-01-01T00:00:00Z"), "t", 0, "{}", None)
ODD = Stored(
    UUID(int=3),
    UUID(int=2),
    UUID(int=0),
    datetime.fromisoformat("0001-01-01T00:00:00.000001Z"),
    '"\\\n\x01',
    2**31 - 1,
    '\r\n{ "\\u0000" :\r\n[ 1e400, "~\x7f\\ud83d\\ude00\\\\ud800" ] }\t',
    ' {\n"\\\\ud800":"\\u0000"}',
)


@pytest.mark.essential
@settings(
    max_examples=600 if SOAK else 25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(appends=st.lists(st.lists(stored_events, min_size=1, max_size=6), max_size=5), chunk_size=st.integers(1, 12))
@example([[PLAIN, ODD]], 1)
def test_what_is_exported_imports_as_the_same_events(
    store: EventStore, copy: EventStore, appends: list[list[Stored]], chunk_size: int
) -> None:
    events = [event for append in appends for event in append]
    assume(len({event.event_id for event in events}) == len(events))
    empty(store, copy)
    append_by_sql(store, appends)

    text = exported(store)
    report = copy.import_events(io.BytesIO(text), import_id="the copy", chunk_size=chunk_size)
    assert report.events == len(events)

    expected = []
    for row, event in zip(contents(store), events, strict=True):
        *columns, payload, metadata = row
        assert (payload, metadata) == (event.payload, event.metadata)
        null = metadata is None or on_one_line(metadata) == "null"
        expected.append((*columns, on_one_line(payload), None if null else on_one_line(metadata)))
    assert contents(copy) == expected
    # And once more: nothing is left to change.
    assert exported(copy) == text
    for stream in {event.stream_id for event in events}:
        assert copy.stream_version(stream) == store.stream_version(stream)


def test_bytes_that_need_no_change_get_none(store: EventStore, copy: EventStore) -> None:
    payload = '{ "a" :\t[1.50, -0, 1e400, "\\u00e9\\/", "\x7f\u2028"], "a": {} }'
    append_by_sql(store, [[Stored(**{**vars(PLAIN), "payload": payload, "metadata": '{"b":  1}'})]])
    assert b'"data":' + payload.encode() + b"," in exported(store)
    copy.import_events(io.BytesIO(exported(store)), import_id="a")
    assert contents(copy) == contents(store)
    assert next(copy.read()).data == next(store.read()).data == payload.encode()


def test_real_bodies_survive_the_way_there_and_back(
    store: EventStore, copy: EventStore, real_data: Callable[[str], Path], tmp_path: Path
) -> None:
    store.import_events(real_data("github-webhooks.ndjson.gz"), import_id="webhooks")
    assert store.export_events(tmp_path / "all.ndjson.gz") == 329
    copy.import_events(tmp_path / "all.ndjson.gz", import_id="back")
    assert contents(copy) == contents(store)


@pytest.mark.parametrize("moment", ["infinity", "-infinity", "0001-01-01 BC", "10000-01-01"])
def test_a_time_that_no_line_can_hold_is_an_error_and_leaves_no_file(
    store: EventStore, tmp_path: Path, moment: str
) -> None:
    append_by_sql(store, [[PLAIN]])
    with psycopg.connect(store.conninfo) as connection:
        connection.execute("UPDATE hindsight.events SET created_at = %s", (moment,))
    with pytest.raises(MalformedRow, match="years 1 to 9999"):
        store.export_events(tmp_path / "all.ndjson")
    assert list(tmp_path.iterdir()) == []


def test_half_a_surrogate_pair_goes_out_and_is_named_on_the_way_in(store: EventStore, copy: EventStore) -> None:
    """Nothing of this library stores one, because no reader could decode it; PostgreSQL would."""
    append_by_sql(store, [[PLAIN, Stored(**{**vars(ODD), "payload": '{"a":"\\ud800"}'})]])
    text = exported(store)
    assert b'"data":{"a":"\\ud800"}' in text
    with pytest.raises(ImportFailed, match=r"surrogate|hex escape") as caught:
        copy.import_events(io.BytesIO(text), import_id="a")
    assert caught.value.line_no == 2


# --- Which events ---------------------------------------------------------------------------------------------------


@pytest.fixture
def narrow_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages and scans of a few rows, so that 600 events take many."""
    monkeypatch.setattr("hindsight_fast.reading.FIRST_PAGE_ROWS", 5)
    monkeypatch.setattr("hindsight_fast.reading.SCAN_ROWS", 40)
    monkeypatch.setattr("hindsight_fast.reading.PAGE_BYTES", 4_000)


@settings(
    max_examples=1_500 if SOAK else 60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(choose=st.randoms(use_true_random=False))
def test_a_selection_is_what_filtering_by_hand_gives(
    shop: EventStore, narrow_pages: None, choose: random.Random
) -> None:
    events = list(shop.read())
    lines = exported(shop).splitlines(keepends=True)
    places = [Cursor.BEGINNING, *(event.cursor for event in events), Cursor(0, 7), Cursor(2**63 - 1, 2**31 - 1)]
    some = choose.choice(events)
    selection = {
        "after": choose.choice([Cursor.BEGINNING, choose.choice(places)]),
        "until": choose.choice([None, choose.choice(places)]),
        "event_types": choose.choice([None, [some.name], ["order_paid", "nothing"], []]),
        "stream_id": choose.choice([None, some.stream_id, stream_uuid("ledger-USD"), stream_uuid("nobody's")]),
        "correlation_id": choose.choice([None, None, some.correlation_id, uuid4()]),
        "limit": choose.choice([None, None, 0, 1, 17, 10_000]),
    }
    wanted = [
        line
        for event, line in zip(events, lines, strict=True)
        if event.cursor > selection["after"]
        and (selection["until"] is None or event.cursor <= selection["until"])
        and (selection["event_types"] is None or event.name in selection["event_types"])
        and (selection["stream_id"] is None or event.stream_id == selection["stream_id"])
        and (selection["correlation_id"] is None or event.correlation_id == selection["correlation_id"])
    ]
    assert exported(shop, **selection) == b"".join(wanted[: selection["limit"]])


def test_one_range_after_the_other_gives_the_whole(shop: EventStore) -> None:
    whole, at, parts = exported(shop), Cursor.BEGINNING, []
    told: list[ExportProgress] = []
    while part := exported(shop, after=at, limit=70, progress=told.append):
        parts.append(part)
        assert told[-1].cursor is not None
        at = told[-1].cursor
    assert len(parts) == 9
    assert b"".join(parts) == whole


def test_it_ends_at_the_head_as_of_the_beginning(shop: EventStore) -> None:
    def append(_: ExportProgress) -> None:
        shop.import_events([b'{"stream":"late","type":"t","data":{}}'], import_id=str(uuid4()))

    assert exported(shop, progress=append).count(b"\n") == 600
    assert shop.stream_version(stream_uuid("late")) is not None


@pytest.mark.parametrize(
    ("selection", "error"),
    [
        ({"after": "1:0"}, TypeError),
        ({"after": None}, TypeError),
        ({"until": "1:0"}, TypeError),
        ({"event_types": "order_paid"}, TypeError),
        ({"event_types": ["a\0b"]}, ValueError),
        ({"stream_id": "s"}, TypeError),
        ({"correlation_id": "c"}, TypeError),
        ({"limit": -1}, ValueError),
        ({"limit": True}, TypeError),
    ],
)
def test_wrong_selections_are_refused_before_a_file_is_made(
    store: EventStore, tmp_path: Path, selection: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        store.export_events(tmp_path / "all.ndjson", **selection)
    assert list(tmp_path.iterdir()) == []


# --- What it takes --------------------------------------------------------------------------------------------------


def test_no_connection_and_no_snapshot_is_held_while_lines_are_written(database: str) -> None:
    with EventStore(database, pool_size=1) as store:
        store.create_schema()
        store.import_events(demo_lines(3_000), import_id="many")
        watched = 0

        def watch(_: ExportProgress) -> None:
            nonlocal watched
            watched += 1
            assert store.head() is not None  # over the only connection
            with psycopg.connect(database) as connection:
                deadline = time.monotonic() + 20
                query = "SELECT 1 FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND backend_xmin IS NOT NULL"
                query += " AND datname = current_database() AND backend_type = 'client backend'"
                # A page read ahead may be on its way.
                while connection.execute(query).fetchone() is not None:
                    connection.rollback()
                    assert time.monotonic() < deadline
                    time.sleep(0.005)

        assert exported(store, progress=watch).count(b"\n") == 3_000
        assert watched > 1


MEMORY_PROGRAM = """
import sys
from hindsight_fast import EventStore
with EventStore(sys.argv[1]) as store:
    assert store.export_events(sys.argv[2], limit=int(sys.argv[3])) == int(sys.argv[3])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize("name", ["all.ndjson", "all.ndjson.gz"])
def test_memory_is_flat(store: EventStore, database: str, tmp_path: Path, name: str) -> None:
    line = b'{"stream":"stream-%d","type":"t","data":{"n":%d,"filler":"' + b"x" * 150 + b'"}}'
    store.import_events((line % (n % 5000, n) for n in range(120_000)), import_id="many")

    def peak_kib(count: int) -> int:
        path = tmp_path / f"{count}-{name}"
        done = subprocess.run(
            [sys.executable, "-c", MEMORY_PROGRAM, database, str(path), str(count)],
            capture_output=True, timeout=300, check=True,
        )  # fmt: skip
        return int(done.stdout)

    small, large = peak_kib(20_000), peak_kib(120_000)
    print(f"peak memory: {small} KiB for 20,000 events, {large} KiB for 120,000")
    # 12 MiB: less than half of the lines that 100,000 more events make, of 270 bytes each. Between two runs of one size
    # it differs by up to 4.
    assert large < small + 12 * 1024


def test_progress_tells_what_is_written(shop: EventStore) -> None:
    told: list[ExportProgress] = []
    text = exported(shop, progress=told.append)
    assert [each.events for each in told] == sorted({each.events for each in told})
    assert (told[-1].events, told[-1].bytes, told[-1].cursor) == (600, len(text), shop.head())
    assert json.loads(text.splitlines()[told[0].events - 1])["id"]
