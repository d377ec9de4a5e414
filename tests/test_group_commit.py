"""Which appends share a transaction: the queue against a plain model, and threads that are interrupted anywhere.

No server: what carries out a group is a function here, which sleeps, fails and is interrupted as it likes.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from math import ceil
from types import FrameType
from typing import Any
from uuid import UUID

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from hindsight_fast import AppendResult, Cursor, WaitTimeout, group_commit
from hindsight_fast.group_commit import LEAST_SHARE, MOST_BYTES, MOST_EVENTS, GroupCommit, GroupQueue

SOAK = bool(os.environ.get("HINDSIGHT_SOAK"))
PATIENCE_S = 20.0
"""What takes longer is taken to wait for ever."""


class FakeRequest:
    """As much of an AppendRequest as a queue looks at."""

    def __init__(self, ids: Sequence[int] = (), events: int = 1, byte_count: int = 1) -> None:
        self.event_ids = [UUID(int=n) for n in ids]
        self.look_up = bool(ids)
        self.in_doubt = False
        self.sent_over = self.lost_backend = None
        self.events = range(events)
        self.byte_count = byte_count


def outcome_of(request: Any) -> AppendResult:
    return AppendResult(Cursor(id(request), 0))


def ids_of(request: Any) -> set[UUID]:
    return set(request.event_ids) if request.look_up else set()


# --- The queue --------------------------------------------------------------------------------------------------------


class Entry:
    def __init__(self, request: FakeRequest) -> None:
        self.request: Any = request
        self.leader: Any = None


def next_group(waiting: list[Entry], share: int) -> list[Entry]:
    """Who leaves together, of those who wait: in order, but for those whose ids somebody before them has."""
    group: list[Entry] = []
    ids: set[UUID] = set()
    for entry in waiting:
        if len(group) == share:
            break
        sizes = [(len(each.request.events), each.request.byte_count) for each in (*group, entry)]
        events, size = (sum(each) for each in zip(*sizes, strict=True))
        if group and (events > MOST_EVENTS or size > MOST_BYTES):
            break
        if not ids & ids_of(entry.request):
            group.append(entry)
        ids |= ids_of(entry.request)
    return group


class QueueMachine(RuleBasedStateMachine):
    """A GroupQueue and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: GroupQueue[Entry] = GroupQueue(lanes=2)
        self.waiting: list[Entry] = []
        self.on_their_way: list[list[Entry]] = []
        self.gone: list[Entry] = []

    def share(self) -> int:
        return max(LEAST_SHARE, ceil((len(self.waiting) + sum(map(len, self.on_their_way))) / 2))

    def leaves(self) -> list[Entry] | None:
        if not self.waiting or len(self.on_their_way) == 2:
            return None
        group = next_group(self.waiting, self.share())
        self.waiting = [entry for entry in self.waiting if entry not in group]
        self.on_their_way.append(group)
        return group

    @rule(
        ids=st.lists(st.integers(0, 3), max_size=2),
        events=st.sampled_from([1, 1, 1, 0, MOST_EVENTS // 3, MOST_EVENTS, MOST_EVENTS + 1]),
        byte_count=st.sampled_from([1, 1, 1, 0, MOST_BYTES // 2, MOST_BYTES, 2 * MOST_BYTES]),
        together=st.booleans(),
    )
    def somebody_comes(self, ids: list[int], events: int, byte_count: int, together: bool) -> None:
        entry = Entry(FakeRequest(ids, events, byte_count))
        self.waiting.append(entry)
        # Both ways to come: at once, and with whoever comes in the same turn.
        if together:
            self.queue.enqueue(entry)
            assert self.queue.depart() == self.leaves()
        else:
            assert self.queue.add(entry) == self.leaves()
        assert self.queue.depart() is None

    @rule(count=st.integers(2, 4 * LEAST_SHARE), ids=st.lists(st.integers(0, 3), max_size=2))
    def many_come_in_one_turn(self, count: int, ids: list[int]) -> None:
        for n in range(count):
            entry = Entry(FakeRequest(ids if n == count // 2 else [], 1, 1))
            self.waiting.append(entry)
            self.queue.enqueue(entry)
            assert self.queue.ready == (len(self.on_their_way) < 2 and len(self.waiting) >= self.share())
        while (group := self.queue.depart()) is not None:
            assert group == self.leaves()
        assert self.leaves() is None

    @precondition(lambda self: self.on_their_way)
    @rule(data=st.data())
    def a_group_arrives(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from(self.on_their_way))
        self.on_their_way.remove(group)
        self.gone += group
        self.queue.arrived(group[0])
        assert self.queue.depart() == self.leaves()

    @rule(data=st.data())
    def somebody_arrives_who_leads_nothing(self, data: st.DataObject) -> None:
        followers = [entry for group in self.on_their_way for entry in group[1:]]
        others = self.gone + self.waiting + followers
        if others:
            self.queue.arrived(data.draw(st.sampled_from(others)))
            assert self.queue.depart() is None

    @rule(data=st.data())
    def somebody_withdraws(self, data: st.DataObject) -> None:
        everybody = self.waiting + self.gone + [entry for group in self.on_their_way for entry in group]
        if not everybody:
            return
        entry = data.draw(st.sampled_from(everybody))
        assert self.queue.withdraw(entry) == (entry in self.waiting)
        if entry in self.waiting:
            self.waiting.remove(entry)
            self.gone.append(entry)

    @invariant()
    def the_queue_knows_who_waits_and_who_is_on_the_way(self) -> None:
        assert len(self.queue) == len(self.waiting)
        for entry in self.waiting + [entry for group in self.on_their_way for entry in group]:
            assert self.queue.is_cared_for(entry)
        for group in self.on_their_way:
            assert [self.queue.led_by(entry) for entry in group] == [group, *[None] * (len(group) - 1)]
        assert not any(self.queue.is_cared_for(entry) for entry in self.gone)

    @invariant()
    def nobody_waits_beside_a_free_lane(self) -> None:
        assert not self.waiting or len(self.on_their_way) == 2

    def teardown(self) -> None:
        for _ in range(len(self.waiting) + len(self.on_their_way)):
            if self.on_their_way:
                group = self.on_their_way.pop(0)
                self.queue.arrived(group[0])
                assert self.queue.depart() == self.leaves()
        assert (self.waiting, self.on_their_way, len(self.queue)) == ([], [], 0)


def test_the_queue_does_what_a_list_does() -> None:
    run_state_machine_as_test(
        QueueMachine, settings=settings(max_examples=2_000 if SOAK else 60, stateful_step_count=50, deadline=None)
    )


# --- Threads ----------------------------------------------------------------------------------------------------------


class Interrupt(BaseException):
    """What a signal, or a debugger, throws into a thread."""


class Caller(threading.Thread):
    """A thread that submits one request; *outcome* is what it got, or what was raised."""

    def __init__(self, commit: GroupCommit, request: Any, name: str = "", **settings: Any) -> None:
        super().__init__(name=name, daemon=True)
        self.commit, self.request = commit, request
        self.outcome: Any = "none yet"
        self.timeout_s: float = settings.get("timeout_s", PATIENCE_S)
        self.interrupt_at: int | None = settings.get("interrupt_at")
        self.lines_seen = 0

    def run(self) -> None:
        if self.interrupt_at is not None:
            sys.settrace(self._trace)
        try:
            self.outcome = self.commit.submit(self.request, self.timeout_s)
        except BaseException as error:  # noqa: BLE001 - kept for the test to look at
            self.outcome = error
        finally:
            sys.settrace(None)

    def _trace(self, frame: FrameType, what: str, _: Any) -> Any:
        if frame.f_code.co_filename != group_commit.__file__:
            return None
        # Not where a with statement is left: CPython lets nothing in between a block and its __exit__.
        if what == "line" and not SOURCE[frame.f_lineno - 1].startswith("with "):
            self.lines_seen += 1
            if self.lines_seen == self.interrupt_at:
                raise Interrupt
        return self._trace

    def finish(self) -> Any:
        self.join(PATIENCE_S)
        assert not self.is_alive(), f"{self.name} waits for ever"
        return self.outcome


with open(group_commit.__file__, encoding="utf-8") as source:
    SOURCE = [line.strip() for line in source]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition is not met"
        time.sleep(0.0005)


@pytest.fixture(autouse=True)
def looks_round_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_commit, "LOOK_ROUND_S", 0.01)


class Groups:
    """Carries out groups: each waits for *go*, if there is one, and is kept in *carried_out*."""

    def __init__(self, go: threading.Event | None = None) -> None:
        self.go = go
        self.carried_out: list[list[Any]] = []
        self.interrupted_leader: str | None = None

    def __call__(self, requests: Sequence[Any]) -> Sequence[Any]:
        self.carried_out.append(list(requests))
        if self.go is not None:
            assert self.go.wait(PATIENCE_S)
        if threading.current_thread().name == self.interrupted_leader:
            raise Interrupt
        return [outcome_of(request) for request in requests]


def test_a_lone_caller_goes_at_once_and_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_commit, "LOOK_ROUND_S", None)  # to wait at all would be a TypeError
    threads: list[threading.Thread] = []

    def run(requests: Sequence[Any]) -> Sequence[Any]:
        threads.append(threading.current_thread())
        return [outcome_of(request) for request in requests]

    commit = GroupCommit(run)
    for _ in range(100):
        request: Any = FakeRequest()
        assert commit.submit(request, 0.0) == outcome_of(request)
    assert threads == [threading.current_thread()] * 100


def test_who_comes_while_a_group_is_on_its_way_leaves_with_the_next() -> None:
    go = threading.Event()
    groups = Groups(go)
    commit = GroupCommit(groups, lanes=1)
    requests: list[Any] = [FakeRequest(ids) for ids in ([0], [1], [1, 2], [2], [], [1], [3])]
    callers = []
    for n, request in enumerate(requests):
        callers.append(Caller(commit, request))
        callers[-1].start()
        until(lambda n=n: len(groups.carried_out) == 1 and len(commit._queue) == n)  # type: ignore[misc]
    go.set()
    assert [caller.finish() for caller in callers] == [outcome_of(request) for request in requests]
    # 2 shares an id with 1, and 3 with 2, which it must not overtake.
    numbers = [[requests.index(request) for request in group] for group in groups.carried_out]
    assert numbers == [[0], [1, 4, 6], [2], [3, 5]]


def test_a_group_that_fails_is_left_to_its_callers() -> None:
    def run(requests: Sequence[Any]) -> Sequence[Any]:
        raise OSError

    request: Any = FakeRequest()
    assert GroupCommit(run).submit(request, PATIENCE_S) is None
    assert not request.in_doubt  # run says so where it is


def test_further_callers_are_held_back_until_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_commit, "MOST_WAITING", 2)
    go = threading.Event()
    commit = GroupCommit(Groups(go), lanes=1)
    callers = [Caller(commit, FakeRequest()) for _ in range(3)]
    for caller in callers:
        caller.start()
    until(lambda: len(commit._queue) == 2)
    impatient, patient = Caller(commit, FakeRequest(), timeout_s=0.05), Caller(commit, FakeRequest())
    impatient.start()
    patient.start()
    error = impatient.finish()
    assert isinstance(error, WaitTimeout)
    assert "2 appends wait" in str(error)
    assert patient.is_alive()
    go.set()
    for caller in (*callers, patient):
        assert caller.finish() == outcome_of(caller.request)


class Scenario:
    """Five callers on one lane: a goes alone; b leads c and d behind it; e comes while those are on their way."""

    def __init__(self, victim: str, *, at_line: int | None = None, in_its_group: bool = False) -> None:
        self.go = threading.Event()
        self.groups = Groups(self.go)
        self.commit = GroupCommit(self.groups, lanes=1)
        self.callers = {
            name: Caller(self.commit, FakeRequest(), name, interrupt_at=at_line if name == victim else None)
            for name in "abcde"
        }
        if in_its_group:
            self.groups.interrupted_leader = victim
        self.victim = self.callers[victim]

    def play(self) -> None:
        *first, last = self.callers.values()
        for caller in first:
            caller.start()
            until(lambda caller=caller: self.has_come(caller))  # type: ignore[misc]
        self.go.set()
        last.start()
        for caller in self.callers.values():
            caller.finish()

    def has_come(self, caller: Caller) -> bool:
        waiting = any(waiter.request is caller.request for waiter in list(self.commit._queue._waiting))
        return waiting or self.times_carried_out(caller) > 0 or not caller.is_alive()

    def times_carried_out(self, caller: Caller) -> int:
        return sum(group.count(caller.request) for group in self.groups.carried_out)

    def check(self) -> None:
        for caller in self.callers.values():
            assert self.times_carried_out(caller) <= 1
            if caller.outcome is None:
                assert caller.request.in_doubt, f"{caller.name} would append again without asking"
                assert caller.request.look_up
            elif caller is not self.victim or not isinstance(caller.outcome, Interrupt):
                assert caller.outcome == outcome_of(caller.request), caller.name
        # The lane is free, and nobody is left behind.
        assert len(self.commit._queue) == 0
        another = Caller(self.commit, FakeRequest())
        another.start()
        assert another.finish() == outcome_of(another.request)


@pytest.mark.parametrize("victim", "abcde")
def test_an_interrupt_anywhere_harms_nobody_else(victim: str) -> None:
    line, interrupted = 0, True
    while interrupted:
        line += 1
        scenario = Scenario(victim, at_line=line)
        scenario.play()
        scenario.check()
        interrupted = isinstance(scenario.victim.outcome, Interrupt)
    assert line > 10, "the interrupts have struck nowhere"


@pytest.mark.parametrize("victim", "abcde")
def test_an_interrupt_while_a_group_is_carried_out_harms_nobody_else(victim: str) -> None:
    scenario = Scenario(victim, in_its_group=True)
    scenario.play()
    scenario.check()
    leads = any(group[0] is scenario.victim.request for group in scenario.groups.carried_out)
    assert isinstance(scenario.victim.outcome, Interrupt) == leads


def test_many_threads_whatever_happens_to_their_groups() -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    lock = threading.Lock()
    running: list[list[Any]] = []
    carried_out: Counter[int] = Counter()
    faults: list[str] = []

    def run(requests: Sequence[Any]) -> Sequence[Any]:
        with lock:
            running.append(list(requests))
            ids = [each for request in requests for each in ids_of(request)]
            if len(running) > 2:
                faults.append(f"{len(running)} groups on two lanes")
            if len(set(ids)) < len(ids):
                faults.append("two of a group share an id")
            if len(requests) > 1 and sum(len(request.events) for request in requests) > MOST_EVENTS:
                faults.append("a group is too large")
            what, pause_s = chance.random(), chance.random() / 500
        time.sleep(pause_s)
        with lock:
            running.remove(list(requests))
            if what < 0.1:
                raise OSError
            carried_out.update(id(request) for request in requests)
            if what < 0.15:
                raise Interrupt
        return [outcome_of(request) for request in requests]

    commit = GroupCommit(run)
    outcomes: Counter[str] = Counter()

    def come_again(seed: int) -> None:
        own = random.Random(seed)
        for _ in range(2_000 if SOAK else 60):
            ids = [own.randrange(4)] if own.random() < 0.3 else []
            request: Any = FakeRequest(ids, own.choice([1, 1, 1, MOST_EVENTS // 2]))
            try:
                outcome: object = commit.submit(request, PATIENCE_S)
            except Interrupt:
                outcome = Interrupt
            with lock:
                kept.append(request)
                if carried_out[id(request)] > 1:
                    faults.append("carried out twice")
                if isinstance(outcome, AppendResult) and outcome != outcome_of(request):
                    faults.append("another's outcome")
                if outcome is None and carried_out[id(request)] and not request.in_doubt:
                    faults.append("carried out, and would be again")
                outcomes[type(outcome).__name__] += 1

    kept: list[Any] = []  # so that no other request gets its place in memory
    threads = [threading.Thread(target=come_again, args=(seed + n,), daemon=True) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60 if not SOAK else 600)
    assert not any(thread.is_alive() for thread in threads), "somebody waits for ever"
    assert faults == []
    assert set(outcomes) == {"AppendResult", "NoneType", "type"}
    assert len(commit._queue) == 0
