"""Rows as PostgreSQL sends them into events: one result, kept and decoded again and again, so no server is measured."""

from __future__ import annotations

import json

import msgspec
import orjson
import psycopg
import pytest
from psycopg import sql
from psycopg.types.json import set_json_loads

from contenders import ROUNDS, Contender, compare
from datasets import IMPORT_ID
from hindsight_fast import EventStore
from hindsight_fast._core import EVENT_COLUMNS, decode_result, decode_row
from hindsight_fast.results import events_of, result_reader
from plain_python import decode_row as twin_decode_row
from plain_python import decode_values, encode_row, in_utc

COUNT = 20_000
TWIN_COUNT = 2_000


@pytest.fixture(scope="module")
def rows(demo_data):
    return list(demo_data(COUNT).rows())


@pytest.fixture
def cursor(database, demo_data):
    """A cursor that holds all events, in binary format and the columns' order; it stands before the first."""
    with EventStore(database) as store:
        store.create_schema()
        store.import_events(demo_data(COUNT).path, import_id=IMPORT_ID)
        with store.pool.connection() as connection:
            columns = sql.SQL(", ").join(map(sql.Identifier, EVENT_COLUMNS))
            query = sql.SQL("SELECT {} FROM hindsight.events ORDER BY transaction_no, sequence_no").format(columns)
            yield psycopg.Cursor(connection).execute(query, binary=True)


def _check_events(rows):
    def check(events):
        assert len(events) == len(rows), f"{len(events)} events"
        for event, row in zip(events, rows, strict=True):
            seen = (
                event.event_id, event.stream_id, event.stream_version, event.correlation_id, event.created_at,
                event.version, event.name, event.data, event.metadata_json,
            )  # fmt: skip
            assert seen == row, "another event"

    return check


def _check_tuples(rows):
    def check(tuples):
        assert len(tuples) == len(rows), f"{len(tuples)} rows"
        for seen, row in zip(tuples, rows, strict=True):
            metadata = None if row.metadata is None else json.loads(row.metadata)
            expected = (
                row.event_id, row.stream_id, row.stream_version, row.created_at, row.event_version, row.correlation_id,
                row.event_name, json.loads(row.payload), metadata,
            )  # fmt: skip
            assert seen[2:] == expected, "another row"

    return check


def _check_payloads(rows):
    expected = [json.loads(row.payload) for row in rows]

    def check(payloads):
        assert payloads == expected, "other payloads"

    return check


def _fetch_all(cursor):
    cursor.scroll(0, mode="absolute")
    return cursor.fetchall()


def _by_twin(result, count):
    values = range(len(EVENT_COLUMNS))
    return [decode_values([result.get_value(row, column) for column in values]) for row in range(count)]


def _check_twins(rows):
    def check(events):
        assert len(events) == len(rows), f"{len(events)} events"
        for event, row in zip(events, rows, strict=True):
            assert all(getattr(in_utc(event), name) == value for name, value in row._asdict().items()), "another event"

    return check


def bench_result_to_events(benchmark, cursor, rows):
    result = cursor.pgresult
    compare(
        benchmark,
        Contender("decode_result: events, nothing of them read yet", lambda: list(events_of(result)), COUNT,
                  _check_events(rows)),
        Contender("decode_result through get_value (pure Python psycopg)",
                  lambda: decode_result(result), COUNT, _check_events(rows)),
        Contender("psycopg fetchall(), json by the standard library", lambda: _fetch_all(cursor), COUNT,
                  _check_tuples(rows)),
        Contender("plain twin, payload not parsed", lambda: _by_twin(result, TWIN_COUNT), TWIN_COUNT,
                  _check_twins(rows[:TWIN_COUNT])),
        rounds=2 * ROUNDS,
        unit="events",
        checked="every column of every event against the oracle",
        note="Fields are decoded when first asked for, so the first line is what an event costs that is passed over. "
        f"libpq read directly: {'yes' if result_reader() else 'no'}.",
    )  # fmt: skip


def bench_result_to_payloads(benchmark, cursor, rows):
    result = cursor.pgresult
    payloads = [row.payload for row in rows]
    fast = cursor.connection.cursor(binary=True)
    set_json_loads(orjson.loads, fast)
    fast.execute(cursor._query.query)
    decode = msgspec.json.Decoder().decode
    compare(
        benchmark,
        Contender("decode_result and every .payload", lambda: [event.payload for event in events_of(result)], COUNT,
                  _check_payloads(rows)),
        Contender("psycopg fetchall(), json by the standard library", lambda: _fetch_all(cursor), COUNT,
                  _check_tuples(rows)),
        Contender("psycopg fetchall(), json by orjson", lambda: _fetch_all(fast), COUNT, _check_tuples(rows)),
        Contender("floor: orjson.loads of the payloads alone", lambda: list(map(orjson.loads, payloads)), COUNT,
                  _check_payloads(rows)),
        Contender("floor: msgspec of the payloads alone", lambda: list(map(decode, payloads)), COUNT,
                  _check_payloads(rows)),
        rounds=2 * ROUNDS,
        unit="events",
        checked="every payload (fetchall: every column) against json.loads of the oracle's bytes",
    )  # fmt: skip


def bench_result_to_all_fields(benchmark, cursor, rows):
    result = cursor.pgresult

    def ours():
        return [
            (
                e.cursor, e.event_id, e.stream_id, e.stream_version, e.created_at, e.version, e.correlation_id,
                e.name, e.payload, e.metadata,
            )
            for e in events_of(result)
        ]  # fmt: skip

    def check_ours(tuples):
        _check_tuples(rows)([(None, *each) for each in tuples])

    compare(
        benchmark,
        Contender("decode_result and every attribute", ours, COUNT, check_ours),
        Contender("psycopg fetchall(), json by the standard library", lambda: _fetch_all(cursor), COUNT,
                  _check_tuples(rows)),
        rounds=2 * ROUNDS,
        unit="events",
        checked="every column of every event against the oracle",
    )  # fmt: skip


def bench_row_to_event(benchmark, cursor, rows):
    encoded = [encode_row(event) for event in _by_twin(cursor.pgresult, COUNT)]
    some = encoded[:TWIN_COUNT]
    compare(
        benchmark,
        Contender("decode_row", lambda: [decode_row(row) for row in encoded], COUNT,
                  _check_events(rows)),
        Contender("plain twin, payload not parsed", lambda: [twin_decode_row(row) for row in some], TWIN_COUNT,
                  _check_twins(rows[:TWIN_COUNT])),
        rounds=2 * ROUNDS,
        unit="events",
        checked="every column of every event against the oracle",
    )  # fmt: skip
