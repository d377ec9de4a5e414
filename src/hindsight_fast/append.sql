-- Appends in one call; schema.sql reads this in, between its own functions.
--
-- A group is one or more requests that share a transaction and its flush. Each is accepted or refused by itself, as if
-- they had come one after the other.


-- What every append begins with. *patience* bounds each wait for a lock, *most_idle* the time that a transaction of the
-- caller's own may then stand still; empty, they stay as they are. Always true: whatever is called by assignment costs
-- plpgsql a tenth of a PERFORM, which runs a query of its own.
CREATE OR REPLACE FUNCTION hindsight.begin_append_v1(patience text, most_idle text) RETURNS boolean
LANGUAGE plpgsql VOLATILE AS $body$
DECLARE
    idle     interval;
    setting  text;
BEGIN
    IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        RAISE EXCEPTION 'appends run under READ COMMITTED, not %', upper(current_setting('transaction_isolation'))
            USING ERRCODE = 'HS004';
    END IF;
    IF current_setting('synchronous_commit') = 'off' THEN
        -- An acknowledged event is on disk.
        setting := set_config('synchronous_commit', 'on', true);
    END IF;
    IF patience <> '' THEN
        setting := set_config('lock_timeout', patience, true);
    END IF;
    IF most_idle <> '' THEN
        idle := current_setting('idle_in_transaction_session_timeout')::interval;
        IF idle = interval '0' OR idle > most_idle::interval THEN
            setting := set_config('idle_in_transaction_session_timeout', most_idle, true);
        END IF;
    END IF;
    RETURN true;
END
$body$;


-- Requests one after the other, against the versions that their streams had before the group: which are accepted (outcome
-- 0), refused (1) or known (2), how many events of those not accepted stand before it, and what each write found. Heads are put back where less was accepted than they were
-- advanced by; they are locked since then, so in any order.
CREATE OR REPLACE FUNCTION hindsight.replay_requests_v1(
    stream_ids uuid[], event_counts bigint[], head_versions bigint[],
    write_requests integer[], write_streams integer[], write_counts bigint[],
    least_versions bigint[], most_versions bigint[], known_requests integer[],
    OUT outcomes bigint[], OUT skipped_before bigint[], OUT found_versions bigint[]
)
LANGUAGE plpgsql VOLATILE AS $body$
DECLARE
    versions bigint[] := ARRAY(
        SELECT s.head - s.events FROM unnest(head_versions, event_counts) WITH ORDINALITY AS s (head, events, place)
        ORDER BY s.place
    );
    write    integer := 1;
    first    integer;
    request  integer;
    found    bigint;
    events   bigint;
    skipped  bigint := 0;
    all_hold boolean;
BEGIN
    WHILE write <= cardinality(write_requests) LOOP
        request := write_requests[write];
        first := write;
        all_hold := true;
        events := 0;
        WHILE write_requests[write] = request LOOP
            found := versions[write_streams[write]];
            found_versions[write] := found;
            events := events + write_counts[write];
            all_hold := all_hold AND coalesce(found BETWEEN least_versions[write] AND most_versions[write], true);
            write := write + 1;
        END LOOP;
        IF request = ANY (known_requests) THEN
            outcomes[request] := 2;
        ELSIF NOT all_hold THEN
            outcomes[request] := 1;
        ELSE
            outcomes[request] := 0;
            FOR accepted IN first .. write - 1 LOOP
                versions[write_streams[accepted]] := versions[write_streams[accepted]] + write_counts[accepted];
            END LOOP;
            events := 0;
        END IF;
        skipped_before[request] := skipped;
        skipped := skipped + events;
    END LOOP;
    UPDATE hindsight.stream_heads AS h SET stream_version = s.version
    FROM unnest(stream_ids, versions, head_versions) AS s (stream_id, version, head)
    WHERE h.stream_id = s.stream_id AND s.version < s.head AND s.version >= 0;
    DELETE FROM hindsight.stream_heads AS h USING unnest(stream_ids, versions) AS s (stream_id, version)
    WHERE h.stream_id = s.stream_id AND s.version < 0;
END
$body$;


