"""Reading: order, pages, filters, and the bound below which nothing can appear any more."""

from __future__ import annotations

import json
import random
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg_pool import ConnectionPool

from hindsight_fast import Cursor, EventParseError, EventStore, RecordedEvent, SchemaError, reading, stream_uuid
from hindsight_fast.embedded import EmbeddedServer

NAMES = ["placed", "paid", "shipped"]
CAUSES = [uuid.UUID(int=n + 1) for n in range(3)]


def line(n: int, stream: str = "s", name: str = "placed", cause: uuid.UUID | None = None) -> bytes:
    fields: dict[str, Any] = {"stream": stream, "type": name, "data": {"n": n}}
    if cause is not None:
        fields["correlation_id"] = str(cause)
    return json.dumps(fields).encode()


def numbers(events: Iterator[RecordedEvent]) -> list[int]:
    return [event.payload["n"] for event in events]


@pytest.fixture
def store(store_class: type[EventStore], database: str) -> Iterator[EventStore]:
    """An open, empty store of either kind: what is read, refused and waited for must be the same."""
    with store_class(database) as store:
        store.create_schema()
        yield store


@pytest.fixture
def mixed(store: EventStore) -> EventStore:
    """600 events in 7 streams, of 3 names, a third of them correlated, in chunks of 50."""
    lines = [line(n, f"s{n * n % 7}", NAMES[n % 3], CAUSES[n % 3] if n % 2 else None) for n in range(600)]
    store.import_events(lines, import_id="mixed", chunk_size=50)
    return store


@pytest.mark.essential
def test_an_empty_store_has_nothing(store: EventStore) -> None:
    assert store.head() is None
    assert list(store.read()) == []
    assert list(store.read_batches()) == []
    assert list(store.read_stream(uuid.uuid4())) == []
    assert store.stream_version(uuid.uuid4()) is None


@pytest.mark.essential
@pytest.mark.parametrize("scan_rows", [1, 7, 20_000])
def test_every_filter_gives_what_filtering_by_hand_gives(
    mixed: EventStore, monkeypatch: pytest.MonkeyPatch, scan_rows: int
) -> None:
    monkeypatch.setattr(reading, "SCAN_ROWS", scan_rows)
    everything = list(mixed.read())
    assert numbers(iter(everything)) == list(range(600))
    assert everything == sorted(everything, key=lambda event: event.cursor)
    streams = [None, stream_uuid("s1"), stream_uuid("s4"), uuid.uuid4()]
    starts = [Cursor.BEGINNING, everything[0].cursor, everything[333].cursor, everything[-1].cursor]
    if scan_rows == 1:
        # A question for each row: of the whole log once, of its end in all ways.
        starts = [everything[540].cursor, everything[-1].cursor]
        assert list(mixed.read(event_types=["paid"])) == [event for event in everything if event.name == "paid"]
    for after in starts:
        for names in (None, [], ["paid"], ["paid", "shipped"], ["unheard"]):
            for stream in streams:
                for cause in (None, CAUSES[0], uuid.uuid4()):
                    expected = [
                        event
                        for event in everything
                        if event.cursor > after
                        and (names is None or event.name in names)
                        and (stream is None or event.stream_id == stream)
                        and (cause is None or event.correlation_id == cause)
                    ]
                    found = mixed.read(after=after, event_types=names, stream_id=stream, correlation_id=cause)
                    assert list(found) == expected
    mixed_limit = list(mixed.read(event_types=["paid"], limit=10))
    assert mixed_limit == [event for event in everything if event.name == "paid"][:10]


def test_batches_and_single_events_are_the_same(mixed: EventStore) -> None:
    everything = list(mixed.read())
    for batch_size in (1, 13, 599, 600, 601, 5000):
        batches = list(mixed.read_batches(batch_size=batch_size))
        assert [event for batch in batches for event in batch] == everything
        assert all(1 <= len(batch) <= batch_size for batch in batches)
    paid = [event for batch in mixed.read_batches(event_types=["paid"], batch_size=7) for event in batch]
    assert paid == [event for event in everything if event.name == "paid"]


def test_a_stream_is_read_either_way_and_by_range(mixed: EventStore) -> None:
    stream = stream_uuid("s1")
    events = [event for event in mixed.read() if event.stream_id == stream]
    assert [event.stream_version for event in events] == list(range(len(events)))
    assert mixed.stream_version(stream) == len(events) - 1
    assert list(mixed.read_stream(stream)) == events
    assert list(mixed.read_stream(stream, backwards=True)) == events[::-1]
    assert list(mixed.read_stream(stream, from_version=3, to_version=9)) == events[3:10]
    assert list(mixed.read_stream(stream, from_version=3, to_version=9, backwards=True, limit=2)) == events[9:7:-1]
    assert list(mixed.read_stream(stream, from_version=10_000)) == []
    assert list(mixed.read_stream(stream, limit=0)) == []


