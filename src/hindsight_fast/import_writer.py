"""Storing chunks: each one an append by COPY that commits together with its checkpoint.

The pipeline runs in one thread. While the server works on what was sent, the next chunk is read and encoded in small
steps, and before every step the socket is asked whether it takes more: with a second thread the sender would have to
wait for the interpreter lock, 5 ms by default, before each of its blocks. From the first lock to the commit only bytes
that exist are sent.
"""

from __future__ import annotations

import random
import select
import time
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg.adapt import Dumper
from psycopg.errors import DeadlockDetected, LockNotAvailable, ProgramLimitExceeded, StatementTooComplex
from psycopg.pq import Format

from ._core import Cursor
from .errors import ImportFailed
from .import_chunks import Checkpoint, Chunk, ChunkMaker
from .schema import LAYOUT, refusal_of
from .statements import LIMIT_LOCK_WAIT

if TYPE_CHECKING:
    from .statements import Statements

BLOCK_BYTES: Final = 64 * 1024
LOCK_PATIENCE_S: Final = 60.0
"""How long a chunk is tried again while others hold its streams; each try ends by itself after two seconds."""
OWN_CONSTRAINTS: Final = frozenset({"events_pkey", "events_stream_key", "events_event_id_key"})

_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)


class UuidArray(bytes):
    """A ``uuid[]`` in PostgreSQL's binary form, as the core makes it."""


class BigintArray(bytes):
    """A ``bigint[]`` in PostgreSQL's binary form."""


class _UuidArrayDumper(Dumper):
    format = Format.BINARY
    oid = 2951

    def dump(self, obj: UuidArray) -> bytes:
        return obj


class _BigintArrayDumper(Dumper):
    format = Format.BINARY
    oid = 1016

    def dump(self, obj: BigintArray) -> bytes:
        return obj


