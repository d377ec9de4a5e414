"""Group commit among tasks that are cancelled in any step of the loop: nobody else is harmed, or forgotten.

No server: what carries out a group is a coroutine here, which takes a few steps.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from hindsight_fast import AppendResult, Cursor, WaitTimeout, group_commit
from hindsight_fast.async_appending import AsyncGroupCommit

PATIENCE_S = 20.0
"""Of each caller. Whoever is left behind would find out then."""
SOON_S = 2.0
"""What is not forgotten takes milliseconds."""


class FakeRequest:
    """As much of an AppendRequest as a queue looks at."""

    def __init__(self) -> None:
        self.events = range(1)
        self.byte_count = 1
        self.look_up = self.in_doubt = False
        self.sent_over = self.lost_backend = None
        self.sent_over = self.lost_backend = None


def outcome_of(request: Any) -> AppendResult:
    return AppendResult(Cursor(id(request), 0))


class Groups:
    """Carries out groups, in *steps* of the loop before that and as many behind it, when *go* is set."""

    def __init__(self, *, steps: int = 2) -> None:
        self.go = asyncio.Event()
        self.go.set()
        self.steps = steps
        self.carried_out: Counter[int] = Counter()

    async def __call__(self, requests: Sequence[Any]) -> Sequence[Any]:
        await self.go.wait()
        for _ in range(self.steps):
            await asyncio.sleep(0)
        self.carried_out.update(id(request) for request in requests)
        for _ in range(self.steps):
            await asyncio.sleep(0)
        return [outcome_of(request) for request in requests]


class Callers:
    """Eight tasks on one lane, with room for two who wait: two go, two wait, and the others are held back."""

    def __init__(self, timeout_s: float = PATIENCE_S) -> None:
        self.groups = Groups()
        self.commit = AsyncGroupCommit(self.groups, lanes=1)
        self.requests: list[Any] = [FakeRequest() for _ in range(8)]
        self.tasks = [asyncio.create_task(self.commit.submit(request, timeout_s)) for request in self.requests]

    def check(self) -> None:
        for request, task in zip(self.requests, self.tasks, strict=True):
            assert task.done(), "somebody is left behind"
            times = self.groups.carried_out[id(request)]
            assert times <= 1
            if task.cancelled():
                continue
            outcome = task.result()
            if outcome is None:
                assert request.in_doubt or not times, "it was carried out, and would be again"
                assert request.look_up == request.in_doubt
            else:
                assert outcome == outcome_of(request)
        assert len(self.commit._queue) == 0
        assert self.commit._queue.leaders == []
        assert not self.commit._held_back


@pytest.fixture(autouse=True)
def room_for_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_commit, "MOST_WAITING", 2)


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


@pytest.mark.parametrize(
    ("first", "then"),
    [([0], []), ([2], []), ([7], []), ([0, 1], [2]), ([2, 3], [4]), ([4], [5]), ([4, 5], [6]), ([2, 3], [4, 5, 6])],
    ids=str,
)
def test_who_is_cancelled_in_any_step_leaves_nobody_behind(first: list[int], then: list[int]) -> None:
    async def cancelled_in(step: int, further_steps: int) -> tuple[bool, bool]:
        callers = Callers()
        struck = []
        for steps, victims in ((step, first), (further_steps, then)):
            for _ in range(steps):
                await asyncio.sleep(0)
            struck.append(sum(callers.tasks[victim].cancel() for victim in victims) > 0)
        await asyncio.wait(callers.tasks, timeout=SOON_S)
        callers.check()
        return struck[0], struck[1]

    async def main() -> None:
        step = 0
        while (await cancelled_in(step, 0))[0]:
            further_steps = 0
            while (await cancelled_in(step, further_steps))[1]:
                further_steps += 1
            step += 1
        assert step > 5, "nobody was struck"

    run(main)


def test_a_group_whose_own_task_is_cancelled_in_any_step_is_not_appended_twice() -> None:
    """As somebody does who cancels all tasks of the loop: a caller who goes on must know what may have happened."""

    async def cancelled_in(step: int) -> bool:
        callers = Callers()
        for _ in range(step):
            await asyncio.sleep(0)
        struck = [task.cancel() for task in callers.commit._tasks]
        await asyncio.wait(callers.tasks, timeout=SOON_S)
        callers.check()
        return any(struck) or step < 3

    async def main() -> None:
        step = 0
        while await cancelled_in(step):
            step += 1
        assert step > 5, "nobody was struck"

    run(main)


def test_who_is_held_back_for_too_long_is_told_and_forgotten() -> None:
    async def main() -> None:
        callers = Callers(timeout_s=0.05)
        callers.groups.go.clear()
        await asyncio.wait(callers.tasks, timeout=0.5)
        late = [task for task in callers.tasks if task.done()]
        assert len(late) == 4
        for task in late:
            with pytest.raises(WaitTimeout, match="2 appends wait"):
                task.result()
        assert not callers.commit._held_back, "they are kept for as long as nothing arrives"
        callers.groups.go.set()
        done, _ = await asyncio.wait(set(callers.tasks) - set(late), timeout=SOON_S)
        assert len(done) == 4

    run(main)
