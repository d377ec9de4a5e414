"""The command line: what goes where, which exit code, and that it never starts a server or shows a password unasked."""

from __future__ import annotations

import gzip
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import psycopg
import pytest

from command_line import forget_database, run, run_apart, started
from conftest import root_for_servers
from hindsight_fast import Cursor, EventStore, cli_common, stream_uuid
from hindsight_fast.demo_events import demo_lines
from hindsight_fast.embedded import EmbeddedServer
from hindsight_fast.installations import Installation


@pytest.fixture(autouse=True)
def no_database_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_database(monkeypatch)


@pytest.fixture
def shop(store: EventStore) -> list[dict[str, Any]]:
    """300 events of the demo in *store*, and their lines."""
    lines = list(demo_lines(300))
    store.import_events(lines, import_id="shop", chunk_size=100)
    return [json.loads(line) for line in lines]


def event_count(database: str) -> int:
    with psycopg.connect(database) as connection:
        row = connection.execute("SELECT count(*) FROM hindsight.events").fetchone()
    assert row is not None
    return int(row[0])


# --- All of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("init",), ("import", __file__), ("export",), ("read",), ("status",)])
def test_no_database_named_is_an_error_and_starts_no_server(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_arguments: object, **_options: object) -> None:
        raise AssertionError("a server was started unasked")

    monkeypatch.setattr(cli_common, "EmbeddedServer", started)
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "HINDSIGHT_DATABASE_URL" in result.stderr
    assert "--embedded" in result.stderr


