"""mode="initial": what is stored, what is refused, going on and giving up."""

from __future__ import annotations

import json
import threading
import time
import uuid
from datetime import datetime
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool

from hindsight_fast import EventStore, ImportFailed, ImportProgress, SchemaError, stream_uuid
from hindsight_fast import import_initial as initial
from hindsight_fast.cli import commands
from initial_imports import (
    Background,
    Connection,
    Paused,
    catalog,
    line,
    lines,
    state_of,
    stop_at,
    tables_of,
    wait_until,
)

# What is stored


def contents(store: EventStore) -> list[tuple[Any, ...]]:
    """Every event in its order, all but the cursor, and undated ones without their time."""
    return [
        (
            event.event_id,
            event.stream_id,
            event.stream_version,
            event.correlation_id,
            event.created_at if event.created_at.year < 2020 else None,
            event.name,
            event.version,
            event.data,
            event.metadata_json,
        )
        for event in store.read()
    ]


names = st.sampled_from(["a", "b", "c", "ü", str(uuid.UUID(int=5))])
documents = st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=5) | st.none(), max_size=3)
events = st.fixed_dictionaries(
    {"stream": names, "type": st.sampled_from(["x", "y"]), "data": documents},
    optional={
        "version": st.integers(0, 3),
        "time": st.datetimes(datetime(1000, 1, 1), datetime(2019, 1, 1)).map(lambda moment: moment.isoformat() + "Z"),
        "correlation_id": st.integers(0, 3).map(lambda n: str(uuid.UUID(int=n))),
        "metadata": documents,
        "own id": st.just(True),
    },
)


@pytest.mark.essential
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    given_events=st.lists(st.none() | events, max_size=30),
    chunk_size=st.integers(1, 40),
)
@example(given_events=[], chunk_size=1)
@example(given_events=[None, None], chunk_size=1)
def test_the_result_is_that_of_appending(
    database: str, given_events: list[dict[str, Any] | None], chunk_size: int
) -> None:
    source = []
    for n, event in enumerate(given_events):
        if event is None:
            source.append(b"  ")
            continue
        own_id = {"id": str(uuid.UUID(int=n + 1000))} if event.pop("own id", False) else {}
        source.append(json.dumps({**event, **own_id}).encode())
        event.update({"own id": True} if own_id else {})
    found = {}
    for mode in ("append", "initial"):
        with EventStore(database, schema=mode) as store:
            store.create_schema()
            report = store.import_events(source, import_id="a", mode=mode, chunk_size=chunk_size)  # type: ignore[arg-type]
            found[mode] = contents(store)
            streams = {event[1] for event in found[mode]}
            assert report.events == len(found[mode])
            assert report.new_streams == len(streams)
            heads = {stream: store.stream_version(stream) for stream in streams}
            cursors = [event.cursor for event in store.read()]
            assert cursors == sorted(cursors)
            assert (report.first_cursor, report.last_cursor) == ((cursors[0], cursors[-1]) if cursors else (None, None))
            assert store.head() == report.last_cursor
            found[mode, "heads"] = heads
            store.import_events([line(1, "a")], import_id="later")
            assert len(list(store.read())) == len(cursors) + 1
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute(f"DROP SCHEMA {mode} CASCADE")
    assert found["initial"] == found["append"]
    assert found["initial", "heads"] == found["append", "heads"]


@pytest.mark.essential
def test_the_schema_is_afterwards_what_it_was(store: EventStore, connection: Connection) -> None:
    before = catalog(connection)
    assert {row[1] for row in before} >= {"events", "stream_heads"}
    store.import_events(lines(50), import_id="a", mode="initial")
    assert catalog(connection) == before
    store.create_schema()
    assert catalog(connection) == before


