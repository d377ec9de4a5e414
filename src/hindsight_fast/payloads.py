"""Payload classes: which of them JSON can hold, how their objects become bytes, and whether they would come back.

Encoding and decoding are msgspec's. Both are exact for what is let through here: integers of any size, decimals as
text, aware times. What msgspec would change without a word (NaN becomes null, a set in a dict a list) is found by
decoding what was encoded and comparing.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from decimal import Decimal
from typing import Any, Final, get_type_hints

import msgspec
from msgspec import inspect as shapes

_encode: Final = msgspec.json.Encoder(decimal_format="string", uuid_format="canonical").encode
# A time without a zone ends a JSON string with its clock. Texts may do so too; they cost a closer look, nothing else.
_naive_time_in: Final = re.compile(rb'T\d\d:\d\d:\d\d(?:\.\d{1,6})?"').search
# Complaints of msgspec's that go on to quote the value.
_QUOTING: Final = re.compile(r"Invalid (?:enum )?value\b")
_TOO_DEEP: Final = "is nested too deeply, or holds itself"
MAX_NESTING: Final = 500
"""Levels of arrays and objects, as in an import: what is nested deeper decodes only where the stack is not yet deep."""
_strings: Final = re.compile(rb'"(?:[^"\\]|\\.)*+"').sub
_BRACKETS: Final = bytes.maketrans(b"[]", b"{}")
_NO_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
# A high half of a surrogate pair, escaped, where the text ends: msgspec calls that truncated.
_half_pair_ends: Final = re.compile(rb'(?<!\\)(?:\\\\)*\\u[dD][89abAB][0-9a-fA-F]{2}"').search
_KEYS: Final = (
    shapes.AnyType, shapes.StrType, shapes.IntType, shapes.FloatType, shapes.DecimalType, shapes.UUIDType,
    shapes.DateTimeType, shapes.DateType, shapes.TimeType, shapes.TimeDeltaType, shapes.BytesType, shapes.EnumType,
    shapes.LiteralType,
)  # fmt: skip


class Unsupported(Exception):
    """A payload class that JSON cannot hold, and why."""


class Lossy(Exception):
    """A value that would not come back as it is: where it stands, and why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path} {reason}")
        self.path = path
        self.reason = reason


class PayloadCodec:
    """Encodes and decodes objects of one payload class, and remembers how. Raises Unsupported when made."""

    def __init__(self, payload_class: type[Any]) -> None:
        self.payload_class = payload_class
        shape = check_payload_class(payload_class)
        self.decode: Callable[[bytes], Any] = msgspec.json.Decoder(payload_class).decode
        nodes = [] if shape is None else [node for _, node in _nodes(shape, "", set())]
        self._holds_times = any(isinstance(node, shapes.DateTimeType) for node in nodes)
        self._equality_sees_all = not any(map(_may_hide_fields, nodes))

    def encode(self, payload: Any) -> bytes:
        """Return *payload* as JSON that decodes to its equal. Raises Lossy."""
        try:
            data = _encode(payload)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise Lossy(*_unencodable(payload, error)) from error
        if is_too_deep(data):
            raise Lossy("$", f"is nested more than {MAX_NESTING} deep")
        try:
            back = self.decode(data)
        except Exception as error:  # a class's own __post_init__ may raise whatever it likes
            if found := _difference(payload, payload):  # a NaN, say, where msgspec tells of a null
                raise Lossy(*found) from error
            reason, path = reason_and_path(error, data)
            raise Lossy(path or "$", f"would not be read again: {reason}") from error
        # Equal is nearly always enough: 0.6 µs for ten fields, where a walk over them takes 31. But naive times come
        # back equal to themselves, and a time in a repeated hour unequal to itself.
        surely_exact = (
            self._equality_sees_all
            and type(back) is type(payload)
            and _are_equal(back, payload)
            and not (self._holds_times and _naive_time_in(data) is not None)
        )
        if not surely_exact and (found := _difference(payload, back)):
            raise Lossy(*found)
        return data


def check_payload_class(payload_class: type[Any]) -> shapes.Type | None:
    """Return the shape of a class whose objects become JSON objects and come back; None for ``dict``, which has none.

    Raises Unsupported for any other class.
    """
    if payload_class is dict:
        return None
    if not isinstance(payload_class, type):
        raise Unsupported(f"{payload_class!r} is no class")
    name = payload_class.__name__
    try:
        shape = shapes.type_info(payload_class)
        msgspec.json.Decoder(payload_class)
    except Exception as error:  # msgspec raises TypeError, NotImplementedError or NameError, by the annotation
        raise Unsupported(f"{_culprit(payload_class)} cannot be encoded: {error}") from error
    if not isinstance(shape, (shapes.DataclassType, shapes.StructType, shapes.TypedDictType)):
        raise Unsupported(f"{name} is none of dataclass, msgspec.Struct, attrs class, TypedDict and dict")
    if isinstance(shape, shapes.StructType) and shape.array_like:
        raise Unsupported(f"{name} is array_like: a payload is a JSON object")
    for path, node in _nodes(shape, name, set()):
        if isinstance(node, (shapes.CustomType, shapes.RawType, shapes.ExtType, shapes.MemoryViewType)):
            what = getattr(node, "cls", type(node)).__name__
            raise Unsupported(f"{path} has the type {what}, which has no JSON form that comes back")
        if isinstance(node, shapes.DataclassType):
            private = next((each.name for each in node.fields if each.name.startswith("_")), None)
            if private is not None:
                raise Unsupported(f"{path}.{private} begins with an underscore, and would be left out")
        if isinstance(node, shapes.DictType):
            keys = node.key_type.types if isinstance(node.key_type, shapes.UnionType) else (node.key_type,)
            bad = next((key for key in keys if not isinstance(key, _KEYS)), None)
            if bad is not None:
                raise Unsupported(f"{path} has keys of a type ({type(bad).__name__}) that no JSON key can hold")
    return shape


