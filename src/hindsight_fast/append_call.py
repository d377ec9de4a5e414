"""How an append is carried out over a connection, and what is done when that fails. What it says: append_request.

A conversation with the server is a generator, as psycopg's own are: the stores differ in how they wait for the socket.
"""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, TypeVar
from weakref import WeakKeyDictionary

import psycopg
from psycopg import IsolationLevel, errors
from psycopg.pq import ConnStatus, ExecStatus, Format, PipelineStatus, TransactionStatus
from psycopg.waiting import Ready, Wait

from ._core import Cursor
from .append_request import AppendRequest, Group, KnownIds, Outcome, SentOver
from .begin_copy import begun_of
from .connecting import check_encodings
from .errors import ConcurrencyConflict, HindsightError, IdempotencyConflict, MalformedRow
from .results import events_of
from .schema import LAYOUT, refusal_of
from .statements import numbered
from .writes import ANY, AppendResult

if TYPE_CHECKING:
    from psycopg.pq.abc import PGconn, PGresult

    from .statements import Statements

COPY_FROM_BYTES: Final = 8 * 1024 * 1024
"""From this size on an append goes by COPY: arrays as parameters end at 1 GB, and are held several times."""
GROUP_PATIENCE: Final = "100ms"
"""How long a group waits for each lock. Then each of its requests goes by itself, and waits as long: one stream that
somebody keeps locked must not hold up those who want another."""
LONE_PATIENCE: Final = "2s"
"""How long a single request waits that has met such a stream; it tries again until the store's timeout. At most half of
the connections wait so: twelve callers for one locked stream once held all ten, and with them every other append."""
LAST_WAIT_S: Final = 1.0
"""How long to wait for a connection where the timeout has passed in a group already."""
MOST_IDLE: Final = "60s"
"""How long a caller's own transaction may stand still once it holds a number: readers wait for it."""

T = TypeVar("T")
Talk = Generator[Wait, Ready | int, T]
"""A conversation: it yields what it waits for on its socket, and ends with a T."""

_INT: Final = struct.Struct("!i").pack
_LONG: Final = struct.Struct("!q").pack
_DOUBLE: Final = struct.Struct("!d").pack
_GOOD: Final = frozenset({ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK, ExecStatus.COPY_IN})
# A changed generation too: an import that has filled the store, or one that was given up, is no reason to open every
# store again.
_STORE_CHANGED: Final = frozenset({"HS001", "HS002", "HS012"})
# Raised behind the look-up, or by what it found: with them nothing is in doubt any more.
_SETTLES: Final = (ConcurrencyConflict, IdempotencyConflict, psycopg.IntegrityError, psycopg.DataError)


