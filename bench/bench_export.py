"""The log as lines, against what only moves its bytes: the same pages undecoded, and psql's own text of the rows."""

from __future__ import annotations

import subprocess

import orjson
import psycopg
import pytest

from contenders import ROUNDS, Contender, compare
from datasets import EVENTS, IMPORT_ID
from hindsight_fast import EventStore

LINES_AS_SQL = """
    SELECT json_build_object('stream', e.stream_id, 'type', e.event_name, 'data', e.payload, 'version', e.event_version,
        'id', e.event_id, 'time', e.created_at) FROM hindsight.events AS e ORDER BY e.transaction_no, e.sequence_no
"""


@pytest.fixture
def store(database, demo_data):
    with EventStore(database) as store:
        store.create_schema()
        store.import_events(demo_data(EVENTS).path, import_id=IMPORT_ID)
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute("VACUUM (FREEZE, ANALYZE)")
            connection.execute("CHECKPOINT")
        yield store


def bench_export(benchmark, store, server, demo_data, folder):
    data = demo_data(EVENTS)
    ours, theirs = folder / "ours.ndjson", folder / "theirs.ndjson"

    def by_psql():
        one_line = " ".join(LINES_AS_SQL.split())
        command = [server.bin("psql"), "-X", "-q", "-d", store.conninfo, "-c", f"\\copy ({one_line}) to '{theirs}'"]
        subprocess.run(command, check=True, capture_output=True)

    def verify_ours():
        assert store.export_events(ours, overwrite=True) == EVENTS, "another number of events"
        with ours.open("rb") as lines:
            for line, row in zip(lines, data.rows(), strict=True):
                seen = orjson.loads(line)
                assert (seen["stream"], seen["type"], seen["id"]) == (
                    str(row.stream_id),
                    row.event_name,
                    str(row.event_id),
                )
                assert b'"data":' + row.payload in line, "other data"

    def check_ours(count):
        assert count == EVENTS, f"{count} events instead of {EVENTS}"

    def check_theirs(_):
        with theirs.open("rb") as lines:
            # COPY's text form escapes each backslash once more.
            ids = [orjson.loads(line.replace(b"\\\\", b"\\"))["id"] for line in lines]
        assert ids == [str(row.event_id) for row in data.rows()], "other lines"

    compare(
        benchmark,
        Contender("export_events to a file", lambda: store.export_events(ours, overwrite=True), EVENTS,
                  check_ours, verify_ours),
        Contender("psql \\copy of json_build_object", by_psql, EVENTS, check_theirs),
        rounds=ROUNDS,
        unit="events",
        checked="every turn: the count; once before: stream, type, id and data bytes of every line against the oracle "
        "(psql, every turn: the ids, in order)",
    )  # fmt: skip
    for path in (ours, theirs):
        path.unlink(missing_ok=True)
