"""Event types: what is refused when one is made, upcasts composed once, migrations, the types of a store."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import FrozenInstanceError, InitVar, dataclass, make_dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, NamedTuple, TypedDict
from uuid import UUID

import attrs
import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hindsight_fast import (
    EventDefinitionError,
    EventEncodeError,
    EventParseError,
    EventStore,
    EventType,
    NewEvent,
)
from hindsight_fast._core import EventRows
from hindsight_fast.event_registry import EventRegistry

USER = UUID(int=7)


@dataclass(frozen=True, slots=True)
class UserV0:
    user_id: UUID
    name: str


class UserV1(msgspec.Struct, frozen=True):
    user_id: UUID
    name: str
    email: str | None


@attrs.frozen
class User:
    user_id: UUID
    name: str
    email: str | None
    is_active: bool = True


def v0_to_v1(v0: UserV0) -> UserV1:
    return UserV1(v0.user_id, v0.name, None)


def v1_to_v2(v1: UserV1) -> User:
    return User(v1.user_id, v1.name, v1.email)


VERSIONS = (UserV0, UserV1, User)
registered = EventType("registered", VERSIONS, [v0_to_v1, v1_to_v2])


class Order(TypedDict):
    total: int


# --- Reading and writing by versions ----------------------------------------------------------------------------------


def test_every_version_reads_as_the_latest() -> None:
    stored = {
        0: b'{"user_id":"00000000-0000-0000-0000-000000000007","name":"Ada"}',
        1: b'{"user_id":"00000000-0000-0000-0000-000000000007","name":"Ada","email":"a@b"}',
        2: b'{"user_id":"00000000-0000-0000-0000-000000000007","name":"Ada","email":"a@b","is_active":false}',
    }
    assert [registered.decode(version, data) for version, data in stored.items()] == [
        User(USER, "Ada", None),
        User(USER, "Ada", "a@b"),
        User(USER, "Ada", "a@b", is_active=False),
    ]
    assert (registered.name, registered.latest_version, registered.payload_type) == ("registered", 2, User)


def test_a_new_event_carries_the_latest_version_encoded() -> None:
    event = registered(User(USER, "Ada", None), event_id=UUID(int=1), metadata={"by": "import"})
    assert (event.name, event.version, event.event_id) == ("registered", 2, UUID(int=1))
    # msgspec writes an attrs class's slots in alphabetical order.
    stored = b'{"email":null,"is_active":true,"name":"Ada","user_id":"00000000-0000-0000-0000-000000000007"}'
    assert event.data == stored
    assert event.metadata_json == b'{"by":"import"}'
    assert event.payload == User(USER, "Ada", None)
    assert pickle.loads(pickle.dumps(event)) == event
    with pytest.raises(FrozenInstanceError):
        event.version = 0  # type: ignore[misc]


def test_a_migration_jumps_past_the_chain() -> None:
    def straight(v0: UserV0) -> User:
        return User(v0.user_id, v0.name, "migrated")

    stored = b'{"user_id":"00000000-0000-0000-0000-000000000007","name":"Ada"}'
    with_chain = EventType("r", VERSIONS, [v0_to_v1, v1_to_v2], {0: straight})
    without = EventType("r", VERSIONS, [None, v1_to_v2], {0: straight})
    for event_type in (with_chain, without):
        assert event_type.decode(0, stored) == User(USER, "Ada", "migrated")
        # Version 1 still goes by the chain.
        assert event_type.decode(1, stored[:-1] + b',"email":null}') == User(USER, "Ada", None)


def test_versions_and_upcasts_are_taken_as_they_are_when_the_type_is_made() -> None:
    versions, upcasts = [UserV0, UserV1], [v0_to_v1]
    event_type = EventType("r", versions, upcasts)  # type: ignore[arg-type]  # a list works at run time
    versions.clear()
    upcasts.clear()
    assert event_type.versions == (UserV0, UserV1)
    assert event_type.decode(0, b'{"user_id":"00000000-0000-0000-0000-000000000007","name":"A"}').name == "A"


def test_dicts_may_be_several_versions_of_an_event() -> None:
    def add_currency(order: dict[str, Any]) -> dict[str, Any]:
        return {**order, "currency": "EUR"}

    placed = EventType("placed", (dict, dict), [add_currency])
    assert placed.decode(0, b'{"total":1}') == {"total": 1, "currency": "EUR"}
    assert placed.decode(1, b'{"total":1,"currency":"USD"}') == {"total": 1, "currency": "USD"}
    assert placed({"total": 1, "currency": "USD"}).data == b'{"total":1,"currency":"USD"}'


@pytest.mark.parametrize("payload", [UserV1(USER, "Ada", None), {"name": "Ada"}, None, User], ids=repr)
def test_another_class_than_the_latest_is_refused(payload: object) -> None:
    with pytest.raises(TypeError, match="'registered' takes User, not"):
        registered(payload)  # type: ignore[arg-type]


# --- Any chain --------------------------------------------------------------------------------------------------------

MAKES: dict[str, Callable[[int], type[Any]]] = {
    "dataclass": lambda version: make_dataclass(f"V{version}", [("passed", list[str])]),
    "struct": lambda version: msgspec.defstruct(f"V{version}", [("passed", list[str])]),
    "attrs": lambda version: attrs.make_class(f"V{version}", {"passed": attrs.field(type=list[str])}),
    "dict": lambda version: dict,
}


def passed(payload: Any) -> list[str]:
    """The functions that a payload has been through."""
    found: list[str] = payload["passed"] if isinstance(payload, dict) else payload.passed
    return found


@given(
    kinds=st.lists(st.sampled_from(list(MAKES)), min_size=1, max_size=7),
    migrated=st.sets(st.integers(0, 5)),
    left_out=st.sets(st.integers(0, 5)),
)
@example(kinds=["dataclass"] * 7, migrated=set(), left_out=set())
@example(kinds=["dataclass", "struct", "attrs", "dict"], migrated={1}, left_out={1})
def test_any_chain_yields_what_its_functions_yield_by_hand(
    kinds: list[str], migrated: set[int], left_out: set[int]
) -> None:
    """Up to six upcasts, some versions with a direct way, some of those without an upcast."""
    classes = [MAKES[kind](version) for version, kind in enumerate(kinds)]
    latest = len(classes) - 1

    def leads_to(version: int, name: str) -> Callable[[Any], Any]:
        return lambda payload: classes[version](passed=[*passed(payload), name])

    migrations = {v: leads_to(latest, f"migration of {v}") for v in sorted(migrated) if v < latest}
    chain = [leads_to(v + 1, f"upcast of {v}") for v in range(latest)]
    upcasts = [None if v in migrations and v in left_out else upcast for v, upcast in enumerate(chain)]
    event_type = EventType("chained", tuple(classes), upcasts, migrations)

    for stored in range(latest + 1):
        by_hand, version = classes[stored](passed=["stored"]), stored
        while version < latest:
            if version in migrations:
                by_hand, version = migrations[version](by_hand), latest
            else:
                by_hand, version = chain[version](by_hand), version + 1
        read = event_type.decode(stored, b'{"passed":["stored"]}')
        assert (read, type(read)) == (by_hand, classes[latest])


def test_upcasts_are_composed_when_the_type_is_made_and_not_for_each_event() -> None:
    def noting(order: dict[str, Any]) -> dict[str, Any]:
        return order

    event_type = EventType("placed", (dict, dict, dict), [noting, noting])
    before = event_type._decoders
    for _ in range(3):
        event_type.decode(0, b"{}")
    assert event_type._decoders is before
    assert len({id(decoder) for decoder in before}) == 3  # one for each version


# --- What cannot be read ----------------------------------------------------------------------------------------------


def refusal(version: int, data: bytes, event_type: EventType[Any] = registered) -> EventParseError:
    with pytest.raises(EventParseError) as caught:
        event_type.decode(version, data)
    assert (caught.value.name, caught.value.version) == (event_type.name, version)
    assert caught.value.event_id is None
    return caught.value


@pytest.mark.parametrize("version", [3, 2**31 - 1, -1])
def test_an_unknown_version_is_refused(version: int) -> None:
    error = refusal(version, b"{}")
    assert error.reason == "this program knows versions up to 2 only: a newer one has written it"
    assert error.path is None


@pytest.mark.parametrize(
    ("data", "path", "reason"),
    [
        (b'{"user_id":"x","name":"Ada"}', "$.user_id", "Invalid UUID"),
        (b'{"user_id":"00000000-0000-0000-0000-000000000007","name":5}', "$.name", "Expected `str`, got `int`"),
        (b'{"name":"Ada"}', None, "Object missing required field `user_id`"),
        (b"[]", None, "Expected `object`, got `array`"),
        (b'{"name":', None, "Input data was truncated"),
        (b'{"name":"\xff"}', None, "text that is no UTF-8"),
    ],
    ids=["field", "type", "missing", "array", "truncated", "no UTF-8"],
)
def test_what_does_not_decode_says_where_and_why(data: bytes, path: str | None, reason: str) -> None:
    error = refusal(0, data)
    assert (error.path, error.reason) == (path, reason)
    assert error.__cause__ is not None


def test_an_upcast_that_raises_is_the_cause() -> None:
    def look_up(order: dict[str, Any]) -> dict[str, Any]:
        return {"total": order["secret 4711"]}

    error = refusal(0, b"{}", EventType("placed", (dict, dict), [look_up]))
    assert error.reason == "upcasts[0] raised KeyError"
    assert isinstance(error.__cause__, KeyError)
    assert "4711" not in str(error)  # foreign texts may quote a payload


def test_the_step_that_raises_is_named() -> None:
    def fails(order: dict[str, Any]) -> dict[str, Any]:
        raise LookupError

    def passes(order: dict[str, Any]) -> dict[str, Any]:
        return order

    event_type = EventType("placed", (dict,) * 4, [passes, fails, passes], {2: fails})
    assert [refusal(version, b"{}", event_type).reason for version in (0, 1, 2)] == [
        "upcasts[1] raised LookupError",
        "upcasts[1] raised LookupError",
        "migrations[2] raised LookupError",
    ]


@pytest.mark.parametrize(
    "data", [rb'{"a":"\ud800"}', rb'{"\uDBFF":1}', rb'{"a":"\\\\\ud9ab"}', rb'{"a":"\ud800","b":1}']
)
def test_half_a_surrogate_pair_is_called_by_its_name(data: bytes) -> None:
    """msgspec calls it truncated, where the text ends with it. PostgreSQL's json stores it."""
    assert "surrogate pair" in refusal(0, data, EventType("placed", (dict,))).reason