class AppendCall:
    """Carries out requests over a connection. One for each store: it knows where its calls are prepared."""

    def __init__(self, statements: Statements) -> None:
        self._schema = statements.schema
        self._many = _named(statements.append)
        self._one = _named(statements.append_one)
        self._begin_append = numbered(statements.begin_append)
        self._begin_copy = numbered(statements.begin_copy)
        self._copy_events = statements.copy_events
        self._drop_empty_heads = numbered(statements.drop_empty_heads)
        self._check_writable = numbered(statements.check_writable)
        self._event_cursor = numbered(statements.event_cursor)
        self._known_events = numbered(statements.known_events)
        self._count_known = numbered(statements.count_known)
        self._end_append = numbered(statements.end_append)
        self._prepared: WeakKeyDictionary[Any, set[bytes]] = WeakKeyDictionary()

    def one(self, connection: Any, request: AppendRequest, generation: int, **options: Any) -> Talk[AppendResult]:
        """Carry out *request* by itself. *options* are those of ``group``.

        Raises ConcurrencyConflict and IdempotencyConflict, and what ``group`` raises.
        """
        pgconn = connection.pgconn
        if request.lost_backend is not None:
            # It must not be carried out after this attempt was refused.
            backend, sent_at = request.lost_backend
            yield from self._ask(pgconn, self._end_append, [_INT(backend), _DOUBLE(time.monotonic() - sent_at)])
            request.lost_backend = None
        if request.byte_count >= COPY_FROM_BYTES:
            options.pop("prepare", None)
            request.sent_over = SentOver(pgconn.backend_pid, time.monotonic())
            outcome = yield from self._by_copy(pgconn, request, generation, **options)
        else:
            (outcome,) = yield from self.group(connection, [request], generation, **options)
        if isinstance(outcome, KnownIds):
            result = yield from self._ask(pgconn, self._known_events, [request.rows.event_ids()])
            settled = request.repeated(events_of(result))
            if isinstance(settled, AppendResult):
                return settled
            raise settled
        if isinstance(outcome, AppendResult):
            return outcome
        raise outcome

    def group(
        self,
        connection: Any,
        requests: Sequence[AppendRequest],
        generation: int,
        *,
        patience: str = "",
        most_idle: str = "",
        prepare: bool = True,
    ) -> Talk[list[Outcome]]:
        """Carry out *requests* in one call and return their outcomes.

        *patience* bounds each wait for a lock, *most_idle* how long the caller's transaction may stand still after it;
        empty, the session's own settings hold. Raises SchemaError, or psycopg's own errors: nothing is written then,
        or, where the connection is lost, nobody knows.
        """
        group = Group(requests)
        pgconn = connection.pgconn
        name, statement = self._one if group.is_one_event else self._many
        parameters: list[bytes | None] = [_INT(LAYOUT), _LONG(generation), patience.encode(), most_idle.encode()]
        if not group.is_one_event:
            parameters.append(b"\1" if group.look_up else b"\0")
        parameters += group.parameters
        # Noted before it is needed: of a connection that broke libpq knows no backend any more.
        sent_over = SentOver(pgconn.backend_pid, time.monotonic())
        for request in requests:
            request.sent_over = sent_over
        if not prepare:
            result = yield from self._ask(pgconn, statement, parameters)
        else:
            prepared = self._prepared.setdefault(connection, set())
            try:
                if name not in prepared:
                    pgconn.send_prepare(name, statement)
                    # Known to the session already, if another store shares this pool.
                    with suppress(errors.DuplicatePreparedStatement):
                        yield from self._results(pgconn)
                    prepared.add(name)
                pgconn.send_query_prepared(name, parameters, [Format.BINARY] * len(parameters), Format.BINARY)
                (result,) = yield from self._results(pgconn)
            except errors.InvalidSqlStatementName:
                # Forgotten: DISCARD ALL, or a pooler that gave another session. The other call may be known there.
                prepared.discard(name)
                raise
        answer = result.get_value(0, 0)
        assert answer is not None
        return group.outcomes(answer)

    def _by_copy(
        self, pgconn: PGconn, request: AppendRequest, generation: int, *, patience: str = "", most_idle: str = ""
    ) -> Talk[Outcome]:
        """Carry out a large request, in a transaction of its own, or in a savepoint of the caller's."""
        if pgconn.transaction_status == TransactionStatus.IDLE:
            begin, keep, drop = b"BEGIN", b"COMMIT", b"ROLLBACK"
        else:
            begin, keep = b"SAVEPOINT hindsight_append", b"RELEASE hindsight_append"
            drop = b"ROLLBACK TO hindsight_append; RELEASE hindsight_append"
        yield from self._say(pgconn, begin)
        try:
            outcome = yield from self._copy(pgconn, request, generation, patience, most_idle)
        except BaseException:
            if pgconn.status == ConnStatus.OK and pgconn.transaction_status != TransactionStatus.ACTIVE:
                yield from self._say(pgconn, drop)
            raise
        yield from self._say(pgconn, keep if isinstance(outcome, AppendResult) else drop)
        return outcome

    def _copy(
        self, pgconn: PGconn, request: AppendRequest, generation: int, patience: str, most_idle: str
    ) -> Talk[Outcome]:
        group = Group([request], for_copy=True)
        yield from self._ask(pgconn, self._begin_append, [patience.encode(), most_idle.encode()])
        begun = begun_of((yield from self._ask(pgconn, self._begin_copy, list(group.streams))))
        if request.look_up:
            result = yield from self._ask(pgconn, self._count_known, [request.rows.event_ids()])
            if any(result.get_value(0, 0) or b""):
                return KnownIds()
        found_versions = group.found_versions(begun.head_versions)
        found: list[tuple[int | None, Cursor | None]] = []
        for write, version in zip(request.writes, found_versions, strict=True):
            cursor = None
            if version >= 0 and write.expected is not ANY:
                result = yield from self._ask(pgconn, self._event_cursor, [write.stream_id.bytes, _LONG(version)])
                if result.ntuples:
                    cursor = Cursor(*(int.from_bytes(result.get_value(0, n) or b"", "big") for n in range(2)))
            found.append((None if version < 0 else version, cursor))
        conflict = request.mismatch(found)
        if conflict is not None:
            return conflict
        request.rows.place(begun.transaction_no, group.heads_of_rows(begun.head_versions), begun.started_at)
        yield from self._say(pgconn, self._copy_events)
        for block in request.rows.blocks():
            pgconn.put_copy_data(block)
            yield from self._flush(pgconn)
        pgconn.put_copy_end()
        yield from self._results(pgconn)
        yield from self._ask(pgconn, self._drop_empty_heads, [group.streams[0]])
        # Last, in a snapshot of its own: what was committed while this append waited for its locks counts too.
        yield from self._ask(pgconn, self._check_writable, [_INT(LAYOUT), _LONG(generation)])
        return request.written(begun.transaction_no, 0, found_versions)

    def _say(self, pgconn: PGconn, statement: bytes) -> Talk[None]:
        pgconn.send_query(statement)
        yield from self._results(pgconn)

    def _ask(self, pgconn: PGconn, statement: bytes, parameters: Sequence[bytes | None]) -> Talk[PGresult]:
        """Ask with parameters and an answer in binary form."""
        pgconn.send_query_params(statement, parameters, None, [Format.BINARY] * len(parameters), Format.BINARY)
        (result,) = yield from self._results(pgconn)
        return result

    def _flush(self, pgconn: PGconn) -> Talk[None]:
        while pgconn.flush():
            # None after an interrupt: psycopg then cancels, and waits for the rest.
            if (yield Wait.RW) != Ready.W:
                pgconn.consume_input()

    def _results(self, pgconn: PGconn) -> Talk[list[PGresult]]:
        """Wait for all that the server says to what was sent. Raises if it ends in an error.

        To the very end: the first answer comes before the commit, and the commit can still fail.
        """
        yield from self._flush(pgconn)
        results = []
        while True:
            while pgconn.is_busy():
                if (yield Wait.R):
                    pgconn.consume_input()
            result = pgconn.get_result()
            if result is None:
                break
            results.append(result)
            if result.status == ExecStatus.COPY_IN:
                break
        for result in results:
            if result.status not in _GOOD:
                error = errors.error_from_result(result)
                refusal = refusal_of(error, self._schema)
                raise refusal or error from (error if refusal else None)
        return results


