"""The edges of appending: wrong use that is refused before anything is asked, limits, and a store that has changed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg_pool import ConnectionPool, PoolTimeout

from hindsight_fast import (
    ANY,
    NO_STREAM,
    AppendOutcomeUnknown,
    AppendResult,
    ConcurrencyConflict,
    Cursor,
    EventEncodeError,
    EventStore,
    EventType,
    IdempotencyConflict,
    MalformedRow,
    NewEvent,
    SchemaError,
    StoreClosed,
    StreamWrite,
    Transaction,
    append_call,
    appending,
)
from hindsight_fast.append_call import Attempts
from hindsight_fast.append_request import AppendRequest
from hindsight_fast.writes import MOST_EVENTS

STREAM, OTHER, CAUSE = UUID(int=0xA1), UUID(int=0xA2), UUID(int=0xA3)


@dataclass(frozen=True)
class Paid:
    at: datetime
    amount: float = 0.0


paid = EventType("paid", (Paid,))


def note(n: int = 0, **settings: Any) -> NewEvent:
    return NewEvent("noted", {"n": n}, **settings)


# --- Refused before anything is asked ---------------------------------------------------------------------------------


def raising_half_way() -> Iterator[NewEvent]:
    yield note()
    raise LookupError("no second one")


A_ID = uuid4()
# Each over a store, any of its methods that append; what is wrong must be found before a connection is.
MISUSES: dict[str, tuple[Callable[[EventStore], object], type[Exception], str]] = {
    "a naive datetime in a payload": (
        lambda s: s.append(STREAM, [Paid(datetime(2024, 1, 1))], expected=ANY),
        EventEncodeError,
        "without a time zone",
    ),
    "a naive created_at": (
        lambda s: s.append(STREAM, [note(created_at=datetime(2024, 1, 1))], expected=ANY),
        ValueError,
        "must carry a time zone",
    ),
    "not a number": (
        lambda s: s.append(STREAM, [Paid(datetime.now().astimezone(), float("nan"))], expected=ANY),
        EventEncodeError,
        r"\$\.amount",
    ),
    "a bool as a version": (lambda s: s.append(STREAM, [note()], expected=True), TypeError, "not bool"),
    "a negative version": (lambda s: s.append(STREAM, [note()], expected=-1), ValueError, "counts from 0"),
    "a version too large": (lambda s: s.append(STREAM, [note()], expected=2**63), ValueError, "exceeds"),
    "an object of no event type": (lambda s: s.append(STREAM, [object()], expected=ANY), TypeError, "no event type"),
    "a dict among the events": (lambda s: s.append(STREAM, [{"n": 1}], expected=ANY), TypeError, "a dict is appended"),
    "text for events": (lambda s: s.append(STREAM, "", expected=ANY), TypeError, "a list of events, not a str"),
    "a payload for events": (lambda s: s.append(STREAM, {}, expected=ANY), TypeError, "a list of events, not a dict"),
    "one event for events": (
        lambda s: s.append(STREAM, note(), expected=ANY),  # type: ignore[arg-type]
        TypeError,
        "not iterable",
    ),
    "events that end in an error": (
        lambda s: s.append(STREAM, raising_half_way(), expected=ANY),
        LookupError,
        "second",
    ),
    "a stream by its name": (
        lambda s: s.append("order", [note()], expected=ANY),  # type: ignore[arg-type]
        TypeError,
        "stream_uuid",
    ),
    "a cause by its name": (
        lambda s: s.append(STREAM, [note()], expected=ANY, correlation_id="c"),  # type: ignore[arg-type]
        TypeError,
        "correlation_id must be a UUID",
    ),
    "a cause by its name, in an update": (
        lambda s: s.update_stream(STREAM, lambda events: [note()], correlation_id="c"),  # type: ignore[arg-type]
        TypeError,
        "correlation_id must be a UUID",
    ),
    "no attempts": (lambda s: s.update_stream(STREAM, lambda events: [note()], attempts=0), ValueError, "attempts"),
    "a stream twice": (
        lambda s: s.transact([StreamWrite(STREAM, [note()], ANY), StreamWrite(STREAM, [note()], ANY)]),
        ValueError,
        "listed twice",
    ),
    "an id twice": (
        lambda s: s.append(STREAM, [note(event_id=A_ID), note(1, event_id=A_ID)], expected=ANY),
        ValueError,
        f"{A_ID} stands twice",
    ),
    "an id twice in two streams": (
        lambda s: s.transact([StreamWrite(each, [note(event_id=A_ID)], ANY) for each in (STREAM, OTHER)]),
        ValueError,
        f"{A_ID} stands twice",
    ),
    "events instead of writes": (
        lambda s: s.transact([note()]),  # type: ignore[list-item]
        TypeError,
        "made of StreamWrites",
    ),
    "too many events": (
        lambda s: s.append(STREAM, [note()] * (MOST_EVENTS + 1), expected=ANY),
        ValueError,
        "more than 1000000 events in one append: import them",
    ),
    "too many events in all": (
        lambda s: s.transact([StreamWrite(each, [note()] * (MOST_EVENTS // 2 + 1), ANY) for each in (STREAM, OTHER)]),
        ValueError,
        "more than 1000000 events in one append: import them",
    ),
    "a connection that is none": (
        lambda s: s.append(STREAM, [note()], expected=ANY, connection="c"),  # type: ignore[arg-type]
        TypeError,
        "connection must be the raw psycopg Connection, not str",
    ),
}


@pytest.fixture
def exhausted(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[EventStore]:
    """A store whose only connection somebody else has: whatever asks for one fails with a PoolTimeout."""
    with ConnectionPool(database, min_size=1, max_size=1, open=True, kwargs={"autocommit": True}) as pool:
        with EventStore(pool=pool, event_types=[paid]) as store, pool.connection():
            # Impatient only from here on: while it was opened, a pause of the machine would have been an error.
            monkeypatch.setattr(store, "_timeout", 0.05)
            monkeypatch.setattr(store._appender, "_timeout_s", 0.05)
            yield store


@pytest.mark.parametrize(("misuse", "error", "message"), MISUSES.values(), ids=MISUSES)
def test_wrong_use_is_refused_before_a_connection_is_asked_for(
    exhausted: EventStore, misuse: Callable[[EventStore], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        misuse(exhausted)


def test_right_use_asks_for_a_connection(exhausted: EventStore) -> None:
    for use in (
        lambda: exhausted.append(STREAM, [note()], expected=ANY),
        lambda: exhausted.append(STREAM, [], expected=ANY),
        lambda: exhausted.update_stream(STREAM, lambda events: [note()]),
    ):
        with pytest.raises(PoolTimeout):
            use()


# What an append is made of is looked at before the store is; over what it is to go, behind that.
MISUSES_OF_A_CLOSED_STORE = {name: each for name, each in MISUSES.items() if name != "a connection that is none"}


@pytest.mark.parametrize(
    ("misuse", "error", "message"), MISUSES_OF_A_CLOSED_STORE.values(), ids=MISUSES_OF_A_CLOSED_STORE
)
def test_wrong_use_of_a_closed_store_is_still_named(
    misuse: Callable[[EventStore], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        misuse(EventStore("host=/nonexistent", event_types=[paid]))


def test_a_closed_store_appends_nothing() -> None:
    for group_commit in (True, False):
        store = EventStore("host=/nonexistent", group_commit=group_commit)
        with pytest.raises(StoreClosed):
            store.append(STREAM, [note()], expected=ANY)


def test_an_id_that_stands_twice_at_the_end_of_many_is_found_at_once() -> None:
    """Looking at each id's count took the square of their number."""
    last = uuid4()
    events = [note()] * 100_000 + [note(event_id=last)] * 2
    began = time.monotonic()
    with pytest.raises(ValueError, match=f"{last} stands twice"):
        AppendRequest((StreamWrite(STREAM, events, ANY),), lambda given: given, None)
    assert time.monotonic() - began < 20


