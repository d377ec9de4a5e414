"""Stored bytes into the application's own objects, and back: what types, checks and upcasts cost beside bare JSON."""

from __future__ import annotations

import functools
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


LINES = sum(len(order.lines) for order in NEW)


def _check(expected):
    def check(made):
        assert made == expected, "other objects"

    return check


def _count_lines(decode, stored):
    # None is kept: with 20,000 orders alive, Python's garbage collector took nine tenths of the time.
    return sum(len(decode(data).lines) for data in stored)


def _contender(name, decode, stored, expected):
    return Contender(name, lambda: _count_lines(decode, stored), COUNT, _check(LINES),
                     lambda: _check(expected)(list(map(decode, stored))))  # fmt: skip


def _orjson(stored):
    name = "orjson.loads, into dicts that nothing checks"
    return Contender(name, lambda: sum(len(orjson.loads(data)["lines"]) for data in stored), COUNT, _check(LINES))


def bench_decode_typed(benchmark):
    stored = [order_placed.encode(order) for order in NEW]
    compare(
        benchmark,
        _contender("EventType.decode of the latest version", functools.partial(order_placed.decode, 3), stored, NEW),
        _contender("floor: msgspec into the same class", msgspec.json.Decoder(Order).decode, stored, NEW),
        _orjson(stored),
        rounds=2 * ROUNDS,
        unit="payloads",
        checked="once before: every object against the one that was encoded; every turn: how many lines all have",
    )


def bench_decode_and_upcast(benchmark):
    stored = [msgspec.json.encode(order) for order in OLD]
    expected = [add_time(add_total(add_currency(order))) for order in OLD]
    bare = msgspec.json.Decoder(OrderV0).decode
    compare(
        benchmark,
        _contender("EventType.decode of version 0, three upcasts", functools.partial(order_placed.decode, 0), stored,
                   expected),
        _contender("msgspec and the three functions, by hand",
                   lambda data: add_time(add_total(add_currency(bare(data)))), stored, expected),
        _contender("floor: msgspec into version 0, no upcast", bare, stored, OLD),
        _orjson(stored),
        rounds=2 * ROUNDS,
        unit="payloads",
        checked="once before: every object against the three functions by hand; every turn: how many lines all have",
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
