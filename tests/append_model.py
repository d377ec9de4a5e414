"""The plain model of an event store: lists and dicts, one append after the other. The oracle of all that appends.

Beside it stand plans: appends as Hypothesis draws them, small and without any id, that a test makes real once it knows
what its log holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar, get_args
from uuid import UUID, uuid4

import psycopg
from hypothesis import strategies as st

from hindsight_fast import (
    ANY,
    NO_STREAM,
    STREAM_EXISTS,
    AppendResult,
    Cursor,
    NewEvent,
    RecordedEvent,
    StreamWrite,
    VersionMismatch,
)

STREAM_COUNT = 4
LONG_AGO = datetime(2001, 2, 3, 4, 5, 6, 789, tzinfo=UTC)
LATER = datetime(2002, 1, 1, tzinfo=UTC)

# --- The model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlainStored:
    """A stored event; ``created_at`` None: the server's time."""

    cursor: Cursor
    event_id: UUID
    stream_id: UUID
    stream_version: int
    name: str
    version: int
    data: bytes
    metadata: bytes | None
    correlation_id: UUID | None
    created_at: datetime | None


@dataclass(frozen=True)
class Conflict:
    """Some streams are not as expected."""

    mismatches: tuple[VersionMismatch, ...]


@dataclass(frozen=True)
class IdConflict:
    """Some ids are known, and not from this very append."""

    event_ids: tuple[UUID, ...]


@dataclass(frozen=True)
class Accepted:
    """Everything is as expected, and the events are new."""


class PlainLog:
    """What a store holds. ``outcome`` says what an append would meet, ``accept`` carries it out."""

    def __init__(self) -> None:
        self.events: list[PlainStored] = []
        self.last_cursor: Cursor | None = None  # also of what was rolled back: numbers are never used again

    def copy(self) -> PlainLog:
        other = PlainLog()
        other.events, other.last_cursor = list(self.events), self.last_cursor
        return other

    def stream(self, stream_id: UUID) -> list[PlainStored]:
        return [event for event in self.events if event.stream_id == stream_id]

    def heads(self) -> dict[UUID, int]:
        return {event.stream_id: event.stream_version for event in self.events}

    def outcome(
        self, writes: Sequence[StreamWrite], correlation_id: UUID | None
    ) -> Accepted | Conflict | IdConflict | AppendResult:
        given = [event.event_id for write in writes for event in write.events if event.event_id is not None]
        stored = {event.event_id: event for event in self.events}
        if known := tuple(event_id for event_id in given if event_id in stored):
            return self._repeated(writes, correlation_id, stored) or IdConflict(known)
        mismatches = []
        for write in writes:
            last = next((event for event in reversed(self.events) if event.stream_id == write.stream_id), None)
            version, cursor = (None, None) if last is None else (last.stream_version, last.cursor)
            if write.expected is ANY:
                holds = True
            elif write.expected is NO_STREAM:
                holds = last is None
            elif write.expected is STREAM_EXISTS:
                holds = last is not None
            else:
                holds = write.expected == (cursor if isinstance(write.expected, Cursor) else version)
            if not holds:
                mismatches.append(VersionMismatch(write.stream_id, write.expected, version, cursor))
        return Conflict(tuple(mismatches)) if mismatches else Accepted()

    def _repeated(
        self, writes: Sequence[StreamWrite], correlation_id: UUID | None, stored: dict[UUID, PlainStored]
    ) -> AppendResult | None:
        """The first append's result, if the same events stand there in a row, their streams' versions too."""
        events = [(write.stream_id, event) for write in writes for event in write.events]
        if any(event.event_id not in stored for _, event in events):
            return None
        found = [stored[event.event_id] for _, event in events]
        first = self.events.index(found[0])
        if self.events[first : first + len(found)] != found or len({each.cursor.transaction_no for each in found}) > 1:
            return None
        for (stream_id, event), there in zip(events, found, strict=True):
            same = there.name, there.version, there.data, there.metadata, there.stream_id, there.correlation_id
            if same != (event.name, event.version, event.data, event.metadata_json, stream_id, correlation_id):
                return None
            # A time that was left out is the server's, whatever that was.
            if event.created_at is not None and event.created_at != there.created_at:
                return None
        return self._result(writes, found, duplicate=True)

    def accept(
        self,
        writes: Sequence[StreamWrite],
        correlation_id: UUID | None,
        event_ids: Sequence[UUID],
        first: Cursor,
    ) -> AppendResult:
        """Append; the store says which ids it drew, and where in the log it put the first event."""
        heads, ids, place = self.heads(), iter(event_ids), first
        added = []
        for write in writes:
            for event in write.events:
                event_id = next(ids)
                assert event.event_id in (None, event_id)
                assert all(other.event_id != event_id for other in self.events)
                assert self.last_cursor is None or place > self.last_cursor
                version = heads.get(write.stream_id, -1) + 1
                heads[write.stream_id] = version
                stored = (event.name, event.version, event.data, event.metadata_json, correlation_id, event.created_at)
                added.append(PlainStored(place, event_id, write.stream_id, version, *stored))
                self.last_cursor = place
                place = Cursor(place.transaction_no, place.sequence_no + 1)
        assert next(ids, None) is None
        self.events += added
        return self._result(writes, added, duplicate=False)

    @staticmethod
    def _result(writes: Sequence[StreamWrite], events: Sequence[PlainStored], *, duplicate: bool) -> AppendResult:
        return AppendResult(
            events[-1].cursor if events else None,
            {event.stream_id: event.cursor for event in events},
            {event.stream_id: event.stream_version for event in events},
            tuple(event.event_id for event in events),
            duplicate,
        )


