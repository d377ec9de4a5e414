"""Writers that compete and readers that follow them, as threads or as processes of their own.

python rivals.py CONNINFO SCHEMA NAME STREAMS COUNT WAYS   writes, one record a line, until COUNT or a line on stdin
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self
from uuid import UUID

import psycopg
import pytest

from hindsight_fast import ANY, NO_STREAM, Cursor, EventStore, StreamWrite, stream_uuid
from ledger import Ledger, Record, Row, acknowledged, begun, event, failed

DEADLINE_S = 60.0

BY_STORE = ("one", "several", "multi", "guess")
"""One event, several, several streams in any order, and an expectation that often does not hold."""
BY_LENT = ("pause", "roll back", "savepoint", "many")
"""Over a connection of one's own, which pauses between append and commit."""


def streams_of(count: int) -> list[UUID]:
    return [stream_uuid("rivals", str(n)) for n in range(count)]


class Writer:
    """Appends in one of *ways* at a time, chosen by chance, and says what became of each."""

    def __init__(
        self,
        store: EventStore,
        say: Callable[[Record], None],
        *,
        name: str,
        streams: Sequence[UUID],
        ways: Sequence[str] = BY_STORE,
        database: str | None = None,
        most_pause_s: float = 0.01,
    ) -> None:
        self._store = store
        self._say = say
        self._name = name
        self._streams = streams
        self._ways = ways
        self._database = database
        self._most_pause_s = most_pause_s
        self._chance = random.Random(name)
        self._count = 0
        self._lent: psycopg.Connection[Any] | None = None

    def step(self) -> None:
        """Append once. Raises nothing: what went wrong is said."""
        way = self._chance.choice(self._ways)
        key = f"{self._name}/{self._count}"
        self._count += 1
        writes = self._writes(way, key)
        self._say(begun(key, writes))
        unknown = False
        try:
            if way in BY_STORE:
                self._say(acknowledged(key, self._store.transact(writes)))
                return
            connection = self._own_connection()
            with connection.transaction():
                if way == "savepoint":
                    with connection.transaction() as savepoint:
                        self._store.append(
                            self._streams[0], [event(f"{key}/undone")], expected=ANY, connection=connection
                        )
                        self._pause()
                        raise psycopg.Rollback(savepoint)
                result = self._store.transact(writes, connection=connection)
                self._pause()
                if way == "roll back":
                    raise RolledBack
                # From here on an error may be that of the commit.
                unknown = True
        except Exception as error:  # noqa: BLE001 - said
            self._say(failed(key, error, unknown=unknown))
        else:
            self._say(acknowledged(key, result))

    def _writes(self, way: str, key: str) -> list[StreamWrite]:
        chance = self._chance
        streams = chance.sample(self._streams, chance.randint(2, 3) if way in ("multi", "many") else 1)
        events = chance.randint(2, 4) if way == "several" else 1
        expected = chance.choice([NO_STREAM, 3, 8]) if way == "guess" else ANY
        return [
            StreamWrite(stream, [event(f"{key}/{n}/{m}") for m in range(events)], expected)
            for n, stream in enumerate(streams)
        ]

    def _pause(self) -> None:
        time.sleep(self._chance.random() * self._most_pause_s)

    def _own_connection(self) -> psycopg.Connection[Any]:
        if self._lent is None or self._lent.broken:
            assert self._database is not None
            self._lent = psycopg.connect(self._database, autocommit=True)
        return self._lent

    def close(self) -> None:
        if self._lent is not None:
            self._lent.close()


class RolledBack(Exception):
    """What a writer ends its own transaction with."""


class Threads:
    """Runs each of *works* in a thread of its own, until it returns; leaving raises the first of their errors."""

    def __init__(self, *works: Callable[[], object]) -> None:
        self._errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(work,), daemon=True) for work in works]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        deadline = time.monotonic() + DEADLINE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if error is None:
            assert not any(thread.is_alive() for thread in self._threads), f"at work for {DEADLINE_S:g} s"
            for each in self._errors:
                raise each

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised by who waits
            self._errors.append(error)


class Stop:
    """Tells threads that they have done enough: leaving the with statement sets it."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._event.set()

    def __bool__(self) -> bool:
        return self._event.is_set()


class WriterProcess:
    """A process with writers in two threads, whose records go into a ledger."""

    def __init__(
        self, database: str, ledger: Ledger, *, name: str, streams: int, ways: Sequence[str], count: int = 10**9
    ) -> None:
        command = [sys.executable, __file__, database, "hindsight", name, str(streams), str(count), ",".join(ways)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._ledger = ledger
        self._errors = ""
        self.begun = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def stop(self) -> None:
        """Let it finish what it is at, and take account of that."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self.end()

    def end(self) -> None:
        """Wait for its end. Fails if it failed."""
        self._wait()
        assert self._process.returncode == 0, self._errors

    def kill(self) -> None:
        self._process.kill()
        self._wait()

    def _wait(self) -> None:
        self._thread.join(DEADLINE_S)
        if self._thread.is_alive():
            self._process.kill()
            pytest.fail(f"a writer did not end within {DEADLINE_S:g} s")
        with self._process as process:  # closes its pipes
            assert process.stderr is not None
            self._errors = process.stderr.read()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith("\n"):  # of one that was killed while it wrote the last is no record
                self._ledger.take(json.loads(line))
                self.begun.set()


