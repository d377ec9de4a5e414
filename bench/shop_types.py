"""Event types for the demo's shop. Prices are read as decimals."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from uuid import UUID

from hindsight_fast import EventType


@dataclass(frozen=True, slots=True)
class Address:
    street: str
    postal_code: str
    city: str
    country: str


@dataclass(frozen=True, slots=True)
class CustomerRegisteredV0:
    name: str
    email: str
    address: Address
    newsletter: bool


@dataclass(frozen=True, slots=True)
class CustomerRegistered:
    name: str
    email: str
    address: Address
    newsletter: bool
    language: str | None


@dataclass(frozen=True, slots=True)
class Account:
    number: int
    name: str


@dataclass(frozen=True, slots=True)
class LedgerPosted:
    entry: int
    account: Account
    order: int
    amount: Decimal
    currency: str
    balance: Decimal
    text: str


@dataclass(frozen=True, slots=True)
class Requester:
    role: str
    id: UUID | None


@dataclass(frozen=True, slots=True)
class OrderCancelled:
    order: int
    reason: str
    refund: Decimal | None
    requested_by: Requester
    restock: bool


@dataclass(frozen=True, slots=True)
class OrderPaid:
    order: int
    amount: Decimal
    currency: str
    method: str
    reference: str
    payer: str


@dataclass(frozen=True, slots=True)
class Line:
    sku: str
    title: str
    quantity: int
    price: Decimal


@dataclass(frozen=True, slots=True)
class OrderPlacedV0:
    order: int
    customer: UUID
    lines: list[Line]
    total: Decimal
    currency: str
    ship_to: Address


@dataclass(frozen=True, slots=True)
class Recipient:
    name: str | None
    address: Address


@dataclass(frozen=True, slots=True)
class OrderPlaced:
    order: int
    customer: UUID
    channel: str | None
    lines: list[Line]
    total: Decimal
    currency: str
    ship_to: Recipient
    gift_note: str | None


@dataclass(frozen=True, slots=True)
class Place:
    city: str
    country: str
    hub: str | None = None


@dataclass(frozen=True, slots=True)
class ParcelScanned:
    order: int
    parcel: str
    scan: int
    status: str
    carrier: str
    place: Place
    weight_kg: Decimal
    signature_required: bool


@dataclass(frozen=True, slots=True)
class PointsEarned:
    points: int
    order: int
    reason: str
    tier: str
    expires_after_days: int | None


@dataclass(frozen=True, slots=True)
class Shelf:
    warehouse: str
    aisle: str
    bin: str


@dataclass(frozen=True, slots=True)
class StockMoved:
    sku: str
    change: int
    on_hand: int
    reason: str
    order: int | None
    place: Shelf
    title: str


def no_language(v0: CustomerRegisteredV0) -> CustomerRegistered:
    return CustomerRegistered(v0.name, v0.email, v0.address, v0.newsletter, None)


def no_channel(v0: OrderPlacedV0) -> OrderPlaced:
    return OrderPlaced(
        v0.order, v0.customer, None, v0.lines, v0.total, v0.currency, Recipient(None, v0.ship_to), None
    )  # fmt: skip


def was_never_stored(v0: dict[str, Any]) -> Any:
    raise LookupError


SHOP_TYPES: tuple[EventType[Any], ...] = (
    EventType("customer_registered", (CustomerRegisteredV0, CustomerRegistered), [no_language]),
    EventType("ledger_posted", (dict, LedgerPosted), [was_never_stored]),
    EventType("order_cancelled", (OrderCancelled,)),
    EventType("order_paid", (dict, OrderPaid), [was_never_stored]),
    EventType("order_placed", (OrderPlacedV0, OrderPlaced), [no_channel]),
    EventType("parcel_scanned", (dict, ParcelScanned), [was_never_stored]),
    EventType("points_earned", (PointsEarned,)),
    EventType("stock_moved", (StockMoved,)),
)
