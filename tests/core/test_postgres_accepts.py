"""What the encoder writes, a real PostgreSQL stores; what it answers, the decoder reads: under every psycopg.

Encoder and decoder could share one mistake, so the stored values are also compared as the text that psql would show.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import plain_python
from compiled_core import event_counts, head_array, no_payload, rows_of, seen
from event_strategies import FIRST_MOMENT, LAST_MOMENT, moments, new_events
from hindsight_fast._core import COPY_HEADER, EVENT_COLUMNS, decode_result, decode_row
from hindsight_fast.errors import MalformedRow
from hindsight_fast.results import result_reader
from leaks import kept_bytes
from plain_python import PlainNewEvent

COLUMNS = ", ".join(EVENT_COLUMNS)
SELECT = f"SELECT {COLUMNS} FROM events ORDER BY transaction_no, sequence_no"
NOW = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)

CREATE_TABLE = """
    CREATE TABLE events (
        transaction_no bigint, sequence_no int, event_id uuid, stream_id uuid, stream_version bigint,
        correlation_id uuid, created_at timestamptz, event_name text COLLATE "C", event_version int,
        payload json, metadata json
    )
"""
# Each value as text, by PostgreSQL's own output functions.
SELECT_TEXT = """
    SELECT transaction_no::text, sequence_no::text, event_id::text, stream_id::text, stream_version::text,
        to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US'), event_version::text,
        correlation_id::text, event_name, payload::text, metadata::text
    FROM events ORDER BY transaction_no, sequence_no
