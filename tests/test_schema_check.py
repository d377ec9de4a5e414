"""Stored events read through the application's types before the application does: what fails is found, and where."""

from __future__ import annotations

import json
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import psycopg
import pytest

from command_line import run
from hindsight_fast import ANY, EventStore, EventType, NewEvent, schema_check
from hindsight_fast.cli_schema import load_event_types
from hindsight_fast.schema_check import MOST_BLOCKS, SchemaCheck, VersionCount


@dataclass(frozen=True)
class PlacedV0:
    n: int


@dataclass(frozen=True)
class Placed:
    n: int
    currency: str


def with_currency(v0: PlacedV0) -> Placed:
    if v0.n == 13:
        raise ValueError("nobody knows")
    return Placed(v0.n, "EUR")


placed = EventType("placed", (PlacedV0, Placed), [with_currency])
COUNT = 3_000

MODULE = """
from dataclasses import dataclass
from hindsight_fast import EventType

@dataclass
class Placed:
    n: int

placed = EventType("placed", (Placed,))
event_types = [placed]
nothing = 7
"""


def lines() -> Iterator[bytes]:
    """Of every ten events six are placed version 0, one version 1, one version 2, two of a name without a type."""
    for n in range(COUNT):
        kind = n % 10
        name, version = ("noted", 0) if kind > 7 else ("placed", max(kind - 5, 0))
        data = {"n": "a" if n == 20 else n, **({"currency": "USD"} if version else {})}
        yield json.dumps({"stream": f"s{n % 7}", "type": name, "version": version, "data": data}).encode()


@pytest.fixture
def store(database: str) -> Iterator[EventStore]:
    with EventStore(database, event_types=[placed]) as store:
        store.create_schema()
        store.import_events(lines(), import_id="a")
        yield store


@pytest.mark.essential
def test_every_event_is_checked_and_every_failure_told_with_its_place(store: EventStore) -> None:
    check = SchemaCheck(store)
    failures = list(check)
    events = {event.event_id: event for event in store.read()}
    assert [failure.cursor for failure in failures] == sorted(events[f.event_id].cursor for f in failures if f.event_id)
    assert Counter((failure.name, failure.version) for failure in failures) == {("placed", 0): 2, ("placed", 2): 300}
    wrong_type, upcast = (f for f in failures if f.version == 0)
    assert (upcast.path, wrong_type.path) in ((None, "$.n"), ("$.n", None))
    assert {f.reason.partition(":")[0] for f in failures if f.version == 2} == {
        "this program knows versions up to 1 only"
    }
    assert check.inventory == [
        VersionCount("noted", 0, False, 600, 600, 0),
        VersionCount("placed", 0, True, 1800, 1800, 2),
        VersionCount("placed", 1, True, 300, 300, 0),
        VersionCount("placed", 2, True, 300, 300, 300),
    ]


LOTS = """
    SELECT event_id FROM (
        SELECT *, row_number() OVER (
            PARTITION BY event_name, event_version ORDER BY uuid_hash(event_id), transaction_no, sequence_no
        ) AS lot FROM hindsight.events
    ) AS e WHERE lot <= %s ORDER BY transaction_no, sequence_no
"""


def checked_ids(store: EventStore, check: SchemaCheck, monkeypatch: pytest.MonkeyPatch) -> list[uuid.UUID]:
    """Which events a check decodes, in its order."""
    seen: list[uuid.UUID] = []
    decode = store._registry._decode
    with monkeypatch.context() as patched:
        patched.setattr(store._registry, "_decode", lambda event: (seen.append(event.event_id), decode(event))[1])
        list(check)
    return seen