def seen(event: RecordedEvent) -> PlainStored:
    """A recorded event in the model's words."""
    return PlainStored(
        event.cursor, event.event_id, event.stream_id, event.stream_version, event.name, event.version, event.data,
        event.metadata_json, event.correlation_id, _given(event.created_at),
    )  # fmt: skip


def _given(created_at: datetime) -> datetime | None:
    """The time if it is one that plans give; otherwise it is the server's."""
    return created_at if created_at in (LONG_AGO, LATER) else None


def stored_in(
    connection: psycopg.Connection[Any], schema: str, streams: Iterable[UUID]
) -> tuple[list[PlainStored], dict[UUID, int]]:
    """What the tables hold of *streams*: the events in order, and the heads."""
    name = psycopg.sql.Identifier(schema)
    rows = connection.execute(
        psycopg.sql.SQL(
            "SELECT transaction_no, sequence_no, event_id, stream_id, stream_version, event_name, event_version,"
            " payload::text, metadata::text, correlation_id, created_at FROM {}.events WHERE stream_id = ANY(%s)"
            " ORDER BY transaction_no, sequence_no"
        ).format(name),
        (list(streams),),
    ).fetchall()
    heads = connection.execute(
        psycopg.sql.SQL("SELECT stream_id, stream_version FROM {}.stream_heads WHERE stream_id = ANY(%s)").format(name),
        (list(streams),),
    ).fetchall()
    events = [
        PlainStored(
            Cursor(number, place), event_id, stream_id, stream_version, name, version, data.encode(),
            None if metadata is None else metadata.encode(), cause, _given(created_at),
        )
        for number, place, event_id, stream_id, stream_version, name, version, data, metadata, cause, created_at in rows
    ]  # fmt: skip
    return events, dict(heads)


# --- Plans ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EventPlan:
    n: int
    own_id: bool = False
    dated: bool = False
    described: bool = False

    def event(self) -> NewEvent:
        return NewEvent(
            "noted" if self.n % 2 else "counted",
            b'{"n": %d}' % self.n,
            version=self.n % 3,
            event_id=uuid4() if self.own_id else None,
            metadata={"by": self.n} if self.described else None,
            created_at=LONG_AGO if self.dated else None,
        )


