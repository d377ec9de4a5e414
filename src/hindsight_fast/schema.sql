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
    system_identifier       bigint  NOT NULL,           -- of the cluster whose sequence drew the last numbers
    timeline                integer NOT NULL,           -- and its timeline: both change when a copy takes over
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
    source_digest   bytea   NOT NULL DEFAULT '',    -- BLAKE2b of the bytes before byte_offset
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


-- Which server this is: what changes when a standby is promoted or a dump is restored elsewhere.
CREATE OR REPLACE FUNCTION hindsight.server_identity_v1(OUT system_identifier bigint, OUT timeline integer)
LANGUAGE plpgsql STABLE AS $body$
BEGIN
    IF pg_is_in_recovery() THEN
        RAISE EXCEPTION 'a standby takes no appends, and does not show the locks of its primary that readers need'
            USING ERRCODE = 'HS005', HINT = 'Connect to the primary.';
    END IF;
    SELECT c.system_identifier INTO system_identifier FROM pg_control_system() AS c;
    -- The timeline being written now. The control file's own lags until the checkpoint after a promotion.
    timeline := ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::integer;
END
$body$;

INSERT INTO hindsight.store_meta (layout, oldest_writing_layout, lock_namespace, system_identifier, timeline)
SELECT 1, 1, 1 + floor(random() * 32767)::integer, i.system_identifier, i.timeline FROM hindsight.server_identity_v1() AS i
ON CONFLICT DO NOTHING;


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
    bound   bigint := nullif(current_setting(setting, true), '')::bigint;
    number  bigint;
    namespace bigint;
BEGIN
    IF bound IS NULL THEN
        bound := hindsight.checked_next_number_v1();
        -- Shared: appends do not wait for each other here. A lock, because it goes exactly when the transaction's
        -- fate is visible to all, also when its backend is killed, and stays through a PREPARE TRANSACTION.
        SELECT m.lock_namespace INTO STRICT namespace FROM hindsight.store_meta AS m;
        PERFORM pg_advisory_xact_lock_shared((namespace << 48) | bound);
        -- Local: goes with the transaction, or with the savepoint that also takes the lock with it.
        PERFORM set_config(setting, bound::text, true);
    END IF;
    number := nextval('hindsight.transaction_no'::regclass);
    IF number < bound THEN
        RAISE EXCEPTION 'number % drawn below the registered bound %: the sequence was put back or has a cache', number, bound
            USING ERRCODE = 'HS002', HINT = 'ALTER SEQUENCE transaction_no CACHE 1; then call advance_sequence_v1().';
    END IF;
    RETURN number;
END
$body$;


-- Refuse the append at its end if the store is not what the writer took it for. A statement of its own, after all
-- locks: its snapshot shows what was committed while this append waited.
CREATE OR REPLACE FUNCTION hindsight.check_writable_v1(writer_layout integer, writer_generation bigint) RETURNS void
LANGUAGE plpgsql VOLATILE AS $body$
DECLARE
    meta hindsight.store_meta%ROWTYPE;
    here record;
BEGIN
    SELECT * INTO STRICT meta FROM hindsight.store_meta;
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
    SELECT * INTO here FROM hindsight.server_identity_v1();
    IF here.system_identifier <> meta.system_identifier OR here.timeline <> meta.timeline THEN
        RAISE EXCEPTION 'this is another server, or another timeline, than the one that drew the last numbers'
            USING ERRCODE = 'HS001', HINT = 'Call advance_sequence_v1() once, then append again.';
    END IF;
END
$body$;


-- What an append by COPY does before its first row: lock, register, draw. The rows then carry what it returns.
CREATE OR REPLACE FUNCTION hindsight.begin_copy_v1(
    stream_ids uuid[], event_counts bigint[],
    OUT transaction_no bigint, OUT head_versions bigint[], OUT started_at timestamptz
)
LANGUAGE plpgsql VOLATILE AS $body$
BEGIN
    IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        RAISE EXCEPTION 'appends run under READ COMMITTED, not %', upper(current_setting('transaction_isolation'))
            USING ERRCODE = 'HS004';
    END IF;
    IF current_setting('synchronous_commit') = 'off' THEN
        -- An acknowledged event is on disk.
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
    head_versions := hindsight.advance_heads_v1(stream_ids, event_counts);
    transaction_no := hindsight.draw_number_v1();
    started_at := clock_timestamp();
