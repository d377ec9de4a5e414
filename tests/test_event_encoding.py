"""Payloads come back as they are, or are refused with the path to the field; old stored bytes decode for ever."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, TypedDict
from uuid import UUID
from zoneinfo import ZoneInfo

import attrs
import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hindsight_fast import EventEncodeError, EventParseError, EventType, NewEvent
from hindsight_fast.payloads import PayloadCodec

PINNED = Path(__file__).parent / "golden" / "stored_bytes.txt"


class Colour(Enum):
    RED = "red"
    GREEN = "green"


class Size(IntEnum):
    SMALL = 1
    LARGE = 2


class Point(NamedTuple):
    x: int
    y: float


@dataclass(frozen=True, slots=True)
class Line:
    sku: str
    price: Decimal
    tags: list[str] = field(default_factory=list)


class Address(msgspec.Struct, frozen=True):
    street: str
    lines: list[Line]


@attrs.frozen
class Customer:
    name: str
    addresses: dict[str, Address]


class Options(TypedDict):
    gift: bool
    note: NotRequired[str]


class Card(msgspec.Struct, tag="card", frozen=True):
    number: str


class Cash(msgspec.Struct, tag="cash", frozen=True):
    given: Decimal


@dataclass(frozen=True, slots=True)
class Everything:
    """A field of every type that is supported."""

    uuid: UUID
    moment: datetime
    day: date
    clock: time
    span: timedelta
    price: Decimal
    colour: Colour
    size: Size
    number: int
    ratio: float
    flag: bool
    text: str
    data: bytes
    nothing: None
    maybe: str | None
    either: int | str | list[int]
    choice: Literal["a", "b", 3]
    items: list[int]
    row: tuple[int, ...]
    pair: tuple[str, bytes]
    point: Point
    unique: frozenset[int]
    by_name: dict[str, Line]
    by_number: dict[int, date]
    by_id: dict[UUID, bool]
    nested: Line
    struct: Address
    customer: Customer
    options: Options
    payment: Card | Cash
    anything: Any


texts = st.text()
moments = st.datetimes(
    timezones=st.just(UTC) | st.integers(-14 * 60, 14 * 60).map(lambda m: timezone(timedelta(minutes=m)))
)
decimals = st.decimals(allow_nan=False)
lines = st.builds(Line, sku=texts, price=decimals, tags=st.lists(texts, max_size=3))
addresses = st.builds(Address, street=texts, lines=st.lists(lines, max_size=2))
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
whole_numbers = st.integers() | st.sampled_from([2**31, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**300])
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "uuid": st.uuids(),
    "moment": moments,
    "day": st.dates(),
    "clock": st.times(),
    "span": st.timedeltas(),
    "price": decimals,
    "colour": st.sampled_from(Colour),
    "size": st.sampled_from(Size),
    "number": whole_numbers,
    "ratio": st.floats(allow_nan=False, allow_infinity=False),
    "flag": st.booleans(),
    "text": texts,
    "data": st.binary(),
    "nothing": st.none(),
    "maybe": st.none() | texts,
    "either": whole_numbers | texts | st.lists(whole_numbers, max_size=3),
    "choice": st.sampled_from(["a", "b", 3]),
    "items": st.lists(whole_numbers, max_size=3),
    "row": st.lists(whole_numbers, max_size=3).map(tuple),
    "pair": st.tuples(texts, st.binary()),
    "point": st.builds(Point, whole_numbers, st.floats(allow_nan=False, allow_infinity=False)),
    "unique": st.frozensets(whole_numbers, max_size=3),
    "by_name": st.dictionaries(texts, lines, max_size=2),
    "by_number": st.dictionaries(whole_numbers, st.dates(), max_size=2),
    "by_id": st.dictionaries(st.uuids(), st.booleans(), max_size=2),
    "nested": lines,
    "struct": addresses,
    "customer": st.builds(Customer, name=texts, addresses=st.dictionaries(texts, addresses, max_size=2)),
    "options": st.fixed_dictionaries({"gift": st.booleans()}, optional={"note": texts}),
    "payment": st.builds(Card, number=texts) | st.builds(Cash, given=decimals),
    "anything": plain,
}
everything = EventType("everything", (Everything,))


def test_every_field_has_a_strategy() -> None:
    assert list(FIELDS) == [each.name for each in dataclasses.fields(Everything)]


@given(st.builds(Everything, **FIELDS))
def test_whatever_is_stored_comes_back(payload: Everything) -> None:
    data = everything.encode(payload)
    back = everything.decode(0, data)
    assert back == payload
    assert repr(back.price) == repr(payload.price)  # 1.50 is not 1.5
    assert math.copysign(1, back.ratio) == math.copysign(1, payload.ratio)
    assert type(back.size) is Size
    assert everything.encode(back) == data or payload.unique  # a set has no order


@given(st.dictionaries(texts, plain, max_size=5))
@example({"n": 2**200, "f": 5e-324, "s": "\0\ufeff\U0010ffff", "": {"": []}})
def test_plain_dicts_come_back(payload: dict[str, Any]) -> None:
    event_type = EventType("plain", (dict,))
    assert event_type.decode(0, event_type.encode(payload)) == payload
    assert NewEvent("plain", payload).data == event_type.encode(payload)


# --- What would not come back -----------------------------------------------------------------------------------------


@dataclass
class Box:
    """One field of any type that a test asks for, three levels down."""

    content: Any


def boxed(of_type: Any) -> EventType[Any]:
    inner = dataclasses.make_dataclass("Inner", [("value", of_type)])
    outer = dataclasses.make_dataclass("Outer", [("inner", list[inner])])
    return EventType("boxed", (outer,))


def put(event_type: EventType[Any], value: Any) -> Any:
    """An object of the type with *value* at ``$.inner[1].value``; before it stands one like it, without a flaw."""
    outer = event_type.payload_type
    (inner,) = dataclasses.fields(outer)[0].type.__args__  # type: ignore[union-attr]
    return outer([inner(value)])


NAIVE = datetime(2024, 5, 1, 12, 30)
NAIVE_MICRO = datetime(2024, 5, 1, 12, 30, 0, 5)
CYCLE: dict[str, Any] = {}
CYCLE["again"] = CYCLE


class Sneaky(str):
    """Text that is equal to nothing."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("compared")

    __hash__ = str.__hash__


