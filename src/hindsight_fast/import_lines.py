"""What a line of an import says: one JSON object, checked and turned into a row of the chunk being built.

No I/O. ``data`` and ``metadata`` are lifted out as they stand, byte for byte.
"""

from __future__ import annotations

import re
from datetime import datetime
from hashlib import blake2b
from typing import Final
from uuid import UUID

import msgspec

from ._core import EventRows
from .streams import stream_bytes

_ABSENT: Final = msgspec.Raw(b"")
# An escape of a JSON string. Only the group holds a surrogate without its other half.
_ESCAPE: Final = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)"
)
_MARKS: Final = b"\x7f", b"\xff"
"""What stands for the backslash of a lone surrogate: a letter that hardly a line holds, or what no UTF-8 does, which
msgspec passes over in what it only lifts out."""
_UUID_TEXT: Final = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}").fullmatch

MAX_LINE_NO: Final = 2**40 - 1
STREAMS_REMEMBERED: Final = 65_536
"""Names whose ids are kept: a name costs 1.5 µs, a look-up 0.03. Bounded, as streams are not."""


class ImportLine(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """The fields of a line; only the first three are required."""

    stream: str
    type: str
    data: msgspec.Raw
    version: int = 0
    id: UUID | None = None
    time: datetime | None = None
    correlation_id: UUID | None = None
    metadata: msgspec.Raw = _ABSENT


class BadLine(ValueError):
    """A line that cannot be imported, and why."""


class LineReader:
    """Adds lines to rows. An absent id is derived from *import_id* and the line's number, the same one every time."""

    def __init__(self, import_id: str) -> None:
        self._decode = msgspec.json.Decoder(ImportLine).decode
        self._streams: dict[str, bytes] = {}
        # A UUIDv8 (RFC 9562, section 5.8): 60 bits that name the import, 40 of line number, 22 that name the import.
        # Read as one number it rises with the line, so its index grows at one edge: random ids cost a quarter.
        name = int.from_bytes(blake2b(import_id.encode(), digest_size=16, person=b"hindsight import").digest(), "big")
        self._id_base = (name >> 80) << 80 | 8 << 76 | (name >> 64 & 0xFFF) << 64 | 0b10 << 62 | (name & 0x3FFFFF)

    def derived_id(self, line_no: int) -> bytes:
        """Return the 16 bytes of the id of an event that brings none."""
        return (self._id_base | line_no << 22).to_bytes(16, "big")

    def add(self, line: bytes, line_no: int, rows: EventRows) -> None:
        """Add *line* to *rows*. Raises BadLine, with *rows* as they were."""
        try:
            try:
                event = self._decode(line)
            except msgspec.DecodeError as error:
                event = self._with_lone_surrogates(line, error)
            stream_id = self._streams.get(event.stream) or self._stream_id(event.stream)
            data = memoryview(event.data)
            if data[0] != 0x7B:
                raise BadLine("data must be a JSON object")
            metadata = None
            if event.metadata is not _ABSENT:
                metadata = memoryview(event.metadata)
                if metadata[0] == 0x6E:  # null
                    metadata = None
                elif metadata[0] != 0x7B:
                    raise BadLine("metadata must be a JSON object or null")
            rows.add(
                self.derived_id(line_no) if event.id is None else event.id.bytes,
                stream_id,
                event.type,
                event.version,
                data,
                event.time,
                None if event.correlation_id is None else event.correlation_id.bytes,
                metadata,
            )
        except BadLine:
            raise
        except RecursionError:
            raise BadLine("nested too deeply") from None
        except (msgspec.MsgspecError, ValueError, OverflowError) as error:
            raise BadLine(_reason(error)) from error

    def _with_lone_surrogates(self, line: bytes, refused: msgspec.DecodeError) -> ImportLine:
        """Decode a *line* that was *refused* for half a surrogate pair inside its data or metadata.

        JSON's grammar allows that and PostgreSQL stores it, so what an export wrote is taken back; msgspec refuses it.
        Raises *refused* or another DecodeError for whatever else is wrong.
        """
        mark = next((each for each in _MARKS if each not in line), b"")
        marked = _ESCAPE.sub(lambda escape: mark + escape[1] if escape[1] else escape[0], line)
        if not mark or marked == line:
            raise refused
        event = self._decode(marked)
        if mark in event.stream.encode() or mark in event.type.encode():
            raise refused  # a text that UTF-8 cannot hold
        for field in ("data", "metadata"):
            if (lifted := getattr(event, field)) is not _ABSENT:
                setattr(event, field, msgspec.Raw(bytes(lifted).replace(mark, b"\\")))
        return event

    def _stream_id(self, text: str) -> bytes:
        if not text:
            raise BadLine("stream is empty")
        if len(self._streams) >= STREAMS_REMEMBERED:
            self._streams.clear()
        stream_id = bytes.fromhex(text.replace("-", "")) if _UUID_TEXT(text) else stream_bytes(text)
        self._streams[text] = stream_id
        return stream_id


def _reason(error: Exception) -> str:
    text = str(error)
    if text == "Input data was truncated":
        # What msgspec also says of an escaped half of a surrogate pair.
        return "the JSON ends early, or holds half of an escaped surrogate pair"
    return text or type(error).__name__
