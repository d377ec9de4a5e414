"""The demo: its events are the same everywhere, its numbers stand behind a check, and the check bites."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from hashlib import sha256
from itertools import islice, pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from click.testing import CliRunner

from conftest import root_for_servers
from hindsight_fast import EventStore, demo, stream_uuid
from hindsight_fast.cli import commands
from hindsight_fast.demo import DemoCheckFailed, check_events, import_events, read_all, run_demo, write_events
from hindsight_fast.demo_events import START, DemoEvent, demo_events, demo_lines
from hindsight_fast.embedded import EmbeddedServer
from hindsight_fast.installations import Installation

COUNT = 2_000


# --- The generator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "seed", "digest"),
    [
        (20_000, 0, "b238e6251eb26a029ca6e1f2d0b9cd77897be046d0d9d79dfc7d7bebd991232d"),
        (2_000, 1, "960ce625569ba1d7d6fe4b68aab0292d70a59a0a2917e1c1ea65aab326f40c56"),
    ],
)
def test_a_seed_gives_the_same_bytes_for_ever(count: int, seed: int, digest: str) -> None:
    assert sha256(b"".join(demo_lines(count, seed))).hexdigest() == digest


def test_a_smaller_count_gives_a_prefix() -> None:
    assert list(demo_lines(500)) == list(islice(demo_lines(5_000), 500))


@pytest.fixture(scope="module")
def many_events() -> list[DemoEvent]:
    return list(demo_events(100_000))


def test_lines_and_expected_events_say_the_same() -> None:
    for line, event in zip(demo_lines(5_000), demo_events(5_000), strict=True):
        assert line.endswith(b"}\n")
        assert event.data in line
        fields = json.loads(line)
        text = fields["stream"]
        assert event.stream_id == (UUID(text) if "-" in text[8:9] and len(text) == 36 else stream_uuid(text))
        assert (event.type.decode(), event.version) == (fields["type"], fields.get("version", 0))
        assert json.loads(event.data) == fields["data"]
        assert event.created_at == datetime.fromisoformat(fields["time"])
        correlation_id = fields.get("correlation_id")
        assert event.correlation_id == (None if correlation_id is None else UUID(correlation_id))
        assert (None if event.metadata is None else json.loads(event.metadata)) == fields.get("metadata")


def test_the_proportions_are_those_of_a_busy_shop(many_events: list[DemoEvent]) -> None:
    total = len(many_events)
    streams = Counter(event.stream for event in many_events)
    assert total / 30 < len(streams) < total / 10
    hottest = [count / total for _, count in streams.most_common(20)]
    assert 0.04 < hottest[0] < 0.12
    assert sum(share > 0.01 for share in hottest) >= 4
    assert any(len(stream) == 36 for stream in streams)
    assert any(stream.startswith(b"order-") for stream in streams)
    types = Counter(event.type for event in many_events)
    assert 6 <= len(types) <= 8
    assert all(count > total / 1_000 for count in types.values())
    assert {event.version for event in many_events} == {0, 1}
    assert 180 <= sum(len(event.data) for event in many_events) / total <= 300
    assert 0.3 < sum(event.correlation is not None for event in many_events) / total < 0.9
    assert 0.2 < sum(event.metadata is not None for event in many_events) / total < 0.8


def test_texts_are_of_many_scripts_and_payloads_nested(many_events: list[DemoEvent]) -> None:
    text = b"".join(event.data for event in many_events).decode()
    for name in (
        "Öztürk",
        "Ελένη",
        "Київ",
        "山田",
        "𠮷野",
        "김민준",
        "محمد",
        "יעל",
        "आरव",
        "முருகன்",
        "Conceição",
        "🎂",
        "👨‍👩‍👧‍👦",
    ):
        assert name in text
    placed = [json.loads(event.data) for event in many_events if event.type == b"order_placed"]
    assert {len(order["lines"]) for order in placed} == {1, 2, 3, 4, 5}
    assert all(order["ship_to"] for order in placed)


def test_times_rise(many_events: list[DemoEvent]) -> None:
    assert many_events[0].created_at >= START
    assert all(one.time_ms <= other.time_ms for one, other in pairwise(many_events))


def test_an_order_is_placed_before_it_is_paid_and_paid_before_it_is_sent(many_events: list[DemoEvent]) -> None:
    before: dict[bytes, list[bytes]] = {}
    for event in many_events:
        story = before.setdefault(event.stream, [])
        if event.stream.startswith(b"order-"):
            match event.type:
                case b"order_placed":
                    assert not story
                case b"order_paid" | b"order_cancelled":
                    assert story == [b"order_placed"]
                case b"parcel_scanned":
                    assert story[:2] == [b"order_placed", b"order_paid"]
                case other:
                    raise AssertionError(f"{other!r} in a stream of an order")
        elif event.type == b"customer_registered":
            assert not story
        story.append(event.type)


# --- The check ------------------------------------------------------------------------------------------------------


def store_demo(database: str, folder: Path, count: int) -> EventStore:
    """Return an open store with the demo's events in it."""
    path = folder / "events.ndjson"
    with path.open("wb") as file:
        size = write_events(file, count)
    assert size == path.stat().st_size
    store = EventStore(database).open()
    store.create_schema()
    assert import_events(store, path, count, size) > 0
    return store


