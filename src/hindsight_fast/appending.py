"""Appending from threads: alone, in groups, or over the caller's own connection."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg.pq import TransactionStatus

from ._core import Cursor
from .append_call import AppendCall, Attempts, check_lent, is_lost, server_changed
from .append_request import AppendRequest, Group, KnownIds, Outcome, SentOver
from .begin_copy import UuidArray, begin_copy_of, execute
from .connecting import check_encodings
from .errors import HindsightError
from .group_commit import GroupCommit
from .results import events_of
from .schema import LAYOUT
from .writes import AppendResult

if TYPE_CHECKING:
    from .statements import Statements

Connection = psycopg.Connection[Any]

COPY_FROM_BYTES: Final = 8 * 1024 * 1024
"""From this size on an append goes by COPY: arrays as parameters end at 1 GB, and are held several times."""

SHORT_PATIENCE: Final = "100ms"
"""How long a group waits for each lock. Then each of its requests goes by itself, and waits as long: one stream that
somebody keeps locked must not hold up those who want another."""
LONG_PATIENCE: Final = "2s"
"""How long a single request waits that has met such a stream; it tries again until the store's timeout. At most half of
the connections wait so: twelve callers for one locked stream once held all ten, and with them every other append."""
MOST_IDLE: Final = "60s"
"""How long a caller's own transaction may stand still once it holds a number: readers wait for it."""


