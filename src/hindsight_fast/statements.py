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

# The same, but the last version is that of the last event at or before a second cursor.
STREAM_RANGE: Final = """
    SELECT {schema}.first_version_behind_v1(%s::uuid, %s::bigint, %s::integer),
        coalesce({schema}.first_version_behind_v1(%s::uuid, %s::bigint, %s::integer) - 1,
            (SELECT h.stream_version FROM {schema}.stream_heads AS h WHERE h.stream_id = %s::uuid))
"""

UP_TO_CURSOR: Final = "(e.transaction_no, e.sequence_no) <= (%s::bigint, %s::integer)"
NAMES_FILTER: Final = "e.event_name = ANY(%s::text[])"
CORRELATION_FILTER: Final = "e.correlation_id = %s::uuid"

# Where a table's rows lie, and in how many blocks.
TABLE_FILE: Final = b"""
    SELECT pg_relation_filenode(c.oid)::bigint, pg_relation_size(c.oid) / current_setting('block_size')::bigint
    FROM pg_class AS c WHERE c.oid = %s::regclass
"""

# How many events of each name and version lie in a span of the table's blocks, and the places of those with the lowest
# lots: of each kind at most as high as told, all of a kind that was not met yet. By blocks, because in the order of the
# log it takes twice as long. An event's lot is drawn once for all, by its id.
COUNT_KINDS: Final = """
    SELECT e.event_name, e.event_version, count(*), array_agg(e.lot) FILTER (WHERE e.is_low),
        array_agg(e.transaction_no) FILTER (WHERE e.is_low), array_agg(e.sequence_no) FILTER (WHERE e.is_low)
    FROM (
        SELECT e.event_name, e.event_version, e.transaction_no, e.sequence_no, uuid_hash(e.event_id) AS lot,
            kind.highest IS NULL OR uuid_hash(e.event_id) <= kind.highest AS is_low
        FROM {schema}.events AS e
        LEFT JOIN unnest(%s::text[], %s::integer[], %s::integer[]) AS kind (name, version, highest)
            ON kind.name COLLATE "C" = e.event_name AND kind.version = e.event_version
        WHERE e.ctid >= %s::tid AND e.ctid < %s::tid AND e.transaction_no < %s::bigint
    ) AS e
    GROUP BY e.event_name, e.event_version
"""

# Events by their places, each found by the primary key.
EVENTS_AT: Final = """
    SELECT {columns} FROM unnest(%s::bigint[], %s::integer[]) AS place (transaction_no, sequence_no)
    JOIN {schema}.events AS e USING (transaction_no, sequence_no) ORDER BY e.transaction_no, e.sequence_no
"""

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

# Where a stream's event of this version stands.
EVENT_CURSOR: Final = """
    SELECT e.transaction_no, e.sequence_no FROM {schema}.events AS e
    WHERE e.stream_id = %s::uuid AND e.stream_version = %s::bigint
"""

STREAM_VERSION: Final = "SELECT h.stream_version FROM {schema}.stream_heads AS h WHERE h.stream_id = %s::uuid"

READ_BARRIER: Final = "SELECT b.bound, b.server_run, b.large_events, b.blocked FROM {schema}.read_barrier_v1() AS b"

# Asked when open appends hold readers up.
END_STALLED: Final = """
    SELECT s.pid, s.application_name, extract(epoch FROM s.held)::float8, s.ended
    FROM {schema}.end_stalled_v1(make_interval(secs => %s::float8)) AS s
"""

# Who holds the bound down: each append that is open, by the lowest number that it may have drawn. A prepared
# transaction has no process any more, but a name. Of other users' sessions an ordinary role is told the pid, and not
# what they do. One look at the locks: what they say of each other belongs together.
OPEN_APPENDS: Final = """
    WITH held AS MATERIALIZED (SELECT k.* FROM pg_locks AS k WHERE k.granted)
    SELECT ((l.classid::bigint << 32) | l.objid::bigint) & 281474976710655, l.pid, p.gid, a.application_name, a.state,
        a.wait_event, extract(epoch FROM clock_timestamp() - coalesce(a.xact_start, p.prepared))::float8
    FROM held AS l
    LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
    LEFT JOIN held AS x ON l.pid IS NULL AND x.pid IS NULL AND x.virtualtransaction = l.virtualtransaction
        AND x.locktype = 'transactionid' AND x.mode = 'ExclusiveLock'
    LEFT JOIN pg_prepared_xacts AS p ON p.transaction = x.transactionid
    WHERE l.locktype = 'advisory' AND l.mode = 'ShareLock' AND l.objsubid = 1
      AND l.classid::bigint >> 16 = (SELECT m.lock_namespace FROM {schema}.store_meta AS m)
      AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
    ORDER BY 1, l.pid
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
        {schema}.same_server_v1(),
        coalesce((SELECT max(e.transaction_no) FROM {schema}.events AS e) >= {schema}.next_number_v1(), false)
    FROM {schema}.store_meta AS m
"""

