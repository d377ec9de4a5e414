"""How an append is sent, and what is done when that fails. What it says is in append_request.

The exchange with the server is a generator, as psycopg's own are: the stores differ in how they wait for the socket.
"""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import psycopg
from psycopg import IsolationLevel, errors
from psycopg.pq import ConnStatus, ExecStatus, Format, PipelineStatus
from psycopg.waiting import Ready, Wait

from .append_request import AppendRequest, Group, Outcome
from .errors import HindsightError, IdempotencyConflict
from .schema import LAYOUT, refusal_of

if TYPE_CHECKING:
    from psycopg.pq.abc import PGconn, PGresult

    from .statements import Statements

_LONG: Final = struct.Struct("!q").pack
_SERVER_CHANGED: Final = frozenset({"HS001", "HS002"})

# Raised behind the look-up, or by what it found: with them nothing is in doubt any more.
_SETTLES: Final = (IdempotencyConflict, psycopg.IntegrityError, psycopg.DataError)

LAST_WAIT_S: Final = 1.0
"""How long to wait for a connection where the timeout has passed in a group already."""


class AppendCall:
    """Sends groups in one call each. One for each store: it knows on which connections the call is prepared."""

    def __init__(self, statements: Statements) -> None:
        self._statements = statements
        schema = statements.quoted_schema.encode()
        self._many = (b"hindsight_fast append " + schema, statements.append)
        self._one = (b"hindsight_fast append one " + schema, statements.append_one)
        self._prepared: WeakKeyDictionary[Any, set[bytes]] = WeakKeyDictionary()

    def run(
        self,
        connection: Any,
        group: Group,
        generation: int,
        *,
        patience: str = "",
        most_idle: str = "",
        prepare: bool = True,
    ) -> Generator[Wait, Ready | int, list[Outcome]]:
        """Send *group* and return its outcomes.

        *patience* bounds each wait for a lock, *most_idle* how long the caller's transaction may stand still after it;
        empty, the session's own settings hold. Raises SchemaError, or psycopg's own errors: nothing is written then,
        or, where the connection is lost, nobody knows.
        """
        pgconn = connection.pgconn
        name, statement = self._one if group.is_one_event else self._many
        parameters: list[bytes | None] = [
            LAYOUT.to_bytes(4, "big"),
            _LONG(generation),
            patience.encode(),
            most_idle.encode(),
        ]
        if not group.is_one_event:
            parameters.append(b"\1" if group.look_up else b"\0")
        parameters += group.parameters
        formats = [Format.BINARY] * len(parameters)
        prepared = self._prepared.setdefault(connection, set())
        try:
            if not prepare:
                pgconn.send_query_params(statement, parameters, None, formats, Format.BINARY)
            else:
                if name not in prepared:
                    pgconn.send_prepare(name, statement)
                    yield from self._results(pgconn)
                    prepared.add(name)
                pgconn.send_query_prepared(name, parameters, formats, Format.BINARY)
            (result,) = yield from self._results(pgconn)
        except errors.InvalidSqlStatementName:
            # Forgotten: DISCARD ALL, or a pooler that gave another session.
            prepared.clear()
            raise
        answer = result.get_value(0, 0)
        assert answer is not None
        return group.outcomes(answer)

    def _results(self, pgconn: PGconn) -> Generator[Wait, Ready | int, list[PGresult]]:
        """Wait for all that the server says to what was sent. Raises if it ends in an error.

        To the very end: the first answer comes before the commit, and the commit can still fail.
        """
        while pgconn.flush():
            # None after an interrupt: psycopg then cancels, and waits for the rest.
            if (yield Wait.RW) != Ready.W:
                pgconn.consume_input()
        results = []
        while True:
            while pgconn.is_busy():
                if (yield Wait.R):
                    pgconn.consume_input()
            result = pgconn.get_result()
            if result is None:
                break
            results.append(result)
        for result in results:
            if result.status not in (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK):
                error = errors.error_from_result(result)
                refusal = refusal_of(error, self._statements.schema)
                raise refusal or error from (error if refusal else None)
        return results


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


class Attempts:
    """What becomes of one request whose attempt has failed: whether and when it is tried again, or what is raised."""

    def __init__(self, request: AppendRequest, timeout_s: float, began: float | None = None) -> None:
        self._request = request
        self._timeout_s = timeout_s
        self._began = time.monotonic() if began is None else began
        self._count = 0
        self._left = {"advance": 1, "prepare": 3, "ids": 3}
        self.advance_sequence = False
        """Whether the sequence has to be moved on before the next attempt."""
        self.met_lock = False
        """Whether somebody keeps a stream locked for longer than a moment."""

    @property
    def left_s(self) -> float:
        """How long to wait for what the next attempt needs: what is left of the timeout, or else a last second."""
        return max(LAST_WAIT_S, self._began + self._timeout_s - time.monotonic())

    @property
    def _late(self) -> bool:
        return time.monotonic() - self._began > self._timeout_s

    def after(self, error: BaseException, *, lost: bool) -> float:
        """Return after how many seconds to try again. Raises *error*, or AppendOutcomeUnknown.

        *lost*: the connection broke after the request was sent.
        """
        self._count += 1
        request = self._request
        if lost:
            request.look_up = request.in_doubt = True
        self.met_lock = self.met_lock or is_lock_error(error)
        delay_s = self._delay_after(error)
        if delay_s is not None:
            return delay_s
        if request.in_doubt and not isinstance(error, _SETTLES):
            # Whatever the last attempt met, it says nothing of the one that was cut off.
            raise request.unknown(self._timeout_s) from error
        raise error

    def _delay_after(self, error: BaseException) -> float | None:
        if is_lock_error(error):
            return None if self._late else random.uniform(0.001, 0.02)
        if self._request.in_doubt and isinstance(error, psycopg.OperationalError):
            return None if self._late else min(0.05 * 2.0**self._count, 1.0) * random.uniform(0.5, 1.0)
        if isinstance(error, errors.UniqueViolation) and error.diag.constraint_name == "events_event_id_key":
            # Somebody brought an id after it was looked for, or it was not looked for.
            self._request.look_up = True
            return self._once_more("ids")
        if isinstance(error, errors.InvalidSqlStatementName):
            return self._once_more("prepare")
        if server_changed(error):
            self.advance_sequence = True
            return self._once_more("advance")
        return None

    def _once_more(self, what: str) -> float | None:
        if not self._left[what]:
            return None
        self._left[what] -= 1
        return 0.0


def is_lost(connection: Any) -> bool:
    """Whether *connection* broke."""
    return bool(connection.pgconn.status == ConnStatus.BAD)


def server_changed(error: BaseException) -> bool:
    """Whether an append was refused because the sequence lags or is another server's: it has to be moved on first."""
    if isinstance(error, errors.UniqueViolation):
        # A number was drawn that an open append has drawn as well: the sequence was put back under it.
        return error.diag.constraint_name == "events_pkey"
    return isinstance(error.__cause__, psycopg.Error) and error.__cause__.sqlstate in _SERVER_CHANGED


def is_lock_error(error: BaseException) -> bool:
    """Whether an append gave up waiting for a lock."""
    return isinstance(error, (errors.DeadlockDetected, errors.LockNotAvailable))
