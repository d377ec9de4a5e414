-- The tables and functions of an event store, layout 1.
--
-- Runs in psql as it is, under the schema name hindsight; create_schema() and `hindsight init --print` put another name
-- in its place. May be run again, and by many processes at once. Function names carry the layout version, because a
-- rolling deploy must not replace a function that older processes are calling.
--
-- To read: events and its columns. All else belongs to the library.

BEGIN;

-- Four at once without this lock: three failed, CREATE ... IF NOT EXISTS being no protection against a rival.
SELECT pg_advisory_xact_lock(hashtextextended('hindsight_fast: create schema', 0));

SET LOCAL client_min_messages = warning;

-- Not IF NOT EXISTS: it asks for the right to create schemas even where a DBA has made this one.
DO $body$
BEGIN
    IF to_regnamespace('hindsight') IS NULL THEN
        CREATE SCHEMA hindsight;
    END IF;
END
$body$;

-- One row. Everything that an append compares itself with.
CREATE TABLE IF NOT EXISTS hindsight.store_meta (
    only_row                boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    layout                  integer NOT NULL,           -- of these tables and functions
    oldest_writing_layout   integer NOT NULL,           -- code that knows only layouts below this one may not write
    lock_namespace          integer NOT NULL CHECK (lock_namespace BETWEEN 1 AND 32767),
    generation              bigint  NOT NULL DEFAULT 0, -- raised by whatever every open store has to notice
    system_identifier       bigint,                     -- of the cluster whose sequence drew the last numbers
    timeline                integer,                    -- and its timeline: both change when a copy takes over
    server_started_at       timestamptz NOT NULL,       -- what is compared where either may not be asked for
    state                   text    NOT NULL DEFAULT 'open', -- anything else refuses appends, and says why
    created_at              timestamptz NOT NULL DEFAULT clock_timestamp()
);

DO $body$
DECLARE
    found_layout integer := (SELECT layout FROM hindsight.store_meta);
BEGIN
    IF found_layout > 1 THEN
        RAISE EXCEPTION 'this schema has layout %, made by a newer version of hindsight_fast; this one knows layout 1', found_layout
            USING ERRCODE = 'HS010', HINT = 'Upgrade hindsight-fast.';
    END IF;
END
$body$;

-- The log. Its primary key is the order in which everybody reads it.
CREATE TABLE IF NOT EXISTS hindsight.events (
    transaction_no  bigint      NOT NULL,
    sequence_no     integer     NOT NULL,
    event_id        uuid        NOT NULL,
    stream_id       uuid        NOT NULL,
    stream_version  bigint      NOT NULL,
    correlation_id  uuid,
    created_at      timestamptz NOT NULL,
    event_name      text COLLATE "C" NOT NULL,
    event_version   integer     NOT NULL,
    -- json keeps the bytes as they came, and costs a third of jsonb to write and half of it to read.
    payload         json        NOT NULL,
    metadata        json,
    CONSTRAINT events_pkey PRIMARY KEY (transaction_no, sequence_no),
    -- Reads one stream, and is what makes two events with one version impossible whatever else fails.
    CONSTRAINT events_stream_key UNIQUE (stream_id, stream_version),
    -- Makes appending the same events twice impossible. Ids rise with time, so it grows at its right edge.
    CONSTRAINT events_event_id_key UNIQUE (event_id)
) WITH (
    -- Rows are never changed: vacuum has only to freeze them and set the visibility map, in portions of this size.
    autovacuum_vacuum_insert_scale_factor = 0,
    autovacuum_vacuum_insert_threshold = 500000,
    autovacuum_freeze_min_age = 0
);

-- All events of one cause, in order: without the order in it, a planner short of statistics walks the primary key.
-- Partial: most logs correlate few events.
-- Not IF NOT EXISTS: it locks the table before it looks, and a repeated run would stand in the way of appends.
DO $body$
BEGIN
    IF to_regclass('hindsight.events_correlation_idx') IS NULL THEN
        CREATE INDEX events_correlation_idx ON hindsight.events (correlation_id, transaction_no, sequence_no)
            WHERE correlation_id IS NOT NULL;
    END IF;
