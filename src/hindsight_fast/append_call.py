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
from .errors import HindsightError
from .schema import LAYOUT, refusal_of

if TYPE_CHECKING:
    from psycopg.pq.abc import PGconn, PGresult

    from .statements import Statements

_LONG: Final = struct.Struct("!q").pack
_SERVER_CHANGED: Final = frozenset({"HS001", "HS002"})


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
            if (yield Wait.RW) & Ready.R:
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

    def __init__(self, request: AppendRequest, timeout_s: float) -> None:
        self._request = request
        self._timeout_s = timeout_s
        self._began = time.monotonic()
        self._count = 0
        self._left = {"advance": 1, "prepare": 3, "ids": 3}
        self.advance_sequence = False
        """Whether the sequence has to be moved on before the next attempt."""

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
        if request.in_doubt and isinstance(error, psycopg.OperationalError) and not _is_lock_error(error):
            if self._late:
                raise request.unknown(self._timeout_s) from error
            return min(0.05 * 2.0**self._count, 1.0) * random.uniform(0.5, 1.0)
        if _is_lock_error(error) and not self._late:
            return random.uniform(0.001, 0.02)
        if isinstance(error, errors.UniqueViolation) and error.diag.constraint_name == "events_event_id_key":
            # Somebody brought an id after it was looked for, or it was not looked for.
            request.look_up = True
            return self._once_more("ids", error)
        if isinstance(error, errors.InvalidSqlStatementName):
            return self._once_more("prepare", error)
        if isinstance(error.__cause__, psycopg.Error) and error.__cause__.sqlstate in _SERVER_CHANGED:
            self.advance_sequence = True
            return self._once_more("advance", error)
        raise error

    def _once_more(self, what: str, error: BaseException) -> float:
        if not self._left[what]:
            raise error
        self._left[what] -= 1
        return 0.0


def is_lost(connection: Any) -> bool:
    """Whether *connection* broke."""
    return bool(connection.pgconn.status == ConnStatus.BAD)


def _is_lock_error(error: BaseException) -> bool:
    return isinstance(error, (errors.DeadlockDetected, errors.LockNotAvailable))
