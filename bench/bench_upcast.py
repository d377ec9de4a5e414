"""Stored bytes into the application's own objects, and back: what types, checks and upcasts cost beside bare JSON."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from uuid import UUID

import msgspec
import orjson

from contenders import ROUNDS, Contender, compare
from hindsight_fast import EventType

COUNT = 20_000


@dataclass(frozen=True, slots=True)
class Line:
    sku: str
    quantity: int
    price: Decimal


@dataclass(frozen=True, slots=True)
class OrderV0:
    order_id: UUID
    customer: str
    lines: list[Line]


@dataclass(frozen=True, slots=True)
class OrderV1:
    order_id: UUID
    customer: str
    lines: list[Line]
    currency: str


@dataclass(frozen=True, slots=True)
class OrderV2:
    order_id: UUID
    customer: str
    lines: list[Line]
    currency: str
    total: Decimal


@dataclass(frozen=True, slots=True)
class Order:
    order_id: UUID
    customer: str
    lines: list[Line]
    currency: str
    total: Decimal
    placed_at: datetime | None


def add_currency(v0: OrderV0) -> OrderV1:
    return OrderV1(v0.order_id, v0.customer, v0.lines, "EUR")


def add_total(v1: OrderV1) -> OrderV2:
    total = sum((line.price * line.quantity for line in v1.lines), Decimal(0))
    return OrderV2(v1.order_id, v1.customer, v1.lines, v1.currency, total)


def add_time(v2: OrderV2) -> Order:
    return Order(v2.order_id, v2.customer, v2.lines, v2.currency, v2.total, None)


order_placed = EventType(
    "order_placed", versions=(OrderV0, OrderV1, OrderV2, Order), upcasts=[add_currency, add_total, add_time]
)


def _orders():
    chance = random.Random(1)
    for number in range(COUNT):
        lines = [
            Line(f"sku-{chance.randrange(1000)}", chance.randrange(1, 9), Decimal(chance.randrange(10_000)) / 100)
            for _ in range(chance.randrange(1, 4))
        ]
        order_id, customer = UUID(int=chance.getrandbits(128)), f"customer-{chance.randrange(5000)}"
        total = sum((line.price * line.quantity for line in lines), Decimal(0))
        placed_at = datetime(2024, 1, 1, tzinfo=UTC) + timedelta(seconds=number)
        yield OrderV0(order_id, customer, lines), Order(order_id, customer, lines, "EUR", total, placed_at)


OLD, NEW = map(list, zip(*_orders(), strict=True))


def _check(expected):
    def check(made):
        assert made == expected, "other objects"

    return check


def bench_decode_typed(benchmark):
    stored = [order_placed.encode(order) for order in NEW]
    bare = msgspec.json.Decoder(Order).decode
    decode = order_placed.decode
    compare(
        benchmark,
        Contender("EventType.decode of the latest version", lambda: [decode(3, data) for data in stored], COUNT,
                  _check(NEW)),
        Contender("floor: msgspec into the same class", lambda: list(map(bare, stored)), COUNT, _check(NEW)),
        Contender("orjson.loads, into dicts that nothing checks", lambda: list(map(orjson.loads, stored)), COUNT,
                  _check([orjson.loads(data) for data in stored])),
        rounds=2 * ROUNDS,
        unit="payloads",
        checked="every object against the one that was encoded",
    )  # fmt: skip


def bench_decode_and_upcast(benchmark):
    stored = [msgspec.json.encode(order) for order in OLD]
    expected = [add_time(add_total(add_currency(order))) for order in OLD]
    bare = msgspec.json.Decoder(OrderV0).decode
    decode = order_placed.decode
    compare(
        benchmark,
        Contender("EventType.decode of version 0, three upcasts", lambda: [decode(0, data) for data in stored], COUNT,
                  _check(expected)),
        Contender("msgspec and the three functions, by hand",
                  lambda: [add_time(add_total(add_currency(bare(data)))) for data in stored], COUNT, _check(expected)),
        Contender("floor: msgspec into version 0, no upcast", lambda: list(map(bare, stored)), COUNT, _check(OLD)),
        Contender("orjson.loads, into dicts that nothing checks", lambda: list(map(orjson.loads, stored)), COUNT,
                  _check([orjson.loads(data) for data in stored])),
        rounds=2 * ROUNDS,
        unit="payloads",
        checked="every object against the three functions by hand",
    )  # fmt: skip


def bench_encode_typed(benchmark):
    expected = [msgspec.json.encode(order) for order in NEW]
    encode = order_placed.encode
    decode = msgspec.json.Decoder(Order).decode
    compare(
        benchmark,
        Contender("EventType.encode, which sees that it comes back", lambda: [encode(order) for order in NEW], COUNT,
                  _check(expected)),
        Contender("msgspec.json.encode", lambda: [msgspec.json.encode(order) for order in NEW], COUNT,
                  _check(expected)),
        Contender("orjson.dumps, decimals by str", lambda: [orjson.dumps(order, default=str) for order in NEW], COUNT,
                  lambda made: _check(NEW)([decode(data) for data in made])),
        rounds=2 * ROUNDS,
        unit="payloads",
        checked="the bytes against msgspec's; of orjson, which writes +00:00 for Z, what they decode to",
    )  # fmt: skip
