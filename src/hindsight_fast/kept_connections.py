"""Connections that stay with the appends of one event loop while there is work, carried on by its callbacks.

An answer that a task waits for through psycopg costs 100 to 150 µs: the task, an Event, and two calls of the kernel to
watch the socket and to leave it again; lending the connection anew costs as much. Here the socket stays watched, and a
conversation goes on within the callback.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any, Final

import psycopg
from psycopg.waiting import Ready, Wait

from .append_call import Talk
from .idle_check import server_has_gone

KEPT_IDLE_S: Final = 0.01
"""How long a connection stays without work. Callers that go on appending are back within a millisecond; everybody else
who needs one of the pool's connections is not kept from it for longer."""
MOST_KEPT_S: Final = 60.0
"""How long one stays at most: a pool replaces old connections when they are given back."""

Connection = psycopg.AsyncConnection[Any]


class KeptConnection:
    """A connection in autocommit mode whose socket a loop watches; *lent* gives it back when it is closed."""

    def __init__(self, loop: asyncio.AbstractEventLoop, connection: Connection, lent: AsyncExitStack) -> None:
        self.connection = connection
        self.lent = lent
        self.lent_at = self.idle_since = loop.time()
        self._loop = loop
        self._socket = connection.pgconn.socket  # noted: of a connection that breaks libpq knows none any more
        self._talk: Talk[Any] | None = None
        self._done: Callable[[Any, BaseException | None], object] | None = None
        self._writing = False
        loop.add_reader(self._socket, self._readable)

    def converse(self, talk: Talk[Any], done: Callable[[Any, BaseException | None], object]) -> None:
        """Hold the conversation *talk*; ``done(result, None)`` or ``done(None, error)`` is called at its end."""
        self._talk, self._done = talk, done
        self._go_on(None)

    def let_go(self) -> None:
        """Watch the socket no more."""
        self._loop.remove_reader(self._socket)
        self._watch_for_room(False)

    def _readable(self) -> None:
        if self._talk is not None:
            self._go_on(Ready.R)
        elif server_has_gone(self.connection):
            # Whoever wants it next finds out as well. Unwatched, or it would be readable without end.
            self._loop.remove_reader(self._socket)

    def _go_on(self, ready: Ready | None) -> None:
        talk, done = self._talk, self._done
        assert talk is not None
        assert done is not None
        result, error = None, None
        try:
            wait = next(talk) if ready is None else talk.send(ready)
        except StopIteration as end:
            result = end.value
        except BaseException as raised:  # noqa: BLE001 - told to who waits
            error = raised
        else:
            self._watch_for_room(wait != Wait.R)
            return
        self._talk = self._done = None
        self._watch_for_room(False)
        done(result, error)
        if error is not None and not isinstance(error, Exception):
            raise error

    def _watch_for_room(self, wanted: bool) -> None:
        if wanted and not self._writing:
            self._loop.add_writer(self._socket, self._go_on, Ready.W)
        elif self._writing and not wanted:
            self._loop.remove_writer(self._socket)
        self._writing = wanted


class KeptConnections:
    """Those of one store that have no work just now. For the tasks of one loop."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._idle: list[KeptConnection] = []
        self._look: asyncio.TimerHandle | None = None
        self._returns: set[asyncio.Task[None]] = set()

    def take(self) -> KeptConnection | None:
        """Return one; whoever takes it keeps it again, or gives it back."""
        while self._idle:
            kept = self._idle.pop()
            if not server_has_gone(kept.connection):
                return kept
            self.give_back(kept)
        return None

    def keep(self, kept: KeptConnection) -> None:
        """Take *kept* in, whose conversation has ended well."""
        loop = asyncio.get_running_loop()
        kept.idle_since = loop.time()
        if len(self._idle) >= self._most or kept.idle_since - kept.lent_at > MOST_KEPT_S:
            self.give_back(kept)
            return
        self._idle.append(kept)
        if self._look is None:
            self._look = loop.call_later(KEPT_IDLE_S, self._look_round)

    def give_back(self, kept: KeptConnection) -> asyncio.Task[None]:
        """Give *kept* back to where it was lent."""
        kept.let_go()
        task = asyncio.create_task(kept.lent.aclose(), name="hindsight-give-back")
        self._returns.add(task)  # the loop itself keeps no strong reference
        task.add_done_callback(self._returns.discard)
        return task

    def give_back_all(self) -> list[asyncio.Task[None]]:
        """Give back those that have no work; the others follow within KEPT_IDLE_S after theirs."""
        idle, self._idle = self._idle, []
        return [self.give_back(kept) for kept in idle]

    def _look_round(self) -> None:
        loop = asyncio.get_running_loop()
        self._look = None
        latest = loop.time() - KEPT_IDLE_S
        for kept in self._idle:
            if kept.idle_since <= latest:
                self.give_back(kept)
        self._idle = [kept for kept in self._idle if kept.idle_since > latest]
        if self._idle:
            self._look = loop.call_later(KEPT_IDLE_S, self._look_round)