-- Append a group, in one call.
--
-- Streams: the distinct ones in byte order, and how many events they take if every request is accepted. Writes, one for
-- each stream of each request, those of one request together: which request, which stream (both from 1), how many
-- events, how far the version that it then finds lies below the advanced head, and between which versions it expects
-- that to be (-1: a stream without events); where it expects the last event at a cursor, that stands beside. Events:
-- which write (from 1), which of its events (from 0), and the rest of their row.
--
-- Returns the number (-1 if no event was written) and the advanced heads. That is all if every request was accepted, as
-- is usual; otherwise there follow an outcome for each request (0 accepted, 1 not as expected, 2 not written because one
-- of its ids is known), the version that each write found, and for each that found what it had not expected three
-- numbers: which write, and the cursor of the stream's last event (-1, -1: none). One array, because a scalar function
-- is called at a third of the price of one that returns a row.
CREATE OR REPLACE FUNCTION hindsight.append_v1(
    writer_layout integer, writer_generation bigint, patience text, most_idle text, look_up boolean,
    stream_ids uuid[], event_counts bigint[],
    write_requests integer[], write_streams integer[], write_counts bigint[], write_offsets bigint[],
    least_versions bigint[], most_versions bigint[], expected_transaction_nos bigint[], expected_sequence_nos integer[],
    event_writes integer[], event_nths integer[], event_ids uuid[], correlation_ids uuid[], created_ats timestamptz[],
    event_names text[], event_versions integer[], payloads json[], metadatas json[]
) RETURNS bigint[]
LANGUAGE plpgsql VOLATILE
-- A generic plan made while the tables were empty would scan them for ever: 21 ms an append instead of 0.8.
SET enable_seqscan = off SET jit = off AS $body$
DECLARE
    done           boolean := hindsight.begin_append_v1(patience, most_idle);
    head_versions  bigint[] := hindsight.advance_heads_v1(stream_ids, event_counts);
    known_requests integer[] := '{}';
    all_hold       boolean := true;
    number         bigint := -1;
    outcomes       bigint[];
    skipped_before bigint[];
    found_versions bigint[];
    mismatches     bigint[];
    started_at     timestamptz;
BEGIN
    IF look_up THEN
        -- After all locks: an earlier try of the same request is settled by now. Before any expectation is judged: that
        -- try may have changed what it had expected.
        known_requests := ARRAY(
            SELECT DISTINCT write_requests[given.write]
            FROM unnest(event_ids, event_writes) AS given (event_id, write)
            WHERE EXISTS (SELECT FROM hindsight.events AS e WHERE e.event_id = given.event_id)
        );
        all_hold := known_requests = '{}';
    END IF;
    IF expected_transaction_nos IS NOT NULL THEN
        -- The event at a cursor has one stream and one version there: expect that version, or one that no stream has.
        SELECT array_agg(CASE WHEN w.number IS NULL THEN w.least ELSE coalesce(e.stream_version, -2) END ORDER BY w.write),
            array_agg(CASE WHEN w.number IS NULL THEN w.most ELSE coalesce(e.stream_version, -2) END ORDER BY w.write)
        INTO least_versions, most_versions
        FROM unnest(write_streams, least_versions, most_versions, expected_transaction_nos, expected_sequence_nos)
            WITH ORDINALITY AS w (stream, least, most, number, sequence_no, write)
        LEFT JOIN hindsight.events AS e ON e.transaction_no = w.number AND e.sequence_no = w.sequence_no
            AND e.stream_id = stream_ids[w.stream];
    END IF;
    IF all_hold AND least_versions IS NOT NULL THEN
        SELECT bool_and(head_versions[w.stream] - w.below BETWEEN w.least AND w.most) INTO all_hold
        FROM unnest(write_streams, write_offsets, least_versions, most_versions) AS w (stream, below, least, most);
    END IF;
    IF NOT all_hold THEN
        SELECT r.outcomes, r.skipped_before, r.found_versions INTO outcomes, skipped_before, found_versions
        FROM hindsight.replay_requests_v1(
            stream_ids, event_counts, head_versions, write_requests, write_streams, write_counts, least_versions,
            most_versions, known_requests
        ) AS r;
    ELSIF 0 = ANY (event_counts) THEN
        -- A stream that was only looked at is not created. (Until here its row kept others from creating it.)
        DELETE FROM hindsight.stream_heads AS h WHERE h.stream_id = ANY (stream_ids) AND h.stream_version < 0;
    END IF;
    IF cardinality(event_ids) > 0 AND (all_hold OR 0 = ANY (outcomes)) THEN
        number := hindsight.draw_number_v1();
        started_at := clock_timestamp();
        INSERT INTO hindsight.events (
            transaction_no, sequence_no, event_id, stream_id, stream_version, correlation_id, created_at, event_name,
            event_version, payload, metadata
        )
        SELECT number, e.place - 1 - CASE WHEN all_hold THEN 0 ELSE skipped_before[write_requests[e.write]] END,
            e.event_id, stream_ids[write_streams[e.write]],
            CASE WHEN all_hold THEN head_versions[write_streams[e.write]] - write_offsets[e.write]
                ELSE found_versions[e.write] END + 1 + e.nth,
            e.correlation_id, coalesce(e.created_at, started_at), e.event_name, e.event_version, e.payload, e.metadata
        FROM unnest(
            event_writes, event_nths, event_ids, correlation_ids, created_ats, event_names, event_versions, payloads,
            metadatas
        ) WITH ORDINALITY AS e (
            write, nth, event_id, correlation_id, created_at, event_name, event_version, payload, metadata, place
        )
        WHERE all_hold OR outcomes[write_requests[e.write]] = 0;
    END IF;
    -- After all locks, in a snapshot of its own: what was committed while this append waited for them counts too.
    done := hindsight.check_writable_v1(writer_layout, writer_generation);
    IF all_hold THEN
        RETURN number || head_versions;
    END IF;
    -- Where the streams end that were refused. Behind the insert: a request before it may have moved them.
    SELECT array_agg(m.value ORDER BY w.write, m.place) INTO mismatches
    FROM unnest(write_requests, write_streams, found_versions, least_versions, most_versions)
        WITH ORDINALITY AS w (request, stream, found, least, most, write)
    LEFT JOIN hindsight.events AS e ON e.stream_id = stream_ids[w.stream] AND e.stream_version = w.found
    CROSS JOIN LATERAL unnest(ARRAY[w.write, coalesce(e.transaction_no, -1), coalesce(e.sequence_no, -1)])
        WITH ORDINALITY AS m (value, place)
    WHERE outcomes[w.request] = 1 AND w.found NOT BETWEEN w.least AND w.most;
    RETURN number || head_versions || outcomes || found_versions || mismatches;