END
$body$;


-- What an initial import is and why it loses nothing: docs/importing.md. Its events gather in tables beside the log's,
-- which take the places of the empty ones in one transaction at the end. Until then nobody sees them.

-- What hangs on the log's tables and would be lost, or go wrong, when others take their places; NULL where nothing does.
-- Indexes, constraints, defaults, comments and grants are not among it: they are made anew.
CREATE OR REPLACE FUNCTION hindsight.initial_obstacles_v1() RETURNS text
LANGUAGE sql STABLE AS $body$
    WITH replaced AS (
        SELECT c.oid, c.reltype, c.relname, c.relrowsecurity FROM pg_class AS c
        WHERE c.oid IN ('hindsight.events'::regclass, 'hindsight.stream_heads'::regclass)
    ), found (obstacle) AS (
        SELECT pg_describe_object(d.classid, d.objid, 0)
        FROM replaced AS r
        JOIN pg_depend AS d ON (d.refclassid = 'pg_class'::regclass AND d.refobjid = r.oid)
            OR (d.refclassid = 'pg_type'::regclass AND d.refobjid = r.reltype)
        LEFT JOIN pg_constraint AS k ON d.classid = 'pg_constraint'::regclass AND k.oid = d.objid
        LEFT JOIN pg_class AS i ON d.classid = 'pg_class'::regclass AND i.oid = d.objid
        WHERE d.deptype <> 'i'
          AND d.classid <> 'pg_attrdef'::regclass
          AND (i.relkind = 'i') IS NOT TRUE
          AND (k.conrelid = r.oid AND k.contype IN ('c', 'n', 'p', 'u')) IS NOT TRUE
        UNION
        -- Its subscribers would never be sent what was loaded beside the published table.
        SELECT 'publication ' || p.pubname FROM pg_publication AS p
        WHERE p.puballtables OR EXISTS (
            SELECT FROM pg_publication_namespace AS n
            JOIN pg_class AS c ON c.oid = 'hindsight.events'::regclass AND c.relnamespace = n.pnnspid
            WHERE n.pnpubid = p.oid
        )
        UNION
        SELECT 'row level security of table ' || r.relname FROM replaced AS r WHERE r.relrowsecurity
    )
    SELECT string_agg(f.obstacle, ', ' ORDER BY f.obstacle) FROM found AS f
$body$;


-- Make a table like the one that it will replace: columns, defaults, checks, storage settings, place and owner; without
-- its indexes.
CREATE OR REPLACE FUNCTION hindsight.create_beside_v1(original regclass, beside text) RETURNS void
LANGUAGE plpgsql VOLATILE AS $body$
DECLARE
    options text := (
        SELECT string_agg(format('%s = %L', s.prefix || split_part(s.setting, '=', 1), substr(s.setting, strpos(s.setting, '=') + 1)), ', ')
        FROM (
            SELECT '', unnest(c.reloptions) FROM pg_class AS c WHERE c.oid = original
            UNION ALL
            SELECT 'toast.', unnest(t.reloptions) FROM pg_class AS c JOIN pg_class AS t ON t.oid = c.reltoastrelid WHERE c.oid = original
        ) AS s (prefix, setting)
    );
    found record;
BEGIN
    SELECT pg_get_userbyid(c.relowner) AS owner, coalesce(s.spcname, '') AS tablespace, m.amname INTO STRICT found
    FROM pg_class AS c JOIN pg_am AS m ON m.oid = c.relam LEFT JOIN pg_tablespace AS s ON s.oid = c.reltablespace
    WHERE c.oid = original;
    PERFORM set_config('default_tablespace', found.tablespace, true);
    EXECUTE format(
        'CREATE TABLE %s.%I (LIKE %s INCLUDING ALL EXCLUDING INDEXES EXCLUDING STATISTICS) USING %I %s',
        'hindsight', beside, original, found.amname, 'WITH (' || options || ')'
    );
    EXECUTE format('ALTER TABLE %s.%I OWNER TO %I', 'hindsight', beside, found.owner);
END
$body$;


-- Close the store to appends and make the tables that gather an initial import's events. Raises where the store is not
-- empty, or something would not survive the exchange of its tables. Does nothing if this import has been begun.
CREATE OR REPLACE FUNCTION hindsight.begin_initial_v1(wanted_id text) RETURNS void
LANGUAGE plpgsql VOLATILE AS $body$
DECLARE
    meta hindsight.store_meta%ROWTYPE;
    obstacles text;
