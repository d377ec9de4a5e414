"""An initial import: an empty store is filled by tables that gather beside its own and take their places at the end.

In steps, each of which can be interrupted and repeated: the store is closed to appends and the tables are made
(``begin_initial_v1``); chunks of lines are stored in them, each with its checkpoint; indexes and heads are built; one
transaction exchanges the tables and opens the store (``switch_initial_v1``). docs/importing.md says why nothing is
lost.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import psycopg
from psycopg import errors
from psycopg.rows import tuple_row

from ._core import Cursor, EventRows
from .begin_copy import execute
from .errors import ImportFailed, SchemaError
from .import_build import BesideBuild, DuplicatedIds
from .import_chunks import Chunk, ChunkMaker
from .import_rejects import RejectFile
from .import_writer import ROW_ERRORS, ChunkWriter
from .statements import LIMIT_DROP_WAIT, LIMIT_GATE_WAIT, LOCK_INITIAL, OPEN_SNAPSHOTS, TABLE_USERS, UNLOCK_INITIAL

if TYPE_CHECKING:
    from .statements import Statements

Phase = Literal["lines", "indexes", "switch"]

BEGIN_PATIENCE_S: Final = 60.0
"""How long to wait for a moment at which no append is under way; each try holds appends up for 100 ms at most."""
SWITCH_PATIENCE_S: Final = 300.0
"""How long to wait for transactions that still read the empty tables, or might see half of the new ones."""
DROP_PATIENCE_S: Final = 60.0
RIVAL_PATIENCE_S: Final = 3.0
"""How long the lock of an importer that was killed may stay: until its backend looks for its client."""
LISTED_IDS: Final = 100
NAMED_IDS: Final = 5

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class InitialImport:
    """One run of an initial import. Use it in a ``with`` statement, over a connection in autocommit mode.

    Entering it raises ImportFailed while another process imports into the store, SchemaError where the store cannot
    take an initial import: it holds events, or another one is not finished.
    """

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        lend: Callable[..., AbstractContextManager[psycopg.Connection[Any]]],
        statements: Statements,
        import_id: str,
        source_name: str,
    ) -> None:
        self._connection = connection
        self._lend = lend
        self._statements = statements
        self._import_id = import_id
        self._source_name = source_name
        self._next_number: int | None = None  # None: it was finished before
        self._loaded = False

    def __enter__(self) -> Self:
        if not _lock(self._connection, self._statements):
            raise self._failed("another process runs an initial import into this store")
        try:
            self._begin()
        except BaseException:
            _unlock(self._connection, self._statements)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _unlock(self._connection, self._statements)

    def writer(self, generation: int, rejects: RejectFile | None) -> ChunkWriter:
        """Return what stores the chunks."""
        return InitialWriter(
            self._connection,
            self._statements,
            self._import_id,
            self._source_name,
            generation,
            rejects,
            next_number=self._next_number,
            loaded=self._loaded,
        )

    def complete(self, tell: Callable[[Phase, float | None], object]) -> None:
        """Build what is lacking, and switch; called when all lines are stored.

        Raises ImportFailed for ids that come twice (the store is then empty and open again), and where others keep the
        switch waiting for too long: it alone is then left to be done by the next run.
        """
        if self._next_number is None:
            return
        try:
            BesideBuild(self._connection, self._lend, self._statements).run(lambda share: tell("indexes", share))
        except DuplicatedIds:
            with self._connection.transaction():
                self._execute(self._statements.limit_build)
                duplicated = self._execute(self._statements.duplicated_ids, LISTED_IDS).fetchall()
            _drop(self._connection, self._statements, self._import_id)
            raise self._duplicated(duplicated) from None
        except ROW_ERRORS as error:
            # An index of the user's own making that does not take these events.
            reason = error.diag.message_primary or "the server refuses what was loaded"
            raise self._unfinished(f"an index cannot be built: {reason}") from None
        except errors.LockNotAvailable as error:
            raise self._unfinished("somebody keeps the import's tables locked") from error
        tell("switch", None)
        deadline = time.monotonic() + SWITCH_PATIENCE_S
        self._wait_for_old_snapshots(deadline)
        self._switch(deadline)

    def _begin(self) -> None:
        found = self._execute(self._statements.find_initial).fetchone()
        if found is None and self._execute(self._statements.import_finished, self._import_id).fetchone() == (True,):
            return
        if found is None or found[0] != self._import_id:
            # Of another import it says how to go on, or how to give it up.
            self._close_the_store()
            found = self._execute(self._statements.find_initial).fetchone()
        assert found is not None
        _import_id, self._next_number, self._loaded = found

    def _close_the_store(self) -> None:
        deadline = time.monotonic() + BEGIN_PATIENCE_S
        while True:
            try:
                with self._connection.transaction():
                    self._execute(LIMIT_GATE_WAIT.encode())
                    self._execute(self._statements.begin_initial, self._import_id)
                return
            except (errors.LockNotAvailable, errors.DeadlockDetected) as error:
                if time.monotonic() > deadline:
                    reason = f"for {BEGIN_PATIENCE_S:.0f} s there was always an append under way"
                    raise self._failed(reason) from error
                time.sleep(random.uniform(0.05, 0.3))

    def _wait_for_old_snapshots(self, deadline: float) -> None:
        """Wait for the transactions that have begun before all was loaded and built.

        A name leads to the newest table, whatever the snapshot: one of a REPEATABLE READ transaction that was taken
        between two chunks would show, after the switch, the chunks before it and not those behind it.
        """

        def running() -> dict[str, int]:
            return dict(self._execute(OPEN_SNAPSHOTS.encode()).fetchall())

        old = running()
        while old:
            if time.monotonic() > deadline:
                raise self._unfinished(f"transactions are open that began before, in {_processes(old.values())}")
            time.sleep(0.05)
            still = running()
            old = {transaction: pid for transaction, pid in old.items() if transaction in still}

    def _switch(self, deadline: float) -> None:
        while True:
            try:
                with self._connection.transaction():
                    self._execute(self._statements.limit_build)
                    self._execute(self._statements.switch_initial, self._import_id)
                return
            except (errors.LockNotAvailable, errors.DeadlockDetected) as error:
                if time.monotonic() > deadline:
                    tables = [f"{self._statements.quoted_schema}.{name}" for name in ("events", "stream_heads")]
                    users = self._execute(TABLE_USERS.encode(), *tables).fetchall()
                    raise self._unfinished(
                        f"the store's tables are in use, by {_processes(pid for (pid,) in users)}"
                    ) from error
                # Those who had to queue behind this attempt go first.
                time.sleep(random.uniform(0.1, 0.5))

    def _execute(self, statement: bytes, *parameters: Any) -> psycopg.Cursor[tuple[Any, ...]]:
        return execute(self._connection, self._statements, statement, parameters)

    def _duplicated(self, found: list[tuple[Any, ...]]) -> ImportFailed:
        count = found[0][0]
        duplicates = tuple((event_id, tuple(lines)) for _count, event_id, lines in found)
        named = [f"{each} (lines {', '.join(map(str, lines[:5]))})" for each, lines in duplicates[:NAMED_IDS]]
        if count > len(named):
            named.append(f"and {count - len(named)} more")
        what = "1 id stands" if count == 1 else f"{count} ids stand"
        return ImportFailed(
            f"{what} on more than one line: {', '.join(named)}. The store is empty and open again: mend the lines and"
            " import anew",
            import_id=self._import_id,
            source=self._source_name,
            duplicates=duplicates,
            duplicate_count=count,
        )

    def _unfinished(self, reason: str) -> ImportFailed:
        return self._failed(f"all lines are loaded, but {reason}. Run the import again: it goes on from here")

    def _failed(self, reason: str) -> ImportFailed:
        return ImportFailed(reason, import_id=self._import_id, source=self._source_name)


class InitialWriter(ChunkWriter):
    """Stores chunks in the table beside the log: no heads to lock, no number to draw, no index to keep.

    It counts each stream's events itself, in a dict that takes up to 160 bytes a stream; on resume that is filled from
    the table. *next_number* is the transaction_no of the next chunk, None if the import was finished before; *loaded*
    says that all lines were stored before.
    """

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        statements: Statements,
        import_id: str,
        source_name: str,
        generation: int,
        rejects: RejectFile | None = None,
        *,
        next_number: int | None,
        loaded: bool,
    ) -> None:
        super().__init__(connection, statements, import_id, source_name, generation, rejects)
        self._next_number = next_number
        self._loaded = loaded
        self._now = _EPOCH
        self._event_counts: dict[bytes, int] = {}
        self._advanced: dict[bytes, int] = {}  # of the chunk that is being stored
        if next_number is not None and not loaded:
            self._count_streams()

    def _count_streams(self) -> None:
        # By a cursor of the server's: all of the streams at once would be in memory twice.
        with self._connection.transaction():
            self._execute(self._statements.limit_build, ())
            with psycopg.ServerCursor(self._connection, "hindsight_streams", row_factory=tuple_row) as cursor:
                cursor.itersize = 10_000
                cursor.execute(self._statements.count_streams, (), binary=True)
                self._event_counts.update(cursor)

    def _try_to_store(self, chunk: Chunk, meanwhile: ChunkMaker | None) -> tuple[Cursor | None, int]:
        first, new_streams = None, 0
        if self._next_number is None or self._loaded:
            if len(chunk.rows):
                behind = "behind the lines that this import began with there are more now"
                raise self._failed(f"{behind}; when it is finished, mode='append' goes on with them", chunk)
            return None, 0
        with self._connection.transaction():
            self._limit()
            moved = self._execute(
                self._statements.move_import,
                (
                    # Finished once it is switched in.
                    chunk.end.line_no, chunk.end.byte_offset, chunk.end.digest, len(chunk.rows), False,
                    self._import_id, chunk.shard, chunk.start.line_no, chunk.start.byte_offset,
                ),
            )  # fmt: skip
            numbers = 1 if len(chunk.rows) else 0
            row = self._execute(
                self._statements.move_initial, (numbers, chunk.at_end, self._import_id, self._next_number)
            ).fetchone()
            if moved.rowcount != 1 or row is None:
                raise self._failed(f"another process runs the import {self._import_id!r}, or has abandoned it", chunk)
            self._now = _EPOCH + timedelta(microseconds=row[0])
            if len(chunk.rows):
                first, new_streams = self._copy(chunk.rows, meanwhile)
                self._execute(self._statements.note_lines, (self._next_number, *_line_runs(chunk)))
        self._next_number += numbers
        self._event_counts.update(self._advanced)
        self._advanced = {}
        return first, new_streams

    def _copy(self, rows: EventRows, meanwhile: ChunkMaker | None) -> tuple[Cursor, int]:
        assert self._next_number is not None
        new_streams = rows.place(self._next_number, self._head_versions(rows), self._now)
        self._send(self._statements.copy_beside, rows, meanwhile)
        return Cursor(self._next_number, 0), new_streams

    def _head_versions(self, rows: EventRows) -> bytes:
        """What begin_copy_v1 would have answered: each stream's version behind these rows, as a binary bigint[]."""
        stream_ids, event_counts = rows.stream_arrays()
        heads = bytearray(event_counts)
        self._advanced = {}
        # Behind an array's header of 20 bytes, each value behind its length of 4.
        for id_at, count_at in zip(range(24, len(stream_ids), 20), range(24, len(heads), 12), strict=True):
            stream_id = stream_ids[id_at : id_at + 16]
            count = self._event_counts.get(stream_id, 0) + int.from_bytes(heads[count_at : count_at + 8], "big")
            self._advanced[stream_id] = count
            heads[count_at : count_at + 8] = (count - 1).to_bytes(8, "big")
        return bytes(heads)


