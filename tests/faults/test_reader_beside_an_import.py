"""A reader that follows the log beside a running import lacks at most the chunk in flight, and nothing in the end."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import psycopg
import pytest

from hindsight_fast import EventStore
from hindsight_fast.importer import CHUNK_SECONDS
from initial_imports import wait_until
from killed_imports import ImportProcess, Source, write_source
from log_follower import POLL_S, SLACK_S, LogFollower, lags_of, missing_of

EVENT_COUNT = 200_000 if os.environ.get("HINDSIGHT_SOAK") else 40_000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return write_source(tmp_path_factory.mktemp("source"), EVENT_COUNT, compressed=False, with_bad_lines=False)


ATTEMPTS = 4


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_reader_is_never_more_than_the_chunk_in_flight_behind(database: str, source: Source, jobs: int) -> None:
    """Skipped may nothing be in any attempt; how close it follows, a machine that stands still may spoil in some."""
    assert any(follows_closely(database, source, jobs) for _ in range(ATTEMPTS))


def follows_closely(database: str, source: Source, jobs: int) -> bool:
    options = {"jobs": jobs, "chunk_size": 500}
    if jobs == 1:
        # Else the reader is chunks behind just for its own work. (Several jobs are to overtake each other.)
        options["max_rate"] = 20_000
    follower, process = follow_an_import(database, source.path, options)
    told = [each for each in process.told if each.phase == "lines"]
    assert len(told) >= EVENT_COUNT / 500
    # What one job has committed stands below its next chunk: nothing holds it up. Of several jobs one may have drawn a
    # lower number and be sending still, for as long as a chunk takes.
    patience_s = 0.0 if jobs == 1 else told[-1].longest_chunk_s + SLACK_S
    assert missing_of(told, follower.reads, patience_s) == []
    lags = lags_of(told, follower.reads)
    print(
        f"jobs={jobs}: {len(told)} chunks, the longest of {told[-1].longest_chunk_s:.3f} s;"
        f" lag {median(lags):.3f} s, the longest {max(lags):.3f} s; {len(follower.reads)} reads"
    )
    # It did follow, and was not just there in the end.
    followed = len({read.event_count for read in follower.reads}) >= 6
    return followed and median(lags) < CHUNK_SECONDS + POLL_S + 0.05


def test_readers_see_nothing_of_an_initial_import_and_then_all_of_it(database: str, source: Source) -> None:
    options = {"mode": "initial", "chunk_size": EVENT_COUNT // 8}
    follower, process = follow_an_import(database, source.path, options, stop_at=EVENT_COUNT // 4)
    done = process.told[-1]
    assert {read.event_count for read in follower.reads} == {0, EVENT_COUNT}
    assert missing_of([done], follower.reads, 0.0) == []


def follow_an_import(
    database: str, source: Path, options: Mapping[str, object], *, stop_at: int | None = None
) -> tuple[LogFollower, ImportProcess]:
    """Import with a reader beside it, which must end up with all that the table holds, in its order.

    Behind *stop_at* events the import stands still until the reader has looked at the log ten times more.
    """
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("DROP SCHEMA IF EXISTS hindsight CASCADE")
    with EventStore(database) as store:
        store.create_schema()
    aim = None if stop_at is None else ("lines", stop_at)
    with (
        LogFollower(database) as follower,
        ImportProcess(database, source, {"import_id": "a", **options}, aim=aim) as process,
    ):
        if aim is not None:
            process.wait_until_there()
            seen = len(follower.reads)
            wait_until(lambda: len(follower.reads) >= seen + 10)
        assert process.wait() == 0, process.errors
        follower.finish()
    with psycopg.connect(database) as connection:
        stored = connection.execute(
            "SELECT event_id FROM hindsight.events ORDER BY transaction_no, sequence_no"
        ).fetchall()
    assert len(follower.events) == len(stored) == EVENT_COUNT
    assert [(event_id,) for _, event_id in follower.events] == stored
    assert follower.interruptions == 0
    return follower, process