LOSSY: dict[str, tuple[Any, Any, str, str]] = {
    # of type, value, where below $.inner[0].value, why
    "nan": (float, math.nan, "", "is not a finite number"),
    "infinity": (float | None, math.inf, "", "is not a finite number"),
    "minus infinity in a dict": (dict[str, Any], {"a": [0.0, -math.inf]}, ".a[1]", "is not a finite number"),
    "decimal nan": (Decimal, Decimal("NaN"), "", "is not a number"),
    "signalling nan": (Decimal, Decimal("sNaN"), "", "is not a number"),
    "naive": (datetime, NAIVE, "", "is a datetime without a time zone"),
    "naive, microseconds": (datetime, NAIVE_MICRO, "", "is a datetime without a time zone"),
    "naive in a list": (list[datetime], [NAIVE.replace(tzinfo=UTC), NAIVE], "[1]", "is a datetime without a time zone"),
    "naive in a set": (set[datetime], {NAIVE}, "[…]", "is a datetime without a time zone"),
    "naive key": (dict[datetime, int], {NAIVE: 1}, f", the key {NAIVE!r},", "is a datetime without a time zone"),
    "naive in Any": (Any, NAIVE, "", "is a datetime without a time zone"),
    "offset of seconds": (datetime, NAIVE.replace(tzinfo=timezone(timedelta(seconds=30))), "", "would come back as"),
    "half a surrogate pair": (str, "a\ud800", "", "holds half of a surrogate pair"),
    "half a pair as a key": (dict[str, int], {"\udfff": 1}, "", "holds half of a surrogate pair"),
    "half a pair deep down": (Any, {"a": [{"b": "\ud800"}]}, ".a[0].b", "holds half of a surrogate pair"),
    "tuple in Any": (Any, (1, 2), "", "is a tuple, and would come back as list"),
    "uuid in Any": (Any, [UUID(int=1)], "[0]", "is a UUID, and would come back as str"),
    "bytes in Any": (dict[str, Any], {"x y": b"a"}, "['x y']", "is a bytes, and would come back as str"),
    "number as key in Any": (Any, {5: "a"}, "[5]", "would be lost"),
    "two keys become one": (Any, {"1": "a", 1: "b"}, "[1]", "would be lost"),
    "another type": (int, "5", "", "would not be read again: Expected `int`, got `str`"),
    "bool for int": (int, True, "", "would not be read again: Expected `int`, got `bool`"),
    "flag for float": (float, True, "", "would not be read again: Expected `float`, got `bool`"),
    "int too large for float": (float, 2**53 + 1, "", "is a int, and would come back as float"),
    "no such choice": (Literal["a"], "secret", "", "would not be read again: Invalid enum value"),
    "no JSON type": (int | None, object(), "", "cannot be encoded: Encoding objects of type object is unsupported"),
    "surplus key": (Options, {"gift": True, "secret": 1}, ".secret", "would be lost"),
    "subclass": (Box, dataclasses.make_dataclass("More", [("more", int)], bases=(Box,))(1, 2), "", "is a More"),
    "unequal to anything": (Any, Sneaky("x"), "", "cannot be encoded"),
}


