"""What an initial import's tables still lack when all lines are stored: indexes, heads of streams, statistics.

Several connections build at a time, as far as the pool has some to spare. Each step is one transaction that does
nothing where it was done before, so that an import that was killed repeats only the step it was at.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import psycopg
from psycopg import errors

from .begin_copy import execute
from .statements import BUILD_PROGRESS

if TYPE_CHECKING:
    from .statements import Statements

BUILDERS: Final = 3
"""Connections that build at a time. Each of them may have two parallel workers of the server besides."""
LEND_PATIENCE_S: Final = 1.0
LOOK_EVERY_S: Final = 0.25
CANCEL_PATIENCE_S: Final = 5.0


class DuplicatedIds(Exception):
    """The index that makes ids unique cannot be built."""


class _Step(NamedTuple):
    """Statements of one transaction, with their parameters; ``guards_ids`` if it fails for ids that come twice."""

    statements: tuple[tuple[bytes, tuple[Any, ...]], ...]
    guards_ids: bool


class BesideBuild:
    """Builds all that the tables beside the log lack."""

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        lend: Callable[..., AbstractContextManager[psycopg.Connection[Any]]],
        statements: Statements,
    ) -> None:
        self._connection = connection
        self._lend = lend
        self._statements = statements
        self._steps = deque(self._needed())
        self._step_count = len(self._steps)
        self._done = 0
        self._failure: BaseException | None = None
        self._stopping = False

    def run(self, tell: Callable[[float], object]) -> None:
        """Build, and call *tell* with the share that is done. Raises DuplicatedIds, or what the server raised."""
        tell(0.0)
        with ExitStack() as stack:
            connections: list[psycopg.Connection[Any]] = []
            while len(connections) < min(BUILDERS, self._step_count):
                try:
                    connections.append(stack.enter_context(self._lend(LEND_PATIENCE_S)))
                except psycopg.OperationalError:
                    break  # the pool, or the server, has no more to spare
            if connections:
                self._run_in_threads(connections, tell)
            else:
                self._work(self._connection)
        if self._failure is not None:
            raise self._failure
        with self._connection.transaction():
            execute(self._connection, self._statements, self._statements.limit_build, ())
            execute(self._connection, self._statements, self._statements.analyze_beside, ())
        tell(1.0)

    def _needed(self) -> list[_Step]:
        statements = self._statements
        steps = []
        heads: list[tuple[bytes, tuple[Any, ...]]] = [(statements.fill_heads_beside, ())]
        for index_id, table_name, guards_ids in execute(self._connection, statements, statements.list_beside, ()):
            build = (statements.build_beside, (index_id,))
            if table_name == "events":
                steps.append(_Step((build,), guards_ids))
            else:
                heads.append(build)
        # Second: heads are made by reading all events, and nothing is gained by doing that at the very end.
        steps.insert(1, _Step(tuple(heads), guards_ids=False))
        return steps

    def _run_in_threads(self, connections: list[psycopg.Connection[Any]], tell: Callable[[float], object]) -> None:
        pids = [connection.info.backend_pid for connection in connections]
        threads = [
            threading.Thread(target=self._work, args=(each,), name="hindsight-import-build", daemon=True)
            for each in connections
        ]
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads) and not self._stopping:
                next(thread for thread in threads if thread.is_alive() or thread is threads[-1]).join(LOOK_EVERY_S)
                rows = execute(self._connection, self._statements, BUILD_PROGRESS.encode(), (pids,)).fetchall()
                under_way = sum(share for _pid, share in rows)
                tell(min((self._done + under_way) / max(self._step_count, 1), 1.0))
        finally:
            # Also where this thread was interrupted or lost its own connection: nothing is left building.
            finished = not self._steps and self._failure is None and not any(thread.is_alive() for thread in threads)
            self._stopping = True
            while not finished and any(thread.is_alive() for thread in threads):
                for connection, thread in zip(connections, threads, strict=True):
                    if thread.is_alive():
                        with suppress(psycopg.Error):
                            connection.cancel_safe(timeout=CANCEL_PATIENCE_S)
                        # Again, should the cancel have come between two statements.
                        thread.join(LOOK_EVERY_S)

    def _work(self, connection: psycopg.Connection[Any]) -> None:
        while not self._stopping:
            try:
                step = self._steps.popleft()
            except IndexError:
                return
            try:
                with connection.transaction():
                    execute(connection, self._statements, self._statements.limit_build, ())
                    for statement, parameters in step.statements:
                        execute(connection, self._statements, statement, parameters)
                self._done += 1
            except BaseException as error:  # noqa: BLE001 - raised in the thread that runs the import
                if not self._stopping:
                    duplicated = step.guards_ids and isinstance(error, errors.UniqueViolation)
                    self._failure = DuplicatedIds() if duplicated else error
                    self._stopping = True
                return
