"""Every exception of the package.

    HindsightError
    ├── EventDefinitionError     an EventType has a hole, or a payload class that JSON cannot hold
    ├── EventEncodeError         a payload would not come back as it is
    ├── EventParseError          stored bytes cannot be read as the event they claim to be
    ├── ConcurrencyConflict      streams are not as an append expected them to be
    ├── IdempotencyConflict      ids of events are known already, but not for these events in these places
    ├── AppendOutcomeUnknown     the connection was lost under an append, and nobody could say what became of it
    ├── MalformedRow             bytes that are no event row (also a ValueError)
    ├── SchemaError              tables missing, newer than this code, or in a state that forbids the call
    ├── ImportFailed             an import stopped; all before the reported line's chunk is stored, nothing after it
    ├── EmbeddedServerError      a private PostgreSQL server could not be found, made or started
    ├── WaitTimeout              what was waited for did not come in time (also a TimeoutError)
    └── StoreClosed              a store was used before open() or after close()

Wrong use (a negative version, a naive datetime) is a plain ``TypeError`` or ``ValueError``, raised before any I/O.
Errors carry facts as attributes, not just a sentence, and survive pickling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime
    from uuid import UUID

    from ._core import Cursor, RecordedEvent
    from .writes import StreamWrite, VersionMismatch


class HindsightError(Exception):
    """Root of every error that this package raises of its own."""

    def __reduce__(self) -> tuple[Callable[..., HindsightError], tuple[Any, ...], dict[str, Any]]:
        # The default calls ``type(self)(*args)``, which fails for every class whose constructor takes facts by keyword.
        return _restore, (type(self), self.args), self.__dict__.copy()


def _restore(error_type: type[HindsightError], args: tuple[Any, ...]) -> HindsightError:
    error = error_type.__new__(error_type, *args)
    error.args = args
    return error


class StoreClosed(HindsightError):
    """The store has not been opened, or was closed."""


class SchemaError(HindsightError):
    """The schema is missing, has another layout than this code knows, or is in a state that forbids the call.

    ``schema`` is its name; ``found_layout`` the layout version found, None where there is none.
    """

    def __init__(self, message: str, *, schema: str, found_layout: int | None = None) -> None:
        super().__init__(message)
        self.schema = schema
        self.found_layout = found_layout


class WaitTimeout(HindsightError, TimeoutError):
    """What was waited for did not come in time."""


class EmbeddedServerError(HindsightError):
    """A private PostgreSQL server could not be found, made, started or stopped; the message says what to do."""


class MalformedRow(HindsightError, ValueError):
    """Bytes that should be an event row are truncated, oversized or otherwise not what they claim."""


class EventDefinitionError(HindsightError):
    """An event type cannot be what it was declared to be. ``name`` is the event's, ``reason`` names the hole."""

    def __init__(self, reason: str, *, name: str) -> None:
        super().__init__(f"event type {name!r}: {reason}")
        self.reason = reason
        self.name = name


class EventEncodeError(HindsightError, ValueError):
    """A payload, or metadata, that would not come back as it is; nothing was sent.

    ``path`` leads to the field: ``$.lines[2].price``. The value itself is not shown: it may be a secret.
    """

    def __init__(self, reason: str, *, name: str, version: int, path: str) -> None:
        super().__init__(f"event {name!r} version {version} cannot be stored: {path} {reason}")
        self.reason = reason
        self.name = name
        self.version = version
        self.path = path


