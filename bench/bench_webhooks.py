"""Reading real webhooks as typed payloads, against the same read as dicts: 200,000 events of six types, 9 kB each."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any, NamedTuple

import msgspec
import orjson
import psycopg
import pytest

from contenders import ROUNDS, Contender, compare
from datasets import EVENTS
from hindsight_fast import EventStore
from webhook_types import WEBHOOK_TYPES

COUNT = min(EVENTS, 200_000)
TARGET_OF_DICTS = 0.5


class Webhooks(NamedTuple):
    """A store of COUNT webhooks, opened with their types and without; the bodies, by name and stored bytes."""

    typed: EventStore
    plain: EventStore
    bodies: list[tuple[str, bytes]]

    @property
    def sender_sum(self) -> int:
        """The sum of all senders' numbers: whoever has it has decoded every payload."""
        senders = [json.loads(body)["sender"]["id"] for _, body in self.bodies]
        return sum(itertools.islice(itertools.cycle(senders), COUNT))


@pytest.fixture(scope="module")
def webhooks(server, real_webhooks) -> Iterator[Webhooks]:
    names = {each.name for each in WEBHOOK_TYPES}
    given = [msgspec.json.decode(line, type=dict[str, msgspec.Raw]) for line in real_webhooks]
    lines = [each for each in given if msgspec.json.decode(each["type"]) in names]
    bodies = [(msgspec.json.decode(each["type"]), bytes(each["data"])) for each in lines]
    turns = zip(range(COUNT), itertools.cycle(lines), strict=False)
    with psycopg.connect(server.conninfo, autocommit=True) as admin:
        admin.execute("CREATE DATABASE webhooks TEMPLATE template0")
        conninfo = server.conninfo_for("webhooks")
        with EventStore(conninfo, event_types=WEBHOOK_TYPES) as typed, EventStore(conninfo) as plain:
            typed.create_schema()
            typed.import_events(
                (b'{"stream":"%d","type":%s,"data":%s}' % (n % 5000, each["type"], each["data"]) for n, each in turns),
                import_id="webhooks",
            )
            with psycopg.connect(conninfo, autocommit=True) as connection:
                connection.execute("VACUUM (FREEZE, ANALYZE)")
                connection.execute("CHECKPOINT")
            yield Webhooks(typed, plain, bodies)
        admin.execute("DROP DATABASE webhooks WITH (FORCE)")


def _read_typed(store: EventStore) -> int:
    return sum(event.payload.sender.id for batch in store.read_batches() for event in batch)


def _read_dicts(store: EventStore) -> int:
    return sum(event.payload["sender"]["id"] for batch in store.read_batches() for event in batch)


def _read_by(store: EventStore, loads: Any) -> int:
    return sum(loads(event.data)["sender"]["id"] for batch in store.read_batches() for event in batch)


def _decode_by_hand(store: EventStore, decoders: dict[str, Any]) -> int:
    return sum(decoders[event.name](event.data).sender.id for batch in store.read_batches() for event in batch)


def _check(expected: int) -> Any:
    def check(found: int) -> None:
        assert found == expected, "other payloads"

    return check


def _verify(store: EventStore, bodies: list[tuple[str, bytes]], says: Any) -> Any:
    def verify() -> None:
        known: dict[tuple[str, bytes], Any] = {}
        count = 0
        events = (event for batch in store.read_batches() for event in batch)
        for event, body in zip(events, itertools.cycle(bodies), strict=False):
            assert (event.name, event.data) == body, "another event"
            if body not in known:
                assert says(event.payload, json.loads(event.data)), f"another payload of {event.name}"
                known[body] = event.payload
            assert event.payload == known[body], "another payload"
            count += 1
        assert count == COUNT, f"{count} events"

    return verify


def _says(payload: Any, stored: Any) -> bool:
    """Whether every field of a typed payload is what stands in the JSON; one that does not stand there, its default."""
    if dataclasses.is_dataclass(payload):
        return all(
            _says(getattr(payload, each.name), stored[each.name])
            if each.name in stored
            else not getattr(payload, each.name)
            for each in dataclasses.fields(payload)
        )
    if isinstance(payload, datetime):
        return payload == datetime.fromisoformat(stored)
    if isinstance(payload, list):
        return len(payload) == len(stored) and all(map(_says, payload, stored))
    return type(payload) is type(stored) and payload == stored


def bench_read_webhooks(benchmark, webhooks):
    typed, plain, bodies = webhooks
    decoders = {each.name: msgspec.json.Decoder(each.payload_type).decode for each in WEBHOOK_TYPES}
    check = _check(webhooks.sender_sum)
    size = sum(len(body) for _, body in bodies) / len(bodies)
    compare(
        benchmark,
        Contender(f"read_batches, typed payloads of {len(WEBHOOK_TYPES)} types", lambda: _read_typed(typed), COUNT,
                  check, _verify(typed, bodies, _says)),
        Contender("read_batches, payloads as dicts", lambda: _read_dicts(plain), COUNT, check,
                  _verify(plain, bodies, lambda payload, stored: payload == stored), target=TARGET_OF_DICTS),
        Contender("read_batches and orjson.loads of the data", lambda: _read_by(plain, orjson.loads), COUNT, check),
        Contender("floor: read_batches and msgspec into the same classes", lambda: _decode_by_hand(plain, decoders),
                  COUNT, check),
        rounds=ROUNDS,
        unit="events",
        checked="every turn: the sum of a field of every payload; once before: every field of every class against "
        "json.loads of the bytes that were imported",
        note=f"GitHub's webhooks, {size:,.0f} bytes each; the classes name 58 % of the values in them.",
    )  # fmt: skip


def bench_decode_webhooks(benchmark, real_webhooks):
    types = {each.name: each for each in WEBHOOK_TYPES}
    given = [msgspec.json.decode(line, type=dict[str, msgspec.Raw]) for line in real_webhooks]
    named = [(msgspec.json.decode(each["type"]), bytes(each["data"])) for each in given]
    bodies = [(types[name], data) for name, data in named if name in types]
    bare = [(msgspec.json.Decoder(event_type.payload_type).decode, data) for event_type, data in bodies]
    plain = msgspec.json.Decoder().decode
    turns = range(100)
    check = _check(sum(json.loads(data)["sender"]["id"] for _, data in bodies) * len(turns))
    count = len(bodies) * len(turns)

    def verify():
        for event_type, data in bodies:
            assert _says(event_type.decode(0, data), json.loads(data)), "another payload"
            assert plain(data) == orjson.loads(data) == json.loads(data), "another payload"

    compare(
        benchmark,
        Contender("EventType.decode",
                  lambda: sum(each.decode(0, data).sender.id for _ in turns for each, data in bodies), count, check,
                  verify),
        Contender("floor: msgspec into the same classes",
                  lambda: sum(decode(data).sender.id for _ in turns for decode, data in bare), count, check, verify),
        Contender("msgspec, into dicts that nothing checks",
                  lambda: sum(plain(data)["sender"]["id"] for _ in turns for _, data in bodies), count, check, verify,
                  target=TARGET_OF_DICTS),
        Contender("orjson.loads, into dicts that nothing checks",
                  lambda: sum(orjson.loads(data)["sender"]["id"] for _ in turns for _, data in bodies), count, check,
                  verify, target=TARGET_OF_DICTS),
        rounds=2 * ROUNDS,
        unit="payloads",
        checked="every turn: the sum of a field of every payload; once before: every field of every class, and every "
        "dict, against json.loads",
        note="Without a server: what decoding alone takes of the read above.",
    )  # fmt: skip
