"""The events of a shop that does not exist: what ``hindsight demo`` imports, and reads back to compare.

Customers register; their orders are placed, reserve stock, are paid (or cancelled), posted to ledgers, shipped and
scanned on their way. Some hundreds of orders are open at a time, and each is a generator that tells its own story
step by step; which one takes the next step is drawn. So every stream's events come in an order that makes sense, and
the log interleaves them as a busy shop would. Ledgers and popular products are hot streams, orders are many and short.

The same *seed* gives the same bytes on every machine and every Python: all that is drawn comes from SHAKE-128, and
numbers are written by integer formats. A smaller count gives a prefix of a larger one. Memory does not grow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from hashlib import shake_128
from struct import Struct
from typing import Final, NamedTuple
from uuid import UUID

import orjson

from .streams import stream_uuid

START: Final = datetime(2024, 1, 1, tzinfo=UTC)
OPEN_ORDERS: Final = 512
PRODUCTS: Final = 1024


class DemoEvent(NamedTuple):
    """One event as it must come back: texts as UTF-8 bytes, the time in milliseconds since START."""

    stream: bytes
    type: bytes
    version: int
    data: bytes
    time_ms: int
    correlation: bytes | None
    metadata: bytes | None

    @property
    def stream_id(self) -> UUID:
        return _stream_id(self.stream)

    @property
    def created_at(self) -> datetime:
        return START + timedelta(milliseconds=self.time_ms)

    @property
    def correlation_id(self) -> UUID | None:
        return None if self.correlation is None else _uuid(self.correlation)


def demo_events(count: int, seed: int = 0) -> Iterator[DemoEvent]:
    """Give the first *count* events of the shop *seed*."""
    for (stream, name, version, data, correlation, metadata, _market), time_ms in _Shop(seed).events(count):
        yield DemoEvent(stream, name, version, data, time_ms, correlation, metadata)


def demo_lines(count: int, seed: int = 0) -> Iterator[bytes]:
    """Give the same events as lines of the import format, each with its newline."""
    hour_ms = 3_600_000
    seconds = [b"%02d:%02d." % divmod(second, 60) for second in range(3600)]
    hour = -1
    hours: list[bytes] = []
    for (stream, name, version, data, correlation, metadata, market), time_ms in _Shop(seed).events(count):
        if time_ms // hour_ms != hour:
            hour = time_ms // hour_ms
            hours = [(START + timedelta(hours=hour + offset)).isoformat()[:14].encode() for offset in _ZONES]
        second, millisecond = divmod(time_ms % hour_ms, 1000)
        zone = market.zone
        # As senders differ: what is 0, unknown or empty is left out.
        yield b'{"stream":"%b","type":"%b",%b"time":"%b%b%03d%b",%b"data":%b%b}\n' % (
            stream,
            name,
            b'"version":%d,' % version if version else b"",
            hours[zone],
            seconds[second],
            millisecond,
            _ZONE_TEXTS[zone],
            b'"correlation_id":"%b",' % correlation if correlation else b"",
            data,
            b',"metadata":%b' % metadata if metadata else b"",
        )


# --- The places and things of the shop ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Market:
    """A country with people in it; texts are JSON, without their quotes."""

    country: bytes
    language: bytes
    currency: bytes
    minor_units: int  # how many make one: 100 cents, or 1 yen
    zone: int  # index in _ZONES
    hub: bytes
    names: tuple[bytes, ...]
    streets: tuple[bytes, ...]
    cities: tuple[bytes, ...]


def _texts(words: str) -> tuple[bytes, ...]:
    return tuple(orjson.dumps(word)[1:-1] for word in words.split("|"))


_ZONES: Final = (0, 1, 2, 4, 9, -3, -5)  # hours ahead of UTC
_ZONE_TEXTS: Final = (b"Z", b"+01:00", b"+02:00", b"+04:00", b"+09:00", b"-03:00", b"-05:00")

_DE = Market(
    b"DE", b"de", b"EUR", 100, 1, b"HAM-2",
    _texts("Jürgen Müller|Anna-Lena Weiß|Grete Öztürk|Björn Schäfer|Mia Hoffmann|Søren Petersen"),
    _texts("Königstraße|Am Großen Markt|Lindenallee|Straße des 17. Juni"),
    _texts("Köln|München|Lübeck|Görlitz"),
)  # fmt: skip
_FR = Market(
    b"FR", b"fr", b"EUR", 100, 1, b"LYS-1",
    _texts("Zoé Lefèvre|Loïc Guérin|Anaïs d'Aubigné|François Œillet|Noël Garçon"),
    _texts("rue de l'Église|boulevard Saint-Michel|allée des Chênes"),
    _texts("Orléans|Besançon|Nîmes"),
)  # fmt: skip
_GR = Market(
    b"GR", b"el", b"EUR", 100, 2, b"ATH-1",
    _texts("Ελένη Παπαδοπούλου|Γιώργος Νικολάου|Μαρία Ιωάννου|Δημήτρης Αγγελόπουλος"),
    _texts("Οδός Ερμού|Λεωφόρος Αλεξάνδρας|Πλατεία Ομονοίας"),
    _texts("Αθήνα|Θεσσαλονίκη|Ηράκλειο"),
)  # fmt: skip
_US = Market(
    b"US", b"en", b"USD", 100, 6, b"EWR-4",
    _texts('Grace O\'Neill|William "Bill" Carter|Aaliyah Johnson|José Ramírez|Mary-Jane Smith|Sam Begay'),
    _texts("Main Street|Martin Luther King Jr. Boulevard|5th Avenue|Old Mill Road \\ Suite B"),
    _texts("Springfield|New York|Coeur d'Alene|Cañon City"),
)  # fmt: skip
_JP = Market(
    b"JP", b"ja", b"JPY", 1, 4, b"NRT-1",
    _texts("山田 太郎|佐藤 花子|鈴木 一郎|𠮷野 さくら|タナカ ケン"),
    _texts("千代田区丸の内|渋谷区神南|中央区銀座"),
    _texts("東京都|大阪市|札幌市"),
)  # fmt: skip
_KR = Market(
    b"KR", b"ko", b"KRW", 1, 4, b"ICN-1",
    _texts("김민준|이서연|박지훈|최유진"),
    _texts("세종대로|강남대로|해운대로"),
    _texts("서울특별시|부산광역시"),
)  # fmt: skip
_UA = Market(
    b"UA", b"uk", b"UAH", 100, 2, b"KBP-1",
    _texts("Олена Шевченко|Андрій Коваленко|Ївга Щербак|Мар'яна Ґудзь"),
    _texts("вулиця Хрещатик|проспект Свободи|Соборна площа"),
    _texts("Київ|Львів|Одеса"),
)  # fmt: skip
_AE = Market(
    b"AE", b"ar", b"AED", 100, 3, b"DXB-1",
    _texts("فاطمة الزهراء|محمد عبد الله|ليلى حسن|יעל כהן"),
    _texts("شارع الشيخ زايد|شارع الكورنيش"),
    _texts("دبي|أبو ظبي"),
)  # fmt: skip
_IN = Market(
    b"IN", b"hi", b"INR", 100, 0, b"BOM-3",
    _texts("आरव शर्मा|प्रिया पटेल|தமிழ்செல்வி முருகன்|রবি ঠাকুর"),
    _texts("महात्मा गांधी मार्ग|नेहरू रोड|அண்ணா சாலை"),
    _texts("मुंबई|दिल्ली|சென்னை"),
)  # fmt: skip
_BR = Market(
    b"BR", b"pt", b"BRL", 100, 5, b"GRU-2",
    _texts("João da Conceição|Luíza Araújo|Inês Magalhães|Tomé Guimarães"),
    _texts("Rua São João|Avenida Atlântica|Praça da Sé"),
    _texts("São Paulo|Brasília|Maceió"),
)  # fmt: skip
# As often as they stand here: one of 16.
_MARKETS: Final = (_DE, _DE, _DE, _FR, _FR, _GR, _US, _US, _US, _JP, _JP, _KR, _UA, _AE, _IN, _BR)

_TITLES: Final = _texts(
    "Notebook, dotted, A5|Füllfederhalter »Schwan«|Bouteille isotherme 0,5 l|茶碗 (青)|머그컵 350ml|Κούπα καφέ|"
    "Вишита сорочка|مصباح مكتب|चाय का प्याला|Cafeteira italiana ☕|USB-C cable 2 m|Desk lamp \"Noor\" 💡|"
    "Rucksack 20 l|Savon de Marseille 🧼|風呂敷 90 cm|Wool socks, size 42–44"
)  # fmt: skip
_GIFT_NOTES: Final = _texts(
    "Alles Gute zum Geburtstag! 🎂|お誕生日おめでとう 🎉|With love,\n\tGrandma 👵🏽|Χρόνια πολλά!|عيد ميلاد سعيد 🎈|"
    "She said: \"no gifts\" – here is one 😉|Bonne fête, maman ❤️|👨‍👩‍👧‍👦"
)  # fmt: skip
_CHANNELS: Final = (b"web", b"web", b"web", b"web", b"app", b"app", b"phone", b"market")
_AGENTS: Final = (b"Firefox/121.0", b"Chrome/120.0", b"Safari/17.2", b"ShopApp/8.4 (Android 14)")
_METHODS: Final = (b"card", b"card", b"transfer", b"wallet")
_CARRIERS: Final = (b"Swift Post", b"Parcel & Sons", b"Kurier 24", b"La Colombe")


# --- What happens ---------------------------------------------------------------------------------------------------

_CUSTOMER_REGISTERED_V0: Final = b'{"name":"%b","email":"customer.%d@example.org","address":%b,"newsletter":%b}'
_CUSTOMER_REGISTERED: Final = (
    b'{"name":"%b","email":"customer.%d@example.org","address":%b,"newsletter":%b,"language":"%b"}'
)
_POINTS_EARNED: Final = b'{"points":%d,"order":%d,"reason":"order delivered","tier":"%b","expires_after_days":730}'
_ADDRESS: Final = b'{"street":"%b %d","postal_code":"%05d","city":"%b","country":"%b"}'
_LINE: Final = b'{"sku":"P-%04d","title":"%b","quantity":%d,"price":%b}'
_ORDER_PLACED_V0: Final = b'{"order":%d,"customer":"%b","lines":[%b],"total":%b,"currency":"%b","ship_to":%b}'
_ORDER_PLACED: Final = (
    b'{"order":%d,"customer":"%b","channel":"%b","lines":[%b],"total":%b,"currency":"%b",'
    b'"ship_to":{"name":"%b","address":%b},"gift_note":%b}'
)
_ORDER_PAID: Final = b'{"order":%d,"amount":%b,"currency":"%b","method":"%b","reference":"PAY-%010d","payer":"%b"}'
_ORDER_CANCELLED: Final = (
    b'{"order":%d,"reason":"%b","refund":null,"requested_by":{"role":"customer","id":"%b"},"restock":true}'
)
_STOCK_MOVED: Final = (
    b'{"sku":"P-%04d","change":%d,"on_hand":%d,"reason":"%b","order":%d,'
    b'"place":{"warehouse":"%b","aisle":"%02d","bin":"%02d-%d"},"title":"%b"}'
)
_LEDGER_POSTED: Final = (
    b'{"entry":%d,"account":{"number":%d,"name":"%b"},"order":%d,"amount":%b,"currency":"%b","balance":%b,'
    b'"text":"%b %d / %b"}'
)
_PARCEL_SCANNED: Final = (
    b'{"order":%d,"parcel":"%018d","scan":%d,"status":"%b","carrier":"%b",'
    b'"place":{"hub":"%b","city":"%b","country":"%b"},"weight_kg":%d.%03d,"signature_required":false}'
)
_CLIENT: Final = b'{"source":"checkout","agent":"%b","address":"198.51.100.%d","attempt":%d}'
_DEVICE: Final = b'{"device":"scanner-%03d","battery":%d}'
_POSTED_BY: Final = b'{"source":"billing","batch":%d}'

_ACCOUNTS: Final = ((1400, b"receivables"), (4400, b"revenue"), (3806, b"tax"), (1800, b"bank"))

# What an order yields: stream, type, version, data, correlation id, metadata, and the market where it happened.
_Step = tuple[bytes, bytes, int, bytes, bytes | None, bytes | None, Market]


class _Shop:
    """The whole world of one seed; its state is a fixed number of integers and the open orders."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._draw: Callable[[], int] = _random_words(seed).__next__
        self._order_count = 0
        self._customer_count = 0
        self._stock = [500] * PRODUCTS
        self._entries = {market.currency: 0 for market in _MARKETS}
        self._balances = {market.currency: 0 for market in _MARKETS}

    def events(self, count: int) -> Iterator[tuple[_Step, int]]:
        """Give *count* events, each with its time in milliseconds since START."""
        draw = self._draw
        open_orders = [self._order() for _ in range(4)]
        time_ms = 0
        for number in range(count):
            if number % 64 == 63 and len(open_orders) < OPEN_ORDERS:
                open_orders.append(self._order())
            word = draw()
            time_ms += word >> 48  # up to 65.5 s: a year has about a million events
            which = (word & 0xFFFFFFFF) % len(open_orders)
            step = next(open_orders[which], None)
            if step is None:
                open_orders[which] = self._order()
                step = next(open_orders[which])
            yield step, time_ms

    def _order(self) -> Iterator[_Step]:
        """Tell the story of one order, of about 22 events."""
        draw = self._draw
        word = draw()
        self._order_count += 1
        order = 1000 + self._order_count
        stream = b"order-%d" % order
        # A fifth of all orders brings a new customer; an old one keeps market, name and address.
        is_new = word % 5 == 0 or not self._customer_count
        if is_new:
            self._customer_count += 1
        customer_no = self._customer_count if is_new else 1 + (word >> 8) % self._customer_count
        customer_id, traits = _customer(self._seed, customer_no)
        market = _MARKETS[traits % 16]
        customer = market.names[(traits >> 4) % len(market.names)]
        city = market.cities[(traits >> 20) % len(market.cities)]
        street = market.streets[(traits >> 12) % len(market.streets)]
        address = _ADDRESS % (
            street, 1 + (traits >> 28) % 199, (traits >> 36) % 100_000, city, market.country,
        )  # fmt: skip
        correlation = _uuid_text(draw(), draw()) if word >> 40 & 7 < 5 else None
        channel = _CHANNELS[word >> 43 & 7]
        client = _CLIENT % (_AGENTS[word >> 46 & 3], word >> 48 & 0xFF, 1 + (word >> 56) % 2)

        if is_new:
            newsletter = b"true" if traits >> 54 & 1 else b"false"
            if traits >> 55 & 7 == 0:
                data = _CUSTOMER_REGISTERED_V0 % (customer, customer_no, address, newsletter)
                yield customer_id, b"customer_registered", 0, data, correlation, client, market
            else:
                data = _CUSTOMER_REGISTERED % (customer, customer_no, address, newsletter, market.language)
                yield customer_id, b"customer_registered", 1, data, correlation, client, market

        lines = []
        total = 0
        for _ in range(1 + draw() % 5):
            word = draw()
            # The cube of an even draw: the first of 1,024 products is in a tenth of all lines, most are rare.
            product = (word & 1023) ** 3 >> 20
            quantity = 1 + (word >> 10 & 3)
            price = 290 + product * 37 % 9_000
            total += quantity * price
            lines.append((product, quantity, price))
        texts = b",".join(
            [
                _LINE % (product, _TITLES[product & 15], quantity, _money(price, market))
                for product, quantity, price in lines
            ]
        )
        if word >> 20 & 7 == 0:
            data = _ORDER_PLACED_V0 % (order, customer_id, texts, _money(total, market), market.currency, address)
            yield stream, b"order_placed", 0, data, correlation, None, market
        else:
            note = b'"%b"' % _GIFT_NOTES[word >> 23 & 7] if word >> 26 & 7 == 0 else b"null"
            data = _ORDER_PLACED % (
                order, customer_id, channel, texts, _money(total, market), market.currency, customer, address, note,
            )  # fmt: skip
            yield stream, b"order_placed", 1, data, correlation, client, market

        for product, quantity, _price in lines:
            yield self._stock_moved(product, -quantity, b"reserved", order, correlation, market)

        if word >> 30 & 15 == 0:
            reason = b"changed my mind" if word >> 34 & 1 else b"found it cheaper \xf0\x9f\xa4\xb7"
            data = _ORDER_CANCELLED % (order, reason, customer_id)
            yield stream, b"order_cancelled", 0, data, correlation, client, market
            for product, quantity, _price in lines:
                yield self._stock_moved(product, quantity, b"released", order, correlation, market)
            return

        method = _METHODS[word >> 35 & 3]
        paid = _money(total, market)
        data = _ORDER_PAID % (order, paid, market.currency, method, word >> 37 & 0x3FFFFFFF, customer)
        yield stream, b"order_paid", 1, data, correlation, None, market
        for account, account_name in _ACCOUNTS:
            yield self._ledger_posted(account, account_name, order, total, customer, correlation, market)

        for product, _quantity, _price in lines:
            yield self._stock_moved(product, 0, b"picked", order, correlation, market)

        word = draw()
        last_scan = 5 + word % 8
        weight = 200 + (word >> 8 & 0x1FFF)
        for scan in range(1, last_scan + 1):
            status = b"handed over" if scan == 1 else b"delivered" if scan == last_scan else b"in transit"
            data = _PARCEL_SCANNED % (
                order, word >> 24, scan, status, _CARRIERS[word >> 21 & 3], market.hub, city, market.country,
                *divmod(weight, 1000),
            )  # fmt: skip
            metadata = _DEVICE % (word >> (20 + scan) & 0x7F, 20 + 5 * scan) if scan & 1 else None
            yield stream, b"parcel_scanned", 1, data, correlation, metadata, market

        tier = b"gold \xe2\xad\x90" if total > 30_000 else b"basic"
        data = _POINTS_EARNED % (total // 100, order, tier)
        yield customer_id, b"points_earned", 0, data, correlation, None, market

    def _stock_moved(
        self, product: int, change: int, reason: bytes, order: int, correlation: bytes | None, market: Market
    ) -> _Step:
        on_hand = self._stock[product] + change
        if on_hand < 0:
            on_hand += 500  # refilled over night
        self._stock[product] = on_hand
        data = _STOCK_MOVED % (
            product, change, on_hand, reason, order,
            market.hub, product % 40, product % 24, product % 5, _TITLES[product & 15],
        )  # fmt: skip
        return b"product-P-%04d" % product, b"stock_moved", 0, data, correlation, None, market

    def _ledger_posted(
        self,
        account: int,
        account_name: bytes,
        order: int,
        amount: int,
        customer: bytes,
        correlation: bytes | None,
        market: Market,
    ) -> _Step:
        currency = market.currency
        entry = self._entries[currency] = self._entries[currency] + 1
        balance = self._balances[currency] = self._balances[currency] + amount
        data = _LEDGER_POSTED % (
            entry, account, account_name, order, _money(amount, market), currency, _money(balance, market),
            b"Invoice", order, customer,
        )  # fmt: skip
        return b"ledger-%b" % currency, b"ledger_posted", 1, data, correlation, _POSTED_BY % (entry // 100), market


def _money(amount: int, market: Market) -> bytes:
    """A JSON number with the currency's two decimals, or none: 129.90 must come back with its zero."""
    return b"%d.%02d" % divmod(amount, 100) if market.minor_units == 100 else b"%d" % amount


def _customer(seed: int, customer_no: int) -> tuple[bytes, int]:
    """Return the stream of a customer, a UUID, and 64 bits that decide all else; not stored, as customers are many."""
    words = _THREE_WORDS.unpack(shake_128(b"hindsight demo customer %d %d" % (seed, customer_no)).digest(24))
    return _uuid_text(words[0], words[1]), words[2]


_THREE_WORDS: Final = Struct("<3Q")
_BLOCK: Final = Struct("<8192Q")


def _random_words(seed: int) -> Iterator[int]:
    """Give even draws of 64 bits for ever. Not from ``random``: only part of that is promised to stay as it is."""
    block_no = 0
    while True:
        yield from _BLOCK.unpack(shake_128(b"hindsight demo %d %d" % (seed, block_no)).digest(_BLOCK.size))
        block_no += 1


def _uuid_text(high: int, low: int) -> bytes:
    """Return a UUIDv4 in its usual form."""
    high = high & ~0xF000 | 0x4000
    low = low & (1 << 62) - 1 | 1 << 63
    text = b"%016x%016x" % (high, low)
    return b"-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


# Twice the streams that are busy at a time; names cost a SHA-1 each.
@lru_cache(maxsize=4096)
def _stream_id(stream: bytes) -> UUID:
    text = stream.decode()
    return UUID(text) if len(text) == 36 else stream_uuid(text)  # no name of ours is that long


@lru_cache(maxsize=2048)
def _uuid(text: bytes) -> UUID:
    return UUID(text.decode())
