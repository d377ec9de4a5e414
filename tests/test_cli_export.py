"""hindsight export: lines where they are wanted, the report where it does not disturb them, and how it ends early."""

from __future__ import annotations

import gzip
import io
import json
import os
import pty
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from command_line import forget_database, run, run_apart, started
from hindsight_fast import EventStore, stream_uuid
from hindsight_fast.demo_events import demo_lines


@pytest.fixture(autouse=True)
def no_database_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_database(monkeypatch)


@pytest.fixture
def store(database: str) -> Iterator[EventStore]:
    """A store with 3,000 events of the demo: more than a pipe holds."""
    with EventStore(database) as store:
        store.create_schema()
        store.import_events(demo_lines(3_000), import_id="shop")
        yield store


@pytest.fixture
def lines(store: EventStore) -> list[bytes]:
    target = io.BytesIO()
    store.export_events(target)
    return target.getvalue().splitlines(keepends=True)


@pytest.mark.essential
def test_what_export_writes_import_takes(database: str, store: EventStore, lines: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "all.ndjson.gz"
    done = run("export", "-o", str(path), "--dsn", database)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("3,000 events exported, ")
    assert f"last cursor {store.head()}" in done.stdout
    assert "exporting" in done.stderr
    assert gzip.decompress(path.read_bytes()) == b"".join(lines)

    assert run("init", "--dsn", database, "--schema", "copy").exit_code == 0
    assert run("import", str(path), "--dsn", database, "--schema", "copy").exit_code == 0
    assert run("export", "--dsn", database, "--schema", "copy").stdout_bytes == b"".join(lines)


def test_standard_output_has_the_lines_and_standard_error_the_report(
    database: str, store: EventStore, lines: list[bytes]
) -> None:
    for arguments in ((), ("-o", "-")):
        code, stdout, stderr = run_apart("export", *arguments, "--json", "--dsn", database)
        assert code == 0, stderr
        assert stdout == b"".join(lines)
        report = json.loads(stderr)  # a pipe gets nothing else there
        assert report.pop("seconds") > 0
        assert report == {"output": "-", "events": 3_000, "bytes": len(stdout), "last_cursor": str(store.head())}


def test_the_report_of_a_file_goes_to_standard_output(
    database: str, store: EventStore, lines: list[bytes], tmp_path: Path
) -> None:
    path = tmp_path / "all.ndjson"
    done = run("export", "--output", str(path), "--json", "--dsn", database)
    report = json.loads(done.stdout)
    assert (report["output"], report["events"], report["bytes"]) == (str(path), 3_000, len(b"".join(lines)))
    nothing = run("export", "--limit", "0", "-o", str(tmp_path / "none"), "--json", "--dsn", database)
    assert json.loads(nothing.stdout)["last_cursor"] is None
    assert "0 events exported" in run("export", "--limit", "0", "--dsn", database).stderr


def test_it_selects(database: str, store: EventStore, lines: list[bytes]) -> None:
    events = list(store.read())

    def export(*arguments: str) -> list[bytes]:
        result = run("export", "--dsn", database, *arguments)
        assert result.exit_code == 0, result.stderr
        return result.stdout_bytes.splitlines(keepends=True)

    def where(wanted: Any) -> list[bytes]:
        found = [line for line, event in zip(lines, events, strict=True) if wanted(event)]
        assert found
        return found

    middle, later = events[1_000].cursor, events[2_000].cursor
    assert export("--after", str(middle)) == lines[1_001:]
    assert export("--until", str(middle)) == lines[:1_001]
    assert export("--after", str(middle), "--until", str(later), "--limit", "900") == lines[1_001:1_901]
    paid = ("order_paid", "order_placed")
    assert export("--type", paid[0], "--type", paid[1]) == where(lambda event: event.name in paid)
    ledger = where(lambda event: event.stream_id == stream_uuid("ledger-USD"))
    assert export("--stream", "ledger-USD") == export("--stream", str(stream_uuid("ledger-USD"))) == ledger
    cause = next(event.correlation_id for event in events if event.correlation_id)
    assert export("--correlation-id", str(cause)) == where(lambda event: event.correlation_id == cause)


def test_a_file_that_is_there_is_replaced_only_by_force(database: str, store: EventStore, tmp_path: Path) -> None:
    path = tmp_path / "all.ndjson"
    path.write_bytes(b"precious")
    refused = run("export", "-o", str(path), "--dsn", database)
    assert refused.exit_code == 1
    assert refused.stderr.endswith(f"Error: {path} exists already; --force replaces it\n")
    assert path.read_bytes() == b"precious"
    assert run("export", "-o", str(path), "--force", "--dsn", database).exit_code == 0
    assert path.read_bytes().count(b"\n") == 3_000
    assert list(tmp_path.iterdir()) == [path]


def test_a_closed_pipe_is_no_error(database: str, store: EventStore, lines: list[bytes]) -> None:
    with started("export", "--dsn", database) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == lines[0]
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=30) == 0


def test_a_full_disk_is_an_error(database: str, store: EventStore) -> None:
    with open("/dev/full", "wb") as full:
        to_stdout = run_apart("export", "--dsn", database, stdout=full)
        a_little = run_apart("export", "--limit", "1", "--dsn", database, stdout=full)  # met only by the last flush
    for code, _, stderr in (to_stdout, a_little, run_apart("export", "-o", "/dev/full", "--dsn", database)):
        assert code == 1, stderr
        assert "No space left" in stderr
        assert "Traceback" not in stderr


def test_ctrl_c_says_that_the_last_line_may_be_cut_off(database: str, store: EventStore, lines: list[bytes]) -> None:
    with started("export", "--dsn", database) as process:
        assert process.stdout is not None
        # The rest does not fit into the pipe: it waits there until it is interrupted.
        assert process.stdout.readline() == lines[0]
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == 130, stderr
    assert b"Traceback" not in stderr
    assert b"Interrupted. The last line on stdout may be cut off; the same command starts anew." in stderr


def test_ctrl_c_leaves_no_file(
    database: str, store: EventStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "all.ndjson"

    def interrupted(*_arguments: object) -> Iterator[bytes]:
        yield b"half of it\n"
        assert [each.suffix for each in tmp_path.iterdir()] == [".part"]
        raise KeyboardInterrupt

    monkeypatch.setattr("hindsight_fast.exporter.export_lines", interrupted)
    done = run("export", "-o", str(path), "--dsn", database)
    assert done.exit_code == 130
    assert f"{path} is as it was before; the same command starts anew." in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_gets_a_live_bar(database: str, store: EventStore, lines: list[bytes], tmp_path: Path) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("ANALYZE hindsight.events")  # from now on it is known how many there are
    for arguments in (["-o", str(tmp_path / "all.ndjson")], []):
        try:
            ours, theirs = pty.openpty()
        except OSError:
            pytest.skip("this system gives no pseudo-terminals (/dev/pts is not mounted)")
        text = b""
        environment = {"TERM": "xterm", "COLUMNS": "100"}
        with (tmp_path / "stdout").open("wb") as stdout:
            with started(
                "export", *arguments, "--dsn", database, stdout=stdout, stderr=theirs, environment=environment
            ) as process:
                os.close(theirs)
                with suppress(OSError):  # EIO: the other end is closed
                    while part := os.read(ours, 65536):
                        text += part
                os.close(ours)
                assert process.wait(timeout=30) == 0, text
        shown = text.decode()
        assert "\x1b[" in shown
        assert "━" in shown
        assert "3,000 events" in shown
    assert (tmp_path / "stdout").read_bytes() == b"".join(lines)