END
$body$;

-- The version of each stream's last event. Its rows are the locks that appends to one stream queue at, so they carry
-- nothing else: a head that knew its cursor would need a second update once the number is drawn (+37 to +97 %).
CREATE TABLE IF NOT EXISTS hindsight.stream_heads (
    stream_id       uuid   NOT NULL PRIMARY KEY,
    stream_version  bigint NOT NULL
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02); -- room for HOT updates, and pruned often

-- Empty for ever. Appends lock it in a mode that they share; what must be alone with no append running takes SHARE.
-- Not events itself: a lock there would also fight VACUUM.
CREATE TABLE IF NOT EXISTS hindsight.append_gate (nothing boolean);

-- How far each import has come; written in the transaction of the chunk that it speaks of.
CREATE TABLE IF NOT EXISTS hindsight.imports (
    import_id       text    NOT NULL,
    shard           integer NOT NULL,
    shard_count     integer NOT NULL,
    line_no         bigint  NOT NULL DEFAULT 0,     -- lines of the source that are done
    byte_offset     bigint  NOT NULL DEFAULT 0,     -- where the next one begins, decompressed
    source_digest   bytea   NOT NULL DEFAULT '',    -- SHA-256 of the bytes before byte_offset
    event_count     bigint  NOT NULL DEFAULT 0,     -- events stored
    finished        boolean NOT NULL DEFAULT false, -- the source's end was reached
    started_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (import_id, shard)
);

-- The initial import that is under way, or was interrupted: one row at most, gone once its events are in the store.
CREATE TABLE IF NOT EXISTS hindsight.initial_import (
    only_row        boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    import_id       text    NOT NULL,
    first_number    bigint  NOT NULL,               -- the transaction_no of its first chunk; not drawn, see below
    next_number     bigint  NOT NULL,               -- and of its next
    loaded          boolean NOT NULL DEFAULT false  -- the source's end was reached
);

