"""The plain twins of the compiled core: slow, obvious, and the oracle of its tests. Never shipped.

Nothing here imports the core. What PostgreSQL expects is written down a second time, field by field, with ``struct``.
"""

import json
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import NoReturn
from uuid import UUID

EVENT_COLUMNS = (
    "transaction_no",
    "sequence_no",
    "event_id",
    "stream_id",
    "stream_version",
    "created_at",
    "event_version",
    "correlation_id",
    "event_name",
    "payload",
    "metadata",
)

EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
UUID_OID = 2950
BIGINT_OID = 20
INTEGER_OID = 23
TEXT_OID = 25
JSON_OID = 114
TIMESTAMPTZ_OID = 1184


# --- Cursor ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class PlainCursor:
    """A place in the total order: transaction first, then the number within it."""

    transaction_no: int
    sequence_no: int

    def __post_init__(self) -> None:
        for number, bits in ((self.transaction_no, 63), (self.sequence_no, 31)):
            if type(number) is bool or not isinstance(number, int):
                raise TypeError(f"not an int: {number!r}")
            if number < 0 or number >= 2**bits:
                raise ValueError(f"out of range: {number}")

    def __hash__(self) -> int:
        """The number that the core computes in 64-bit registers, here with an explicit mask."""
        mask = 2**64 - 1
        mixed = (self.transaction_no * 0x9E3779B97F4A7C15 + self.sequence_no) & mask
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = mixed ^ (mixed >> 31)
        signed = mixed - 2**64 if mixed >= 2**63 else mixed
        return -2 if signed == -1 else signed

    def __str__(self) -> str:
        return f"{self.transaction_no}:{self.sequence_no}"

    @staticmethod
    def parse(text: str) -> "PlainCursor":
        transaction_no, colon, sequence_no = text.partition(":")
        if colon != ":":
            raise ValueError(f"no colon: {text!r}")
        cursor = PlainCursor(int(transaction_no), int(sequence_no))
        if str(cursor) != text:  # int() takes blanks, signs, underscores, leading zeros and foreign digits
            raise ValueError(f"not what str() writes: {text!r}")
        return cursor

    def to_dict(self) -> dict[str, int]:
        return {"transaction_no": self.transaction_no, "sequence_no": self.sequence_no}


# --- Events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlainNewEvent:
    """What ``EventRows.add`` is given."""

    event_id: UUID
    stream_id: UUID
    event_name: str
    event_version: int
    payload: bytes
    created_at: datetime | None = None
    correlation_id: UUID | None = None
    metadata: bytes | None = None


@dataclass(frozen=True)
class PlainEvent:
    """An event at its place in the log, one attribute a column, in the order of EVENT_COLUMNS."""

    transaction_no: int
    sequence_no: int
    event_id: UUID
    stream_id: UUID
    stream_version: int
    created_at: datetime
    event_version: int
    correlation_id: UUID | None
    event_name: str
    payload: bytes
    metadata: bytes | None


def place(
    events: list[PlainNewEvent], transaction_no: int, head_versions: dict[UUID, int], now: datetime
) -> list[PlainEvent]:
    """Number *events* so that each stream's last one gets its head version."""
    placed = []
    for sequence_no, event in enumerate(events):
        later_in_stream = [other for other in events[sequence_no + 1 :] if other.stream_id == event.stream_id]
        placed.append(
            PlainEvent(
                transaction_no=transaction_no,
                sequence_no=sequence_no,
                event_id=event.event_id,
                stream_id=event.stream_id,
                stream_version=head_versions[event.stream_id] - len(later_in_stream),
                created_at=now if event.created_at is None else event.created_at,
                event_version=event.event_version,
                correlation_id=event.correlation_id,
                event_name=event.event_name,
                payload=event.payload,
                metadata=event.metadata,
            )
        )
    return placed


# --- Rows of a binary COPY ------------------------------------------------------------------------------------------


def encode_row(event: PlainEvent) -> bytes:
    """One row: an int16 column count, then each value behind its int32 length, -1 for NULL."""
    microseconds = (event.created_at - EPOCH) // timedelta(microseconds=1)
    values = [
        struct.pack("!q", event.transaction_no),
        struct.pack("!i", event.sequence_no),
        event.event_id.bytes,
        event.stream_id.bytes,
        struct.pack("!q", event.stream_version),
        struct.pack("!q", microseconds),
        struct.pack("!i", event.event_version),
        None if event.correlation_id is None else event.correlation_id.bytes,
        event.event_name.encode("utf-8"),
        event.payload,
        event.metadata,
    ]
    return encode_values(values)