ADVANCE_SEQUENCE: Final = "SELECT {schema}.advance_sequence_v1()"

BEGIN_COPY: Final = """
    SELECT c.transaction_no, c.head_versions, c.started_at FROM {schema}.begin_copy_v1(%s::uuid[], %s::bigint[]) AS c
"""

# A group of appends: 24 parameters, whose types the function gives.
APPEND: Final = "SELECT {schema}.append_v1({parameters})"
APPEND_PARAMETERS: Final = 24
APPEND_ONE: Final = "SELECT {schema}.append_one_v1({parameters})"
APPEND_ONE_PARAMETERS: Final = 14

BEGIN_APPEND: Final = "SELECT {schema}.begin_append_v1(%s::text, %s::text)"
COUNT_KNOWN: Final = "SELECT count(*) FROM {schema}.events AS e WHERE e.event_id = ANY(%s::uuid[])"

# Streams that were only looked at.
DROP_EMPTY_HEADS: Final = """
    DELETE FROM {schema}.stream_heads AS h WHERE h.stream_id = ANY(%s::uuid[]) AND h.stream_version < 0
"""

# What an append was sent to, whose connection was lost: ended, so that it cannot be carried out after it was taken for
# lost. Only if that session began before the append was sent, so many seconds ago: in a container that was started anew
# the first process ids are given again at once, to sessions that have nothing to do with it.
END_APPEND: Final = """
    SELECT pg_terminate_backend(a.pid, 5000) FROM pg_stat_activity AS a
    WHERE a.pid = %s::integer AND a.backend_start < clock_timestamp() - make_interval(secs => %s::float8)
        AND a.usename = current_user AND a.datname = current_database() AND a.state <> 'idle'
        AND a.pid <> pg_backend_pid()
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
# into the second, where the server reads every value and checks every constraint, without indexes. The third knows the
# ids that lines bring, and what they stood for. Triggers and foreign keys of somebody else's are not copied.
MAKE_DRY_RUN: Final = (
    "CREATE TEMPORARY TABLE hindsight_dry_run_indexed (LIKE {schema}.events INCLUDING ALL)",
    "CREATE TEMPORARY TABLE hindsight_dry_run_rows (LIKE {schema}.events INCLUDING ALL EXCLUDING INDEXES)",
    "CREATE TEMPORARY TABLE hindsight_dry_run_ids (event_id uuid PRIMARY KEY, content bytea, time text)",
)
DROP_DRY_RUN: Final = """
    DROP TABLE IF EXISTS pg_temp.hindsight_dry_run_indexed, pg_temp.hindsight_dry_run_rows,
        pg_temp.hindsight_dry_run_ids
"""
COPY_DRY_RUN: Final = "COPY pg_temp.{table} ({columns}) FROM STDIN (FORMAT BINARY)"
COPY_DRY_RUN_IDS: Final = "COPY pg_temp.hindsight_dry_run_ids (event_id, content, time) FROM STDIN"
KNOWN_DRY_RUN_IDS: Final = """
    SELECT i.event_id, i.content, i.time FROM pg_temp.hindsight_dry_run_ids AS i
    WHERE i.event_id = ANY(%s::uuid[])
"""

LIST_IMPORTS: Final = """
    SELECT i.import_id, min(i.line_no), min(i.byte_offset), sum(i.event_count)::bigint, bool_and(i.finished),
        min(i.started_at), max(i.updated_at)
    FROM {schema}.imports AS i GROUP BY i.import_id ORDER BY min(i.started_at), i.import_id
