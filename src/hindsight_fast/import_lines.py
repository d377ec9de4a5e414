"""What a line of an import says: one JSON object, checked and turned into a row of the chunk being built.

No I/O. ``data`` and ``metadata`` are lifted out as they stand, byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from hashlib import blake2b
from typing import Final
from uuid import UUID
from zlib import crc32

import msgspec

from ._core import EventRows, LineEncoder, check_fields
from .streams import stream_bytes

_ABSENT: Final = msgspec.Raw(b"")
_UUID_TEXT: Final = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}").fullmatch

STREAMS_REMEMBERED: Final = 65_536
"""Names whose ids are kept: a name costs 1.5 µs, a look-up 0.03. Bounded, as streams are not."""
REMEMBERED_CHARACTERS: Final = 200
"""Longer names are not kept: there may be megabytes of each."""
MOST_REASON_CHARACTERS: Final = 400
"""A reason can quote a field's name, and that is as long as the line likes."""


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
        self._encoder = LineEncoder(self._streams, self._stream_id, self.derived_id(0))

    def derived_id(self, line_no: int) -> bytes:
        """Return the 16 bytes of the id of an event that brings none."""
        return (self._id_base | line_no << 22).to_bytes(16, "big")

    def add_plain(
        self, block: bytes, start: int, line_count: int, line_no: int, offset: int, shards: Sequence[EventRows]
    ) -> tuple[int, int, list[tuple[bytes, bytes]]]:
        """Add up to *line_count* lines of *block*, the one at *start* first, and stop at one that is not plainly right.

        That one is for ``add``. The first line has the number *line_no*, the block begins at *offset* in its source.
        Returns how many lines were passed, blank ones included, where the next one begins, and of each shard the line
        numbers and the offsets of its new rows, as bytes of an ``array("q")``.
        """
        return self._encoder.encode(block, start, line_count, line_no, offset, shards)

    def add(self, line: bytes, line_no: int, shards: Sequence[EventRows]) -> int:
        """Add *line* to the rows of its shard, the one of *shards* that its stream belongs to; returns which one it is.

        Raises BadLine, with all rows as they were.
        """
        try:
            event = self._decode(line)
            stream_id = self._streams.get(event.stream) or self._stream_id(event.stream)
            shard = crc32(stream_id) % len(shards) if len(shards) > 1 else 0
            metadata = None if event.metadata is _ABSENT else event.metadata
            has_metadata = check_fields(line, event.data, metadata)
            shards[shard].add(
                self.derived_id(line_no) if event.id is None else event.id.bytes,
                stream_id,
                event.type,
                event.version,
                event.data,
                event.time,
                None if event.correlation_id is None else event.correlation_id.bytes,
                metadata if has_metadata else None,
            )
            return shard
        except BadLine:
            raise
        except RecursionError:
            raise BadLine("data or metadata is nested too deeply") from None
        except (msgspec.MsgspecError, ValueError, OverflowError) as error:
            raise BadLine(_reason(error, line)) from error

    def _stream_id(self, text: str) -> bytes:
        if not text:
            raise BadLine("stream is empty")
        stream_id = bytes.fromhex(text.replace("-", "")) if _UUID_TEXT(text) else stream_bytes(text)
        if len(text) <= REMEMBERED_CHARACTERS:
            if len(self._streams) >= STREAMS_REMEMBERED:
                self._streams.clear()
            self._streams[text] = stream_id
        return stream_id


# An escaped half of a surrogate pair: a high one without a low one behind it. (A low one has a message of its own.)
_HALF_PAIR: Final = re.compile(rb"(?<!\\)(?:\\\\)*\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])", re.DOTALL).search
_COLUMN_FIELDS: Final = {"created_at": "time", "event_version": "version", "event name": "type"}


def _reason(error: Exception, line: bytes) -> str:
    """What is wrong with a line, in words of the line's own fields: one line, of bounded length."""
    text = str(error) or type(error).__name__
    if text == "Input data was truncated":
        # What msgspec also says of half a pair inside a value that it lifts out.
        text = "half of an escaped surrogate pair" if _HALF_PAIR(line) else "the JSON ends early"
    for column, field in _COLUMN_FIELDS.items():
        if text.startswith(column):
            text = field + text[len(column) :]
    if len(text) > MOST_REASON_CHARACTERS:
        text = text[:MOST_REASON_CHARACTERS] + "…"
    # The name of an unknown field is whatever stands in the file: no new line, and nothing that a terminal obeys.
    return text if text.isprintable() else repr(text)[1:-1]
