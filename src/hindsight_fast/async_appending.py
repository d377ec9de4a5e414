"""Appending from tasks: in groups, alone, or over the caller's own connection. What appending does for threads."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import partial
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
from .errors import WaitTimeout
from .group_commit import LANES, LOOK_ROUND_S, GroupQueue
from .kept_connections import KeptConnection, KeptConnections
from .worker_call import until_done
from .writes import AppendResult

Connection = psycopg.AsyncConnection[Any]


class AsyncAppender:
    """Carries out the appends of one store.

    ``lend(timeout_s)`` gives a connection in autocommit mode, of *most_connections*; ``prepare(connection)`` returns
    the generation under which the store may write, after it has moved on a sequence that lags or changed hands.
    """

    def __init__(
        self,
        lend: Callable[[float], AbstractAsyncContextManager[Connection]],
        prepare: Callable[[Connection], Awaitable[int]],
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
        self._groups = AsyncGroupCommit(self._run_group, self._start_group) if group_commit else None
        # None where they would be all that there are: others would wait for them.
        self._kept = KeptConnections(LANES if most_connections > LANES else 0)
        self._patient = asyncio.Semaphore(max(1, most_connections // 2))
        self._generation: int | None = None

    async def append(self, request: AppendRequest) -> AppendResult:
        """Append *request*.

        Raises ConcurrencyConflict, IdempotencyConflict, AppendOutcomeUnknown, SchemaError, or psycopg's own errors.
        """
        if not request.writes:
            return AppendResult(None)
        began = time.monotonic()
        if self._groups is not None and request.byte_count < COPY_FROM_BYTES:
            result = result_of(await self._groups.submit(request, self._timeout_s))
            if result is not None:
                return result
        attempts = Attempts(request, self._timeout_s, began)
        while True:
            try:
                async with AsyncExitStack() as held:
                    patience = GROUP_PATIENCE
                    if attempts.met_lock and await self._may_be_patient(attempts.left_s):
                        held.callback(self._patient.release)
                        patience = LONE_PATIENCE
                    connection = await held.enter_async_context(self._lend(attempts.left_s))
                    if attempts.advance_sequence:
                        self._generation, attempts.advance_sequence = None, False
                    generation = await self._ready(connection)
                    try:
                        async with connection.lock:
                            return await connection.wait(
                                self._call.one(connection, request, generation, patience=patience)
                            )
                    except BaseException as error:
                        note_loss(connection, [request], error)
                        raise
            except Exception as error:  # noqa: BLE001 - raised again unless it is worth another attempt
                delay_s = attempts.after(error)
            await asyncio.sleep(delay_s)

    async def append_on(self, connection: Connection, request: AppendRequest) -> AppendResult:
        """Append *request* within the transaction of the caller's *connection*.

        One is begun where the connection is not in autocommit mode. Raises as ``append`` does; after a
        ConcurrencyConflict or an IdempotencyConflict that transaction can go on.
        """
        if not request.writes:
            return AppendResult(None)
        generation = self._generation
        if generation is None:
            async with self._lend(self._timeout_s) as own:
                generation = await self._ready(own)
        if begins_transaction(connection):
            await psycopg.AsyncCursor(connection).execute("SELECT 1")  # psycopg begins it as the connection is set to
        try:
            async with connection.lock:
                return await connection.wait(
                    self._call.one(connection, request, generation, most_idle=MOST_IDLE, prepare=False)
                )
        except Exception as error:
            if store_changed(error):
                # Not to be mended in a transaction that has failed: the next append begins with it.
                self._generation = None
            raise

    async def close(self) -> None:
        """Give back the connections that are kept for more appends."""
        for returned in self._kept.give_back_all():
            await until_done(returned)

    async def _run_group(self, requests: Sequence[AppendRequest]) -> Sequence[Outcome]:
        async with AsyncExitStack() as lent:
            connection = await lent.enter_async_context(self._lend(self._timeout_s))
            generation = await self._ready(connection)
            try:
                async with connection.lock:
                    outcomes = await connection.wait(
                        self._call.group(connection, requests, generation, patience=GROUP_PATIENCE)
                    )
            except BaseException as error:
                note_loss(connection, requests, error)
                raise
            self._kept.keep(KeptConnection(asyncio.get_running_loop(), connection, lent.pop_all()))
            return outcomes

    def _start_group(
        self, requests: Sequence[AppendRequest], arrived: Callable[[Sequence[Outcome] | None], object]
    ) -> bool:
        """Set off what ``_run_group`` does over a connection that is kept; False if there is none."""
        generation = self._generation
        kept = None if generation is None else self._kept.take()
        if kept is None or generation is None:
            return False

        def done(outcomes: Sequence[Outcome] | None, error: BaseException | None) -> None:
            if error is None:
                self._kept.keep(kept)
            else:
                note_loss(kept.connection, requests, error)
                self._kept.give_back(kept)
            arrived(outcomes)

        kept.converse(self._call.group(kept.connection, requests, generation, patience=GROUP_PATIENCE), done)
        return True

    async def _may_be_patient(self, timeout_s: float) -> bool:
        """Whether there is room among those who wait for a stream that somebody keeps locked; to be released."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._patient.acquire()
        except TimeoutError:
            return False

    async def _ready(self, connection: Connection) -> int:
        if self._generation is None:
            self._generation = await self._prepare(connection)
        return self._generation


