"""A synchronous call made in a worker thread on behalf of a coroutine, which it can ask things, and which can stop it."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError as AskingCancelled
from typing import Any, TypeVar

T = TypeVar("T")


class CallerCancelled(Exception):
    """Raised in the worker thread: who waits for its work has been cancelled."""


async def to_the_end(work: asyncio.Future[T]) -> T:
    """Wait until *work* is done even if cancelled meanwhile, and be cancelled only then."""
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not work.cancelled():
            work.exception()  # has been seen: the cancellation is what the caller hears of
        raise cancelled
    return work.result()


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
        work = self._loop.run_in_executor(None, lambda: context.run(call))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            self._stopping = True
            if self._asked is not None:
                self._asked.cancel()
            # The thread ends with CallerCancelled, or with whatever it had come to by then.
            await asyncio.gather(to_the_end(work), return_exceptions=True)
            raise

    def go_on(self) -> None:
        """Raise CallerCancelled if the call is to stop."""
        if self._stopping:
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
        try:
            return asyncio.run_coroutine_threadsafe(answer(), self._loop).result()
        except AskingCancelled:
            raise CallerCancelled from None
