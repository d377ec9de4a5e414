"""Groups of appends in one call, against the model that carries their requests out one after the other.

Each example has streams of its own in one database, so that thousands of groups take seconds. The same requests go one
by one through a store in a second schema: what a group does must not be told from that.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from append_model import (
    STREAM_COUNT,
    Accepted,
    Append,
    Conflict,
    EventPlan,
    IdConflict,
    NewPlan,
    PlainLog,
    Plan,
    RepeatPlan,
    WritePlan,
    plans,
    stored_in,
)
from hindsight_fast import (
    ANY,
    NO_STREAM,
    AppendResult,
    ConcurrencyConflict,
    Cursor,
    EventStore,
    IdempotencyConflict,
    NewEvent,
    StreamWrite,
)
from hindsight_fast.append_call import AppendCall
from hindsight_fast.append_request import AppendRequest, KnownIds, Outcome
from hindsight_fast.statements import Statements

SOAK = bool(os.environ.get("HINDSIGHT_SOAK"))
STREAM, OTHER = UUID(int=0xA1), UUID(int=0xA2)


def request_of(append: Append) -> AppendRequest:
    return AppendRequest(append.writes, lambda given: given, append.correlation_id)


class Groups:
    """Sends groups over one connection, as a store does."""

    def __init__(self, connection: psycopg.Connection[Any], schema: str = "hindsight") -> None:
        self.connection = connection
        self.call = AppendCall(Statements(schema))
        self.outcomes: Counter[type] = Counter()

    def send(self, requests: Sequence[AppendRequest], **bounds: Any) -> list[Outcome]:
        return self.connection.wait(self.call.group(self.connection, requests, 0, **bounds))


@pytest.fixture
def groups(store: EventStore, connection: psycopg.Connection[Any]) -> Groups:
    return Groups(connection)


@pytest.fixture
def second(database: str) -> Iterator[EventStore]:
    with EventStore(database, schema="second") as store:
        store.create_schema()
        yield store


def carry_out(
    groups: Groups, log: PlainLog, appends: Sequence[Append], *, look_up: Sequence[bool] = ()
) -> list[AppendRequest]:
    """Send *appends* as one group and hold each outcome against the model, which takes them one by one."""
    requests = [request_of(append) for append in appends]
    for request, forced in zip(requests, look_up, strict=False):
        request.look_up = request.look_up or forced  # as for one whose connection was lost
    outcomes = groups.send(requests)
    assert len(outcomes) == len(requests)
    number, sequence_no = None, 0
    for append, request, outcome in zip(appends, requests, outcomes, strict=True):
        expected = log.outcome(append.writes, append.correlation_id)
        groups.outcomes[type(expected)] += 1
        match expected:
            case Conflict(mismatches):
                assert isinstance(outcome, ConcurrencyConflict)
                assert outcome.mismatches == mismatches
            case Accepted():
                assert isinstance(outcome, AppendResult)
                first = Cursor(0, 0)
                if outcome.cursor is not None:
                    assert number in (None, outcome.cursor.transaction_no), "a group has one number"
                    number = outcome.cursor.transaction_no
                    first = Cursor(number, sequence_no)
                    sequence_no += len(request.events)
                assert outcome == log.accept(append.writes, append.correlation_id, request.event_ids, first)
            case IdConflict() | AppendResult():
                assert isinstance(outcome, KnownIds)
    return requests


def carry_out_alone(store: EventStore, log: PlainLog, append: Append) -> None:
    expected = log.outcome(append.writes, append.correlation_id)
    try:
        outcome: object = store.transact(append.writes, correlation_id=append.correlation_id)
    except (ConcurrencyConflict, IdempotencyConflict) as error:
        outcome = error
    match expected:
        case Conflict(mismatches):
            assert isinstance(outcome, ConcurrencyConflict)
            assert outcome.mismatches == mismatches
        case IdConflict(event_ids):
            assert isinstance(outcome, IdempotencyConflict)
            assert outcome.event_ids == event_ids
        case Accepted():
            assert isinstance(outcome, AppendResult)
            first = Cursor(0 if outcome.cursor is None else outcome.cursor.transaction_no, 0)
            assert outcome == log.accept(append.writes, append.correlation_id, outcome.event_ids, first)
        case _:
            assert outcome == expected


def translated(append: Append, log: PlainLog, other: PlainLog) -> Append:
    """The same append for a second store, which has the same events elsewhere."""
    place = {mine.cursor: theirs.cursor for mine, theirs in zip(log.events, other.events, strict=True)}
    return Append(
        tuple(
            StreamWrite(write.stream_id, write.events, place.get(write.expected, write.expected))
            if isinstance(write.expected, Cursor)
            else write
            for write in append.writes
        ),
        append.correlation_id,
    )


def contents(log: PlainLog) -> list[tuple[Any, ...]]:
    return [(e.event_id, e.stream_id, e.stream_version, e.name, e.version, e.data, e.metadata) for e in log.events]


def one(stream: int, *events: int, expected: Any = ANY) -> NewPlan:
    return NewPlan((WritePlan(stream, tuple(EventPlan(n) for n in events), expected),))


ACCEPTED_AND_REFUSED = [[one(0, 1, expected=NO_STREAM), one(0, 2, expected=NO_STREAM), one(0, 3, expected=0)]]
KNOWN_BEFORE_EXPECTATIONS = [[one(0, 1)], [RepeatPlan(0), one(0, expected=0), one(1, expected=NO_STREAM)]]
LOOKED_AT = [[one(0, 1, 2, expected=("cursor", 0)), one(0), one(0, 3, expected=NO_STREAM), one(0, 4)]]
REFUSED_FIRST = [[one(1, expected=0), one(0, 1), one(1, expected=NO_STREAM)]]
planned_groups = st.lists(st.lists(plans, min_size=1, max_size=6), min_size=1, max_size=5)


def apart(appends: list[Append]) -> Iterator[list[Append]]:
    """Requests that share an id never share a group: the rest waits, as it does in a GroupQueue."""
    while appends:
        ids: set[UUID] = set()
        group = []
        while appends and ids.isdisjoint(appends[0].event_ids):
            ids |= appends[0].event_ids
            group.append(appends.pop(0))
        yield group


def carry_out_plans(groups: Groups, planned: list[list[Plan]], look_up: list[bool], second: EventStore | None) -> None:
    log, log_of_second = PlainLog(), PlainLog()
    streams = [uuid4() for _ in range(STREAM_COUNT)]
    earlier: list[Append] = []
    for group_plan in planned:
        for group in apart([plan.append(log, streams, earlier) for plan in group_plan]):
            in_second = [] if second is None else [translated(append, log, log_of_second) for append in group]
            requests = carry_out(groups, log, group, look_up=look_up)
            earlier += [append.with_ids(r.event_ids) for append, r in zip(group, requests, strict=True)]
            if second is not None:
                for append, request in zip(in_second, requests, strict=True):
                    carry_out_alone(second, log_of_second, append.with_ids(request.event_ids))
                assert contents(log) == contents(log_of_second)
    assert stored_in(groups.connection, "hindsight", streams) == (log.events, log.heads())
    if second is not None:
        assert stored_in(groups.connection, "second", streams) == (log_of_second.events, log_of_second.heads())


@pytest.mark.essential
def test_a_group_does_what_the_model_does_one_after_the_other(groups: Groups) -> None:
    @settings(max_examples=10_000 if SOAK else 250, suppress_health_check=[HealthCheck.too_slow])
    @given(planned_groups, st.lists(st.booleans(), max_size=6))
    @example(ACCEPTED_AND_REFUSED, [])
    @example(KNOWN_BEFORE_EXPECTATIONS, [])
    @example(LOOKED_AT, [True])
    @example(REFUSED_FIRST, [])
    def check(planned: list[list[Plan]], look_up: list[bool]) -> None:
        carry_out_plans(groups, planned, look_up, None)

    check()
    assert set(groups.outcomes) == {Accepted, Conflict, IdConflict, AppendResult}
    assert min(groups.outcomes.values()) > 20


def test_a_group_does_what_a_store_does_one_after_the_other(groups: Groups, second: EventStore) -> None:
    @settings(max_examples=2_000 if SOAK else 50, suppress_health_check=[HealthCheck.too_slow])
    @given(planned_groups)
    def check(planned: list[list[Plan]]) -> None:
        carry_out_plans(groups, planned, [], second)

    check()


def test_requests_that_share_an_id_are_refused_together(groups: Groups) -> None:
    """What the queue keeps apart: the server lets none of them in, so that a fault there could not double an event."""
    twice = NewEvent("noted", {"n": 1}, event_id=uuid4())
    requests = [request_of(Append((StreamWrite(stream, [twice], ANY),))) for stream in (STREAM, OTHER)]
    with pytest.raises(psycopg.errors.UniqueViolation):
        groups.send(requests)
    assert stored_in(groups.connection, "hindsight", [STREAM, OTHER]) == ([], {})


def test_a_group_that_writes_nothing_draws_no_number(groups: Groups) -> None:
    def last_number() -> int:
        row = groups.connection.execute("SELECT last_value FROM hindsight.transaction_no").fetchone()
        assert row is not None
        return int(row[0])

    log = PlainLog()
    before = last_number()
    for plan in (one(0), one(0, expected=NO_STREAM), one(0, 1, expected=3), one(0, expected=3)):
        carry_out(groups, log, [plan.append(log, [STREAM], [])])
        carry_out(groups, log, [plan.append(log, [STREAM], []) for _ in range(3)])
    assert (last_number(), log.events) == (before, [])
    assert stored_in(groups.connection, "hindsight", [STREAM]) == ([], {})


def test_a_large_group_keeps_its_order(groups: Groups) -> None:
    log = PlainLog()
    streams = [uuid4() for _ in range(50)]
    appends = []
    for n in range(300):
        expected = (ANY, NO_STREAM, 3)[n % 3]
        events = [NewEvent("noted", {"n": n}) for _ in range(1 + n % 7)]
        appends.append(Append((StreamWrite(streams[n * n % 50], events, expected),)))
    for _ in range(2):
        carry_out(groups, log, appends)
    assert len(log.events) > 500
    assert stored_in(groups.connection, "hindsight", streams) == (log.events, log.heads())
