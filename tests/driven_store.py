"""AsyncEventStore behind the synchronous face of EventStore, so that one test can be run over both."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Iterator
from typing import Any, Self, TypeVar

from hindsight_fast import AsyncEventStore

T = TypeVar("T")

STEPS = 50
"""How many steps of an iteration one run of the loop takes, behind the first: a run costs as much as many of them."""


class DrivenStore:
    """Has its own event loop, which runs while a method is being called, and not in between."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.store = AsyncEventStore(*arguments, **options)
        self.runner: asyncio.Runner | None = None

    def __enter__(self) -> Self:
        self.runner = asyncio.Runner()
        try:
            self.runner.run(self.store.open())
        except BaseException:
            self.runner.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self.runner is not None
        try:
            self.runner.run(self.store.close())
        finally:
            self.runner.close()
            self.runner = None

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.store, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            begun = found(*arguments, **options)
            if inspect.iscoroutine(begun):
                return asyncio.run(begun) if self.runner is None else self.runner.run(begun)
            return self._driven(begun) if inspect.isasyncgen(begun) else begun

        return call

    def _driven(self, steps: AsyncGenerator[T, None]) -> Iterator[T]:
        run = asyncio.run if self.runner is None else self.runner.run
        count = 1

        async def take() -> tuple[list[T], Exception | None]:
            taken: list[T] = []
            try:
                while len(taken) < count:
                    taken.append(await anext(steps))
            except Exception as error:  # noqa: BLE001 - raised where the caller has come to it
                return taken, error
            return taken, None

        while True:
            taken, error = run(take())
            count = STEPS
            yield from taken
            if isinstance(error, StopAsyncIteration):
                return
            if error is not None:
                raise error
