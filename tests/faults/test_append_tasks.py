"""Tasks that append in one group: cancelled, late, refused or cut off, each for itself; nobody else is harmed."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal
from uuid import UUID, uuid4

import psycopg
import pytest

from hindsight_fast import (
    ANY,
    AppendResult,
    AsyncEventStore,
    ConcurrencyConflict,
    EventStore,
    NewEvent,
    StreamWrite,
)
from ledger import Ledger, acknowledged, begun, event, failed
from proxy import CuttingProxy
from rivals import locked_stream, streams_of
from test_async_store import all_are_back, run, until

SOAK = bool(os.environ.get("HINDSIGHT_SOAK"))


async def carry_out(store: AsyncEventStore, ledger: Ledger, key: str, write: StreamWrite) -> AppendResult:
    """Append, and keep account of it. Cancelled, it is unknown, until somebody knows better."""
    ledger.take(begun(key, [write]))
    try:
        result = await store.transact([write])
    except asyncio.CancelledError as error:
        ledger.take(failed(key, error, unknown=True))
        raise
    except Exception as error:
        ledger.take(failed(key, error))
        raise
    ledger.take(acknowledged(key, result))
    return result


def queue_of(store: AsyncEventStore) -> Any:
    assert store._appender._groups is not None
    return store._appender._groups._queue


@asynccontextmanager
async def lanes_taken(store: AsyncEventStore, database: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Whoever appends within the block waits; all of them leave in one group at its end."""
    monkeypatch.setattr("hindsight_fast.async_appending.GROUP_PATIENCE", "20s")
    streams = [uuid4(), uuid4()]
    with locked_stream(database, streams[0]) as first, locked_stream(database, streams[1]) as second:
        looks = []
        for n, each in enumerate(streams, 1):
            looks.append(asyncio.create_task(store.append(each, [], expected=ANY)))
            await until(lambda n=n: len(queue_of(store).leaders) == n)  # type: ignore[misc]
        yield
        first.rollback()
        second.rollback()
        await asyncio.gather(*looks)


def waiting_for(database: str, count: int) -> Callable[[], bool]:
    """Whether so many sessions wait for a lock."""

    def ask() -> bool:
        with psycopg.connect(database) as connection:
            query = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
            return len(connection.execute(query).fetchall()) == count

    return ask


@pytest.fixture
def proxy(database: str, store: EventStore, tmp_path: Path) -> Iterator[CuttingProxy]:
    with CuttingProxy(database, tmp_path) as proxy:
        yield proxy


@pytest.mark.essential
@pytest.mark.parametrize("cut", [None, "answer", "request"])
def test_in_a_group_of_tasks_each_gets_its_own_end(
    database: str, proxy: CuttingProxy, monkeypatch: pytest.MonkeyPatch, cut: Literal["answer", "request"] | None
) -> None:
    ledger, known, held = Ledger(), event("known", event_id=uuid4()), UUID(int=1)
    stream, mine = streams_of(2)
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute("ALTER TABLE hindsight.events ADD CONSTRAINT no_such CHECK (event_name <> 'forbidden')")
    writes = {
        "fine": StreamWrite(mine, [event("fine")], ANY),
        "cancelled in the queue": StreamWrite(mine, [event("taken back")], ANY),
        "late in the queue": StreamWrite(mine, [event("taken back in time")], ANY),
        "conflict": StreamWrite(stream, [event("conflict")], 7),
        "cancelled on its way": StreamWrite(mine, [event("cancelled on its way")], ANY),
        "late on its way": StreamWrite(mine, [event("late on its way")], ANY),
        "duplicate": StreamWrite(stream, [known], ANY),
        # Last to leave, and waits there: meanwhile the group is on its way.
        "holds the group up": StreamWrite(held, [event("holds up")], ANY),
        "fine too": StreamWrite(stream, [event("fine too")], ANY),
    }
    if cut is None:
        # It fails the whole group, and each goes alone then; as the cut does.
        writes["refused by the server"] = StreamWrite(mine, [NewEvent("forbidden", event("refused").data)], ANY)

    async def main() -> None:
        async with AsyncEventStore(proxy.conninfo) as store:
            first = await carry_out(store, ledger, "first", StreamWrite(stream, [known], ANY))
            with pytest.raises(TypeError):
                await store.append(mine, [object()], expected=ANY)
            tasks: dict[str, asyncio.Task[AppendResult]] = {}
            with locked_stream(database, held) as holder:
                async with lanes_taken(store, database, monkeypatch):
                    for name, write in writes.items():
                        call = store.transact([write]) if name == "duplicate" else carry_out(store, ledger, name, write)
                        late_s = 0.05 if name == "late in the queue" else 20.0
                        tasks[name] = asyncio.create_task(asyncio.wait_for(call, late_s))
                    await until(lambda: len(queue_of(store)) == len(writes))
                    tasks["cancelled in the queue"].cancel()
                    await until(lambda: len(queue_of(store)) == len(writes) - 2)
                    if cut is not None:
                        proxy.cut_next(cut, held=True)
                await until(waiting_for(database, 1))
                (group,) = (queue_of(store).led_by(leader) for leader in queue_of(store).leaders)
                assert len(group) == len(writes) - 2
                tasks["cancelled on its way"].cancel()
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await tasks["late on its way"]
                proxy.let_go()
                holder.rollback()
                answers = dict(zip(tasks, await asyncio.gather(*tasks.values(), return_exceptions=True), strict=True))
            if cut is not None:
                assert proxy.cut.is_set(), "nothing was cut: this run shows nothing"
            assert isinstance(answers["conflict"], ConcurrencyConflict)
            assert isinstance(answers["late in the queue"], TimeoutError)
            for name in ("cancelled in the queue", "cancelled on its way", "late on its way"):
                assert isinstance(answers[name], asyncio.CancelledError)
            duplicate = answers["duplicate"]
            assert isinstance(duplicate, AppendResult)
            assert (duplicate.cursor, duplicate.duplicate) == (first.cursor, True)
            for name in ("fine", "fine too", "holds the group up"):
                result = answers[name]
                assert isinstance(result, AppendResult), result
                assert not result.duplicate, "its caller appended it once"
            if cut is None:
                assert isinstance(answers["refused by the server"], psycopg.errors.CheckViolation)
            await until(lambda: all_are_back(store))

    run(main)
    tokens = [row.token for row in ledger.check(database)]
    assert not any("taken back" in token for token in tokens), "it was cancelled before it had left"


