"""Appending to one stream: lock its head, compare it with what was expected, number the events, copy them in.

The plain form, a transaction of several round trips.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import psycopg

from ._core import Cursor, EventRows
from .begin_copy import begin_copy, execute
from .errors import ConcurrencyConflict
from .events import NewEvent
from .schema import LAYOUT
from .writes import AppendResult, EventIds, Expected, VersionMismatch, expectation_holds

if TYPE_CHECKING:
    from .statements import Statements

_ids: Final = EventIds()


def append_to_stream(
    connection: psycopg.Connection[Any],
    statements: Statements,
    generation: int,
    stream_id: UUID,
    events: Sequence[NewEvent],
    expected: Expected,
    correlation_id: UUID | None,
) -> AppendResult:
    """Append *events*, in one transaction. Raises ConcurrencyConflict, SchemaError, or psycopg's own errors."""

    def ask(statement: bytes, *parameters: Any) -> psycopg.Cursor[Any]:
        return execute(connection, statements, statement, parameters)

    def check(version: int | None) -> None:
        """Compare what was there before with what was expected."""
        last = None
        if version is not None:
            row = ask(statements.event_cursor, stream_id, version).fetchone()
            last = None if row is None else Cursor(*row)
        if not expectation_holds(expected, version, last):
            raise ConcurrencyConflict([VersionMismatch(stream_id, expected, version, last)])

    with connection.transaction():
        if not events:
            row = ask(statements.stream_version, stream_id).fetchone()
            check(None if row is None else row[0])
            return AppendResult(None)
        rows, event_ids = EventRows(), []
        for event in events:
            event_ids.append(event.event_id or _ids.draw())
            rows.add(
                event_ids[-1].bytes, stream_id.bytes, event.name, event.version, event.data, event.created_at,
                None if correlation_id is None else correlation_id.bytes, event.metadata_json,
            )  # fmt: skip
        begun = begin_copy(connection, statements, rows)
        last_version = int.from_bytes(begun.head_versions[-8:], "big", signed=True)
        before = last_version - len(events)
        check(None if before < 0 else before)
        rows.place(*begun)
        with psycopg.Cursor(connection).copy(statements.copy_events) as copy:
            for block in rows.blocks():
                copy.write(block)
        # Last, in a snapshot of its own: what was committed while this append waited for its lock counts too.
        ask(statements.check_writable, LAYOUT, generation)
    cursor = Cursor(begun.transaction_no, len(events) - 1)
    return AppendResult(cursor, {stream_id: cursor}, {stream_id: last_version}, tuple(event_ids))
