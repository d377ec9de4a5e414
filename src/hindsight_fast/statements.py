"""SQL text, one named constant each, its reason beside it. ``Statements`` puts a schema's name into all of them.

Parameters are cast, columns never: ``transaction_no::text`` in the select list made ORDER BY sort the output column,
so that no index served it (80 times slower). A LIMIT is a literal for the same reason: as a parameter under a generic
plan the whole table was sorted.
"""

from __future__ import annotations

import re
from itertools import count
from typing import TYPE_CHECKING, Final, LiteralString

from psycopg import sql

from ._core import EVENT_COLUMNS

if TYPE_CHECKING:
    from psycopg.abc import AdaptContext

# Where a page begins: strictly behind a cursor. A row comparison, because only that is one range of the primary key.
BEHIND_CURSOR: Final = "(e.transaction_no, e.sequence_no) > (%s::bigint, %s::integer)"

# Numbers at or above the bound may still belong to open appends; a reader that passed them would skip those for ever.
# bound_holds_v1 raises when the server is not in the run that the bound came from.
BELOW_BOUND: Final = "e.transaction_no < %s::bigint AND {schema}.bound_holds_v1(%s::text)"

# One stream's part of the log, a span of versions at a time. "+ 0" keeps the planner from the primary key: short of
# statistics it combined both indexes, and read all of the larger one for each page.
STREAM_SPAN: Final = "e.stream_id = %s::uuid AND e.stream_version BETWEEN %s::bigint AND %s::bigint"
STREAM_BELOW_BOUND: Final = "e.transaction_no + 0 < %s::bigint AND {schema}.bound_holds_v1(%s::text)"

# From which version on a stream's events stand behind a cursor (NULL: none does), and the stream's last version.
STREAM_START: Final = """
    SELECT {schema}.first_version_behind_v1(%s::uuid, %s::bigint, %s::integer),
        (SELECT h.stream_version FROM {schema}.stream_heads AS h WHERE h.stream_id = %s::uuid)
"""

UP_TO_CURSOR: Final = "(e.transaction_no, e.sequence_no) <= (%s::bigint, %s::integer)"
NAMES_FILTER: Final = "e.event_name = ANY(%s::text[])"
CORRELATION_FILTER: Final = "e.correlation_id = %s::uuid"

# A page of a filtered read ends where this many rows were scanned, not where as many were found: otherwise a rare event
# makes one statement run for minutes. Index-only; no row means that the rest fits into one page.
PAGE_END: Final = """
    SELECT e.transaction_no, e.sequence_no FROM {schema}.events AS e WHERE {conditions}
    ORDER BY e.transaction_no, e.sequence_no OFFSET {offset} LIMIT 1
"""

LOG_PAGE: Final = """
    SELECT {columns} FROM {schema}.events AS e WHERE {conditions}
    ORDER BY e.transaction_no, e.sequence_no LIMIT {limit}
"""

# The same, cut behind the event with which the page exceeds its bytes. Measuring costs a fifth of the fetch, so it is
# left out where no event is large enough to be stored out of line. Compressed values count four times what they take:
# their true size would have to be unpacked.
LOG_PAGE_BY_SIZE: Final = """
    SELECT {columns} FROM (
        SELECT p.*, sum(p.bytes) OVER (
            ORDER BY p.transaction_no, p.sequence_no ROWS UNBOUNDED PRECEDING
        ) AS bytes_so_far
        FROM (
            SELECT e.*, pg_column_size(e.payload)
                * CASE WHEN pg_column_compression(e.payload) IS NULL THEN 1 ELSE 4 END AS bytes
            FROM {schema}.events AS e WHERE {conditions}
            ORDER BY e.transaction_no, e.sequence_no LIMIT {limit}
        ) AS p
    ) AS e WHERE e.bytes_so_far - e.bytes < {page_bytes} ORDER BY e.transaction_no, e.sequence_no
"""

# In one stream the order of versions is the order of the log, and there is an index for it. To read what a writer has
# just written no bound is needed: a stream has no holes below its head, which its writers hold locked until commit.
STREAM_PAGE: Final = """
    SELECT {columns} FROM {schema}.events AS e WHERE {conditions} ORDER BY e.stream_version {direction} LIMIT {limit}
"""

STREAM_VERSION: Final = "SELECT h.stream_version FROM {schema}.stream_heads AS h WHERE h.stream_id = %s::uuid"

READ_BARRIER: Final = "SELECT b.bound, b.server_run, b.large_events, b.blocked FROM {schema}.read_barrier_v1() AS b"

# Asked when open appends hold readers up.
END_STALLED: Final = """
    SELECT s.pid, s.application_name, extract(epoch FROM s.held)::float8, s.ended
    FROM {schema}.end_stalled_v1(make_interval(secs => %s::float8)) AS s
"""

HEAD: Final = """
    SELECT e.transaction_no, e.sequence_no FROM {schema}.events AS e
    WHERE e.transaction_no < %s::bigint AND {schema}.bound_holds_v1(%s::text)
    ORDER BY e.transaction_no DESC, e.sequence_no DESC LIMIT 1
"""

