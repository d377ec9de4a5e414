"""Importing without importing: everything is checked, the store is not touched, and the time is estimated.

Each chunk goes into a temporary table of the same definition, so that the server itself reads every value, and is
rolled back. Ids that the lines bring are compared with the stored ones, and at the end with each other.
"""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import UTC, datetime
from hashlib import blake2b
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import psycopg

from ._core import Cursor, EventRows, decode_row
from .errors import ImportFailed
from .import_chunks import Chunk, ChunkMaker
from .import_lines import LineReader
from .import_rejects import RejectFile
from .import_writer import ChunkWriter, Stored
from .schema import LAYOUT
from .statements import CHECK_DEFERRED, COPY_DRY_RUN_IDS, DROP_DRY_RUN, REPEATED_DRY_RUN_IDS

if TYPE_CHECKING:
    from .statements import Statements

REAL_TO_TEMPORARY: Final = 1.5
"""How many times as long an import takes as the same rows into an indexed temporary table, which no log protects."""


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
        self._events = 0
        self._began = time.monotonic()
        self._seconds_of_one: float | None = None  # of an event, into a table with all indexes

    def __enter__(self) -> Self:
        self._execute(DROP_DRY_RUN.encode(), ())
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
        brings_ids = self._rows_with_ids(chunk) != []
        self._look_up_ids = brings_ids
        stored = super().store(chunk, meanwhile)
        if brings_ids:
            self._note_ids(chunk)
        self._events += stored.events
        return Stored(stored.events, 0, stored.known, stored.rejected, None, stored.seconds)

    def finish(self) -> Stored:
        """Compare the ids of all chunks with each other. Raises ImportFailed if one stands for two contents."""
        row = self._execute(REPEATED_DRY_RUN_IDS.encode(), ()).fetchone()
        assert row is not None
        repeated, conflicts, line_no = row
        if conflicts:
            raise ImportFailed(
                "its id stands before with other content" + (f" (and {conflicts - 1} more such ids)" * (conflicts > 1)),
                import_id=self._import_id,
                source=self._source_name,
                line_no=line_no,
            )
        self._events -= repeated
        return Stored(-repeated, 0, repeated, 0, None, 0.0)

    @property
    def projected_seconds(self) -> float:
        """About what the import would take on this server, by one job."""
        if self._seconds_of_one is None:
            return 0.0
        # Reading and encoding go on while the server works: the slower of the two decides.
        return max(self._events * self._seconds_of_one * REAL_TO_TEMPORARY, time.monotonic() - self._began)

    def _try_to_store(self, chunk: Chunk, meanwhile: ChunkMaker | None) -> tuple[Cursor | None, int]:
        with self._connection.transaction(force_rollback=True):
            if self._look_up_ids and len(chunk.rows):
                self._leave_out_known(chunk)
            if len(chunk.rows):
                self._copy(chunk.rows, meanwhile)
                self._execute(CHECK_DEFERRED.encode(), ())
            self._execute(self._statements.check_writable, (LAYOUT, self._generation))
        return None, 0

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
                time_ = event.created_at.isoformat() if chunk.rows.is_dated(row) else ""
                content = blake2b(event.data, digest_size=16)
                content.update(repr((event.stream_id, event.name, event.version, event.correlation_id, time_)).encode())
                content.update(event.metadata_json or b"")
                copy.write_row((event.event_id, content.digest(), chunk.line_nos[row]))