def _named(statement: bytes) -> tuple[bytes, bytes]:
    """A statement under a name that no other statement has."""
    return b"hindsight_fast " + sha256(statement).hexdigest()[:32].encode(), statement


def check_lent(connection: Any, kind: type[Any]) -> None:
    """Raise unless an append can go over the caller's own connection.

    TypeError for what is no psycopg connection of this *kind*, HindsightError for one in pipeline mode or under an
    isolation level in which an append cannot see what it waited for.
    """
    if not isinstance(connection, kind):
        raise TypeError(
            f"connection must be the raw psycopg {kind.__name__}, not {type(connection).__name__}"
            " (SQLAlchemy: session.connection().connection.driver_connection; Django: connection.connection)"
        )
    if connection.pgconn.pipeline_status != PipelineStatus.OFF:
        raise HindsightError("an append waits for its answer, so it cannot go over a connection in pipeline mode")
    if connection.isolation_level not in (None, IsolationLevel.READ_UNCOMMITTED, IsolationLevel.READ_COMMITTED):
        level = connection.isolation_level.name
        raise HindsightError(f"appends run under READ COMMITTED, and the connection's isolation_level is {level}")
    check_encodings(connection.info)


def begins_transaction(connection: Any) -> bool:
    """Whether the next statement on the caller's *connection* is to begin a transaction."""
    return bool(connection.info.transaction_status == TransactionStatus.IDLE and not connection.autocommit)