def test_what_only_looks_like_half_a_surrogate_pair_is_truncated() -> None:
    assert refusal(0, rb'{"a":"\\ud800","b"', EventType("placed", (dict,))).reason == "Input data was truncated"


def test_upcasts_that_end_with_another_class_are_refused() -> None:
    event_type = EventType("r", (UserV0, UserV1), [lambda v0: v0])
    error = refusal(0, b'{"user_id":"00000000-0000-0000-0000-000000000007","name":"A"}', event_type)
    assert error.reason == "the upcasts end with UserV0, not UserV1"


def test_reasons_quote_no_values() -> None:
    @dataclass
    class Strict:
        kind: str

        def __post_init__(self) -> None:
            raise ValueError(f"no such kind: {self.kind}")

    class Tagged(msgspec.Struct, tag="known"):
        kind: str

    error = refusal(0, b'{"kind":"secret"}', EventType("strict", (Strict,)))
    assert error.reason == "the class itself refuses it, by ValueError"
    assert "secret" not in str(error)
    error = refusal(0, b'{"type":"secret","kind":""}', EventType("tagged", (Tagged,)))
    assert (error.reason, error.path) == ("Invalid value", "$.type")
    assert "secret" not in str(error)


# --- Holes are found when the type is made ----------------------------------------------------------------------------


