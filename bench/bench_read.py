"""Reading all events back, against fetching the very same pages with psycopg and decoding nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import NamedTuple

import orjson
import psycopg
import pytest
from psycopg import sql
from psycopg.types.json import set_json_loads

from contenders import ROUNDS, Contender, compare
from datasets import EVENTS, IMPORT_ID, DataSet
from expected import Row, digest_of
from hindsight_fast import Cursor, EventStore
from hindsight_fast.reading import FIRST_PAGE_ROWS, PAGE_ROWS
from hindsight_fast.statements import BEHIND_CURSOR, BELOW_BOUND, Statements

FETCHALL_EVENTS = min(EVENTS, 100_000)
TARGET_OF_FETCH = 0.5


class Readable(NamedTuple):
    """A store that holds all events of *data*, and a connection to its database each for plain and fast JSON."""

    store: EventStore
    data: DataSet
    plain: psycopg.Connection
    fast: psycopg.Connection


@pytest.fixture(scope="module", params=["demo", "git history"])
def readable(request, server, demo_data):
    """Vacuumed and checkpointed, so that no run pays for what the import left to do."""
    data = demo_data(EVENTS) if request.param == "demo" else request.getfixturevalue("git_history")
    name = f"reading {request.param}"
    with psycopg.connect(server.conninfo, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name)))
        conninfo = server.conninfo_for(name)
        with EventStore(conninfo) as store, psycopg.connect(conninfo, autocommit=True) as plain:
            store.create_schema()
            store.import_events(data.path, import_id=IMPORT_ID)
            plain.execute("VACUUM (FREEZE, ANALYZE)")
            plain.execute("CHECKPOINT")
            with psycopg.connect(conninfo, autocommit=True) as fast:
                set_json_loads(orjson.loads, fast)
                yield Readable(store, data, plain, fast)
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


class Pages:
    """The pages that the store fetches for itself, fetched by psycopg alone: same text, same sizes, same bound."""

    def __init__(self, connection: psycopg.Connection, count: int) -> None:
        self._connection = connection
        self._count = count
        statements = Statements("hindsight")
        self._barrier = statements.read_barrier
        self._text = {
            rows: statements.log_page([BEHIND_CURSOR, BELOW_BOUND], rows, page_bytes=None)
            for rows in (FIRST_PAGE_ROWS, PAGE_ROWS)
        }

    def __iter__(self) -> Iterator[psycopg.Cursor]:
        bound = psycopg.Cursor(self._connection).execute(self._barrier, (), binary=True).fetchone()
        assert bound is not None
        begin = Cursor.BEGINNING
        place = (begin.transaction_no, begin.sequence_no)
        size, fetched = FIRST_PAGE_ROWS, 0
        while fetched < self._count:
            cursor = psycopg.Cursor(self._connection)
            cursor.execute(self._text[size], (*place, *bound[:2]), binary=True, prepare=False)
            result = cursor.pgresult
            assert result is not None
            rows = result.ntuples
            if rows:
                yield cursor
                fetched += rows
                place = tuple(int.from_bytes(result.get_value(rows - 1, column), "big") for column in (0, 1))
            if rows < size:
                return
            size = PAGE_ROWS


def _count_events(store):
    return sum(len(batch) for batch in store.read_batches())


def _make_events(store):
    count = 0
    for batch in store.read_batches():
        for _ in batch:
            count += 1
    return count


def _read_payloads(store):
    count = 0
    for batch in store.read_batches():
        for event in batch:
            event.payload  # noqa: B018 - reading it decodes it
        count += len(batch)
    return count


def _fetch_undecoded(connection, count):
    return sum(cursor.pgresult.ntuples for cursor in Pages(connection, count))


def _fetch_tuples(connection):
    return sum(len(cursor.fetchall()) for cursor in Pages(connection, FETCHALL_EVENTS))


def _check_count(wanted):
    def check(count):
        assert count == wanted, f"{count} events instead of {wanted}"

    return check


def _verify_events(readable):
    def verify():
        rows = (
            Row(
                e.event_id, e.stream_id, e.stream_version, e.correlation_id, e.created_at, e.version, e.name, e.data,
                e.metadata_json,
            )
            for batch in readable.store.read_batches()
            for e in batch
        )  # fmt: skip
        assert digest_of(rows) == readable.data.digest, "other events are read"

    return verify


def _verify_payloads(readable):
    def verify():
        events = (event for batch in readable.store.read_batches() for event in batch)
        for event, row in zip(events, readable.data.rows(), strict=True):
            assert event.payload == json.loads(row.payload), "another payload"

    return verify


def _verify_undecoded(readable):
    def verify():
        count = 0
        rows = readable.data.rows()
        for cursor in Pages(readable.plain, readable.data.count):
            for row_no in range(cursor.pgresult.ntuples):
                row = next(rows)
                seen = (cursor.pgresult.get_value(row_no, 2), cursor.pgresult.get_value(row_no, 9))
                assert seen == (row.event_id.bytes, row.payload), "another row"
                count += 1
        assert count == readable.data.count, f"{count} rows"

    return verify


def _verify_tuples(connection, data):
    def verify():
        seen = (each for cursor in Pages(connection, FETCHALL_EVENTS) for each in cursor.fetchall())
        # The last page may reach behind the last event asked for.
        for row, each in zip(data.rows(FETCHALL_EVENTS), seen, strict=False):
            assert (each[2], each[9]) == (row.event_id, json.loads(row.payload)), "another row"

    return verify


def _undecoded(readable, target=None):
    count = readable.data.count
    return Contender(
        "psycopg, the same pages, nothing decoded", lambda: _fetch_undecoded(readable.plain, count), count,
        _check_count(count), _verify_undecoded(readable), target=target,
    )  # fmt: skip


def bench_read_untouched(benchmark, readable):
    store, data = readable.store, readable.data
    compare(
        benchmark,
        Contender("read_batches, batches counted", lambda: _count_events(store), data.count, _check_count(data.count),
                  _verify_events(readable)),
        Contender("read_batches, every event made, no payload", lambda: _make_events(store), data.count,
                  _check_count(data.count)),
        _undecoded(readable),
        rounds=ROUNDS,
        unit="events",
        checked="every turn: the count; once before: a digest of every column of every event (psycopg: event id and "
        "payload bytes of every row), against the oracle",
    )  # fmt: skip


def bench_read_payloads(benchmark, readable):
    store, data = readable.store, readable.data
    # A page may carry a few more than were asked for; the figures are of those fetched.
    fetched = _fetch_tuples(readable.fast)
    compare(
        benchmark,
        Contender("read_batches, .payload of every event", lambda: _read_payloads(store), data.count,
                  _check_count(data.count), _verify_payloads(readable)),
        _undecoded(readable, TARGET_OF_FETCH),
        Contender("psycopg fetchall() into tuples, json by the standard library",
                  lambda: _fetch_tuples(readable.plain), fetched, _check_count(fetched),
                  _verify_tuples(readable.plain, data)),
        Contender("psycopg fetchall() into tuples, json by orjson", lambda: _fetch_tuples(readable.fast), fetched,
                  _check_count(fetched), _verify_tuples(readable.fast, data)),
        rounds=ROUNDS,
        unit="events",
        checked="every turn: the count; once before: every payload against json.loads of the oracle's bytes (psycopg: "
        "also the event id)",
        note="a page is fetched ahead in a thread while the one before it is decoded, so two processors take part; "
        "fetching without decoding has nothing to overlap with",
    )  # fmt: skip
