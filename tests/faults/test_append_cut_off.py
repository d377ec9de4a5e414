"""Appends whose backend, server or connection ends under them: an acknowledged event is there, a refused one is not."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg_pool import ConnectionPool

from conftest import TEST_SETTINGS, root_for_servers
from hindsight_fast import (
    ANY,
    NO_STREAM,
    AppendOutcomeUnknown,
    AppendResult,
    AsyncEventStore,
    EventStore,
    NewEvent,
    StreamWrite,
)
from hindsight_fast.embedded import EmbeddedServer
from hindsight_fast.installations import Installation
from ledger import Ledger, event, table
from proxy import CuttingProxy
from rivals import (
    BY_LENT,
    BY_STORE,
    Follower,
    Stop,
    Threads,
    Writer,
    WriterProcess,
    locked_stream,
    streams_of,
    wait_until,
)

SOAK_MINUTES = int(os.environ.get("HINDSIGHT_SOAK", "0"))
SOON_S = 2.0 if SOAK_MINUTES else 15.0
"""Within which others go on after a fault. It takes a fraction of a second; who is forgotten waits for the store's
timeout, of 30 s. Between the two the short form leaves room for a machine that stands still for some seconds."""

# Events of a paused name wait where they are, but for those of a backend that is to stay alone with it.
PAUSES = """
    CREATE TABLE pauses (event_name text, only_pid integer);
    CREATE FUNCTION pause() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        WHILE EXISTS (
            SELECT FROM pauses AS p WHERE p.event_name = NEW.event_name AND coalesce(p.only_pid, pg_backend_pid())
            = pg_backend_pid()
        ) LOOP
            PERFORM pg_sleep(0.005);
        END LOOP;
        RETURN NEW;
    END $$;
    CREATE TRIGGER pause {place} INSERT ON hindsight.events FOR EACH ROW EXECUTE FUNCTION pause()
