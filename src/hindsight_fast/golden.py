"""Golden files: what is stored under each version of an event, and what it means today, written down to be compared.

A file ``<folder>/<name>/<version>.json`` holds the version's shape, examples of stored payloads, and what the latest
version made of each. All JSON in it is canonical: keys and sets are sorted, so that neither the order of fields nor
chance shows as a change.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import msgspec
from msgspec import inspect as shapes

from .errors import EventEncodeError, EventParseError
from .events import EventType
from .payloads import PayloadCodec, check_payload_class, reason_and_path

UPDATE: Final = "pytest --hindsight-update-golden"

_CONSTRAINTS: Final = ("gt", "ge", "lt", "le", "multiple_of", "pattern", "min_length", "max_length", "tz")
_SHOWN_LINES: Final = 20
MOST_LETTERS: Final = 200
"""Of a folder's name; file systems end at 255 bytes, an event's name, escaped, at 3,000."""

_encode_sorted: Final = msgspec.json.Encoder(order="sorted").encode


class Broken(Exception):
    """A golden file and its event type do not agree; the message says in what, and what to do."""


class Example(msgspec.Struct):
    """A payload as it is stored, and as the latest version reads it."""

    stored: msgspec.Raw
    today: msgspec.Raw


class GoldenFile(msgspec.Struct):
    """What is written down about one version, and which version was the latest then."""

    event: str
    version: int
    latest_version: int
    shape: msgspec.Raw
    examples: list[Example]


_decode_file: Final = msgspec.json.Decoder(GoldenFile, strict=True).decode


def path_of(folder: Path, event_type: EventType[Any], version: int) -> Path:
    """Return where the golden file of a version lies."""
    return folder_of(folder, event_type) / f"{version}.json"


def folder_of(folder: Path, event_type: EventType[Any]) -> Path:
    """Return where the golden files of an event type lie; a name is no path, whatever it looks like."""
    name = quote(event_type.name, safe=" ")
    if name.startswith("."):
        name = name.replace(".", "%2E")
    if len(name) > MOST_LETTERS:
        digest = hashlib.blake2b(event_type.name.encode(), digest_size=8).hexdigest()
        name = f"{name[: MOST_LETTERS - 20]} {digest}"
    return folder / name


def compare(folder: Path, event_type: EventType[Any], version: int) -> None:
    """Raise Broken unless the golden file of a version is there and still holds."""
    path = path_of(folder, event_type, version)
    what = f"version {version} of {event_type.name!r}"
    try:
        golden = _decode_file(path.read_bytes())
    except FileNotFoundError:
        raise Broken(
            f"{what} has no golden file {path}. Run {UPDATE}, look at what it writes, and commit it."
        ) from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Broken(f"{path} is no golden file: {error}. Put it back from version control, or run {UPDATE}.") from None
    remedy = (
        f"Put the class back, and add a version {event_type.latest_version + 1} with an upcast instead. If version"
        f" {version} was never stored anywhere, run {UPDATE}."
    )
    for number, example in enumerate(golden.examples):
        _check_stored(event_type, version, _compact(example.stored), f"example {number} in {path}", remedy)
    shape = shape_of(event_type.versions[version])
    if shape != _compact(golden.shape):
        raise Broken(
            f"the shape of {what} changed. Its stored events can still be read, but programs that run the older code"
            f" may not read what is written from now on:\n{_difference(_compact(golden.shape), shape)}\n{remedy}"
            f" The same if all of them are updated before anything is written."
        )
    if golden.latest_version < event_type.latest_version:
        raise Broken(
            f"{path} does not say yet what {what} becomes in version {event_type.latest_version}, which is new."
            f" Run {UPDATE}, look at what it writes, and commit it."
        )
    for number, example in enumerate(golden.examples):
        today = _today(event_type, version, _compact(example.stored))
        if today != _compact(example.today):
            raise Broken(
                f"what {what} becomes today changed: readers and projections will see other payloads for events that"
                f" were stored long ago (example {number} in {path}):\n"
                f"{_difference(_compact(example.today), today)}\n"
                f"Put the upcasts back as they were. If the change is meant, run {UPDATE}, look at what it writes, and"
                " rebuild the projections that have seen such events."
            )


def check_leftovers(folder: Path, event_types: Sequence[EventType[Any]]) -> None:
    """Raise Broken for a golden file that belongs to no version of *event_types*: what was stored once must be read."""
    known = {path_of(folder, each, version) for each in event_types for version in range(len(each.versions))}
    homes = {folder_of(folder, each): each for each in event_types}
    for path in sorted(folder.glob("*/*.json")):
        if path in known:
            continue
        owner = homes.get(path.parent)
        if owner is None:
            raise Broken(
                f"{path} belongs to no event type here: was one renamed or taken out? Events stored under the old name"
                " would be read as plain dicts. Keep the type under its name; if no such event was ever stored, delete"
                f" the folder {path.parent}. (Each event_contract_tests has a golden folder of its own.)"
            )
        raise Broken(
            f"{path} is of a version that {owner.name!r} does not have any more: events stored under it can no longer"
            " be read. Put the version back; if no such event was ever stored, delete the file."
        )


def readable_examples(folder: Path, event_type: EventType[Any], version: int) -> list[bytes]:
    """Return the stored payloads of an existing golden file if all of them are still read as before, else none."""
    try:
        golden = _decode_file(path_of(folder, event_type, version).read_bytes())
        stored = [_compact(example.stored) for example in golden.examples]
        for each in stored:
            _check_stored(event_type, version, each, "", "")
    except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError, Broken):
        return []
    return stored


def write(folder: Path, event_type: EventType[Any], version: int, payloads: Sequence[bytes]) -> None:
    """Write the golden file of a version, from payloads as they are stored. Raises Broken where they do not pass."""
    path = path_of(folder, event_type, version)
    examples = []
    codec = PayloadCodec(event_type.versions[version])
    for each in payloads:
        stored = canonical(codec.decode(each))
        _check_stored(event_type, version, stored, "a new example", "")
        today = _today(event_type, version, stored)
        if today != _today(event_type, version, stored):
            raise Broken(
                f"the upcasts of {event_type.name!r} make something else of the same version {version} each time: an"
                " upcast may use nothing but the payload it is given."
            )
        examples.append(Example(msgspec.Raw(stored), msgspec.Raw(today)))
    shape = msgspec.Raw(shape_of(event_type.versions[version]))
    golden = GoldenFile(event_type.name, version, event_type.latest_version, shape, examples)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(golden), indent=2) + b"\n")


def shape_of(payload_class: type[Any]) -> bytes:
    """Return, as JSON, the names and types of a payload class's fields, as far as what is stored depends on them."""
    shape = check_payload_class(payload_class)
    return canonical("dict" if shape is None else _described(shape, ()))


