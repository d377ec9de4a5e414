"""Kill the importer, or the server under it, at random points: the result equals the undisturbed one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from conftest import TEST_SETTINGS, root_for_servers
from hindsight_fast import EventStore, stream_uuid
from hindsight_fast.embedded import EmbeddedServer
from hindsight_fast.installations import Installation

# Says when it has begun, and each chunk as it commits.
IMPORT_PROGRAM = """
import sys
from hindsight_fast import EventStore
with EventStore(sys.argv[1], schema=sys.argv[2]) as store:
    print("begun", flush=True)
    store.import_events(sys.argv[3], import_id="a", chunk_size=200, progress=lambda p: print(p.events, flush=True))
"""

EVENT_COUNT = 20_000
KILLS = 5


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20,000 events in 300 streams, some lines blank, some events with an id and a time of their own."""
    chance = random.Random(20_000)
    path = tmp_path_factory.mktemp("source") / "events.ndjson"
    with path.open("wb") as file:
        for n in range(EVENT_COUNT):
            # Every event has a time: what the server would fill in differs from run to run.
            fields = {
                "stream": f"s{int(chance.paretovariate(0.5)) % 300}",
                "type": f"t{n % 5}",
                "data": {"n": n, "ü": "✓" * (n % 7)},
            }
            fields["time"] = f"2024-01-01T00:{n // 60 % 60:02}:{n % 60:02}.{n:06}Z"
            if n % 3 == 0:
                fields["correlation_id"] = f"00000000-0000-4000-8000-{n // 30:012}"
            file.write(json.dumps(fields, ensure_ascii=False).encode() + (b"\n\n" if n % 97 == 0 else b"\n"))
    return path


