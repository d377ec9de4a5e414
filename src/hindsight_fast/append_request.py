"""One append, checked and encoded, and what its outcome means. No I/O: the stores send it.

A request is settled by itself, however many share a transaction with it.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from uuid import UUID

from ._core import Cursor, EventRows, RecordedEvent, group_parameters, int_array, row_values
from .errors import AppendOutcomeUnknown, ConcurrencyConflict, IdempotencyConflict
from .events import NewEvent
from .writes import (
    MAX_STREAM_VERSION,
    MOST_EVENTS,
    AppendResult,
    EventIds,
    Expected,
    ExpectedVersion,
    StreamWrite,
    VersionMismatch,
    expectation_holds,
)

ACCEPTED, KNOWN = 0, 2  # of what append_v1 answers; 1: not as expected
ARRAY_HEADER_BYTES: Final = 20
_LONG: Final = struct.Struct("!q").pack

_BOUNDS: Final[dict[Expected, tuple[int | None, int | None, None, None]]] = {
    ExpectedVersion.ANY: (None, None, None, None),
    ExpectedVersion.NO_STREAM: (-1, -1, None, None),
    ExpectedVersion.STREAM_EXISTS: (0, MAX_STREAM_VERSION, None, None),
}

_ids: Final = EventIds()


class SentOver(NamedTuple):
    """The process id of a backend, and when something was sent to it (``time.monotonic()``)."""

    backend: int
    sent_at: float


class AppendRequest:
    """The writes of one append: checked, their events with ids, encoded as rows.

    *new_event* makes a NewEvent of what a write holds. Raises what it raises; ValueError for a stream or an id listed
    twice, and for more than MOST_EVENTS events; what ``EventRows.add`` raises. All before anything is sent.
    """

    __slots__ = (
        "correlation_id", "event_ids", "events", "in_doubt", "look_up", "lost_backend", "rows", "sent_over", "targets",
        "writes",
    )  # fmt: skip

    def __init__(
        self, writes: Sequence[StreamWrite], new_event: Callable[[Any], NewEvent], correlation_id: UUID | None
    ) -> None:
        if len(writes) > 1 and sum(len(write.events) for write in writes) > MOST_EVENTS:
            raise ValueError(f"more than {MOST_EVENTS} events in one append: import them")
        self.writes = writes
        self.correlation_id = correlation_id
        self.rows = EventRows()
        self.events: list[NewEvent] = []
        self.event_ids: list[UUID] = []
        self.look_up = False
        """Whether ids may be known: the caller gave them, or an earlier try may have written them."""
        self.in_doubt = False
        """Whether such a try may have been committed."""
        self.sent_over: SentOver | None = None
        self.lost_backend: SentOver | None = None
        """Where it may still be under way: what it was sent over last, if the connection was lost before the answer."""
        self.targets: list[tuple[bytes, int, int | None, int | None, int | None, int | None]] = []
        correlation = None if correlation_id is None else correlation_id.bytes
        add = self.rows.add
        for write in writes:
            stream_id = write.stream_id.bytes
            for given in write.events:
                event = new_event(given)
                event_id = event.event_id
                if event_id is None:
                    event_id = _ids.draw()
                else:
                    self.look_up = True
                add(
                    event_id.bytes, stream_id, event.name, event.version, event.data, event.created_at, correlation,
                    event.metadata_json,
                )  # fmt: skip
                self.events.append(event)
                self.event_ids.append(event_id)
            self.targets.append((stream_id, len(write.events), *_bounds(write.expected)))
        if len(self.targets) > 1 and len({target[0] for target in self.targets}) < len(self.targets):
            raise ValueError("a stream is listed twice in one append; Transactions that are added are merged")
        if self.look_up and len(set(self.event_ids)) < len(self.event_ids):
            ((twice, _),) = Counter(self.event_ids).most_common(1)
            raise ValueError(f"the event id {twice} stands twice in one append")

    @property
    def is_one_event(self) -> bool:
        """Whether it is one event, sent for the first time under an id of our own, and no cursor is expected."""
        return len(self.events) == len(self.writes) == 1 and not self.look_up and self.targets[0][4] is None

    @property
    def byte_count(self) -> int:
        return self.rows.byte_count

    def repeatable(self) -> tuple[StreamWrite, ...]:
        """Return the writes with every event under the id that it was sent with."""
        events = (
            event if event.event_id is not None else event.with_id(event_id)
            for event, event_id in zip(self.events, self.event_ids, strict=True)
        )
        return tuple(
            StreamWrite(write.stream_id, [next(events) for _ in write.events], write.expected) for write in self.writes
        )

    def unknown(self, seconds: float) -> AppendOutcomeUnknown:
        """Return the error for an append of which nobody could say in time what became of it."""
        return AppendOutcomeUnknown(
            f"the connection was lost while {len(self.events)} events were being appended, and for {seconds:g} s the"
            " server could not be asked whether they are stored: append the error's writes again as they are",
            self.repeatable(),
            self.correlation_id,
        )

    def written(self, transaction_no: int, first_sequence_no: int, found_versions: Iterable[int]) -> AppendResult:
        """Return the result of the accepted request: its number, and what version each write found."""
        cursor = None
        if len(self.writes) == 1 and self.events:  # as most are
            (write,), (version,), count = self.writes, found_versions, len(self.events)
            cursor = Cursor(transaction_no, first_sequence_no + count - 1)
            return AppendResult(
                cursor, {write.stream_id: cursor}, {write.stream_id: version + count}, tuple(self.event_ids)
            )
        cursors: dict[UUID, Cursor] = {}
        versions: dict[UUID, int] = {}
        sequence_no = first_sequence_no - 1
        for write, found in zip(self.writes, found_versions, strict=True):
            if write.events:
                sequence_no += len(write.events)
                cursors[write.stream_id] = cursor = Cursor(transaction_no, sequence_no)
                versions[write.stream_id] = found + len(write.events)
        return AppendResult(cursor, cursors, versions, tuple(self.event_ids))

    def mismatch(self, found: Sequence[tuple[int | None, Cursor | None]]) -> ConcurrencyConflict | None:
        """Compare what each write found with what it expected; None if all hold."""
        mismatches = [
            VersionMismatch(write.stream_id, write.expected, version, cursor)
            for write, (version, cursor) in zip(self.writes, found, strict=True)
            if not expectation_holds(write.expected, version, cursor)
        ]
        return ConcurrencyConflict(mismatches) if mismatches else None

    def repeated(self, stored: Sequence[RecordedEvent]) -> AppendResult | IdempotencyConflict:
        """Return the first append's result, if *stored*, what is known under this one's ids, is what it brings."""
        known = {event.event_id: event for event in stored}
        ids = [event_id for event_id in self.event_ids if event_id in known]
        if len(known) < len(self.event_ids):
            return IdempotencyConflict(f"{len(self.event_ids) - len(known)} others of the same append are not", ids)
        first = known[self.event_ids[0]].cursor
        cursors: dict[UUID, Cursor] = {}
        versions: dict[UUID, int] = {}
        position = 0
        for write in self.writes:
            for _ in write.events:
                event_id, given = self.event_ids[position], self.events[position]
                event = known[event_id]
                place = Cursor(first.transaction_no, first.sequence_no + position)
                difference = self._difference(write, given, event, place, versions.get(write.stream_id))
                if difference is not None:
                    return IdempotencyConflict(f"event {event_id} has another {difference} there", ids)
                cursors[write.stream_id], versions[write.stream_id] = event.cursor, event.stream_version
                position += 1
        # An id that we drew is known from an earlier try of this very append.
        duplicate = not self.in_doubt or all(event.event_id is not None for event in self.events)
        last = known[self.event_ids[-1]].cursor
        return AppendResult(last, cursors, versions, tuple(self.event_ids), duplicate)

    def _difference(
        self, write: StreamWrite, given: NewEvent, stored: RecordedEvent, place: Cursor, before: int | None
    ) -> str | None:
        """In what a stored event differs from the one given; None if in nothing."""
        for what, ours, theirs in (
            ("stream", write.stream_id, stored.stream_id),
            ("name", given.name, stored.name),
            ("version", given.version, stored.version),
            ("data", given.data, stored.data),
            ("metadata", given.metadata_json, stored.metadata_json),
            ("correlation_id", self.correlation_id, stored.correlation_id),
            ("place", place, stored.cursor),
        ):
            if ours != theirs:
                return what
        if before is not None and stored.stream_version != before + 1:
            return "place in its stream"
        if given.created_at is not None and given.created_at != stored.created_at:
            return "created_at"
        return None


@dataclass(frozen=True, slots=True)
class KnownIds:
    """The outcome of a request of which some id is known: what is stored under its ids is yet to be compared."""


Outcome = AppendResult | ConcurrencyConflict | KnownIds


class Group:
    """Requests that go in one call: its parameters, and what its answer says of each.

    *for_copy*: of one that goes by COPY only the heads are asked for; its events are not held a second time.
    """

    def __init__(self, requests: Sequence[AppendRequest], *, for_copy: bool = False) -> None:
        self.requests = requests
        self.look_up = any(request.look_up for request in requests)
        self.parameters: list[bytes | None]
        self.is_one_event = not for_copy and len(requests) == 1 and requests[0].is_one_event
        """Whether ``append_one_v1`` takes it."""
        if self.is_one_event:
            (request,) = requests
            ((stream_id, _, least, most, _, _),) = request.targets
            bounds = (-1, MAX_STREAM_VERSION) if least is None or most is None else (least, most)
            self.parameters = [stream_id, *map(_LONG, bounds), *row_values(request.rows, 0)]
            self._write_streams, self._write_offsets, self._stream_count = [0], [1], 1
        else:
            self.parameters, self._write_streams, self._write_offsets = group_parameters(
                [(request.rows, request.targets) for request in requests], not for_copy
            )
            self._stream_count = 1 + max(self._write_streams)

    @property
    def streams(self) -> tuple[bytes, bytes]:
        """The streams in byte order as a binary uuid[], and how many events each takes as a bigint[]."""
        stream_ids, event_counts = self.parameters[:2]
        assert stream_ids is not None
        assert event_counts is not None
        return stream_ids, event_counts

    def found_versions(self, head_versions: bytes) -> list[int]:
        """Return what each write found (-1: no events), of the advanced heads as a binary bigint[]."""
        heads: list[int] = int_array(head_versions)  # type: ignore[assignment]
        return [heads[s] - below for s, below in zip(self._write_streams, self._write_offsets, strict=True)]

    def heads_of_rows(self, head_versions: bytes) -> bytes:
        """Return the heads of those streams only that take events, for ``EventRows.place``."""
        size = 12  # of an element with its length
        (request,) = self.requests
        empty = {s for s, write in zip(self._write_streams, request.writes, strict=True) if not write.events}
        elements = [
            head_versions[ARRAY_HEADER_BYTES + size * s :][:size] for s in range(len(request.writes)) if s not in empty
        ]
        return head_versions[:12] + len(elements).to_bytes(4, "big") + head_versions[16:20] + b"".join(elements)

    def outcomes(self, answer: bytes) -> list[Outcome]:
        """Return the outcome of each request. Raises MalformedRow for an answer of another shape."""
        numbers: list[int] = int_array(answer)  # type: ignore[assignment]
        behind_heads = 1 + self._stream_count
        transaction_no, heads, rest = numbers[0], numbers[1:behind_heads], numbers[behind_heads:]
        if not rest:
            codes = [ACCEPTED] * len(self.requests)
            found = [heads[s] - below for s, below in zip(self._write_streams, self._write_offsets, strict=True)]
            last: dict[int, Cursor | None] = {}
        else:
            codes, rest = rest[: len(self.requests)], rest[len(self.requests) :]
            found, rest = rest[: len(self._write_streams)], rest[len(self._write_streams) :]
            last = {
                write - 1: None if number < 0 else Cursor(number, sequence_no)
                for write, number, sequence_no in zip(rest[::3], rest[1::3], rest[2::3], strict=True)
            }
        outcomes: list[Outcome] = []
        first_write = sequence_no = 0
        for request, code in zip(self.requests, codes, strict=True):
            after = first_write + len(request.writes)
            if code == ACCEPTED:
                outcomes.append(request.written(transaction_no, sequence_no, found[first_write:after]))
                sequence_no += len(request.events)
            elif code == KNOWN:
                outcomes.append(KnownIds())
            else:
                outcomes.append(
                    ConcurrencyConflict(
                        [
                            VersionMismatch(each.stream_id, each.expected, None if found[n] < 0 else found[n], last[n])
                            for n, each in enumerate(request.writes, first_write)
                            if n in last
                        ]
                    )
                )
            first_write = after
        return outcomes


def _bounds(expected: Expected) -> tuple[int | None, int | None, int | None, int | None]:
    """Between which versions a stream is expected to be, and at which cursor, as ``group_parameters`` takes it."""
    if isinstance(expected, Cursor):
        return None, None, expected.transaction_no, expected.sequence_no
    if isinstance(expected, ExpectedVersion):
        return _BOUNDS[expected]
    return expected, expected, None, None