@dataclass
class WithInitVar:
    seed: InitVar[int]


@dataclass
class WithComplex:
    inner: list[complex]


@dataclass
class WithTwoTexts:
    first: int
    at: datetime | str


@dataclass
class WithPairsAsKeys:
    prices: dict[tuple[int, int], Decimal]


@dataclass
class WithPrivate:
    _hidden: int


class AsArray(msgspec.Struct, array_like=True):
    total: int


class Pair(NamedTuple):
    left: int
    right: int


def make(*arguments: Any, **named: Any) -> Callable[[], EventType[Any]]:
    return lambda: EventType(*arguments, **named)


HOLES = {
    "no version": (make("r", ()), "it has no version"),
    "no list": (make("r", "ab"), "versions is a tuple"),
    "no order": (make("r", {UserV0, User}, [id]), "versions is a tuple of payload classes, the oldest first"),
    "upcasts without order": (make("r", (UserV0, User), {id}), "upcasts is a list of functions"),
    "upcasts by number": (make("r", (UserV0, User), {0: id}), "upcasts is a list of functions"),
    "migrations in a list": (make("r", (UserV0, User), [id], [id]), "migrations is a dict of functions"),
    "upcast missing": (make("r", VERSIONS, [v0_to_v1]), r"upcasts\[1\] is missing: nothing leads from version 1 to 2"),
    "first missing": (make("r", VERSIONS, [None, v1_to_v2]), r"upcasts\[0\] is missing"),
    "upcast surplus": (make("r", (User,), [v0_to_v1]), r"1 upcasts for 1 versions: upcasts\[0\] would lead beyond"),
    "no upcast": (make("r", (UserV0, User), ["x"]), r"upcasts\[0\] cannot be called"),
    "listed twice": (make("r", (UserV0, User, UserV0), [id, id]), "UserV0 stands for version 0 and for version 2"),
    "migration of the last": (make("r", (UserV0, User), [id], {1: id}), r"migrations\[1\] is for no version before"),
    "migration of True": (make("r", VERSIONS, [id, id], {True: id}), r"migrations\[True\] is for no version"),
    "no migration": (make("r", (UserV0, User), [], {0: "x"}), r"migrations\[0\] cannot be called"),
    "name": (make("", (User,)), "must have at least one character"),
    "name type": (make(5, (User,)), "must be a str"),
    "name with NUL": (make("a\0", (User,)), "none of them NUL"),
    "name with half a pair": (make("a\ud800", (User,)), "holds half of a surrogate pair"),
    "long name": (make("ä" * 501, (User,)), "takes 1,000 bytes at most, not 1,002: 'ä{80}'…"),
    "no class": (make("r", (list[int],)), "version 0: list.int. is no class"),
    "int": (make("r", (UserV0, int), [id]), "version 1: int is none of dataclass, msgspec.Struct"),
    "named tuple": (make("r", (Pair,)), "version 0: Pair is none of dataclass"),
    "array": (make("r", (AsArray,)), "AsArray is array_like: a payload is a JSON object"),
    "InitVar": (make("r", (WithInitVar,)), "WithInitVar.* cannot be encoded"),
    "complex": (make("r", (WithComplex,)), r"WithComplex.inner\[…\] has the type complex"),
    "two texts": (make("r", (WithTwoTexts,)), "WithTwoTexts.at cannot be encoded: Type unions"),
    "keys": (make("r", (WithPairsAsKeys,)), "WithPairsAsKeys.prices has keys of a type"),
    "private": (make("r", (WithPrivate,)), "WithPrivate._hidden begins with an underscore"),
}


