"""A rival: the Python package ``eventsourcing`` with its recorder for PostgreSQL, set up as it comes.

Its application recorder keeps a log of all events in order; it locks the table of events for that, and notifies, with
every append. Its pool has 5 connections, and 10 more when they are wanted. Whoever appends must know the stream's last
version; here callers know it without reading it, and no two share a stream unless they queue for it, so that nobody
meets a conflict. The payload is encoded by orjson, which is faster than the package's own transcoder.
"""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any
from uuid import UUID

import orjson
import psycopg
from psycopg.conninfo import conninfo_to_dict

from contenders import Contender
from rivals import Ledger, Turn, rival

SCHEMA = "eventsourcing"
IS_INSTALLED = find_spec("eventsourcing") is not None


def not_installed() -> Contender:
    """A contender without a number: what the report says where the package is missing."""

    def say_so() -> None:
        raise AssertionError("not installed: pip install 'hindsight-fast[bench]'")

    return Contender("eventsourcing", say_so, 0, verify=say_so)


class EventsourcingStore:
    """The package's table with *streams* of one event each, and callers who append *payload* to them.

    Raises ModuleNotFoundError where the package is not installed.
    """

    def __init__(self, conninfo: str, streams: list[UUID], payload: Any) -> None:
        # Here and not above: the benchmarks can be listed, and the others run, without it.
        from eventsourcing.persistence import PersistenceError, StoredEvent
        from eventsourcing.postgres import PostgresFactory
        from eventsourcing.utils import Environment

        self._failing_by = PersistenceError
        self._make_event = StoredEvent
        self._streams = streams
        self._payload = payload
        self._last_versions = dict.fromkeys(streams, 0)
        self._admin = psycopg.connect(conninfo, autocommit=True)
        self._admin.execute(f"CREATE SCHEMA {SCHEMA}")
        place = conninfo_to_dict(conninfo)
        variables = {f"POSTGRES_{name}": str(place[name.lower()]) for name in ("HOST", "PORT", "USER", "DBNAME")}
        self._factory = PostgresFactory(
            Environment(env={**variables, "POSTGRES_PASSWORD": "", "POSTGRES_SCHEMA": SCHEMA})
        )
        self._recorder = self._factory.application_recorder()
        with self._admin.cursor().copy(
            f"COPY {SCHEMA}.stored_events (originator_id, originator_version, topic, state) FROM STDIN"
        ) as copy:
            for stream_id in streams:
                copy.write_row((stream_id, 0, "begun", b"{}"))
        table, columns = "eventsourcing.stored_events", ("originator_id", "originator_version")
        self._ledger = Ledger(self._admin, table, columns, len(streams))

    def close(self) -> None:
        self._factory.close()
        self._admin.close()

    def one_caller(self, count: int) -> Contender:
        def run(turn: Turn) -> None:
            self._call(turn, self._streams, count, nullcontext())

        return rival("eventsourcing, one caller", count, run, self._ledger.check)

    def many_callers(self, callers: int, count: int, streams: list[UUID]) -> Contender:
        """*streams* are dealt out to the callers; if there are too few, all callers queue for all of them."""
        queue: AbstractContextManager[Any] = nullcontext() if len(streams) >= callers else threading.Lock()
        hands = [streams[n::callers] if len(streams) >= callers else streams for n in range(callers)]

        def run(turn: Turn) -> None:
            with ThreadPoolExecutor(callers) as threads:
                calls = [threads.submit(self._call, turn, hand, count // callers, queue) for hand in hands]
            for call in calls:
                call.result()

        return rival(f"eventsourcing, {callers} threads", count // callers * callers, run, self._ledger.check)

    def _call(self, turn: Turn, streams: list[UUID], count: int, queue: AbstractContextManager[Any]) -> None:
        for _ in range(count):
            stream_id = random.choice(streams)
            with turn.append(self._failing_by), queue:
                version = self._last_versions[stream_id] + 1
                state = orjson.dumps(self._payload)
                self._recorder.insert_events([self._make_event(stream_id, version, "order_placed", state)])
                self._last_versions[stream_id] = version