class Appender:
    """Carries out the appends of one store.

    ``lend(timeout_s)`` gives a connection in autocommit mode; ``prepare(connection)`` returns the generation under which
    the store may write, after it has moved on a sequence that lags or changed hands.
    """

    def __init__(
        self,
        lend: Callable[[float], AbstractContextManager[Connection]],
        prepare: Callable[[Connection], int],
        statements: Statements,
        *,
        timeout_s: float,
        group_commit: bool,
        most_connections: int,
    ) -> None:
        self._lend = lend
        self._prepare = prepare
        self._statements = statements
        self._timeout_s = timeout_s
        self._call = AppendCall(statements)
        self._groups = GroupCommit(self._run_group) if group_commit else None
        self._patient = threading.BoundedSemaphore(max(1, most_connections // 2))
        self._generation: int | None = None

    def append(self, request: AppendRequest) -> AppendResult:
        """Append *request*. Raises ConcurrencyConflict, IdempotencyConflict, AppendOutcomeUnknown, SchemaError, or
        psycopg's own errors."""
        if not request.writes:
            return AppendResult(None)
        began = time.monotonic()
        outcome: Outcome | None = None
        if self._groups is not None and request.byte_count < COPY_FROM_BYTES:
            outcome = self._groups.submit(request, self._timeout_s)
        if outcome is None or isinstance(outcome, KnownIds):
            outcome = self._append_alone(request, began)
        return _result(outcome)

    def append_on(self, connection: Connection, request: AppendRequest) -> AppendResult:
        """Append *request* within the transaction of the caller's *connection*, or begin one where it is not in
        autocommit mode. Raises as ``append`` does; after a ConcurrencyConflict that transaction can go on."""
        check_lent(connection, psycopg.Connection)
        check_encodings(connection.info)
        if not request.writes:
            return AppendResult(None)
        generation = self._known_generation()
        if connection.info.transaction_status == TransactionStatus.IDLE and not connection.autocommit:
            # Through psycopg, which begins the transaction as the connection is set to.
            execute(connection, self._statements, self._statements.begin_append, ("", ""))
        try:
            outcome = self._run_alone(connection, request, generation, most_idle=MOST_IDLE, prepare=False)
        except Exception as error:
            if server_changed(error):
                # Not to be mended in a transaction that has failed: the next append begins with it.
                self._generation = None
            raise
        return _result(outcome)

    def _append_alone(self, request: AppendRequest, began: float) -> Outcome:
        attempts = Attempts(request, self._timeout_s, began)
        while True:
            sent: SentOver | None = None
            lost = False
            try:
                with ExitStack() as held:
                    patience = SHORT_PATIENCE
                    if attempts.met_lock and self._patient.acquire(timeout=attempts.left_s):
                        held.callback(self._patient.release)
                        patience = LONG_PATIENCE
                    connection = held.enter_context(self._lend(attempts.left_s))
                    if attempts.advance_sequence:
                        self._generation = None
                        attempts.advance_sequence = False
                    generation = self._ready(connection)
                    self._end_lost(connection, request)
                    sent = _sent_over(connection)
                    try:
                        return self._run_alone(connection, request, generation, patience=patience)
                    except BaseException:
                        lost = is_lost(connection)
                        raise
            except Exception as error:  # noqa: BLE001 - raised again unless it is worth another attempt
                if lost:
                    request.lost_backend = sent
                delay_s = attempts.after(error, lost=lost)
            time.sleep(delay_s)

    def _end_lost(self, connection: Connection, request: AppendRequest) -> None:
        """End an earlier attempt that may still be under way: it must not be carried out after this one has failed."""
        if request.lost_backend is not None:
            backend, sent_at = request.lost_backend
            parameters = (backend, time.monotonic() - sent_at)
            execute(connection, self._statements, self._statements.end_append, parameters)
            request.lost_backend = None

    def _run_alone(
        self, connection: Connection, request: AppendRequest, generation: int, *, prepare: bool = True, **bounds: str
    ) -> Outcome:
        if request.byte_count >= COPY_FROM_BYTES:
            outcome = append_by_copy(connection, self._statements, request, generation, **bounds)
        else:
            with connection.lock:
                (outcome,) = connection.wait(
                    self._call.run(connection, Group([request]), generation, prepare=prepare, **bounds)
                )
        if isinstance(outcome, KnownIds):
            settled = request.repeated(stored_events(connection, self._statements, request))
            if isinstance(settled, HindsightError):
                raise settled
            return settled
        return outcome

    def _run_group(self, requests: Sequence[AppendRequest]) -> Sequence[Outcome]:
        group = Group(requests)
        with self._lend(self._timeout_s) as connection:
            generation = self._ready(connection)
            sent = _sent_over(connection)
            try:
                with connection.lock:
                    return connection.wait(self._call.run(connection, group, generation, patience=SHORT_PATIENCE))
            except BaseException as error:
                # An interrupt leaves the connection idle, once psycopg has cancelled: nothing is to be ended there then,
                # and others may be at work on it by now.
                under_way = connection.pgconn.transaction_status != TransactionStatus.IDLE
                if under_way or not isinstance(error, Exception):
                    for request in requests:
                        request.look_up = request.in_doubt = True
                        request.lost_backend = sent if under_way else None
                raise

    def _ready(self, connection: Connection) -> int:
        if self._generation is None:
            self._generation = self._prepare(connection)
        return self._generation

    def _known_generation(self) -> int:
        if self._generation is not None:
            return self._generation
        with self._lend(self._timeout_s) as connection:
            return self._ready(connection)


def _result(outcome: Outcome) -> AppendResult:
    if isinstance(outcome, AppendResult):
        return outcome
    assert isinstance(outcome, HindsightError)
    raise outcome


def _sent_over(connection: Connection) -> SentOver:
    # Before it is needed: of a connection that broke libpq says 0.
    return SentOver(connection.pgconn.backend_pid, time.monotonic())


def append_by_copy(
    connection: psycopg.Connection[Any],
    statements: Statements,
    request: AppendRequest,
    generation: int,
    *,
    patience: str = "",
    most_idle: str = "",
) -> Outcome:
    """Append a large request, in a transaction (or a savepoint) of its own. Raises as ``AppendCall.run`` does."""

    def ask(statement: bytes, *parameters: Any) -> list[tuple[Any, ...]]:
        return execute(connection, statements, statement, parameters).fetchall()

    def last_event(stream_id: Any, version: int) -> tuple[int | None, Cursor | None]:
        if version < 0:
            return None, None
        rows = ask(statements.event_cursor, stream_id, version)
        return version, Cursor(*rows[0]) if rows else None

    group = Group([request], lean=False)
    try:
        with connection.transaction():
            ask(statements.begin_append, patience, most_idle)
            begun = begin_copy_of(connection, statements, *group.streams)
            found = group.found_versions(begun.head_versions)
            if request.look_up and ask(statements.count_known, UuidArray(request.rows.event_ids()))[0][0]:
                raise _RollBack(KnownIds())
            conflict = request.mismatch(
                [last_event(write.stream_id, version) for write, version in zip(request.writes, found, strict=True)]
            )
            if conflict is not None:
                raise _RollBack(conflict)
            request.rows.place(begun.transaction_no, group.heads_of_rows(begun.head_versions), begun.started_at)
            with psycopg.Cursor(connection).copy(statements.copy_events) as copy:
                for block in request.rows.blocks():
                    copy.write(block)
            execute(connection, statements, statements.drop_empty_heads, (UuidArray(group.streams[0]),))
            # Last, in a snapshot of its own: what was committed while this append waited for its locks counts too.
            ask(statements.check_writable, LAYOUT, generation)
    except _RollBack as refused:
        return refused.outcome
    return request.written(begun.transaction_no, 0, found)


class _RollBack(Exception):
    """Ends the transaction of a request that was not accepted."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome


def stored_events(connection: psycopg.Connection[Any], statements: Statements, request: AppendRequest) -> Sequence[Any]:
    """Return what is stored under the ids of *request*."""
    result = execute(connection, statements, statements.known_events, (UuidArray(request.rows.event_ids()),)).pgresult
    assert result is not None
    return events_of(result)
