"""Importing without importing: everything is checked, the store is not touched, and the time is estimated.

Each chunk goes into a temporary table of the same definition, so that the server itself reads every value, and is
rolled back. Ids that the lines bring are compared with the stored ones, and with those of the chunks before.

Not tried are somebody's own triggers and foreign keys, and from the second chunk on their unique indexes.
"""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import UTC, datetime
from hashlib import blake2b
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import psycopg

from ._core import Cursor, EventRows, RecordedEvent, decode_row
from .import_chunks import Chunk, ChunkMaker
from .import_lines import LineReader
from .import_rejects import RejectFile
from .import_writer import ChunkWriter, Refused, Stored
from .schema import LAYOUT
from .statements import CHECK_DEFERRED, COPY_DRY_RUN_IDS, DROP_DRY_RUN, KNOWN_DRY_RUN_IDS

if TYPE_CHECKING:
    from .statements import Statements

REAL_TO_TEMPORARY: Final = 2.1
"""How many times as long an import takes as the same rows into an indexed temporary table, which no log protects.

With 1.5, 200,000 demo events were projected to take 1.7 s and took 2.4 (bench_import_ways)."""


class DryRun(ChunkWriter):
    """Takes chunks as a writer does, and refuses what it would; stores nothing. Use it in a ``with`` statement.

    Needs the right to make temporary tables. They are gone afterwards.
    """

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        statements: Statements,
        import_id: str,
        source_name: str,
        generation: int,
        rejects: RejectFile | None,
    ) -> None:
        super().__init__(connection, statements, import_id, source_name, generation, rejects)
        self._derived_id = LineReader(import_id).derived_id
        self._brings_ids = False
        self._events = 0
        self._began = time.monotonic()
        self._seconds_of_one: float | None = None  # of an event, into a table with all indexes

    def __enter__(self) -> Self:
        self._execute(DROP_DRY_RUN.encode(), ())
        with self._connection.transaction():  # all or none: they stay with the connection
            for statement in self._statements.make_dry_run:
                self._execute(statement, ())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(psycopg.Error):  # a lost connection has taken them along
            self._execute(DROP_DRY_RUN.encode(), ())

    def store(self, chunk: Chunk, meanwhile: ChunkMaker | None = None) -> Stored:
        """Check *chunk*. Raises ImportFailed where storing it would."""
        self._brings_ids = bool(self._rows_with_ids(chunk))
        stored = super().store(chunk, meanwhile)
        if self._brings_ids:
            self._note_ids(self._sent)
        self._events += stored.events
        return Stored(stored.events, 0, stored.known, stored.rejected, None, stored.seconds)

    @property
    def projected_seconds(self) -> float:
        """About what the import would take on this server, by one job."""
        if self._seconds_of_one is None:
            return 0.0
        # Reading and encoding go on while the server works: the slower of the two decides.
        return max(self._events * self._seconds_of_one * REAL_TO_TEMPORARY, time.monotonic() - self._began)

    def _try_to_store(self, chunk: Chunk, meanwhile: ChunkMaker | None) -> tuple[Cursor | None, int]:
        with self._connection.transaction(force_rollback=True):
            self._sent = self._without_known(chunk) if self._brings_ids and len(chunk.rows) else chunk
            if len(self._sent.rows):
                self._copy(self._sent.rows, meanwhile)
                self._execute(CHECK_DEFERRED.encode(), ())
            self._execute(self._statements.check_writable, (LAYOUT, self._generation))
        return None, 0

    def _without_known(self, chunk: Chunk) -> Chunk:
        rest = super()._without_known(chunk)
        brought = {row: decode_row(rest.rows.row(row)) for row in self._rows_with_ids(rest)}
        ids = [event.event_id for event in brought.values()]
        found = self._execute(KNOWN_DRY_RUN_IDS.encode(), (ids,))
        noted = {event_id: (content, time_) for event_id, content, time_ in found}
        again = set()
        for row, event in brought.items():
            if event.event_id in noted:
                content, time_ = noted[event.event_id]
                # The time only where this line has one: as when the other had been stored by then.
                if _digest_of(event) != content or self._time_of(rest, row, event) not in (None, time_):
                    refused = chunk.line_nos.index(rest.line_nos[row])
                    raise Refused(refused, f"the id {event.event_id} is known, with another content or time")
                again.add(row)
        return rest.without(again) if again else rest

    def _copy(self, rows: EventRows, meanwhile: ChunkMaker | None) -> tuple[Cursor, int]:
        # Places that no real event has: versions from 1, as if each stream had one event before.
        rows.place(0, rows.stream_arrays()[1], datetime.now(UTC))
        began = time.monotonic()
        measure = self._seconds_of_one is None
        self._send(self._statements.copy_dry_run(indexed=measure), rows, None if measure else meanwhile)
        if measure:
            self._seconds_of_one = (time.monotonic() - began) / len(rows)
        return Cursor(0, 0), 0

    def _rows_with_ids(self, chunk: Chunk) -> list[int]:
        """The rows whose lines bring an id."""
        if not len(chunk.rows):
            return []
        ids = chunk.rows.event_ids()
        # Behind the array's header each id stands behind its length.
        return [
            row
            for row, line_no in enumerate(chunk.line_nos)
            if ids[24 + 20 * row : 40 + 20 * row] != self._derived_id(line_no)
        ]

    def _note_ids(self, chunk: Chunk) -> None:
        with psycopg.Cursor(self._connection).copy(COPY_DRY_RUN_IDS.encode()) as copy:
            for row in self._rows_with_ids(chunk):
                event = decode_row(chunk.rows.row(row))
                copy.write_row((event.event_id, _digest_of(event), self._time_of(chunk, row, event)))

    def _time_of(self, chunk: Chunk, row: int, event: RecordedEvent) -> str | None:
        return event.created_at.isoformat() if chunk.rows.is_dated(row) else None


def _digest_of(event: RecordedEvent) -> bytes:
    """What tells an event's content from another's, its time left out."""
    metadata = event.metadata_json
    fields = (event.stream_id, event.name, event.version, event.correlation_id, len(event.data), metadata is None)
    digest = blake2b(repr(fields).encode(), digest_size=16)
    digest.update(event.data)
    digest.update(metadata or b"")
    return digest.digest()
