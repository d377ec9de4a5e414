"""Importing: the lines of a source into chunks, and the chunks into the store, to the end or to the first bad line."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import psycopg

from ._core import Cursor
from .import_chunks import ChunkMaker
from .import_source import ImportSource, LineSource
from .import_writer import ChunkWriter

if TYPE_CHECKING:
    from .statements import Statements

CHUNK_SECONDS: Final = 0.25
"""What a chunk should take: as long as that live readers wait for events that follow it, and a crash repeats."""
FIRST_CHUNK_EVENTS: Final = 5_000
MOST_CHUNK_EVENTS: Final = 100_000


@dataclass(frozen=True, slots=True)
class ImportProgress:
    """How far a running import has come: what is stored, and how much of the source has been read."""

    events: int
    lines: int
    seconds: float
    source_bytes_read: int
    source_size: int | None


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What one call of ``import_events`` did.

    ``events`` were stored by this call, ``skipped_events`` by an earlier one under the same import id; ``new_streams``
    had no event before; ``bytes`` are those of the lines (decompressed) behind the skipped ones.
    """

    import_id: str
    events: int
    skipped_events: int
    new_streams: int
    lines: int
    bytes: int
    seconds: float
    first_cursor: Cursor | None
    last_cursor: Cursor | None


def check_import_id(import_id: str) -> str:
    """Return *import_id*. Raises TypeError or ValueError unless it is a text that PostgreSQL can hold."""
    if not isinstance(import_id, str):
        raise TypeError(f"import_id must be a str, not {type(import_id).__name__}")
    if not import_id or len(import_id) > 500 or "\0" in import_id:
        raise ValueError("import_id must have 1 to 500 characters, none of them NUL")
    import_id.encode()  # a lone surrogate is a UnicodeEncodeError, which is a ValueError
    return import_id


def run_import(
    connection: psycopg.Connection[Any],
    statements: Statements,
    source: ImportSource,
    *,
    import_id: str,
    generation: int,
    chunk_size: int | None,
    progress: Callable[[ImportProgress], object] | None,
) -> ImportReport:
    """Import *source* over *connection* (in autocommit mode); the store's ``import_events`` tells the rest."""
    began = time.monotonic()
    lines = LineSource(source)
    try:
        writer = ChunkWriter(connection, statements, import_id, lines.name, generation)
        checkpoint, skipped = writer.find_checkpoint()
        maker = ChunkMaker(lines, import_id, chunk_size or FIRST_CHUNK_EVENTS)
        maker.skip_to(checkpoint)
        events, new_streams = 0, 0
        first: Cursor | None = None
        last: Cursor | None = None
        end = checkpoint
        while True:
            chunk = maker.finish()
            chunk_began = time.monotonic()
            cursor, begun_streams = writer.store(chunk, maker)
            end = chunk.end
            new_streams += begun_streams
            events += len(chunk.rows)
            if cursor is not None:
                first = first or cursor
                last = Cursor(cursor.transaction_no, len(chunk.rows) - 1)
            now = time.monotonic()
            if progress is not None:
                progress(ImportProgress(skipped + events, end.line_no, now - began, lines.bytes_read, lines.size))
            if chunk.at_end:
                break
            if chunk_size is None and len(chunk.rows):
                maker.most_events = next_chunk_events(len(chunk.rows), now - chunk_began)
    finally:
        lines.close()
    return ImportReport(
        import_id=import_id,
        events=events,
        skipped_events=skipped,
        new_streams=new_streams,
        lines=end.line_no - checkpoint.line_no,
        bytes=end.byte_offset - checkpoint.byte_offset,
        seconds=time.monotonic() - began,
        first_cursor=first,
        last_cursor=last,
    )


def next_chunk_events(events: int, seconds: float) -> int:
    """How many events the next chunk should take, when *events* took *seconds*: at most twice as many, or half."""
    wanted = int(events * CHUNK_SECONDS / max(seconds, 1e-6))
    return max(min(wanted, 2 * events, MOST_CHUNK_EVENTS), events // 2, 100)