def test_a_page_shrinks_for_large_events(store: EventStore) -> None:
    chance = random.Random(0)
    # One that the server compresses fourfold, one that it cannot: 20 MB and 15 MB of each, amid small ones.
    words = json.dumps([f"word {chance.randrange(10**9)}" for _ in range(50_000)])
    noise = chance.randbytes(375_000).hex()
    big = [b'{"stream":"s","type":"t","data":{"text":%s}}' % text.encode() for text in (words, f'"{noise}"')]
    small = [line(n) for n in range(6000)]
    store.import_events([*small, *[big[0]] * 20, *small, *[big[1]] * 20, *small], import_id="big")
    everything = list(store.read())
    assert len(everything) == 3 * 6000 + 40
    for names in (None, ["t", "placed"], ["t"]):
        batches = list(store.read_batches(event_types=names))
        expected = [event for event in everything if names is None or event.name in names]
        assert [event for batch in batches for event in batch] == expected
        heavy = [sum(len(event.data) for event in batch) for batch in batches]
        assert max(heavy) <= 2 * reading.PAGE_BYTES
    assert len(list(store.read(limit=6050))) == 6050


def test_wrong_arguments_are_refused_before_anything_is_asked(store_class: type[EventStore]) -> None:
    store = store_class("host=/nonexistent")  # never opened
    wrong: list[tuple[Any, type[Exception]]] = [
        (lambda: store.read(after=(1, 2)), TypeError),  # type: ignore[arg-type]
        (lambda: store.read(event_types="placed"), TypeError),
        (lambda: store.read(event_types=[1]), TypeError),  # type: ignore[list-item]
        (lambda: store.read(event_types=["\ud800"]), ValueError),
        (lambda: store.read(event_types=["a\0"]), ValueError),
        (lambda: store.read(stream_id="s"), TypeError),  # type: ignore[arg-type]
        (lambda: store.read(correlation_id="s"), TypeError),  # type: ignore[arg-type]
        (lambda: store.read(limit=-1), ValueError),
        (lambda: store.read(limit=True), TypeError),
        (lambda: store.read_batches(batch_size=0), ValueError),
        (lambda: store.read_stream("s"), TypeError),  # type: ignore[arg-type]
        (lambda: store.read_stream(uuid.uuid4(), from_version=-1), ValueError),
        (lambda: store.read_stream(uuid.uuid4(), to_version=True), TypeError),
    ]
    for call, error in wrong:
        with pytest.raises(error):
            call()


def test_an_undecodable_payload_names_its_event(store: EventStore) -> None:
    store.import_events([line(0), b'{"stream":"s","type":"t","data":{"n":1e400}}'], import_id="x")
    good, bad = store.read()
    assert good.payload == {"n": 0}
    assert bad.data == b'{"n":1e400}'
    for _ in range(2):  # and says so every time, not only at first
        with pytest.raises(EventParseError, match="out of range") as caught:
            bad.payload  # noqa: B018
        assert (caught.value.reason, caught.value.path) == ("Number out of range", "$[...]")
    assert (caught.value.cursor, caught.value.event_id, caught.value.name) == (bad.cursor, bad.event_id, "t")


integers = st.integers(-(10**40), 10**40)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | integers
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    payloads=st.lists(
        st.dictionaries(st.text(st.characters(codec="utf-8")), json_values, max_size=5), min_size=1, max_size=8
    )
)
def test_payloads_come_back_exactly(store: EventStore, payloads: list[dict[str, Any]]) -> None:
    data = [json.dumps(payload, ensure_ascii=bool(n % 2)).encode() for n, payload in enumerate(payloads)]
    lines = [b'{"stream":"s","type":"t","data": ' + text + b" }" for text in data]
    after = store.head() or Cursor.BEGINNING
    store.import_events(lines, import_id=str(uuid.uuid4()))
    events = list(store.read(after=after))
    assert [event.data for event in events] == data
    assert [event.payload for event in events] == payloads


# The bound