# Of every connection that the store makes. Not left to the role's or the database's default: under REPEATABLE READ no
# reader sees a later commit. Keepalives from the server's side too: a client whose host is gone lets go of its locks
# within a minute. (Over a Unix socket they mean nothing, and are accepted.)
SESSION_SETTINGS: Final = """
    SET default_transaction_isolation = 'read committed';
    SET tcp_keepalives_idle = 15; SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 4
"""

# Answers NULL instead of failing where there is no store; whatever the layout, these two columns stay.
FOUND_TABLE: Final = "SELECT to_regclass(%s)::oid"
FOUND_LAYOUT: Final = "SELECT m.layout FROM {schema}.store_meta AS m"

# What a writer compares before its first append; the append itself compares once more, at its end.
STORE_META: Final = """
    SELECT m.layout, m.oldest_writing_layout, m.generation, m.state,
        i.system_identifier = m.system_identifier AND i.timeline = m.timeline,
        coalesce((SELECT max(e.transaction_no) FROM {schema}.events AS e) >= {schema}.next_number_v1(), false)
    FROM {schema}.store_meta AS m, {schema}.server_identity_v1() AS i
"""

ADVANCE_SEQUENCE: Final = "SELECT {schema}.advance_sequence_v1()"

BEGIN_COPY: Final = """
    SELECT c.transaction_no, c.head_versions, c.started_at FROM {schema}.begin_copy_v1(%s::uuid[], %s::bigint[]) AS c
"""

COPY_EVENTS: Final = "COPY {schema}.events ({columns}) FROM STDIN (FORMAT BINARY)"

# A chunk that waits for a lock holds others: it gives up soon, and is sent again. The second setting ends an importer
# that is stopped between two statements; in the middle of COPY no timeout reaches it, and end_stalled_v1 does.
LIMIT_CHUNK: Final = """
    SELECT set_config('lock_timeout', '2s', true), set_config('idle_in_transaction_session_timeout', %s::text, true)
"""

# What stands already under ids that a chunk brings.
KNOWN_EVENTS: Final = "SELECT {columns} FROM {schema}.events AS e WHERE e.event_id = ANY(%s::uuid[])"

# Constraints that wait for the commit are checked now.
CHECK_DEFERRED: Final = "SET CONSTRAINTS ALL IMMEDIATE"

CHECK_WRITABLE: Final = "SELECT {schema}.check_writable_v1(%s::integer, %s::bigint)"

# A row for each shard; whoever comes second, or again, finds them there.
START_IMPORT: Final = """
    INSERT INTO {schema}.imports (import_id, shard, shard_count)
    SELECT %s, n, %s::integer FROM generate_series(0, %s::integer - 1) AS n ON CONFLICT DO NOTHING
"""

FIND_IMPORT: Final = """
    SELECT i.line_no, i.byte_offset, i.source_digest, i.event_count, i.shard_count
    FROM {schema}.imports AS i WHERE i.import_id = %s ORDER BY i.shard
"""

# Compare and set: of two importers with one import id, the second finds the row moved and writes nothing.
MOVE_IMPORT: Final = """
    UPDATE {schema}.imports
    SET line_no = %s, byte_offset = %s, source_digest = %s, event_count = event_count + %s, finished = %s,
        updated_at = clock_timestamp()
    WHERE import_id = %s AND shard = %s AND line_no = %s AND byte_offset = %s
"""

# A dry run's tables. Its first chunk goes into one with all that the real table has, to see what that takes; the rest
# into the second, where the server reads every value and checks every constraint, without indexes.
MAKE_DRY_RUN: Final = (
    "CREATE TEMPORARY TABLE hindsight_dry_run_indexed (LIKE {schema}.events INCLUDING ALL)",
    "CREATE TEMPORARY TABLE hindsight_dry_run_rows (LIKE {schema}.events INCLUDING CONSTRAINTS INCLUDING STORAGE)",
    "CREATE TEMPORARY TABLE hindsight_dry_run_ids (event_id uuid, content bytea, line_no bigint)",
)
DROP_DRY_RUN: Final = """
    DROP TABLE IF EXISTS pg_temp.hindsight_dry_run_indexed, pg_temp.hindsight_dry_run_rows,
        pg_temp.hindsight_dry_run_ids
"""
COPY_DRY_RUN: Final = "COPY pg_temp.{table} ({columns}) FROM STDIN (FORMAT BINARY)"
COPY_DRY_RUN_IDS: Final = "COPY pg_temp.hindsight_dry_run_ids (event_id, content, line_no) FROM STDIN"
REPEATED_DRY_RUN_IDS: Final = """
    SELECT coalesce(sum(r.lines - 1), 0)::bigint, count(*) FILTER (WHERE r.contents > 1),
        min(r.second_line) FILTER (WHERE r.contents > 1)
    FROM (
        SELECT count(*) AS lines, count(DISTINCT i.content) AS contents,
            (array_agg(i.line_no ORDER BY i.line_no))[2] AS second_line
        FROM pg_temp.hindsight_dry_run_ids AS i GROUP BY i.event_id HAVING count(*) > 1
    ) AS r
"""