def test_what_was_altered_stays_altered(store: EventStore, connection: Connection) -> None:
    role = f"reader_{uuid.uuid4().hex}"
    connection.execute(f"CREATE ROLE {role}")
    try:
        for statement in (
            f"GRANT USAGE ON SCHEMA hindsight TO {role}",
            f"GRANT SELECT ON hindsight.events TO {role} WITH GRANT OPTION",
            f"GRANT SELECT (stream_id) ON hindsight.stream_heads TO {role}",
            "REVOKE DELETE ON hindsight.events FROM CURRENT_USER",
            "COMMENT ON TABLE hindsight.events IS 'the log, it''s ours'",
            "COMMENT ON COLUMN hindsight.events.payload IS 'json'",
            "ALTER TABLE hindsight.events SET (fillfactor = 90, toast.autovacuum_enabled = off)",
            "ALTER TABLE hindsight.events ALTER payload SET STORAGE EXTERNAL, ADD CHECK (event_version < 1000)",
            "CREATE INDEX \"my index\" ON hindsight.events ((payload ->> 'n')) WHERE event_name = 't'",
            f"ALTER DEFAULT PRIVILEGES IN SCHEMA hindsight GRANT ALL ON TABLES TO {role}",
        ):
            connection.execute(statement)
        before = catalog(connection)
        store.import_events(lines(50), import_id="a", mode="initial")
        assert sorted(map(str, catalog(connection))) == sorted(map(str, before))
        connection.execute(f"SET ROLE {role}")
        assert connection.execute("SELECT count(*) FROM hindsight.events").fetchone() == (50,)
        connection.execute("RESET ROLE")
    finally:
        connection.execute(f"DROP OWNED BY {role}")
        connection.execute(f"DROP ROLE {role}")


# What is refused


def test_a_store_with_events_is_refused_and_left_as_it_was(store: EventStore, connection: Connection) -> None:
    store.import_events(lines(3), import_id="a")
    before = catalog(connection)
    for import_id in ("a", "b"):
        if import_id == "b":
            with pytest.raises(SchemaError, match="needs an empty store"):
                store.import_events(lines(5), import_id=import_id, mode="initial")
        else:
            # Finished in the other mode: nothing is left to be done.
            assert store.import_events(lines(3), import_id=import_id, mode="initial").skipped_events == 3
    assert state_of(connection) == "open"
    assert catalog(connection) == before