@pytest.mark.parametrize(("of_type", "value", "place", "reason"), LOSSY.values(), ids=LOSSY)
def test_what_would_not_come_back_is_refused_by_its_path(of_type: Any, value: Any, place: str, reason: str) -> None:
    event_type = boxed(of_type)
    with pytest.raises(EventEncodeError) as caught:
        event_type(put(event_type, value))
    error = caught.value
    assert (error.path, error.name, error.version) == ("$.inner[0].value" + place, "boxed", 0)
    assert error.reason.startswith(reason)
    assert "secret" not in error.reason


def test_what_holds_itself_or_is_too_deep_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"deeper": deep}
    for payload in (CYCLE, deep):
        with pytest.raises(EventEncodeError, match=r"\$ is nested too deeply, or holds itself"):
            NewEvent("cycle", payload)


def test_depth_that_only_c_goes_through_is_stored_or_refused() -> None:
    outcomes = set()
    for depth in range(300, 1000, 25):
        for last in (1, [UUID(int=1)]):
            payload: dict[str, Any] = {"last": last}
            for _ in range(depth):
                payload = {"a": payload}
            try:
                outcomes.add(
                    (last == 1, NewEvent("deep", payload).data == b'{"a":' * depth + b'{"last":1}' + b"}" * depth)
                )
            except EventEncodeError as error:
                outcomes.add((last == 1, error.path == "$" or error.path.endswith(".last[0]")))
    assert outcomes == {(True, True), (False, True)}


def test_a_field_that_equality_leaves_out_is_looked_at_all_the_same() -> None:
    @dataclass
    class Partly:
        total: int
        note: Any = field(compare=False)

    @attrs.define
    class PartlyToo:
        total: int
        note: Any = attrs.field(eq=False)

    for kind in (Partly, PartlyToo):
        event_type: EventType[Any] = EventType("partly", (kind,))
        assert event_type.encode(kind(1, [2])) in (b'{"total":1,"note":[2]}', b'{"note":[2],"total":1}')
        with pytest.raises(EventEncodeError, match=r"\$.note is a tuple"):
            event_type(kind(1, (2,)))


@dataclass
class LenientDataclass:
    number: int
    ratio: float | None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LenientDataclass) and self.number == other.number


@dataclass(eq=False)
class LenientByInheritance(LenientDataclass):
    pass


@dataclass
class Plain:
    number: int


@dataclass(eq=False)
class BlindToWhatItAdds(Plain):
    ratio: float | None


class LenientStruct(msgspec.Struct):
    number: int
    ratio: float | None

    def __eq__(self, other: object) -> bool:
        return True


@attrs.define(eq=False)
class LenientAttrs:
    number: int
    ratio: float | None

    def __eq__(self, other: object) -> bool:
        return True


@attrs.define
class LenientByKey:
    number: int
    ratio: float | None = attrs.field(eq=lambda ratio: 0)


class LenientNamedTuple(NamedTuple):
    number: int
    ratio: float | None

    def __eq__(self, other: object) -> bool:
        return True


LENIENT = (
    LenientDataclass, LenientByInheritance, BlindToWhatItAdds, LenientStruct, LenientAttrs, LenientByKey,
    LenientNamedTuple,
)  # fmt: skip