BEGIN
    IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        RAISE EXCEPTION 'an import begins under READ COMMITTED, not %', upper(current_setting('transaction_isolation'))
            USING ERRCODE = 'HS004';
    END IF;
    -- Waits for the appends that are under way. Those that come later find the store closed, at their end.
    LOCK TABLE hindsight.append_gate IN SHARE MODE;
    SELECT * INTO STRICT meta FROM hindsight.store_meta FOR UPDATE;
    IF EXISTS (SELECT FROM hindsight.initial_import AS i WHERE i.import_id = wanted_id) THEN
        RETURN;
    END IF;
    IF meta.state <> 'open' THEN
        RAISE EXCEPTION 'the store accepts no import: %', meta.state USING ERRCODE = 'HS011';
    END IF;
    IF EXISTS (SELECT FROM hindsight.events) OR EXISTS (SELECT FROM hindsight.stream_heads) THEN
        RAISE EXCEPTION 'an initial import needs an empty store, and this one holds events'
            USING ERRCODE = 'HS013', HINT = 'Import with mode="append", or into another schema.';
    END IF;
    IF EXISTS (SELECT FROM hindsight.projections AS p WHERE p.attached) THEN
        RAISE EXCEPTION 'projections are attached that an initial import would not run: %',
            (SELECT string_agg(p.name, ', ' ORDER BY p.name) FROM hindsight.projections AS p WHERE p.attached)
            USING ERRCODE = 'HS013', HINT = 'Detach them first, or import with mode="append".';
    END IF;
    obstacles := hindsight.initial_obstacles_v1();
    IF obstacles IS NOT NULL THEN
        RAISE EXCEPTION 'an initial import exchanges the tables of the log, which this hinders: %', obstacles
            USING ERRCODE = 'HS013', HINT = 'Drop it, and make it again after the import; or import with mode="append".';
    END IF;
    PERFORM hindsight.create_beside_v1('hindsight.events', 'events_import');
    -- Where its lines stood, in runs of consecutive ones: says which lines a duplicated id came from.
    CREATE TABLE hindsight.events_import_lines (
        transaction_no  bigint    NOT NULL,
        sequence_nos    integer[] NOT NULL, -- where each run begins, in the chunk
        line_nos        bigint[]  NOT NULL  -- and in the source
    );
    INSERT INTO hindsight.imports (import_id, shard, shard_count) VALUES (wanted_id, 0, 1) ON CONFLICT DO NOTHING;
    -- Far above every number that could be drawn before the exchange: a bound that a reader holds until then is lower.
    INSERT INTO hindsight.initial_import (import_id, first_number, next_number)
    SELECT wanted_id, n.number, n.number FROM (SELECT hindsight.checked_next_number_v1() - 1 + 4294967296) AS n (number);
    UPDATE hindsight.store_meta SET generation = generation + 1, state = format(
        'the initial import %L is not finished; run it again to go on, or give it up: hindsight import --abandon %1$L', wanted_id
    );
END
$body$;


-- The indexes of the log's tables, what each is to be called beside them until the exchange, and whether it is there.
CREATE OR REPLACE FUNCTION hindsight.initial_indexes_v1(
    OUT index_id oid, OUT index_name name, OUT table_name name, OUT beside_name text, OUT beside regclass, OUT guards_ids boolean
) RETURNS SETOF record
LANGUAGE sql STABLE AS $body$
    SELECT x.indexrelid, c.relname, t.relname, 'import_' || x.indexrelid,
        to_regclass('hindsight' || '.import_' || x.indexrelid), c.relname = 'events_event_id_key'
    FROM pg_index AS x
    JOIN pg_class AS c ON c.oid = x.indexrelid
    JOIN pg_class AS t ON t.oid = x.indrelid
    WHERE x.indrelid IN ('hindsight.events'::regclass, 'hindsight.stream_heads'::regclass)
    -- The one that can fail comes first.
    ORDER BY c.relname = 'events_event_id_key' DESC, c.relname
$body$;


