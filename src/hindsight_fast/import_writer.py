"""Storing chunks: each one an append by COPY that commits together with its checkpoint.

While the server works on what was sent, the same thread reads and encodes the next chunk in small steps, and before
every step the socket is asked whether it takes more: a second thread that sends would have to wait for the interpreter
lock, 5 ms by default, before each of its blocks. From the first lock to the commit only bytes that exist are sent.
"""

from __future__ import annotations

import random
import select
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import psycopg
from psycopg import errors

from ._core import Cursor, EventRows, RecordedEvent, decode_row
from .begin_copy import UuidArray, begin_copy, execute
from .errors import ImportFailed
from .import_chunks import Checkpoint, Chunk, ChunkMaker
from .import_rejects import RejectFile, TooManyRejects
from .reading import MAX_HOLD_S
from .results import events_of
from .schema import LAYOUT
from .statements import CHECK_DEFERRED, LIMIT_CHUNK

if TYPE_CHECKING:
    from .statements import Statements

T = TypeVar("T")

BLOCK_BYTES: Final = 64 * 1024
LOCK_PATIENCE_S: Final = 60.0
"""How long a chunk is tried again while others hold its streams; each try ends by itself after two seconds."""

# What the server says of a row that it does not take, at once or at the commit.
ROW_ERRORS: Final = (
    errors.DataError, errors.IntegrityError, errors.ProgramLimitExceeded, errors.StatementTooComplex,
    errors.RaiseException,
)  # fmt: skip
OWN_CONSTRAINTS: Final = frozenset({"events_pkey", "events_stream_key", "events_event_id_key"})
IDS_CONSTRAINT: Final = "events_event_id_key"


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of a chunk: events stored, streams begun, rows left out as known, lines rejected."""

    events: int
    new_streams: int
    known: int
    rejected: int
    first: Cursor | None
    seconds: float

    @property
    def last(self) -> Cursor | None:
        return None if self.first is None else Cursor(self.first.transaction_no, self.events - 1)


class Refused(Exception):
    """A row of the chunk that cannot be stored, and why."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(reason)
        self.row = row
        self.reason = reason


def find_checkpoints(
    connection: psycopg.Connection[Any],
    statements: Statements,
    import_id: str,
    source_name: str,
    jobs: int,
    *,
    begin: bool = True,
) -> tuple[list[Checkpoint], int]:
    """Return how far each of an import's shards has come, and how many events it has stored; all zero if it is new.

    With *begin* it is then on record. Raises ImportFailed if it was begun with another number of jobs.
    """
    with connection.transaction():
        if begin:
            execute(connection, statements, statements.start_import, (import_id, jobs, jobs))
        rows = execute(connection, statements, statements.find_import, (import_id,)).fetchall()
        if rows and rows[0][4] != jobs:
            # Raised in here, so that nothing is left of what was begun just now.
            raise ImportFailed(
                f"the import {import_id!r} was begun with jobs={rows[0][4]}: go on with as many",
                import_id=import_id,
                source=source_name,
                stored_lines=min(row[0] for row in rows),
            )
    start = Checkpoint.at_start()
    if not rows:
        return [start] * jobs, 0
    return [Checkpoint(row[0], row[1], row[2] or start.digest) for row in rows], sum(row[3] for row in rows)


