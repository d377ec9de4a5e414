"""Decoding and upcasting all that is stored, through eight types of the demo's shop, and a sample of it."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg import sql

from contenders import ROUNDS, Contender, compare
from datasets import EVENTS, IMPORT_ID
from hindsight_fast import ANY, Cursor, EventStore, NewEvent
from hindsight_fast.schema_check import SchemaCheck
from shop_types import SHOP_TYPES

SAMPLE = 1_000
TARGET_OF_READING = 0.8
TARGET_OF_ALL = 3.0

# One of each kind of failure, between the demo's events and behind them.
BROKEN = (
    NewEvent("stock_moved", {"sku": 5}),
    NewEvent("order_placed", {"order": 1}, version=2),
    NewEvent("ledger_posted", {}, version=0),
)


class Checked(NamedTuple):
    """A store of the demo's events and some that cannot be read: where those stand, and how many of each kind."""

    typed: EventStore
    plain: psycopg.Connection
    broken: list[Cursor]
    counts: Counter[tuple[str, int]]


@pytest.fixture(scope="module")
def checked(server, demo_data) -> Iterator[Checked]:
    data = demo_data(EVENTS)
    with psycopg.connect(server.conninfo, autocommit=True) as admin:
        name = sql.Identifier("schema check")
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(name))
        conninfo = server.conninfo_for("schema check")
        with (
            EventStore(conninfo, event_types=SHOP_TYPES) as typed,
            psycopg.connect(conninfo, autocommit=True) as plain,
        ):
            typed.create_schema()
            typed.append(uuid.uuid4(), BROKEN, expected=ANY)
            typed.import_events(data.path, import_id=IMPORT_ID)
            typed.append(uuid.uuid4(), BROKEN, expected=ANY)
            plain.execute("VACUUM (FREEZE, ANALYZE)")
            plain.execute("CHECKPOINT")
            counts = Counter((row.event_name, row.event_version) for row in data.rows())
            counts.update(2 * [(event.name, event.version) for event in BROKEN])
            first, last = Cursor(1, 0), typed.head()
            assert last is not None
            broken = [Cursor(place.transaction_no, n) for place in (first, last) for n in range(len(BROKEN))]
            yield Checked(typed, plain, broken, counts)
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


def _check_all(store: EventStore) -> tuple[list[Cursor | None], dict[tuple[str, int], tuple[int, int]]]:
    return _check_some(store, None)


def _check_some(store: EventStore, sample: int | None) -> tuple[list[Any], dict[tuple[str, int], tuple[int, int]]]:
    check = SchemaCheck(store, sample=sample)
    failures = [error.cursor for error in check]
    return failures, {(each.name, each.version): (each.events, each.checked) for each in check.inventory}


def _read_payloads(store: EventStore, broken: list[Cursor]) -> int:
    count = 0
    for batch in store.read_batches(after=broken[len(BROKEN) - 1]):
        for event in batch:
            if event.cursor.transaction_no == broken[-1].transaction_no:
                return count
            event.payload  # noqa: B018 - decodes it
            count += 1
    return count


def _count_in_one_statement(connection: psycopg.Connection) -> dict[tuple[str, int], int]:
    rows = connection.execute("SELECT event_name, event_version, count(*) FROM hindsight.events GROUP BY 1, 2")
    return {(name, version): count for name, version, count in rows}


def _equals(expected: Any) -> Any:
    def check(found: Any) -> None:
        assert found == expected, "another answer"

    return check


def _check_sample(broken: list[Cursor], counts: Counter[tuple[str, int]]) -> Any:
    def check(found: Any) -> None:
        failures, inventory = found
        assert inventory == {kind: (count, min(count, SAMPLE)) for kind, count in counts.items()}, "another inventory"
        assert set(failures) <= set(broken), "failures that are none"
        # Of what is rare all is looked at.
        assert {broken[1], broken[2], broken[4], broken[5]} <= set(failures), "failures were missed"

    return check


def bench_check_all(benchmark, checked):
    store, _, broken, counts = checked
    whole = (broken, {kind: (count, count) for kind, count in counts.items()})
    total = counts.total()
    compare(
        benchmark,
        Contender("SchemaCheck of every event", lambda: _check_all(store), total, _equals(whole)),
        Contender("floor: read_batches, .payload through the same types", lambda: _read_payloads(store, broken),
                  total - len(broken), _equals(total - len(broken)), target=TARGET_OF_READING),
        rounds=ROUNDS,
        unit="events",
        checked="every turn: the inventory against counts from the imported lines, and the places of the events that "
        "cannot be read, of three kinds, at both ends of the log",
    )  # fmt: skip


def bench_check_sample(benchmark, checked):
    store, plain, broken, counts = checked
    whole = (broken, {kind: (count, count) for kind, count in counts.items()})
    total = counts.total()
    compare(
        benchmark,
        Contender(f"SchemaCheck, a sample of {SAMPLE:,} of each kind", lambda: _check_some(store, SAMPLE), total,
                  _check_sample(broken, counts)),
        Contender("SchemaCheck of every event", lambda: _check_all(store), total, _equals(whole),
                  target=TARGET_OF_ALL),
        Contender("floor: counted by one statement, under one snapshot", lambda: _count_in_one_statement(plain), total,
                  _equals(dict(counts))),
        rounds=ROUNDS,
        unit="events",
        checked="every turn: the inventory against counts from the imported lines, how many of each kind were decoded, "
        "and that all rare ones that cannot be read were found",
    )  # fmt: skip