"""

# Text that PostgreSQL's json takes; escapes, blanks and digits are to come back as they went in.
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
json_bytes = st.builds(
    lambda value, indent, blank, ascii_only: (
        blank + json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass") + blank
    ),
    json_values,
    st.sampled_from([None, 0, 2]),
    st.sampled_from([b"", b" ", b"\r\n\t"]),
    st.booleans(),
).filter(lambda text: text < b"\xed\xa0" or is_utf8(text))
json_events = st.builds(replace, new_events, payload=json_bytes, metadata=st.none() | json_bytes)


def is_utf8(text):
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def json_event(payload, **changes):
    return PlainNewEvent(UUID(int=1), UUID(int=2), "näme", 1, payload, metadata=payload, **changes)


@pytest.fixture
def table(connection):
    """A connection to a database with an empty table of events."""
    connection.execute(CREATE_TABLE)
    return connection


def store(connection, rows, block_size=128 * 1024):
    with connection.cursor() as cursor, cursor.copy(f"COPY events ({COLUMNS}) FROM STDIN (FORMAT BINARY)") as copy:
        for block in rows.blocks(block_size):
            copy.write(block)


def binary_result(connection, query):
    with connection.cursor(binary=True) as cursor:
        return cursor.execute(query).pgresult


def both_ways(result):
    """The events of a result read with the reader and without, which must be the same."""
    through_values = decode_result(result, no_payload)
    through_libpq = decode_result(result, no_payload, result_reader())
    assert [seen(event) for event in through_libpq] == [seen(event) for event in through_values]
    assert through_libpq == through_values
    return [seen(event) for event in through_libpq]


def as_text(event):
    created_at = event.created_at.astimezone(UTC).replace(tzinfo=None)
    return (
        str(event.transaction_no),
        str(event.sequence_no),
        str(event.event_id),
        str(event.stream_id),
        str(event.stream_version),
        created_at.isoformat(timespec="microseconds"),
        str(event.event_version),
        None if event.correlation_id is None else str(event.correlation_id),
        event.event_name,
        event.payload.decode(),
        None if event.metadata is None else event.metadata.decode(),
    )


def test_there_is_a_reader_wherever_there_is_a_libpq():
    # Otherwise the tests below would compare the slow way with itself.
    assert (result_reader() is None) == (psycopg.pq.__impl__ == "python")


@pytest.mark.essential
# The table is emptied before each example.
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.lists(json_events, min_size=1, max_size=8),
    st.integers(0, 2**63 - 1),
    st.integers(-1, 2**63 - 20),
    moments,
    st.integers(1, 2000),
)
@example([json_event(b'"\\u0000 \\ud800 \\udc00"')], 0, -1, NOW, 1)
@example([json_event(b' {"a": 1e400, "a": -0.0, "b": 123456789012345678901234567890} ')], 2**63 - 1, -1, NOW, 7)
@example([json_event(b"{}", created_at=FIRST_MOMENT), json_event(b"[]", created_at=LAST_MOMENT)], 1, 2**63 - 3, NOW, 64)
@example([json_event(b"1")], 1, -1, FIRST_MOMENT, 64)
@example([json_event(b"1")], 1, -1, LAST_MOMENT, 64)
@example([json_event(b"1", created_at=datetime(1999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC))], 1, -1, NOW, 64)
def test_what_goes_in_comes_out(table, events, transaction_no, version_before, now, block_size):
    table.execute("TRUNCATE events")
    heads = {stream_id: version_before + count for stream_id, count in event_counts(events).items()}
    expected = plain_python.place(events, transaction_no, heads, now)
    rows = rows_of(events)
    rows.place(transaction_no, head_array(events, heads), now)

    store(table, rows, block_size)

    assert both_ways(binary_result(table, SELECT)) == [plain_python.in_utc(event) for event in expected]
    assert table.execute(SELECT_TEXT).fetchall() == [as_text(event) for event in expected]


@pytest.mark.essential
def test_what_postgresql_copies_out_is_what_was_copied_in(table):
    rows = rows_of([json_event(b"{}"), json_event(b"[1]", correlation_id=UUID(int=7))])
    rows.place(812, plain_python.encode_bigint_array([1]), NOW)
    store(table, rows)
    with table.cursor() as cursor, cursor.copy(f"COPY ({SELECT}) TO STDOUT (FORMAT BINARY)") as copy:
        sent = b"".join(copy)
    assert sent == b"".join(rows.blocks())
    assert sent.startswith(COPY_HEADER)
    assert [decode_row(rows.row(n), no_payload).stream_version for n in (0, 1)] == [0, 1]


@pytest.mark.essential
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=30)
@given(st.lists(new_events, max_size=10))
@example([])
def test_postgresql_reads_the_arrays_and_answers_in_kind(connection, events):
    rows = rows_of(events)
    counts = event_counts(events)
    ids, numbers = rows.stream_arrays()
    query = b"""
        SELECT array_agg(stream_id ORDER BY place)::text, array_agg(event_count ORDER BY place)::text,
            array_agg(event_count + 99 ORDER BY stream_id)
        FROM unnest($1::uuid[], $2::bigint[]) WITH ORDINALITY AS given (stream_id, event_count, place)
    """
    result = connection.pgconn.exec_params(query, [ids, numbers], param_formats=[1, 1], result_format=1)
    assert result.error_message == b""
    if not events:
        assert [result.get_value(0, column) for column in range(3)] == [None, None, None]
        return
    assert result.get_value(0, 0).decode() == "{" + ",".join(map(str, counts)) + "}"
    assert result.get_value(0, 1).decode() == "{" + ",".join(map(str, counts.values())) + "}"

    # The answer is ordered by PostgreSQL's idea of uuid order, and placed by ours.
    rows.place(5, result.get_value(0, 2), NOW)
    expected = plain_python.place(events, 5, {stream_id: n + 99 for stream_id, n in counts.items()}, NOW)
    assert [rows.row(n) for n in range(len(rows))] == [plain_python.encode_row(event) for event in expected]


def test_an_answer_with_another_lower_bound_or_a_null_is_understood_or_refused(connection):
    rows = rows_of([json_event(b"{}")])
    shifted = connection.cursor(binary=True).execute("SELECT '[5:5]={41}'::bigint[]").pgresult.get_value(0, 0)
    rows.place(1, shifted, NOW)
    assert decode_row(rows.row(0), no_payload).stream_version == 41
    for other in (
        "'{NULL}'::bigint[]",
        "'{1}'::int[]",
        "'{}'::bigint[]",
        "'{{1}}'::bigint[]",
        "'{1,2}'::bigint[]",
        "1",
    ):
        answer = connection.cursor(binary=True).execute(f"SELECT {other}").pgresult.get_value(0, 0)
        with pytest.raises(MalformedRow):
            rows.place(1, answer, NOW)


# --- Results that hold no events ------------------------------------------------------------------------------------

GOOD_VALUES = {
    "transaction_no": "1::bigint",
    "sequence_no": "2::int",
    "event_id": "'00000000-0000-0000-0000-000000000001'::uuid",
    "stream_id": "'00000000-0000-0000-0000-000000000002'::uuid",
    "stream_version": "3::bigint",
    "created_at": "'2024-05-06 07:08:09.123456Z'::timestamptz",
    "event_version": "4::int",
    "correlation_id": "NULL::uuid",
    "event_name": "'name'::text",
    "payload": "'{}'::json",
    "metadata": "NULL::json",
}


def select_with(**changes):
    return "SELECT " + ", ".join({**GOOD_VALUES, **changes}.values())


def assert_malformed(result):
    for reader in (None, result_reader()):
        with pytest.raises(MalformedRow):
            decode_result(result, no_payload, reader)


def test_the_good_values_are_good(connection):
    (event,) = both_ways(binary_result(connection, select_with()))
    assert (event.transaction_no, event.sequence_no, event.stream_version, event.event_version) == (1, 2, 3, 4)
    (event,) = both_ways(binary_result(connection, select_with(event_name="''", payload="''", metadata="''")))
    assert (event.event_name, event.payload, event.metadata) == ("", b"", b"")  # empty is not NULL


@pytest.mark.parametrize(
    ("column", "wrong"),
    [
        *[(column, "NULL") for column in GOOD_VALUES if column not in ("correlation_id", "metadata")],
        *[(column, "7::int") for column in ("transaction_no", "stream_version", "event_id", "created_at")],
        *[(column, "7::bigint") for column in ("sequence_no", "event_version", "stream_id", "correlation_id")],
        *[(column, "7::smallint") for column in ("transaction_no", "sequence_no", "event_version")],
        *[(column, "''::bytea") for column in list(GOOD_VALUES)[:8]],
        *[(column, "'12345678901234567'::bytea") for column in list(GOOD_VALUES)[:8]],
        ("transaction_no", "'x'::text"),
        ("correlation_id", "'00000000-0000-0000-0000-000000000001'::text"),
        ("transaction_no", "(-1)::bigint"),
        ("sequence_no", "(-1)::int"),
        ("created_at", "'infinity'::timestamptz"),
        ("created_at", "'-infinity'::timestamptz"),
        ("created_at", "'10000-01-01 00:00:00Z'::timestamptz"),
        ("created_at", "'0001-12-31 23:59:59.999999Z BC'::timestamptz"),
        ("event_name", r"'\xff'::bytea"),
        ("event_id", "repeat('x', 100000)"),
    ],
)
def test_values_of_another_kind_are_malformed(connection, column, wrong):
    good_first = f"{select_with()} UNION ALL {select_with()}" if wrong == "NULL" else select_with()
    assert len(both_ways(binary_result(connection, good_first))) >= 1
    assert_malformed(binary_result(connection, select_with(**{column: wrong})))


@pytest.mark.parametrize("query", ["SELECT", "SELECT 1", f"{select_with()}, 1", "SET work_mem = '4MB'", ""])
def test_a_result_of_another_shape_is_malformed(connection, query):
    assert_malformed(binary_result(connection, query))


def test_a_result_in_text_format_is_malformed(table):
    assert_malformed(table.execute(select_with()).pgresult)
    assert_malformed(table.execute(SELECT).pgresult)  # even with no rows: the next one would have some


def test_an_error_is_no_result(connection):
    assert_malformed(connection.pgconn.exec_params(b"SELECT 1/0", [], result_format=1))


def test_no_rows_are_no_events(table):
    assert both_ways(binary_result(table, SELECT)) == []


def test_a_cleared_result_is_refused(connection):
    for reader in (None, result_reader()):
        result = binary_result(connection, select_with())
        result.clear()
        with pytest.raises(ValueError, match=r"cleared|11 columns"):
            decode_result(result, no_payload, reader)


def test_a_result_that_libpq_did_not_make_is_refused():
    reader = result_reader()
    if reader is not None:
        with pytest.raises(AttributeError):
            decode_result(object(), no_payload, reader)


def test_events_outlive_their_result(connection):
    query = f"{select_with(payload='json_build_array(n)', event_name='n::text')} FROM generate_series(1, 5000) n"
    result = binary_result(connection, query)
    decoded = decode_result(result, no_payload, result_reader())
    result.clear()
    del result
    connection.execute("SELECT repeat('x', 10000000)")  # into the memory that was given back
    assert [(event.name, event.data) for event in decoded] == [(f"{n}", b"[%d]" % n) for n in range(1, 5001)]


def test_reading_results_keeps_no_memory_not_even_when_it_fails(connection):
    good = binary_result(connection, f"{select_with()} FROM generate_series(1, 5)")
    bad_in_row_5 = binary_result(connection, f"{select_with(sequence_no='3 - n')} FROM generate_series(1, 5) n")
    assert_malformed(bad_in_row_5)

    def read():
        for reader in (None, result_reader()):
            decode_result(good, no_payload, reader)
            with pytest.raises(MalformedRow):
                decode_result(bad_in_row_5, no_payload, reader)

    assert kept_bytes(read) == 0


# --- Every psycopg --------------------------------------------------------------------------------------------------


def read_all(conninfo):
    with psycopg.connect(conninfo) as connection:
        return [psycopg.pq.__impl__, *both_ways(binary_result(connection, SELECT))]


@pytest.mark.parametrize("implementation", ["c", "binary", "python"])
def test_every_implementation_of_psycopg_reads_the_same(table, database, implementation):
    # Each in a process of its own: an implementation is chosen once, at import.
    events = [json_event(b'{"n": %d}' % n, correlation_id=UUID(int=n) if n % 2 else None) for n in range(20)]
    rows = rows_of(events)
    rows.place(3, plain_python.encode_bigint_array([19]), NOW)
    store(table, rows)
    expected = [implementation, *plain_python.place(events, 3, {UUID(int=2): 19}, NOW)]
    environment = {**os.environ, "PSYCOPG_IMPL": implementation, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, database]
    done = subprocess.run(command, env=environment, check=True, timeout=60, stdout=subprocess.PIPE, text=True)
    assert done.stdout.splitlines() == [repr(line) for line in expected]


if __name__ == "__main__":
    test_there_is_a_reader_wherever_there_is_a_libpq()
    for line in read_all(sys.argv[1]):
        print(repr(line))