@dataclass(frozen=True)
class WritePlan:
    """*expected*: ``("right", how)``, which holds; a named expectation; an exact version, or ``("version", d)``, d off
    the right one; ``("cursor", n)``, of the stream's last event but n, ``("elsewhere", _)``, of the log's last event,
    ``("nowhere", _)``, of none."""

    stream: int
    events: tuple[EventPlan, ...]
    expected: Any

    def write(self, log: PlainLog, streams: Sequence[UUID]) -> StreamWrite:
        stream_id = streams[self.stream]
        return StreamWrite(
            stream_id, [plan.event() for plan in self.events], self._expected(log.stream(stream_id), log)
        )

    def _expected(self, stream: list[PlainStored], log: PlainLog) -> Any:
        match self.expected:
            case ("right", str(how)):
                if how == "any":
                    return ANY
                if not stream:
                    return NO_STREAM
                return {"exists": STREAM_EXISTS, "version": len(stream) - 1, "cursor": stream[-1].cursor}[how]
            case ("version", int(off)):
                return max(0, len(stream) - 1 + off)
            case ("cursor", int(n)):
                return stream[-1 - n].cursor if n < len(stream) else Cursor.BEGINNING
            case ("elsewhere", _):
                return log.events[-1].cursor if log.events else Cursor(2**40, 1)
            case ("nowhere", int(off)):
                last = stream[-1].cursor if stream else Cursor(0, 0)
                return Cursor(last.transaction_no, last.sequence_no + 1 + off)
        return self.expected


Change = Literal[
    "none",
    "expectation",
    "half the ids",
    "data",
    "stream",
    "reversed",
    "a part",
    "correlation",
    "one more",
    "time",
    "the one before as well",
]


