"""Importing: lines into chunks, each chunk one append by COPY that commits together with its checkpoint.

The pipeline runs in one thread. While the server works on what was sent, the next chunk is read and encoded in small
steps, and before every step the socket is asked whether it takes more: with a second thread the sender would have to
wait for the interpreter lock, 5 ms by default, before each of its blocks. A chunk is encoded whole before anything is
locked; from then to its commit only bytes that exist are sent.
"""

from __future__ import annotations

import random
import select
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg.adapt import Dumper
from psycopg.errors import DeadlockDetected, LockNotAvailable, ProgramLimitExceeded, StatementTooComplex
from psycopg.pq import Format

from ._core import Cursor, EventRows
from .errors import ImportFailed
from .import_lines import BadLine, LineReader
from .import_source import ImportSource, LineSource, SourceError
from .schema import LAYOUT, refusal_of
from .statements import LIMIT_LOCK_WAIT

if TYPE_CHECKING:
    from .statements import Statements

CHUNK_SECONDS: Final = 0.25
"""What a chunk should take: as long as that live readers wait for events that follow it, and a crash repeats."""
FIRST_CHUNK_EVENTS: Final = 5_000
MOST_CHUNK_EVENTS: Final = 100_000
MOST_CHUNK_BYTES: Final = 32 * 1024 * 1024
"""Two chunks are in memory at a time: the one being sent and the one being encoded."""
BLOCK_BYTES: Final = 64 * 1024
LOCK_PATIENCE_S: Final = 60.0
"""How long a chunk is tried again while others hold its streams; each try ends by itself after two seconds."""
OWN_CONSTRAINTS: Final = frozenset({"events_pkey", "events_stream_key", "events_event_id_key"})
STEP_LINES: Final = 50
"""Lines encoded between two looks at the socket: about 0.15 ms, while its buffer holds milliseconds of work."""

_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)
_NOT_UTF8: Final = b"\xff"  # stands for a line that holds such bytes; recognised by identity


@dataclass(frozen=True, slots=True)
class ImportProgress:
    """How far a running import has come: what is stored, and how much of the source has been read."""

    events: int
    lines: int
    seconds: float
    source_bytes_read: int
    source_size: int | None


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What one call of ``import_events`` did.

    ``events`` were stored by this call, ``skipped_events`` by an earlier one under the same import id; ``new_streams``
    had no event before; ``bytes`` are those of the lines (decompressed) behind the skipped ones.
    """

    import_id: str
    events: int
    skipped_events: int
    new_streams: int
    lines: int
    bytes: int
    seconds: float
    first_cursor: Cursor | None
    last_cursor: Cursor | None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A place between two lines of a source: *line_no* lines and *byte_offset* bytes lie before it."""

    line_no: int
    byte_offset: int
    digest: bytes


@dataclass(slots=True)
class Chunk:
    """Encoded events and the places where their lines begin and end in the source."""

    rows: EventRows
    start: Checkpoint
    end: Checkpoint
    blank_lines: list[int]
    at_end: bool

    def line_of_row(self, row_no: int) -> int:
        """Return the number of the line that the chunk's row *row_no* (from 1) came from."""
        line_no = self.start.line_no + row_no
        for blank in self.blank_lines:
            if blank <= line_no:
                line_no += 1
        return line_no


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


