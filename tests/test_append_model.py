"""A store against its model, over histories that Hypothesis thinks of: whatever is appended, in whatever way, each
answer and all that is stored are the model's.

Each history has streams of its own, so that all of them share a database. It runs over a store with group commit, over
one without, over one that sends everything by COPY, and over an AsyncEventStore.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from append_model import (
    STREAM_COUNT,
    Accepted,
    Append,
    Conflict,
    EventPlan,
    IdConflict,
    PlainLog,
    Plan,
    event_plans,
    plans,
    seen,
    stored_in,
)
from hindsight_fast import (
    ANY,
    AppendResult,
    AsyncEventStore,
    ConcurrencyConflict,
    Cursor,
    EventEncodeError,
    EventStore,
    EventType,
    IdempotencyConflict,
    NewEvent,
    StreamHistory,
    StreamWrite,
    Transaction,
    append_call,
    appending,
    async_appending,
)
from hindsight_fast.writes import NO_STREAM

SOAK = bool(os.environ.get("HINDSIGHT_SOAK"))
REFUSED_BY_SERVER = "refused"
CAUSE = UUID(int=77)


@dataclass(frozen=True)
class Priced:
    price: float


priced = EventType("priced", (Priced,))


class StoreMachine(RuleBasedStateMachine):
    """One history. What all of them share is set by ``machine_over``."""

    store: EventStore
    rival: EventStore
    connection: psycopg.Connection[Any]
    lend: Callable[[], psycopg.Connection[Any]]
    takes_long: bool
    met: Counter[str]

    @initialize()
    def begin(self) -> None:
        self.log = PlainLog()
        self.streams = [uuid4() for _ in range(STREAM_COUNT)]
        self.earlier: list[Append] = []
        self.before = self.store.head() or Cursor.BEGINNING

    # Appending

    def carry_out(self, append: Append, log: PlainLog, *, as_transaction: bool = False, **settings: Any) -> None:
        """Append, and hold the answer against what the model says."""
        expected = log.outcome(append.writes, append.correlation_id)
        try:
            if len(append.writes) == 1 and not as_transaction:
                (write,) = append.writes
                outcome: object = self.store.append(
                    write.stream_id,
                    iter(write.events),
                    expected=write.expected,
                    correlation_id=append.correlation_id,
                    **settings,
                )
            else:
                writes = Transaction(append.writes) if as_transaction else iter(append.writes)
                outcome = self.store.transact(writes, correlation_id=append.correlation_id, **settings)
        except (ConcurrencyConflict, IdempotencyConflict) as error:
            outcome = error
        self.met[type(expected).__name__] += 1
        if isinstance(expected, Accepted) and len({bool(write.events) for write in append.writes}) == 2:
            self.met["accepted, with a stream only looked at"] += 1
        match expected:
            case Conflict(mismatches):
                assert isinstance(outcome, ConcurrencyConflict)
                assert outcome.mismatches == mismatches
            case IdConflict(event_ids):
                assert isinstance(outcome, IdempotencyConflict)
                assert outcome.event_ids == event_ids
            case Accepted():
                self.accept(append, outcome, log)
            case _:
                assert outcome == expected

    def accept(self, append: Append, outcome: object, log: PlainLog) -> None:
        assert isinstance(outcome, AppendResult)
        assert outcome.cursor is not None or not outcome.event_ids
        first = Cursor(0 if outcome.cursor is None else outcome.cursor.transaction_no, 0)
        assert outcome == log.accept(append.writes, append.correlation_id, outcome.event_ids, first)
        self.earlier.append(append.with_ids(outcome.event_ids))

    @rule(plan=plans, as_transaction=st.booleans())
    def append(self, plan: Plan, as_transaction: bool) -> None:
        self.carry_out(plan.append(self.log, self.streams, self.earlier), self.log, as_transaction=as_transaction)

    @precondition(lambda self: not isinstance(self.store, FromTasks))  # that takes connections of its own kind
    @rule(
        planned=st.lists(plans, min_size=1, max_size=4),
        ending=st.sampled_from(["commit", "rollback", "savepoint", "autocommit"]),
        kept=st.integers(0, 3),
    )
    def append_over_a_connection_of_the_callers(self, planned: list[Plan], ending: str, kept: int) -> None:
        connection = self.lend()
        connection.autocommit = ending == "autocommit"
        log = self.log.copy()
        stays = log
        for number, plan in enumerate(planned):
            if number == kept and ending == "savepoint":
                stays = log.copy()
                connection.execute("SAVEPOINT mine")
            self.carry_out(plan.append(log, self.streams, self.earlier), log, connection=connection)
            own = stored_in(connection, "hindsight", self.streams)
            assert own == (log.events, log.heads()), "what is appended is seen at once by its own transaction"
        if ending == "rollback":
            connection.rollback()
            stays = self.log
        elif ending == "savepoint" and len(planned) > kept:
            connection.execute("ROLLBACK TO mine")
            connection.commit()
        else:
            connection.commit()
            stays = log
        stays.last_cursor = log.last_cursor  # numbers of what was rolled back are used by nobody else
        self.log = stays

    @rule(
        stream=st.integers(0, STREAM_COUNT - 1), new=st.lists(event_plans, max_size=2), rivals=st.integers(0, 3),
        attempts=st.integers(1, 3),
    )  # fmt: skip
    def update_a_stream(self, stream: int, new: list[EventPlan], rivals: int, attempts: int) -> None:
        stream_id = self.streams[stream]
        appends: list[Append] = []

        def decide(events: Sequence[Any]) -> Iterator[NewEvent]:
            assert [seen(event) for event in events] == self.log.stream(stream_id)
            expected = len(events) - 1 if events else NO_STREAM
            appends.append(Append((StreamWrite(stream_id, [plan.event() for plan in new], expected),), CAUSE))
            if len(appends) <= rivals:
                between = Append((StreamWrite(stream_id, [NewEvent("rival", {})], ANY),))
                self.accept(between, self.rival.transact(between.writes), self.log)
            return iter(appends[-1].writes[0].events)

        try:
            outcome: object = self.store.update_stream(stream_id, decide, attempts=attempts, correlation_id=CAUSE)
        except ConcurrencyConflict as error:
            outcome = error
        if rivals < attempts:
            assert len(appends) == rivals + 1
            self.accept(appends[-1], outcome, self.log)
        else:
            assert len(appends) == attempts
            expected = self.log.outcome(appends[-1].writes, CAUSE)
            assert isinstance(expected, Conflict)
            assert isinstance(outcome, ConcurrencyConflict)
            assert outcome.mismatches == expected.mismatches

    # Failing

    @rule(plan=plans, what=st.sampled_from(["raises", "cannot be encoded", "server", "decide"]), at=st.integers(0, 2))
    def fail(self, plan: Plan, what: str, at: int) -> None:
        append = plan.append(self.log, self.streams, self.earlier)
        (*others, last) = append.writes

        def events() -> Iterator[Any]:
            yield from islice(last.events, at)
            if what == "raises":
                raise LookupError
            if what == "cannot be encoded":
                yield Priced(float("nan"))
            yield NewEvent(REFUSED_BY_SERVER, {"n": 1})

        def transact() -> None:
            self.store.transact([*others, StreamWrite(last.stream_id, events(), ANY)])

        if what == "server":
            known = isinstance(self.log.outcome([*others, StreamWrite(last.stream_id, [], ANY)], None), Accepted)
            ids = {each.event_id for each in self.log.events} & append.event_ids
            if not known or ids:
                return
            with pytest.raises(psycopg.errors.CheckViolation):
                transact()
            self.met["refused by the server"] += 1
        elif what == "decide":
            with pytest.raises(ZeroDivisionError):
                self.store.update_stream(last.stream_id, lambda _: [1 // 0])
        else:
            with pytest.raises(LookupError if what == "raises" else EventEncodeError):
                transact()

    @rule(plan=plans, stream=st.integers(0, STREAM_COUNT - 1))
    def fail_at_a_stream_that_somebody_keeps_locked(self, plan: Plan, stream: int) -> None:
        append = plan.append(self.log, self.streams, self.earlier)
        locked = append.writes[-1].stream_id
        with self.keeping_locked(locked):
            with pytest.raises(psycopg.errors.LockNotAvailable):
                self.store.transact(append.writes, correlation_id=append.correlation_id)
            self.met["locked"] += 1
            free = next(each for each in self.streams if each != locked)
            self.carry_out(Append((StreamWrite(free, [NewEvent("noted", {"n": 5})], ANY),)), self.log)

    @contextmanager
    def keeping_locked(self, stream_id: UUID) -> Iterator[None]:
        holder = self.lend()
        holder.autocommit = False
        holder.execute(
            "INSERT INTO hindsight.stream_heads VALUES (%s, 0)"
            " ON CONFLICT (stream_id) DO UPDATE SET stream_version = 0",
            (stream_id,),
        )
        try:
            yield
        finally:
            holder.rollback()

    # Reading

    @rule(
        names=st.none() | st.lists(st.sampled_from(["noted", "counted", "rival"])), limit=st.none() | st.integers(0, 9)
    )
    def read_the_log(self, names: list[str] | None, limit: int | None) -> None:
        expected = [event for event in self.log.events if names is None or event.name in names]
        read = self.store.read(after=self.before, event_types=names, limit=limit)
        assert [seen(event) for event in read] == expected[:limit]
        batches = list(self.store.read_batches(after=self.before, event_types=names, batch_size=limit or 1))
        assert [seen(event) for batch in batches for event in batch] == expected
        assert all(0 < len(batch) <= (limit or 1) for batch in batches)
        if self.log.events:
            assert self.store.head() == self.log.events[-1].cursor

    @rule(at=st.integers(0, 30), stream=st.none() | st.integers(0, STREAM_COUNT - 1), caused=st.booleans())
    def read_on(self, at: int, stream: int | None, caused: bool) -> None:
        after = self.log.events[at].cursor if at < len(self.log.events) else self.before
        stream_id = None if stream is None else self.streams[stream]
        expected = [
            event
            for event in self.log.events
            if event.cursor > after
            and stream_id in (None, event.stream_id)
            and (not caused or event.correlation_id == CAUSE)
        ]
        read = self.store.read(after=after, stream_id=stream_id, correlation_id=CAUSE if caused else None)
        assert [seen(event) for event in read] == expected

    @rule(
        stream=st.integers(0, STREAM_COUNT - 1), first=st.integers(0, 5), last=st.none() | st.integers(0, 9),
        backwards=st.booleans(), limit=st.none() | st.integers(0, 4),
    )  # fmt: skip
    def read_a_stream(self, stream: int, first: int, last: int | None, backwards: bool, limit: int | None) -> None:
        stream_id = self.streams[stream]
        everything = self.log.stream(stream_id)
        expected = everything[first : None if last is None else last + 1]
        read = self.store.read_stream(stream_id, from_version=first, to_version=last, backwards=backwards, limit=limit)
        assert [seen(event) for event in read] == (expected[::-1] if backwards else expected)[:limit]
        version = len(everything) - 1 if everything else None
        assert self.store.stream_version(stream_id) == version
        history = self.store.load_stream(stream_id)
        assert [seen(event) for event in history.events] == everything
        assert history == StreamHistory(history.events, version, NO_STREAM if version is None else version)

    @invariant()
    def the_tables_hold_what_the_model_holds(self) -> None:
        assert stored_in(self.connection, "hindsight", self.streams) == (self.log.events, self.log.heads())


class FromTasks:
    """An AsyncEventStore that is asked as an EventStore is, call by call."""

    def __init__(self, store: AsyncEventStore, runner: asyncio.Runner) -> None:
        self._store, self._runner = store, runner
        self._appender = store._appender

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def call(*arguments: Any, **settings: Any) -> Any:
            called = method(*arguments, **settings)
            return self._runner.run(_all_of(called) if isinstance(called, AsyncIterator) else called)

        return call


async def _all_of(events: AsyncIterator[Any]) -> list[Any]:
    return [event async for event in events]


@contextmanager
def open_store(way: str, conninfo: str) -> Iterator[Any]:
    if way != "from tasks":
        with EventStore(conninfo, event_types=[priced], group_commit=way != "alone") as store:
            yield store
        return
    with asyncio.Runner() as runner:
        store = AsyncEventStore(conninfo, event_types=[priced])
        runner.run(store.open())
        try:
            yield FromTasks(store, runner)
        finally:
            runner.run(store.close())


WAYS = ["in groups", "alone", "by copy", "from tasks"]


@pytest.fixture(params=WAYS)
def machine(
    request: pytest.FixtureRequest, database: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[type[StoreMachine]]:
    way = request.param
    for module in (appending, async_appending):
        monkeypatch.setattr(module, "GROUP_PATIENCE", "5ms")
        monkeypatch.setattr(module, "LONE_PATIENCE", "10ms")
    if way == "by copy":
        monkeypatch.setattr(appending, "COPY_FROM_BYTES", 1)
        monkeypatch.setattr(append_call, "COPY_FROM_BYTES", 1)
    lent: list[psycopg.Connection[Any]] = []

    def lend() -> psycopg.Connection[Any]:
        if not lent:
            lent.append(psycopg.connect(database))
        lent[0].rollback()
        return lent[0]

    with (
        open_store(way, database) as store,
        EventStore(database) as rival,
        psycopg.connect(database, autocommit=True) as connection,
    ):
        store.create_schema()
        # Whoever waits for a lock gives up soon; a connection may take its time.
        monkeypatch.setattr(store._appender, "_timeout_s", 0.02)
        connection.execute("ALTER TABLE hindsight.events ADD CONSTRAINT mine CHECK (event_name <> 'refused')")
        settings = {"store": store, "rival": rival, "connection": connection, "lend": staticmethod(lend)}
        settings["takes_long"] = way in ("by copy", "from tasks")
        settings["met"] = Counter()
        yield type("StoreMachine", (StoreMachine,), settings)
        for each in lent:
            each.close()


@pytest.mark.essential
def test_a_store_does_what_its_model_does(machine: type[StoreMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            # Ways that take long and share their decisions with the others think of less.
            max_examples=1_000 if SOAK else 12 if machine.takes_long else 25,
            stateful_step_count=50 if SOAK else 25,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
    # It has met what it is for.
    for kind in ("Accepted", "accepted, with a stream only looked at", "Conflict"):
        assert machine.met[kind] > 0, kind
    assert machine.met["AppendResult"] + machine.met["IdConflict"] > 0
