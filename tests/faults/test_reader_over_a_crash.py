"""A reader that goes on after the server has crashed: its old bound must not count any more."""

from __future__ import annotations

import os
import signal
import time

import psycopg
import pytest

from conftest import TEST_SETTINGS, root_for_servers
from hindsight_fast import Cursor, EventStore, read_ahead, reading, stream_uuid
from hindsight_fast.embedded import EmbeddedServer
from hindsight_fast.installations import Installation

BEGIN_APPEND = "SELECT transaction_no FROM hindsight.begin_copy_v1(ARRAY[%s::uuid], ARRAY[1::bigint])"


def line(n: int) -> bytes:
    return b'{"stream":"s%d","type":"t","data":{"n":%d}}' % (n, n)


def wait_until_up(conninfo: str) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            psycopg.connect(conninfo).close()
            return
        except psycopg.OperationalError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.essential
@pytest.mark.parametrize(("crash", "ahead"), [("one backend", False), ("whole server", False), ("whole server", True)])
def test_numbers_given_out_again_after_a_crash_are_not_passed(
    installation: Installation, crash: str, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "WORTHWHILE", -1.0 if ahead else 1e9)
    # The sequence's last values stay in memory: no commit flushes them, and neither does the WAL writer.
    settings = {**TEST_SETTINGS, "wal_writer_delay": "10s"}
    with EmbeddedServer(installation=installation, settings=settings, temporary_root=root_for_servers()) as server:
        with EventStore(server.conninfo) as store:
            store.create_schema()
            store.import_events([line(0), line(1)], import_id="before")
            with psycopg.connect(server.conninfo, autocommit=True) as aborting:
                for _ in range(200):
                    aborting.execute("BEGIN")
                    aborting.execute("SELECT hindsight.draw_number_v1()")
                    aborting.execute("ROLLBACK")
            reader = reading.LogReader(store._statements, after=Cursor.BEGINNING, page_rows=1)
            pages = store._pages(reader)
            seen = [event.payload["n"] for event in next(pages)]
            assert reader.bound is not None
            old_bound = reader.bound.number
            assert old_bound > 200

            if crash == "one backend":
                witness = psycopg.connect(server.conninfo)
                victim = psycopg.connect(server.conninfo)
                os.kill(victim.info.backend_pid, signal.SIGKILL)
                victim.close()
                with pytest.raises(psycopg.OperationalError):
                    # The postmaster ends everybody: it cannot know what the victim did to the shared memory.
                    witness.execute("SELECT pg_sleep(30)")
            else:
                server.kill()
                server.start()
            wait_until_up(server.conninfo)

            with psycopg.connect(server.conninfo) as held:
                row = held.execute(BEGIN_APPEND, (stream_uuid("held"),)).fetchone()
                assert row is not None
                number = row[0]
                assert number < old_bound, "the crash gave no number back: this test shows nothing"
                held.execute(
                    "INSERT INTO hindsight.events"
                    " VALUES (%s, 0, gen_random_uuid(), %s, 0, NULL, now(), 'held', 0, '{\"n\":-1}')",
                    (number, stream_uuid("held")),
                )
                store.import_events([line(2)], import_id="after")
                seen += [event.payload["n"] for page in pages for event in page]
                assert seen == [0, 1]
                held.commit()
            seen += [event.payload["n"] for event in store.read(after=reader.position)]
            assert seen == [0, 1, -1, 2]