@pytest.mark.parametrize("kind", LENIENT)
def test_an_equality_that_does_not_see_a_field_hides_nothing(kind: Any) -> None:
    event_type = boxed(kind)
    assert event_type.encode(put(event_type, kind(1, 0.5)))
    with pytest.raises(EventEncodeError, match=r"\$.inner\[0\].value.ratio is not a finite number"):
        event_type(put(event_type, kind(1, math.nan)))


@pytest.mark.parametrize("kind", [Line, Address, Customer, Card, Plain])
def test_a_generated_equality_is_relied_upon(kind: Any) -> None:
    """It takes a tenth of the time; should a Python or attrs generate it otherwise, this is where it shows."""
    assert PayloadCodec(kind)._equality_sees_all


def test_a_child_that_calls_itself_its_parents_equal_is_refused() -> None:
    class Child(Plain):
        def __eq__(self, other: object) -> bool:
            return True

    class LenientChild(LenientDataclass):
        pass

    with pytest.raises(EventEncodeError, match=r"\$ is a Child, and would come back as Plain"):
        EventType("top", (Plain,))(Child(1))
    event_type = boxed(LenientDataclass)
    with pytest.raises(EventEncodeError, match=r"\$.inner\[0\].value is a LenientChild"):
        event_type(put(event_type, LenientChild(1, 0.5)))


def nested(depth: int) -> bytes:
    return b'{"[":' + b"[" * (depth - 2) + b'{"\\"":"{[[["}' + b"]" * (depth - 2) + b"}"


def test_nesting_ends_at_500_levels_as_in_an_import() -> None:
    """What is nested deeper could be read only where the stack is not yet deep, and not be imported again."""
    event_type = EventType("deep", (dict,))
    wide = b'{"a":[' + b"[{}]," * 1000 + b"[]]}"
    for allowed in (nested(500), wide):
        assert NewEvent("deep", allowed).data == allowed
        assert event_type(msgspec.json.decode(allowed)).data == allowed
    for too_deep in (nested(501), nested(502), nested(800)):
        with pytest.raises(EventEncodeError, match=r"\$ is nested more than 500 deep"):
            NewEvent("deep", too_deep)
        with pytest.raises(EventEncodeError, match=r"\$ is nested more than 500 deep"):
            event_type(msgspec.json.decode(too_deep))
        with pytest.raises(EventEncodeError, match="metadata is nested more than 500 deep"):
            NewEvent("deep", {}, metadata=msgspec.json.decode(too_deep))


def test_classes_without_equality_are_compared_by_their_fields() -> None:
    @dataclass(eq=False)
    class Unequal:
        at: datetime
        note: Any

    event_type = EventType("unequal", (Unequal,))
    assert event_type.encode(Unequal(NAIVE.replace(tzinfo=UTC), [1])) == b'{"at":"2024-05-01T12:30:00Z","note":[1]}'
    with pytest.raises(EventEncodeError, match=r"\$.note is a tuple"):
        event_type(Unequal(NAIVE.replace(tzinfo=UTC), (1,)))


def test_a_class_that_changes_what_it_is_given_is_refused() -> None:
    @dataclass
    class Growing:
        total: int

        def __post_init__(self) -> None:
            self.total += 1

    with pytest.raises(EventEncodeError, match=r"\$.total would come back as another int"):
        EventType("growing", (Growing,))(Growing(1))