"""

# One initial import at a time in a store: held by its importer's session, and gone with it however it ends. Exclusive,
# so that no reader takes it for the registration of an append.
LOCK_INITIAL: Final = """
    SELECT pg_try_advisory_lock(hashtextextended('hindsight_fast: initial import ' || to_regclass(%s)::oid, 0))
"""
UNLOCK_INITIAL: Final = """
    SELECT pg_advisory_unlock(hashtextextended('hindsight_fast: initial import ' || to_regclass(%s)::oid, 0))
"""

FIND_INITIAL: Final = "SELECT i.import_id, i.next_number, i.loaded FROM {schema}.initial_import AS i"
BEGIN_INITIAL: Final = "SELECT {schema}.begin_initial_v1(%s::text)"

# Microseconds since 1970, and not a time: that would come in the session's time zone.
MOVE_INITIAL: Final = """
    UPDATE {schema}.initial_import SET next_number = next_number + %s, loaded = %s
    WHERE import_id = %s AND next_number = %s AND NOT loaded
    RETURNING (extract(epoch FROM clock_timestamp()) * 1000000)::bigint
"""

COPY_BESIDE: Final = "COPY {schema}.events_import ({columns}) FROM STDIN (FORMAT BINARY)"
NOTE_LINES: Final = "INSERT INTO {schema}.events_import_lines VALUES (%s::bigint, %s::integer[], %s::bigint[])"
COUNT_STREAMS: Final = "SELECT uuid_send(e.stream_id), count(*) FROM {schema}.events_import AS e GROUP BY e.stream_id"

IMPORT_FINISHED: Final = "SELECT bool_and(i.finished) FROM {schema}.imports AS i WHERE i.import_id = %s"

LIST_BESIDE: Final = "SELECT i.index_id, i.table_name, i.guards_ids FROM {schema}.initial_indexes_v1() AS i"
LIMIT_BUILD: Final = "SELECT {schema}.limit_build_v1()"
BUILD_BESIDE: Final = "SELECT {schema}.build_beside_v1(%s::oid)"
FILL_HEADS_BESIDE: Final = "SELECT {schema}.fill_heads_beside_v1()"
ANALYZE_BESIDE: Final = "ANALYZE {schema}.events_import, {schema}.stream_heads_import"

# What each backend that builds an index has done of it: the table is read, then the sorted rows are written.
BUILD_PROGRESS: Final = """
    SELECT p.pid,
        CASE WHEN p.tuples_total > 0 THEN 0.5 + 0.5 * p.tuples_done / p.tuples_total
             WHEN p.blocks_total > 0 THEN 0.5 * p.blocks_done / p.blocks_total ELSE 0 END::float8
    FROM pg_stat_progress_create_index AS p WHERE p.pid = ANY(%s::integer[])
"""

# Ids that stand at several places of an import, and those places' lines: how many ids, and the first of them.
DUPLICATED_IDS: Final = """
    WITH duplicated AS MATERIALIZED (
        SELECT e.event_id, min((e.transaction_no::numeric * 4294967296) + e.sequence_no) AS first_place
        FROM {schema}.events_import AS e GROUP BY e.event_id HAVING count(*) > 1
    ), named AS MATERIALIZED (
        SELECT d.event_id, d.first_place FROM duplicated AS d ORDER BY d.first_place LIMIT %s
    )
    SELECT (SELECT count(*) FROM duplicated), n.event_id, (
        SELECT array_agg(lines.line_no ORDER BY lines.line_no) FROM (
            SELECT l.line_nos[at.run] + e.sequence_no - l.sequence_nos[at.run]
            FROM {schema}.events_import AS e
            JOIN {schema}.events_import_lines AS l USING (transaction_no)
            CROSS JOIN LATERAL (
                SELECT max(r.run) FROM generate_subscripts(l.sequence_nos, 1) AS r (run)
                WHERE l.sequence_nos[r.run] <= e.sequence_no
            ) AS at (run)
            WHERE e.event_id = n.event_id ORDER BY 1 LIMIT 100
        ) AS lines (line_no)
    )
    FROM named AS n ORDER BY n.first_place
