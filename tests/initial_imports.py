"""What the tests of mode="initial" share: lines, imports in the background, and what the catalog says of the schema."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from hindsight_fast import EventStore, ImportProgress

DEADLINE_S = 30.0

Connection = psycopg.Connection[tuple[Any, ...]]


def line(n: int, stream: str = "s", **fields: Any) -> bytes:
    return json.dumps({"stream": stream, "type": "t", "data": {"n": n}, **fields}).encode()


def lines(count: int, streams: int = 7) -> list[bytes]:
    return [line(n, f"s{n % streams}") for n in range(count)]


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.01)


def state_of(connection: Connection, schema: str = "hindsight") -> str:
    row = connection.execute(f"SELECT state FROM {schema}.store_meta").fetchone()
    assert row is not None
    return str(row[0])


def tables_of(connection: Connection, schema: str = "hindsight") -> set[str]:
    rows = connection.execute("SELECT relname FROM pg_class WHERE relnamespace = %s::regnamespace", (schema,))
    return {str(name) for (name,) in rows}


class Paused:
    """A source whose lines come when they are let through: ``Paused(first, then)`` stops between the two."""

    def __init__(self, first: list[bytes], then: list[bytes]) -> None:
        self._first, self._then = first, then
        self.gate = threading.Event()

    def __iter__(self) -> Iterator[bytes]:
        yield from self._first
        # Full blocks only leave the source's reader.
        yield b" " * 70_000
        assert self.gate.wait(DEADLINE_S)
        yield from self._then


class Background:
    """An import in a thread of its own; ``result()`` gives its report or raises what it raised."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run = run
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        try:
            self._result = self._run()
        except BaseException as error:  # noqa: BLE001 - raised in the test's own thread
            self._error = error

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> Any:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error
        return self._result


CATALOG = """
    SELECT 'column', t.relname::text, a.attname::text, jsonb_build_array(
        a.attnum, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attstorage, a.attcompression,
        a.attcollation::regcollation, pg_get_expr(d.adbin, d.adrelid), a.attacl, col_description(a.attrelid, a.attnum))
    FROM pg_attribute AS a JOIN pg_class AS t ON t.oid = a.attrelid
    LEFT JOIN pg_attrdef AS d ON d.adrelid = t.oid AND d.adnum = a.attnum
    WHERE a.attnum > 0 AND t.relnamespace = 'hindsight'::regnamespace
    UNION ALL
    SELECT 'relation', c.relname, c.relkind::text, jsonb_build_array(
        c.reloptions, c.relhasindex, c.relpersistence, c.relowner::regrole,
        coalesce(c.relacl, acldefault('r', c.relowner))::text, obj_description(c.oid),
        c.relreplident, c.relam, c.reltablespace)
    FROM pg_class AS c WHERE c.relnamespace = 'hindsight'::regnamespace
    UNION ALL
    SELECT 'constraint', k.conrelid::regclass::text, k.conname, jsonb_build_array(
        pg_get_constraintdef(k.oid), k.convalidated, k.contype, k.conindid::regclass, k.conislocal, k.coninhcount)
    FROM pg_constraint AS k WHERE k.connamespace = 'hindsight'::regnamespace
    UNION ALL
    SELECT 'index', x.indrelid::regclass::text, c.relname, jsonb_build_array(
        pg_get_indexdef(x.indexrelid), x.indisvalid, x.indisready, x.indisprimary, x.indisunique, x.indisclustered)
    FROM pg_index AS x JOIN pg_class AS c ON c.oid = x.indexrelid WHERE c.relnamespace = 'hindsight'::regnamespace
    UNION ALL
    SELECT 'toast', c.relname, '', to_jsonb(t.reloptions)
    FROM pg_class AS c JOIN pg_class AS t ON t.oid = c.reltoastrelid WHERE c.relnamespace = 'hindsight'::regnamespace
    UNION ALL
    SELECT 'type', t.typname, '', to_jsonb(t.typtype)
    FROM pg_type AS t WHERE t.typnamespace = 'hindsight'::regnamespace
    ORDER BY 1, 2, 3
"""


def catalog(connection: Connection) -> list[tuple[Any, ...]]:
    return connection.execute(CATALOG).fetchall()


def stop_at(store: EventStore, phase: str) -> None:
    """Import thirty events as far as a phase, and stop there."""

    def stop(progress: ImportProgress) -> None:
        if progress.phase == phase:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        store.import_events(lines(30), import_id="a", mode="initial", chunk_size=10, progress=stop)