@pytest.mark.parametrize("command", ["import", "export", "read", "status"])
def test_a_missing_schema_names_hindsight_init(database: str, command: str, tmp_path: Path) -> None:
    (tmp_path / "events.ndjson").write_bytes(b'{"stream":"a","type":"t","data":{}}\n')
    arguments = [str(tmp_path / "events.ndjson")] if command == "import" else []
    result = run(command, *arguments, "--dsn", database)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "hindsight init" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_environment_names_the_database(database: str, store: EventStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HINDSIGHT_DATABASE_URL", database)
    assert run("status", "--json").exit_code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("read", "--after", "here"),
        ("read", "--limit", "-1"),
        ("read", "--correlation-id", "no uuid"),
        ("read", "--stream", ""),
        ("read", "--type", "\udcff"),
        ("read", "--limit", str(2**63)),
        ("export", "--until", "there"),
        ("export", "-o", "/"),
        ("status", "--schema", "pg_mine"),
        ("status", "--dsn", "host=here", "--embedded", "/there"),
        ("status", "--dsn", "host=here", "--database", "x"),
        ("import", "--dsn", "host=here"),
        ("import", "/no/such/file", "--dsn", "host=here"),
        ("import", "-", "--dsn", "host=here"),
        ("import", __file__, "--import-id", "", "--dsn", "host=here"),
        ("import", __file__, "--chunk-size", "0", "--dsn", "host=here"),
        ("demo", "--events", "0"),
    ],
)
def test_wrong_usage_is_2_and_touches_nothing(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Usage:" in result.stderr


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://somebody:geheim@127.0.0.1:1/db?connect_timeout=2",
        "host=127.0.0.1 port=1 password=geheim",
        "mysql://somebody:geheim@localhost/db",
        "postgresql://somebody:geheim/@127.0.0.1:1/db",
        "postgresql://somebody:ge heim@127.0.0.1:1/db",
        "host=127.0.0.1 password geheim",
        "postgresql://somebody@127.0.0.1:1/db?sslpassword=geheim&nonsense=1",
    ],
)
@pytest.mark.parametrize("debug", ["", "1"])
def test_a_password_is_never_shown(dsn: str, debug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HINDSIGHT_DEBUG", debug)
    result = run("status", "--dsn", dsn)
    assert result.exit_code == 1
    assert result.stderr
    assert "heim" not in result.output
    assert ("Traceback" in result.stderr) == bool(debug)


def test_what_an_error_quotes_of_a_password_is_blacked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Talkative:
        def __init__(self, conninfo: str, **_options: object) -> None:
            raise psycopg.OperationalError(f"cannot connect with {conninfo}\nreally")

    monkeypatch.setattr(cli_common, "EventStore", Talkative)
    result = run("status", "--dsn", "host=here password=geheim")
    assert result.exit_code == 1
    assert result.stderr == "Error: cannot connect with host=here password=*** really\n"


def test_traceback_shows_where_it_came_from() -> None:
    for arguments in (["--traceback", "status"], ["status", "--traceback"]):
        result = run(*arguments)
        assert result.exit_code == 1
        assert "Traceback" in result.stderr
        assert "HindsightError" in result.stderr


def test_the_help_documents_the_exit_codes() -> None:
    text = run("--help").stdout
    for code in ("0 ", "1 ", "2 ", "3 ", "130 "):
        assert f"\n    {code}" in text
    for command in ("demo", "init", "import", "export", "read", "status"):
        assert f"\n  {command} " in text
        assert run(command, "--help").exit_code == 0


def test_it_works_without_a_terminal_a_home_and_a_locale(database: str, shop: list[dict[str, Any]]) -> None:
    bare = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    for arguments in (["read"], ["status"], ["status", "--schema", "gehäuft"], ["init"]):
        process = subprocess.run(
            [sys.executable, "-c", "from hindsight_fast.cli import main; main()", *arguments, "--dsn", database],
            env=bare,
            capture_output=True,
            timeout=60,
        )
        assert b"Traceback" not in process.stderr
        assert process.returncode == (2 if "gehäuft" in arguments else 0), process.stderr
        if arguments == ["read"]:
            assert [json.loads(line)["data"] for line in process.stdout.splitlines()] == [e["data"] for e in shop]


# --- init -----------------------------------------------------------------------------------------------------------


def test_init_creates_the_schema_and_may_be_repeated(database: str) -> None:
    for _ in range(2):
        result = run("init", "--dsn", database, "--schema", 'odd "name" %s')
        assert result.exit_code == 0, result.stderr
        assert result.stdout == ""
        assert "is ready" in result.stderr
    with EventStore(database, schema='odd "name" %s') as store:
        assert store.head() is None


@pytest.mark.parametrize("schema", ["hindsight", 'it\'s $body$ "mine"'])
def test_what_init_prints_makes_the_schema_in_psql(
    server: EmbeddedServer, database: str, schema: str, tmp_path: Path
) -> None:
    printed = run("init", "--print", "--schema", schema)  # names no database: needs none
    assert printed.exit_code == 0
    psql = subprocess.run(
        [server.bin("psql"), "-X", "-v", "ON_ERROR_STOP=1", "-q", "-d", database, "-f", "-"],
        input=printed.stdout_bytes,
        capture_output=True,
        timeout=60,
    )
    assert psql.returncode == 0, psql.stderr
    assert run("status", "--dsn", database, "--schema", schema).exit_code == 0


# --- import ---------------------------------------------------------------------------------------------------------


@pytest.mark.essential
def test_a_file_is_imported_once(database: str, store: EventStore, tmp_path: Path) -> None:
    file = tmp_path / "shop.ndjson"
    file.write_bytes(b"".join(demo_lines(300)))
    first = run("import", str(file), "--dsn", database, "--json")
    assert first.exit_code == 0, first.stderr
    report = json.loads(first.stdout)
    assert (report["import_id"], report["events"], report["skipped_events"]) == ("shop.ndjson", 300, 0)
    assert report["bytes"] == file.stat().st_size
    assert str(store.head()) == report["last_cursor"]
    assert "import id 'shop.ndjson'" in first.stderr
    assert "300 events" in first.stderr

    again = run("import", str(file), "--dsn", database)
    assert again.exit_code == 0
    assert "0 events imported, 300 were there already" in again.stdout
    assert "300 events are stored already" in again.stderr
    assert event_count(database) == 300


def test_gzip_and_standard_input_are_imported(database: str, store: EventStore, tmp_path: Path) -> None:
    content = b"".join(demo_lines(50))
    packed = tmp_path / "shop.ndjson.gz"
    packed.write_bytes(gzip.compress(content))
    assert run("import", str(packed), "--dsn", database).exit_code == 0
    for number, stdin in enumerate([content, gzip.compress(content)]):
        result = run("import", "-", "--import-id", f"stdin {number}", "--dsn", database, "--json", stdin=stdin)
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["events"] == 50
    with packed.open("rb") as file:
        code, stdout, stderr = run_apart(
            "import", "-", "--import-id", "file as stdin", "--dsn", database, "--json", stdin=file
        )
    assert code == 0, stderr
    assert json.loads(stdout)["events"] == 50
    assert event_count(database) == 200


def test_a_bad_line_is_named_and_nothing_of_its_chunk_stored(database: str, store: EventStore, tmp_path: Path) -> None:
    file = tmp_path / "events.ndjson"
    good = list(demo_lines(25))
    file.write_bytes(b"".join([*good[:22], b'{"stream":"a","type":"t","data":[1]}\n', *good[22:]]))
    result = run("import", str(file), "--chunk-size", "10", "--dsn", database)
    assert result.exit_code == 3
    assert result.stdout == ""
    assert f"{file}, line 23: data must be a JSON object" in result.stderr
    assert "Traceback" not in result.stderr
    assert event_count(database) == 20

    file.write_bytes(b"".join(good))
    assert run("import", str(file), "--dsn", database).exit_code == 0
    assert event_count(database) == 25


def test_another_file_of_the_same_name_is_refused(database: str, store: EventStore, tmp_path: Path) -> None:
    file = tmp_path / "events.ndjson"
    file.write_bytes(b"".join(demo_lines(20)))
    assert run("import", str(file), "--dsn", database).exit_code == 0
    file.write_bytes(b"".join(demo_lines(20, seed=1)))
    result = run("import", str(file), "--dsn", database)
    assert result.exit_code == 3
    assert "give another file another import id" in result.stderr


def wait_for_line(stream: IO[bytes], wanted: str) -> None:
    seen = ""
    for raw in stream:
        seen += raw.decode()
        if wanted in raw.decode():
            return
    raise AssertionError(f"it ended without {wanted!r}:\n{seen}")


@pytest.mark.essential
def test_ctrl_c_keeps_what_is_stored_and_the_same_command_goes_on(
    database: str, store: EventStore, tmp_path: Path
) -> None:
    lines = list(demo_lines(250))
    arguments = ("import", "-", "--import-id", "piped", "--chunk-size", "100", "--dsn", database)
    with started(*arguments, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        # Two chunks and a half; the importer then waits for more, which never comes.
        process.stdin.write(b"".join(lines))
        process.stdin.flush()
        wait_for_line(process.stderr, "100 events")
        while event_count(database) < 200:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read().decode()
        assert process.wait(timeout=30) == 130, rest
        assert process.stdout.read() == b""
    assert "Traceback" not in rest
    assert "Fatal" not in rest
    assert "events of import 'piped' are stored" in rest
    assert "The same command, with the same input, goes on" in rest

    file = tmp_path / "again.ndjson"
    file.write_bytes(b"".join(demo_lines(300)))
    with file.open("rb") as stdin:
        code, stdout, stderr = run_apart(*arguments, "--json", stdin=stdin)
    assert code == 0, stderr
    report = json.loads(stdout)
    assert (report["events"], report["skipped_events"]) == (100, 200)
    assert event_count(database) == 300


def test_a_terminal_gets_a_live_bar_and_others_plain_lines(database: str, store: EventStore, tmp_path: Path) -> None:
    file = tmp_path / "shop.ndjson"
    file.write_bytes(b"".join(demo_lines(300)))
    shown = {}
    for term in ("xterm", "dumb", ""):
        try:
            ours, theirs = pty.openpty()
        except OSError:
            pytest.skip("this system gives no pseudo-terminals (/dev/pts is not mounted)")
        arguments = ("import", str(file), "--import-id", f"term {term}", "--chunk-size", "50", "--dsn", database)
        text = b""
        with started(*arguments, stderr=theirs, environment={"TERM": term, "COLUMNS": "100"}) as process:
            os.close(theirs)
            # EIO: the other end is closed.
            with suppress(OSError):
                while part := os.read(ours, 65536):
                    text += part
            os.close(ours)
            assert process.wait(timeout=30) == 0, text
        shown[term] = text.decode()
    assert "\x1b[" in shown["xterm"]
    assert "━" in shown["xterm"]
    for term in ("dumb", ""):
        assert "\x1b" not in shown[term]
        assert "importing" in shown[term]
    for text in shown.values():
        assert "300 events" in text
        assert "/s" in text


# --- read -----------------------------------------------------------------------------------------------------------


@pytest.mark.essential
def test_read_gives_every_event_in_order_with_data_byte_for_byte(
    database: str, store: EventStore, shop: list[dict[str, Any]]
) -> None:
    result = run("read", "--dsn", database)
    assert result.exit_code == 0
    assert result.stderr == ""
    lines = result.stdout_bytes.splitlines()
    assert len(lines) == 300
    for line, event in zip(lines, store.read(), strict=True):
        fields = json.loads(line)
        assert list(fields) == [
            "cursor", "stream", "stream_version", "type", "version", "id", "time", "correlation_id", "data", "metadata",
        ]  # fmt: skip
        assert Cursor.parse(fields["cursor"]) == event.cursor
        assert (fields["stream"], fields["stream_version"]) == (str(event.stream_id), event.stream_version)
        assert (fields["type"], fields["version"], fields["id"]) == (event.name, event.version, str(event.event_id))
        assert fields["time"].endswith("Z")
        assert fields["correlation_id"] == (event.correlation_id and str(event.correlation_id))
        assert b'"data":' + event.data in line
        assert fields["metadata"] == event.metadata
    assert [json.loads(line)["data"] for line in lines] == [event["data"] for event in shop]


def test_read_selects(database: str, store: EventStore, shop: list[dict[str, Any]]) -> None:
    def read(*arguments: str) -> list[dict[str, Any]]:
        result = run("read", "--dsn", database, *arguments)
        assert result.exit_code == 0, result.stderr
        return [json.loads(line) for line in result.stdout_bytes.splitlines()]

    everything = read()
    assert read("--after", everything[99]["cursor"]) == everything[100:]
    assert read("--limit", "7") == everything[:7]
    assert read("--limit", "0") == []
    paid = read("--type", "order_paid", "--type", "order_placed")
    assert paid == [event for event in everything if event["type"] in ("order_paid", "order_placed")]
    assert paid
    ledger = [event for event in everything if event["stream"] == str(stream_uuid("ledger-USD"))]
    assert ledger
    assert read("--stream", "ledger-USD") == read("--stream", str(stream_uuid("ledger-USD"))) == ledger
    cause = next(event["correlation_id"] for event in everything if event["correlation_id"])
    assert read("--correlation-id", cause) == [event for event in everything if event["correlation_id"] == cause]
    bare = read("--no-data", "--limit", "1")[0]
    assert "data" not in bare
    assert "metadata" not in bare


def test_a_line_break_within_stored_json_breaks_no_line(database: str, store: EventStore) -> None:
    store.import_events([b'{"stream":"a","type":"t","data":{"a":"\\n"}}'], import_id="one")
    with psycopg.connect(database) as connection:
        connection.execute("""UPDATE hindsight.events SET payload = '{\n "a":\n\n"\\n"}', metadata = '{\n}'""")
    (line,) = run("read", "--dsn", database).stdout_bytes.splitlines()
    assert b'"data":{  "a":  "\\n"},"metadata":{ }' in line


def test_a_closed_pipe_is_no_error(database: str, store: EventStore) -> None:
    store.import_events(demo_lines(5_000), import_id="many")
    with started("read", "--dsn", database) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = json.loads(process.stdout.readline())
        process.stdout.close()  # long before the end: 2 MB do not fit into a pipe
        assert process.stderr.read() == b""
        assert process.wait(timeout=30) == 0
    assert first["cursor"] == str(next(store.read()).cursor)


def test_a_full_disk_is_an_error(database: str, shop: list[dict[str, Any]]) -> None:
    for arguments in (["read"], ["status"], ["status", "--json"]):
        with open("/dev/full", "wb") as full:
            code, _, stderr = run_apart(*arguments, "--dsn", database, stdout=full)
        assert code == 1
        assert "No space left" in stderr
        assert "Traceback" not in stderr


# --- status ---------------------------------------------------------------------------------------------------------


def test_status_tells_how_the_store_does(database: str, store: EventStore, shop: list[dict[str, Any]]) -> None:
    def status() -> dict[str, Any]:
        result = run("status", "--dsn", database, "--json")
        assert result.exit_code == 0, result.stderr
        found = json.loads(result.stdout)
        assert isinstance(found, dict)
        return found

    found = status()
    with psycopg.connect(database, autocommit=True) as connection:
        assert found["server_version"].startswith(str(connection.info.server_version // 10_000))
        assert found["estimated_events"] in (None, 300)  # None before the server has analysed the table
        connection.execute("ANALYZE hindsight.events, hindsight.stream_heads")
    assert (found["schema"], found["layout"], found["state"]) == ("hindsight", 1, "open")
    head = store.head()
    assert head is not None
    assert found["head"] == str(head)
    assert found["bound"] == head.transaction_no + 1
    assert [table["name"] for table in found["tables"]] == ["events", "stream_heads"]
    assert all(table["bytes"] > 0 for table in found["tables"])
    (imported,) = found["imports"]
    assert (imported["import_id"], imported["events"], imported["lines"]) == ("shop", 300, 300)
    assert imported["finished"] is True
    assert status()["estimated_events"] == 300
    assert status()["estimated_streams"] == len({event["stream"] for event in shop})

    text = run("status", "--dsn", database).stdout
    assert "about 300" in text
    assert "shop: finished, 300 events" in text


def test_status_of_an_empty_store(database: str, store: EventStore) -> None:
    result = run("status", "--dsn", database)
    assert result.exit_code == 0
    assert "the store is empty" in result.stdout


# --- A private server -----------------------------------------------------------------------------------------------


def test_a_private_server_keeps_its_data(installation: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HINDSIGHT_PG_BIN", str(installation.bin_dir))
    folder = Path(root_for_servers() or tempfile.gettempdir(), f"hindsight-test-{os.urandom(6).hex()}")
    folder.mkdir()
    folder.chmod(0o755)
    try:
        data_dir = str(folder / "kept")
        looked = run("status", "--embedded", data_dir)
        assert looked.exit_code == 1
        assert f"hindsight init --embedded {data_dir}" in looked.stderr
        assert not (folder / "kept").exists()

        assert run("init", "--embedded", data_dir).exit_code == 0
        file = folder / "events.ndjson"
        file.write_bytes(b"".join(demo_lines(30)))
        assert run("import", str(file), "--embedded", data_dir).exit_code == 0
        read = run("read", "--limit", "20", "--embedded", data_dir)
        assert len(read.stdout_bytes.splitlines()) == 20
        missing = run("status", "--embedded", data_dir, "--database", "nothing")
        assert missing.exit_code == 1
        assert '"nothing" does not exist' in missing.stderr

        # Without DIR, where the option stands last.
        monkeypatch.setattr(cli_common, "default_data_dir", lambda name: Path(data_dir))
        assert run("status", "--embedded").exit_code == 0
    finally:
        shutil.rmtree(folder)