"""

# Transactions that may hold a snapshot: begun before what they might read was complete. Of other users' sessions an
# ordinary role is not told whether they hold one, so those count.
OPEN_SNAPSHOTS: Final = """
    SELECT l.virtualtransaction, l.pid FROM pg_locks AS l JOIN pg_stat_activity AS a ON a.pid = l.pid
    WHERE l.locktype = 'virtualxid' AND l.mode = 'ExclusiveLock' AND l.granted AND l.pid <> pg_backend_pid()
      AND a.datname = current_database() AND a.usesysid > 0 AND (a.backend_xmin IS NOT NULL OR a.state IS NULL)
"""

# Who has kept the switch from locking the log's tables.
TABLE_USERS: Final = """
    SELECT DISTINCT l.pid FROM pg_locks AS l
    WHERE l.relation IN (to_regclass(%s), to_regclass(%s)) AND l.granted AND l.pid <> pg_backend_pid()
"""

# For how long each of these waits for a lock; whoever calls them tries again.
LIMIT_GATE_WAIT: Final = "SELECT set_config('lock_timeout', '100ms', true)"
LIMIT_DROP_WAIT: Final = "SELECT set_config('lock_timeout', '5s', true)"

SWITCH_INITIAL: Final = "SELECT {schema}.switch_initial_v1(%s::text)"
DROP_INITIAL: Final = "SELECT {schema}.drop_initial_v1(%s::text)"

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
        self.event_cursor = self._compose(EVENT_CURSOR)
        self.count_kinds = self._compose(COUNT_KINDS)
        self.events_at = self._compose(EVENTS_AT, columns=self._columns)
        self.stream_start = self._compose(STREAM_START)
        self.stream_range = self._compose(STREAM_RANGE)
        self.read_barrier = self._compose(READ_BARRIER)
        self.end_stalled = self._compose(END_STALLED)
        self.open_appends = self._compose(OPEN_APPENDS)
        self.head = self._compose(HEAD)
        self.found_layout = self._compose(FOUND_LAYOUT)
        self.store_meta = self._compose(STORE_META)
        self.advance_sequence = self._compose(ADVANCE_SEQUENCE)
        self.begin_copy = self._compose(BEGIN_COPY)
        self.begin_append = self._compose(BEGIN_APPEND)
        self.append = self._call(APPEND, APPEND_PARAMETERS)
        self.append_one = self._call(APPEND_ONE, APPEND_ONE_PARAMETERS)
        self.end_append = self._compose(END_APPEND)
        self.count_known = self._compose(COUNT_KNOWN)
        self.drop_empty_heads = self._compose(DROP_EMPTY_HEADS)
        # The one that goes without parameters.
        self.copy_events = (
            sql.SQL(COPY_EVENTS)
            .format(schema=self._identifier, columns=sql.SQL(", ").join(map(sql.Identifier, EVENT_COLUMNS)))
            .as_bytes(None)
        )
        self.copy_beside = (
            sql.SQL(COPY_BESIDE)
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
        self.find_initial = self._compose(FIND_INITIAL)
        self.begin_initial = self._compose(BEGIN_INITIAL)
        self.move_initial = self._compose(MOVE_INITIAL)
        self.note_lines = self._compose(NOTE_LINES)
        self.count_streams = self._compose(COUNT_STREAMS)
        self.import_finished = self._compose(IMPORT_FINISHED)
        self.limit_build = self._compose(LIMIT_BUILD)
        self.list_beside = self._compose(LIST_BESIDE)
        self.build_beside = self._compose(BUILD_BESIDE)
        self.fill_heads_beside = self._compose(FILL_HEADS_BESIDE)
        self.analyze_beside = self._compose(ANALYZE_BESIDE)
        self.duplicated_ids = self._compose(DUPLICATED_IDS)
        self.switch_initial = self._compose(SWITCH_INITIAL)
        self.drop_initial = self._compose(DROP_INITIAL)

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

    def _call(self, text: LiteralString, parameters: int) -> bytes:
        """A call as libpq takes it."""
        return numbered(self._compose(text, parameters=sql.SQL(", ").join([sql.SQL("%s")] * parameters)))

    def _all(self, conditions: list[LiteralString]) -> sql.Composed:
        return sql.SQL(" AND ").join(sql.SQL(condition).format(schema=self._schema) for condition in conditions)

    def _compose(self, text: LiteralString, **parts: sql.Composable) -> bytes:
        return sql.SQL(text).format(schema=self._schema, **parts).as_bytes(None)
