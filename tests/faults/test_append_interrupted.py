"""Ctrl-C in a thread that carries out others' appends with its own: they go on, and nothing is lost or doubled."""

from __future__ import annotations

import linecache
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any
from uuid import uuid4

import pytest

from hindsight_fast import ANY, AppendResult, EventStore, StreamWrite, group_commit
from hindsight_fast.append_request import AppendRequest, Outcome
from hindsight_fast.group_commit import GroupCommit
from ledger import Ledger, event
from rivals import BY_STORE, Follower, Threads, WriterProcess, wait_until

TIMEOUT_S = 40.0
"""After which whoever waits goes on by itself. So long that a machine that stands still is not taken for that."""


def request() -> AppendRequest:
    return AppendRequest([StreamWrite(uuid4(), [event("any")], ANY)], lambda each: each, None)


class InterruptAt:
    """A trace function that raises KeyboardInterrupt at the n-th line of group_commit.py which its thread comes to."""

    def __init__(self, line: int) -> None:
        self.left = line
        self.where: str | None = None

    def __call__(self, frame: FrameType, kind: str, _: Any) -> Any:
        if not frame.f_code.co_filename.endswith("group_commit.py"):
            return None
        # (Not on a with statement: where its block has ended a trace can strike, a signal cannot, and its lock stays.)
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
        if kind == "line" and not line.startswith("with"):
            self.left -= 1
            if self.left < 0:
                self.where = f"{frame.f_code.co_name}, line {frame.f_lineno}"
                raise KeyboardInterrupt
        return self


class Lane:
    """Carries out groups, each when it is let go, and remembers which requests it has answered."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.answered: set[int] = set()

    def run(self, requests: Sequence[AppendRequest]) -> Sequence[Outcome]:
        assert self.free.wait(20)
        self.answered.update(map(id, requests))
        return [AppendResult(None) for _ in requests]


def interrupt_a_leader(line: int) -> str | None:
    """Interrupt who leads a group of two, before another; returns at which line, None if it had come to its end."""
    lane = Lane()
    groups = GroupCommit(lane.run, lanes=1)
    requests = [request() for _ in range(4)]
    outcomes: list[Outcome | str | None] = ["none came"] * 4
    began = time.monotonic()
    interrupt = InterruptAt(line)

    def submit(n: int) -> None:
        outcomes[n] = groups.submit(requests[n], TIMEOUT_S)

    def submit_interrupted(n: int) -> None:
        sys.settrace(interrupt)
        try:
            submit(n)
        except KeyboardInterrupt:
            outcomes[n] = "interrupted"
        finally:
            sys.settrace(None)

    with Threads(lambda: submit(0)):
        wait_until(lambda: groups._queue.leaders, what="the lane is taken")
        with Threads(lambda: submit_interrupted(1)):
            wait_until(lambda: len(groups._queue) == 1 or outcomes[1] == "interrupted", what="it waits")
            with Threads(lambda: submit(2), lambda: submit(3)):
                wait_until(lambda: len(groups._queue) >= 2, what="two others wait")
                lane.free.set()
    assert "none came" not in outcomes
    assert time.monotonic() - began < TIMEOUT_S - 5, f"{interrupt.where}: nobody went on before the timeout"
    for n in (0, 2, 3):
        settled = isinstance(outcomes[n], AppendResult) or requests[n].look_up or id(requests[n]) not in lane.answered
        assert settled, f"{interrupt.where}: {outcomes[n]}, and it may be tried again without a look"
    # Nothing is left behind: the lane is free.
    assert (len(groups._queue), groups._queue.leaders) == (0, []), interrupt.where
    assert isinstance(groups.submit(request(), 20.0), AppendResult)
    return interrupt.where


def test_wherever_a_leader_is_interrupted_its_group_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_commit, "LOOK_ROUND_S", 0.002)
    monkeypatch.setattr(group_commit, "MOST_EVENTS", 2)
    line, at_its_end, places = 0, 0, set()
    # It comes to more lines the longer it waits, so that once at its end is not the last line.
    while at_its_end < 30:
        where = interrupt_a_leader(line)
        at_its_end = at_its_end + 1 if where is None else 0
        places.add(where or "the end")
        line += 1
    assert {place.split(",")[0] for place in places} >= {"submit", "add", "_lead", "_end", "arrived"}


def test_an_interrupt_while_the_group_is_on_its_way_leaves_it_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_commit, "LOOK_ROUND_S", 0.002)
    under_way = threading.Event()

    def run(requests: Sequence[AppendRequest]) -> Sequence[Outcome]:
        if not under_way.is_set():
            under_way.set()
            wait_until(lambda: len(groups._queue) == 3, what="three wait")
            return [AppendResult(None) for _ in requests]
        raise KeyboardInterrupt

    groups = GroupCommit(run, lanes=1)
    requests = [request() for _ in range(3)]
    interrupted = []

    def submit(n: int) -> None:
        try:
            assert groups.submit(requests[n], 20.0) is None
        except KeyboardInterrupt:
            interrupted.append(n)

    with Threads(lambda: groups.submit(request(), 20.0)):
        assert under_way.wait(20)
        with Threads(*(lambda n=n: submit(n) for n in range(3))):
            pass
    assert len(interrupted) == 1
    assert all(each.in_doubt and each.look_up for n, each in enumerate(requests) if n not in interrupted)


def test_a_lane_that_was_lost_for_good_is_given_to_others_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted once more while it was giving its lane away."""
    monkeypatch.setattr(group_commit, "LOOK_ROUND_S", 0.002)
    monkeypatch.setattr(GroupCommit, "_give_up", lambda self, me: None)
    interrupts = iter([True, False])

    def run(requests: Sequence[AppendRequest]) -> Sequence[Outcome]:
        if next(interrupts, False):
            raise KeyboardInterrupt
        return [AppendResult(None) for _ in requests]

    groups = GroupCommit(run, lanes=1)
    with pytest.raises(KeyboardInterrupt):
        groups.submit(request(), 0.05)
    behind_it = request()
    assert groups.submit(behind_it, 0.05) is None
    assert not behind_it.in_doubt, "it had not left"
    assert isinstance(groups.submit(request(), 0.05), AppendResult)


@pytest.mark.essential
def test_a_process_that_is_interrupted_again_and_again_keeps_its_promises(database: str, store: EventStore) -> None:
    """Its main thread leads groups in which its other thread's appends are, and the other way round."""
    ledger, follower = Ledger(), Follower(store)
    process = WriterProcess(database, ledger, name="p", streams=5, ways=BY_STORE)
    wait_until(process.begun.is_set, what="the process writes")
    for n in range(40):
        goal = ledger.count("acknowledged") + 1 + n % 5
        wait_until(lambda goal=goal: ledger.count("acknowledged") >= goal, what="its other thread goes on")
        process.interrupt()
    process.stop()
    assert {key.split("/")[0] for key in ledger.unknown()} == {"pa"}, "no interrupt struck an append"
    assert ledger.errors().keys() <= {"ConcurrencyConflict"}
    follower.look()
    follower.check(ledger.check(database))