class Follower:
    """Reads the log as subscribers do, from where it stands, again and again; keeps what it was handed, in order."""

    def __init__(self, store: EventStore, *, over_crashes: bool = False) -> None:
        self._store = store
        self._over_crashes = over_crashes
        self.seen: list[tuple[Cursor, UUID]] = []

    def look(self) -> int:
        """Read on to the head; returns how many events were new."""
        before = len(self.seen)
        for each in self._store.read(after=self.seen[-1][0] if self.seen else Cursor.BEGINNING):
            self.seen.append((each.cursor, each.event_id))
        return len(self.seen) - before

    def follow(self, stop: Stop) -> None:
        while not stop:
            try:
                pause_s = 0.0 if self.look() else 0.001
            except psycopg.OperationalError:
                if not self._over_crashes:
                    raise
                pause_s = 0.05
            time.sleep(pause_s)
        self.look()

    def check(self, rows: Sequence[Row]) -> None:
        """P3: what it was handed is the table, in its order."""
        stored = [(row.cursor, row.event_id) for row in rows]
        assert self.seen == stored, "P3: it was not handed what is in the table, in that order"


class NaiveFollower(Follower):
    """The control: reads whatever is visible behind its position, without the barrier."""

    def __init__(self, store: EventStore, database: str) -> None:
        super().__init__(store)
        self._database = database
        self._connection = psycopg.connect(database, autocommit=True)

    def look(self) -> int:
        last = self.seen[-1][0] if self.seen else Cursor.BEGINNING
        rows = self._connection.execute(
            "SELECT transaction_no, sequence_no, event_id FROM hindsight.events"
            " WHERE (transaction_no, sequence_no) > (%s, %s) ORDER BY transaction_no, sequence_no",
            (last.transaction_no, last.sequence_no),
        ).fetchall()
        self.seen += [(Cursor(number, place), event_id) for number, place, event_id in rows]
        return len(rows)

    def missed(self) -> int:
        """How many events it has passed without seeing them."""
        seen = list(self.seen)
        if not seen:
            return 0
        last, _ = seen[-1]
        with psycopg.connect(self._database) as connection:
            row = connection.execute(
                "SELECT count(*) FROM hindsight.events WHERE (transaction_no, sequence_no) <= (%s, %s)",
                (last.transaction_no, last.sequence_no),
            ).fetchone()
        assert row is not None
        return int(row[0]) - len(seen)

    def follow(self, stop: Stop) -> None:
        with self._connection:
            super().follow(stop)


def wait_until(condition: Callable[[], object], *, what: str, deadline_s: float = 20.0) -> None:
    """Return once *condition* is true; fails if it is not in time."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {deadline_s:g} s: {what}"
        time.sleep(0.005)


@contextmanager
def locked_stream(database: str, stream_id: UUID) -> Iterator[psycopg.Connection[Any]]:
    """Somebody who keeps a stream's head locked, as an append in an open transaction does."""
    with psycopg.connect(database) as holder:
        holder.execute("SELECT hindsight.advance_heads_v1(ARRAY[%s], ARRAY[1::bigint])", (stream_id,))
        yield holder
        holder.rollback()


def waiting_for_locks(database: str) -> int:
    """How many sessions wait for a heavyweight lock."""
    with psycopg.connect(database) as connection:
        query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        row = connection.execute(query).fetchone()
    assert row is not None
    return int(row[0])


def main() -> None:
    conninfo, schema, name, streams, count, ways = sys.argv[1:]
    stop = Stop()

    def say(record: Record) -> None:
        # One call of the system's: an interrupt comes before it or after it, and threads do not mix their lines.
        os.write(1, json.dumps(record).encode() + b"\n")

    def work(store: EventStore, part: str) -> None:
        writer = Writer(
            store, say, name=f"{name}{part}", streams=streams_of(int(streams)), ways=ways.split(","), database=conninfo
        )
        nonlocal striking
        for _ in range(int(count)):
            if stop:
                break
            with suppress(KeyboardInterrupt):  # what became of that append nobody says: it is unknown
                try:
                    if threading.current_thread() is threading.main_thread():
                        striking = True
                    writer.step()
                finally:
                    if threading.current_thread() is threading.main_thread():
                        striking = False
        writer.close()

    def listen() -> None:
        sys.stdin.readline()
        stop.__exit__()

    def strike(*_: object) -> None:
        # Anywhere in an append, and nowhere else: the loop around it is to go on.
        nonlocal striking
        if striking:
            striking = False
            raise KeyboardInterrupt

    striking = False
    signal.signal(signal.SIGINT, strike)
    threading.Thread(target=listen, daemon=True).start()
    with EventStore(conninfo, schema=schema) as store:
        # One of them in the main thread, which is where an interrupt strikes.
        with Threads(lambda: work(store, "b")):
            work(store, "a")


if __name__ == "__main__":
    main()
