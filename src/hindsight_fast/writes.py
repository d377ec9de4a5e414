"""What an append is made of: writes and their expected versions, transactions of them, and what it answers."""

from __future__ import annotations

import enum
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from ._core import Cursor, time_ordered_uuid

if TYPE_CHECKING:
    from ._core import RecordedEvent


class ExpectedVersion(enum.Enum):
    """What a stream may look like before an append, where no exact version or cursor is named."""

    ANY = "any"
    NO_STREAM = "no stream"
    STREAM_EXISTS = "stream exists"

    def __repr__(self) -> str:
        return self.name


ANY: Final = ExpectedVersion.ANY
NO_STREAM: Final = ExpectedVersion.NO_STREAM
STREAM_EXISTS: Final = ExpectedVersion.STREAM_EXISTS

Expected = ExpectedVersion | int | Cursor

MAX_STREAM_VERSION: Final = 2**63 - 1
MOST_EVENTS: Final = 1_000_000
"""Of one append: more is an import."""


@dataclass(frozen=True, slots=True)
class VersionMismatch:
    """A stream that is not as it was expected to be; the actual ones are None for a stream without events."""

    stream_id: UUID
    expected: Expected
    actual_version: int | None
    actual_cursor: Cursor | None


@dataclass(frozen=True, slots=True)
class StreamWrite:
    """Events for one stream, and what the stream is expected to be before them.

    *events* are objects of registered event types or NewEvents; none: the expectation is checked and nothing written.
    """

    stream_id: UUID
    events: Sequence[Any]
    expected: Expected

    def __post_init__(self) -> None:
        if isinstance(self.events, (str, bytes, Mapping)):
            # An empty one would be taken for no events.
            raise TypeError(f"events is a list of events, not a {type(self.events).__name__}")
        # Gone through here, once: what is written must not depend on when a generator runs. One may have no end.
        object.__setattr__(self, "events", tuple(islice(self.events, MOST_EVENTS + 1)))
        if len(self.events) > MOST_EVENTS:
            raise ValueError(f"more than {MOST_EVENTS} events in one append: import them")
        if not isinstance(self.stream_id, UUID):
            raise TypeError(f"stream_id must be a UUID, not {type(self.stream_id).__name__}")
        check_expected(self.expected)


class Transaction:
    """Writes that are appended together, all or none; one for each stream.

    They add up: ``t1 + t2`` has the streams of both, in order, those of t1 first; where both write to one stream their
    events are joined and t1's expectation stands. ``Transaction()`` is the zero. Raises ValueError for a stream listed
    twice: only addition merges.
    """

    __slots__ = ("writes",)

    writes: tuple[StreamWrite, ...]

    def __init__(self, writes: Iterable[StreamWrite] = ()) -> None:
        self.writes = tuple(writes)
        streams: set[UUID] = set()
        for write in self.writes:
            if not isinstance(write, StreamWrite):
                raise TypeError(f"a Transaction is made of StreamWrites, not {type(write).__name__}")
            if write.stream_id in streams:
                raise ValueError(f"stream {write.stream_id} is listed twice; Transactions that are added are merged")
            streams.add(write.stream_id)

    def __add__(self, other: Transaction) -> Transaction:
        if not isinstance(other, Transaction):
            return NotImplemented
        merged = {write.stream_id: write for write in self.writes}
        for write in other.writes:
            mine = merged.get(write.stream_id)
            if mine is not None:
                write = StreamWrite(mine.stream_id, (*mine.events, *write.events), mine.expected)
            merged[write.stream_id] = write
        return Transaction(merged.values())

    def __iter__(self) -> Iterator[StreamWrite]:
        return iter(self.writes)

    def __len__(self) -> int:
        return len(self.writes)

    def __eq__(self, other: object) -> bool:
        return self.writes == other.writes if isinstance(other, Transaction) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.writes)

    def __repr__(self) -> str:
        return f"Transaction({list(self.writes)!r})"


@dataclass(frozen=True, slots=True)
class StreamHistory:
    """All events of a stream as they stood when it was read, its version, and what to expect when appending to it."""

    events: Sequence[RecordedEvent]
    version: int | None
    expected: Expected


def history_of(events: Sequence[RecordedEvent]) -> StreamHistory:
    """Return the history that all *events* of a stream make."""
    version = events[-1].stream_version if events else None
    return StreamHistory(tuple(events), version, NO_STREAM if version is None else version)


@dataclass(frozen=True, slots=True)
class AppendResult:
    """What an append did.

    ``cursor`` is the place of its last event, None if nothing was written; ``stream_cursors`` and ``stream_versions``
    those of each stream's last one; ``event_ids`` stand in the order of the events. ``duplicate``: the events were
    there already, under these ids, and this is what their first append answered.
    """

    cursor: Cursor | None
    stream_cursors: Mapping[UUID, Cursor] = field(default_factory=dict)
    stream_versions: Mapping[UUID, int] = field(default_factory=dict)
    event_ids: tuple[UUID, ...] = ()
    duplicate: bool = False


def check_expected(expected: Expected) -> Expected:
    """Return *expected*. Raises TypeError, or ValueError for a negative version."""
    if isinstance(expected, (ExpectedVersion, Cursor)):
        return expected
    if not isinstance(expected, int) or isinstance(expected, bool):
        kind = type(expected).__name__
        raise TypeError(f"expected is ANY, NO_STREAM, STREAM_EXISTS, a version or a Cursor, not {kind}")
    if expected < 0:
        raise ValueError(
            f"a stream's version counts from 0: {expected} is none; NO_STREAM means a stream without events"
        )
    if expected > MAX_STREAM_VERSION:
        raise ValueError(f"no stream's version exceeds {MAX_STREAM_VERSION}: {expected}")
    return expected


def expectation_holds(expected: Expected, version: int | None, cursor: Cursor | None) -> bool:
    """Whether a stream whose last event has this version, at this cursor (None: it has none), is as expected."""
    match expected:
        case ExpectedVersion.ANY:
            return True
        case ExpectedVersion.NO_STREAM:
            return version is None
        case ExpectedVersion.STREAM_EXISTS:
            return version is not None
        case Cursor():
            return cursor == expected
        case _:
            return version == expected


class EventIds:
    """Draws UUIDv7 (RFC 9562, section 5.7): milliseconds, then a counter, then chance.

    They rise within a process, also within a millisecond and when the clock is set back, so that the index of ids grows
    at its edge. Threads may share it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0  # 48 bits of milliseconds, 12 of counter

    def draw(self) -> UUID:
        """Return a new id."""
        now = time.time_ns() // 1_000_000 << 12
        with self._lock:
            self._last = place = max(now, self._last + 1)
        return time_ordered_uuid(place, os.urandom(8))