-- The place up to which each projection has come, and the event that stands there.
CREATE TABLE IF NOT EXISTS hindsight.projections (
    name            text COLLATE "C" NOT NULL PRIMARY KEY,
    attached        boolean NOT NULL,               -- true: part of every append
    transaction_no  bigint,
    sequence_no     integer,
    event_id        uuid,
    owner           uuid,                           -- who runs it, and a counter that shows the owner alive
    lease           bigint NOT NULL DEFAULT 0,
    error           text,
    error_at        timestamptz,
    updated_at      timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Gives every append its number, after its streams are locked. CACHE 1: a backend that hoards numbers would use them
-- out of order. Far below 2^63: a lock key holds a number in 48 bits.
CREATE SEQUENCE IF NOT EXISTS hindsight.transaction_no AS bigint
    MINVALUE 0 START WITH 0 MAXVALUE 281474976710655 CACHE 1 NO CYCLE;

-- Draw 0 now. From here on "no last value" can mean only one thing: no right to read the sequence (PostgreSQL 18
-- answers NULL instead of an error; the store would look empty).
SELECT CASE WHEN pg_sequence_last_value('hindsight.transaction_no'::regclass) IS NULL
            THEN nextval('hindsight.transaction_no'::regclass) END AS drawn;


-- Which server this is: what changes when a standby is promoted or a dump is restored elsewhere. Some clouds refuse a
-- role the control file or the WAL's functions, or have none: what cannot be had is NULL. When the postmaster was started
-- can always be asked for.
CREATE OR REPLACE FUNCTION hindsight.server_identity_v1(
    OUT system_identifier bigint, OUT timeline integer, OUT started_at timestamptz
)
LANGUAGE plpgsql STABLE AS $body$
BEGIN
    IF pg_is_in_recovery() THEN
        RAISE EXCEPTION 'a standby takes no appends, and does not show the locks of its primary that readers need'
            USING ERRCODE = 'HS005', HINT = 'Connect to the primary.';
    END IF;
    started_at := pg_postmaster_start_time();
    BEGIN
        SELECT c.system_identifier INTO system_identifier FROM pg_control_system() AS c;
        -- The timeline being written now. The control file's own lags until the checkpoint after a promotion.
        timeline := ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::integer;
    EXCEPTION WHEN insufficient_privilege OR feature_not_supported OR undefined_function THEN
        system_identifier := NULL;
        timeline := NULL;
    END;
END
$body$;

INSERT INTO hindsight.store_meta (layout, oldest_writing_layout, lock_namespace, system_identifier, timeline, server_started_at)
SELECT 1, 1, 1 + floor(random() * 32767)::integer, i.system_identifier, i.timeline, i.started_at
FROM hindsight.server_identity_v1() AS i
ON CONFLICT DO NOTHING;


-- Whether the server that drew the last numbers is this one. Where one side has no timeline, because whoever wrote or
-- asks could not have it, the start of the postmaster decides: a restart is then taken for another server, which costs a
-- gap in the numbers and no event.
CREATE OR REPLACE FUNCTION hindsight.same_server_v1() RETURNS boolean
LANGUAGE sql STABLE AS $body$
    SELECT coalesce(
        m.system_identifier = i.system_identifier AND m.timeline = i.timeline, m.server_started_at = i.started_at
    )
    FROM hindsight.store_meta AS m, hindsight.server_identity_v1() AS i
$body$;


-- One more than the last number drawn: every number drawn from now on is at least this.
CREATE OR REPLACE FUNCTION hindsight.next_number_v1() RETURNS bigint
LANGUAGE plpgsql VOLATILE AS $body$
DECLARE
    last_number bigint := pg_sequence_last_value('hindsight.transaction_no'::regclass);
BEGIN
    IF last_number IS NULL THEN
        RAISE EXCEPTION 'the sequence transaction_no cannot be read by role %, or was restarted', current_user
            USING ERRCODE = 'insufficient_privilege', HINT = 'GRANT USAGE, SELECT on it; if it was restarted, call advance_sequence_v1().';
    END IF;
    RETURN last_number + 1;
END
$body$;


-- The same, refused if the sequence lags behind the events: it was put back, or a dump was restored without it. Numbers
-- drawn then would stand before what readers have passed, and events above it would be read by nobody.
CREATE OR REPLACE FUNCTION hindsight.checked_next_number_v1() RETURNS bigint
LANGUAGE plpgsql VOLATILE AS $body$
DECLARE
    -- Before the sequence is read: what is visible here had its number drawn earlier still.
    last_event bigint := (SELECT max(e.transaction_no) FROM hindsight.events AS e);
    next_number bigint := hindsight.next_number_v1();
BEGIN
    IF last_event >= next_number THEN
        RAISE EXCEPTION 'the sequence transaction_no is at %, behind the events, which have come to %', next_number - 1, last_event
            USING ERRCODE = 'HS002', HINT = 'Open the store as a role that may write; it calls advance_sequence_v1().';
    END IF;
    RETURN next_number;
END
$body$;


-- Lock and advance the heads of all streams of an append, and return each one's new version, in byte order of the ids.
-- One statement, sorted: appends meet their rivals in one order only and cannot deadlock.
CREATE OR REPLACE FUNCTION hindsight.advance_heads_v1(stream_ids uuid[], event_counts bigint[]) RETURNS bigint[]
LANGUAGE plpgsql VOLATILE
-- A generic plan made while the tables were empty would scan them for ever: 21 ms an append instead of 0.8.
SET enable_seqscan = off SET jit = off AS $body$
DECLARE
    head_versions bigint[];
BEGIN
    LOCK TABLE hindsight.append_gate IN ROW EXCLUSIVE MODE;
    WITH advanced AS (
        INSERT INTO hindsight.stream_heads AS head (stream_id, stream_version)
        SELECT wanted.stream_id, wanted.event_count - 1
        FROM unnest(stream_ids, event_counts) AS wanted (stream_id, event_count)
        ORDER BY wanted.stream_id
        ON CONFLICT (stream_id) DO UPDATE SET stream_version = head.stream_version + 1 + excluded.stream_version
        RETURNING head.stream_id, head.stream_version
    )
    SELECT array_agg(advanced.stream_version ORDER BY advanced.stream_id) INTO head_versions FROM advanced;
    RETURN head_versions;
END
$body$;


-- Register this transaction as one that may hold numbers not yet visible, then draw its number. Call it with the heads
-- locked, never before: the order of two appends to one stream is then the order of their numbers.
CREATE OR REPLACE FUNCTION hindsight.draw_number_v1() RETURNS bigint
LANGUAGE plpgsql VOLATILE AS $body$
DECLARE
    -- Per store, not per namespace: two stores whose namespaces collide must not take each other's bound for theirs.
    setting constant text := 'hindsight_fast.bound_' || 'hindsight.transaction_no'::regclass::oid;
    bound     text := current_setting(setting, true);
    number    bigint;
    namespace bigint;
BEGIN
    IF bound IS NULL OR bound = '' THEN
        SELECT m.lock_namespace INTO STRICT namespace FROM hindsight.store_meta AS m;
        number := hindsight.checked_next_number_v1();
        -- Shared: appends do not wait for each other here. A lock, because it goes exactly when the transaction's
        -- fate is visible to all, also when its backend is killed, and stays through a PREPARE TRANSACTION. Nobody
        -- takes this key in another mode, so that to try is to have it.
        IF NOT pg_try_advisory_xact_lock_shared((namespace << 48) | number) THEN
            RAISE EXCEPTION 'somebody holds advisory lock % exclusively, which is an append''s to take', (namespace << 48) | number
                USING ERRCODE = 'lock_not_available';
        END IF;
        -- Local: goes with the transaction, or with the savepoint that also takes the lock with it.
        bound := set_config(setting, number::text, true);
    END IF;
    number := nextval('hindsight.transaction_no'::regclass);
    IF number < bound::bigint THEN
        RAISE EXCEPTION 'number % drawn below the registered bound %: the sequence was put back or has a cache', number, bound
            USING ERRCODE = 'HS002', HINT = 'ALTER SEQUENCE transaction_no CACHE 1; then call advance_sequence_v1().';
    END IF;
    RETURN number;
END
$body$;


-- Refuse the append if the store is not what the writer took it for. A statement of its own, after all locks: its
-- snapshot shows what was committed while this append waited. Always true.
CREATE OR REPLACE FUNCTION hindsight.check_writable_v1(writer_layout integer, writer_generation bigint) RETURNS boolean
LANGUAGE plpgsql VOLATILE AS $body$
DECLARE
    meta record;
BEGIN
    -- What same_server_v1 compares, without its subtransaction. In a branch of its own: whether a role may call a function
    -- is checked where a statement begins, also for a call that it does not come to.
    IF has_function_privilege('pg_control_system()'::regprocedure, 'EXECUTE')
        AND has_function_privilege('pg_walfile_name(pg_lsn)'::regprocedure, 'EXECUTE')
        AND has_function_privilege('pg_current_wal_insert_lsn()'::regprocedure, 'EXECUTE')
    THEN
        -- One statement for all: this runs in every append.
        SELECT m.state, m.oldest_writing_layout, m.generation,
            CASE WHEN m.timeline IS NULL THEN m.server_started_at = pg_postmaster_start_time()
                ELSE m.system_identifier = (pg_control_system()).system_identifier
                    AND m.timeline = ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::integer
            END AS same_server
        INTO STRICT meta FROM hindsight.store_meta AS m;
    ELSE
        SELECT m.state, m.oldest_writing_layout, m.generation, m.server_started_at = pg_postmaster_start_time() AS same_server
        INTO STRICT meta FROM hindsight.store_meta AS m;
    END IF;
    IF meta.state <> 'open' THEN
        RAISE EXCEPTION 'the store accepts no appends: %', meta.state USING ERRCODE = 'HS011';
    END IF;
    IF writer_layout < meta.oldest_writing_layout THEN
        RAISE EXCEPTION 'layout % may not write any more, only % and newer', writer_layout, meta.oldest_writing_layout
            USING ERRCODE = 'HS010', HINT = 'Upgrade hindsight-fast.';
    END IF;
    IF writer_generation <> meta.generation THEN
        RAISE EXCEPTION 'the store has generation %, the writer was opened under %', meta.generation, writer_generation
            USING ERRCODE = 'HS012', HINT = 'Open the store again.';
    END IF;
    IF NOT meta.same_server THEN
        RAISE EXCEPTION 'this is another server, or another timeline, than the one that drew the last numbers'
            USING ERRCODE = 'HS001', HINT = 'Call advance_sequence_v1() once, then append again.';
    END IF;
    RETURN true;
END
$body$;


-- How a group of appends goes in one call; psql reads it from beside this file.
\ir append.sql


-- What an append by COPY does before its first row: lock, register, draw. The rows then carry what it returns.
CREATE OR REPLACE FUNCTION hindsight.begin_copy_v1(
    stream_ids uuid[], event_counts bigint[],
    OUT transaction_no bigint, OUT head_versions bigint[], OUT started_at timestamptz
)
LANGUAGE plpgsql VOLATILE AS $body$
DECLARE
    begun boolean := hindsight.begin_append_v1('', '');
BEGIN
    head_versions := hindsight.advance_heads_v1(stream_ids, event_counts);
    transaction_no := hindsight.draw_number_v1();
    started_at := clock_timestamp();
END
$body$;


-- How an empty store is filled beside its tables; psql reads it from beside this file.
\ir initial_import.sql


-- Which run of which server this is; a text, to be compared and nothing else. A server that recovers from a crash may
-- give out numbers again that no committed transaction had used, and no bound survives that. When one backend is killed
-- the postmaster recovers without being started anew: the second part tells, because a crash discards all statistics.
CREATE OR REPLACE FUNCTION hindsight.server_run_v1() RETURNS text
LANGUAGE sql STABLE AS $body$
    SELECT extract(epoch FROM pg_postmaster_start_time()) || ' ' || extract(epoch FROM pg_stat_get_bgwriter_stat_reset_time())
$body$;


-- The bound of what may be read: every event below it is committed and visible to a statement that starts after this
-- one, or never will be. Good only in the run of the server that it came from. Also tells whether any event is so large
-- that it is stored out of line, because then pages have to be measured; and whether an open append holds the bound down.
CREATE OR REPLACE FUNCTION hindsight.read_barrier_v1(
    OUT bound bigint, OUT server_run text, OUT large_events boolean, OUT blocked boolean
)
LANGUAGE plpgsql VOLATILE AS $body$
DECLARE
    namespace integer;
    registered bigint;
BEGIN
    IF pg_is_in_recovery() THEN
        RAISE EXCEPTION 'a standby does not show the locks of its primary, so no bound can be had here'
            USING ERRCODE = 'HS005', HINT = 'Connect to the primary.';
    END IF;
    IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        RAISE EXCEPTION 'reading in order needs READ COMMITTED, not %', upper(current_setting('transaction_isolation'))
            USING ERRCODE = 'HS004';
    END IF;
    server_run := hindsight.server_run_v1();
    SELECT m.lock_namespace INTO STRICT namespace FROM hindsight.store_meta AS m;
    -- First the sequence, then the registrations; the other way round a number drawn between the two would be missed.
    bound := hindsight.checked_next_number_v1();
    SELECT min(((l.classid::bigint << 32) | l.objid::bigint) & 281474976710655) INTO registered
    FROM pg_locks AS l
    WHERE l.locktype = 'advisory' AND l.mode = 'ShareLock' AND l.granted AND l.objsubid = 1
      AND l.classid::bigint >> 16 = namespace
      AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database());
    blocked := coalesce(registered < bound, false);
    bound := least(bound, registered);
    large_events := (
        SELECT pg_relation_size(c.reltoastrelid) > 0 FROM pg_class AS c WHERE c.oid = 'hindsight.events'::regclass
    );
