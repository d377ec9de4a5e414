"""Events into the bytes of a binary COPY, and lines of an import into rows."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
import orjson
import psycopg
import pytest
from psycopg import _copy_base
from psycopg.adapt import Transformer
from psycopg.pq import Format

from contenders import ROUNDS, Contender, compare
from datasets import IMPORT_ID
from expected import digest_of
from hindsight_fast._core import COPY_HEADER, COPY_TRAILER, EVENT_COLUMNS, EventRows
from hindsight_fast.import_chunks import STEP_LINES
from hindsight_fast.import_lines import ImportLine, LineReader
from hindsight_fast.import_writer import BLOCK_BYTES
from plain_python import PlainEvent, decode_row, encode_bigint_array, encode_copy, encode_row

COUNT = 20_000
TWIN_COUNT = 2_000
NOW = datetime(2024, 5, 6, tzinfo=UTC)
NUMBER = 4711
# psycopg's dumper for json takes objects and writes them anew; as bytea the same bytes pass through, at their fastest.
PSYCOPG_TYPES = ("int8", "int4", "uuid", "uuid", "int8", "timestamptz", "int4", "uuid", "text", "bytea", "bytea")


@pytest.fixture(scope="module")
def rows(demo_data):
    return list(demo_data(COUNT).rows())


@pytest.fixture(scope="module")
def placed(rows):
    """The rows at their places, in the twin's words."""
    return [
        PlainEvent(
            NUMBER, sequence_no, row.event_id, row.stream_id, row.stream_version, row.created_at, row.event_version,
            row.correlation_id, row.event_name, row.payload, row.metadata,
        )
        for sequence_no, row in enumerate(rows)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def encoded(placed):
    """What everybody must make of them."""
    return [encode_row(event) for event in placed]


def bench_events_to_copy(benchmark, rows, placed, encoded):
    last_versions = {row.stream_id: row.stream_version for row in rows}
    heads = encode_bigint_array([last_versions[key] for key in sorted(last_versions, key=lambda key: key.bytes)])
    arguments = [
        (
            row.event_id.bytes, row.stream_id.bytes, row.event_name, row.event_version, row.payload, row.created_at,
            None if row.correlation_id is None else row.correlation_id.bytes, row.metadata,
        )
        for row in rows
    ]  # fmt: skip
    by_column = [tuple(getattr(event, column) for column in EVENT_COLUMNS) for event in placed]
    oids = [psycopg.adapters.types[name].oid for name in PSYCOPG_TYPES]

    def ours():
        rows = EventRows()
        for each in arguments:
            rows.add(*each)
        rows.stream_arrays()
        rows.place(NUMBER, heads, NOW)
        return list(rows.blocks(BLOCK_BYTES))

    def by_psycopg():
        transformer = Transformer()
        transformer.set_dumper_types(oids, Format.BINARY)
        out = bytearray()
        for row in by_column:
            _copy_base.format_row_binary(row, transformer, out)
        return [COPY_HEADER, out, COPY_TRAILER]

    def by_twin():
        return [encode_copy(map(encode_row, placed[:TWIN_COUNT]))]

    def check(count):
        def same_bytes(blocks):
            assert b"".join(blocks) == encode_copy(encoded[:count]), "other bytes"

        return same_bytes

    compare(
        benchmark,
        Contender("EventRows: add, stream_arrays, place, blocks", ours, COUNT, check(COUNT)),
        Contender("psycopg's COPY row formatter, binary, rows placed beforehand", by_psycopg, COUNT, check(COUNT)),
        Contender("plain twin, rows placed beforehand", by_twin, TWIN_COUNT, check(TWIN_COUNT)),
        rounds=2 * ROUNDS,
        unit="events",
        checked="every byte",
    )


def bench_lines_to_rows(benchmark, demo_data, rows):
    block = demo_data(COUNT).path.read_bytes()
    lines = block.splitlines()
    digest = digest_of(rows)
    last_versions = {row.stream_id: row.stream_version for row in rows}
    heads = encode_bigint_array([last_versions[key] for key in sorted(last_versions, key=lambda key: key.bytes)])
    decode = msgspec.json.Decoder(ImportLine).decode

    def ours():
        reader, made = LineReader(IMPORT_ID), EventRows()
        start, line_no = 0, 1
        while start < len(block):
            passed, start, _ = reader.add_plain(block, start, STEP_LINES, line_no, 0, [made])
            assert passed, "a line is left to LineReader.add"
            line_no += passed
        return made

    def line_by_line():
        reader, made = LineReader(IMPORT_ID), EventRows()
        for line_no, line in enumerate(lines, 1):
            reader.add(line, line_no, [made])
        return made

    def check(made):
        made.place(NUMBER, heads, NOW)
        assert digest_of(decode_row(made.row(index)) for index in range(len(made))) == digest, "other rows"

    def check_lines(parsed):
        assert len(parsed) == COUNT, "lines are missing"

    compare(
        benchmark,
        Contender("LineReader.add_plain, as imports call it", ours, COUNT, check),
        Contender("LineReader.add: what imports do with an unusual line", line_by_line, COUNT, check),
        Contender(
            "msgspec alone: the line's fields, no row", lambda: [decode(line) for line in lines], COUNT, check_lines
        ),
        Contender(
            "orjson.loads alone: the whole line as a dict", lambda: list(map(orjson.loads, lines)), COUNT, check_lines
        ),
        rounds=2 * ROUNDS,
        unit="lines",
        checked="LineReader: every column of every row against the oracle; the other two do less, only their number of "
        "lines",
    )