@pytest.mark.essential
@pytest.mark.parametrize("blocks", [1, 7, MOST_BLOCKS])
@pytest.mark.parametrize("sample", [1, 50, 299, 10**6])
def test_a_sample_has_so_many_of_each_kind_drawn_by_lot(
    store: EventStore, monkeypatch: pytest.MonkeyPatch, blocks: int, sample: int
) -> None:
    monkeypatch.setattr(schema_check, "FIRST_BLOCKS", 1)
    monkeypatch.setattr(schema_check, "MOST_BLOCKS", blocks)
    monkeypatch.setattr(schema_check, "PROGRESS_S", -1.0)
    told: list[int] = []
    check = SchemaCheck(store, sample=sample, progress=told.append)
    seen = checked_ids(store, check, monkeypatch)
    with store.pool.connection() as connection:
        assert seen == [event_id for (event_id,) in connection.execute(LOTS, (sample,))]
    whole = SchemaCheck(store)
    list(whole)
    assert [(each.name, each.version, each.events) for each in check.inventory] == [
        (each.name, each.version, each.events) for each in whole.inventory
    ]
    assert [each.checked for each in check.inventory] == [min(sample, each.events) for each in whole.inventory]
    assert told == sorted(told)
    assert COUNT in told
    # The same ones when it is done again.
    assert checked_ids(store, check, monkeypatch) == seen


