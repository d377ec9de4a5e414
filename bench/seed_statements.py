"""A rival: the statements that the seed, a store written in Haskell, sends for one append, sent by psycopg.

The same steps in the same order, each a round trip of its own, on tables of the same shape: jsonb, seven indexes on
the events, deferred foreign keys to a table of transactions, and a trigger there that notifies. SERIALIZABLE, and what
fails to serialize is done again at once. Nothing of the seed's code is here; this was written from what it does.

Chosen in its favour: a binary protocol, every statement prepared, connections that are open already, and no look at the
expected version, which the seed does not take either if any version will do.

Against it: this is Python. With many callers in asyncio most of the server's processes wait for the client at any
moment, and psycopg forgets its prepared statements at every rollback. So the figures of many callers say what these
statements cost a Python program, not what the server could take of them.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Generator
from datetime import UTC, datetime
from typing import Any, LiteralString
from uuid import UUID, uuid4

import orjson
import psycopg
from psycopg import IsolationLevel
from psycopg.errors import SerializationFailure
from psycopg.types.json import Jsonb
from psycopg_pool import AsyncConnectionPool

from contenders import Contender
from rivals import Ledger, Turn, rival

# The seed's own number. 16 were slower: 237 instead of 349 appends a second for 16 callers, 209 and not 407 for 64.
CONNECTIONS = 10
# The seed tries for ever. One stream under 64 callers takes two attempts an append.
MOST_ATTEMPTS = 1_000

Step = tuple[LiteralString, tuple[Any, ...]]

TABLES: LiteralString = """
CREATE SCHEMA seed;
CREATE TABLE seed.event_transactions (transaction_xid8 xid8 PRIMARY KEY);
CREATE TABLE seed.events (
    transaction_xid8 xid8 NOT NULL, seq_no integer NOT NULL, event_id uuid PRIMARY KEY, stream_id uuid NOT NULL,
    correlation_id uuid, created_at timestamptz NOT NULL, event_name text NOT NULL, event_version integer NOT NULL,
    payload jsonb NOT NULL, stream_version bigint NOT NULL
);
CREATE TABLE seed.stream_heads (
    stream_id uuid PRIMARY KEY, latest_transaction_xid8 xid8 NOT NULL, latest_seq_no integer NOT NULL,
    last_event_id uuid NOT NULL, stream_version bigint NOT NULL
);
"""

# One event in each stream, all of one transaction.
STREAMS: tuple[LiteralString, ...] = (
    "INSERT INTO seed.event_transactions VALUES (pg_current_xact_id())",
    "INSERT INTO seed.events SELECT pg_current_xact_id(), ordinality - 1, gen_random_uuid(), stream_id, NULL, now(),"
    " 'begun', 0, '{}', 0 FROM unnest(%s::uuid[]) WITH ORDINALITY AS streams (stream_id, ordinality)",
    "INSERT INTO seed.stream_heads SELECT stream_id, transaction_xid8, seq_no, event_id, stream_version"
    " FROM seed.events",
)

# After the streams: 200,000 deferred checks, and as many entries in each index one by one, would take seconds.
INDEXES: LiteralString = """
CREATE INDEX ON seed.events (stream_id, transaction_xid8, seq_no);
CREATE INDEX ON seed.events (stream_id, stream_version);
CREATE INDEX ON seed.events (correlation_id) WHERE correlation_id IS NOT NULL;
CREATE INDEX ON seed.events (event_name, event_version);
CREATE INDEX ON seed.events (transaction_xid8, seq_no);
CREATE INDEX ON seed.events (transaction_xid8, seq_no, event_name);
ALTER TABLE seed.events ADD FOREIGN KEY (transaction_xid8)
    REFERENCES seed.event_transactions DEFERRABLE INITIALLY DEFERRED;
ALTER TABLE seed.stream_heads ADD FOREIGN KEY (latest_transaction_xid8)
    REFERENCES seed.event_transactions DEFERRABLE INITIALLY DEFERRED;
CREATE FUNCTION seed.tell() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('seed', NEW.transaction_xid8::text);
    RETURN NULL;