def end_connections(database: str) -> int:
    """How many there were, of those that a store has made."""
    with psycopg.connect(database, autocommit=True) as admin:
        query = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'hindsight_fast'"
        )
        return len(admin.execute(query).fetchall())


@pytest.mark.essential
@pytest.mark.parametrize("ending", [False, True])
def test_many_tasks_that_are_cancelled_or_late_or_cut_off_anywhere(
    database: str, store: EventStore, ending: bool
) -> None:
    """*ending*: the server ends all their connections now and then. Not by the proxy, which is a thread: to cancel a
    statement, libpq before 17 connects once more, and lets no other thread run meanwhile."""
    ledger, streams = Ledger(), streams_of(5)
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    counts = {"cancelled": 0, "late": 0, "ended": 0}

    def write_of(key: str) -> StreamWrite:
        expected = chance.choice([ANY, ANY, ANY, 3, 20])
        return StreamWrite(chance.choice(streams), [event(f"{key}/{n}") for n in range(chance.randint(1, 3))], expected)

    async def come(store: AsyncEventStore, key: str) -> None:
        late_s = chance.choice([20.0, 20.0, 20.0, chance.uniform(0.0, 0.01)])
        try:
            async with asyncio.timeout(late_s):
                await carry_out(store, ledger, key, write_of(key))
        except TimeoutError:
            counts["late"] += 1
        except ConcurrencyConflict:
            pass

    async def main() -> None:
        async with AsyncEventStore(database, pool_size=4) as store:
            for n in range(400 if SOAK else 40):
                tasks = [asyncio.create_task(come(store, f"{n}/{m}")) for m in range(chance.randint(1, 12))]
                for task in chance.sample(tasks, len(tasks) // 3):
                    for _ in range(chance.choice([0, 1, 2, 3, 5, 8, 20])):
                        await asyncio.sleep(0)
                    if chance.random() < 0.5:
                        await asyncio.sleep(chance.uniform(0, 0.005))
                    task.cancel()
                if ending and n % 4 == 0:
                    counts["ended"] += end_connections(database)
                for result in await asyncio.gather(*tasks, return_exceptions=True):
                    assert result is None or isinstance(result, asyncio.CancelledError), result
                    counts["cancelled"] += result is not None
            await until(lambda: not queue_of(store).leaders)
            await until(lambda: all_are_back(store))
            assert len(queue_of(store)) == 0

    run(main)
    assert counts["cancelled"] > 10
    assert counts["late"] > 3
    assert (counts["ended"] > 3) == ending
    assert ledger.errors().keys() <= {"CancelledError", "ConcurrencyConflict"}, ledger.messages()
    assert ledger.count("acknowledged") > 40
    ledger.check(database)


def test_a_store_that_was_busy_in_one_loop_is_as_good_as_new_in_the_next(database: str, store: EventStore) -> None:
    ledger, held, tasks_store = Ledger(), uuid4(), AsyncEventStore(database, pool_size=2)

    async def wait_for_a_locked_stream(name: str) -> None:
        async with tasks_store:
            with locked_stream(database, held) as holder:
                waiting = [
                    asyncio.create_task(carry_out(tasks_store, ledger, f"{name}/{n}", StreamWrite(held, [write], ANY)))
                    for n, write in enumerate(event(f"{name}/{m}") for m in range(4))
                ]
                # One of the two connections is for those who wait patiently: three tasks queue for it.
                await until(lambda: bool(tasks_store._appender._patient._waiters))
                holder.rollback()
            await asyncio.gather(*waiting)

    for name in ("first", "second"):
        run(lambda name=name: wait_for_a_locked_stream(name))  # type: ignore[misc]
    assert not ledger.errors()
    ledger.check(database)