def start_import(database: str, schema: str, source: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", IMPORT_PROGRAM, database, schema, str(source)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(database: str, schema: str) -> list[tuple[object, ...]]:
    """Every event in its order, all but the cursor: numbers of lost chunks are not used again."""
    with EventStore(database, schema=schema) as store:
        events = list(store.read())
        assert [event.cursor for event in events] == sorted(event.cursor for event in events)
        for name in {f"s{n}" for n in range(300)}:
            history = list(store.read_stream(stream_uuid(name)))
            assert [event.stream_version for event in history] == list(range(len(history)))
            assert store.stream_version(stream_uuid(name)) == (len(history) - 1 if history else None)
    with psycopg.connect(database) as connection:
        stored = connection.execute(f"SELECT event_count, finished FROM {schema}.imports").fetchone()
    assert stored == (EVENT_COUNT, True)
    return [
        (
            e.event_id,
            e.stream_id,
            e.stream_version,
            e.correlation_id,
            e.created_at,
            e.name,
            e.version,
            e.data,
            e.metadata,
        )
        for e in events
    ]


def undisturbed(database: str, source: Path) -> list[tuple[object, ...]]:
    with EventStore(database, schema="undisturbed") as store:
        store.create_schema()
        assert store.import_events(source, import_id="a", chunk_size=1000).events == EVENT_COUNT
    found = contents(database, "undisturbed")
    assert len(found) == EVENT_COUNT
    return found


def seeds() -> Iterator[int]:
    if os.environ.get("HINDSIGHT_SOAK"):
        yield from range(int(os.environ["HINDSIGHT_SOAK"]) * 3)
    else:
        yield random.SystemRandom().randrange(10**6)


def wait_for_chunk(process: subprocess.Popen[str], chunk: int) -> int:
    """Read what the importer says until it has told *chunk* chunks or ended; returns how many it told."""
    assert process.stdout is not None
    told = -1
    for text in process.stdout:
        told += 1
        if told >= chunk:
            break
        assert text
    return told


@pytest.mark.essential
def test_killing_the_importer_anywhere_changes_nothing(database: str, source: Path) -> None:
    expected = undisturbed(database, source)
    for seed in seeds():
        chance = random.Random(seed)
        schema = f"killed_{seed}"
        with EventStore(database, schema=schema) as store:
            store.create_schema()
        points = []
        while len(points) < KILLS:
            process = start_import(database, schema, source)
            chunk = chance.randrange(3)
            pause_s = chance.random() * 0.03
            told = wait_for_chunk(process, chunk)
            time.sleep(pause_s)  # somewhere inside the next chunk: locking, copying, committing
            process.kill()
            process.communicate()
            assert process.returncode in (-signal.SIGKILL, 0), f"seed {seed}"
            points.append((told, round(pause_s, 4)))
            assert process.returncode == -signal.SIGKILL, (
                f"seed {seed}: the import ended before kill {len(points)}: {points}"
            )
        process = start_import(database, schema, source)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert contents(database, schema) == expected, f"seed {seed}: killed at {points}"


SHARDED_PROGRAM = """
import sys
from hindsight_fast import EventStore
with EventStore(sys.argv[1], schema=sys.argv[2]) as store:
    print("begun", flush=True)
    store.import_events(
        sys.argv[3], import_id="a", jobs=3, on_error=sys.argv[4], chunk_size=100,
        progress=lambda p: print(p.events, flush=True),
    )
"""


@pytest.mark.essential
def test_killing_shards_anywhere_sets_every_bad_line_aside_once(database: str, source: Path, tmp_path: Path) -> None:
    """With bad lines of three kinds: no JSON, a shard's own, and what only the server refuses."""
    bad_source, bad, good = tmp_path / "events.ndjson", [], 0
    with source.open("rb") as lines, bad_source.open("wb") as file:
        for n, text in enumerate(lines):
            if n % 53 == 0:
                bad.append(
                    [
                        b"line %d is bad\n" % n,
                        b'{"stream":"s%d","type":"t","data":[%d]}\n' % (n % 300, n),
                        b'{"stream":"s%d","type":"forbidden","data":{"n":%d}}\n' % (n % 300, n),
                    ][n // 53 % 3]
                )
                file.write(bad[-1])
            else:
                good += bool(text.strip())
                file.write(text)

    def by_stream(schema: str) -> dict[object, list[object]]:
        with EventStore(database, schema=schema) as store:
            found: dict[object, list[object]] = {}
            for event in store.read():
                history = found.setdefault(event.stream_id, [])
                assert event.stream_version == len(history)
                history.append((event.event_id, event.name, event.data, event.created_at, event.correlation_id))
        return found

    for schema in ("undisturbed", "killed"):
        with EventStore(database, schema=schema) as store, store.pool.connection() as connection:
            store.create_schema()
            connection.execute(f"ALTER TABLE {schema}.events ADD CHECK (event_name <> 'forbidden')")
    with EventStore(database, schema="undisturbed") as store:
        report = store.import_events(bad_source, import_id="a", on_error=tmp_path / "undisturbed")
        assert (report.events, report.bad_lines) == (good, len(bad))
    expected = by_stream("undisturbed")

    for seed in seeds():
        chance, kills = random.Random(seed), 0
        program = [sys.executable, "-c", SHARDED_PROGRAM, database, "killed", str(bad_source), str(tmp_path / "killed")]
        while True:
            process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            if kills < KILLS:
                wait_for_chunk(process, chance.randrange(8))
                time.sleep(chance.random() * 0.03)  # anywhere: between the two files, in a COPY, in a commit
                process.kill()
                kills += 1
            _, errors = process.communicate(timeout=120)
            if process.returncode != -signal.SIGKILL:
                assert process.returncode == 0, f"seed {seed}: {errors}"
                break
        assert by_stream("killed") == expected, f"seed {seed}"
        aside = [text for text in (tmp_path / "killed").read_bytes().splitlines(keepends=True) if text.strip()]
        assert sorted(aside) == sorted(bad), f"seed {seed}"
        reasons = (tmp_path / "killed.reasons").read_bytes().splitlines()
        assert sum(bool(reason.strip()) for reason in reasons) == len(bad), f"seed {seed}"
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute("DELETE FROM killed.imports")
            connection.execute("DELETE FROM killed.events")
            connection.execute("DELETE FROM killed.stream_heads")
        for path in (tmp_path / "killed", tmp_path / "killed.reasons"):
            path.unlink()


def test_the_check_sees_a_doubled_or_missing_chunk(database: str, source: Path) -> None:
    """The comparison above is worth what it notices."""
    expected = undisturbed(database, source)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(
            "UPDATE undisturbed.events SET event_id = gen_random_uuid() WHERE event_id = %s", (expected[700][0],)
        )
    assert contents(database, "undisturbed") != expected
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(
            "DELETE FROM undisturbed.events WHERE transaction_no = (SELECT max(transaction_no) FROM undisturbed.events)"
        )
    with pytest.raises(AssertionError):
        contents(database, "undisturbed")


def test_killing_the_server_under_an_import_loses_and_doubles_nothing(installation: Installation, source: Path) -> None:
    with EmbeddedServer(installation=installation, settings=TEST_SETTINGS, temporary_root=root_for_servers()) as server:
        expected = undisturbed(server.conninfo, source)
        with EventStore(server.conninfo, schema="killed") as store:
            store.create_schema()
        chance = random.Random()
        for _ in range(3):
            process = start_import(server.conninfo, "killed", source)
            wait_for_chunk(process, chance.randrange(1, 5))
            time.sleep(chance.random() * 0.03)
            server.kill()
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 1, "the import did not notice"
            assert "OperationalError" in errors or "AdminShutdown" in errors or "CrashShutdown" in errors, errors
            server.start()
        process = start_import(server.conninfo, "killed", source)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert contents(server.conninfo, "killed") == expected