class ChunkMaker:
    """Reads lines and encodes them, chunk after chunk, as much at a time as it is told to."""

    def __init__(self, source: LineSource, import_id: str, most_events: int) -> None:
        self.most_events = most_events
        self._source = source
        self._import_id = import_id
        self._reader = LineReader(import_id)
        self._digest = blake2b(digest_size=32)
        self._digested = 0  # bytes of the block that the digest has seen
        self._block = b""
        self._block_at = 0  # where in the block the next line begins
        self._waiting: deque[bytes] = deque()
        self._line_no = 0
        self._offset = 0
        self._ended = False
        self._failure: Exception | None = None  # raised when its chunk is due: the one before it is not to blame
        self._begin()

    def skip_to(self, checkpoint: Checkpoint) -> None:
        """Pass over the lines before *checkpoint*. Raises ImportFailed if they are not the ones it was made after."""
        block, rest = b"", 0
        while self._offset < checkpoint.byte_offset:
            try:
                following = self._source.next_block(wait=True)
            except SourceError as error:
                raise self._failed(error.reason, error.line_no, None) from error
            if following == "end" or following == "not yet":
                raise self._changed(checkpoint, "it is shorter now")
            block, rest = following, checkpoint.byte_offset - self._offset
            self._digest.update(memoryview(block)[:rest])
            self._offset += min(rest, len(block))
        self._line_no = checkpoint.line_no
        if self._digest.digest() != checkpoint.digest:
            raise self._changed(checkpoint, "its bytes differ now")
        self._begin()
        if rest < len(block):
            self._take_block(block, rest)
            if rest and block[rest - 1 : rest] != b"\n":
                # The last line done had no newline yet. What comes before the next one still belongs to it.
                remainder = self._waiting.popleft()
                if remainder and not remainder.isspace():
                    raise self._changed(checkpoint, "its last line went on")
                self._offset += len(remainder) + 1
                self._block_at += len(remainder) + 1
                self._correct_end()

    def step(self, *, wait: bool, lines: int = STEP_LINES) -> bool:
        """Encode up to *lines* more lines. False if the chunk is done, or the source has nothing ready."""
        if self.done:
            return False
        if not self._waiting and not self._next_block(wait=wait):
            return False
        rows, add, waiting = self._rows, self._reader.add, self._waiting
        room = min(lines, len(waiting), self.most_events - len(rows))
        for _ in range(room):
            line = waiting.popleft()
            self._line_no += 1
            if line and not line.isspace():
                try:
                    add(line, self._line_no, rows)
                except BadLine as error:
                    reason = "invalid UTF-8" if line is _NOT_UTF8 else str(error)
                    self._failure = self._failed(reason, self._line_no, self._offset)
                    return False
            else:
                self._blank_lines.append(self._line_no)
            self._offset += len(line) + 1
            self._block_at += len(line) + 1
        self._correct_end()
        return True

    def _correct_end(self) -> None:
        if self._block_at > len(self._block):
            # The last line of a source may lack its newline, which was counted.
            self._offset -= 1
            self._block_at -= 1

    @property
    def done(self) -> bool:
        """Whether the chunk is full, or nothing can follow it."""
        return (
            self._ended
            or self._failure is not None
            or len(self._rows) >= self.most_events
            or self._rows.byte_count >= MOST_CHUNK_BYTES
        )

    def finish(self) -> Chunk:
        """Complete the chunk, waiting for the source where need be, and begin the next one.

        Raises ImportFailed if one of its lines is bad, or what the source raised: nothing of such a chunk is stored.
        """
        while self.step(wait=True, lines=1_000):
            pass
        if self._failure is not None:
            raise self._failure
        self._digest.update(memoryview(self._block)[self._digested : self._block_at])
        self._digested = self._block_at
        end = Checkpoint(self._line_no, self._offset, self._digest.digest())
        chunk = Chunk(self._rows, self._start, end, self._blank_lines, self._ended)
        self._begin()
        return chunk

    def _begin(self) -> None:
        self._rows = EventRows()
        self._blank_lines: list[int] = []
        self._start = Checkpoint(self._line_no, self._offset, self._digest.digest())

    def _next_block(self, *, wait: bool) -> bool:
        try:
            block = self._source.next_block(wait=wait)
        except SourceError as error:
            self._failure = self._failed(error.reason, error.line_no, None)
            return False
        except Exception as error:  # noqa: BLE001 - whatever the caller's source raises; kept, and raised by finish()
            self._failure = error
            return False
        if block == "not yet":
            return False
        self._digest.update(memoryview(self._block)[self._digested :])
        if block == "end":
            self._block, self._block_at, self._digested = b"", 0, 0
            self._ended = True
            return False
        self._take_block(block, 0)
        return True

    def _take_block(self, block: bytes, start: int) -> None:
        """Take the lines of *block* from *start* on."""
        self._block, self._block_at, self._digested = block, start, start
        text = block[start:] if start else block
        if self._offset == 0 and text.startswith(b"\xef\xbb\xbf"):
            text = b"   " + text[3:]  # a byte order mark, passed over as white space; offsets stay true
        damaged = False
        try:
            # Checked a block at a time: what lies inside data is not decoded here, and the server would refuse it late.
            text.decode()
        except UnicodeDecodeError as error:
            # The lines before the damage are good; the one that holds it fails, and nothing after it is read.
            text = text[: text.rfind(b"\n", 0, error.start) + 1]
            damaged = True
        self._waiting = deque(text.split(b"\n"))
        if not self._waiting[-1]:
            self._waiting.pop()
        if damaged:
            self._waiting.append(_NOT_UTF8)

    def _failed(self, reason: str, line_no: int | None, offset: int | None) -> ImportFailed:
        return ImportFailed(
            reason,
            import_id=self._import_id,
            source=self._source.name,
            line_no=line_no,
            byte_offset=offset,
            stored_lines=self._start.line_no,
        )

    def _changed(self, checkpoint: Checkpoint, how: str) -> ImportFailed:
        return ImportFailed(
            f"its first {checkpoint.line_no} lines ({checkpoint.byte_offset} bytes) were imported before under the id"
            f" {self._import_id!r}, and {how}; give another file another import id",
            import_id=self._import_id,
            source=self._source.name,
            stored_lines=checkpoint.line_no,
        )


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