END
$body$;


-- End what holds readers up and cannot end by itself: appends open for longer than max_hold that wait for their client
-- in the middle of a COPY, a stopped importer's or one whose host is gone. No timeout reaches those (seen: statement, idle
-- and transaction timeouts did nothing, and neither did a cancel). One row for each, ended or not for want of rights.
CREATE OR REPLACE FUNCTION hindsight.end_stalled_v1(
    max_hold interval, OUT pid integer, OUT application_name text, OUT held interval, OUT ended boolean
) RETURNS SETOF record
LANGUAGE plpgsql VOLATILE AS $body$
BEGIN
    FOR pid, application_name, held IN
        SELECT a.pid, a.application_name, clock_timestamp() - a.xact_start
        FROM pg_locks AS l JOIN pg_stat_activity AS a ON a.pid = l.pid
        WHERE l.locktype = 'advisory' AND l.mode = 'ShareLock' AND l.granted AND l.objsubid = 1
          AND l.classid::bigint >> 16 = (SELECT m.lock_namespace FROM hindsight.store_meta AS m)
          AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
          AND a.state = 'active' AND a.wait_event_type = 'Client' AND a.wait_event = 'ClientRead'
          AND clock_timestamp() - a.xact_start > max_hold
    LOOP
        BEGIN
            ended := pg_terminate_backend(pid, 5000);
        EXCEPTION WHEN insufficient_privilege THEN
            ended := false;
        END;
        RETURN NEXT;
    END LOOP;