@pytest.mark.parametrize(("making", "hole"), HOLES.values(), ids=HOLES)
def test_a_hole_is_named_when_the_type_is_made(making: Callable[[], object], hole: str) -> None:
    with pytest.raises(EventDefinitionError, match=hole) as caught:
        making()
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.name, again.reason, str(again)) == (caught.value.name, caught.value.reason, str(caught.value))


# --- Events without a type --------------------------------------------------------------------------------------------


def test_json_as_bytes_stays_as_it_is() -> None:
    data = b' {"b": 1.50,\n "a": 123456789012345678901234567890} '
    assert NewEvent("placed", data).data == data


@pytest.mark.parametrize("data", [b"", b"[]", b'{"a":}', b'{"a":"\xff"}', b'{"a":NaN}', b'{"a":1} {}', b"null"])
def test_bytes_that_are_no_json_object_are_refused(data: bytes) -> None:
    with pytest.raises(EventEncodeError, match="is not the JSON of an object"):
        NewEvent("placed", data)


MISUSES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "payload": (lambda: NewEvent("placed", UserV0(USER, "Ada")), TypeError, "appended through their EventType"),
    "text": (lambda: NewEvent("placed", "{}"), TypeError, "a dict or JSON as bytes, not str"),
    "version": (lambda: NewEvent("placed", {}, version=True), TypeError, "version must be an int, not bool"),
    "negative": (lambda: NewEvent("placed", {}, version=-1), ValueError, "between 0 and 2147483647"),
    "name": (lambda: NewEvent("a\0b", {}), ValueError, "none of them NUL"),
    "no name": (lambda: NewEvent("", {}), ValueError, "at least one character"),
    "half a pair": (lambda: NewEvent("\udc00", {}), ValueError, "holds half of a surrogate pair"),
    "long name": (lambda: NewEvent("ä" * 501, {}), ValueError, "takes 1,000 bytes at most, not 1,002"),
    "other type": (
        lambda: NewEvent("joined", User(USER, "Ada", None), 2, event_type=registered),
        ValueError,
        "'registered', version 2: User> makes no event 'joined' of version 2",
    ),
    "other version": (lambda: NewEvent("registered", {}, event_type=registered), ValueError, "of version 0"),
    "id": (lambda: NewEvent("a", {}, event_id="x"), TypeError, "event_id must be a UUID"),  # type: ignore[arg-type]
    "naive": (lambda: NewEvent("a", {}, created_at=datetime(2024, 1, 1)), ValueError, "must carry a time zone"),
    "time": (lambda: NewEvent("a", {}, created_at=5), TypeError, "must be a datetime"),  # type: ignore[arg-type]
    "metadata": (lambda: NewEvent("a", {}, metadata=[]), TypeError, "must be a dict"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("misuse", "error", "message"), MISUSES.values(), ids=MISUSES)
