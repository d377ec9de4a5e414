"""A rival: the statements that the seed, a store written in Haskell, sends for one append, replayed by pgbench.

The same steps in the same order, each a round trip of its own, on tables of the same shape: jsonb, seven indexes on
the events, deferred foreign keys to a table of transactions, and a trigger there that notifies. SERIALIZABLE, and what
fails to serialize is done again at once. Nothing of the seed's code is here; this was written from what it does.

Chosen in its favour: a client written in C, which draws no ids and encodes nothing, every statement prepared, and no
look at the expected version, which the seed does not take either if any version will do.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, LiteralString
from uuid import UUID

import orjson
import psycopg

from contenders import Contender
from rivals import Ledger, Turn, rival

# The seed's own number: more callers queue for them. With 64 of them the server refuses ("not enough elements in
# RWConflictPool"): SERIALIZABLE keeps an account of every pair of transactions that touch each other.
CONNECTIONS = 10
# The seed tries for ever.
MOST_ATTEMPTS = 1_000

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

# Stream number n, from 1, has the id md5(n). What a statement answers becomes a variable, as it does in the seed.
SCRIPT = """
\\set n random(1, {stream_count})
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT pg_advisory_xact_lock(2, hashtext(md5(:n::text)::uuid::text));
SELECT pg_current_xact_id()::text AS number \\gset
INSERT INTO seed.event_transactions VALUES (:number::text::xid8);
SELECT stream_version + 1 AS version FROM seed.stream_heads WHERE stream_id = md5(:n::text)::uuid \\gset
INSERT INTO seed.events VALUES (:number::text::xid8, 0, gen_random_uuid(), md5(:n::text)::uuid, NULL, now(),
    'order_placed', 0, '{payload}', :version::bigint) RETURNING event_id \\gset
INSERT INTO seed.stream_heads VALUES (md5(:n::text)::uuid, :number::text::xid8, 0, :event_id::uuid, :version::bigint)
    ON CONFLICT (stream_id) DO UPDATE SET latest_transaction_xid8 = excluded.latest_transaction_xid8,
        latest_seq_no = excluded.latest_seq_no, last_event_id = excluded.last_event_id,
        stream_version = excluded.stream_version;
COMMIT;
"""

# Heads that name another event than the last one of their stream, or none.
WRONG_HEADS: LiteralString = (
    "WITH last AS (SELECT DISTINCT ON (stream_id) stream_id, event_id AS last_event_id, stream_version FROM seed.events"
    " ORDER BY stream_id, stream_version DESC) SELECT count(*) FROM last FULL JOIN seed.stream_heads AS heads"
    " USING (stream_id, last_event_id, stream_version) WHERE last.stream_id IS NULL OR heads.stream_id IS NULL"
)


class SeedStore:
    """The seed's tables with *streams* of one event each, and callers who append *payload* to them by *pgbench*.

    Stream number n, from 1, must have the id md5(n). Scripts and logs are written to *folder*.
    """

    def __init__(self, conninfo: str, streams: list[UUID], payload: Any, pgbench: str, folder: Path) -> None:
        self._conninfo = conninfo
        self._payload = orjson.dumps(payload).decode()
        self._pgbench = pgbench
        self._folder = folder
        self._admin = psycopg.connect(conninfo, autocommit=True)
        with self._admin.transaction():
            self._admin.execute(TABLES)
            for statement in STREAMS:
                self._admin.execute(statement, (streams,) if "%s" in statement else None)
            self._admin.execute(INDEXES)
        self._ledger = Ledger(self._admin, "seed.events", ("stream_id", "stream_version"), len(streams))

    def close(self) -> None:
        self._admin.close()

    def append(self, callers: int, count: int, stream_count: int) -> Contender:
        """As many connections as *callers* get, which append to the first *stream_count* streams."""
        connections = min(callers, CONNECTIONS)
        script, log = self._folder / "seed.sql", self._folder / "seed_log"
        made = count // connections * connections

        def run(turn: Turn) -> None:
            script.write_text(SCRIPT.format(stream_count=stream_count, payload=self._payload))
            for old in self._folder.glob(f"{log.name}.*"):
                old.unlink()
            command = [self._pgbench, "-n", "-M", "prepared", "-c", str(connections), "-j", str(min(connections, 2))]
            command += ["-t", str(count // connections), "-f", str(script), "--max-tries", str(MOST_ATTEMPTS)]
            command += ["-l", "--log-prefix", str(log), self._conninfo]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                turn.failures.append(done.stderr.strip().rpartition("\n")[0] or "pgbench failed")
            for failed in re.findall(r"number of failed transactions: (\d+)", done.stdout):
                turn.failures += ["SerializationFailure"] * int(failed)
            turn.retries += sum(map(int, re.findall(r"total number of retries: (\d+)", done.stdout)))
            for part in self._folder.glob(f"{log.name}.*"):
                lines = (line.split() for line in part.read_text().splitlines())
                turn.latencies += [int(line[2]) / 1e6 for line in lines if line[2] != "failed"]

        return rival(f"the seed's statements by pgbench, {connections} connections", made, run, self._check)

    def note(self) -> str:
        """How often transactions had to be done again, in all turns so far."""
        return (
            f"The seed's transactions failed to serialize, and ran again, {self._ledger.retries:,} times in "
            f"{self._ledger.appends:,} appends."
        )

    def _check(self, turn: Turn, count: int) -> None:
        self._ledger.check(turn, count)
        row = self._admin.execute(WRONG_HEADS).fetchone()
        assert row == (0,), "heads differ from the last events"
