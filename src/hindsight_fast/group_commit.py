"""Which appends share a transaction.

Appends that come while others are on their way wait, and leave together as soon as a lane is free: one transaction and
one flush for all of them. Whoever finds a lane free goes at once, so that a lone caller waits for nobody.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Final, Generic, Protocol, TypeVar
from uuid import UUID

from .append_request import AppendRequest, Outcome
from .errors import WaitTimeout

LANES: Final = 2
"""Groups on their way at the same time: while one is being flushed the next is worked on."""
MOST_EVENTS: Final = 2_000
MOST_BYTES: Final = 4 * 1024 * 1024
"""Of a group; the first request of it may be larger."""
MOST_WAITING: Final = 10_000
"""Further callers are held back until there is room."""
LOOK_ROUND_S: Final = 1.0
"""How often who waits makes sure that somebody is still at work for it: an interrupt can strike anywhere."""


class Entry(Protocol):
    """What the queue holds: something with a request, and room for the leader of its group."""

    request: AppendRequest
    leader: Any


E = TypeVar("E", bound=Entry)


class GroupQueue(Generic[E]):
    """The order in which requests leave, and with whom. Decides only: locks and waiting are its user's.

    They leave in the order of their coming, except that one which shares an event id with an earlier one waits for the
    next group: two in one group would both be unknown to the look-up. A group is led by its first entry, and has a lane
    until that has arrived.

    Every change is one assignment, or one call of a deque: an interrupt comes before it or after it. Who was to be told
    of one and was not can ask: ``led_by``, ``is_cared_for``.
    """

    def __init__(self, lanes: int = LANES) -> None:
        self._lanes = lanes
        self._state: tuple[deque[E], dict[E, list[E]]] = (deque(), {})
        """Who waits, and who is on its way: the groups by their leaders."""

    def __len__(self) -> int:
        return len(self._state[0])

    @property
    def full(self) -> bool:
        """Whether callers have to be held back."""
        return len(self) >= MOST_WAITING

    def add(self, entry: E) -> list[E] | None:
        """Take *entry* in. Returns the group that is to leave now, if a lane is free; otherwise it waits."""
        self.enqueue(entry)
        return self.depart()

    def enqueue(self, entry: E) -> None:
        """Take *entry* in, to wait."""
        self._state[0].append(entry)

    def depart(self) -> list[E] | None:
        """Return a group that is to leave now; None if no lane is free, or nobody waits."""
        waiting, groups = self._state
        return self._leave(waiting, groups) if waiting and len(groups) < self._lanes else None

    def arrived(self, leader: E) -> None:
        """The group of *leader* has arrived. Harmless to repeat."""
        waiting, groups = self._state
        self._state = (waiting, {each: group for each, group in groups.items() if each is not leader})

    def withdraw(self, entry: E) -> bool:
        """Take a waiting *entry* out. False if it has left already."""
        try:
            self._state[0].remove(entry)
        except ValueError:
            return False
        return True

    @property
    def leaders(self) -> list[E]:
        """Those whose groups are on their way."""
        return list(self._state[1])

    def led_by(self, entry: E) -> list[E] | None:
        """The group on its way that *entry* leads."""
        return self._state[1].get(entry)

    def is_cared_for(self, entry: E) -> bool:
        """Whether *entry* waits, or its group is on its way."""
        waiting, groups = self._state
        return entry.leader in groups or entry in waiting

    def _leave(self, waiting: deque[E], others: dict[E, list[E]]) -> list[E]:
        group: list[E] = []
        stay: list[E] = []
        events = size = seen = 0
        ids: set[UUID] = set()
        for entry in waiting:
            request = entry.request
            if group and (events + len(request.events) > MOST_EVENTS or size + request.byte_count > MOST_BYTES):
                break
            seen += 1
            shared = request.look_up and not ids.isdisjoint(request.event_ids)
            if request.look_up:
                ids.update(request.event_ids)  # of those that stay as well: nobody overtakes them with the same
            if shared:
                stay.append(entry)
                continue
            group.append(entry)
            events += len(request.events)
            size += request.byte_count
        for entry in group:
            entry.leader = group[0]
        self._state = (deque((*stay, *islice(waiting, seen, None))), {**others, group[0]: group})
        return group


class _Waiter:
    """A thread's request, and how it is woken: with an outcome, with a group to lead, or with neither, to go alone."""

    __slots__ = ("awake", "done", "group", "leader", "outcome", "request")

    def __init__(self, request: AppendRequest) -> None:
        self.request = request
        self.leader: _Waiter | None = None
        self.group: list[_Waiter] | None = None
        self.outcome: Outcome | None = None
        self.done = False
        """Whether its group has arrived; without an outcome it failed, and nothing was written."""
        self.awake = threading.Lock()
        self.awake.acquire()