def _described(node: shapes.Type, above: tuple[type[Any], ...]) -> Any:
    kind = type(node).__name__.removesuffix("Type").lower()
    if isinstance(node, (shapes.EnumType, shapes.LiteralType)):
        values = node.values if isinstance(node, shapes.LiteralType) else [each.value for each in node.cls]
        return {"one of": sorted(values, key=repr)}
    if isinstance(node, (shapes.DataclassType, shapes.StructType, shapes.TypedDictType, shapes.NamedTupleType)):
        if node.cls in above:
            return "itself, from above"
        may_lack = isinstance(node, shapes.TypedDictType)
        fields: dict[str, Any] = {}
        for each in node.fields:
            name = each.encode_name + ("?" if may_lack and not each.required else "")
            fields[name] = _described(each.type, (*above, node.cls))
            if isinstance(node, shapes.StructType) and node.cls.__struct_config__.omit_defaults and not each.required:
                # Stored is then, by its absence, whatever the default is.
                default = each.default if each.default_factory is msgspec.NODEFAULT else each.default_factory()
                fields[name] = {"type": fields[name], "when absent": msgspec.to_builtins(default, str_keys=True)}
        if isinstance(node, shapes.StructType) and node.tag_field is not None:
            fields[node.tag_field] = {"one of": [node.tag]}
        return fields
    if isinstance(node, shapes.UnionType):
        members = sorted((_described(each, above) for each in node.types), key=canonical)
        return " | ".join(members) if all(isinstance(each, str) for each in members) else {"any of": members}
    inner: Any = None
    if isinstance(node, shapes.DictType):
        inner = {kind: {"keys": _described(node.key_type, above), "values": _described(node.value_type, above)}}
    elif isinstance(node, shapes.TupleType):
        inner = {kind: [_described(each, above) for each in node.item_types]}
    elif isinstance(node, shapes.CollectionType):
        inner = {kind: _described(node.item_type, above)}
    bounds = {name: bound for name in _CONSTRAINTS if (bound := getattr(node, name, None)) is not None}
    if inner is not None:
        return {**inner, **bounds}
    return kind if not bounds else {kind: bounds}


def _check_stored(event_type: EventType[Any], version: int, stored: bytes, which: str, remedy: str) -> None:
    """Raise Broken unless the class of a version reads *stored*, and would store the same again."""
    changed = f"the shape of version {version} of {event_type.name!r} changed: stored events can no longer be read"
    codec = PayloadCodec(event_type.versions[version])
    try:
        again = canonical(codec.decode(stored))
    except Exception as error:  # a class's own __post_init__ may raise whatever it likes
        reason, path = reason_and_path(error, stored)
        place = which if path is None else f"{path} of {which}"
        raise Broken(f"{changed}: {reason} ({place}). {remedy}") from error
    before = canonical(msgspec.json.decode(stored))
    if again != before:
        raise Broken(f"{changed} for what they say ({which}):\n{_difference(before, again)}\n{remedy}")


def _today(event_type: EventType[Any], version: int, stored: bytes) -> bytes:
    """Return what the latest version makes of *stored*. Raises Broken where the chain fails, or ends in the unstorable.

    An upcast must not end with what no append would accept.
    """
    latest = event_type.latest_version
    try:
        payload = event_type.decode(version, stored)
    except EventParseError as error:
        raise Broken(
            f"version {version} of {event_type.name!r} cannot be brought to version {latest} any more: {error.reason}."
            " Events that were stored long ago need this way for ever: mend the upcast."
        ) from error.__cause__
    try:
        event_type.encode(payload)
    except EventEncodeError as error:
        raise Broken(
            f"what version {version} of {event_type.name!r} becomes is no payload of version {latest}: {error}"
        ) from error
    return canonical(payload)


def canonical(payload: Any) -> bytes:
    """Return *payload* as JSON, in the one order that golden files know."""
    # In two steps: the encoder sorts no keys that are not text yet.
    return _encode_sorted(msgspec.to_builtins(payload, str_keys=True, order="sorted"))


def _compact(raw: msgspec.Raw) -> bytes:
    return msgspec.json.format(bytes(raw), indent=-1)


def _difference(before: bytes, after: bytes) -> str:
    old, new = (msgspec.json.format(each, indent=2).decode().splitlines() for each in (before, after))
    changed = [line for line in difflib.ndiff(old, new) if line[:2] in ("- ", "+ ")]
    more = [f"  … and {len(changed) - _SHOWN_LINES} lines more"] if len(changed) > _SHOWN_LINES else []
    return "\n".join(changed[:_SHOWN_LINES] + more)