def result_of(outcome: Outcome | None) -> AppendResult | None:
    """Return the result of a request that went in a group. Raises its conflict; None if it is to go by itself."""
    if outcome is None or isinstance(outcome, KnownIds):
        return None
    if isinstance(outcome, AppendResult):
        return outcome
    raise outcome


class Attempts:
    """What becomes of one request whose attempt has failed: whether and when it is tried again, or what is raised."""

    def __init__(self, request: AppendRequest, timeout_s: float, began: float | None = None) -> None:
        self._request = request
        self._timeout_s = timeout_s
        self._began = time.monotonic() if began is None else began
        self._count = 0
        self._left = {"advance": 1, "prepare": 3, "ids": 3}
        self.advance_sequence = False
        """Whether the next attempt asks first what the store is by now, and moves its sequence on if need be."""
        self.met_lock = False
        """Whether somebody keeps a stream locked for longer than a moment: then it may wait with others who met it."""

    @property
    def left_s(self) -> float:
        """How long to wait for what the next attempt needs: what is left of the timeout, or a last moment."""
        return max(LAST_WAIT_S, self._began + self._timeout_s - time.monotonic())

    @property
    def _late(self) -> bool:
        return time.monotonic() - self._began > self._timeout_s

    def after(self, error: BaseException) -> float:
        """Return after how many seconds to try again. Raises *error*, or AppendOutcomeUnknown."""
        self._count += 1
        self.met_lock = self.met_lock or _is_lock_error(error)
        delay_s = self._delay_after(error)
        if delay_s is not None:
            return delay_s
        of_the_server = isinstance(error, (psycopg.Error, HindsightError)) and not isinstance(error, _SETTLES)
        if self._request.in_doubt and of_the_server:
            # Whatever the last attempt met, it says nothing of the one that was cut off.
            raise self._request.unknown(self._timeout_s) from error
        raise error

    def _delay_after(self, error: BaseException) -> float | None:
        """None: not again."""
        if _is_lock_error(error):
            return None if self._late else random.uniform(0.001, 0.02)
        if self._request.in_doubt and isinstance(error, psycopg.OperationalError):
            return None if self._late else min(0.05 * 2.0**self._count, 1.0) * random.uniform(0.5, 1.0)
        if isinstance(error, errors.UniqueViolation) and error.diag.constraint_name == "events_event_id_key":
            # Somebody brought an id after it was looked for, or it was not looked for.
            self._request.look_up = True
            return self._once_more("ids")
        if isinstance(error, errors.InvalidSqlStatementName):
            return self._once_more("prepare")
        if store_changed(error):
            self.advance_sequence = True
            return self._once_more("advance")
        return None

    def _once_more(self, what: str) -> float | None:
        self._left[what] -= 1
        return 0.0 if self._left[what] >= 0 else None


def note_loss(connection: Any, requests: Sequence[AppendRequest], error: BaseException) -> bool:
    """Note with *requests* that they may have been committed, if *error* is that *connection* broke or was left."""
    # An interrupt leaves a connection idle, once psycopg has cancelled: nothing is to be ended there then, and others
    # may be at work on it by the time of the next attempt.
    under_way = connection.pgconn.transaction_status != TransactionStatus.IDLE
    # What is no word of the server's may come behind its answer: no memory for it, or an answer of another shape.
    of_the_server = isinstance(error, (psycopg.Error, HindsightError)) and not isinstance(error, MalformedRow)
    lost = under_way or not of_the_server
    if lost:
        for request in requests:
            request.look_up = request.in_doubt = True
            request.lost_backend = request.sent_over if under_way else None
    return lost


def store_changed(error: BaseException) -> bool:
    """Whether an append was refused because the store is not what its writer took it for, or its sequence lags."""
    if isinstance(error, errors.UniqueViolation):
        # A number was drawn that an open append has drawn as well: the sequence was put back under it.
        return error.diag.constraint_name == "events_pkey"
    return isinstance(error.__cause__, psycopg.Error) and error.__cause__.sqlstate in _STORE_CHANGED


def _is_lock_error(error: BaseException) -> bool:
    return isinstance(error, (errors.DeadlockDetected, errors.LockNotAvailable))
