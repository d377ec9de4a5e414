"""create_schema: any name, any number of processes, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from psycopg import sql

from hindsight_fast import EventStore, SchemaError, StoreClosed
from hindsight_fast.embedded import EmbeddedServer
from hindsight_fast.schema import schema_sql

LINE = b'{"stream":"a","type":"t","data":{"n":1}}'


@pytest.mark.essential
def test_making_the_schema_twice_changes_nothing(store_class: type[EventStore], database: str) -> None:
    with store_class(database) as store:
        store.create_schema()
        store.import_events([LINE], import_id="one")
        before = store.head()
        store.create_schema()
        assert store.head() == before
        assert len(list(store.read())) == 1


@pytest.mark.essential
def test_many_at_once_make_one_schema(store_class: type[EventStore], database: str) -> None:
    def create(_: int) -> None:
        with store_class(database) as store:
            store.create_schema()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(create, range(8)))
    with psycopg.connect(database) as connection:
        assert connection.execute("SELECT count(*) FROM hindsight.store_meta").fetchone() == (1,)


def test_many_processes_at_once_make_one_schema(database: str) -> None:
    program = "import sys; from hindsight_fast import EventStore\nwith EventStore(sys.argv[1]) as s: s.create_schema()"
    processes = [subprocess.Popen([sys.executable, "-c", program, database]) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0, 0, 0, 0]


schema_names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(
    lambda name: len(name.encode()) <= 63 and not name.startswith("pg_")
)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(name=schema_names)
@example(name="$$")
@example(name="$body$ 'quoted' \"twice\" \\back")
@example(name="hindsight")
@example(name="Hindsight.events")
@example(name="a;b -- c")
@example(name="{schema} %s %%")
@example(name="a\nb")
@example(name="a\r\nb")
@example(name="a\nCREATE TABLE public.injected (x int); --")
def test_any_schema_name_works(store_class: type[EventStore], database: str, name: str) -> None:
    with store_class(database, schema=name) as store:
        store.create_schema()
        store.import_events([LINE], import_id="one")
        assert [event.payload for event in store.read()] == [{"n": 1}]
        assert [event.payload for event in store.read(event_types=["t"])] == [{"n": 1}]
        assert store.head() is not None
    with psycopg.connect(database, autocommit=True) as connection:
        assert connection.execute("SELECT to_regclass('public.injected')").fetchone() == (None,)
        connection.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(name)))


def test_psql_runs_the_packaged_scripts_where_they_lie(server: EmbeddedServer, database: str) -> None:
    from importlib.resources import as_file, files

    with as_file(files("hindsight_fast").joinpath("schema.sql")) as path:
        done = subprocess.run(
            [server.bin("psql"), "-qX", "-v", "ON_ERROR_STOP=1", "-f", path, database], capture_output=True
        )
    assert (done.returncode, done.stderr) == (0, b"")
    with EventStore(database) as store:
        assert store.import_events([LINE], import_id="one", mode="initial").events == 1


@pytest.mark.essential
def test_psql_runs_the_script_as_it_is(server: EmbeddedServer, database: str) -> None:
    for script in (schema_sql("hindsight"), schema_sql("hindsight"), schema_sql("an'other \"one")):
        done = subprocess.run(
            [server.bin("psql"), "-qX", "-v", "ON_ERROR_STOP=1", database], input=script.encode(), capture_output=True
        )
        assert (done.returncode, done.stderr) == (0, b"")
    with EventStore(database) as store:
        assert store.head() is None


def test_the_packaged_script_and_the_default_name_are_the_same() -> None:
    from importlib.resources import files

    folder = files("hindsight_fast")
    packaged = "".join(each.read_text(encoding="utf-8") for each in folder.iterdir() if each.name.endswith(".sql"))
    composed = schema_sql("hindsight")
    assert packaged.replace("$body$", "'").count("hindsight.") == composed.replace('"hindsight"', "hindsight").count(
        "hindsight."
    )


def test_a_schema_that_a_dba_made_is_enough(database: str) -> None:
    """A role without the right to create schemas makes the tables in one that it was given."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("DO $$ BEGIN CREATE ROLE keeper LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$")
        connection.execute("CREATE SCHEMA given AUTHORIZATION keeper")
    with EventStore(f"{database} user=keeper", schema="given") as store:
        store.create_schema()
        assert store.head() is None
    with EventStore(f"{database} user=keeper", schema="other") as store:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            store.create_schema()
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("DROP OWNED BY keeper")


def test_running_the_script_again_waits_for_no_append(database: str) -> None:
    with EventStore(database) as store:
        store.create_schema()
    with psycopg.connect(database) as holder, psycopg.connect(database, autocommit=True) as again:
        holder.execute(
            "LOCK TABLE hindsight.events, hindsight.stream_heads, hindsight.append_gate IN ROW EXCLUSIVE MODE"
        )
        again.execute("SET lock_timeout = '2s'")
        again.execute(schema_sql("hindsight").encode())


def test_without_a_schema_calls_say_how_to_make_it(store_class: type[EventStore], database: str) -> None:
    with store_class(database) as store:
        for call in (store.head, lambda: list(store.read()), lambda: store.import_events([LINE], import_id="x")):
            with pytest.raises(SchemaError, match="create_schema\\(\\)"):
                call()


def test_a_newer_layout_is_refused_by_name(store_class: type[EventStore], database: str) -> None:
    with store_class(database) as store:
        store.create_schema()
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("UPDATE hindsight.store_meta SET layout = 2")
    with pytest.raises(SchemaError, match="layout 2, made by a newer version") as caught:
        store_class(database).open()
    assert (caught.value.schema, caught.value.found_layout) == ("hindsight", 2)
    with psycopg.connect(database, autocommit=True) as connection:
        with pytest.raises(psycopg.DatabaseError, match="made by a newer version"):
            connection.execute(schema_sql("hindsight").encode())


def test_a_closed_store_says_so(store_class: type[EventStore], database: str) -> None:
    store = store_class(database)
    with pytest.raises(StoreClosed):
        store.head()
    with store:
        store.create_schema()
    with pytest.raises(StoreClosed):
        list(store.read())
    with store:  # a store can be opened again
        assert store.head() is None


def test_the_server_is_named_when_it_cannot_be_reached(store_class: type[EventStore]) -> None:
    with pytest.raises(psycopg.OperationalError):
        store_class("host=/nonexistent dbname=none connect_timeout=2").open()
