"""Appending to one stream, and reading typed payloads back."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from hindsight_fast import (
    ANY,
    NO_STREAM,
    STREAM_EXISTS,
    AppendResult,
    ConcurrencyConflict,
    Cursor,
    EventEncodeError,
    EventParseError,
    EventStore,
    EventType,
    HindsightError,
    NewEvent,
    SchemaError,
    VersionMismatch,
)

STREAM = UUID(int=0xABC)
CAUSE = UUID(int=0xDEF)
LONG_AGO = datetime(2001, 2, 3, 4, 5, 6, 789, tzinfo=timezone(timedelta(hours=-3)))


@dataclass(frozen=True, slots=True)
class PlacedV0:
    total: int


@dataclass(frozen=True, slots=True)
class Placed:
    total: Decimal
    currency: str


@dataclass(frozen=True, slots=True)
class Paid:
    at: datetime
    amounts: list[Decimal]


placed = EventType("placed", (PlacedV0, Placed), [lambda v0: Placed(Decimal(v0.total), "EUR")])
paid = EventType("paid", (Paid,))
TYPES = [placed, paid]


@pytest.fixture
def store(store_class: type[EventStore], database: str) -> Iterator[EventStore]:
    with store_class(database, event_types=TYPES) as store:
        store.create_schema()
        yield store


def note(n: int = 0, **settings: Any) -> NewEvent:
    return NewEvent("noted", {"n": n}, **settings)


def notes(store: EventStore, stream_id: UUID = STREAM) -> list[int]:
    return [event.payload["n"] for event in store.read_stream(stream_id)]


# --- What is written --------------------------------------------------------------------------------------------------


@pytest.mark.essential
def test_an_appended_event_is_read_back_with_all_it_was_given(store: EventStore) -> None:
    given_id = uuid4()
    new = [
        NewEvent("noted", b' {"n": 1.50} ', version=7, event_id=given_id, metadata={"by": "me"}, created_at=LONG_AGO),
        placed(Placed(Decimal("12.50"), "USD"), metadata={}),
        Paid(LONG_AGO, [Decimal("1E+2"), Decimal("-0.00")]),
    ]
    before = datetime.now(UTC) - timedelta(minutes=1)
    result = store.append(STREAM, new, expected=NO_STREAM, correlation_id=CAUSE)
    first, second, third = store.read_stream(STREAM)
    assert [event.event_id for event in (first, second, third)] == list(result.event_ids)
    assert result == AppendResult(third.cursor, {STREAM: third.cursor}, {STREAM: 2}, result.event_ids)
    assert (first.event_id, first.name, first.version, first.data) == (given_id, "noted", 7, b' {"n": 1.50} ')
    assert (first.created_at, first.metadata) == (LONG_AGO, {"by": "me"})
    assert first.created_at.utcoffset() == timedelta(0)
    assert (second.name, second.version, second.payload) == ("placed", 1, Placed(Decimal("12.50"), "USD"))
    assert second.metadata == {}
    assert (third.name, third.payload) == ("paid", Paid(LONG_AGO, [Decimal("1E+2"), Decimal("-0.00")]))
    assert third.metadata is None
    assert third.payload is third.payload
    for number, event in enumerate((first, second, third)):
        assert (event.stream_id, event.stream_version, event.correlation_id) == (STREAM, number, CAUSE)
    assert before < second.created_at == third.created_at < datetime.now(UTC) + timedelta(minutes=1)
    assert list(store.read()) == [first, second, third]
    assert list(store.read(event_types=[paid, "noted"])) == [first, third]
    assert list(store.read(correlation_id=CAUSE)) == [first, second, third]


def test_ids_that_are_drawn_rise(store: EventStore) -> None:
    ids = [event_id for n in range(3) for event_id in store.append(STREAM, [note(n)] * 100, expected=ANY).event_ids]
    assert ids == sorted(set(ids))
    assert {event_id.version for event_id in ids} == {7}
    assert [event.event_id for event in store.read()] == ids


def test_an_append_of_nothing_is_checked_and_writes_nothing(store: EventStore) -> None:
    assert store.append(STREAM, [], expected=NO_STREAM) == AppendResult(None)
    with pytest.raises(ConcurrencyConflict):
        store.append(STREAM, [], expected=STREAM_EXISTS)
    assert store.stream_version(STREAM) is None
    store.append(STREAM, [note()], expected=ANY)
    assert store.append(STREAM, [], expected=0).cursor is None
    assert len(list(store.read())) == 1


# --- What is expected of the stream -----------------------------------------------------------------------------------


@pytest.mark.essential
def test_every_expectation_is_compared_with_what_is_there(store: EventStore) -> None:
    elsewhere = store.append(uuid4(), [note()], expected=ANY).cursor
    assert elsewhere is not None
    for empty in (True, False):
        if not empty:
            store.append(STREAM, [note(0), note(1)], expected=NO_STREAM)
        last = None if empty else store.append(STREAM, [note(2)], expected=1).cursor
        version = None if empty else 2
        wrong = [0, 1, 3, elsewhere, Cursor(2**40, 0), STREAM_EXISTS if empty else NO_STREAM]
        wrong += [] if empty or last is None else [Cursor(last.transaction_no, last.sequence_no + 1)]
        for expected in wrong:
            with pytest.raises(ConcurrencyConflict) as caught:
                store.append(STREAM, [note(9)], expected=expected)
            assert caught.value.mismatches == (VersionMismatch(STREAM, expected, version, last),)
            again = pickle.loads(pickle.dumps(caught.value))
            assert (again.mismatches, str(again)) == (caught.value.mismatches, str(caught.value))
        assert notes(store) == ([] if empty else [0, 1, 2])
        assert store.stream_version(STREAM) == version
    version = 2
    for expected in (2, ANY, STREAM_EXISTS):
        version += 1
        assert store.append(STREAM, [note(version)], expected=expected).stream_versions == {STREAM: version}
    last = store.append(STREAM, [note(version + 1)], expected=ANY).cursor
    assert last is not None
    store.append(STREAM, [note(version + 2)], expected=last)
    assert notes(store) == list(range(version + 3))


def test_a_conflict_says_what_was_found() -> None:
    conflict = ConcurrencyConflict(
        [VersionMismatch(STREAM, 3, 4, Cursor(8, 1)), VersionMismatch(CAUSE, ANY, None, None)]
    )
    assert str(conflict) == (
        f"stream {STREAM}: expected 3, found version 4 at 8:1; stream {CAUSE}: expected ANY, found no events"
    )


# --- All or nothing ---------------------------------------------------------------------------------------------------


def test_an_iterator_that_raises_half_way_leaves_nothing(store: EventStore) -> None:
    def half() -> Iterator[NewEvent]:
        yield note(0)
        raise LookupError("no second one")

    with pytest.raises(LookupError):
        store.append(STREAM, half(), expected=ANY)
    assert (list(store.read()), store.stream_version(STREAM), store.head()) == ([], None, None)
    assert store.append(STREAM, (note(n) for n in range(3)), expected=NO_STREAM).stream_versions == {STREAM: 2}


def test_one_event_that_cannot_be_stored_leaves_nothing(store: EventStore) -> None:
    naive = Paid(datetime(2024, 1, 1), [])
    with pytest.raises(
        EventEncodeError, match=r"event 'paid' version 0 cannot be stored: \$\.at is a datetime without"
    ):
        store.append(STREAM, [note(0), naive], expected=ANY)
    assert (list(store.read()), store.stream_version(STREAM)) == ([], None)


def test_an_id_given_twice_leaves_nothing(store: EventStore) -> None:
    event_id = uuid4()
    twice = [note(0, event_id=event_id), note(1, event_id=event_id)]
    with pytest.raises((psycopg.errors.UniqueViolation, HindsightError, ValueError)):
        store.append(STREAM, twice, expected=ANY)
    assert (list(store.read()), store.stream_version(STREAM)) == ([], None)
    assert store.append(STREAM, twice[:1], expected=NO_STREAM).event_ids == (event_id,)


def test_a_store_goes_on_after_refusals(store: EventStore) -> None:
    for _ in range(30):  # more often than the pool has connections
        with pytest.raises(ConcurrencyConflict):
            store.append(STREAM, [note()], expected=5)
    assert store.append(STREAM, [note()], expected=NO_STREAM).stream_versions == {STREAM: 0}


# --- Before anything is asked -----------------------------------------------------------------------------------------

unopened = EventStore("host=/nonexistent", event_types=TYPES)

MISUSES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "stream": (lambda: unopened.append("s", [], expected=ANY), TypeError, "stream_id"),  # type: ignore[arg-type]
    "bool": (lambda: unopened.append(STREAM, [], expected=True), TypeError, "a version or a Cursor, not bool"),
    "text": (lambda: unopened.append(STREAM, [], expected="any"), TypeError, "not str"),  # type: ignore[arg-type]
    "None": (lambda: unopened.append(STREAM, [], expected=None), TypeError, "not NoneType"),  # type: ignore[arg-type]
    "negative": (lambda: unopened.append(STREAM, [], expected=-1), ValueError, "counts from 0: -1 is none"),
    "cause": (
        lambda: unopened.append(STREAM, [], expected=ANY, correlation_id="c"),  # type: ignore[arg-type]
        TypeError,
        "correlation_id",
    ),
    "naive": (lambda: unopened.append(STREAM, [Paid(datetime(2024, 1, 1), [])], expected=ANY), ValueError, "time zone"),
    "dict": (lambda: unopened.append(STREAM, [{"n": 1}], expected=ANY), TypeError, "a dict is appended through"),
    "older": (lambda: unopened.append(STREAM, [PlacedV0(1)], expected=ANY), TypeError, "append its latest, Placed"),
    "unknown": (lambda: unopened.append(STREAM, [object()], expected=ANY), TypeError, "the class of no event type"),
    "class": (lambda: unopened.append(STREAM, [Paid], expected=ANY), TypeError, "type is the class of no event type"),
}


@pytest.mark.parametrize(("misuse", "error", "message"), MISUSES.values(), ids=MISUSES)
def test_wrong_use_is_refused_before_anything_is_asked(
    misuse: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        misuse()


def test_without_a_schema_the_way_to_one_is_named(database: str) -> None:
    with EventStore(database) as store, pytest.raises(SchemaError, match="create_schema"):
        store.append(STREAM, [note()], expected=ANY)


# --- Reading by types -------------------------------------------------------------------------------------------------


def test_what_was_stored_long_ago_reads_as_the_latest_version(store: EventStore) -> None:
    store.append(STREAM, [NewEvent("placed", {"total": 12}), Placed(Decimal("3.50"), "USD")], expected=ANY)
    old, new = store.read()
    assert (old.version, old.data, old.payload) == (0, b'{"total":12}', Placed(Decimal(12), "EUR"))
    assert (new.version, new.payload) == (1, Placed(Decimal("3.50"), "USD"))


def test_an_event_of_no_registered_type_reads_as_a_dict(store: EventStore) -> None:
    store.append(STREAM, [NewEvent("heard", {"n": 2**70, "f": 1.0}, version=9)], expected=ANY)
    (event,) = store.read()
    assert event.payload == {"n": 2**70, "f": 1.0}
    assert type(event.payload["n"]) is int


UNREADABLE = {
    "unknown version": (
        NewEvent("placed", {"total": 1}, version=2),
        None,
        "this program knows versions up to 1 only: a newer one has written it",
    ),
    "another shape": (
        NewEvent("paid", {"at": "2024-01-01T00:00:00Z", "amounts": ["1", "x"]}),
        "$.amounts[1]",
        "Invalid decimal string",
    ),
    "a field missing": (
        NewEvent("placed", {"total": "1"}, version=1),
        None,
        "Object missing required field `currency`",
    ),
}


@pytest.mark.essential
@pytest.mark.parametrize(("stored", "path", "reason"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_carries_all_that_is_known_of_its_event(
    store: EventStore, stored: NewEvent, path: str | None, reason: str
) -> None:
    store.append(STREAM, [note(0), stored, note(2)], expected=ANY, correlation_id=CAUSE)
    before, event, after = store.read()
    with pytest.raises(EventParseError) as caught:
        _ = event.payload
    error = pickle.loads(pickle.dumps(caught.value))
    for attribute in (
        "cursor",
        "event_id",
        "stream_id",
        "stream_version",
        "correlation_id",
        "created_at",
        "name",
        "version",
    ):
        assert getattr(error, attribute) == getattr(event, attribute), attribute
    assert (error.path, error.reason) == (path, reason)
    place = "" if path is None else f" (at {path})"
    assert str(error) == (
        f"event {event.event_id} at {event.cursor} ({stored.name!r} version {stored.version}, number 1 of stream"
        f" {STREAM}) cannot be decoded: {reason}{place}"
    )
    # Everything else about it, and everything around it, can be read.
    assert (event.data, before.payload, after.payload) == (stored.data, {"n": 0}, {"n": 2})
    with pytest.raises(EventParseError):
        _ = event.payload  # the same each time