LIST_IMPORTS: Final = """
    SELECT i.import_id, min(i.line_no), min(i.byte_offset), sum(i.event_count)::bigint, bool_and(i.finished),
        min(i.started_at), max(i.updated_at)
    FROM {schema}.imports AS i GROUP BY i.import_id ORDER BY min(i.started_at), i.import_id
"""

# Estimates of the planner: counting a log of hundreds of millions of rows is no way to ask how the store does.
TABLE_SIZES: Final = """
    SELECT t.name, c.reltuples::bigint, pg_total_relation_size(c.oid)
    FROM unnest(ARRAY['events', 'stream_heads']) AS t (name)
    JOIN pg_class AS c ON c.relname = t.name AND c.relnamespace = %s::regnamespace
"""


def numbered(statement: bytes) -> bytes:
    """Return *statement* as libpq takes it: with $1, $2, … for each %s, and % for %%."""
    number = count(1)
    return re.sub(rb"%[s%]", lambda found: b"%" if found[0] == b"%%" else b"$%d" % next(number), statement)


class _Escaped(sql.Composable):
    """SQL text that is already quoted, with its per cent signs doubled."""

    def as_bytes(self, context: AdaptContext | None = None) -> bytes:
        return str(self._obj).replace("%", "%%").encode()


class Statements:
    """The statements of one schema, composed once. Run them with parameters, be it an empty tuple: %% then means %."""

    def __init__(self, schema: str) -> None:
        self.schema = schema
        self._identifier = sql.Identifier(schema)
        # A name may hold %s, which psycopg would take for a parameter.
        self._schema = _Escaped(self.quoted_schema)
        self._columns = sql.SQL(", ").join(sql.Identifier("e", column) for column in EVENT_COLUMNS)
        self.stream_version = self._compose(STREAM_VERSION)
        self.stream_start = self._compose(STREAM_START)
        self.read_barrier = self._compose(READ_BARRIER)
        self.end_stalled = self._compose(END_STALLED)
        self.head = self._compose(HEAD)
        self.found_layout = self._compose(FOUND_LAYOUT)
        self.store_meta = self._compose(STORE_META)
        self.advance_sequence = self._compose(ADVANCE_SEQUENCE)
        self.begin_copy = self._compose(BEGIN_COPY)
        # The one that goes without parameters.
        self.copy_events = (
            sql.SQL(COPY_EVENTS)
            .format(schema=self._identifier, columns=sql.SQL(", ").join(map(sql.Identifier, EVENT_COLUMNS)))
            .as_bytes(None)
        )
        self.check_writable = self._compose(CHECK_WRITABLE)
        self.make_dry_run = [self._compose(statement) for statement in MAKE_DRY_RUN]
        self.known_events = self._compose(KNOWN_EVENTS, columns=self._columns)
        self.start_import = self._compose(START_IMPORT)
        self.find_import = self._compose(FIND_IMPORT)
        self.move_import = self._compose(MOVE_IMPORT)
        self.list_imports = self._compose(LIST_IMPORTS)

    def copy_dry_run(self, *, indexed: bool) -> bytes:
        table = sql.Identifier("hindsight_dry_run_indexed" if indexed else "hindsight_dry_run_rows")
        columns = sql.SQL(", ").join(map(sql.Identifier, EVENT_COLUMNS))
        return sql.SQL(COPY_DRY_RUN).format(table=table, columns=columns).as_bytes(None)

    @property
    def quoted_schema(self) -> str:
        """The schema's name as SQL text and as ``to_regclass`` reads it."""
        return self._identifier.as_string(None)

    def log_page(self, conditions: list[LiteralString], limit: int, *, page_bytes: int | None) -> bytes:
        """A page of the log; measured if *page_bytes* is given: then a short page need not be the last."""
        parts = {"columns": self._columns, "conditions": self._all(conditions), "limit": sql.Literal(limit)}
        if page_bytes is None:
            return self._compose(LOG_PAGE, **parts)
        return self._compose(LOG_PAGE_BY_SIZE, **parts, page_bytes=sql.Literal(page_bytes))

    def page_end(self, conditions: list[LiteralString], offset: int) -> bytes:
        return self._compose(PAGE_END, conditions=self._all(conditions), offset=sql.Literal(offset))

    def stream_page(self, conditions: list[LiteralString], limit: int, *, backwards: bool) -> bytes:
        return self._compose(
            STREAM_PAGE,
            columns=self._columns,
            conditions=self._all(conditions),
            limit=sql.Literal(limit),
            direction=sql.SQL("DESC" if backwards else "ASC"),
        )

    def _all(self, conditions: list[LiteralString]) -> sql.Composed:
        return sql.SQL(" AND ").join(sql.SQL(condition).format(schema=self._schema) for condition in conditions)

    def _compose(self, text: LiteralString, **parts: sql.Composable) -> bytes:
        return sql.SQL(text).format(schema=self._schema, **parts).as_bytes(None)