@dataclass(frozen=True)
class Append:
    """An append as it is handed to a store."""

    writes: tuple[StreamWrite, ...]
    correlation_id: UUID | None = None

    @property
    def event_ids(self) -> set[UUID]:
        return {event.event_id for write in self.writes for event in write.events if event.event_id is not None}

    def with_ids(self, event_ids: Sequence[UUID]) -> Append:
        """The same with the ids that the store drew, so that it can be repeated."""
        ids = iter(event_ids)
        return replace(
            self, writes=tuple(replace(w, events=[e.with_id(next(ids)) for e in w.events]) for w in self.writes)
        )

    def changed(self, change: Change, streams: Sequence[UUID]) -> Append:
        """The same again, or nearly."""
        writes = self.writes
        places = [(w, e) for w, write in enumerate(writes) for e in range(len(write.events))]
        match change:
            case "expectation":
                return replace(self, writes=tuple(replace(write, expected=99) for write in writes))
            case "half the ids":
                half = places[: len(places) // 2 or 1]
                return self._with_events(lambda at, event: event.with_id(uuid4()) if at in half else event)
            case "data" if places:
                return self._with_events(
                    lambda at, event: replace(event, payload=b'{"n": -1}') if at == places[-1] else event
                )
            case "stream":
                free = [each for each in streams if each not in {write.stream_id for write in writes}]
                if free:
                    return replace(self, writes=(*writes[:-1], replace(writes[-1], stream_id=free[0])))
            case "reversed":
                writes = tuple(replace(write, events=write.events[::-1]) for write in writes[::-1])
                return replace(self, writes=writes)
            case "a part":
                return replace(self, writes=(*writes[:-1], replace(writes[-1], events=writes[-1].events[:1])))
            case "time":
                return self._with_events(lambda _, event: replace(event, created_at=LATER))
            case "correlation":
                return replace(self, correlation_id=uuid4())
            case "one more":
                more = replace(writes[-1], events=[*writes[-1].events, NewEvent("noted", {"n": -2})])
                return replace(self, writes=(*writes[:-1], more))
        return self

    def _with_events(self, change: Callable[[tuple[int, int], NewEvent], NewEvent]) -> Append:
        return replace(
            self,
            writes=tuple(
                replace(write, events=[change((w, e), event) for e, event in enumerate(write.events)])
                for w, write in enumerate(self.writes)
            ),
        )


@dataclass(frozen=True)
class NewPlan:
    writes: tuple[WritePlan, ...]
    correlated: bool = False

    def append(self, log: PlainLog, streams: Sequence[UUID], earlier: Sequence[Append]) -> Append:
        return Append(
            tuple(plan.write(log, streams) for plan in self.writes), UUID(int=77) if self.correlated else None
        )


@dataclass(frozen=True)
class RepeatPlan:
    """An earlier append again: the *back*-th from the last."""

    back: int
    change: Change = field(default="none")

    def append(self, log: PlainLog, streams: Sequence[UUID], earlier: Sequence[Append]) -> Append:
        if not earlier:
            return Append((StreamWrite(streams[0], [NewEvent("noted", {"n": 0})], ANY),))
        chosen = earlier[-1 - self.back % len(earlier)]
        if self.change == "the one before as well":
            # Two appends as if they had been one; not where one repeats the other's ids, which is refused unsent.
            before = earlier[-1 - (self.back + 1) % len(earlier)]
            if before.event_ids & chosen.event_ids:
                return chosen
            listed = {write.stream_id for write in chosen.writes}
            return replace(chosen, writes=(*(w for w in before.writes if w.stream_id not in listed), *chosen.writes))
        return chosen.changed(self.change, streams)


Plan = NewPlan | RepeatPlan
T = TypeVar("T")


def few(each: st.SearchStrategy[T], sizes: Sequence[int], **settings: Any) -> st.SearchStrategy[tuple[T, ...]]:
    """So many of them, one size as likely as the other: lists of Hypothesis's own choice are mostly short."""
    lists = [st.lists(each, min_size=size, max_size=size, **settings) for size in sizes]
    return st.sampled_from(lists).flatmap(lambda chosen: chosen).map(tuple)


event_plans = st.builds(EventPlan, st.integers(0, 9), st.booleans(), st.booleans(), st.booleans())
right_expectations = st.sampled_from([("right", how) for how in ("any", "exists", "version", "cursor")])
other_expectations = st.sampled_from(
    [
        NO_STREAM, STREAM_EXISTS, 0, 1, 2, 2**63 - 1, ("version", 1), ("version", -1), ("cursor", 1), ("elsewhere", 0),
        ("nowhere", 0), Cursor.BEGINNING, Cursor(2**40, 0), Cursor(2**63 - 1, 2**31 - 1),
    ]
)  # fmt: skip
write_plans = st.builds(
    WritePlan,
    st.integers(0, STREAM_COUNT - 1),
    few(event_plans, (1, 0, 2, 3, 1)),
    right_expectations | right_expectations | right_expectations | other_expectations,
)
new_plans = st.builds(NewPlan, few(write_plans, (1, 2, 3), unique_by=lambda plan: plan.stream), st.booleans())
# What is as expected in several streams, of which some are only looked at: by chance alone that is rare.
wide_plans = st.tuples(
    st.permutations(range(STREAM_COUNT)),
    st.lists(st.tuples(few(event_plans, (1, 0, 2)), right_expectations), min_size=2, max_size=STREAM_COUNT),
    st.booleans(),
).map(
    lambda drawn: NewPlan(
        tuple(
            WritePlan(stream, events, expected) for stream, (events, expected) in zip(drawn[0], drawn[1], strict=False)
        ),
        drawn[2],
    )
)
changes: st.SearchStrategy[Change] = st.sampled_from(["none", *get_args(Change)])
repeat_plans = st.builds(RepeatPlan, st.integers(0, 5), changes)
plans: st.SearchStrategy[Plan] = st.one_of(new_plans, wide_plans, repeat_plans)