END
$body$;


-- True, or an error: stands in the WHERE of every page, so that a bound is never used in another run than its own.
CREATE OR REPLACE FUNCTION hindsight.bound_holds_v1(bounds_run text) RETURNS boolean
LANGUAGE plpgsql STABLE AS $body$
BEGIN
    IF bounds_run <> hindsight.server_run_v1() THEN
        RAISE EXCEPTION 'the server was restarted or replaced since this bound was read' USING ERRCODE = 'HS003';
    END IF;
    RETURN true;
END
$body$;


-- The version of a stream's first event behind a cursor, or NULL. By halving: in a stream, versions and cursors rise
-- together, and versions have no holes.
CREATE OR REPLACE FUNCTION hindsight.first_version_behind_v1(stream uuid, after_transaction_no bigint, after_sequence_no integer)
RETURNS bigint
LANGUAGE plpgsql STABLE SET enable_seqscan = off SET jit = off AS $body$
DECLARE
    low     bigint := 0;    -- every version below it stands at or before the cursor
    high    bigint := (SELECT max(e.stream_version) + 1 FROM hindsight.events AS e WHERE e.stream_id = stream);
    last    bigint := high;
    middle  bigint;
    behind  boolean;
BEGIN
    WHILE low < high LOOP
        middle := (low + high) / 2;
        SELECT (e.transaction_no, e.sequence_no) > (after_transaction_no, after_sequence_no) INTO STRICT behind
        FROM hindsight.events AS e WHERE e.stream_id = stream AND e.stream_version = middle;
        IF behind THEN
            high := middle;
        ELSE
            low := middle + 1;
        END IF;
    END LOOP;
    RETURN CASE WHEN low < last THEN low END;
