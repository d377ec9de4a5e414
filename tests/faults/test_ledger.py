"""The ledger is worth what it notices: each of its checks fails on what it is there for."""

from __future__ import annotations

from uuid import UUID, uuid4

import psycopg
import pytest

from hindsight_fast import ANY, Cursor, EventStore, StreamWrite
from ledger import Ledger, acknowledged, begun, event, failed
from rivals import Follower

A, B = UUID(int=1), UUID(int=2)

DAMAGES = {
    "an event is lost": ("DELETE FROM hindsight.events WHERE payload ->> 'token' = 'first/0'", "P1: first"),
    "an event is there twice": (
        "INSERT INTO hindsight.events SELECT transaction_no + 100, 0, gen_random_uuid(), gen_random_uuid(), 0, NULL,"
        " created_at, event_name, 0, payload, NULL FROM hindsight.events WHERE payload ->> 'token' = 'first/0'",
        "stored twice",
    ),
    "an event is nobody's": (
        "UPDATE hindsight.events SET payload = '{\"token\": \"?\"}' WHERE payload ->> 'token' = 'unknown/0'",
        "P2: stored, and appended by nobody",
    ),
    "an event has another id": (
        "UPDATE hindsight.events SET event_id = gen_random_uuid() WHERE payload ->> 'token' = 'first/1'",
        "P1: first",
    ),
    "an event stands elsewhere": (
        "UPDATE hindsight.events SET transaction_no = transaction_no + 100 WHERE payload ->> 'token' = 'second/0'",
        "was told another place",
    ),
    "events of an append are apart": (
        "UPDATE hindsight.events SET sequence_no = 7 WHERE payload ->> 'token' = 'first/0'",
        "does not stand one behind the other",
    ),
    "a version is left out": (
        "UPDATE hindsight.events SET stream_version = 7 WHERE payload ->> 'token' = 'unknown/0'",
        "P4: stream",
    ),
    "a head is ahead": ("UPDATE hindsight.stream_heads SET stream_version = 9", "P4: the heads"),
}


@pytest.fixture
def ledger(store: EventStore) -> Ledger:
    """Of an append of two events and one of one, which were acknowledged, and one of which nothing is known."""
    ledger = Ledger()
    for key, stream, count in (("first", A, 2), ("second", B, 1), ("unknown", A, 1)):
        write = StreamWrite(stream, [event(f"{key}/{n}") for n in range(count)], ANY)
        if key == "unknown":
            ledger.take(begun(key, [write]))
            store.transact([write])
        else:
            ledger.carry_out(key, [write], lambda write=write: store.transact([write]))
    return ledger


def test_what_agrees_passes(database: str, ledger: Ledger) -> None:
    assert [row.token for row in ledger.check(database)] == ["first/0", "first/1", "second/0", "unknown/0"]
    assert ledger.unknown() == ["unknown"]


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_each_damage_is_noticed(database: str, ledger: Ledger, damage: str, message: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        assert connection.execute(damage.encode()).rowcount
    with pytest.raises(AssertionError, match=message):
        ledger.check(database)


def test_what_was_refused_must_not_be_there(database: str, store: EventStore, ledger: Ledger) -> None:
    write = StreamWrite(uuid4(), [event("refused")], ANY)
    ledger.take(begun("refused", [write]))
    store.transact([write])
    ledger.take(failed("refused", ValueError("no")))
    with pytest.raises(AssertionError, match=r"P2: refused was refused \(ValueError\)"):
        ledger.check(database)


def test_what_is_unknown_is_there_whole_or_not_at_all(database: str, store: EventStore, ledger: Ledger) -> None:
    events = [event("half/0"), event("half/1")]
    ledger.take(begun("half", [StreamWrite(A, events, ANY)]))
    ledger.check(database)
    store.append(A, events[:1], expected=ANY)
    with pytest.raises(AssertionError, match="P2: half is half stored"):
        ledger.check(database)


def test_an_acknowledged_version_is_compared(database: str, store: EventStore, ledger: Ledger) -> None:
    write = StreamWrite(A, [event("told")], ANY)
    ledger.take(begun("told", [write]))
    record = acknowledged("told", store.transact([write]))
    ledger.take({**record, "versions": {str(A): 0}})
    with pytest.raises(AssertionError, match="P1: told was told another version"):
        ledger.check(database)


def test_a_follower_that_was_handed_something_else_fails(database: str, store: EventStore, ledger: Ledger) -> None:
    follower, rows = Follower(store), ledger.check(database)
    follower.look()
    follower.check(rows)
    seen = list(follower.seen)
    for wrong in (seen[:-1], [seen[1], seen[0], *seen[2:]], [*seen, seen[-1]], [(Cursor(1, 9), seen[0][1]), *seen[1:]]):
        follower.seen = wrong
        with pytest.raises(AssertionError, match="P3"):
            follower.check(rows)