def is_too_deep(data: bytes) -> bool:
    """Whether JSON is nested more than MAX_NESTING deep."""
    # What opens closes, and few payloads hold so many brackets at all.
    if len(data) <= 2 * MAX_NESTING or data.count(b"{") + data.count(b"[") <= MAX_NESTING:
        return False
    brackets = _strings(b"", data).translate(_BRACKETS, _NO_BRACKETS)
    for _ in range(MAX_NESTING):
        if not brackets:
            return False
        brackets = brackets.replace(b"{}", b"")  # the innermost level
    return bool(brackets)


def reason_and_path(error: Exception, data: bytes) -> tuple[str, str | None]:
    """Say why *data* could not be decoded, and where in the JSON, if that is known; without any value out of it."""
    if isinstance(error, UnicodeDecodeError):
        return "text that is no UTF-8", None
    if isinstance(error, RecursionError):
        return "nested too deeply", None
    if not isinstance(error, msgspec.MsgspecError):
        # Texts of foreign errors may quote what they dislike. The error itself stays at hand, as the cause.
        return f"{type(error).__name__} was raised", None
    reason, found, path = str(error).rpartition(" - at `")
    if not found:
        reason, path = str(error), ""
    if error.__cause__ is not None:
        reason = f"the class itself refuses it, by {type(error.__cause__).__name__}"
    elif quoting := _QUOTING.match(reason):
        reason = quoting.group()
    elif reason == "Input data was truncated" and _half_pair_ends(data) is not None:
        reason = "half of an escaped surrogate pair"
    return reason, path.rstrip("`") or None


def _culprit(payload_class: type[Any]) -> str:
    """The class, or its first field, whose type alone cannot be encoded."""
    with suppress(Exception):  # the annotations may be what is wrong
        for name, hint in get_type_hints(payload_class, include_extras=True).items():
            try:
                msgspec.json.Decoder(hint)
            except Exception:  # noqa: BLE001  # by the annotation, as above
                return f"{payload_class.__name__}.{name}"
    return payload_class.__name__


def _nodes(shape: shapes.Type, path: str, seen: set[type[Any]]) -> Iterator[tuple[str, shapes.Type]]:
    """Every type that occurs in *shape*, with where it occurs."""
    yield path, shape
    if isinstance(shape, (shapes.DataclassType, shapes.StructType, shapes.TypedDictType, shapes.NamedTupleType)):
        if shape.cls not in seen:  # a class may hold itself
            seen.add(shape.cls)
            for each in shape.fields:
                yield from _nodes(each.type, f"{path}.{each.name}", seen)
    elif isinstance(shape, shapes.UnionType):
        for each_type in shape.types:
            yield from _nodes(each_type, path, seen)
    elif isinstance(shape, shapes.DictType):
        yield from _nodes(shape.key_type, f"{path}, a key,", seen)
        yield from _nodes(shape.value_type, f"{path}[…]", seen)
    elif isinstance(shape, shapes.TupleType):
        for each_type in shape.item_types:
            yield from _nodes(each_type, f"{path}[…]", seen)
    elif isinstance(shape, shapes.CollectionType):
        yield from _nodes(shape.item_type, f"{path}[…]", seen)


def _may_hide_fields(node: shapes.Type) -> bool:
    """Whether == between two objects of a class may leave out fields, by ``compare=False`` or an __eq__ of its own."""
    if not isinstance(node, (shapes.DataclassType, shapes.StructType, shapes.NamedTupleType)):
        return False
    equality: object = node.cls.__eq__
    if not isinstance(node, shapes.DataclassType):
        return equality not in (msgspec.Struct.__eq__, tuple.__eq__)
    # One that is inherited knows nothing of the fields that were added.
    code = getattr(vars(node.cls).get("__eq__"), "__code__", None)
    if code is None:
        return True
    if dataclasses.is_dataclass(node.cls):
        is_generated = code.co_qualname.startswith("__create_fn__.")
        return not (is_generated and all(each.compare for each in dataclasses.fields(node.cls)))
    is_generated = code.co_filename.startswith("<attrs generated ")
    return not (is_generated and all(each.eq and each.eq_key is None for each in _attrs_fields(node.cls)))