class GroupCommit:
    """Group commit among threads. Each group is carried out by the thread of its first request.

    *run* carries out requests in one transaction, and returns an outcome for each. If it raises, each request of the
    group is left to its own caller.
    """

    def __init__(self, run: Callable[[Sequence[AppendRequest]], Sequence[Outcome]], lanes: int = LANES) -> None:
        self._run = run
        self._queue: GroupQueue[_Waiter] = GroupQueue(lanes)
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)

    def submit(self, request: AppendRequest, timeout_s: float) -> Outcome | None:
        """Have *request* carried out with others'. None: it was not, or nobody knows, and it is to be tried alone.

        So it is as well if nothing has become of it in time. Raises WaitTimeout if so many wait that there is no room
        for it in time.
        """
        me = _Waiter(request)
        deadline = time.monotonic() + timeout_s
        try:
            with self._lock:
                if self._queue.full and not self._room.wait_for(lambda: not self._queue.full, timeout_s):
                    raise WaitTimeout(f"{len(self._queue)} appends wait, and there was no room for {timeout_s:g} s")
                me.group = self._queue.add(me)
            while me.group is None and not me.awake.acquire(timeout=min(LOOK_ROUND_S, timeout_s)):
                if self._look_round(me, late=time.monotonic() > deadline):
                    break
            if me.group is not None:
                self._lead(me.group)
            return me.outcome
        except BaseException:
            self._give_up(me)
            raise

    def _lead(self, group: list[_Waiter]) -> None:
        try:
            outcomes = self._run([waiter.request for waiter in group])
            for waiter, outcome in zip(group, outcomes, strict=True):
                waiter.outcome = outcome
        except Exception:  # noqa: BLE001 - each tries alone, and meets what concerns it
            pass
        for waiter in group:
            waiter.done = True
        self._end(group[0])
        for waiter in group[1:]:
            waiter.awake.release()

    def _end(self, leader: _Waiter) -> None:
        """Give the lane to who waits."""
        with self._lock:
            self._queue.arrived(leader)
            self._send_next()

    def _send_next(self) -> None:
        following = self._queue.depart()
        if following:
            following[0].group = following
            following[0].awake.release()
        self._room.notify_all()

    def _give_up(self, me: _Waiter) -> None:
        """Interrupted, wherever it was. Whoever was in its group finds out by itself."""
        with self._lock:
            self._queue.withdraw(me)
        self._end(me)

    def _look_round(self, me: _Waiter, *, late: bool) -> bool:
        """Whether there is nothing to wait for any more, whoever should have said so."""
        with self._lock:
            self._send_next()
            me.group = self._queue.led_by(me)
            if me.done or me.outcome is not None or me.group is not None:
                return True
            if self._queue.is_cared_for(me) and not late:
                return False
            if self._queue.withdraw(me):
                stuck = self._queue.leaders
            else:
                me.request.look_up = me.request.in_doubt = True
                stuck = [] if me.leader is None else [me.leader]
        for leader in stuck:
            # Interrupted twice, or stuck: who waits for its lane goes on without it.
            self._end(leader)
        return True