"""


@pytest.fixture(scope="module")
def crash_site(installation: Installation) -> Iterator[EmbeddedServer]:
    """A server that may be killed, and is up again after each test."""
    with EmbeddedServer(installation=installation, settings=TEST_SETTINGS, temporary_root=root_for_servers()) as server:
        yield server


@pytest.fixture
def crashing(crash_site: EmbeddedServer) -> str:
    """The conninfo of an empty database on it."""
    crash_site.start()
    name = f"crash_{uuid4().hex}"
    with psycopg.connect(crash_site.conninfo, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE template0")
    return crash_site.conninfo_for(name)


@pytest.fixture
def proxy(database: str, store: EventStore, tmp_path: Path) -> Iterator[CuttingProxy]:
    with CuttingProxy(database, tmp_path) as proxy:
        yield proxy


def append(store: EventStore, ledger: Ledger, key: str, *, name: str = "noted", **options: Any) -> AppendResult:
    new = NewEvent(name, event(key).data)
    write = StreamWrite(options.pop("stream", None) or uuid4(), [new], options.pop("expected", ANY))
    return ledger.carry_out(key, [write], lambda: store.transact([write], **options))


def append_at_once(store: EventStore, ledger: Ledger, key: str, count: int) -> None:
    with Threads(*(lambda n=n: append(store, ledger, f"{key}/{n}") for n in range(count))):
        pass


def paused(database: str) -> list[int]:
    with psycopg.connect(database) as connection:
        query = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
        return [pid for (pid,) in connection.execute(query)]


def execute(database: str, statement: str, *parameters: object) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(statement.encode(), parameters or None)


def wait_for_more(ledger: Ledger, count: int) -> None:
    goal = ledger.count("acknowledged") + count
    wait_until(lambda: ledger.count("acknowledged") >= goal, what="appends go on")


def wait_until_up(conninfo: str) -> None:
    def is_up() -> bool:
        try:
            psycopg.connect(conninfo).close()
        except psycopg.OperationalError:
            return False
        return True

    wait_until(is_up, what="the server is up", deadline_s=30)


@pytest.mark.essential
@pytest.mark.parametrize("place", ["BEFORE", "AFTER"])
@pytest.mark.parametrize("how", ["terminated", "killed"])
def test_the_backend_of_a_group_ends_before_its_commit(crashing: str, place: str, how: str) -> None:
    """After its number was drawn, before or after its events were inserted."""
    ledger = Ledger()
    with EventStore(crashing) as store:
        store.create_schema()
        execute(crashing, PAUSES.replace("{place}", place))
        execute(crashing, "INSERT INTO pauses VALUES ('holds a lane'), ('holds its group')")
        follower = Follower(store)
        lanes = [lambda n=n: append(store, ledger, f"lane {n}", name="holds a lane") for n in range(2)]
        group = [
            lambda n=n: append(store, ledger, f"member {n}", name="holds its group" if n == 3 else "noted")
            for n in range(6)
        ]
        with Threads(*lanes):
            wait_until(lambda: len(paused(crashing)) == 2, what="both lanes are taken")
            with Threads(*group):
                assert store._appender._groups is not None
                queue = store._appender._groups._queue
                wait_until(lambda: len(queue) == 6, what="a group has come together")
                execute(crashing, "DELETE FROM pauses WHERE event_name = 'holds a lane'")
                wait_until(lambda: ledger.count("acknowledged") == 2, what="the lanes are free")
                seen: list[int] = []  # between two naps it is not to be seen: a second look would miss it
                wait_until(lambda: seen.extend(paused(crashing)) or seen, what="the group is under way")
                (backend,) = seen
                execute(crashing, "UPDATE pauses SET only_pid = %s", backend)
                # Others go on meanwhile; readers wait for it.
                append(store, ledger, "other")
                assert follower.look() == 2
                assert [row.token for row in table(crashing)][2:] == ["other"]
                if how == "terminated":
                    execute(crashing, "SELECT pg_terminate_backend(%s)", backend)
                else:
                    os.kill(backend, signal.SIGKILL)
                    wait_until_up(crashing)
                ended = time.monotonic()
                append(store, ledger, "after it")
                assert time.monotonic() - ended < SOON_S
        assert ledger.count("acknowledged") == 2 + 6 + 2
        wait_until(follower.look, what="the barrier is free", deadline_s=SOON_S)
        follower.look()
        follower.check(ledger.check(crashing))


@pytest.mark.essential
def test_the_whole_server_is_killed_under_load_again_and_again(crash_site: EmbeddedServer, crashing: str) -> None:
    ledger, streams, kills = Ledger(), streams_of(12), 20 if SOAK_MINUTES else 3
    chance = random.Random()
    with EventStore(crashing) as store:
        store.create_schema()
        followers = [Follower(store, over_crashes=True) for _ in range(2)]
        process = WriterProcess(crashing, ledger, name="p", streams=len(streams), ways=BY_STORE)

        def write(name: str) -> None:
            ways = BY_STORE + BY_LENT if name == "lent" else BY_STORE
            writer = Writer(store, ledger.take, name=name, streams=streams, ways=ways, database=crashing)
            while not stop_writing:
                writer.step()
            writer.close()

        recoveries_s = []
        with Stop() as stop, Threads(*(lambda each=each: each.follow(stop) for each in followers)), stop:
            with Stop() as stop_writing:
                with Threads(*(lambda name=name: write(name) for name in ("a", "b", "c", "lent"))), stop_writing:
                    for _ in range(kills):
                        wait_for_more(ledger, chance.randint(20, 200))
                        crash_site.kill()
                        crash_site.start()
                        up = time.monotonic()
                        wait_for_more(ledger, 1)
                        recoveries_s.append(time.monotonic() - up)
                    process.stop()
        rows = ledger.check(crashing)
        for follower in followers:
            follower.check(rows)
        assert max(recoveries_s) < max(SOON_S, 5.0)
        # What the store sent it could ask for again; only commits of one's own nobody asks for.
        assert all(key.startswith("lent/") for key in ledger.unknown()), ledger.unknown()


def test_an_append_after_a_crash_is_seen_by_who_had_read_to_the_end(crash_site: EmbeddedServer, crashing: str) -> None:
    """The crash gives numbers again that 500 appends had drawn and not used."""
    ledger = Ledger()
    with EventStore(crashing) as store:
        store.create_schema()
        append(store, ledger, "before")
        follower = Follower(store)
        with psycopg.connect(crashing) as lent:
            for _ in range(500):
                store.append(uuid4(), [event("rolled back")], expected=ANY, connection=lent)
                lent.rollback()
        append(store, ledger, "last")
        assert follower.look() == 2
        crash_site.kill()
        crash_site.start()
        append(store, ledger, "first after it")
        assert follower.look() == 1
        follower.check(ledger.check(crashing))


@pytest.mark.essential
@pytest.mark.parametrize("group_commit", [True, False])
@pytest.mark.parametrize("cut", ["answer", "request"])
def test_a_connection_cut_under_an_append_leaves_one_copy(
    database: str, proxy: CuttingProxy, group_commit: bool, cut: Any
) -> None:
    ledger, stream = Ledger(), uuid4()
    with EventStore(proxy.conninfo, group_commit=group_commit) as store:
        append(store, ledger, "before", stream=stream)
        for n in range(5):
            proxy.cut_next(cut)
            result = append(store, ledger, f"cut {n}", stream=stream, expected=n)
            assert proxy.cut.is_set(), "nothing was cut: this run shows nothing"
            assert result.stream_versions == {stream: n + 1}
            assert not result.duplicate, "the caller appended it once"
    ledger.check(database)


def test_whoever_gave_the_ids_gets_the_first_result_again(database: str, proxy: CuttingProxy) -> None:
    ledger, stream = Ledger(), uuid4()
    given = event("given", event_id=uuid4())
    with EventStore(proxy.conninfo) as store:
        append(store, ledger, "before")
        proxy.cut_next("answer")
        write = StreamWrite(stream, [given], NO_STREAM)
        first = ledger.carry_out("given", [write], lambda: store.transact([write]))
        assert proxy.cut.is_set()
        again = store.transact([write])
    assert again.duplicate
    assert (again.cursor, again.stream_versions, again.event_ids) == (
        first.cursor,
        first.stream_versions,
        first.event_ids,
    )
    ledger.check(database)


def test_an_attempt_that_was_cut_off_is_ended_before_it_is_made_again(
    database: str, proxy: CuttingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would wait for its stream, and be carried out when its caller had long been told that it was not."""
    monkeypatch.setattr("hindsight_fast.appending.GROUP_PATIENCE", "60s")
    monkeypatch.setattr("hindsight_fast.appending.LONE_PATIENCE", "60s")
    ledger, stream = Ledger(), uuid4()
    waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with EventStore(proxy.conninfo) as store, psycopg.connect(database, autocommit=True) as watcher:
        append(store, ledger, "before")
        attempts: list[int] = []

        def others_wait(count: int) -> bool:
            attempts.extend(pid for (pid,) in watcher.execute(waiting) if pid not in attempts)
            return len(attempts) >= count

        with locked_stream(database, stream) as holder:
            proxy.cut_next("request", held=True)
            with Threads(lambda: append(store, ledger, "cut off", stream=stream)):
                wait_until(lambda: others_wait(1), what="the attempt waits that will be cut off")
                proxy.let_go()
                wait_until(lambda: others_wait(2), what="another attempt waits")
                still = [pid for (pid,) in watcher.execute(waiting)]
                assert still == attempts[1:], "the attempt that was cut off is still under way"
                holder.rollback()
    ledger.check(database)