class OpenAppend:
    """An append of one event that has its number and is not committed yet."""

    def __init__(self, database: str, stream: str = "held") -> None:
        self.connection = psycopg.connect(database)
        stream_id = stream_uuid(stream)
        row = self.connection.execute(
            "SELECT transaction_no, head_versions FROM hindsight.begin_copy_v1(%s::uuid[], ARRAY[1]::bigint[])",
            ([stream_id],),
        ).fetchone()
        assert row is not None
        self.number: int = row[0]
        self.connection.execute(
            "INSERT INTO hindsight.events"
            " VALUES (%s, 0, gen_random_uuid(), %s, %s, NULL, now(), 'held', 0, '{\"n\":-1}')",
            (self.number, stream_id, row[1][0]),
        )

    def end(self, how: str) -> None:
        if how == "killed":
            with psycopg.connect(self.connection.info.dsn, autocommit=True) as other:
                other.execute("SELECT pg_terminate_backend(%s, 5000)", (self.connection.info.backend_pid,))
            self.connection.close()
            return
        self.connection.commit() if how == "committed" else self.connection.rollback()
        self.connection.close()


@pytest.mark.essential
@pytest.mark.parametrize("how", ["committed", "rolled back", "killed"])
def test_nothing_behind_an_open_append_is_shown_before_it_ends(store: EventStore, database: str, how: str) -> None:
    store.import_events([line(0)], import_id="a")
    held = OpenAppend(database)
    store.import_events([line(1)], import_id="b")
    # A reader without the bound sees the later event, takes its cursor, and has lost the held one for ever.
    with psycopg.connect(database) as control:
        seen = control.execute("SELECT transaction_no FROM hindsight.events ORDER BY 1 DESC LIMIT 1").fetchone()
    assert seen is not None
    assert seen[0] > held.number

    assert numbers(store.read()) == [0]
    head = store.head()
    assert head is not None
    assert head.transaction_no < held.number
    assert numbers(store.read_stream(stream_uuid("s"))) == [0, 1]  # a stream needs no bound
    held.end(how)
    assert numbers(store.read()) == ([0, -1, 1] if how == "committed" else [0, 1])


