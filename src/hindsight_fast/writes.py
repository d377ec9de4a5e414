"""What an append is made of: expected versions, what it answers, and ids for its events."""

from __future__ import annotations

import enum
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from ._core import Cursor


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


@dataclass(frozen=True, slots=True)
class VersionMismatch:
    """A stream that is not as it was expected to be; the actual ones are None for a stream without events."""

    stream_id: UUID
    expected: Expected
    actual_version: int | None
    actual_cursor: Cursor | None


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
        chance = int.from_bytes(os.urandom(8), "big") >> 2
        return UUID(int=place >> 12 << 80 | 7 << 76 | (place & 0xFFF) << 64 | 0b10 << 62 | chance)
