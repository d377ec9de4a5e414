"""An importer that stands still while it holds readers up: they go on, it is named, and nothing is lost or doubled."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time

import psycopg
import pytest

from hindsight_fast import Cursor, EventStore, import_writer, reading, stream_uuid

COUNT = 20_000
HOLD_S = 1.0

# Stops itself (SIGSTOP) at a place in its second chunk: in the middle of the COPY, or between two statements. Before
# the latter it sets the bound of its idle time, so that no pause of the machine elsewhere ends it, and tells that it
# holds up readers: once it has stopped, the server may end it before anybody looks.
IMPORTER = """
import os, signal, sys
from hindsight_fast import Cursor, EventStore, import_writer

chunks = blocks = 0
class Stopping(import_writer.ChunkWriter):
    def _copy(self, rows, meanwhile):
        global chunks
        chunks += 1
        return super()._copy(rows, meanwhile)
    def _send(self, statement, rows, meanwhile):
        if chunks == 2 and sys.argv[3] == "between statements":
            holds = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
            print(*self._connection.execute(holds).fetchone(), flush=True)
            import_writer.MAX_HOLD_S = float(sys.argv[4])
            self._limit()
            os.kill(os.getpid(), signal.SIGSTOP)
        super()._send(statement, rows, meanwhile)
    def _work_until_writable(self, meanwhile):
        global blocks
        blocks += chunks == 2
        if blocks == 5 and sys.argv[3] == "in COPY":
            os.kill(os.getpid(), signal.SIGSTOP)
        super()._work_until_writable(meanwhile)

if sys.argv[3] != "never":
    import hindsight_fast.importer
    hindsight_fast.importer.ChunkWriter = Stopping
lines = (b'{"stream":"s%d","type":"t","data":{"n":%d}}' % (n % 7, n) for n in range(int(sys.argv[2])))
with EventStore(sys.argv[1]) as store:
    report = store.import_events(lines, import_id="stalled", chunk_size=5000)
print(report.events)
"""


def start_importer(database: str, place: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", IMPORTER, database, str(COUNT), place, str(HOLD_S)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until_stopped(process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while True:
        with open(f"/proc/{process.pid}/stat") as stat:
            if stat.read().rpartition(")")[2].split()[0] == "T":
                return
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def pid_of_holder(database: str) -> int:
    with psycopg.connect(database, autocommit=True) as admin:
        row = admin.execute(
            "SELECT a.pid FROM pg_locks AS l JOIN pg_stat_activity AS a USING (pid) WHERE l.locktype = 'advisory'"
            " AND a.application_name = 'hindsight_fast' AND a.datname = current_database()"
        ).fetchone()
    assert row is not None, "the importer stopped without holding up anybody: this test shows nothing"
    return int(row[0])


@pytest.mark.essential
@pytest.mark.parametrize("place", ["in COPY", "between statements"])
def test_readers_go_on_behind_an_importer_that_stands_still(
    database: str,
    store: EventStore,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    process = start_importer(database, place)
    try:
        wait_until_stopped(process)
        if place == "in COPY":
            holder = pid_of_holder(database)
        else:
            assert process.stdout is not None
            assert int(process.stdout.readline()) > 0
        other = b'{"stream":"other","type":"t","data":{"n":-1}}'
        store.import_events([other], import_id="other")
        if place == "in COPY":
            # Not yet: it might be slow, and only that.
            assert [event.payload["n"] for event in store.read(after=_last_of_first_chunk(store))] == []
        monkeypatch.setattr(reading, "MAX_HOLD_S", HOLD_S)
        monkeypatch.setattr("hindsight_fast.store_base.MAX_HOLD_S", HOLD_S)
        began = time.monotonic()
        with caplog.at_level(logging.WARNING, logger="hindsight_fast"):
            while not (seen := list(store.read(stream_id=stream_uuid("other")))):
                # Far behind HOLD_S, and before the bound that the importer would have without it, of half a minute.
                assert time.monotonic() - began < 20
                time.sleep(0.05)
        assert seen[0].payload == {"n": -1}
        if place == "in COPY":
            assert f"process {holder} (hindsight_fast)" in caplog.text
            assert "ended it" in caplog.text
        # Whoever was stopped wakes up, finds its connection gone and says so; nothing of its chunk is there.
        os.kill(process.pid, signal.SIGCONT)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 1, output
        assert "terminat" in errors or "closed" in errors or "lost" in errors, errors
    finally:
        process.kill()
        process.communicate()
    again = start_importer(database, "never")
    output, errors = again.communicate(timeout=60)
    assert output == f"{COUNT - 5_000}\n", errors
    assert sorted(event.payload["n"] for event in store.read()) == list(range(-1, COUNT))


def test_without_the_right_to_end_it_a_reader_says_who_it_is(
    database: str, store: EventStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    role = "onlooker"
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(f"DROP ROLE IF EXISTS {role}")
        admin.execute(f"CREATE ROLE {role} LOGIN IN ROLE pg_read_all_stats")
        admin.execute(f"GRANT USAGE ON SCHEMA hindsight TO {role}")
        admin.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA hindsight TO {role}")
        admin.execute(f"GRANT SELECT ON ALL SEQUENCES IN SCHEMA hindsight TO {role}")
    process = start_importer(database, "in COPY")
    try:
        wait_until_stopped(process)
        monkeypatch.setattr(reading, "MAX_HOLD_S", 0.0)
        with EventStore(psycopg.conninfo.make_conninfo(database, user=role)) as onlooker:
            with caplog.at_level(logging.WARNING, logger="hindsight_fast"):
                assert len(list(onlooker.read())) == 5_000
            assert "no right to end it" in caplog.text
    finally:
        process.kill()
        process.communicate()
        with psycopg.connect(database, autocommit=True) as admin:
            admin.execute(f"DROP OWNED BY {role}")
            admin.execute(f"DROP ROLE {role}")


def test_a_chunk_under_way_is_not_taken_for_a_stalled_one(store: EventStore, caplog: pytest.LogCaptureFixture) -> None:
    assert reading.MAX_HOLD_S == import_writer.MAX_HOLD_S >= 20 * 0.25
    lines = (b'{"stream":"s","type":"t","data":{"n":%d}}' % n for n in range(20_000))
    with caplog.at_level(logging.WARNING, logger="hindsight_fast"):
        store.import_events(lines, import_id="a", chunk_size=2_000, progress=lambda _: store.head())
    assert caplog.text == ""


def _last_of_first_chunk(store: EventStore) -> Cursor:
    *_, last = store.read(limit=5_000)
    return last.cursor