END
$body$;


-- Move the sequence past every number that was ever used, if this server is not the one that drew the last ones, or the
-- sequence lags behind the events (a restore without it). Forward only, and the only thing that moves it but the switch
-- of an initial import, which takes the same lock: two unlocked repairs at once put it back, and an event was lost.
-- Returns the last number, or NULL where nothing had to be done.
CREATE OR REPLACE FUNCTION hindsight.advance_sequence_v1() RETURNS bigint
LANGUAGE plpgsql VOLATILE AS $body$
DECLARE
    meta hindsight.store_meta%ROWTYPE;
    here record;
    last_number bigint;
    last_event bigint;
BEGIN
    SELECT * INTO STRICT meta FROM hindsight.store_meta FOR UPDATE;
    SELECT * INTO here FROM hindsight.server_identity_v1();
    last_number := coalesce(pg_sequence_last_value('hindsight.transaction_no'::regclass), -1);
    last_event := coalesce((SELECT max(e.transaction_no) FROM hindsight.events AS e), 0);
    IF last_number >= last_event AND hindsight.same_server_v1() THEN
        RETURN NULL;
    END IF;
    UPDATE hindsight.store_meta
    SET system_identifier = here.system_identifier, timeline = here.timeline, server_started_at = here.started_at;
    -- 2^32: more than could have been drawn by a server that this one knows nothing of.
    RETURN setval('hindsight.transaction_no'::regclass, greatest(last_number, last_event) + 4294967296);
END
$body$;

COMMIT;
