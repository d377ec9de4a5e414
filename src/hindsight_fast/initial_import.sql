-- The functions of an initial import; schema.sql reads them in, between its own.
--
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


-- For long statements of this transaction, but not for the one that calls this: no timeout of the role's ends them; they
-- end when their client is gone, where the server's system can tell; and they do not wait for a lock for ever.
CREATE OR REPLACE FUNCTION hindsight.limit_build_v1() RETURNS void
LANGUAGE plpgsql VOLATILE AS $body$
BEGIN
    PERFORM set_config('lock_timeout', '60s', true);
    PERFORM set_config('statement_timeout', '0', true);
    IF current_setting('transaction_timeout', true) IS NOT NULL THEN -- PostgreSQL 17
        PERFORM set_config('transaction_timeout', '0', true);
    END IF;
    BEGIN
        PERFORM set_config('client_connection_check_interval', '1s', true);
    EXCEPTION WHEN invalid_parameter_value THEN
        NULL;
    END;
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
    -- Registered as every append is: readers take no bound beyond this number before all is visible. (These locks hold
    -- them up besides: none can look at the events, or at the sequence, between the two.)
    number := hindsight.draw_number_v1();
    IF number >= import.first_number OR NOT hindsight.same_server_v1() THEN
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
