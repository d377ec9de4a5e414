"""A synchronous call made in a worker thread for a coroutine, which it can ask things, and which can stop it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

T = TypeVar("T")

LOOK_S: Final = 1.0
"""How often a worker that waits for an answer looks whether there is still a loop to give it."""


class CallerCancelled(Exception):
    """Raised in the worker thread: who waits for its work has been cancelled."""


def begin(work: Coroutine[Any, Any, T], *, name: str) -> asyncio.Future[T]:
    """Begin *work* as a task, which goes on whatever becomes of the caller.

    At once from Python 3.12 on, and mostly it is done then; before, a turn of the loop made 40 µs of a call's 220.
    """
    if sys.version_info >= (3, 12):
        return asyncio.Task(work, loop=asyncio.get_running_loop(), name=name, eager_start=True)
    return asyncio.create_task(work, name=name)


async def until_done(work: asyncio.Future[Any]) -> None:
    """Wait until *work* is done, well or not, even if cancelled meanwhile; be cancelled only then."""
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as error:
            cancelled = error
    if not work.cancelled():
        work.exception()  # so that nobody misses it: who wants it asks for the result
    if cancelled is not None:
        raise cancelled


class WorkerCall:
    """Made in a running loop; ``run()`` belongs to its side, ``go_on()`` and ``ask()`` to the worker thread's."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = False
        self._asked: asyncio.Task[Any] | None = None

    async def run(self, call: Callable[[], T]) -> T:
        """Return what *call* returns, in a thread of the loop's default executor.

        Cancelled, it stops the call at the next ``go_on()`` or ``ask()``, and waits until the thread is done with it.
        """
        context = contextvars.copy_context()

        def start() -> T:
            self.go_on()
            return context.run(call)

        work = self._loop.run_in_executor(None, start)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            self._stopping = True
            if self._asked is not None:
                self._asked.cancel()
            # The thread ends with CallerCancelled, or with whatever it had come to by then.
            await until_done(work)
            raise

    def go_on(self) -> None:
        """Raise CallerCancelled if the call is to stop."""
        if self._stopping or self._loop.is_closed():
            raise CallerCancelled

    def ask(self, question: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return what the coroutine *question()* returns in the loop. Raises what it raises, or CallerCancelled."""

        async def answer() -> T:
            self.go_on()
            self._asked = asyncio.current_task()
            try:
                return await question()
            finally:
                self._asked = None

        self.go_on()
        asked = asyncio.run_coroutine_threadsafe(answer(), self._loop)
        while not concurrent.futures.wait([asked], LOOK_S).done:
            if self._loop.is_closed():
                raise CallerCancelled
        try:
            return asked.result()
        except concurrent.futures.CancelledError:
            raise CallerCancelled from None