-- For long statements of this transaction, but not for the one that calls this: they end when their client is gone, where
-- the server's system can tell; and they do not wait for a lock for ever.
CREATE OR REPLACE FUNCTION hindsight.limit_build_v1() RETURNS void
LANGUAGE plpgsql VOLATILE AS $body$
BEGIN
    PERFORM set_config('lock_timeout', '60s', true);
    PERFORM set_config('client_connection_check_interval', '1s', true);
EXCEPTION WHEN invalid_parameter_value THEN
    PERFORM set_config('lock_timeout', '60s', true);
END
$body$;


-- Build one of those indexes as it is defined for the log; nothing where it is there already.
CREATE OR REPLACE FUNCTION hindsight.build_beside_v1(wanted_index oid) RETURNS void
LANGUAGE plpgsql VOLATILE AS $body$
DECLARE
    found record;
    definition text := pg_get_indexdef(wanted_index);
    beginning text;
BEGIN
    -- An importer that was killed may have left a backend behind that builds it still.
    PERFORM pg_advisory_xact_lock(hashtextextended('hindsight_fast: build index ' || wanted_index, 0));
    SELECT i.*, CASE WHEN x.indisunique THEN 'UNIQUE ' ELSE '' END AS uniqueness, coalesce(s.spcname, '') AS tablespace,
        c.relnamespace::regnamespace AS namespace
    INTO STRICT found
    FROM hindsight.initial_indexes_v1() AS i
    JOIN pg_index AS x ON x.indexrelid = i.index_id
    JOIN pg_class AS c ON c.oid = i.index_id LEFT JOIN pg_tablespace AS s ON s.oid = c.reltablespace
    WHERE i.index_id = wanted_index;
    IF found.beside IS NOT NULL THEN
        RETURN;
    END IF;
    beginning := format('CREATE %sINDEX %I ON %s.%I ', found.uniqueness, found.index_name, found.namespace, found.table_name);
    IF NOT starts_with(definition, beginning) THEN
        RAISE EXCEPTION 'index % is defined in words that are not understood', found.index_name;
    END IF;
    PERFORM set_config('default_tablespace', found.tablespace, true);
    -- 256 MB at least: sorting in the default's 64 MB goes through files. What the server allows beyond that stays.
    IF pg_size_bytes(current_setting('maintenance_work_mem')) < 268435456 THEN
        PERFORM set_config('maintenance_work_mem', '256MB', true);
    END IF;
    IF current_setting('max_parallel_maintenance_workers')::integer < 2 THEN
        PERFORM set_config('max_parallel_maintenance_workers', '2', true);
    END IF;
    EXECUTE format('CREATE %sINDEX %I ON %s.%I ', found.uniqueness, found.beside_name, found.namespace, found.table_name || '_import')
        || substr(definition, length(beginning) + 1);
END
$body$;


-- Make the heads of an initial import's streams, and count its events once more; nothing where they are made already.
CREATE OR REPLACE FUNCTION hindsight.fill_heads_beside_v1() RETURNS void
LANGUAGE plpgsql VOLATILE AS $body$
DECLARE
    found record;
    wanted_count bigint := (
        SELECT i.event_count FROM hindsight.imports AS i JOIN hindsight.initial_import AS r USING (import_id) WHERE i.shard = 0
    );
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('hindsight_fast: fill heads ' || 'hindsight.stream_heads'::regclass::oid, 0));
    IF to_regclass('hindsight.stream_heads_import') IS NOT NULL THEN
        RETURN;
    END IF;
    PERFORM hindsight.create_beside_v1('hindsight.stream_heads', 'stream_heads_import');
    WITH heads AS MATERIALIZED (
        SELECT e.stream_id, max(e.stream_version) AS stream_version, count(*) AS event_count
        FROM hindsight.events_import AS e GROUP BY e.stream_id
    ), filled AS (
        INSERT INTO hindsight.stream_heads_import (stream_id, stream_version)
        SELECT h.stream_id, h.stream_version FROM heads AS h
    )
    SELECT coalesce(sum(h.event_count), 0) AS event_count, coalesce(sum(h.stream_version + 1), 0) AS version_count
    INTO STRICT found FROM heads AS h;
    IF found.event_count <> wanted_count OR found.version_count <> wanted_count THEN
        RAISE EXCEPTION 'the import stored % events, but % of % versions are there', wanted_count, found.event_count, found.version_count
            USING ERRCODE = 'HS013', HINT = 'Abandon the import and begin anew; and please report this.';
    END IF;
END
$body$;