def test_only_a_session_that_is_older_than_the_append_is_ended(database: str, store: EventStore) -> None:
    """In a container that starts anew the first process ids are given again at once."""
    end_append = store._statements.end_append
    with psycopg.connect(database) as older, psycopg.connect(database, autocommit=True) as asking:
        older.execute("SELECT 1")
        cursor = asking.cursor(binary=True)
        # An append that was sent a minute ago, long before that session began.
        cursor.execute(end_append, (older.info.backend_pid, 60.0))
        assert cursor.fetchall() == []
        older.execute("SELECT 1")
        # One that was sent just now.
        cursor.execute(end_append, (older.info.backend_pid, 0.0))
        assert cursor.fetchall() == [(True,)]
        with pytest.raises(psycopg.OperationalError):
            older.execute("SELECT 1")


def test_without_an_answer_in_time_the_writes_can_be_passed_again(
    crash_site: EmbeddedServer, crashing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = uuid4()
    with CuttingProxy(crashing, tmp_path) as proxy, EventStore(proxy.conninfo) as store:
        store.create_schema()
        store.append(stream, [event("0")], expected=ANY)
        # From here on: before, a pause of the machine would have been an error of its own.
        monkeypatch.setattr(store._appender, "_timeout_s", 1.0)
        proxy.cut_next("answer", held=True)
        failures: list[AppendOutcomeUnknown] = []

        def append_and_fail() -> None:
            with pytest.raises(AppendOutcomeUnknown) as caught:
                store.append(stream, [event("1"), event("2")], expected=0)
            failures.append(caught.value)

        with Threads(append_and_fail):
            assert proxy.cut.wait(20)
            # Only then does the caller lose its connection: nobody is there whom it could ask again.
            crash_site.kill()
            proxy.let_go()
        crash_site.start()
        (failure,) = failures
    with EventStore(crashing) as another:
        result = another.transact(failure.writes, correlation_id=failure.correlation_id)
        again = another.transact(failure.writes)
    assert result.stream_versions == {stream: 2}
    assert again.cursor == result.cursor
    assert again.duplicate
    assert [row.token for row in table(crashing)] == ["0", "1", "2"]


def test_a_doubt_is_not_lost_over_another_error(database: str, proxy: CuttingProxy) -> None:
    """Committed, cut, and then the store is closed to appends: that error speaks of the second attempt only."""
    stream = uuid4()
    with EventStore(proxy.conninfo) as store:
        store.append(uuid4(), [event("before")], expected=ANY)
        execute(
            database,
            "CREATE FUNCTION close_store() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " UPDATE hindsight.store_meta SET state = 'closed for a test'; RETURN NULL; END $$;"
            " CREATE CONSTRAINT TRIGGER close_store AFTER INSERT ON hindsight.events"
            " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION close_store()",
        )
        proxy.cut_next("answer")
        write = StreamWrite(stream, [event("in doubt")], ANY)
        with pytest.raises(AppendOutcomeUnknown) as caught:
            store.transact([write])
        assert "closed for a test" in str(caught.value.__cause__)
        (again,) = caught.value.writes
        assert (again.stream_id, [each.data for each in again.events]) == (stream, [write.events[0].data])
    assert [row.token for row in table(database)] == ["before", "in doubt"]


def test_a_pool_goes_on_after_its_server_was_restarted(crash_site: EmbeddedServer, crashing: str) -> None:
    """Without an error for anybody who had nothing under way, whatever the pool still holds."""
    ledger = Ledger()
    with EventStore(crashing) as store:
        store.create_schema()
        append_at_once(store, ledger, "before", 20)
        for mode in ("fast", "immediate"):
            crash_site.restart(mode)
            append_at_once(store, ledger, mode, 20)
    assert not ledger.errors()
    ledger.check(crashing)


@pytest.mark.parametrize("tasks", [False, True])
def test_who_waits_for_a_server_is_served_as_soon_as_it_is_back(
    crash_site: EmbeddedServer,
    crashing: str,
    tasks: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """However long it was gone: a pool's own pauses double each time."""
    # Or more than double, so that the second of them is longer than anybody waits, and need not be waited for here.
    monkeypatch.setattr("psycopg_pool.base.AttemptWithBackoff.DELAY_BACKOFF", 1_000.0)
    served_at: list[float] = []
    opened, gone = threading.Event(), threading.Event()

    async def append_from_a_task() -> None:
        async with AsyncEventStore(crashing) as store:
            opened.set()
            assert gone.wait(20)
            await store.append(uuid4(), [event("any")], expected=ANY)

    def append_one() -> None:
        if tasks:
            asyncio.run(append_from_a_task())
        else:
            with EventStore(crashing) as store:
                opened.set()
                assert gone.wait(20)
                store.append(uuid4(), [event("any")], expected=ANY)
        served_at.append(time.monotonic())

    with EventStore(crashing) as store:
        store.create_schema()
    with Threads(append_one):
        assert opened.wait(20)
        crash_site.kill()
        gone.set()
        wait_until(lambda: caplog.text.count("error connecting") >= 2, what="the pool has tried in vain")
        crash_site.start()
        back = time.monotonic()
    assert served_at[0] - back < SOON_S


def test_a_connection_that_forgot_its_statements_is_taught_again(database: str, store: EventStore) -> None:
    ledger = Ledger()
    for n in range(10):
        append(store, ledger, f"{n}")
        with store.pool.connection() as connection:
            connection.execute(("DISCARD ALL", "DEALLOCATE ALL")[n % 2].encode())
        if n % 2:
            append_at_once(store, ledger, f"{n}", 8)
    assert not ledger.errors()
    ledger.check(database)


def test_stores_with_long_names_share_connections_and_nothing_else(database: str) -> None:
    """PostgreSQL cuts the names of prepared statements at 63 bytes."""
    schemas = ["x" * 50 + end for end in "ab"]
    with ConnectionPool(database, min_size=1, max_size=1, open=True) as pool:
        stores = [EventStore(schema=schema, pool=pool) for schema in schemas]
        for store in stores:
            with store:
                store.create_schema()
                for n in range(3):
                    store.append(uuid4(), [event(f"{store.schema}/{n}")], expected=ANY)
        for schema in schemas:
            assert [row.token for row in table(database, schema)] == [f"{schema}/{n}" for n in range(3)]
        # Two stores of one schema find each other's statement.
        with EventStore(schema=schemas[0], pool=pool) as another:
            another.append(uuid4(), [event("another's")], expected=ANY)
            assert table(database, schemas[0])[-1].token == "another's"