def encode_values(values: list[bytes | None]) -> bytes:
    """A row of any values, also of such as make no event."""
    row = struct.pack("!h", len(values))
    for value in values:
        if value is None:
            row += struct.pack("!i", -1)
        else:
            row += struct.pack("!i", len(value)) + value
    return row


def encode_copy(rows: Iterable[bytes]) -> bytes:
    """The whole stream of a COPY: signature, no flags, no header extension; the rows; an end marker."""
    return b"PGCOPY\n\xff\r\n\0" + struct.pack("!ii", 0, 0) + b"".join(rows) + struct.pack("!h", -1)


def decode_row(row: bytes) -> PlainEvent:
    """Read what ``encode_row`` wrote. Raises ValueError for anything else."""
    return decode_values(split_row(row))


def split_row(row: bytes) -> list[bytes | None]:
    """Return the values of a row. Raises ValueError."""
    if len(row) < 2:
        raise ValueError("no column count")
    (column_count,) = struct.unpack("!h", row[:2])
    if column_count != len(EVENT_COLUMNS):
        raise ValueError(f"{column_count} columns")
    rest = row[2:]
    values: list[bytes | None] = []
    for column in EVENT_COLUMNS:
        if len(rest) < 4:
            raise ValueError(f"no length of {column}")
        (length,) = struct.unpack("!i", rest[:4])
        rest = rest[4:]
        if length == -1:
            values.append(None)
            continue
        if length < 0 or length > len(rest):
            raise ValueError(f"{column} cannot take {length} bytes")
        values.append(rest[:length])
        rest = rest[length:]
    if rest:
        raise ValueError(f"{len(rest)} bytes too many")
    return values


def decode_values(values: list[bytes | None]) -> PlainEvent:
    """Make an event of the values of a row. Raises ValueError."""
    value_of = dict(zip(EVENT_COLUMNS, values, strict=True))

    def required(column: str, length: int | None = None) -> bytes:
        value = value_of[column]
        if value is None:
            raise ValueError(f"{column} is NULL")
        if length is not None and len(value) != length:
            raise ValueError(f"{column} takes {len(value)} bytes")
        return value

    def number(column: str, length: int) -> int:
        result = int.from_bytes(required(column, length), "big", signed=True)
        if result < 0:
            raise ValueError(f"{column} is negative")
        return result

    microseconds = int.from_bytes(required("created_at", 8), "big", signed=True)
    try:
        created_at = EPOCH + timedelta(microseconds=microseconds)
    except OverflowError as error:
        raise ValueError("created_at is no datetime") from error

    return PlainEvent(
        transaction_no=number("transaction_no", 8),
        sequence_no=number("sequence_no", 4),
        event_id=UUID(bytes=required("event_id", 16)),
        stream_id=UUID(bytes=required("stream_id", 16)),
        stream_version=number("stream_version", 8),
        created_at=created_at,
        event_version=number("event_version", 4),
        correlation_id=None if value_of["correlation_id"] is None else UUID(bytes=required("correlation_id", 16)),
        event_name=required("event_name").decode("utf-8"),  # a UnicodeDecodeError is a ValueError
        payload=required("payload"),
        metadata=value_of["metadata"],
    )


def in_utc(event: PlainEvent) -> PlainEvent:
    """The same event with its time written in UTC, as a decoder returns it."""
    return replace(event, created_at=event.created_at.astimezone(UTC))


# --- Lines of the import format -------------------------------------------------------------------------------------