def abandon_initial(connection: psycopg.Connection[Any], statements: Statements, import_id: str) -> None:
    """Give up an initial import that is not finished; see ``EventStore.abandon_import``."""

    def refused(reason: str) -> SchemaError:
        return SchemaError(f"schema {statements.schema!r}: {reason}", schema=statements.schema)

    def is_under_way() -> bool:
        found = execute(connection, statements, statements.find_initial, ()).fetchone()
        return found is not None and found[0] == import_id

    if not is_under_way():
        if execute(connection, statements, statements.find_import, (import_id,)).fetchone() is None:
            raise refused(f"there is no import {import_id!r} to abandon")
        raise refused(f"nothing to abandon: what the import {import_id!r} has stored is part of the log, and stays")
    if not _lock(connection, statements):
        raise refused(f"the import {import_id!r} is running: stop it first")
    try:
        if is_under_way():
            _drop(connection, statements, import_id)
    finally:
        _unlock(connection, statements)


def _drop(connection: psycopg.Connection[Any], statements: Statements, import_id: str) -> None:
    deadline = time.monotonic() + DROP_PATIENCE_S
    while True:
        try:
            with connection.transaction():
                execute(connection, statements, statements.limit_build, ())
                execute(connection, statements, LIMIT_DROP_WAIT.encode(), ())
                execute(connection, statements, statements.drop_initial, (import_id,))
            return
        except (errors.LockNotAvailable, errors.DeadlockDetected):
            # A backend whose importer was killed notices within a second or two.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _lock(connection: psycopg.Connection[Any], statements: Statements) -> bool:
    """Take this session's lock on the store's initial import; False if another session keeps it."""
    place = (f"{statements.quoted_schema}.store_meta",)
    deadline = time.monotonic() + RIVAL_PATIENCE_S
    while True:
        row = execute(connection, statements, LOCK_INITIAL.encode(), place).fetchone()
        # NULL where there is no store: whatever comes next says so.
        if row is None or row[0] is not False:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _unlock(connection: psycopg.Connection[Any], statements: Statements) -> None:
    """Let go of the lock; of the whole connection, where it is in no state to be asked."""
    try:
        execute(connection, statements, UNLOCK_INITIAL.encode(), (f"{statements.quoted_schema}.store_meta",))
    except psycopg.Error:
        connection.close()


def _line_runs(chunk: Chunk) -> tuple[list[int], list[int]]:
    """Where in the chunk and in the source each run of consecutive lines begins."""
    sequence_nos, line_nos = [0], [chunk.line_nos[0]]
    if chunk.line_nos[-1] - chunk.line_nos[0] >= len(chunk.line_nos):
        for sequence_no in range(1, len(chunk.line_nos)):
            if chunk.line_nos[sequence_no] != chunk.line_nos[sequence_no - 1] + 1:
                sequence_nos.append(sequence_no)
                line_nos.append(chunk.line_nos[sequence_no])
    return sequence_nos, line_nos


def _processes(pids: Any) -> str:
    numbers = sorted(set(pids))
    return f"process{'es' if len(numbers) != 1 else ''} {', '.join(map(str, numbers))}"