def check_import_id(import_id: str) -> str:
    """Return *import_id*. Raises TypeError or ValueError unless it is a text that PostgreSQL can hold."""
    if not isinstance(import_id, str):
        raise TypeError(f"import_id must be a str, not {type(import_id).__name__}")
    if not import_id or len(import_id) > 500 or "\0" in import_id:
        raise ValueError("import_id must have 1 to 500 characters, none of them NUL")
    import_id.encode()  # a lone surrogate is a UnicodeEncodeError, which is a ValueError
    return import_id


def run_import(
    connection: psycopg.Connection[Any],
    statements: Statements,
    source: ImportSource,
    *,
    import_id: str,
    generation: int,
    chunk_size: int | None,
    progress: Callable[[ImportProgress], object] | None,
) -> ImportReport:
    """Import *source* over *connection* (in autocommit mode); the store's ``import_events`` tells the rest."""
    began = time.monotonic()
    lines = LineSource(source)
    try:
        writer = ChunkWriter(connection, statements, import_id, lines.name, generation)
        checkpoint, skipped = writer.find_checkpoint()
        maker = ChunkMaker(lines, import_id, chunk_size or FIRST_CHUNK_EVENTS)
        maker.skip_to(checkpoint)
        events, new_streams = 0, 0
        first: Cursor | None = None
        last: Cursor | None = None
        end = checkpoint
        while True:
            chunk = maker.finish()
            chunk_began = time.monotonic()
            cursor, begun_streams = writer.store(chunk, maker)
            end = chunk.end
            new_streams += begun_streams
            events += len(chunk.rows)
            if cursor is not None:
                first = first or cursor
                last = Cursor(cursor.transaction_no, len(chunk.rows) - 1)
            now = time.monotonic()
            if progress is not None:
                progress(ImportProgress(skipped + events, end.line_no, now - began, lines.bytes_read, lines.size))
            if chunk.at_end:
                break
            if chunk_size is None and len(chunk.rows):
                maker.most_events = next_chunk_events(len(chunk.rows), now - chunk_began)
    finally:
        lines.close()
    return ImportReport(
        import_id=import_id,
        events=events,
        skipped_events=skipped,
        new_streams=new_streams,
        lines=end.line_no - checkpoint.line_no,
        bytes=end.byte_offset - checkpoint.byte_offset,
        seconds=time.monotonic() - began,
        first_cursor=first,
        last_cursor=last,
    )


def next_chunk_events(events: int, seconds: float) -> int:
    """How many events the next chunk should take, when *events* took *seconds*: at most twice as many, or half."""
    wanted = int(events * CHUNK_SECONDS / max(seconds, 1e-6))
    return max(min(wanted, 2 * events, MOST_CHUNK_EVENTS), events // 2, 100)