@pytest.mark.essential
def test_what_was_imported_passes_the_check(database: str, tmp_path: Path) -> None:
    with store_demo(database, tmp_path, COUNT) as store:
        assert read_all(store, COUNT, lambda events: None) > 0
        checked = check_events(store, COUNT)
    assert checked.events == COUNT
    assert checked.streams == len({event.stream for event in demo_events(COUNT)})
    assert checked.data_bytes == sum(len(event.data) for event in demo_events(COUNT))


AT_777 = "WHERE (transaction_no, sequence_no) = (SELECT transaction_no, sequence_no FROM hindsight.events ORDER BY 1, 2 OFFSET 776 LIMIT 1)"  # noqa: E501
OTHER_UUID = "'11111111-2222-4333-8444-555555555555'"


@pytest.mark.parametrize(
    ("damage", "field", "number"),
    [
        pytest.param(f"UPDATE hindsight.events SET {change} {AT_777}", field, 777, id=field)
        for change, field in {
            f"stream_id = {OTHER_UUID}": "stream id",
            "stream_version = stream_version + 100000": "stream version",
            "event_name = event_name || 'x'": "type",
            "event_version = event_version + 1": "version",
            # One space: the same JSON, other bytes.
            "payload = (payload::text || ' ')::json": "data",
            "created_at = created_at + interval '1 microsecond'": "time",
            f"correlation_id = {OTHER_UUID}": "correlation id",
            """metadata = '{"a": 1}'""": "metadata",
            f"event_id = {OTHER_UUID}": "event id",
        }.items()
    ]
    + [
        # The next event takes its place; 778 events on, all would be shifted.
        pytest.param(f"DELETE FROM hindsight.events {AT_777}", "stream id", 777, id="one is missing"),
        pytest.param(
            "DELETE FROM hindsight.events WHERE (transaction_no, sequence_no) ="
            " (SELECT transaction_no, sequence_no FROM hindsight.events ORDER BY 1 DESC, 2 DESC LIMIT 1)",
            "what follows", COUNT, id="the last is missing",
        ),
        pytest.param(
            "INSERT INTO hindsight.events SELECT transaction_no, sequence_no + 1, gen_random_uuid(), gen_random_uuid(),"
            " 0, null, created_at, event_name, event_version, payload, null"
            " FROM hindsight.events ORDER BY 1 DESC, 2 DESC LIMIT 1",
            "the log's end", COUNT + 1, id="one too many",
        ),
        pytest.param(
            f"UPDATE hindsight.stream_heads SET stream_version = stream_version + 1 WHERE stream_id ="
            f" '{stream_uuid('ledger-EUR')}'",
            f"the head of stream {stream_uuid('ledger-EUR')}", COUNT, id="a head",
        ),
    ],
)  # fmt: skip
def test_any_damage_is_found_and_its_place_named(
    database: str, tmp_path: Path, damage: str, field: str, number: int
) -> None:
    with store_demo(database, tmp_path, COUNT) as store:
        with psycopg.connect(database) as connection:
            assert connection.execute(damage).rowcount == 1
        with pytest.raises(DemoCheckFailed) as caught:
            check_events(store, COUNT)
    assert (caught.value.field, caught.value.number) == (field, number)
    assert f"event {number:,}" in str(caught.value)


def test_two_events_swapped_are_found(database: str, tmp_path: Path) -> None:
    with store_demo(database, tmp_path, COUNT) as store:
        with psycopg.connect(database) as connection:
            connection.execute("UPDATE hindsight.events SET sequence_no = -1 WHERE sequence_no = 10")
            connection.execute("UPDATE hindsight.events SET sequence_no = 10 WHERE sequence_no = 11")
            connection.execute("UPDATE hindsight.events SET sequence_no = 11 WHERE sequence_no = -1")
        with pytest.raises(DemoCheckFailed) as caught:
            check_events(store, COUNT)
    assert caught.value.number == 11


def test_a_short_read_gets_no_number(database: str, tmp_path: Path) -> None:
    with store_demo(database, tmp_path, 100) as store:
        with pytest.raises(DemoCheckFailed, match="number of events read"):
            read_all(store, 101, lambda events: None)