class _Entry:
    """A task's request, and what becomes of it."""

    __slots__ = ("deadline", "leader", "outcome", "request")

    def __init__(self, request: AppendRequest, outcome: asyncio.Future[Outcome | None], deadline: float) -> None:
        self.request = request
        self.leader: _Entry | None = None
        self.outcome = outcome
        self.deadline = deadline


class AsyncGroupCommit:
    """Group commit among tasks of one loop. No caller's task carries a group out: to cancel a caller cancels nobody
    else's append.

    *run* carries out requests in one transaction, and returns an outcome for each. If it raises, each request of the
    group is left to its own caller. ``start(requests, arrived)`` does so without a task, where it can: it returns
    False, or calls ``arrived`` in the end, with the outcomes or with None.
    """

    def __init__(
        self,
        run: Callable[[Sequence[AppendRequest]], Awaitable[Sequence[Outcome]]],
        start: Callable[[Sequence[AppendRequest], Callable[[Sequence[Outcome] | None], object]], bool] | None = None,
        *,
        lanes: int = LANES,
    ) -> None:
        self._run = run
        self._start = start
        self._queue: GroupQueue[_Entry] = GroupQueue(lanes)
        self._departing = False  # a departure stands in the loop already
        self._tasks: set[asyncio.Task[None]] = set()
        self._look: asyncio.TimerHandle | None = None
        self._held_back: OrderedDict[asyncio.Future[None], None] = OrderedDict()

    async def submit(self, request: AppendRequest, timeout_s: float) -> Outcome | None:
        """Have *request* carried out with others'. None: it was not, or nobody knows, and it is to be tried alone.

        Raises WaitTimeout if so many wait that there is no room for it in time. To cancel it takes it out, unless it
        has left: then it may be carried out all the same.
        """
        loop = asyncio.get_running_loop()
        if self._queue.full:
            await self._wait_for_room(loop, timeout_s)
        me = _Entry(request, loop.create_future(), loop.time() + timeout_s)
        self._queue.enqueue(me)
        if self._queue.ready:
            self._depart()
        elif not self._departing:
            # Not at once: whoever wants to append in this same turn of the loop leaves together.
            self._departing = True
            loop.call_soon(self._depart_at_last)
        if self._look is None:
            self._look = loop.call_later(LOOK_ROUND_S, self._look_round)
        try:
            return await me.outcome
        except asyncio.CancelledError:
            self._queue.withdraw(me)
            raise

    def _depart_at_last(self) -> None:
        self._departing = False
        self._depart()

    def _depart(self) -> None:
        while (group := self._queue.depart()) is not None:
            requests = [entry.request for entry in group]
            if self._start is not None and self._start(requests, partial(self._arrive, group)):
                continue
            task = asyncio.create_task(self._lead(group))
            self._tasks.add(task)  # the loop itself keeps no strong reference
            task.add_done_callback(partial(self._ended, group))
        self._wake_one()

    async def _lead(self, group: list[_Entry]) -> None:
        outcomes: Sequence[Outcome] | None = None
        try:
            outcomes = await self._run([entry.request for entry in group])
        except Exception:  # noqa: BLE001 - each tries alone, and meets what concerns it
            pass
        except BaseException:
            # Cancelled by somebody who cancels all tasks of the loop: perhaps behind the commit, where nobody has noted
            # a loss. Whoever of the group goes on all the same looks first; it was appended twice.
            for entry in group:
                entry.request.look_up = entry.request.in_doubt = True
            raise
        finally:
            self._arrive(group, outcomes)

    def _arrive(self, group: list[_Entry], outcomes: Sequence[Outcome] | None) -> None:
        self._queue.arrived(group[0])
        self._depart()
        told: Iterable[Outcome | None] = outcomes or [None] * len(group)
        for entry, outcome in zip(group, told, strict=True):
            if not entry.outcome.done():
                entry.outcome.set_result(outcome)

    def _ended(self, group: list[_Entry], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._queue.led_by(group[0]) is not None:
            # Cancelled before its first step, of which a coroutine learns nothing.
            self._arrive(group, None)

    def _look_round(self) -> None:
        """Give up groups of which nothing is heard: a server that stands still keeps its lane from all the others."""
        loop = asyncio.get_running_loop()
        for leader in self._queue.leaders:
            group = self._queue.led_by(leader)
            if group is not None and loop.time() > leader.deadline:
                for entry in group:
                    entry.request.look_up = entry.request.in_doubt = True
                    entry.request.lost_backend = entry.request.sent_over
                self._arrive(group, None)
        self._look = loop.call_later(LOOK_ROUND_S, self._look_round) if self._queue.leaders else None

    def _wake_one(self) -> None:
        """Let one in of those held back, if there is room: it takes its place, and has the next one woken."""
        while self._held_back and not self._queue.full:
            waiter, _ = self._held_back.popitem(last=False)
            if not waiter.done():  # cancelled, and not yet told
                waiter.set_result(None)
                break

    async def _wait_for_room(self, loop: asyncio.AbstractEventLoop, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while self._queue.full:
                    waiter = loop.create_future()
                    self._held_back[waiter] = None
                    try:
                        await waiter
                    except asyncio.CancelledError:
                        if waiter in self._held_back:
                            del self._held_back[waiter]
                        else:
                            # Woken, and it does not take its place: those behind it once waited until their timeout.
                            self._wake_one()
                        raise
        except TimeoutError:
            raise WaitTimeout(f"{len(self._queue)} appends wait, and there was no room for {timeout_s:g} s") from None