def test_what_no_event_can_have_is_refused(misuse: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        misuse()


def test_metadata_that_would_not_come_back_is_refused_by_its_path() -> None:
    with pytest.raises(EventEncodeError, match=r"metadata\.by is a UUID, and would come back as str"):
        NewEvent("placed", {}, metadata={"by": UUID(int=1)})
    event = NewEvent("placed", {}, metadata={"n": 2**70}, created_at=datetime(2024, 1, 1, tzinfo=UTC))
    assert event.metadata_json == b'{"n":1180591620717411303424}'


@pytest.mark.parametrize(
    "name", ["a" * 1000, "ä" * 500, "a\nb", " "], ids=["1000 letters", "1000 bytes", "lines", "blank"]
)
def test_a_name_of_up_to_a_thousand_bytes_is_taken_as_the_core_takes_it(name: str) -> None:
    assert EventType(name, (dict,))({}).name == NewEvent(name, {}).name == name
    EventRows().add(bytes(16), bytes(16), name, 0, b"{}", None, None, None)
    with pytest.raises(ValueError, match="1000 at most"):
        EventRows().add(bytes(16), bytes(16), name + "a" * 1000, 0, b"{}", None, None, None)


def test_a_dict_of_another_make_is_a_dict() -> None:
    assert NewEvent("placed", OrderedDict(b=1, a=2)).data == b'{"b":1,"a":2}'


def test_an_event_can_be_made_anew_with_something_else() -> None:
    event = registered(User(USER, "Ada", None), metadata={"by": "me"})
    moved = replace(event, event_id=UUID(int=1), created_at=datetime(2024, 1, 1, tzinfo=UTC))
    assert (moved.payload, moved.version, moved.data, moved.metadata_json) == (
        event.payload, 2, event.data, b'{"by":"me"}',
    )  # fmt: skip
    renamed = replace(event, payload=User(USER, "Bea", None))
    assert renamed.data == registered.encode(User(USER, "Bea", None))
    with pytest.raises(TypeError, match="'registered' takes User, not UserV0"):
        replace(event, payload=UserV0(USER, "Ada"))
    with pytest.raises(ValueError, match="makes no event 'joined'"):
        replace(event, name="joined")
    assert replace(NewEvent("placed", {"total": 1}), version=3).data == b'{"total":1}'


def test_a_pickled_event_leaves_its_type_behind() -> None:
    event = registered(User(USER, "Ada", None), event_id=UUID(int=1))
    again = pickle.loads(pickle.dumps(event))
    assert (again, again.data, again.event_type) == (event, event.data, None)
    with pytest.raises(FrozenInstanceError):
        again.name = "other"


# --- The types of a store ---------------------------------------------------------------------------------------------


def test_two_types_with_one_name_are_refused() -> None:
    with pytest.raises(EventDefinitionError, match="'registered': it is listed twice"):
        EventStore("host=nowhere", event_types=[registered, EventType("registered", (Order,))])


def test_two_types_with_one_latest_class_are_refused() -> None:
    rival = EventType("joined", (User,))
    with pytest.raises(EventDefinitionError, match="latest class User is also that of 'registered'"):
        EventStore("host=nowhere", event_types=[registered, rival])
    EventRegistry([registered, EventType("older", (UserV0,))])  # only the latest counts


def test_dicts_and_typed_dicts_may_be_the_class_of_many() -> None:
    placed, changed = EventType("placed", (Order,)), EventType("changed", (Order,))
    registry = EventRegistry([placed, changed, EventType("noted", (dict,)), EventType("seen", (dict,))])
    assert registry.new_event(changed({"total": 1})).name == "changed"
    with pytest.raises(TypeError, match=r"a dict is appended through its EventType, event_type\(payload\)"):
        registry.new_event({"total": 1})


def test_what_is_no_event_is_refused_with_the_way_to_go() -> None:
    registry = EventRegistry([registered])
    assert registry.new_event(User(USER, "Ada", None)).name == "registered"
    with pytest.raises(TypeError, match="UserV1 is an older version of 'registered': append its latest, User"):
        registry.new_event(UserV1(USER, "Ada", None))
    with pytest.raises(TypeError, match="str is the class of no event type"):
        registry.new_event("registered")
    with pytest.raises(TypeError, match="event_types holds EventTypes, not type"):
        EventRegistry([User])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="event_types is a list"):
        EventRegistry(registered)  # type: ignore[arg-type]


def test_names_are_given_as_types_or_text() -> None:
    registry = EventRegistry([])
    assert registry.names([registered, "other"]) == ["registered", "other"]
    assert registry.names(None) is None
    with pytest.raises(TypeError, match="event_types is a list"):
        registry.names(registered)  # type: ignore[arg-type]