class ChunkWriter:
    """Stores chunks: each one transaction that locks, numbers, copies, and moves the import's checkpoint."""

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        statements: Statements,
        import_id: str,
        source_name: str,
        generation: int,
    ) -> None:
        self._connection = connection
        self._statements = statements
        self._import_id = import_id
        self._source_name = source_name
        self._generation = generation
        self._socket = select.poll()
        self._socket.register(connection.fileno(), select.POLLOUT)

    def find_checkpoint(self) -> tuple[Checkpoint, int]:
        """Return how far this import has come, and how many events it has stored; all zero if it is new."""
        self._execute(self._statements.start_import, (self._import_id,))
        row = self._execute(self._statements.find_import, (self._import_id,)).fetchone()
        assert row is not None
        line_no, byte_offset, digest, event_count, _finished, _shard_count = row
        return Checkpoint(line_no, byte_offset, digest or blake2b(digest_size=32).digest()), event_count

    def store(self, chunk: Chunk, meanwhile: ChunkMaker) -> tuple[Cursor | None, int]:
        """Store *chunk*; encode on with *meanwhile* while the server is busy.

        Returns the cursor of its first event (None without events) and how many of its streams are new. Raises
        ImportFailed where the server refuses a row, a rival moved the checkpoint, or the streams stay locked; nothing
        is stored then.
        """
        began = time.monotonic()
        while True:
            try:
                return self._try_to_store(chunk, meanwhile)
            except (DeadlockDetected, LockNotAvailable) as error:
                # Somebody holds a stream of ours, or waits in another order than ours. Let go of all, and try again.
                if time.monotonic() - began > LOCK_PATIENCE_S:
                    what = error.diag.message_primary or str(error)
                    reason = f"streams of the chunk stayed locked for {LOCK_PATIENCE_S:.0f} s: {what}"
                    raise self._failed(reason, chunk) from error
                time.sleep(random.uniform(0.005, 0.05))

    def _try_to_store(self, chunk: Chunk, meanwhile: ChunkMaker) -> tuple[Cursor | None, int]:
        first, new_streams = None, 0
        # Ends on every error, so that no lock outlives this call.
        with self._connection.transaction():
            self._execute(LIMIT_LOCK_WAIT.encode(), ())
            # First, so that a rival is met here and not at its events' ids: it waits, and then finds the row moved.
            moved = self._execute(
                self._statements.move_import,
                (
                    chunk.end.line_no, chunk.end.byte_offset, chunk.end.digest, len(chunk.rows), chunk.at_end,
                    self._import_id, chunk.start.line_no, chunk.start.byte_offset,
                ),
            )  # fmt: skip
            if moved.rowcount != 1:
                raise self._failed(f"another process runs the import {self._import_id!r}, and has moved on", chunk)
            if len(chunk.rows):
                first, new_streams = self._copy(chunk, meanwhile)
            # Last, in a snapshot of its own: what was committed while this append waited for its locks counts too.
            self._execute(self._statements.check_writable, (LAYOUT, self._generation))
        return first, new_streams

    def _copy(self, chunk: Chunk, meanwhile: ChunkMaker) -> tuple[Cursor, int]:
        rows = chunk.rows
        stream_ids, event_counts = rows.stream_arrays()
        begun = self._execute(self._statements.begin_copy, (UuidArray(stream_ids), BigintArray(event_counts)))
        result = begun.pgresult
        assert result is not None
        transaction_no, head_versions, started_at = (result.get_value(0, column) for column in range(3))
        assert transaction_no is not None
        assert head_versions is not None
        assert started_at is not None
        number = int.from_bytes(transaction_no, "big")
        now = _EPOCH + timedelta(microseconds=int.from_bytes(started_at, "big", signed=True))
        new_streams = rows.place(number, head_versions, now)
        try:
            with begun.copy(self._statements.copy_events) as copy:
                for block in rows.blocks(BLOCK_BYTES):
                    self._work_until_writable(meanwhile)
                    copy.write(block)
        except (psycopg.DataError, psycopg.IntegrityError, ProgramLimitExceeded, StatementTooComplex) as error:
            # Not chained: the server's detail and context quote what is stored, and tracebacks end up in logs.
            raise self._refused(error, chunk) from None
        return Cursor(number, 0), new_streams

    def _work_until_writable(self, meanwhile: ChunkMaker) -> None:
        while not self._socket.poll(0):
            # Never waits for the source: this transaction holds locks and a number.
            if not meanwhile.step(wait=False):
                self._socket.poll(1_000)
                return

    def _execute(self, statement: bytes, parameters: tuple[Any, ...]) -> psycopg.Cursor[tuple[Any, ...]]:
        cursor: psycopg.Cursor[tuple[Any, ...]] = psycopg.Cursor(self._connection)
        cursor.adapters.register_dumper(UuidArray, _UuidArrayDumper)
        cursor.adapters.register_dumper(BigintArray, _BigintArrayDumper)
        try:
            return cursor.execute(statement, parameters, binary=True, prepare=False)
        except psycopg.Error as error:
            if (refusal := refusal_of(error, self._statements.schema)) is not None:
                raise refusal from error
            raise

    def _refused(self, error: psycopg.Error, chunk: Chunk) -> ImportFailed:
        reason = error.diag.message_primary or str(error)
        if error.diag.constraint_name in OWN_CONSTRAINTS and error.diag.message_detail:
            reason = f"{reason}: {error.diag.message_detail}"  # ids and numbers; others' may show a payload
        # "COPY events, line 17": the row's number in the chunk; the words may be translated, the number is not. What
        # follows it can quote the payload and goes nowhere.
        context = (error.diag.context or "").partition(":")[0]
        row_no = next((int(word) for word in reversed(context.replace(",", " ").split()) if word.isdigit()), None)
        if row_no is None or not 1 <= row_no <= len(chunk.rows):
            return self._failed(f"in lines {chunk.start.line_no + 1} to {chunk.end.line_no}: {reason}", chunk)
        return self._failed(reason, chunk, chunk.line_of_row(row_no))

    def _failed(self, reason: str, chunk: Chunk, line_no: int | None = None) -> ImportFailed:
        return ImportFailed(
            reason,
            import_id=self._import_id,
            source=self._source_name,
            line_no=line_no,
            stored_lines=chunk.start.line_no,
        )