-- Let a table have the grants and the comment of the one that it replaces.
CREATE OR REPLACE FUNCTION hindsight.copy_grants_v1(original regclass, beside regclass) RETURNS void
LANGUAGE plpgsql VOLATILE AS $body$
DECLARE
    granted record;
    written_down boolean;
BEGIN
    -- Default privileges may have given it some of its own. NULL stands for what an owner may by nature.
    written_down := (SELECT count(c.relacl) > 0 FROM pg_class AS c WHERE c.oid IN (original, beside));
    FOR granted IN
        SELECT DISTINCT a.grantee FROM pg_class AS c, aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) AS a
        WHERE c.oid = beside AND written_down
    LOOP
        EXECUTE format('REVOKE ALL ON TABLE %s FROM %s', beside,
            CASE granted.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(granted.grantee)) END);
    END LOOP;
    FOR granted IN
        SELECT a.grantee, a.privilege_type || CASE WHEN g.attname IS NULL THEN '' ELSE format(' (%I)', g.attname) END AS privilege, a.is_grantable
        FROM (
            SELECT coalesce(c.relacl, acldefault('r', c.relowner)), NULL::name FROM pg_class AS c
            WHERE c.oid = original AND written_down
            UNION ALL
            SELECT t.attacl, t.attname FROM pg_attribute AS t WHERE t.attrelid = original AND t.attacl IS NOT NULL
        ) AS g (acl, attname), aclexplode(g.acl) AS a
    LOOP
        EXECUTE format('GRANT %s ON TABLE %s TO %s%s', granted.privilege, beside,
            CASE granted.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(granted.grantee)) END,
            CASE WHEN granted.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END);
    END LOOP;
    IF obj_description(original, 'pg_class') IS NOT NULL THEN
        EXECUTE format('COMMENT ON TABLE %s IS %L', beside, obj_description(original, 'pg_class'));
    END IF;
END
$body$;


-- Put an initial import's tables in the places of the empty ones, and open the store. All of it or nothing: the
-- sequence is moved by RESTART, which is undone with its transaction, and not by setval, which is not.
CREATE OR REPLACE FUNCTION hindsight.switch_initial_v1(wanted_id text) RETURNS void
LANGUAGE plpgsql VOLATILE AS $body$
DECLARE
    import hindsight.initial_import%ROWTYPE;
    meta hindsight.store_meta%ROWTYPE;
    here record;
    obstacles text;
    number bigint;
    renamings text[];
    renaming text;
