"""Appending from threads: in groups, alone, or over the caller's own connection."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import psycopg

from .append_call import (
    COPY_FROM_BYTES,
    GROUP_PATIENCE,
    LONE_PATIENCE,
    MOST_IDLE,
    AppendCall,
    Attempts,
    begins_transaction,
    note_loss,
    result_of,
    store_changed,
)
from .append_request import AppendRequest, Outcome
from .group_commit import GroupCommit
from .writes import AppendResult

Connection = psycopg.Connection[Any]


class Appender:
    """Carries out the appends of one store.

    ``lend(timeout_s)`` gives a connection in autocommit mode, of *most_connections*; ``prepare(connection)`` returns
    the generation under which the store may write, after it has moved on a sequence that lags or changed hands.
    """

    def __init__(
        self,
        lend: Callable[[float], AbstractContextManager[Connection]],
        prepare: Callable[[Connection], int],
        call: AppendCall,
        *,
        timeout_s: float,
        group_commit: bool,
        most_connections: int,
    ) -> None:
        self._lend = lend
        self._prepare = prepare
        self._timeout_s = timeout_s
        self._call = call
        self._groups = GroupCommit(self._run_group) if group_commit else None
        self._patient = threading.BoundedSemaphore(max(1, most_connections // 2))
        self._generation: int | None = None

    def append(self, request: AppendRequest) -> AppendResult:
        """Append *request*.

        Raises ConcurrencyConflict, IdempotencyConflict, AppendOutcomeUnknown, SchemaError, or psycopg's own errors.
        """
        if not request.writes:
            return AppendResult(None)
        began = time.monotonic()
        if self._groups is not None and request.byte_count < COPY_FROM_BYTES:
            result = result_of(self._groups.submit(request, self._timeout_s))
            if result is not None:
                return result
        attempts = Attempts(request, self._timeout_s, began)
        while True:
            try:
                with ExitStack() as held:
                    patience = GROUP_PATIENCE
                    if attempts.met_lock and self._patient.acquire(timeout=attempts.left_s):
                        held.callback(self._patient.release)
                        patience = LONE_PATIENCE
                    connection = held.enter_context(self._lend(attempts.left_s))
                    if attempts.advance_sequence:
                        self._generation, attempts.advance_sequence = None, False
                    generation = self._ready(connection)
                    try:
                        with connection.lock:
                            return connection.wait(self._call.one(connection, request, generation, patience=patience))
                    except BaseException as error:
                        note_loss(connection, [request], error)
                        raise
            except Exception as error:  # noqa: BLE001 - raised again unless it is worth another attempt
                delay_s = attempts.after(error)
            time.sleep(delay_s)

    def append_on(self, connection: Connection, request: AppendRequest) -> AppendResult:
        """Append *request* within the transaction of the caller's *connection*.

        One is begun where the connection is not in autocommit mode. Raises as ``append`` does; after a
        ConcurrencyConflict or an IdempotencyConflict that transaction can go on.
        """
        if not request.writes:
            return AppendResult(None)
        generation = self._generation
        if generation is None:
            with self._lend(self._timeout_s) as own:
                generation = self._ready(own)
        if begins_transaction(connection):
            psycopg.Cursor(connection).execute("SELECT 1")  # psycopg begins it as the connection is set to
        try:
            with connection.lock:
                return connection.wait(
                    self._call.one(connection, request, generation, most_idle=MOST_IDLE, prepare=False)
                )
        except Exception as error:
            if store_changed(error):
                # Not to be mended in a transaction that has failed: the next append begins with it.
                self._generation = None
            raise

    def _run_group(self, requests: Sequence[AppendRequest]) -> Sequence[Outcome]:
        with self._lend(self._timeout_s) as connection:
            generation = self._ready(connection)
            try:
                with connection.lock:
                    return connection.wait(self._call.group(connection, requests, generation, patience=GROUP_PATIENCE))
            except BaseException as error:
                note_loss(connection, requests, error)
                raise

    def _ready(self, connection: Connection) -> int:
        if self._generation is None:
            self._generation = self._prepare(connection)
        return self._generation