@pytest.mark.parametrize(
    ("make", "named"),
    [
        ("CREATE VIEW public.of_events AS SELECT event_id FROM hindsight.events", "view of_events"),
        ("CREATE PUBLICATION one FOR TABLE hindsight.events", "publication of table"),
        ("CREATE PUBLICATION every FOR ALL TABLES", "publication every"),
        ("CREATE PUBLICATION schema_wide FOR TABLES IN SCHEMA hindsight", "publication schema_wide"),
        ("CREATE TABLE public.child () INHERITS (hindsight.events)", "table child"),
        ("CREATE TABLE public.r (e uuid REFERENCES hindsight.events (event_id))", "constraint r_e_fkey"),
        ("CREATE FUNCTION public.f(hindsight.events) RETURNS int LANGUAGE sql RETURN 1", "function f"),
        ("ALTER TABLE hindsight.events ENABLE ROW LEVEL SECURITY", "row level security"),
        ("CREATE STATISTICS public.s ON stream_id, event_name FROM hindsight.events", "statistics object s"),
        (
            "CREATE TRIGGER tell AFTER INSERT ON hindsight.events FOR EACH STATEMENT"
            " EXECUTE FUNCTION suppress_redundant_updates_trigger()",
            "trigger tell",
        ),
        (
            "INSERT INTO hindsight.projections (name, attached) VALUES ('users', true)",
            "attached that an initial import would not run: users",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_would_not_survive_the_exchange_of_tables_is_named(
    store: EventStore, connection: Connection, make: str, named: str
) -> None:
    connection.execute(make)
    with pytest.raises(SchemaError, match=named):
        store.import_events(lines(3), import_id="a", mode="initial")
    assert state_of(connection) == "open"
    assert "events_import" not in tables_of(connection)
    assert connection.execute("SELECT count(*) FROM hindsight.imports").fetchone() == (0,)


def test_what_hinders_only_the_switch_can_be_taken_away_before_going_on(
    store: EventStore, connection: Connection
) -> None:
    def make_a_view(progress: ImportProgress) -> None:
        if progress.phase == "indexes" and progress.phase_share == 0:
            connection.execute("CREATE OR REPLACE VIEW public.of_events AS SELECT event_id FROM hindsight.events")

    with pytest.raises(SchemaError, match="view of_events"):
        store.import_events(lines(30), import_id="a", mode="initial", progress=make_a_view)
    connection.execute("DROP VIEW public.of_events")
    report = store.import_events(lines(30), import_id="a", mode="initial")
    assert (report.events, report.skipped_events) == (0, 30)
    assert len(list(store.read())) == 30


def test_wrong_use_is_refused_before_anything_happens(store: EventStore, connection: Connection) -> None:
    for options in ({"mode": "other"}, {"mode": "initial", "jobs": 2}, {"mode": "initial", "dry_run": True}):
        with pytest.raises(ValueError, match="mode"):
            store.import_events([line(1)], import_id="a", **options)  # type: ignore[arg-type]
    assert state_of(connection) == "open"


# Ids that come twice


@pytest.mark.essential
def test_ids_that_come_twice_are_listed_with_their_lines_and_the_store_is_left_untouched(
    store: EventStore, connection: Connection
) -> None:
    before = catalog(connection)
    ids = [str(uuid.UUID(int=n)) for n in range(3)]
    source = lines(60)
    source[10] = b"   "
    source[25] = b""
    for at, each in ((3, 0), (30, 1), (9, 1), (50, 0), (26, 1), (41, 2)):
        source[at] = line(at, id=ids[each])
    with pytest.raises(ImportFailed, match="2 ids stand on more than one line") as caught:
        store.import_events(source, import_id="a", mode="initial", chunk_size=20)
    assert caught.value.duplicates == ((uuid.UUID(ids[0]), (4, 51)), (uuid.UUID(ids[1]), (10, 27, 31)))
    assert caught.value.duplicate_count == 2
    assert caught.value.stored_lines == 0
    assert f"{ids[1]} (lines 10, 27, 31)" in str(caught.value)
    assert catalog(connection) == before
    assert (state_of(connection), list(store.read())) == ("open", [])
    source[50] = source[30] = source[26] = line(1)
    assert store.import_events(source, import_id="a", mode="initial", chunk_size=20).events == 58


def test_of_very_many_double_ids_the_first_are_listed_and_all_counted(store: EventStore) -> None:
    source = [line(n, id=str(uuid.UUID(int=n % 300))) for n in range(600)]
    with pytest.raises(ImportFailed, match="and 295 more") as caught:
        store.import_events(source, import_id="a", mode="initial", chunk_size=100)
    assert caught.value.duplicate_count == 300
    assert caught.value.duplicates == tuple((uuid.UUID(int=n), (n + 1, n + 301)) for n in range(100))


# Going on, and giving up


@pytest.mark.essential
def test_a_bad_line_stops_it_and_the_mended_file_goes_on(store: EventStore, connection: Connection) -> None:
    source = lines(50)
    with pytest.raises(ImportFailed) as caught:
        store.import_events([*source[:33], b"{}", *source[34:]], import_id="a", mode="initial", chunk_size=10)
    assert (caught.value.line_no, caught.value.stored_lines) == (34, 30)
    assert (list(store.read()), state_of(connection) != "open") == ([], True)
    report = store.import_events(source, import_id="a", mode="initial", chunk_size=10)
    assert (report.events, report.skipped_events) == (20, 30)
    assert [event.payload["n"] for event in store.read()] == list(range(50))
    for n in range(7):
        assert store.stream_version(stream_uuid(f"s{n}")) == len(range(n, 50, 7)) - 1


def test_what_only_the_server_refuses_is_named_by_its_line(store: EventStore) -> None:
    source = lines(30)
    source[5] = b""
    source[17] = line(17, "x").replace(b"17}", b'"\\ud800"}')
    source[17] = b'{"stream":"x","type":"t","data":{"n":"\\u0000 and [1}'
    with pytest.raises(ImportFailed) as caught:
        store.import_events(source, import_id="a", mode="initial", chunk_size=100)
    assert caught.value.line_no == 18


def test_bad_lines_are_set_aside_as_in_the_other_mode(store: EventStore, tmp_path: Any) -> None:
    source = lines(30)
    source[7], source[20] = b"{}", b"nonsense"
    report = store.import_events(source, import_id="a", mode="initial", chunk_size=8, on_error=tmp_path / "bad")
    assert (report.events, report.bad_lines) == (28, 2)
    assert (tmp_path / "bad").read_bytes() == b"{}\nnonsense\n"
    assert [event.payload["n"] for event in store.read()] == [n for n in range(30) if n not in (7, 20)]


def test_a_source_that_has_changed_is_refused(store: EventStore) -> None:
    source = lines(30)
    with pytest.raises(ImportFailed):
        store.import_events([*source, b"bad"], import_id="a", mode="initial", chunk_size=10)
    with pytest.raises(ImportFailed, match="differ now"):
        store.import_events([line(99), *source[1:]], import_id="a", mode="initial")
    with pytest.raises(ImportFailed, match="shorter now"):
        store.import_events(source[:20], import_id="a", mode="initial")
    assert store.import_events(source, import_id="a", mode="initial").skipped_events == 30


def test_a_source_that_has_grown_is_not_mixed_into_what_is_built(store: EventStore, connection: Connection) -> None:
    stop_at(store, "switch")
    for _ in range(2):
        with pytest.raises(ImportFailed, match="mode='append' goes on with them"):
            store.import_events(lines(31), import_id="a", mode="initial")
        if state_of(connection) != "open":
            store.import_events(lines(30), import_id="a", mode="initial")
    assert store.import_events(lines(31), import_id="a").events == 1
    assert [event.payload["n"] for event in store.read()] == list(range(31))


def test_of_two_importers_at_once_one_is_refused(
    store: EventStore, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initial, "RIVAL_PATIENCE_S", 0.1)
    source = Paused(lines(20), lines(20))
    running = Background(lambda: store.import_events(source, import_id="a", mode="initial", chunk_size=10))
    wait_until(lambda: state_of(connection) != "open")
    with pytest.raises(ImportFailed, match="another process runs an initial import"):
        store.import_events(lines(40), import_id="a", mode="initial")
    with pytest.raises(SchemaError, match="is running: stop it first"):
        store.abandon_import("a")
    source.gate.set()
    assert running.result().events == 40


@pytest.mark.essential
def test_abandoning_leaves_an_empty_store_that_works(store: EventStore, connection: Connection) -> None:
    before = catalog(connection)
    for how_far in ("lines", "indexes", "switch"):
        stop_at(store, how_far)
        with pytest.raises(SchemaError, match="the initial import 'a' is not finished"):
            store.import_events(lines(30), import_id="other", mode="initial")
        assert catalog(connection) != before
        store.abandon_import("a")
        assert catalog(connection) == before
        assert (state_of(connection), list(store.read())) == ("open", [])
        assert connection.execute("SELECT count(*) FROM hindsight.imports").fetchone() == (0,)
    assert store.import_events(lines(5), import_id="a").events == 5


def test_there_is_nothing_to_abandon_but_an_unfinished_initial_import(store: EventStore) -> None:
    with pytest.raises(SchemaError, match="there is no import 'a'"):
        store.abandon_import("a")
    store.import_events(lines(5), import_id="a")
    with pytest.raises(SchemaError, match="nothing to abandon"):
        store.abandon_import("a")
    with pytest.raises(ValueError, match="import_id"):
        store.abandon_import("")
    assert len(list(store.read())) == 5


def test_a_store_that_stays_in_use_leaves_only_the_switch_to_the_next_run(
    store: EventStore, database: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initial, "SWITCH_PATIENCE_S", 0.2)
    with psycopg.connect(database) as reader:
        reader.execute("SELECT count(*) FROM hindsight.events")
        with pytest.raises(ImportFailed, match=f"in use, by process {reader.info.backend_pid}"):
            store.import_events(lines(30), import_id="a", mode="initial")
    with psycopg.connect(database) as reader:
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT 1")
        with pytest.raises(ImportFailed, match=f"began before, in process {reader.info.backend_pid}"):
            store.import_events(lines(30), import_id="a", mode="initial")
    assert store.import_events(lines(30), import_id="a", mode="initial").skipped_events == 30
    assert len(list(store.read())) == 30


def test_one_connection_is_enough(database: str) -> None:
    with EventStore(database, pool_size=1) as store:
        store.create_schema()
        assert store.import_events(lines(30), import_id="a", mode="initial").events == 30
        assert len(list(store.read())) == 30


def test_an_owner_without_other_rights_can_do_it_whatever_the_timeouts(database: str, connection: Connection) -> None:
    role = f"owner_{uuid.uuid4().hex}"
    connection.execute(f"CREATE ROLE {role} LOGIN")
    connection.execute(f"CREATE SCHEMA owned AUTHORIZATION {role}")
    connection.execute(f"ALTER ROLE {role} SET statement_timeout = '400ms'")
    try:
        with (
            ConnectionPool(f"{database} user={role}", kwargs={"row_factory": dict_row}, min_size=1, max_size=4) as pool,
            EventStore(pool=pool, schema="owned") as store,
        ):
            store.create_schema()
            with pytest.raises(ImportFailed):
                store.import_events([*lines(30), b"bad"], import_id="a", mode="initial", chunk_size=10)
            with psycopg.connect(database) as holder:
                holder.execute(
                    "SELECT pg_advisory_xact_lock(hashtextextended("
                    "'hindsight_fast: build index ' || 'owned.events_pkey'::regclass::oid, 0))"
                )
                running = Background(lambda: store.import_events(lines(30), import_id="a", mode="initial"))
                wait_until(
                    lambda: connection.execute(
                        "SELECT 1 FROM pg_locks AS l JOIN pg_stat_activity AS a USING (pid)"
                        " WHERE l.locktype = 'advisory' AND NOT l.granted AND now() - a.query_start > '800 ms'"
                    ).fetchone()
                )
            assert running.result().skipped_events == 30
            assert [event.payload["n"] for event in store.read()] == list(range(30))
            (owners,) = connection.execute(
                "SELECT array_agg(DISTINCT relowner::regrole::text) FROM pg_class"
                " WHERE relnamespace = 'owned'::regnamespace"
            ).fetchone() or ([],)
            assert owners == [role]
    finally:
        connection.execute("DROP SCHEMA owned CASCADE")
        connection.execute(f"DROP ROLE {role}")


def test_an_index_of_ones_own_that_refuses_an_event_can_be_dropped(store: EventStore, connection: Connection) -> None:
    connection.execute("CREATE INDEX by_number ON hindsight.events (((payload ->> 'n')::integer))")
    source = [*lines(3), b'{"stream":"s","type":"t","data":{"n":"secret"}}']
    with pytest.raises(ImportFailed, match="an index cannot be built") as caught:
        store.import_events(source, import_id="a", mode="initial")
    assert caught.value.__cause__ is None
    connection.execute("DROP INDEX hindsight.by_number")
    assert store.import_events(source, import_id="a", mode="initial").skipped_events == 4
    assert len(list(store.read())) == 4


def test_an_interrupt_ends_what_is_being_built(store: EventStore, database: str, connection: Connection) -> None:
    told = 0

    def interrupt(progress: ImportProgress) -> None:
        nonlocal told
        told += progress.phase == "indexes"
        if told == 3:
            raise KeyboardInterrupt

    with psycopg.connect(database) as holder:
        holder.execute(
            "SELECT pg_advisory_xact_lock(hashtextextended("
            "'hindsight_fast: build index ' || 'hindsight.events_pkey'::regclass::oid, 0))"
        )
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            store.import_events(lines(30), import_id="a", mode="initial", progress=interrupt)
        assert time.monotonic() - began < 40  # and not the minute for which building waits
        assert not [thread for thread in threading.enumerate() if thread.name == "hindsight-import-build"]
        assert connection.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchone() is None
    assert store.import_events(lines(30), import_id="a", mode="initial").skipped_events == 30
    assert len(list(store.read())) == 30


def test_progress_tells_each_phase(store: EventStore) -> None:
    told: list[ImportProgress] = []
    store.import_events(lines(50), import_id="a", mode="initial", chunk_size=20, progress=told.append)
    assert [progress.events for progress in told if progress.phase == "lines"] == [20, 40, 50]
    shares = [progress.phase_share for progress in told if progress.phase == "indexes"]
    assert shares[0] == 0.0
    assert shares[-1] == 1.0
    assert all(share is not None and 0 <= share <= 1 for share in shares)
    assert told[-1].phase == "switch"


# The command line


def test_the_command_imports_and_abandons(database: str, tmp_path: Any) -> None:
    path = tmp_path / "events.ndjson"
    path.write_bytes(b"\n".join([*lines(30), b"bad"]))
    run = CliRunner().invoke
    assert run(commands, ["init", "--dsn", database]).exit_code == 0
    command = ["import", str(path), "--dsn", database, "--mode", "initial", "--chunk-size", "10"]
    failed = run(commands, command)
    assert failed.exit_code == 3
    assert "accepts no appends: the initial import 'events.ndjson' is not finished" in failed.stderr
    abandoned = run(commands, ["import", "--dsn", database, "--abandon", "events.ndjson"])
    assert (abandoned.exit_code, abandoned.stdout) == (0, "")
    assert "the store is empty, and open" in abandoned.stderr
    again = run(commands, ["import", "--dsn", database, "--abandon", "events.ndjson"])
    assert (again.exit_code, "no import 'events.ndjson'" in again.stderr) == (1, True)
    path.write_bytes(b"\n".join(lines(30)))
    done = run(commands, command)
    assert done.exit_code == 0
    assert "30 events imported" in done.stdout
    assert "building indexes" in done.stderr
    for wrong in ([*command, "--jobs", "2"], [*command, "--abandon", "a"], ["import", "--dsn", database]):
        assert run(commands, wrong).exit_code == 2