BEGIN
    IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        RAISE EXCEPTION 'an import ends under READ COMMITTED, not %', upper(current_setting('transaction_isolation'))
            USING ERRCODE = 'HS004';
    END IF;
    IF current_setting('synchronous_commit') = 'off' THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
    -- Always in this order. advance_sequence_v1, the only other thing that moves the sequence, begins here too.
    SELECT * INTO STRICT meta FROM hindsight.store_meta FOR UPDATE;
    -- Longer than deadlock_timeout, so that an autovacuum which stands in the way is cancelled.
    PERFORM set_config('lock_timeout', '5s', true);
    LOCK TABLE hindsight.events_import, hindsight.stream_heads_import IN ACCESS EXCLUSIVE MODE;
    -- Shorter than deadlock_timeout: readers queue behind this lock while it waits for those before it.
    PERFORM set_config('lock_timeout', '300ms', true);
    -- Heads first, as appends and reads of a stream do.
    LOCK TABLE hindsight.stream_heads IN ACCESS EXCLUSIVE MODE;
    LOCK TABLE hindsight.events IN ACCESS EXCLUSIVE MODE;
    SELECT * INTO import FROM hindsight.initial_import AS i WHERE i.import_id = wanted_id;
    IF NOT FOUND OR NOT import.loaded OR EXISTS (SELECT FROM hindsight.initial_indexes_v1() AS i WHERE i.beside IS NULL) THEN
        RAISE EXCEPTION 'the initial import % is not ready to be switched in', quote_literal(wanted_id)
            USING ERRCODE = 'HS013', HINT = 'Run it again.';
    END IF;
    IF EXISTS (SELECT FROM hindsight.events) OR EXISTS (SELECT FROM hindsight.stream_heads) THEN
        RAISE EXCEPTION 'the store is no longer empty; somebody has written past its rules'
            USING ERRCODE = 'HS013', HINT = 'Abandon the import.';
    END IF;
    obstacles := hindsight.initial_obstacles_v1();
    IF obstacles IS NOT NULL THEN
        RAISE EXCEPTION 'all is loaded, but this hinders the exchange of the tables: %', obstacles
            USING ERRCODE = 'HS013', HINT = 'Drop it, run the import again, then make it again.';
    END IF;
    SELECT * INTO here FROM hindsight.server_identity_v1();
    -- Registered as every append is: readers take no bound beyond this number before all is visible.
    number := hindsight.draw_number_v1();
    IF number >= import.first_number OR here.system_identifier <> meta.system_identifier OR here.timeline <> meta.timeline THEN
        RAISE EXCEPTION 'the store was moved to another server, or its sequence moved on, while the initial import % ran', quote_literal(wanted_id)
            USING ERRCODE = 'HS013', HINT = 'Abandon the import and begin anew.';
    END IF;
    IF import.next_number > import.first_number THEN
        EXECUTE format('ALTER SEQUENCE %s RESTART WITH %s', 'hindsight.transaction_no'::regclass, import.next_number - 1);
        -- Draws it, as a sequence without a last value is none that anybody can read.
        PERFORM nextval('hindsight.transaction_no'::regclass);
    END IF;
    PERFORM hindsight.copy_grants_v1('hindsight.events', 'hindsight.events_import');
    PERFORM hindsight.copy_grants_v1('hindsight.stream_heads', 'hindsight.stream_heads_import');
    renamings := (
        SELECT array_agg(
            CASE WHEN k.oid IS NULL THEN format('ALTER INDEX %s.%I RENAME TO %I', 'hindsight', i.beside_name, i.index_name)
            ELSE format('ALTER TABLE %s.%I ADD CONSTRAINT %I %s USING INDEX %I', 'hindsight', i.table_name, k.conname,
                CASE k.contype WHEN 'p' THEN 'PRIMARY KEY' ELSE 'UNIQUE' END, i.beside_name)
            END
        )
        FROM hindsight.initial_indexes_v1() AS i
        LEFT JOIN pg_constraint AS k ON k.conindid = i.index_id AND k.contype IN ('p', 'u')
    );
    DROP TABLE hindsight.events, hindsight.stream_heads, hindsight.events_import_lines;
    ALTER TABLE hindsight.events_import RENAME TO events;
    ALTER TABLE hindsight.stream_heads_import RENAME TO stream_heads;
    FOREACH renaming IN ARRAY renamings LOOP
        EXECUTE renaming;
    END LOOP;
    UPDATE hindsight.imports SET finished = true, updated_at = clock_timestamp() WHERE import_id = wanted_id;
    DELETE FROM hindsight.initial_import;
    UPDATE hindsight.store_meta SET state = 'open', generation = generation + 1;
END
$body$;


-- Give an initial import up: the tables beside the log go, its checkpoint too, and the store is open again and empty.
CREATE OR REPLACE FUNCTION hindsight.drop_initial_v1(wanted_id text) RETURNS void
LANGUAGE plpgsql VOLATILE AS $body$
BEGIN
    PERFORM FROM hindsight.store_meta FOR UPDATE;
    DELETE FROM hindsight.initial_import AS i WHERE i.import_id = wanted_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no initial import % is under way', quote_literal(wanted_id) USING ERRCODE = 'HS013';
    END IF;
    DROP TABLE IF EXISTS hindsight.events_import, hindsight.stream_heads_import, hindsight.events_import_lines;
    DELETE FROM hindsight.imports AS i WHERE i.import_id = wanted_id;
    UPDATE hindsight.store_meta SET state = 'open', generation = generation + 1;
END
$body$;


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
-- sequence lags behind the events (a restore without it). Forward only, and the only thing that moves it: two unlocked
-- repairs at once put it back, and an event was lost. Returns the last number, or NULL where nothing had to be done.
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
    IF last_number >= last_event AND here.system_identifier = meta.system_identifier AND here.timeline = meta.timeline THEN
        RETURN NULL;
    END IF;
    UPDATE hindsight.store_meta SET system_identifier = here.system_identifier, timeline = here.timeline;
    -- 2^32: more than could have been drawn by a server that this one knows nothing of.
    RETURN setval('hindsight.transaction_no'::regclass, greatest(last_number, last_event) + 4294967296);
END
$body$;

COMMIT;