def export_line(event: PlainEvent) -> bytes:
    """One JSON object and a newline; stored JSON as it is, but for the white space that a line cannot hold."""
    fields = {
        "stream": _quoted(str(event.stream_id)),
        "type": _quoted(event.event_name),
        "data": _on_one_line(event.payload),
        "version": str(event.event_version).encode(),
        "id": _quoted(str(event.event_id)),
        "time": _quoted(event.created_at.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"),
    }
    if event.correlation_id is not None:
        fields["correlation_id"] = _quoted(str(event.correlation_id))
    if event.metadata is not None and _on_one_line(event.metadata) != b"null":
        fields["metadata"] = _on_one_line(event.metadata)
    return b"{" + b",".join(b'"%s":%s' % (name.encode(), value) for name, value in fields.items()) + b"}\n"


def _quoted(text: str) -> bytes:
    escaped = ""
    for letter in text:
        if letter < " ":
            escaped += f"\\u{ord(letter):04x}"
        else:
            escaped += f"\\{letter}" if letter in '"\\' else letter
    return f'"{escaped}"'.encode()


def _on_one_line(stored: bytes) -> bytes:
    trimmed = stored.strip(b" \t\r\n")
    if not trimmed:
        raise ValueError("no JSON value")
    return trimmed.replace(b"\n", b" ").replace(b"\r", b" ")


# --- Arrays ---------------------------------------------------------------------------------------------------------


def encode_uuid_array(ids: list[UUID]) -> bytes:
    return _encode_array(UUID_OID, [one.bytes for one in ids])


def encode_bigint_array(numbers: list[int]) -> bytes:
    return _encode_array(BIGINT_OID, [struct.pack("!q", number) for number in numbers])


def _encode_array(element_oid: int, elements: list[bytes]) -> bytes:
    """One dimension, no NULLs, the element type; length and lower bound 1; each element behind its length."""
    array = struct.pack("!iiIii", 1, 0, element_oid, len(elements), 1)
    for element in elements:
        array += struct.pack("!i", len(element)) + element
    return array


def encode_int_array(element_oid: int, numbers: list[int | None]) -> bytes:
    """An ``integer[]`` (23) or a ``bigint[]`` (20), which may hold NULLs."""
    form = "!i" if element_oid == INTEGER_OID else "!q"
    return _encode_column(element_oid, [None if number is None else struct.pack(form, number) for number in numbers])


def decode_int_array(array: bytes) -> list[int | None]:
    """Read what ``encode_int_array`` wrote, or an array without dimensions. Raises ValueError for anything else."""
    try:
        dimensions, _has_null, element_oid = struct.unpack_from("!iiI", array)
        if element_oid not in (INTEGER_OID, BIGINT_OID) or dimensions not in (0, 1):
            raise ValueError("not an array of integers")
        if dimensions == 0:
            if len(array) > 12:
                raise ValueError("bytes too many")
            return []
        (count,) = struct.unpack_from("!i", array, 12)
        struct.unpack_from("!i", array, 16)
        if count < 0:
            raise ValueError("a negative length")
        numbers: list[int | None] = []
        at = 20
        for _ in range(count):
            (size,) = struct.unpack_from("!i", array, at)
            at += 4
            if size == -1:
                numbers.append(None)
                continue
            if size != (4 if element_oid == INTEGER_OID else 8):
                raise ValueError(f"an integer of {size} bytes")
            numbers.append(struct.unpack_from("!i" if size == 4 else "!q", array, at)[0])
            at += size
    except struct.error as error:
        raise ValueError("cut short") from error
    if at != len(array):
        raise ValueError("bytes too many")
    return numbers


def _encode_column(element_oid: int, elements: list[bytes | None]) -> bytes:
    has_null = any(element is None for element in elements)
    array = struct.pack("!iiIii", 1, has_null, element_oid, len(elements), 1)
    return array + b"".join(
        struct.pack("!i", -1) if element is None else struct.pack("!i", len(element)) + element for element in elements
    )


# --- Groups of appends ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlainWrite:
    """The events of one stream, and between which versions, or at which cursor, it is expected to be."""

    stream_id: UUID
    events: list[PlainNewEvent]
    bounds: tuple[int, int] | None = None
    cursor: tuple[int, int] | None = None


@dataclass(frozen=True)
class PlainRequest:
    writes: list[PlainWrite]


def row_values(event: PlainNewEvent) -> list[bytes | None]:
    """What the server is given of an event: id, cause, time, name, version, payload, metadata."""
    moment = event.created_at
    return [
        event.event_id.bytes,
        None if event.correlation_id is None else event.correlation_id.bytes,
        None if moment is None else struct.pack("!q", (moment - EPOCH) // timedelta(microseconds=1)),
        event.event_name.encode(),
        struct.pack("!i", event.event_version),
        event.payload,
        event.metadata,
    ]


def group_parameters(requests: list[PlainRequest]) -> tuple[list[bytes | None], list[int], list[int]]:
    """The 19 arrays of ``append_v1``, a column that is all NULL being none; each write's stream and offset."""
    writes = [write for request in requests for write in request.writes]
    streams = sorted({write.stream_id for write in writes}, key=lambda stream_id: stream_id.bytes)
    totals = [sum(len(write.events) for write in writes if write.stream_id == each) for each in streams]
    write_streams = [streams.index(write.stream_id) for write in writes]
    # How far below the advanced head: what it brings itself, and what comes after it.
    offsets = [
        sum(len(later.events) for later in writes[n:] if later.stream_id == write.stream_id)
        for n, write in enumerate(writes)
    ]
    rows = [(n + 1, nth, row_values(event)) for n, write in enumerate(writes) for nth, event in enumerate(write.events)]
    event_ids, causes, times, names, versions, payloads, metadatas = ([row[2][n] for row in rows] for n in range(7))
    request_nos = [n + 1 for n, request in enumerate(requests) for _ in request.writes]
    bounds = [write.bounds or (-1, 2**63 - 1) for write in writes]
    cursors = [write.cursor or (None, None) for write in writes]
    at_cursor = any(write.cursor for write in writes)
    bounded = at_cursor or any(write.bounds for write in writes)
    return (
        [
            encode_uuid_array(streams),
            encode_bigint_array(totals),
            encode_int_array(INTEGER_OID, list(request_nos)),
            encode_int_array(INTEGER_OID, [stream + 1 for stream in write_streams]),
            encode_bigint_array([len(write.events) for write in writes]),
            encode_bigint_array(offsets),
            encode_bigint_array([least for least, _ in bounds]) if bounded else None,
            encode_bigint_array([most for _, most in bounds]) if bounded else None,
            encode_int_array(BIGINT_OID, [number for number, _ in cursors]) if at_cursor else None,
            encode_int_array(INTEGER_OID, [place for _, place in cursors]) if at_cursor else None,
            encode_int_array(INTEGER_OID, [n for n, _, _ in rows]),
            encode_int_array(INTEGER_OID, [nth for _, nth, _ in rows]),
            _encode_column(UUID_OID, event_ids),
            _encode_column(UUID_OID, causes) if any(causes) else None,
            _encode_column(TIMESTAMPTZ_OID, times) if any(times) else None,
            _encode_column(TEXT_OID, names),
            _encode_column(INTEGER_OID, versions),
            _encode_column(JSON_OID, payloads),
            _encode_column(JSON_OID, metadatas) if any(each is not None for each in metadatas) else None,
        ],
        write_streams,
        offsets,
    )


# --- Lines of an import ---------------------------------------------------------------------------------------------

FIELD_NAMES = ("stream", "type", "data", "version", "id", "time", "correlation_id", "metadata")
MAX_NESTING = 500

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_UUID_TEXT = re.compile("[0-9a-fA-F]{8}(-?)(?:[0-9a-fA-F]{4}\\1){3}[0-9a-fA-F]{12}")
_TIME_TEXT = re.compile(r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d+))?(?:([Zz])|([+-])(\d\d):?(\d\d))?", re.ASCII)


@dataclass(frozen=True)
class PlainLine:
    """What a line says. ``time`` None: the server's; ``event_id`` None: derived."""

    stream: str
    event_name: str
    payload: bytes
    event_version: int = 0
    event_id: UUID | None = None
    time: datetime | None = None
    correlation_id: UUID | None = None
    metadata: bytes | None = None


class _Integer(str):
    """Digits as they stand: an int could not tell 1 from 1.0 or true, nor hold as many."""


def is_uuid_text(stream: str) -> bool:
    """Whether a stream's name is its id: 36 characters with their hyphens."""
    return len(stream) == 36 and _UUID_TEXT.fullmatch(stream) is not None


def nesting(value: bytes) -> int:
    """How deeply valid JSON is nested; 0 for what is no array or object."""
    depth = deepest = 0
    for byte in _STRING.sub(b"", value):
        depth += (byte in b"[{") - (byte in b"]}")
        deepest = max(deepest, depth)
    return deepest


def split_object(line: str) -> list[tuple[str, object, bytes]]:
    """Return key, value and the value's text for each member of a JSON object. Raises ValueError for anything else."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    decode = json.JSONDecoder(parse_constant=refuse, parse_int=_Integer).raw_decode
    members: list[tuple[str, object, bytes]] = []

    def after_blanks(at: int) -> int:
        while line[at : at + 1] in (" ", "\t", "\r", "\n"):
            at += 1
        return at

    def after(at: int, expected: str) -> int:
        if line[at : at + 1] != expected:
            raise ValueError(f"no {expected} at {at}")
        return after_blanks(at + 1)

    at = after(after_blanks(0), "{")
    while line[at : at + 1] != "}" or members:
        key, end = decode(line, at)
        if not isinstance(key, str) or isinstance(key, _Integer):
            raise ValueError("a key is a string")
        at = after(after_blanks(end), ":")
        value, end = decode(line, at)
        members.append((key, value, line[at:end].encode()))
        at = after_blanks(end)
        if line[at : at + 1] == "}":
            break
        at = after(at, ",")
    if after(at, "}") != len(line):
        raise ValueError("more than one object")
    return members


def check_fields(line: bytes, data: bytes, metadata: bytes | None) -> bool:
    """The core's ``check_fields``, for a line that is a JSON object. Raises ValueError."""
    keys = [key for key, _, _ in split_object(line.decode())]
    for name in FIELD_NAMES:
        if keys.count(name) > 1:
            raise ValueError(f"{name} twice")
    if not data.startswith(b"{"):
        raise ValueError("data is no object")
    if metadata is not None and not metadata.startswith((b"{", b"n")):
        raise ValueError("metadata is no object")
    if nesting(data) > MAX_NESTING or (metadata is not None and nesting(metadata) > MAX_NESTING):
        raise ValueError("nested too deeply")
    return metadata is not None and metadata.startswith(b"{")


def read_line(line: bytes) -> PlainLine:
    """Read an import line. Raises ValueError for what is not one."""
    members = split_object(line.decode())
    values = {key: value for key, value, _ in members}
    texts = {key: text for key, _, text in members}
    if surplus := set(values) - set(FIELD_NAMES):
        raise ValueError(f"unknown {surplus}")
    if missing := {"stream", "type", "data"} - set(values):
        raise ValueError(f"no {missing}")
    json.dumps(members, default=bytes.decode, ensure_ascii=False).encode()  # fails for half a surrogate pair
    has_metadata = check_fields(line, texts["data"], texts.get("metadata"))

    def text(name: str) -> str:
        value = values[name]
        if not isinstance(value, str) or isinstance(value, _Integer) or not value:
            raise ValueError(f"{name} is a text")
        return value

    def uuid(name: str) -> UUID | None:
        if values.get(name) is None:
            return None
        if not _UUID_TEXT.fullmatch(text(name)):
            raise ValueError(f"{name} is a UUID")
        return UUID(text(name))

    version = values.get("version", _Integer("0"))
    if not isinstance(version, _Integer) or len(version) > 11 or not 0 <= int(version) < 2**31:
        raise ValueError("version counts from 0")
    name = text("type")
    if len(name.encode()) > 1000 or "\0" in name:
        raise ValueError("no event name")
    return PlainLine(
        stream=text("stream"),
        event_name=name,
        payload=texts["data"],
        event_version=int(version),
        event_id=uuid("id"),
        time=None if values.get("time") is None else _time(text("time")),
        correlation_id=uuid("correlation_id"),
        metadata=texts["metadata"] if has_metadata else None,
    )


def _time(text: str) -> datetime:
    parts = _TIME_TEXT.fullmatch(text)
    if parts is None:
        raise ValueError("no time as in RFC 3339")
    day, clock, fraction, zulu, sign, hours, minutes = parts.groups()
    if zulu is None and sign is None:
        raise ValueError("no time zone")
    digits = (fraction or "").ljust(7, "0")
    moment = datetime.fromisoformat(f"{day}T{clock}.{digits[:6]}+00:00")
    try:
        if digits[6] >= "5":
            moment += timedelta(microseconds=1)
        if zulu is not None:
            return moment
        if int(hours) > 23 or int(minutes) > 59:
            raise ValueError("no offset")
        offset = timedelta(hours=int(hours), minutes=int(minutes))
        return moment - offset if sign == "+" else moment + offset
    except OverflowError as error:
        raise ValueError("not within the years 1 to 9999") from error
