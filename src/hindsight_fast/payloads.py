"""Payload classes: which of them JSON can hold, how their objects become bytes, and whether they would come back.

Encoding and decoding are msgspec's. Both are exact for what is let through here: integers of any size, decimals as
text, aware times. What msgspec would change without a word (NaN becomes null, a set in a dict a list) is found by
decoding what was encoded and comparing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from msgspec import inspect as shapes

_encode: Final = msgspec.json.Encoder(decimal_format="string", uuid_format="canonical").encode


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
        check_payload_class(payload_class)
        self.decode: Callable[[bytes], Any] = msgspec.json.Decoder(payload_class).decode
        self._holds_times = _holds_times(payload_class)

    def encode(self, payload: Any) -> bytes:
        """Return *payload* as JSON that decodes to its equal. Raises Lossy."""
        try:
            data = _encode(payload)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise Lossy(*_unencodable(payload, error)) from error
        try:
            back = self.decode(data)
        except msgspec.ValidationError as error:
            reason, path = split_path(str(error))
            raise Lossy(path or "$", f"does not have its declared type: {reason}") from error
        except Exception as error:  # a class's own __post_init__ may raise whatever it likes
            raise Lossy("$", f"cannot be made again from what was encoded: {error}") from error
        # Equal is nearly always enough, and fast. But naive times come back equal to themselves, and a time in a
        # repeated hour unequal to itself.
        naive = self._holds_times and _holds_naive(msgspec.to_builtins(payload, builtin_types=(datetime,)))
        if (naive or back != payload) and (found := _first_difference(payload, back, "$")):
            raise Lossy(*found)
        return data


def check_payload_class(payload_class: type[Any]) -> None:
    """Raise Unsupported unless objects of the class become JSON objects, and come back."""
    if payload_class is dict:
        return
    if not isinstance(payload_class, type):
        raise Unsupported(f"{payload_class!r} is no class")
    try:
        shape = shapes.type_info(payload_class)
    except Exception as error:  # msgspec raises TypeError, NotImplementedError or NameError, by the annotation
        raise Unsupported(f"{payload_class.__name__} cannot be encoded: {error}") from error
    if not isinstance(shape, (shapes.DataclassType, shapes.StructType, shapes.TypedDictType)):
        raise Unsupported(
            f"{payload_class.__name__} is none of dataclass, msgspec.Struct, attrs class, TypedDict and dict"
        )
    if isinstance(shape, shapes.StructType) and shape.array_like:
        raise Unsupported(f"{payload_class.__name__} is array_like: a payload is a JSON object")
    for path, node in _nodes(shape, payload_class.__name__, set()):
        if isinstance(node, (shapes.CustomType, shapes.RawType, shapes.ExtType, shapes.MemoryViewType)):
            what = getattr(node, "cls", type(node)).__name__
            raise Unsupported(f"{path} has the type {what}, which has no JSON form that comes back")


def split_path(message: str) -> tuple[str, str | None]:
    """Part msgspec's message into the reason and the path in the JSON, where it names one."""
    reason, found, path = message.rpartition(" - at `")
    return (reason, path.rstrip("`")) if found else (message, None)


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


def _holds_times(payload_class: type[Any]) -> bool:
    if payload_class is dict:
        return False  # a time in it comes back as text, which is not its equal
    nodes = _nodes(shapes.type_info(payload_class), "", set())
    return any(isinstance(node, shapes.DateTimeType) for _, node in nodes)


def _holds_naive(value: Any) -> bool:
    """Whether a datetime without a time zone stands anywhere in *value*, made of dicts and lists."""
    kind = type(value)
    if kind is dict:
        return any(map(_holds_naive, value.values()))
    if kind is list:
        return any(map(_holds_naive, value))
    return isinstance(value, datetime) and value.utcoffset() is None


def _first_difference(mine: Any, back: Any, path: str) -> tuple[str, str] | None:
    """Where *back*, decoded from what *mine* was encoded to, says something else, and what; None where it does not."""
    if isinstance(mine, datetime):
        if mine.utcoffset() is None:
            return path, "is a datetime without a time zone"
        # By instant: across zones, Python calls times in a repeated hour unequal whatever they are.
        if isinstance(back, datetime) and mine.astimezone(UTC) == back.astimezone(UTC):
            return None
    if isinstance(mine, float) and not math.isfinite(mine):
        return path, "is not a finite number"
    if type(mine) is not type(back) and not (isinstance(mine, (int, float)) and isinstance(back, (int, float))):
        return path, _other(mine, back)
    inner = _parts(mine, back, path)
    if inner is None:
        return None if mine == back else (path, _other(mine, back))
    for inner_path, inner_mine, inner_back in inner:
        if found := _first_difference(inner_mine, inner_back, inner_path):
            return found
    return None


def _parts(mine: Any, back: Any, path: str) -> list[tuple[str, Any, Any]] | None:
    """What a value is made of, beside what its twin is made of; None for a value without parts."""
    if isinstance(mine, Mapping):
        keys = list(mine)
        if keys != list(back):
            lost = next((key for key in keys if key not in back), None)
            return [(f"{path}[{lost!r}]", lost, _Absent())] if lost is not None else [(path, mine, _Absent())]
        return [(f"{path}.{key}", mine[key], back[key]) for key in keys]
    if isinstance(mine, (list, tuple)) and not hasattr(mine, "_fields"):
        if len(mine) != len(back):
            return [(path, mine, _Absent())]
        return [(f"{path}[{index}]", *pair) for index, pair in enumerate(zip(mine, back, strict=True))]
    names = field_names(mine)
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
        return [each.name for each in kind.__attrs_attrs__]
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return list(kind._fields)
    return None


def _other(mine: Any, back: Any) -> str:
    if isinstance(back, _Absent):
        return "would be lost"
    if type(mine) is type(back):
        return f"would come back as another {type(mine).__name__}"
    return f"is a {type(mine).__name__}, and would come back as {type(back).__name__}"


def _unencodable(payload: Any, error: Exception) -> tuple[str, str]:
    """Where in *payload* the value stands that cannot be encoded, and why."""
    if isinstance(error, RecursionError):
        return "$", "is nested too deeply, or holds itself"
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
