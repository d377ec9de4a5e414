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
LEAST_SHARE: Final = 16
"""A group of so many does not wait for more, and larger ones are shared out among the lanes. 64 callers that came back
together once left together for ever, and client and server took turns: 12,000 appends a second, and 24,000 so. Smaller
groups cost more calls than they save time (8 and 12 tried)."""
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

    Every change is one assignment, or one call of a deque: an interrupt comes before it or after it.
    """

    def __init__(self, lanes: int = LANES) -> None:
        self._lanes = lanes
        self._waiting: deque[E] = deque()
        self._groups: dict[E, list[E]] = {}  # on their way, by leader; replaced as a whole

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether callers have to be held back."""
        return len(self._waiting) >= MOST_WAITING

    def add(self, entry: E) -> list[E] | None:
        """Take *entry* in. Returns the group that is to leave now, if a lane is free; otherwise it waits."""
        self.enqueue(entry)
        return self.depart()

    def enqueue(self, entry: E) -> None:
        """Take *entry* in, to wait."""
        self._waiting.append(entry)

    @property
    def ready(self) -> bool:
        """Whether a group that could leave now has its share already."""
        # Most looks end here: each of many callers takes one.
        if len(self._waiting) < LEAST_SHARE or len(self._groups) >= self._lanes:
            return False
        return len(self._waiting) >= self._share

    @property
    def _share(self) -> int:
        """How many requests make a group: so many that the lanes would take all that wait or are under way."""
        under_way = len(self._waiting) + sum(map(len, self._groups.values()))
        return max(LEAST_SHARE, -(-under_way // self._lanes))

    def depart(self) -> list[E] | None:
        """Return a group that is to leave now; None if no lane is free, or nobody waits."""
        return self._leave() if self._waiting and len(self._groups) < self._lanes else None

    @property
    def leaders(self) -> list[E]:
        """Those whose groups are on their way."""
        return list(self._groups)

    def led_by(self, entry: E) -> list[E] | None:
        """Return the group that is on its way under *entry*; None if it leads none. Needs no lock."""
        return self._groups.get(entry)

    def arrived(self, leader: E) -> None:
        """The group of *leader* has arrived. Harmless to repeat."""
        self._groups = {each: group for each, group in self._groups.items() if each is not leader}

    def withdraw(self, entry: E) -> bool:
        """Take a waiting *entry* out. False if it has left already."""
        try:
            self._waiting.remove(entry)
        except ValueError:
            return False
        return True

    def is_cared_for(self, entry: E) -> bool:
        """Whether *entry* waits, or its group is on its way."""
        return entry.leader in self._groups or entry in self._waiting

    def _leave(self) -> list[E]:
        share = self._share
        group: list[E] = []
        stay: list[E] = []
        events = size = seen = 0
        ids: set[UUID] = set()
        for entry in self._waiting:
            request = entry.request
            if group and (
                len(group) >= share
                or events + len(request.events) > MOST_EVENTS
                or size + request.byte_count > MOST_BYTES
            ):
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
        remaining = deque((*stay, *islice(self._waiting, seen, None)))
        groups = {**self._groups, group[0]: group}
        self._waiting, self._groups = remaining, groups
        return group


class _Waiter:
    """A thread's request, and how it is woken: with an outcome, with a group to lead, or with neither, to go alone.

    That is but a hint, which an interrupt may swallow; what is so stands in *outcome* and in the queue.
    """

    __slots__ = ("awake", "leader", "outcome", "request")

    def __init__(self, request: AppendRequest) -> None:
        self.request = request
        self.leader: _Waiter | None = None
        self.outcome: Outcome | None = None
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

        Raises WaitTimeout if so many wait that there is no room for it in time.
        """
        me = _Waiter(request)
        deadline = time.monotonic() + timeout_s
        try:
            with self._lock:
                if self._queue.full and not self._room.wait_for(lambda: not self._queue.full, timeout_s):
                    raise WaitTimeout(f"{len(self._queue)} appends wait, and there was no room for {timeout_s:g} s")
                self._queue.add(me)
            woken = False
            while True:
                group = self._queue.led_by(me)
                if group is not None:
                    self._lead(group)
                if group is not None or woken or me.outcome is not None:
                    return me.outcome
                woken = me.awake.acquire(timeout=min(LOOK_ROUND_S, timeout_s))
                if not woken and self._look_round(me, late=time.monotonic() > deadline):
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
            if self._queue.led_by(me) is not None:
                return False
            if me.outcome is not None:
                return True
            if self._queue.is_cared_for(me) and not late:
                return False
            if self._queue.withdraw(me):
                stuck = self._queue.leaders
            else:
                me.request.look_up = me.request.in_doubt = True
                me.request.lost_backend = me.request.sent_over
                stuck = [] if me.leader is None else [me.leader]
        for leader in stuck:
            # Interrupted twice, or stuck: who waits for its lane goes on without it.
            self._end(leader)
        return True
