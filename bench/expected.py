"""What an import must store, worked out line by line with nothing but Python's own json: the benchmarks' oracle.

Slow on purpose and written apart from the importer. Only for compact lines, without blanks between the tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from json.decoder import JSONDecoder
from pathlib import Path
from typing import Any, LiteralString, NamedTuple
from uuid import UUID

import psycopg
from psycopg import sql

from hindsight_fast import stream_uuid
from plain_python import EPOCH, encode_copy, encode_values

ROW_COLUMNS = (
    "event_id", "stream_id", "stream_version", "correlation_id", "created_at", "event_version", "event_name",
    "payload", "metadata",
)  # fmt: skip
"""All but the place in the log, which tells the order."""


class Row(NamedTuple):
    """One event as it must be stored."""

    event_id: UUID
    stream_id: UUID
    stream_version: int
    correlation_id: UUID | None
    created_at: datetime
    event_version: int
    event_name: str
    payload: bytes
    metadata: bytes | None


def check_heads(connection: psycopg.Connection[Any]) -> None:
    """Raise AssertionError unless each stream's head has the version of its last event."""
    row = connection.execute(
        "WITH last AS (SELECT stream_id, max(stream_version) AS stream_version FROM hindsight.events GROUP BY 1) "
        "SELECT count(*) FROM last FULL JOIN hindsight.stream_heads USING (stream_id, stream_version) "
        "WHERE last.stream_id IS NULL OR stream_heads.stream_id IS NULL"
    ).fetchone()
    assert row == (0,), "heads differ from the last events"


def check_versions(
    connection: psycopg.Connection[Any], table: LiteralString, columns: tuple[str, str], row_count: int
) -> None:
    """Raise AssertionError unless *table* has so many rows and each stream's versions are 0, 1, 2, … without a hole.

    *columns* are the names of the stream's id and of the version.
    """
    stream_id, version = map(sql.Identifier, columns)
    row = connection.execute(
        sql.SQL(
            "SELECT sum(events)::bigint, count(*) FILTER (WHERE first <> 0 OR last <> events - 1 OR versions <> events)"
            " FROM (SELECT count(*) AS events, min({0}) AS first, max({0}) AS last, count(DISTINCT {0}) AS versions"
            " FROM {1} GROUP BY {2}) AS streams"
        ).format(version, sql.SQL(table), stream_id)
    ).fetchone()
    assert row is not None
    assert row[0] == row_count, f"{row[0]} events are stored instead of {row_count}"
    assert row[1] == 0, f"the versions of {row[1]} streams are not 0, 1, 2, and so on"


def rows_of(path: Path, import_id: str, count: int | None = None) -> Iterator[Row]:
    """Give what the first *count* lines of *path* must have become under *import_id*."""
    ids: dict[str, UUID] = {}
    next_versions: dict[UUID, int] = {}
    with path.open(encoding="utf-8", newline="\n") as lines:
        for line_no, line in enumerate(lines, 1):
            if count is not None and line_no > count:
                return
            fields = _fields(line)
            name = json.loads(fields["stream"])
            if name not in ids:
                ids[name] = UUID(name) if _is_uuid(name) else stream_uuid(name)
            stream_id = ids[name]
            version = next_versions.get(stream_id, 0)
            next_versions[stream_id] = version + 1
            given_id, cause, metadata = fields.get("id"), fields.get("correlation_id"), fields.get("metadata", "null")
            yield Row(
                event_id=UUID(json.loads(given_id)) if given_id else _derived_id(import_id, line_no),
                stream_id=stream_id,
                stream_version=version,
                correlation_id=UUID(json.loads(cause)) if cause else None,
                created_at=datetime.fromisoformat(json.loads(fields["time"])),
                event_version=int(fields.get("version", 0)),
                event_name=json.loads(fields["type"]),
                payload=fields["data"].encode(),
                metadata=None if metadata == "null" else metadata.encode(),
            )


def digest_of(rows: Iterable[Row]) -> str:
    """A digest of the bytes that ``COPY (SELECT … ) TO STDOUT (FORMAT BINARY)`` gives of *rows*."""
    empty = encode_copy([])
    digest = hashlib.blake2b(empty[:-2], digest_size=16)
    for row in rows:
        microseconds = _microseconds(row.created_at)
        digest.update(
            encode_values(
                [
                    row.event_id.bytes,
                    row.stream_id.bytes,
                    row.stream_version.to_bytes(8, "big"),
                    None if row.correlation_id is None else row.correlation_id.bytes,
                    microseconds.to_bytes(8, "big", signed=True),
                    row.event_version.to_bytes(4, "big"),
                    row.event_name.encode(),
                    row.payload,
                    row.metadata,
                ]
            )
        )
    digest.update(empty[-2:])
    return digest.hexdigest()


def stored_digest(
    connection: psycopg.Connection, schema: str, order: LiteralString = "transaction_no, sequence_no"
) -> str:
    """The same of what lies in the table ``events`` of *schema*, in this order: every row, every byte."""
    digest = hashlib.blake2b(digest_size=16)
    columns = sql.SQL(", ").join(map(sql.Identifier, ROW_COLUMNS))
    everything = sql.SQL("COPY (SELECT {} FROM {}.events ORDER BY {}) TO STDOUT (FORMAT BINARY)").format(
        columns, sql.Identifier(schema), sql.SQL(order)
    )
    with connection.cursor().copy(everything) as copy:
        for block in copy:
            digest.update(block)
    return digest.hexdigest()


def _fields(line: str) -> dict[str, str]:
    """Cut a JSON object into its members' names and their text, as it stands."""
    cut = JSONDecoder().raw_decode
    fields = {}
    at = 1
    while True:
        name, end = cut(line, at)
        _, at = cut(line, end + 1)
        fields[name] = line[end + 1 : at]
        at += 1
        if line[at - 1] == "}":
            return fields


def _is_uuid(text: str) -> bool:
    return len(text) == 36 and [len(part) for part in text.split("-")] == [8, 4, 4, 4, 12]


def _derived_id(import_id: str, line_no: int) -> UUID:
    """48 bits of the import's name, 8 for the version, 12 of the name, 0b10, 40 of the line number, 22 of the name."""
    name = hashlib.blake2b(import_id.encode(), digest_size=16, person=b"hindsight import").digest()
    bits = "".join(f"{byte:08b}" for byte in name)
    return UUID(int=int(bits[:48] + "1000" + bits[52:64] + "10" + f"{line_no:040b}" + bits[-22:], 2))


def _microseconds(moment: datetime) -> int:
    passed = moment - EPOCH
    return (passed.days * 86_400 + passed.seconds) * 1_000_000 + passed.microseconds