def _are_equal(left: Any, right: Any) -> bool:
    try:
        return bool(left == right)
    except Exception:  # noqa: BLE001  # a signalling NaN raises, and a class's own __eq__ may
        return False


def _is_same_moment(mine: datetime, back: Any) -> bool:
    """By what clock and offset say: across zones, Python calls a time in a repeated hour unequal to whatever it is."""
    if not isinstance(back, datetime):
        return False
    my_offset, its_offset = mine.utcoffset(), back.utcoffset()
    if my_offset is None or its_offset is None:
        return False
    # Not by astimezone(UTC), which leaves the calendar at its ends.
    return mine.replace(tzinfo=None) - back.replace(tzinfo=None) == my_offset - its_offset


def _difference(payload: Any, back: Any) -> tuple[str, str] | None:
    try:
        return _first_difference(payload, back, "$")
    except RecursionError:  # what msgspec, in C, could still go through
        return "$", _TOO_DEEP


def _first_difference(mine: Any, back: Any, path: str) -> tuple[str, str] | None:
    """Where *back*, decoded from what *mine* was encoded to, says something else, and what; None where it does not."""
    if isinstance(mine, datetime):
        if mine.utcoffset() is None:
            return path, "is a datetime without a time zone"
        if _is_same_moment(mine, back):
            return None
    if isinstance(mine, float) and not math.isfinite(mine):
        return path, "is not a finite number"
    if isinstance(mine, Decimal) and mine.is_nan():
        return path, "is not a number"
    inner = _parts(mine, back, path)
    if inner is None:
        # An object of a class that lies between: its own == may see no more than its parent's fields.
        is_other_class = type(mine) is not type(back) and field_names(mine) is not None
        return None if not is_other_class and _are_equal(mine, back) else (path, _other(mine, back))
    for inner_path, inner_mine, inner_back in inner:
        if found := _first_difference(inner_mine, inner_back, inner_path):
            return found
    return None


def _parts(mine: Any, back: Any, path: str) -> list[tuple[str, Any, Any]] | None:
    """What a value is made of, beside what its twin is made of; None for a value without parts, or of another make."""
    if isinstance(mine, Mapping) and isinstance(back, Mapping):
        keys = {key: key for key in back}
        parts = []
        for key, value in mine.items():
            place = f"{path}.{key}" if isinstance(key, str) and key.isidentifier() else f"{path}[{key!r}]"
            if key not in keys:
                return [(place, value, _Absent())]
            if not isinstance(key, str):
                parts.append((f"{path}, the key {key!r},", key, keys[key]))
            parts.append((place, value, back[key]))
        return parts if len(mine) == len(keys) else [(path, mine, _Absent())]
    if isinstance(mine, (set, frozenset)) and isinstance(back, (set, frozenset)):
        members = {member: member for member in back}
        return [(f"{path}[…]", member, members.get(member, _Absent())) for member in mine]
    for kind in (list, tuple):
        if isinstance(mine, kind) and isinstance(back, kind) and not hasattr(mine, "_fields"):
            if len(mine) != len(back):
                return [(path, mine, _Absent())]
            return [(f"{path}[{index}]", *pair) for index, pair in enumerate(zip(mine, back, strict=True))]
    names = field_names(mine) if type(mine) is type(back) else None
    if names is None:
        return None
    return [(f"{path}.{name}", getattr(mine, name, None), getattr(back, name, None)) for name in names]


class _Absent:
    """Stands for what did not come back at all."""


def field_names(value: Any) -> list[str] | None:
    """The names of the fields of a dataclass's, Struct's, attrs class's or named tuple's object; None for others."""
    kind = type(value)
    if isinstance(value, msgspec.Struct):
        return list(kind.__struct_fields__)
    if dataclasses.is_dataclass(kind):
        return [each.name for each in dataclasses.fields(kind)]
    if hasattr(kind, "__attrs_attrs__"):
        return [each.name for each in _attrs_fields(kind)]
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return list(kind._fields)
    return None


def _attrs_fields(kind: type[Any]) -> tuple[Any, ...]:
    """The fields of an attrs class, asked without attrs, which need not be installed."""
    found: tuple[Any, ...] = getattr(kind, "__attrs_attrs__", ())
    return found


def _other(mine: Any, back: Any) -> str:
    if isinstance(back, _Absent):
        return "would be lost"
    if type(mine) is type(back):
        return f"would come back as another {type(mine).__name__}"
    return f"is a {type(mine).__name__}, and would come back as {type(back).__name__}"


def _unencodable(payload: Any, error: Exception) -> tuple[str, str]:
    """Where in *payload* the value stands that cannot be encoded, and why."""
    if isinstance(error, RecursionError):
        return "$", _TOO_DEEP
    path, value = "$", payload
    while True:
        for inner_path, inner, _ in _parts(value, value, path) or ():
            try:
                _encode(inner)
            except (TypeError, ValueError, OverflowError, RecursionError) as inner_error:
                path, value, error = inner_path, inner, inner_error
                break
        else:
            break
    if isinstance(error, UnicodeEncodeError):
        return path, "holds half of a surrogate pair, which UTF-8 cannot hold"
    return path, f"cannot be encoded: {error}"