class ChunkWriter:
    """Stores the chunks of one shard: each one transaction that locks, numbers, copies, and moves the checkpoint.

    With *rejects* a line that the server refuses goes there, otherwise it ends the import.
    """

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        statements: Statements,
        import_id: str,
        source_name: str,
        generation: int,
        rejects: RejectFile | None = None,
    ) -> None:
        self._connection = connection
        self._statements = statements
        self._import_id = import_id
        self._source_name = source_name
        self._generation = generation
        self._rejects = rejects
        self._hurried = False
        self._sent = Chunk(Checkpoint.at_start())  # the chunk of the last try, without what was left out
        self._look_up_ids = False  # on from the first known id to the first chunk without one
        self._socket = select.poll()
        self._socket.register(connection.fileno(), select.POLLOUT)

    def store(self, chunk: Chunk, meanwhile: ChunkMaker | None = None) -> Stored:
        """Store *chunk*; encode on with *meanwhile* while the server is busy.

        Rows whose events the store has already, under the same ids and with the same content, are left out. Raises
        ImportFailed where the server refuses a row (unless such lines are collected), a rival moved the checkpoint, or
        the streams stay locked; nothing is stored then.
        """
        began = time.monotonic()
        while True:
            self._write_rejects(chunk)
            self._sent = chunk
            try:
                first, new_streams = self._while_locked(chunk, lambda: self._try_to_store(chunk, meanwhile))
                events = len(self._sent.rows)
                known = len(chunk.rows) - events
                return Stored(events, new_streams, known, len(chunk.rejected), first, time.monotonic() - began)
            except ROW_ERRORS as error:
                refusal: psycopg.Error | Refused = error
            except Refused as refused:
                refusal = refused
            # Out here, where nothing is chained to it: the server's detail and context quote what is stored, and
            # tracebacks end up in logs.
            if isinstance(refusal, Refused):
                self._refuse(chunk, refusal.row, refusal.reason)
                continue
            constraint = refusal.diag.constraint_name
            if constraint == IDS_CONSTRAINT and time.monotonic() - began < LOCK_PATIENCE_S:
                # Somebody has these ids: the next try finds out who. (A rival may bring them after the look-up, too.)
                self._look_up_ids = True
                continue
            row, reason = self._refused_row(refusal, self._sent), _reason_of(refusal)
            if row is None and time.monotonic() - began < LOCK_PATIENCE_S and not self._hurried:
                continue  # all rows are taken now
            if row is None or constraint in OWN_CONSTRAINTS:
                raise self._failed(reason, self._sent, row)  # no fault of a line's
            self._refuse(chunk, chunk.line_nos.index(self._sent.line_nos[row]), reason)

    def hurry(self) -> None:
        """Let the chunk that is being stored wait for no more locks; from another thread."""
        self._hurried = True

    def _while_locked(self, chunk: Chunk, attempt: Callable[[], T]) -> T:
        """Return what *attempt* does, tried again while others hold a stream of ours or wait in another order."""
        began = time.monotonic()
        while True:
            try:
                return attempt()
            except (errors.DeadlockDetected, errors.LockNotAvailable) as error:
                waited_s = time.monotonic() - began
                if waited_s > LOCK_PATIENCE_S or self._hurried:
                    what = error.diag.message_primary or str(error)
                    reason = f"streams of the chunk stayed locked for {waited_s:.0f} s: {what}"
                    raise self._failed(reason, chunk) from error
                time.sleep(random.uniform(0.005, 0.05))

    def _try_to_store(self, chunk: Chunk, meanwhile: ChunkMaker | None) -> tuple[Cursor | None, int]:
        first, new_streams = None, 0
        # Ends on every error, so that no lock outlives this call.
        with self._connection.transaction():
            self._limit()
            # Found out anew at each try: what a row is known by may be rejected, or rolled back.
            if self._look_up_ids and len(chunk.rows):
                self._sent = self._without_known(chunk)
            rows = self._sent.rows
            # Before all locks of streams, so that a rival is met here: it waits, and then finds the row moved.
            moved = self._execute(
                self._statements.move_import,
                (
                    chunk.end.line_no, chunk.end.byte_offset, chunk.end.digest, len(rows), chunk.at_end,
                    self._import_id, chunk.shard, chunk.start.line_no, chunk.start.byte_offset,
                ),
            )  # fmt: skip
            if moved.rowcount != 1:
                raise self._failed(f"another process runs the import {self._import_id!r}, and has moved on", chunk)
            if len(rows):
                first, new_streams = self._copy(rows, meanwhile)
            # Last, in a snapshot of its own: what was committed while this append waited for its locks counts too.
            self._execute(self._statements.check_writable, (LAYOUT, self._generation))
        return first, new_streams

    def _limit(self) -> None:
        self._execute(LIMIT_CHUNK.encode(), (f"{MAX_HOLD_S * 1000:.0f}ms",))

    def _copy(self, rows: EventRows, meanwhile: ChunkMaker | None) -> tuple[Cursor, int]:
        begun = begin_copy(self._connection, self._statements, rows)
        new_streams = rows.place(begun.transaction_no, begun.head_versions, begun.started_at)
        self._send(self._statements.copy_events, rows, meanwhile)
        return Cursor(begun.transaction_no, 0), new_streams

    def _send(self, statement: bytes, rows: EventRows, meanwhile: ChunkMaker | None) -> None:
        """Send placed *rows* by a COPY statement."""
        with psycopg.Cursor(self._connection).copy(statement) as copy:
            for block in rows.blocks(BLOCK_BYTES):
                if meanwhile is not None:
                    self._work_until_writable(meanwhile)
                copy.write(block)

    def _work_until_writable(self, meanwhile: ChunkMaker) -> None:
        while not self._socket.poll(0):
            # Never waits for the source: this transaction holds locks and a number.
            if not meanwhile.step(wait=False):
                self._socket.poll(1_000)
                return

    def _without_known(self, chunk: Chunk) -> Chunk:
        """Return the chunk without what is stored or stands in it before. Raises Refused for other content."""
        rows = chunk.rows
        ids = rows.event_ids()
        result = self._execute(self._statements.known_events, (UuidArray(ids),)).pgresult
        assert result is not None
        stored = {event.event_id.bytes: event for event in events_of(result)}
        first_rows: dict[bytes, int] = {}
        again = set()
        for row in range(len(rows)):
            at = 24 + 20 * row  # behind the array's header and the element's length
            event_id = ids[at : at + 16]
            known, dated = stored.get(event_id), rows.is_dated(row)
            if known is None:
                first = first_rows.setdefault(event_id, row)
                if first == row:
                    continue
                known = decode_row(rows.row(first))
                if dated and not rows.is_dated(first):
                    # That one gets the server's time. The same as if it stood in the chunk before, and were stored.
                    raise Refused(row, f"the id {known.event_id} is known, with another time")
            if difference := _difference(decode_row(rows.row(row)), known, dated):
                raise Refused(row, f"the id {known.event_id} is known, with another {difference}")
            again.add(row)
        self._look_up_ids = bool(again)
        return chunk.without(again) if again else chunk

    def _refused_row(self, error: psycopg.Error, chunk: Chunk) -> int | None:
        """Which row the server does not take; None if it is none of them, or not any more."""
        # "COPY events, line 17": the number of the row; the words may be translated. What follows it can quote the
        # payload and goes nowhere.
        for line in reversed((error.diag.context or "").split("\n")):
            if line.startswith("COPY "):
                words = line.partition(":")[0].replace(",", " ").split()
                number = next((int(word) for word in words if word.isdigit()), 0)
                if 1 <= number <= len(chunk.rows):
                    return number - 1
        # Refused without a place, by a deferred constraint for one: halve what is tried until a single row is left.
        accepted, refused, middle = 0, len(chunk.rows) + 1, len(chunk.rows)
        while refused - accepted > 1:
            rows = chunk.rows.select(range(middle))
            taken = self._while_locked(chunk, lambda rows=rows: self._would_take(rows))  # type: ignore[misc]
            if taken is None:
                return None
            if taken:
                accepted = middle
            else:
                refused = middle
            middle = (accepted + refused) // 2
        return refused - 1 if refused <= len(chunk.rows) else None

    def _would_take(self, rows: EventRows) -> bool | None:
        """Whether the server takes *rows*; they are not stored. None if a rival has just brought one of their ids."""
        try:
            with self._connection.transaction(force_rollback=True):
                self._limit()
                self._copy(rows, None)
                self._execute(CHECK_DEFERRED.encode(), ())
        except ROW_ERRORS as error:
            return None if error.diag.constraint_name == IDS_CONSTRAINT else False
        return True

    def _refuse(self, chunk: Chunk, row: int, reason: str) -> None:
        """Reject a row's line. Raises ImportFailed where bad lines are not collected."""
        if self._rejects is None:
            raise self._failed(reason, chunk, row)
        chunk.reject(row, reason)

    def _write_rejects(self, chunk: Chunk) -> None:
        fresh = chunk.rejected[chunk.rejected_on_disk :]
        if self._rejects is not None and fresh:
            try:
                self._rejects.write(fresh, chunk.shard)
                chunk.rejected_on_disk += len(fresh)
            except TooManyRejects as error:
                raise ImportFailed(
                    f"{error.rejected.reason}; that is one bad line more than max_errors allows",
                    import_id=self._import_id,
                    source=self._source_name,
                    line_no=error.rejected.line_no,
                    byte_offset=error.rejected.byte_offset,
                    stored_lines=chunk.start.line_no,
                ) from None

    def _execute(self, statement: bytes, parameters: tuple[Any, ...]) -> psycopg.Cursor[tuple[Any, ...]]:
        return execute(self._connection, self._statements, statement, parameters)

    def _failed(self, reason: str, chunk: Chunk, row: int | None = None) -> ImportFailed:
        return ImportFailed(
            reason,
            import_id=self._import_id,
            source=self._source_name,
            line_no=None if row is None else chunk.line_nos[row],
            byte_offset=None if row is None else chunk.offsets[row],
            stored_lines=chunk.start.line_no,
        )


def _difference(mine: RecordedEvent, stored: RecordedEvent, dated: bool) -> str | None:
    """In what an event differs from the one that is stored under its id; None if in nothing that its line says."""
    for what, ours, theirs in (
        ("stream", mine.stream_id, stored.stream_id),
        ("type", mine.name, stored.name),
        ("version", mine.version, stored.version),
        ("data", mine.data, stored.data),
        ("metadata", mine.metadata_json, stored.metadata_json),
        ("correlation_id", mine.correlation_id, stored.correlation_id),
    ):
        if ours != theirs:
            return what
    return "time" if dated and mine.created_at != stored.created_at else None


def _reason_of(error: psycopg.Error) -> str:
    reason = error.diag.message_primary or str(error)
    if error.diag.constraint_name in OWN_CONSTRAINTS and error.diag.message_detail:
        reason = f"{reason}: {error.diag.message_detail}"  # ids and numbers; others' may show a payload
    return reason