END
$$;
CREATE TRIGGER tell AFTER INSERT ON seed.event_transactions FOR EACH ROW EXECUTE FUNCTION seed.tell();
"""

LOCK_STREAM: LiteralString = "SELECT pg_advisory_xact_lock(2, hashtext(%b::uuid::text))"
TRANSACTION: LiteralString = "SELECT pg_current_xact_id()::text::bigint"
INSERT_TRANSACTION: LiteralString = "INSERT INTO seed.event_transactions VALUES (%b::bigint::text::xid8)"
STREAM_VERSION: LiteralString = "SELECT stream_version FROM seed.stream_heads WHERE stream_id = %b"
INSERT_EVENT: LiteralString = (
    "INSERT INTO seed.events VALUES (%b::bigint::text::xid8, 0, %b, %b, NULL, %b, %b, 0, %b, %b::bigint)"
)
SET_HEAD: LiteralString = (
    "INSERT INTO seed.stream_heads VALUES (%b, %b::bigint::text::xid8, 0, %b, %b::bigint) ON CONFLICT (stream_id)"
    " DO UPDATE SET latest_transaction_xid8 = excluded.latest_transaction_xid8, latest_seq_no = excluded.latest_seq_no,"
    " last_event_id = excluded.last_event_id, stream_version = excluded.stream_version"
)

# Heads that name another event than the last one of their stream, or none.
WRONG_HEADS: LiteralString = (
    "WITH last AS (SELECT DISTINCT ON (stream_id) stream_id, event_id AS last_event_id, stream_version FROM seed.events"
    " ORDER BY stream_id, stream_version DESC) SELECT count(*) FROM last FULL JOIN seed.stream_heads AS heads"
    " USING (stream_id, last_event_id, stream_version) WHERE last.stream_id IS NULL OR heads.stream_id IS NULL"
)


def steps_of_append(stream_id: UUID, payload: Any) -> Generator[Step, tuple[Any, ...], None]:
    """Give the statements of one append between BEGIN and COMMIT; takes the row that each has answered with."""
    event_id, now = uuid4(), datetime.now(UTC)
    yield LOCK_STREAM, (stream_id,)
    (number,) = yield TRANSACTION, ()
    yield INSERT_TRANSACTION, (number,)
    (last_version,) = yield STREAM_VERSION, (stream_id,)
    version = last_version + 1
    body = Jsonb(payload, orjson.dumps)
    yield INSERT_EVENT, (number, event_id, stream_id, now, "order_placed", body, version)
    yield SET_HEAD, (stream_id, number, event_id, version)


class SeedStore:
    """The seed's tables with *streams* of one event each, and callers who append *payload* to them."""

    def __init__(self, conninfo: str, streams: list[UUID], payload: Any) -> None:
        self._streams = streams
        self._payload = payload
        self._admin = psycopg.connect(conninfo, autocommit=True)
        with self._admin.transaction():
            self._admin.execute(TABLES)
            for statement in STREAMS:
                self._admin.execute(statement, (streams,) if "%s" in statement else None)
            self._admin.execute(INDEXES)
        self._ledger = Ledger(self._admin, "seed.events", ("stream_id", "stream_version"), len(streams))
        self._connection = psycopg.connect(conninfo, prepare_threshold=0)
        self._connection.isolation_level = IsolationLevel.SERIALIZABLE
        # One loop for all turns, so that the connections stay open between them.
        self._runner = asyncio.Runner()
        self._pool = self._runner.run(_open_pool(conninfo))

    def close(self) -> None:
        self._runner.run(self._pool.close())
        self._runner.close()
        self._connection.close()
        self._admin.close()

    def one_caller(self, count: int) -> Contender:
        def run(turn: Turn) -> None:
            for _ in range(count):
                with turn.append(psycopg.Error):
                    turn.retries += self._append(random.choice(self._streams))

        return rival("the seed's statements by psycopg, one caller", count, run, self._check)

    def many_callers(self, callers: int, count: int, streams: list[UUID]) -> Contender:
        async def call(turn: Turn) -> None:
            for _ in range(count // callers):
                with turn.append(psycopg.Error):
                    turn.retries += await self._append_from_pool(random.choice(streams))

        async def run(turn: Turn) -> None:
            await asyncio.gather(*[call(turn) for _ in range(callers)])

        name = f"the seed's statements by psycopg, {callers} callers in asyncio, {CONNECTIONS} connections"
        return rival(name, count // callers * callers, lambda turn: self._runner.run(run(turn)), self._check)

    def note(self) -> str:
        """How often transactions had to be done again, in all turns so far."""
        appends, retries = self._ledger.appends, self._ledger.retries
        return (
            f"The seed's transactions failed to serialize, and ran again, {retries:,} times in {appends:,} appends. Of "
            "many callers its server's processes mostly wait for the client, which is Python: these figures are not "
            "what the server could take."
        )

    def _check(self, turn: Turn, count: int) -> None:
        self._ledger.check(turn, count)
        row = self._admin.execute(WRONG_HEADS).fetchone()
        assert row == (0,), "heads differ from the last events"

    def _append(self, stream_id: UUID) -> int:
        """Return how many attempts failed before the one that was committed."""
        for failed_attempts in range(MOST_ATTEMPTS):
            steps, row = steps_of_append(stream_id, self._payload), None
            try:
                with self._connection.transaction(), self._connection.cursor(binary=True) as cursor:
                    while step := _next(steps, row):
                        cursor.execute(*step)
                        row = cursor.fetchone() if cursor.description else None
            except SerializationFailure:
                continue
            return failed_attempts
        raise SerializationFailure(f"{MOST_ATTEMPTS} attempts failed")

    async def _append_from_pool(self, stream_id: UUID) -> int:
        async with self._pool.connection() as connection:
            for failed_attempts in range(MOST_ATTEMPTS):
                steps, row = steps_of_append(stream_id, self._payload), None
                try:
                    async with connection.transaction(), connection.cursor(binary=True) as cursor:
                        while step := _next(steps, row):
                            await cursor.execute(*step)
                            row = await cursor.fetchone() if cursor.description else None
                except SerializationFailure:
                    continue
                return failed_attempts
        raise SerializationFailure(f"{MOST_ATTEMPTS} attempts failed")


def _next(steps: Generator[Step, Any, None], row: tuple[Any, ...] | None) -> Step | None:
    try:
        return steps.send(row)
    except StopIteration:
        return None


async def _open_pool(conninfo: str) -> AsyncConnectionPool:
    async def configure(connection: psycopg.AsyncConnection) -> None:
        await connection.set_isolation_level(IsolationLevel.SERIALIZABLE)

    pool = AsyncConnectionPool(
        conninfo, min_size=CONNECTIONS, open=False, configure=configure, kwargs={"prepare_threshold": 0}
    )
    await pool.open(wait=True)
    return pool