# --- The whole ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(installation: Installation, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which demos can be made; unlike tmp_path, the server's account can get there."""
    monkeypatch.setenv("HINDSIGHT_PG_BIN", str(installation.bin_dir))
    path = Path(root_for_servers() or tempfile.gettempdir(), f"hindsight-test-{os.urandom(6).hex()}")
    path.mkdir()
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.mark.essential
def test_the_demo_runs_twice_and_touches_no_other_database(folder: Path) -> None:
    data_dir = folder / "data"
    with EmbeddedServer(data_dir) as server, psycopg.connect(server.conninfo) as connection:
        connection.execute("CREATE TABLE precious AS SELECT 1 AS number")
    outcomes = []
    for _ in range(2):
        result = CliRunner().invoke(
            commands, ["demo", "--events", str(COUNT), "--embedded", str(data_dir), "--json"], catch_exceptions=False
        )
        assert result.exit_code == 0, result.stderr
        outcomes.append(json.loads(result.stdout))
        assert "comparing" in result.stderr
    for outcome in outcomes:
        assert outcome["checked"] is True
        assert outcome["events"] == COUNT
        assert outcome["streams"] == len({event.stream for event in demo_events(COUNT)})
        for rate in ("import_events_per_s", "import_mb_per_s", "read_events_per_s", "read_mb_per_s"):
            assert outcome[rate] > 0
    file = folder / "data-demo-events.ndjson"
    assert outcomes[1]["file"] == str(file)
    assert file.read_bytes() == b"".join(demo_lines(COUNT))
    with EmbeddedServer(data_dir) as server:
        with psycopg.connect(server.conninfo) as connection:
            assert connection.execute("SELECT number FROM precious").fetchone() == (1,)
        with EventStore(server.conninfo_for("demo")) as store:
            assert check_events(store, COUNT).events == COUNT


def test_the_text_names_numbers_and_where_to_look(folder: Path) -> None:
    result = CliRunner().invoke(commands, ["demo", "--events", "300", "--embedded", str(folder / "demo")])
    assert result.exit_code == 0, result.stderr
    assert "events/s" not in result.stderr
    for expected in (
        "300 events in",
        "events/s",
        f"hindsight status --embedded {folder / 'demo'}",
        "psql",
        str(folder / "demo-events.ndjson"),
    ):
        assert expected in result.stdout
    # And what it says works: also without the name of the database.
    looked = CliRunner().invoke(commands, ["status", "--embedded", str(folder / "demo"), "--json"])
    assert looked.exit_code == 0, looked.stderr
    status = json.loads(looked.stdout)
    assert status["estimated_events"] == 300
    assert status["imports"][0]["finished"] is True


def test_no_number_is_shown_for_damaged_events(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    intact = demo.import_events

    def import_and_damage(store: EventStore, *arguments: Any) -> float:
        seconds = intact(store, *arguments)
        with store.pool.connection() as connection:
            connection.execute("UPDATE hindsight.events SET created_at = created_at + '1 s' WHERE sequence_no = 41")
        return seconds

    monkeypatch.setattr(demo, "import_events", import_and_damage)
    for arguments in ([], ["--json"]):
        result = CliRunner().invoke(
            commands, ["demo", "--events", "300", "--embedded", str(folder / "demo"), *arguments]
        )
        assert result.exit_code == 1
        assert result.stdout == ""
        assert "CHECK FAILED at event 42 (at cursor 1:41): time should be" in result.stderr


def test_a_database_that_no_demo_made_is_left_alone(folder: Path) -> None:
    with EmbeddedServer(folder / "data") as server, psycopg.connect(server.conninfo, autocommit=True) as connection:
        connection.execute("CREATE DATABASE demo")
        result = CliRunner().invoke(commands, ["demo", "--events", "10", "--embedded", str(folder / "data")])
        assert result.exit_code == 1
        assert "no demo has made" in result.stderr
        assert connection.execute("SELECT 1 FROM pg_database WHERE datname = 'demo'").fetchone() == (1,)


def test_a_second_demo_on_the_same_folder_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    intact = demo.make_database
    refusals: list[str] = []

    def run_another_meanwhile(server: EmbeddedServer) -> None:
        monkeypatch.setattr(demo, "make_database", intact)
        with pytest.raises(demo.DemoError, match="another demo runs") as caught:
            run_demo(10, folder / "demo")
        refusals.append(str(caught.value))
        intact(server)

    monkeypatch.setattr(demo, "make_database", run_another_meanwhile)
    assert run_demo(500, folder / "demo").events == 500
    assert len(refusals) == 1


def test_the_file_of_events_is_no_link_to_elsewhere(folder: Path) -> None:
    precious = folder / "precious"
    precious.write_text("mine")
    (folder / "demo-events.ndjson").symlink_to(precious)
    result = CliRunner().invoke(commands, ["demo", "--events", "10", "--embedded", str(folder / "demo")])
    assert result.exit_code == 1
    assert precious.read_text() == "mine"


def test_ctrl_c_ends_the_demo_and_its_server(folder: Path) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from hindsight_fast.cli import main; main()",
            "demo",
            "--events",
            "10000000",
            "--embedded",
            str(folder / "demo"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("writing   "):
            break
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout == ""
    assert "Traceback" not in stderr
    assert f"hindsight demo --events 10000000 --embedded {folder / 'demo'}" in stderr
    assert not (folder / "demo" / "postmaster.pid").exists()


def test_the_default_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", "relative/is/ignored")
    assert demo.default_data_dir("demo") == tmp_path / ".local/share/hindsight-fast/demo"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    assert demo.default_data_dir("demo") == tmp_path / "xdg/hindsight-fast/demo"
    monkeypatch.delenv("XDG_DATA_HOME")

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(demo.DemoError, match="--embedded DIR"):
        demo.default_data_dir("demo")