@given(
    st.datetimes(
        min_value=datetime(1970, 1, 1), max_value=datetime(2037, 1, 1), timezones=st.just(ZoneInfo("Europe/Berlin"))
    )
)
@example(datetime(2024, 10, 27, 2, 30, tzinfo=ZoneInfo("Europe/Berlin")))
@example(datetime(2024, 10, 27, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"), fold=1))
@example(datetime(2024, 3, 31, 2, 30, tzinfo=ZoneInfo("Europe/Berlin")))
def test_times_of_a_zone_come_back_as_the_same_moment(moment: datetime) -> None:
    event_type = boxed(datetime)
    back = event_type.decode(0, event_type.encode(put(event_type, moment)))
    assert back.inner[0].value.astimezone(UTC) == moment.astimezone(UTC)


@pytest.mark.parametrize("offset", [-14, 14], ids=str)
@pytest.mark.parametrize("moment", [datetime.min, datetime.max], ids=str)
def test_the_ends_of_the_calendar_come_back(moment: datetime, offset: int) -> None:
    event_type = boxed(dict[str, datetime | list[float] | None])
    there = moment.replace(tzinfo=timezone(timedelta(hours=offset)))
    value = put(event_type, {"at": there})
    assert event_type.decode(0, event_type.encode(value)) == value
    with pytest.raises(EventEncodeError, match=r"\.nan\[0\] is not a finite number"):
        event_type(put(event_type, {"at": there, "nan": [math.nan]}))


def test_text_that_looks_like_a_naive_time_is_text() -> None:
    event_type = boxed(dict[str, datetime | None] | str)
    for value in ("2024-05-01T12:30:00", {"2024-05-01T12:30:00": NAIVE.replace(tzinfo=UTC)}):
        assert event_type.decode(0, event_type.encode(put(event_type, value))).inner[0].value == value


def test_a_time_that_another_program_stored_without_a_zone_is_refused_where_the_field_says_so() -> None:
    stored = b'{"inner":[{"value":"2024-05-01T12:30:00"}]}'
    assert boxed(datetime).decode(0, stored).inner[0].value == NAIVE
    with pytest.raises(
        EventParseError, match=r"Expected `datetime` with a timezone component \(at \$.inner\[0\].value"
    ):
        boxed(Annotated[datetime, msgspec.Meta(tz=True)]).decode(0, stored)


# --- Stored bytes, pinned for ever ------------------------------------------------------------------------------------

SPECIMEN = Everything(
    uuid=UUID("12345678-1234-5678-1234-567812345678"),
    moment=datetime(2024, 5, 1, 12, 30, 0, 5, tzinfo=timezone(timedelta(hours=2))),
    day=date(2024, 2, 29),
    clock=time(23, 59, 59, 1),
    span=timedelta(days=-1, seconds=1, microseconds=1),
    price=Decimal("1.50"),
    colour=Colour.GREEN,
    size=Size.LARGE,
    number=2**70,
    ratio=1e-7,
    flag=True,
    text='Zoë "\\ \n\x00 \u2028 😀',
    data=b"\x00\xff",
    nothing=None,
    maybe=None,
    either=[1, -(2**64)],
    choice="b",
    items=[0, -1],
    row=(1, 2, 3),
    pair=("a", b"b"),
    point=Point(1, 2.0),
    unique=frozenset({5}),
    by_name={"first": Line("sku", Decimal("1E+3"), ["t"])},
    by_number={7: date(1, 1, 1)},
    by_id={UUID(int=1): False},
    nested=Line("", Decimal("-0.0")),
    struct=Address("street", []),
    customer=Customer("name", {"home": Address("s", [Line("x", Decimal(0))])}),
    options={"gift": False},
    payment=Cash(Decimal("20.00")),
    anything={"a": [1, 2.5, "x", None, True, {}]},
)


def test_the_bytes_of_every_field_type_are_what_they_always_were() -> None:
    assert everything.encode(SPECIMEN) + b"\n" == PINNED.read_bytes()


def test_bytes_stored_long_ago_still_say_the_same() -> None:
    """Also what only older versions of encoders wrote, or other programs: it must be read for ever."""
    assert everything.decode(0, PINNED.read_bytes()) == SPECIMEN
    older: list[tuple[Any, bytes, Any]] = [
        (datetime, b'"2024-05-01T12:30:00.000005+02:00"', SPECIMEN.moment),
        (datetime, b'"2024-05-01 10:30:00.000005Z"', SPECIMEN.moment),
        (Decimal, b"1.50", Decimal("1.50")),
        (Decimal, b'"1.50"', Decimal("1.50")),
        (UUID, b'"12345678123456781234567812345678"', SPECIMEN.uuid),
        (float, b"1E-7", 1e-7),
        (float, b"1", 1.0),
        (str, b'"\\u005a\\ud83d\\ude00\\/"', "Z😀/"),
        (timedelta, b'"P1DT2H"', timedelta(days=1, hours=2)),
        (bytes, b'"AP8="', b"\x00\xff"),
    ]
    for of_type, stored, meant in older:
        back = boxed(of_type).decode(0, b'{"inner":[{"value":%s}]}' % stored).inner[0].value
        assert (back, type(back)) == (meant, type(meant))