# --- Limits -----------------------------------------------------------------------------------------------------------


def test_an_append_of_many_streams_and_events(store: EventStore) -> None:
    writes = [
        StreamWrite(UUID(int=n * 7919 % 1_000 << 64 | n), [note(n)] * (n % 4), (NO_STREAM, ANY)[n % 2])
        for n in range(1_000)
    ]
    result = store.transact(Transaction(writes))
    assert len(result.event_ids) == 1_500
    read = list(store.read())
    assert [event.event_id for event in read] == list(result.event_ids)
    assert [event.cursor.sequence_no for event in read] == list(range(1_500))
    assert result.stream_versions == {write.stream_id: len(write.events) - 1 for write in writes if write.events}
    with pytest.raises(ConcurrencyConflict) as caught:
        store.transact(writes)
    # All of them are told, of those with something to expect and something there.
    assert len(caught.value.mismatches) == sum(bool(w.events) and w.expected is NO_STREAM for w in writes)


@pytest.mark.parametrize("size", [append_call.COPY_FROM_BYTES // 2, 2 * append_call.COPY_FROM_BYTES])
def test_a_large_payload_comes_back_byte_for_byte(store: EventStore, size: int) -> None:
    data = b'{"text": "' + b"\xc3\xa4 " * (size // 3) + b'"}'
    result = store.append(STREAM, [NewEvent("large", data, event_id=A_ID), note()], expected=NO_STREAM)
    assert result.stream_versions == {STREAM: 1}
    large, _ = store.read_stream(STREAM)
    assert large.data == data
    again = store.append(STREAM, [NewEvent("large", data, event_id=A_ID)], expected=NO_STREAM)
    assert again.duplicate
    assert again.cursor == large.cursor


def test_a_payload_beyond_a_gigabyte_is_refused_before_anything_is_asked() -> None:
    if not os.environ.get("HINDSIGHT_SOAK"):
        pytest.skip("takes some gigabytes of memory: set HINDSIGHT_SOAK")
    event = NewEvent("large", b'{"text": "' + b"x" * 2**30 + b'"}')
    with pytest.raises(ValueError, match="below 1 GiB"):
        EventStore("host=/nonexistent").append(STREAM, [event], expected=ANY)


def test_a_copy_holds_its_events_once(monkeypatch: pytest.MonkeyPatch, store: EventStore) -> None:
    """What goes by COPY is encoded, and not put into parameters beside that."""
    seen: list[int] = []
    group = append_call.Group

    def watched(requests: Any, **settings: Any) -> Any:
        made = group(requests, **settings)
        seen.append(sum(len(each) for each in made.parameters if each is not None))
        return made

    monkeypatch.setattr(append_call, "Group", watched)
    store.append(STREAM, [NewEvent("large", b'{"text": "' + b"x" * 100_000 + b'"}')] * 200, expected=NO_STREAM)
    assert store.stream_version(STREAM) == 199
    assert len(seen) == 1
    assert seen[0] < 1_000


# --- A store that has changed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_commit", [True, False])
def test_a_store_that_was_filled_meanwhile_is_appended_to(database: str, group_commit: bool) -> None:
    with EventStore(database, group_commit=group_commit) as store, EventStore(database) as other:
        store.create_schema()
        store.append(STREAM, [], expected=NO_STREAM)
        other.import_events([b'{"stream":"a","type":"x","data":{}}\n'], import_id="i", mode="initial")
        assert store.append(STREAM, [note()], expected=NO_STREAM).stream_versions == {STREAM: 0}


def test_a_changed_store_is_asked_anew_after_an_append_over_the_callers_connection(
    store: EventStore, connection: psycopg.Connection[Any]
) -> None:
    store.append(STREAM, [note()], expected=ANY, connection=connection)
    connection.execute("UPDATE hindsight.store_meta SET generation = generation + 1")
    with pytest.raises(SchemaError, match="generation"):
        store.append(STREAM, [note()], expected=ANY, connection=connection)
    assert store.append(STREAM, [note()], expected=0, connection=connection).stream_versions == {STREAM: 1}


def test_two_stores_share_a_pool(database: str) -> None:
    """And its connections, on which each prepares its calls."""
    with ConnectionPool(database, min_size=1, max_size=1, open=True) as pool:
        long_name = "a" * 60
        stores = [EventStore(pool=pool, schema=schema).open() for schema in ("hindsight", "hindsight", long_name + "b")]
        stores.append(EventStore(pool=pool, schema=long_name + "c").open())
        for store in stores:
            store.create_schema()
        for n in range(3):
            for store in stores:
                store.append(STREAM, [note(n)], expected=ANY)
                store.append(STREAM, [note(n), note(n)], expected=ANY)
        assert [store.stream_version(STREAM) for store in stores] == [17, 17, 8, 8]


def test_a_call_that_the_session_has_forgotten_is_prepared_again(database: str) -> None:
    with ConnectionPool(database, min_size=1, max_size=1, open=True) as pool, EventStore(pool=pool) as store:
        store.create_schema()
        for _ in range(3):
            store.append(STREAM, [note()], expected=ANY)
            with pool.connection() as connection:
                connection.execute("DEALLOCATE ALL")
        assert store.stream_version(STREAM) == 2


# --- update_stream ----------------------------------------------------------------------------------------------------


def test_an_update_is_decided_anew_until_nobody_comes_in_between(store: EventStore) -> None:
    decided_on: list[int] = []

    def decide(events: Any) -> list[NewEvent]:
        decided_on.append(len(events))
        if len(decided_on) < 5:
            store.append(STREAM, [note()], expected=ANY)
        return [note(len(events))]

    result = store.update_stream(STREAM, decide)
    assert decided_on == [0, 1, 2, 3, 4]
    assert result.stream_versions == {STREAM: 4}


def test_an_update_that_is_always_overtaken_ends_in_the_last_conflict(store: EventStore) -> None:
    def decide(events: Any) -> list[NewEvent]:
        store.append(STREAM, [note()], expected=ANY)
        return [note(99)]

    with pytest.raises(ConcurrencyConflict) as caught:
        store.update_stream(STREAM, decide, attempts=3)
    (mismatch,) = caught.value.mismatches
    assert (mismatch.expected, mismatch.actual_version) == (1, 2)
    assert [event.payload["n"] for event in store.read_stream(STREAM)] == [0, 0, 0]


def test_an_update_that_decides_on_nothing_writes_nothing(store: EventStore) -> None:
    assert store.update_stream(STREAM, lambda events: []) == AppendResult(None)
    assert store.stream_version(STREAM) is None
    assert store.load_stream(STREAM).expected is NO_STREAM
    assert store.head() in (None, Cursor(0, 0))


# --- What becomes of an append that failed ----------------------------------------------------------------------------


def attempts(*, in_doubt: bool, timeout_s: float) -> Attempts:
    request = AppendRequest((StreamWrite(STREAM, [note(), note(1, event_id=A_ID)], 3),), lambda given: given, OTHER)
    request.in_doubt = in_doubt
    return Attempts(request, timeout_s)


def of_server(sqlstate: str) -> SchemaError:
    """A refusal as it comes from the server, which has its own error as cause."""
    error = SchemaError("refused", schema="hindsight")
    error.__cause__ = type("Refusal", (psycopg.DatabaseError,), {"sqlstate": sqlstate})()
    return error


NO_ANSWERS: dict[str, Exception] = {
    "connection lost": psycopg.OperationalError(),
    "no connection": PoolTimeout(),
    "locked": psycopg.errors.LockNotAvailable(),
    "deadlock": psycopg.errors.DeadlockDetected(),
    "canceled": psycopg.errors.QueryCanceled(),
    "an import is under way": of_server("HS011"),
    "closed": StoreClosed(),
}
ANSWERS: dict[str, Exception] = {
    "conflict": ConcurrencyConflict([]),
    "known ids": IdempotencyConflict("other data", [A_ID]),
    "refused data": psycopg.errors.CheckViolation(),
    "interrupted by a bug": ZeroDivisionError(),
}


@pytest.mark.parametrize("error", NO_ANSWERS.values(), ids=NO_ANSWERS)
def test_who_cannot_say_what_became_of_an_append_in_doubt_says_so(error: Exception) -> None:
    with pytest.raises(AppendOutcomeUnknown) as caught:
        attempts(in_doubt=True, timeout_s=0.0).after(error)
    assert caught.value.__cause__ is error
    assert caught.value.correlation_id == OTHER
    (write,) = caught.value.writes
    assert (write.stream_id, write.expected, [event.data for event in write.events]) == (
        STREAM,
        3,
        [note().data, note(1).data],
    )
    drawn, given = (event.event_id for event in write.events)
    assert drawn is not None
    assert given == A_ID
    with pytest.raises(type(error)):
        attempts(in_doubt=False, timeout_s=0.0).after(error)


@pytest.mark.parametrize("error", ANSWERS.values(), ids=ANSWERS)
def test_an_answer_is_passed_on_whatever_was_in_doubt(error: Exception) -> None:
    for in_doubt in (True, False):
        with pytest.raises(type(error)):
            attempts(in_doubt=in_doubt, timeout_s=60.0).after(error)


def test_what_may_go_away_is_waited_for() -> None:
    for name in ("connection lost", "no connection", "locked", "deadlock", "canceled"):
        assert 0.0 <= attempts(in_doubt=True, timeout_s=60.0).after(NO_ANSWERS[name]) <= 1.0
    for name in ("locked", "deadlock"):
        assert 0.0 <= attempts(in_doubt=False, timeout_s=60.0).after(NO_ANSWERS[name]) <= 1.0


def test_a_changed_store_is_asked_anew_once() -> None:
    for in_doubt, error in ((False, SchemaError), (True, AppendOutcomeUnknown)):
        for sqlstate in ("HS001", "HS002", "HS012"):
            attempt = attempts(in_doubt=in_doubt, timeout_s=60.0)
            assert attempt.after(of_server(sqlstate)) == 0.0
            assert attempt.advance_sequence
            with pytest.raises(error):
                attempt.after(of_server(sqlstate))


def test_a_stream_that_was_only_looked_at_is_not_created(
    store: EventStore, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for copy_from_bytes in (append_call.COPY_FROM_BYTES, 1):
        monkeypatch.setattr(append_call, "COPY_FROM_BYTES", copy_from_bytes)
        monkeypatch.setattr(appending, "COPY_FROM_BYTES", copy_from_bytes)
        writes = [StreamWrite(OTHER, [], NO_STREAM), StreamWrite(STREAM, [note()], ANY), StreamWrite(CAUSE, [], ANY)]
        assert set(store.transact(writes).stream_versions) == {STREAM}
        assert connection.execute("SELECT stream_id FROM hindsight.stream_heads").fetchall() == [(STREAM,)]


@pytest.mark.parametrize("error", [MemoryError(), MalformedRow("an answer of another shape")], ids=repr)
def test_an_answer_that_was_lost_here_is_asked_for_again(
    store: EventStore, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    outcomes = append_call.Group.outcomes

    def once(self: Any, answer: bytes) -> Any:
        monkeypatch.setattr(append_call.Group, "outcomes", outcomes)
        raise error

    monkeypatch.setattr(append_call.Group, "outcomes", once)
    result = store.append(STREAM, [note()], expected=NO_STREAM)
    assert [event.event_id for event in store.read()] == list(result.event_ids)
    assert (result.stream_versions, result.duplicate) == ({STREAM: 0}, False)