END
$body$;


-- The same for what is asked most often: one request of one event, without a look-up or a cursor. Three statements
-- instead of seven over arrays; it answers as append_v1 does.
CREATE OR REPLACE FUNCTION hindsight.append_one_v1(
    writer_layout integer, writer_generation bigint, patience text, most_idle text,
    stream uuid, least_version bigint, most_version bigint,
    id uuid, correlation uuid, given_time timestamptz, name text, version integer, data json, more json
) RETURNS bigint[]
LANGUAGE plpgsql VOLATILE
SET enable_seqscan = off SET jit = off AS $body$
DECLARE
    done    boolean := hindsight.begin_append_v1(patience, most_idle);
    head    bigint;
    number  bigint;
    last    record;
BEGIN
    LOCK TABLE hindsight.append_gate IN ROW EXCLUSIVE MODE;
    INSERT INTO hindsight.stream_heads AS h (stream_id, stream_version) VALUES (stream, 0)
    ON CONFLICT (stream_id) DO UPDATE SET stream_version = h.stream_version + 1
    RETURNING h.stream_version INTO head;
    IF head - 1 BETWEEN least_version AND most_version THEN
        number := hindsight.draw_number_v1();
        INSERT INTO hindsight.events (
            transaction_no, sequence_no, event_id, stream_id, stream_version, correlation_id, created_at, event_name,
            event_version, payload, metadata
        ) VALUES (
            number, 0, id, stream, head, correlation, coalesce(given_time, clock_timestamp()), name, version, data, more
        );
        done := hindsight.check_writable_v1(writer_layout, writer_generation);
        RETURN ARRAY[number, head];
    END IF;
    IF head = 0 THEN
        DELETE FROM hindsight.stream_heads AS h WHERE h.stream_id = stream;
    ELSE
        UPDATE hindsight.stream_heads AS h SET stream_version = head - 1 WHERE h.stream_id = stream;
    END IF;
    SELECT e.transaction_no, e.sequence_no INTO last FROM hindsight.events AS e
    WHERE e.stream_id = stream AND e.stream_version = head - 1;
    done := hindsight.check_writable_v1(writer_layout, writer_generation);
    RETURN ARRAY[-1, head, 1, head - 1, 1, coalesce(last.transaction_no, -1), coalesce(last.sequence_no, -1)];
END
$body$;