def test_a_sample_is_spread_over_the_whole_log(store: EventStore, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {event.event_id: number for number, event in enumerate(store.read())}
    sampled = [place[event_id] for event_id in checked_ids(store, SchemaCheck(store, sample=100), monkeypatch)]
    quarters = Counter(4 * number // COUNT for number in sampled)
    # 400 or so drawn: in a quarter of the log 100, give or take three standard deviations.
    assert all(70 <= quarters[quarter] <= 130 for quarter in range(4)), quarters


def test_failures_in_a_sample_are_those_that_all_of_them_would_be(store: EventStore) -> None:
    every = {failure.event_id for failure in SchemaCheck(store)}
    some = [failure.event_id for failure in SchemaCheck(store, sample=50)]
    assert len(some) >= 50  # version 2 cannot be read at all
    assert set(some) <= every
    assert [failure.event_id for failure in SchemaCheck(store, sample=10**6)] == [
        failure.event_id for failure in SchemaCheck(store)
    ]


def test_a_table_rewritten_while_it_is_counted_is_counted_anew(
    store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema_check, "FIRST_BLOCKS", 1)
    monkeypatch.setattr(schema_check, "MOST_BLOCKS", 3)
    monkeypatch.setattr(schema_check, "PROGRESS_S", -1.0)
    told: list[int] = []

    def rewrite_once(passed: int) -> None:
        told.append(passed)
        if len(told) == 5:
            with store.pool.connection() as connection:
                # Against the order of the log: so rows change their blocks.
                connection.execute("CREATE INDEX backwards ON hindsight.events (transaction_no DESC, sequence_no DESC)")
                connection.execute("CLUSTER hindsight.events USING backwards")

    check = SchemaCheck(store, sample=5, progress=rewrite_once)
    list(check)
    assert sum(each.events for each in check.inventory) == COUNT
    assert told.index(COUNT) > 5  # it did begin again
    assert sorted(told) != told


@pytest.mark.parametrize("sample", [None, 5])
def test_no_snapshot_is_held_beyond_a_page(
    store: EventStore, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch, sample: int | None
) -> None:
    """One that is held keeps VACUUM from its work for as long as a check of millions takes."""
    monkeypatch.setattr(schema_check, "FIRST_BLOCKS", 1)
    monkeypatch.setattr(schema_check, "MOST_BLOCKS", 3)
    monkeypatch.setattr(schema_check, "PROGRESS_S", -1.0)
    # No page is fetched ahead: each of its statements would be under way while it is looked at.
    monkeypatch.setattr("hindsight_fast.read_ahead.Pace.fetch_ahead", False)
    held: list[tuple[Any, ...]] = []

    def look(passed: int) -> None:
        held.extend(
            connection.execute(
                "SELECT state, backend_xmin FROM pg_stat_activity WHERE datname = current_database()"
                " AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
                " AND (backend_xmin IS NOT NULL OR state <> 'idle')"
            )
        )
        looked.append(passed)

    looked: list[int] = []
    list(SchemaCheck(store, sample=sample, progress=look))
    assert held == []
    assert len(looked) >= 2


def test_what_is_appended_meanwhile_is_not_counted(store: EventStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema_check, "MOST_BLOCKS", 3)
    monkeypatch.setattr(schema_check, "FIRST_BLOCKS", 1)
    monkeypatch.setattr(schema_check, "PROGRESS_S", -1.0)
    check = SchemaCheck(
        store,
        sample=5,
        progress=lambda passed: store.append(uuid.uuid4(), [NewEvent("noted", {"n": passed})], expected=ANY),
    )
    list(check)
    assert sum(each.events for each in check.inventory) == COUNT


@pytest.mark.parametrize(("sample", "passed"), [(None, COUNT), (5, COUNT + 20)])
def test_the_last_that_is_told_is_the_whole(store: EventStore, sample: int | None, passed: int) -> None:
    told: list[int] = []
    list(SchemaCheck(store, sample=sample, progress=told.append))
    assert told[-1] == passed


def test_a_sample_of_none_is_refused(store: EventStore) -> None:
    for sample, error in ((0, ValueError), (True, TypeError), (1.5, TypeError)):
        with pytest.raises(error, match="sample"):
            SchemaCheck(store, sample=sample)  # type: ignore[arg-type]


def test_an_empty_store_has_nothing_to_check(database: str) -> None:
    with EventStore(database) as store:
        store.create_schema()
        for sample in (None, 5):
            check = SchemaCheck(store, sample=sample)
            assert list(check) == []
            assert check.inventory == []


def test_a_plain_payload_that_cannot_be_decoded_is_found_too(store: EventStore) -> None:
    stream_id = uuid.uuid4()
    store.append(stream_id, [NewEvent("noted", {"n": 1})], expected=ANY)
    with store.pool.connection() as connection:
        connection.execute(
            """UPDATE hindsight.events SET payload = '{"n": 1e999}' WHERE stream_id = %s""", (stream_id,)
        )
    (failure,) = (f for f in SchemaCheck(store) if f.name == "noted")
    assert (failure.reason, failure.path) == ("Number out of range", "$[...]")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current folder."""
    name = f"types_{uuid.uuid4().hex}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return name


@pytest.mark.essential
def test_the_command_lists_failures_and_an_inventory(database: str, store: EventStore, module: str) -> None:
    done = run("schema", "check", "--types", f"{module}:event_types", "--dsn", database)
    assert done.exit_code == 1
    rows = done.stdout.splitlines()
    assert len([row for row in rows if "event" in row and ":" in row]) == 601
    assert any(row.split()[:5] == ["placed", "1", "300", "300", "300"] for row in rows)
    assert any("noted" in row and "no type of this name" in row for row in rows)
    assert "3,000 events checked, 601 failed" in done.stderr

    done = run("schema", "check", "--types", f"{module}:placed", "--sample", "20", "--json", "--dsn", database)
    assert done.exit_code == 1
    *failures, last = map(json.loads, done.stdout.splitlines())
    assert last["failed"] == len(failures)
    assert {(each["name"], each["version"]) for each in failures} == {("placed", 1), ("placed", 2)}
    assert sum(each["events"] for each in last["inventory"]) == COUNT


def test_a_store_in_order_exits_with_zero(database: str, module: str) -> None:
    with EventStore(database) as store:
        store.create_schema()
        store.append(uuid.uuid4(), [NewEvent("placed", {"n": 1})], expected=ANY)
    done = run("schema", "check", "--types", f"{module}:event_types", "--dsn", database)
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("nowhere", "MODULE:ATTRIBUTE"),
        (":x", "MODULE:ATTRIBUTE"),
        ("no_such_module_anywhere:x", "ModuleNotFoundError"),
        ("{module}:no_such", "no_such"),
        ("{module}:nothing", "holds int"),
    ],
)
def test_a_place_without_types_is_wrong_usage(module: str, place: str, what: str) -> None:
    with pytest.raises(click.BadParameter, match=what):
        load_event_types(place.format(module=module))