@pytest.mark.essential
def test_a_prepared_append_is_waited_for_too(store: EventStore, database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("BEGIN")
        connection.execute("SELECT hindsight.draw_number_v1()")
        connection.execute("PREPARE TRANSACTION 'held'")
        store.import_events([line(0)], import_id="a")
        assert numbers(store.read()) == []
        connection.execute("COMMIT PREPARED 'held'")
        assert numbers(store.read()) == [0]


@pytest.mark.essential
def test_an_unrelated_transaction_holds_up_nobody(store: EventStore, database: str) -> None:
    with psycopg.connect(database) as other:
        other.execute("CREATE TABLE elsewhere AS SELECT 1")
        store.import_events([line(0)], import_id="a")
        assert numbers(store.read()) == [0]


def test_two_stores_in_one_database_do_not_wait_for_each_other(
    store: EventStore, store_class: type[EventStore], database: str
) -> None:
    with store_class(database, schema="other") as other, psycopg.connect(database, autocommit=True) as connection:
        other.create_schema()
        connection.execute("UPDATE hindsight.store_meta SET lock_namespace = 1")
        connection.execute("UPDATE other.store_meta SET lock_namespace = 2")
        held = OpenAppend(database)
        other.import_events([line(0)], import_id="a")
        assert numbers(other.read()) == [0]
        held.end("rolled back")


def test_two_stores_with_one_namespace_only_delay_each_other(
    store: EventStore, store_class: type[EventStore], database: str
) -> None:
    with store_class(database, schema="other") as other, psycopg.connect(database, autocommit=True) as connection:
        other.create_schema()
        connection.execute(
            "UPDATE other.store_meta SET lock_namespace = (SELECT lock_namespace FROM hindsight.store_meta)"
        )
        store.import_events([line(n) for n in range(10)], import_id="far ahead", chunk_size=1)
        # One transaction that appends to both: each must register with a bound of its own sequence.
        connection.execute("BEGIN")
        connection.execute("SELECT hindsight.draw_number_v1()")
        connection.execute("SELECT other.draw_number_v1()")
        other.import_events([line(0)], import_id="a")
        assert numbers(other.read()) == []
        connection.execute("ROLLBACK")
        assert numbers(other.read()) == [0]


def test_a_savepoint_takes_its_registration_with_it(store: EventStore, database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("BEGIN")
        for _ in range(3):
            connection.execute("SAVEPOINT s")
            connection.execute("SELECT hindsight.draw_number_v1()")
            connection.execute("ROLLBACK TO s")
        store.import_events([line(0)], import_id="a")
        assert numbers(store.read()) == [0]  # nobody is registered
        connection.execute("SELECT hindsight.draw_number_v1(), hindsight.draw_number_v1()")
        locks = connection.execute(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
        ).fetchone()
        assert locks == (1,)
        store.import_events([line(1)], import_id="b")
        assert numbers(store.read()) == [0]
        connection.execute("COMMIT")
        assert numbers(store.read()) == [0, 1]


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_reader_or_writer_above_read_committed_is_refused(store: EventStore, database: str, isolation: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        for call in ("read_barrier_v1()", "begin_copy_v1(ARRAY[gen_random_uuid()], ARRAY[1]::bigint[])"):
            connection.execute(f"BEGIN ISOLATION LEVEL {isolation}")
            with pytest.raises(psycopg.DatabaseError, match=f"READ COMMITTED, not {isolation}"):
                connection.execute(f"SELECT * FROM hindsight.{call}")
            connection.execute("ROLLBACK")


def test_a_role_that_may_not_read_the_sequence_gets_an_error_not_an_empty_store(
    store: EventStore, store_class: type[EventStore], database: str
) -> None:
    store.import_events([line(0)], import_id="a")
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("DO $$ BEGIN CREATE ROLE onlooker LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$")
        connection.execute("GRANT USAGE ON SCHEMA hindsight TO onlooker")
        connection.execute("GRANT SELECT ON ALL TABLES IN SCHEMA hindsight TO onlooker")
        try:
            with pytest.raises(psycopg.errors.InsufficientPrivilege), store_class(f"{database} user=onlooker") as store:
                list(store.read())
            connection.execute("GRANT SELECT ON SEQUENCE hindsight.transaction_no TO onlooker")
            with store_class(f"{database} user=onlooker") as allowed:
                assert numbers(allowed.read()) == [0]
        finally:
            connection.execute("DROP OWNED BY onlooker")


def test_a_bound_is_not_used_on_another_server(mixed: EventStore, database: str) -> None:
    reader = reading.LogReader(mixed._statements, after=Cursor.BEGINNING, page_rows=100)
    pages = mixed._pages(reader)
    first = next(pages)
    assert reader.bound is not None
    # What a page meets after the server was replaced. tests/faults crashes a real one.
    reader.bound = reader.bound._replace(server_run="another run")
    request = reader.request()
    assert request is not None
    with psycopg.connect(database, autocommit=True) as connection:
        with pytest.raises(psycopg.DatabaseError, match="restarted or replaced"):
            connection.execute(request.statement, request.parameters)
    rest = [event for page in pages for event in page]  # asks for a new bound and goes on
    assert numbers(iter([*first, *rest])) == list(range(600))


def test_a_bound_that_expires_at_once_ends_the_read_instead_of_spinning(mixed: EventStore, database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(
            "CREATE OR REPLACE FUNCTION hindsight.server_run_v1() RETURNS text LANGUAGE sql VOLATILE"
            " AS 'SELECT clock_timestamp()::text'"
        )
    with pytest.raises(psycopg.DatabaseError, match="restarted or replaced"):
        list(mixed.read())


def test_reading_ends_although_somebody_keeps_appending(mixed: EventStore) -> None:
    count = 0
    for count, _ in enumerate(mixed.read(), start=1):
        if count % 100 == 0:
            mixed.import_events([line(count)], import_id=f"meanwhile {count}")
    assert count == 600


def test_no_connection_is_held_between_pages(
    server: EmbeddedServer, mixed: EventStore, store_class: type[EventStore], database: str
) -> None:
    with store_class(database, pool_size=1) as store:
        readers = [store.read() for _ in range(3)]
        for reader in readers:
            next(reader)  # each is in the middle of its first page
        assert store.head() is not None


@pytest.mark.parametrize("store_class", [EventStore], ids=["sync"])
@pytest.mark.parametrize("autocommit", [False, True])
def test_a_given_pool_is_used_and_left_open(store: EventStore, database: str, autocommit: bool) -> None:
    with ConnectionPool(database, kwargs={"autocommit": autocommit}, min_size=1, open=True) as pool:
        with EventStore(pool=pool) as lent:
            lent.import_events([line(n) for n in range(10)], import_id="x", chunk_size=3)
            assert numbers(lent.read()) == list(range(10))
            assert lent.pool is pool
        with pool.connection() as connection:
            assert connection.autocommit is autocommit


@pytest.mark.parametrize("store_class", [EventStore], ids=["sync"])
def test_threads_share_a_store(mixed: EventStore) -> None:
    found: list[list[int]] = []
    threads = [threading.Thread(target=lambda: found.append(numbers(mixed.read()))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [list(range(600))] * 6


def test_a_schema_dropped_under_an_open_store_is_named(store: EventStore, database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("DROP SCHEMA hindsight CASCADE")
    with pytest.raises(SchemaError, match="holds no event store"):
        list(store.read())


# Guards of the order


def test_a_sequence_put_back_is_refused_and_then_repaired(
    mixed: EventStore, store_class: type[EventStore], database: str
) -> None:
    head = mixed.head()
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("SELECT setval('hindsight.transaction_no', 1)")
        for call in ("read_barrier_v1()", "draw_number_v1()"):
            with pytest.raises(psycopg.DatabaseError, match="behind the events"):
                connection.execute(f"SELECT hindsight.{call}")
    for refused in (mixed.head, lambda: list(mixed.read())):
        with pytest.raises(SchemaError, match="behind the events"):
            refused()
    with store_class(database) as store:  # a store that is opened afterwards moves it on
        assert store.head() == head
        report = store.import_events([line(600)], import_id="after")
    assert report.first_cursor is not None
    assert head is not None
    assert report.first_cursor.transaction_no > head.transaction_no + 2**31
    assert numbers(mixed.read()) == list(range(601))


def test_a_sequence_put_back_during_an_import_refuses_the_next_chunk(mixed: EventStore, database: str) -> None:
    def lines() -> Iterator[bytes]:
        yield from (line(n, "late") for n in range(600, 610))
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute("SELECT setval('hindsight.transaction_no', 5)")
        yield line(610, "late")

    with pytest.raises(SchemaError, match="behind the events"):
        mixed.import_events(lines(), import_id="late", chunk_size=10)
    with EventStore(database) as store:
        stored = numbers(store.read())
        store.import_events([line(n, "late") for n in range(600, 611)], import_id="late")
        assert stored == list(range(len(stored)))
        assert numbers(store.read()) == list(range(611))


def test_a_store_that_lost_its_row_of_meta_data_has_no_barrier_and_says_so(store: EventStore, database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("DELETE FROM hindsight.store_meta")
        for call in ("read_barrier_v1()", "draw_number_v1()"):
            with pytest.raises(psycopg.errors.NoDataFound):
                connection.execute(f"SELECT hindsight.{call}")


def test_who_may_only_read_does_so_after_a_failover(
    store: EventStore, store_class: type[EventStore], database: str
) -> None:
    store.import_events([line(0)], import_id="a")
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("UPDATE hindsight.store_meta SET timeline = timeline + 1")
    with store_class(f"{database} options='-c default_transaction_read_only=on'") as onlooker:
        assert numbers(onlooker.read()) == [0]


def test_a_cache_on_the_sequence_is_refused(store: EventStore, database: str) -> None:
    with psycopg.connect(database, autocommit=True) as hoarder, psycopg.connect(database, autocommit=True) as other:
        other.execute("ALTER SEQUENCE hindsight.transaction_no CACHE 20")
        hoarder.execute("SELECT hindsight.draw_number_v1()")
        for _ in range(3):
            other.execute("SELECT nextval('hindsight.transaction_no')")
        with pytest.raises(psycopg.DatabaseError, match="put back or has a cache"):
            hoarder.execute("SELECT hindsight.draw_number_v1()")


def test_another_timeline_is_refused_until_the_sequence_has_moved_on(store: EventStore, database: str) -> None:
    store.import_events([line(0)], import_id="a")
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("UPDATE hindsight.store_meta SET timeline = timeline + 1")
        with pytest.raises(psycopg.DatabaseError, match="another timeline"):
            connection.execute("SELECT hindsight.check_writable_v1(1, 0)")
        assert numbers(store.read()) == [0]
        report = store.import_events([line(1)], import_id="b")  # looks before it writes, and moves on
        assert report.first_cursor is not None
        assert report.first_cursor.transaction_no >= 2**32
        connection.execute("SELECT hindsight.check_writable_v1(1, 0)")
        assert connection.execute("SELECT hindsight.advance_sequence_v1()").fetchone() == (None,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("generation = generation + 1", "has generation"),
        ("state = 'import x is under way'", "accepts no appends: import x"),
        ("oldest_writing_layout = 2", "layout 1 may not write"),
    ],
)
def test_what_changed_while_a_chunk_was_under_way_refuses_it(
    store: EventStore, database: str, change: str, message: str
) -> None:
    def lines() -> Iterator[bytes]:
        yield line(0)
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute(f"UPDATE hindsight.store_meta SET {change}")
        yield line(1)

    with pytest.raises(SchemaError, match=message):
        store.import_events(lines(), import_id="a")
    assert list(store.read()) == []
