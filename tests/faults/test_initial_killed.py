"""Kill an initial import, or the server under it, at every stage: going on ends in the undisturbed result, giving up in
an empty store that works."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from conftest import TEST_SETTINGS, root_for_servers
from hindsight_fast import EventStore, SchemaError
from hindsight_fast.embedded import EmbeddedServer
from hindsight_fast.installations import Installation
from initial_imports import Connection, wait_until

# Tells each phase and chunk, and waits for a word before it goes on to the next phase.
IMPORT_PROGRAM = """
import sys
from hindsight_fast import EventStore
phases = []
def tell(progress):
    if progress.phase == "lines":
        print("chunk", progress.events, flush=True)
    elif progress.phase not in phases:
        phases.append(progress.phase)
        print(progress.phase, flush=True)
        sys.stdin.readline()
with EventStore(sys.argv[1]) as store:
    print("begun", flush=True)
    store.import_events(sys.argv[2], import_id="a", mode="initial", chunk_size=200, progress=tell)
print("done", flush=True)
"""

EVENT_COUNT = 3_000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3,000 events in 50 streams, some lines blank, all with a time."""
    path = tmp_path_factory.mktemp("source") / "events.ndjson"
    with path.open("wb") as file:
        for n in range(EVENT_COUNT):
            line = b'{"stream":"s%d","type":"t","data":{"n":%d},"time":"2024-01-01T00:00:00Z"}\n' % (n * n % 50, n)
            file.write(line + (b"\n" if n % 97 == 0 else b""))
    return path