class EventParseError(HindsightError):
    """A stored payload or metadata cannot be decoded; carries the attributes of its event and the ``reason``.

    ``path`` leads to the field in the JSON (``$.lines[2].price``), where one is to blame. The event's attributes are
    None where bytes were decoded without their event, by ``EventType.decode``.
    """

    def __init__(
        self,
        reason: str,
        *,
        name: str,
        version: int,
        path: str | None = None,
        cursor: Cursor | None = None,
        event_id: UUID | None = None,
        stream_id: UUID | None = None,
        stream_version: int | None = None,
        correlation_id: UUID | None = None,
        created_at: datetime | None = None,
    ) -> None:
        what = f"{name!r} version {version}"
        if event_id is None:
            message = f"{what} cannot be decoded: {reason}"
        else:
            message = (
                f"event {event_id} at {cursor} ({what}, number {stream_version} of stream {stream_id})"
                f" cannot be decoded: {reason}"
            )
        super().__init__(message if path is None else f"{message} (at {path})")
        self.reason = reason
        self.path = path
        self.cursor = cursor
        self.event_id = event_id
        self.name = name
        self.version = version
        self.stream_id = stream_id
        self.stream_version = stream_version
        self.correlation_id = correlation_id
        self.created_at = created_at

    @classmethod
    def of(cls, event: RecordedEvent, reason: str, path: str | None = None) -> EventParseError:
        """Return the error for *event*."""
        return cls(
            reason,
            path=path,
            cursor=event.cursor,
            event_id=event.event_id,
            name=event.name,
            version=event.version,
            stream_id=event.stream_id,
            stream_version=event.stream_version,
            correlation_id=event.correlation_id,
            created_at=event.created_at,
        )


class ConcurrencyConflict(HindsightError):
    """Streams were not as an append expected them to be; nothing was written. ``mismatches`` tells of all of them."""

    def __init__(self, mismatches: Sequence[VersionMismatch]) -> None:
        found = "; ".join(
            f"stream {each.stream_id}: expected {each.expected!r}, found "
            + ("no events" if each.actual_version is None else f"version {each.actual_version} at {each.actual_cursor}")
            for each in mismatches
        )
        super().__init__(found)
        self.mismatches = tuple(mismatches)


class IdempotencyConflict(HindsightError):
    """Some ids of an append are known, and it is no repetition of the one that wrote them; nothing was written.

    ``event_ids`` are the known ones, ``reason`` says in what the appends differ.
    """

    def __init__(self, reason: str, event_ids: Sequence[UUID]) -> None:
        shown = ", ".join(map(str, event_ids[:3])) + (f" and {len(event_ids) - 3} more" if len(event_ids) > 3 else "")
        super().__init__(f"events are known under the ids {shown}: {reason}")
        self.reason = reason
        self.event_ids = tuple(event_ids)


class AppendOutcomeUnknown(HindsightError):
    """The connection was lost while an append was under way, and within the store's timeout nobody could be asked.

    Append ``writes`` again as they are, by ``transact``: their events carry ids, so that what was written is not
    written twice.
    """

    def __init__(self, message: str, writes: Sequence[StreamWrite], correlation_id: UUID | None = None) -> None:
        super().__init__(message)
        self.writes = tuple(writes)
        self.correlation_id = correlation_id


class ImportFailed(HindsightError):
    """An import stopped at a line; chunks before it are stored with their checkpoint, its own chunk is not.

    ``source`` names the file, ``line_no`` counts from 1 (None where no single line is to blame), ``byte_offset`` is
    where that line begins in the (decompressed) source. Mend the cause
    and import again under the same ``import_id``: it goes on behind the last stored chunk, which ends with line
    ``stored_lines``.

    Of an initial import that brings an id twice nothing is stored: ``duplicate_count`` ids stand on more than one
    line, and ``duplicates`` are the first hundred of them, each with its first hundred lines.
    """

    def __init__(
        self,
        reason: str,
        *,
        import_id: str,
        source: str,
        line_no: int | None = None,
        byte_offset: int | None = None,
        stored_lines: int = 0,
        duplicates: tuple[tuple[UUID, tuple[int, ...]], ...] = (),
        duplicate_count: int = 0,
    ) -> None:
        place = source if line_no is None else f"{source}, line {line_no}"
        super().__init__(f"{place}: {reason}")
        self.reason = reason
        self.import_id = import_id
        self.source = source
        self.line_no = line_no
        self.byte_offset = byte_offset
        self.stored_lines = stored_lines
        self.duplicates = duplicates
        self.duplicate_count = duplicate_count
