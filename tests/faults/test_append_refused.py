"""Appends that cannot be, or must wait: each gets its own answer in time, and strangers do not notice."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg_pool import ConnectionPool, PoolTimeout

from hindsight_fast import (
    ANY,
    NO_STREAM,
    AppendResult,
    AsyncEventStore,
    ConcurrencyConflict,
    EventStore,
    IdempotencyConflict,
    NewEvent,
    SchemaError,
    StreamWrite,
)
from ledger import Ledger, acknowledged, begun, event, table
from rivals import Follower, Threads, WriterProcess, locked_stream, streams_of, wait_until, waiting_for_locks

SOAK_MINUTES = int(os.environ.get("HINDSIGHT_SOAK", "0"))

REGISTERED = """
    SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock' AND objsubid = 1
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


def append(store: EventStore, ledger: Ledger, key: str, stream: UUID | None = None, **options: Any) -> AppendResult:
    write = StreamWrite(stream or uuid4(), [event(key)], options.pop("expected", ANY))
    return ledger.carry_out(key, [write], lambda: store.transact([write], **options))


def execute(database: str, statement: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(statement.encode())


@contextmanager
def one_group(store: EventStore, database: str, monkeypatch: pytest.MonkeyPatch, size: int) -> Iterator[None]:
    """What threads append within the block, *size* of them, goes in one group."""
    monkeypatch.setattr("hindsight_fast.appending.GROUP_PATIENCE", "20s")
    assert store._appender._groups is not None
    queue = store._appender._groups._queue
    streams = [uuid4(), uuid4()]
    with locked_stream(database, streams[0]) as first, locked_stream(database, streams[1]) as second:
        with Threads(*(lambda each=each: store.append(each, [], expected=ANY) for each in streams)):
            wait_until(lambda: len(queue.leaders) == 2, what="both lanes are taken")

            def let_go() -> None:
                wait_until(lambda: len(queue) == size, what="a group has come together")
                monkeypatch.setattr("hindsight_fast.appending.GROUP_PATIENCE", "100ms")
                first.rollback()
                second.rollback()

            with Threads(let_go):
                yield


# --- Ids --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_commit", [True, False])
def test_a_repetition_with_half_the_ids_changed_writes_nothing(database: str, group_commit: bool) -> None:
    ledger, streams = Ledger(), streams_of(2)
    ids = [uuid4() for _ in range(4)]

    def writes(key: str, ids: list[UUID]) -> list[StreamWrite]:
        events = [event(f"{key}/{n}", event_id=event_id) for n, event_id in enumerate(ids)]
        return [StreamWrite(stream, events[n::2], ANY) for n, stream in enumerate(streams)]

    with EventStore(database, group_commit=group_commit) as store:
        store.create_schema()
        first = writes("first", ids)
        result = ledger.carry_out("first", first, lambda: store.transact(first))
        changed = writes("changed", [*ids[:2], uuid4(), uuid4()])
        with pytest.raises(IdempotencyConflict) as caught:
            ledger.carry_out("changed", changed, lambda: store.transact(changed))
        assert caught.value.event_ids == (ids[0], ids[1])
        other_data = writes("other data", ids)
        with pytest.raises(IdempotencyConflict, match="another data"):
            ledger.carry_out("other data", other_data, lambda: store.transact(other_data))
        again = store.transact(first)
    assert again.duplicate
    assert (again.cursor, again.stream_cursors, again.event_ids) == (
        result.cursor,
        result.stream_cursors,
        result.event_ids,
    )
    ledger.check(database)


def test_an_id_that_stands_twice_in_one_append_is_refused_before_anything_is_sent(
    database: str, store: EventStore
) -> None:
    ledger, (a, b), event_id = Ledger(), streams_of(2), uuid4()
    append(store, ledger, "before", a)
    writes = [StreamWrite(each, [event(f"{each}", event_id=event_id)], ANY) for each in (a, b)]
    with pytest.raises(ValueError, match=f"{event_id} stands twice"):
        ledger.carry_out("twice", writes, lambda: store.transact(writes))
    assert (store.stream_version(a), store.stream_version(b)) == (0, None)
    ledger.check(database)


@pytest.mark.parametrize("lent", [False, True])
def test_of_many_who_bring_the_same_ids_at_once_one_writes_and_all_get_its_answer(
    database: str, store: EventStore, lent: bool
) -> None:
    stream, given = uuid4(), [event(f"{n}", event_id=uuid4()) for n in range(3)]
    together, results = threading.Barrier(16), list[AppendResult]()

    def bring(n: int) -> None:
        together.wait(20)
        if lent and n % 4 == 0:
            with psycopg.connect(database, autocommit=True) as connection:
                results.append(store.append(stream, given, expected=NO_STREAM, connection=connection))
        else:
            results.append(store.append(stream, given, expected=NO_STREAM))

    try:
        with Threads(*(lambda n=n: bring(n) for n in range(16))):
            pass
    except psycopg.errors.UniqueViolation:
        # In one's own transaction that is the end of it: only who appends it again learns the first result.
        assert lent
    assert [row.token for row in table(database)] == ["0", "1", "2"]
    assert len({result.cursor for result in results}) == 1
    assert sum(not result.duplicate for result in results) == 1


# --- Strangers --------------------------------------------------------------------------------------------------------


@pytest.mark.essential
def test_in_one_group_each_gets_its_own_answer(
    database: str, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, known = Ledger(), event("known", event_id=uuid4())
    execute(database, "ALTER TABLE hindsight.events ADD CONSTRAINT no_such CHECK (event_name <> 'forbidden')")
    stream = uuid4()
    before = [StreamWrite(stream, [known], ANY)]
    first = ledger.carry_out("known", before, lambda: store.transact(before))
    answers: dict[str, Any] = {}

    def run(name: str, write: StreamWrite) -> None:
        try:
            answers[name] = ledger.carry_out(name, [write], lambda: store.transact([write]))
        except Exception as error:  # noqa: BLE001 - compared
            answers[name] = error

    mine = uuid4()
    writes = {
        "conflict": StreamWrite(stream, [event("conflict")], 7),
        "refused by the server": StreamWrite(mine, [NewEvent("forbidden", event("refused").data)], ANY),
        "another's id": StreamWrite(mine, [event("another's", event_id=known.event_id)], ANY),
        "fine": StreamWrite(mine, [event("fine")], ANY),
        "fine too": StreamWrite(stream, [event("fine too")], ANY),
        "looks": StreamWrite(stream, [], 0),
    }
    with locked_stream(database, UUID(int=1)) as held:
        writes["waits"] = StreamWrite(UUID(int=1), [event("waits")], ANY)
        with one_group(store, database, monkeypatch, len(writes)):
            works = [lambda name=name, write=write: run(name, write) for name, write in writes.items()]
            with Threads(*works):
                # Who waited for that one would wait for the end of this block.
                wait_until(lambda: len(answers) == len(writes) - 1, what="all but one have their answer")
                assert "waits" not in answers
                held.rollback()
    assert isinstance(answers["conflict"], ConcurrencyConflict)
    assert isinstance(answers["refused by the server"], psycopg.errors.CheckViolation)
    assert isinstance(answers["another's id"], IdempotencyConflict)
    assert {name for name, answer in answers.items() if isinstance(answer, AppendResult)} >= {
        "fine",
        "fine too",
        "waits",
    }
    again = store.transact(before)
    assert (again.cursor, again.duplicate) == (first.cursor, True)
    ledger.check(database)


HELD_S = 20.0 if SOAK_MINUTES else 1.0
"""For how long a stream is kept locked, beside which others append."""


def check_that_strangers_went_on(waits_s: list[float]) -> None:
    """Whatever the machine does meanwhile: a pause of it strikes one of them, a stream that is locked strikes many."""
    held_up = [each for each in waits_s if each > 0.3]  # it takes some milliseconds
    assert len(held_up) <= 3, f"{len(held_up)} of {len(waits_s)} strangers waited, the longest for {max(held_up):.1f} s"
    # Nobody waits as long as for the store's timeout, of 30 s, which is what who is forgotten waits for.
    assert max(waits_s) < (1.5 if SOAK_MINUTES else 15.0), f"a stranger waited for {max(waits_s):.1f} s"


@pytest.mark.parametrize("pool_size", [2, 10])
def test_callers_of_a_locked_stream_hold_nobody_else_up(database: str, pool_size: int) -> None:
    ledger, held = Ledger(), uuid4()
    waits_s = []
    with EventStore(database, pool_size=pool_size) as store:
        store.create_schema()
        with locked_stream(database, held) as holder:
            waiting = [lambda n=n: append(store, ledger, f"waits {n}", held) for n in range(pool_size + 4)]
            with Threads(*waiting):
                assert store._appender._groups is not None
                until = time.monotonic() + HELD_S
                while len(waits_s) < 20 or time.monotonic() < until:
                    began = time.monotonic()
                    append(store, ledger, f"stranger {len(waits_s)}")
                    assert list(store.read(limit=1))
                    waits_s.append(time.monotonic() - began)
                assert ledger.count("acknowledged") == len(waits_s), "the stream was not locked"
                holder.rollback()
    check_that_strangers_went_on(waits_s)
    assert not ledger.errors()
    ledger.check(database)


def test_tasks_of_a_locked_stream_hold_no_other_task_up(database: str, store: EventStore) -> None:
    held, ledger = uuid4(), Ledger()

    async def append_to(tasks_store: AsyncEventStore, key: str, stream: UUID) -> None:
        write = StreamWrite(stream, [event(key)], ANY)
        ledger.take(begun(key, [write]))
        ledger.take(acknowledged(key, await tasks_store.transact([write])))

    async def strangers_wait_s() -> list[float]:
        waits_s: list[float] = []
        async with AsyncEventStore(database) as tasks_store:
            with locked_stream(database, held) as holder:
                async with asyncio.TaskGroup() as waiting:
                    for n in range(14):
                        waiting.create_task(append_to(tasks_store, f"waits {n}", held))
                    until = time.monotonic() + HELD_S
                    while len(waits_s) < 20 or time.monotonic() < until:
                        began = time.monotonic()
                        await append_to(tasks_store, f"stranger {len(waits_s)}", uuid4())
                        waits_s.append(time.monotonic() - began)
                    assert ledger.count("acknowledged") == len(waits_s), "the stream was not locked"
                    holder.rollback()
        return waits_s

    check_that_strangers_went_on(asyncio.run(strangers_wait_s()))
    ledger.check(database)


def test_fifty_callers_and_a_slow_one_share_a_pool_of_two(database: str) -> None:
    ledger, held = Ledger(), uuid4()
    with EventStore(database, pool_size=2) as store:
        store.create_schema()
        with locked_stream(database, held) as holder:
            with Threads(lambda: append(store, ledger, "slow", held)):
                wait_until(lambda: waiting_for_locks(database), what="the slow one waits for its stream")
                with Threads(*(lambda n=n: append(store, ledger, f"{n}") for n in range(50))):
                    pass
                assert ledger.count("acknowledged") == 50, "the slow one was not slow"
                holder.rollback()
    ledger.check(database)


def test_nobody_waits_longer_than_the_store_is_patient(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for a stream nor for a connection; the error says what was wanting."""
    ledger, held = Ledger(), uuid4()
    with EventStore(database, pool_size=2) as store:
        store.create_schema()
        append(store, ledger, "before")
        monkeypatch.setattr(store, "_timeout", 0.5)
        monkeypatch.setattr(store._appender, "_timeout_s", 0.5)
        with locked_stream(database, held):
            began = time.monotonic()
            with pytest.raises(psycopg.errors.LockNotAvailable):
                append(store, ledger, "slow", held)
            assert 0.5 < time.monotonic() - began < 15.0  # and not the 30 s of a store that was told nothing
        # All connections taken by the application itself.
        with store.pool.connection(), store.pool.connection():
            began = time.monotonic()
            with pytest.raises(PoolTimeout):
                append(store, ledger, "no connection")
            assert time.monotonic() - began < 15.0
        append(store, ledger, "at last")
    ledger.check(database)


@pytest.mark.parametrize("where", ["waiting for a stream", "in the insert"])
def test_a_statement_timeout_takes_no_version_and_frees_the_readers(
    database: str, store: EventStore, where: str
) -> None:
    ledger, follower, stream = Ledger(), Follower(store), uuid4()
    if where == "in the insert":
        execute(
            database,
            "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep("
            "CASE WHEN NEW.event_name = 'slow' THEN 20 ELSE 0 END); RETURN NEW; END $$;"
            "CREATE TRIGGER wait BEFORE INSERT ON hindsight.events FOR EACH ROW EXECUTE FUNCTION wait()",
        )
    slow = [StreamWrite(stream, [NewEvent("slow", event("slow").data)], ANY)]
    with (
        EventStore(database, pool_size=1) as hurried,
        psycopg.connect(database, autocommit=True) as lent,
    ):
        # Only once they are open and have appended: whatever else is cancelled would be an error of its own.
        append(hurried, ledger, "opened")
        append(hurried, ledger, "opened, too", connection=lent)
        with hurried.pool.connection() as its_own:
            its_own.execute("SET statement_timeout = '60ms'")
        lent.execute("SET statement_timeout = '60ms'")
        follower.look()
        with locked_stream(database, stream) as holder:
            if where == "in the insert":
                holder.rollback()
            for n, options in enumerate(({}, {"connection": lent})):
                with pytest.raises(psycopg.errors.QueryCanceled):
                    ledger.carry_out(f"slow {n}", slow, lambda options=options: hurried.transact(slow, **options))
                cancelled = time.monotonic()
                with psycopg.connect(database) as watcher:
                    assert watcher.execute(REGISTERED).fetchone() == (0,)
                append(store, ledger, f"after {n}")
                assert follower.look() == 1
                assert time.monotonic() - cancelled < 15.0  # and not the 20 s of the insert
    assert append(store, ledger, "first", stream).stream_versions == {stream: 0}
    follower.look()
    follower.check(ledger.check(database))


# --- A sequence that is not what it was -------------------------------------------------------------------------------

PUT_BACK = "SELECT setval('hindsight.transaction_no', 1)"
ONE_BACK = "SELECT setval(s, pg_sequence_last_value(s) - 1) FROM to_regclass('hindsight.transaction_no') AS s"
ANOTHER_SERVER = "UPDATE hindsight.store_meta SET system_identifier = system_identifier - 1"
ANOTHER_TIMELINE = "UPDATE hindsight.store_meta SET timeline = timeline + 1"


@pytest.mark.essential
@pytest.mark.parametrize("damage", [PUT_BACK, ANOTHER_SERVER, ANOTHER_TIMELINE])
def test_numbers_only_rise_though_two_processes_repair_the_sequence_at_once(
    database: str, store: EventStore, damage: str
) -> None:
    ledger, follower = Ledger(), Follower(store)
    append(store, ledger, "before")
    processes = [
        WriterProcess(database, ledger, name=f"p{n}", streams=4, ways=["one", "several", "multi"]) for n in range(2)
    ]
    wait_until(lambda: all(process.begun.is_set() for process in processes), what="both write")
    for n in range(3):
        goal = ledger.count("acknowledged") + 30
        wait_until(lambda goal=goal: ledger.count("acknowledged") >= goal, what="appends go on")
        execute(database, damage)
        append(store, ledger, f"after {n}")
        follower.look()
    for process in processes:
        process.stop()
    follower.look()
    assert not ledger.errors(), ledger.messages()
    follower.check(ledger.check(database))


def test_a_sequence_with_a_cache_is_refused_by_name_and_mends(database: str, store: EventStore) -> None:
    ledger, follower = Ledger(), Follower(store)
    append(store, ledger, "before")
    execute(database, "ALTER SEQUENCE hindsight.transaction_no CACHE 20")
    # Two connections at least, which take turns: one that draws alone hoards numbers and harms nobody.
    with store.pool.connection(), store.pool.connection():
        pass
    refusals: list[SchemaError] = []

    def write(name: str) -> None:
        for n in range(30):
            try:
                append(store, ledger, f"{name}/{n}")
            except SchemaError as refusal:
                refusals.append(refusal)

    with Threads(*(lambda n=n: write(f"{n}") for n in range(4))):
        pass
    assert refusals, "no number was hoarded: this run shows nothing"
    assert all("CACHE 1" in str(refusal) for refusal in refusals)
    follower.look()
    execute(database, "ALTER SEQUENCE hindsight.transaction_no CACHE 1")
    store.pool.drain()  # what a session has hoarded it uses up
    write("mended")
    count = len(refusals)
    write("mended for good")
    assert len(refusals) == count
    follower.look()
    follower.check(ledger.check(database))


@pytest.mark.parametrize("group_commit", [True, False])
def test_a_number_drawn_twice_is_no_error_of_the_callers(database: str, group_commit: bool) -> None:
    """The sequence was put back while an append was open, whose number nobody can see yet."""
    ledger = Ledger()
    with EventStore(database, group_commit=group_commit) as store:
        store.create_schema()
        follower = Follower(store)
        append(store, ledger, "before")
        with psycopg.connect(database) as lent:
            append(store, ledger, "open", connection=lent)
            execute(database, ONE_BACK)
            with Threads(lambda: append(store, ledger, "with the same number")):
                wait_until(lambda: _waits(database), what="it waits to see whose number it is")
                lent.commit()
        follower.look()
        follower.check(ledger.check(database))


def test_a_lent_connection_is_refused_once_and_the_next_append_repairs(database: str, store: EventStore) -> None:
    ledger = Ledger()
    append(store, ledger, "before")
    execute(database, ANOTHER_SERVER)
    with psycopg.connect(database) as lent:
        with pytest.raises(SchemaError, match="another server"):
            append(store, ledger, "refused", connection=lent)
        lent.rollback()
        result = append(store, ledger, "next", connection=lent)
        assert result.cursor is not None
        assert result.cursor.transaction_no > 2**32
        lent.commit()
    ledger.check(database)


# --- Readers and writers that would see wrong data --------------------------------------------------------------------


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_a_snapshot_that_stays_is_refused_for_reading_and_appending(
    database: str, store: EventStore, level: str
) -> None:
    ledger = Ledger()
    append(store, ledger, "before")
    execute(
        database,
        f"ALTER DATABASE {psycopg.conninfo.conninfo_to_dict(database)['dbname']} SET"
        f" default_transaction_isolation = '{level}'",
    )
    with ConnectionPool(database, min_size=1, max_size=2, kwargs={"autocommit": True}, open=True) as pool:
        with EventStore(pool=pool) as given:
            with pytest.raises(SchemaError, match=level.upper()):
                list(given.read())
            with pytest.raises(SchemaError, match=level.upper()):
                given.head()
            with pytest.raises(SchemaError, match=level.upper()):
                append(given, ledger, "refused")
    # The store's own connections set what they need.
    with EventStore(database) as own:
        append(own, ledger, "fine")
        assert [each.payload["token"] for each in own.read()] == ["before", "fine"]
    ledger.check(database)


def test_no_statement_asks_for_the_barrier_and_for_events_at_once(store: EventStore) -> None:
    """In one statement the events are seen as they were before the barrier was."""
    texts = [value for value in vars(store._statements).values() if isinstance(value, bytes)]
    assert any(b"read_barrier_v1" in text for text in texts)
    assert not any(b"read_barrier_v1" in text and b".events" in text for text in texts)


@pytest.mark.essential
def test_without_rights_on_the_sequence_nothing_reads_as_empty(database: str, store: EventStore) -> None:
    ledger, role = Ledger(), f"onlooker_{uuid4().hex}"
    append(store, ledger, "before")
    execute(
        database,
        f"CREATE ROLE {role} LOGIN; GRANT USAGE ON SCHEMA hindsight TO {role};"
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA hindsight TO {role}",
    )
    try:
        with EventStore(psycopg.conninfo.make_conninfo(database, user=role)) as onlooker:
            for ask in (lambda: list(onlooker.read()), onlooker.head, lambda: append(onlooker, ledger, "refused")):
                with pytest.raises(psycopg.errors.InsufficientPrivilege, match="transaction_no"):
                    ask()
    finally:
        execute(database, f"DROP OWNED BY {role}; DROP ROLE {role}")
    ledger.check(database)


def _waits(database: str) -> bool:
    with psycopg.connect(database) as connection:
        query = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        return connection.execute(query).fetchone() is not None