class Importer:
    """The import as a process of its own."""

    def __init__(self, database: str, source: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", IMPORT_PROGRAM, database, str(source)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._word = ""
        self.may_end_first = False  # where it is killed at its very end, that may come late

    def run_until(self, wanted: str) -> None:
        """Let it go on, from phase to phase, until it says *wanted*."""
        assert self.process.stdout is not None
        while not self._word.startswith(wanted):
            if self._word in ("indexes", "switch"):
                self.go_on()
            self._word = self.process.stdout.readline().strip()
            assert self._word, self.process.communicate()[1]

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self._word = ""

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()
        assert self.process.returncode == -signal.SIGKILL or (self.may_end_first and self.process.returncode == 0)


def somebody_waits(connection: Connection, what: str) -> bool:
    """Whether a backend waits for a lock that fits the condition *what* on pg_locks."""
    return connection.execute(f"SELECT 1 FROM pg_locks AS l WHERE NOT l.granted AND {what}").fetchone() is not None


INDEXES = ("events_pkey", "events_stream_key", "events_event_id_key", "events_correlation_idx", "stream_heads_pkey")
STAGES = (
    "start",
    "first chunk",
    "chunk",
    "all loaded",
    *(f"build {index}" for index in INDEXES),
    "heads",
    "built",
    "snapshots",
    "lock of the log",
    "sequence",
    "switch",
)


@contextmanager
def held_at(stage: str, database: str, source: Path) -> Iterator[Importer]:
    """An import that has come to *stage*, and stands there: a lock of ours is in its way."""
    with psycopg.connect(database) as holder, psycopg.connect(database, autocommit=True) as looker:
        if stage == "start":
            holder.execute("LOCK TABLE hindsight.append_gate IN ROW EXCLUSIVE MODE")
        importer = Importer(database, source)
        try:
            if stage == "start":
                wait_until(lambda: somebody_waits(looker, "l.relation = 'hindsight.append_gate'::regclass"))
            elif stage == "first chunk":
                # Its checkpoint is moved first.
                wait_until(lambda: looker.execute("SELECT 1 FROM hindsight.initial_import").fetchone() is not None)
            elif stage == "chunk":
                importer.run_until("chunk 1000")
            elif stage == "all loaded":
                importer.run_until("indexes")
            elif stage.startswith("build ") or stage == "heads":
                importer.run_until("indexes")
                key = (
                    "'hindsight_fast: fill heads ' || 'hindsight.stream_heads'::regclass::oid"
                    if stage == "heads"
                    else f"'hindsight_fast: build index ' || 'hindsight.{stage[6:]}'::regclass::oid"
                )
                holder.execute(f"SELECT pg_advisory_xact_lock(hashtextextended({key}, 0))")
                importer.go_on()
                wait_until(lambda: somebody_waits(looker, "l.locktype = 'advisory'"))
            elif stage == "built":
                importer.run_until("switch")
            elif stage == "snapshots":
                importer.run_until("switch")
                holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                holder.execute("SELECT 1")
                importer.go_on()
                wait_until(
                    lambda: looker.execute(
                        "SELECT 1 FROM pg_stat_activity WHERE query LIKE '%virtualxid%' AND pid <> pg_backend_pid()"
                        " AND datname = current_database() AND state = 'idle'"
                    ).fetchone()
                )
            elif stage == "lock of the log":
                importer.run_until("switch")
                holder.execute("SELECT count(*) FROM hindsight.events")
                importer.go_on()
                wait_until(lambda: somebody_waits(looker, "l.relation = 'hindsight.events'::regclass"))
            elif stage == "sequence":
                importer.run_until("switch")
                holder.execute("SELECT nextval('hindsight.transaction_no')")
                importer.go_on()
                wait_until(lambda: somebody_waits(looker, "l.relation = 'hindsight.transaction_no'::regclass"))
            else:
                assert stage == "switch"
                importer.run_until("switch")
                importer.go_on()
                importer.may_end_first = True
                time.sleep(random.random() * 0.05)  # anywhere around the commit, or behind the end
            yield importer
        finally:
            importer.process.kill()
            importer.process.communicate()


def contents(database: str) -> list[tuple[Any, ...]]:
    """Every event in its order, all but the cursor; then each stream's version."""
    with EventStore(database) as store:
        events = list(store.read())
        assert store.head() == (events[-1].cursor if events else None)
        # Once a stream: asked for each event this took longer than the import.
        versions = [(stream_id, store.stream_version(stream_id)) for stream_id in sorted({e.stream_id for e in events})]
    return [*((e.event_id, e.stream_id, e.stream_version, e.created_at, e.name, e.data) for e in events), *versions]


@pytest.fixture(scope="module")
def undisturbed(server: EmbeddedServer, source: Path) -> list[tuple[Any, ...]]:
    """What a store holds into which the source has gone as appends, which nobody disturbed."""
    with psycopg.connect(server.conninfo, autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS undisturbed")
        connection.execute("CREATE DATABASE undisturbed TEMPLATE template0")
    database = server.conninfo_for("undisturbed")
    make_store(database)
    with EventStore(database) as store:
        store.import_events(source, import_id="a")
    return contents(database)


def check_that_going_on_completes_it(database: str, source: Path, undisturbed: list[tuple[Any, ...]]) -> None:
    with EventStore(database) as store:
        report = store.import_events(source, import_id="a", mode="initial")
        assert report.events + report.skipped_events == EVENT_COUNT
    assert contents(database) == undisturbed
    check_that_it_is_tidy_and_works(database)


def event_count(database: str) -> int:
    with EventStore(database) as store:
        return len(list(store.read()))


def check_that_it_is_tidy_and_works(database: str) -> None:
    with EventStore(database) as store:
        before = event_count(database)
        with psycopg.connect(database, autocommit=True) as connection:
            assert connection.execute("SELECT state FROM hindsight.store_meta").fetchone() == ("open",)
            assert connection.execute("SELECT count(*) FROM hindsight.initial_import").fetchone() == (0,)
            left = connection.execute(
                "SELECT relname FROM pg_class WHERE relnamespace = 'hindsight'::regnamespace AND relname ~ 'import_'"
                " AND relname NOT LIKE 'initial_import%'"
            )
            assert left.fetchall() == []
        store.import_events([b'{"stream":"s1","type":"t","data":{}}'], import_id="afterwards")
        assert event_count(database) == before + 1


def make_store(database: str) -> None:
    with EventStore(database) as store:
        store.create_schema()


@pytest.mark.essential
@pytest.mark.parametrize("stage", STAGES)
def test_killing_the_importer_and_going_on_completes_it(
    database: str, source: Path, undisturbed: list[tuple[Any, ...]], stage: str
) -> None:
    make_store(database)
    with held_at(stage, database, source) as importer:
        assert stage == "switch" or contents(database) == []
        importer.kill()
    check_that_going_on_completes_it(database, source, undisturbed)


@pytest.mark.parametrize("stage", STAGES)
def test_killing_the_importer_and_giving_up_leaves_an_empty_store(database: str, source: Path, stage: str) -> None:
    make_store(database)
    with held_at(stage, database, source) as importer:
        importer.kill()
    with EventStore(database) as store:
        try:
            store.abandon_import("a")
        except SchemaError:
            # It had not begun yet, or was finished.
            assert event_count(database) == (0 if stage == "start" else EVENT_COUNT)
        else:
            assert contents(database) == []
    check_that_it_is_tidy_and_works(database)


def test_what_a_killed_importer_left_building_ends_soon(database: str, source: Path) -> None:
    make_store(database)
    with (
        psycopg.connect(database, autocommit=True) as looker,
        held_at("build events_pkey", database, source) as importer,
    ):
        importer.kill()
        # A minute passes before it would give up waiting for our lock.
        began = time.monotonic()
        wait_until(lambda: not somebody_waits(looker, "l.locktype = 'advisory'"))
        assert time.monotonic() - began < 20


def test_killing_the_server_and_going_on_completes_it(
    installation: Installation, source: Path, undisturbed: list[tuple[Any, ...]]
) -> None:
    with EmbeddedServer(installation=installation, settings=TEST_SETTINGS, temporary_root=root_for_servers()) as server:
        for n, stage in enumerate(("chunk", "build events_pkey", "heads", "lock of the log", "sequence", "switch")):
            with psycopg.connect(server.conninfo, autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE killed_{n} TEMPLATE template0".encode())
            database = server.conninfo_for(f"killed_{n}")
            make_store(database)
            try:
                with held_at(stage, database, source) as importer:
                    server.kill()
                    if stage != "switch":
                        importer.process.communicate("\n")
                        assert importer.process.returncode == 1
            except psycopg.OperationalError:
                pass  # the holder's own connection
            server.start()
            check_that_going_on_completes_it(database, source, undisturbed)
