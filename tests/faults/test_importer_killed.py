"""One import, its importer killed twenty times and its server three times: the result equals the undisturbed one.

In every mode, at random points of its whole course, with a reader that follows the log beside it. A short form (four
kills of the importer, one of the server) runs with the other tests; HINDSIGHT_SOAK makes it the full one, with a seed
for every three minutes. HINDSIGHT_KILL_SEED repeats the points that a failure names.
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from conftest import TEST_SETTINGS, root_for_servers
from hindsight_fast import EventStore, HindsightError
from hindsight_fast.embedded import EmbeddedServer
from hindsight_fast.installations import Installation
from initial_imports import catalog
from killed_imports import LEASH_CHUNKS, ImportProcess, Mode, Outcome, Source, Told, outcome_of, write_source
from log_follower import SLACK_S, LogFollower, Read, missing_of

ATTEMPTS = 4
SOAK_MINUTES = int(os.environ.get("HINDSIGHT_SOAK") or 0)
IMPORTER_KILLS, SERVER_KILLS = (20, 3) if SOAK_MINUTES else (4, 1)
# Of an initial import more in a soak: building its indexes then takes long enough to be hit at any point.
EVENT_COUNT, INITIAL_COUNT = (20_000, 200_000) if SOAK_MINUTES else (6_000, 6_000)
INITIAL = {"mode": "initial", "chunk_size": INITIAL_COUNT // 50}

MODES = (
    Mode("append", EVENT_COUNT, {"chunk_size": 200}),
    Mode("append with bad lines", EVENT_COUNT, {"chunk_size": 200}, with_bad_lines=True),
    Mode("jobs", EVENT_COUNT, {"jobs": 3, "chunk_size": 100}),
    Mode("jobs with bad lines", EVENT_COUNT, {"jobs": 3, "chunk_size": 100}, with_bad_lines=True, compressed=True),
    Mode("initial", INITIAL_COUNT, INITIAL),
    Mode("initial with bad lines", INITIAL_COUNT, INITIAL, with_bad_lines=True, compressed=True),
)
# The short form takes each kind of import once: with bad lines whatever happens without them happens too.
every_mode = pytest.mark.parametrize(
    "mode", MODES if SOAK_MINUTES else MODES[1::2], ids=lambda mode: mode.name.replace(" ", "-")
)


@dataclass(frozen=True)
class Course:
    """An import that nobody disturbed: what came of it, and how long its parts took."""

    outcome: Outcome
    opening_s: float  # until the first chunk was stored
    chunk_s: float
    build_s: float
    switch_s: float


@dataclass(frozen=True)
class Kill:
    """Whom to kill, so long after the import has come to a phase and to so many stored events."""

    victim: Literal["importer", "server"]
    phase: str
    events: int
    pause_s: float
    may_be_late: bool = False


def seeds() -> list[int]:
    if given := os.environ.get("HINDSIGHT_KILL_SEED"):
        return [int(given)]
    return [random.SystemRandom().randrange(10**6) for _ in range(max(SOAK_MINUTES // 3, 1))]


def planned_kills(chance: random.Random, mode: Mode, course: Course) -> list[Kill]:
    """Draw points of the import's whole course, in its order, a fifth of them just behind the start of a process.

    The one at the very end, beyond the wanted number, may find the import finished.
    """
    victims: list[Literal["importer", "server"]] = ["importer"] * IMPORTER_KILLS + ["server"] * SERVER_KILLS
    chance.shuffle(victims)
    # Where a process that has come there, and stands still a few chunks on, cannot be at the end.
    most_events = mode.event_count
    if not mode.is_initial:
        most_events -= (LEASH_CHUNKS + 2 * mode.jobs + 1) * mode.chunk_size
    build_count = max(len(victims) * 2 // 5, 1) if mode.is_initial else 0
    places = sorted(chance.randrange(most_events) for _ in victims[build_count:])
    kills = []
    for n, victim in enumerate(victims):
        in_build = n >= len(places)
        if chance.random() < 0.2:
            kills.append(Kill(victim, "lines", 0, chance.uniform(0, 1.5 * course.opening_s)))
        elif in_build:
            # Shorter than the whole: what was built before a kill is there, and is not built again.
            kills.append(Kill(victim, "indexes", 0, chance.uniform(0, course.build_s / 2)))
        else:
            kills.append(Kill(victim, "lines", places[n], chance.uniform(0, 3 * course.chunk_s)))
    last = chance.choice(victims)
    if mode.is_initial:
        kills.append(Kill(last, "switch", 0, chance.uniform(0, 1.5 * course.switch_s), may_be_late=True))
    else:
        nearly_all = mode.event_count - mode.chunk_size
        kills.append(Kill(last, "lines", nearly_all, chance.uniform(0, course.chunk_s), may_be_late=True))
    return kills


class Room:
    """A server that may be killed, and a source in each mode."""

    def __init__(self, server: EmbeddedServer, folder: Path) -> None:
        self.server = server
        self._folder = folder
        self._sources: dict[tuple[int, bool, bool], Source] = {}
        self._courses: dict[str, Course] = {}

    def source(self, mode: Mode) -> Source:
        kind = (mode.event_count, mode.compressed, mode.with_bad_lines)
        if kind not in self._sources:
            folder = self._folder / "-".join(map(str, kind))
            folder.mkdir()
            self._sources[kind] = write_source(
                folder, mode.event_count, compressed=mode.compressed, with_bad_lines=mode.with_bad_lines
            )
        return self._sources[kind]

    def make_store(self, mode: Mode) -> str:
        """Make an empty store in a database of its own."""
        name = f"killed_{secrets.token_hex(8)}"
        with psycopg.connect(self.server.conninfo, autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE {name} TEMPLATE template0".encode())
        conninfo = self.server.conninfo_for(name)
        with EventStore(conninfo) as store, store.pool.connection() as connection:
            store.create_schema()
            connection.execute("ALTER TABLE hindsight.events ADD CHECK (event_name <> 'forbidden')")
        return conninfo

    def copy_of(self, conninfo: str) -> str:
        """Copy a database that nobody is connected to, and what was rejected on the way into it."""
        copied = self.server.conninfo_for(f"killed_{secrets.token_hex(8)}")
        name, original = (conninfo_to_dict(each)["dbname"] for each in (copied, conninfo))
        with psycopg.connect(self.server.conninfo, autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE {name} TEMPLATE {original}".encode())
        for path in self._folder.glob(f"{original}.rejects*"):
            shutil.copy(path, self._folder / path.name.replace(str(original), str(name)))
        return copied

    def rejects(self, mode: Mode, conninfo: str) -> Path | None:
        name = conninfo_to_dict(conninfo)["dbname"]
        return self._folder / f"{name}.rejects" if mode.with_bad_lines else None

    def process(self, mode: Mode, conninfo: str, aim: tuple[str, int] | None = None) -> ImportProcess:
        options = {"import_id": "a", **mode.options}
        if (rejects := self.rejects(mode, conninfo)) is not None:
            options["on_error"] = str(rejects)
        return ImportProcess(conninfo, self.source(mode).path, options, aim=aim)

    def undisturbed(self, mode: Mode) -> Course:
        if mode.name not in self._courses:
            conninfo, began_s = self.make_store(mode), time.time()
            with psycopg.connect(conninfo, autocommit=True) as connection:
                tables_before = catalog(connection)
            with self.process(mode, conninfo) as process:
                assert process.wait() == 0, process.errors
            outcome = outcome_of(conninfo, mode, self.rejects(mode, conninfo), began_s)
            source = self.source(mode)
            assert (outcome.catalog, outcome.state) == (tables_before, [("open", 0)])
            assert len(outcome.events) == mode.event_count
            assert [line for *_, line in outcome.rejects] == list(source.bad_lines)
            self._courses[mode.name] = _course(outcome, process.told)
        return self._courses[mode.name]


def _course(outcome: Outcome, told: list[Told]) -> Course:
    def times(phase: str) -> list[float]:
        return [each.at_s for each in told if each.phase == phase]

    (begun,), chunks, (done,) = times("begun"), times("lines"), times("done")
    build, switch = (times(phase) or [done] for phase in ("indexes", "switch"))
    return Course(
        outcome,
        opening_s=chunks[0] - begun,
        chunk_s=(chunks[-1] - chunks[0]) / (len(chunks) - 1),
        build_s=switch[0] - build[0],
        switch_s=done - switch[0],
    )


@pytest.fixture(scope="module")
def room(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    with EmbeddedServer(installation=installation, settings=TEST_SETTINGS, temporary_root=root_for_servers()) as server:
        yield Room(server, tmp_path_factory.mktemp("killed"))


@pytest.mark.essential
@every_mode
def test_killing_importer_and_server_anywhere_changes_nothing(room: Room, mode: Mode) -> None:
    course = room.undisturbed(mode)
    for seed in seeds():
        # Now and then a process that is killed just after its start, late in the import, ends it first.
        assert any(check_killed(room, mode, course, seed, attempt) for attempt in range(ATTEMPTS)), "all was over early"


def check_killed(room: Room, mode: Mode, course: Course, seed: int, attempt: int) -> bool:
    """Kill one import where *seed* leads to, and compare; False if it was over before all kills had been made."""
    print(f"{mode.name}: to repeat, HINDSIGHT_KILL_SEED={seed}")  # shown by pytest when something fails below
    began_s = time.time()
    conninfo = room.make_store(mode)
    told: list[Told] = []
    landed: list[str] = []
    over_early = False
    with LogFollower(conninfo) as follower:
        for kill in planned_kills(random.Random(f"{seed}.{attempt}"), mode, course):
            with room.process(mode, conninfo, aim=(kill.phase, kill.events)) as process:
                process.wait_until_there()
                time.sleep(kill.pause_s)  # anywhere: opening, locking, copying, committing, building
                if kill.victim == "importer":
                    status, in_time = process.kill(), -signal.SIGKILL
                else:
                    room.server.kill()
                    status, in_time = process.wait(), 1
                    room.server.start()
            told += process.told
            is_late = process.told[-1].phase == "done"
            assert status == in_time or is_late, f"{kill}: ended with {status}: {process.errors}"
            if kill.victim == "server" and not is_late:
                assert re.search(r"^psycopg\S*: ", process.errors, re.M), process.errors
            where = process.told[-1]
            landed.append(f"{'SERVER ' * (kill.victim == 'server')}{where.phase} {where.events}{' (late)' * is_late}")
            if is_late:
                over_early = not kill.may_be_late
                break
        with room.process(mode, conninfo) as process:
            assert process.wait() == 0, process.errors
        told += process.told
        follower.finish()
    found = outcome_of(conninfo, mode, room.rejects(mode, conninfo), began_s)
    assert (difference := found.difference_from(course.outcome)) is None, difference
    check_reader(follower, conninfo)
    # What one job has committed stands below its next chunk: nothing holds a reader up. Of several jobs one may have
    # drawn a lower number and be sending still, for as long as a chunk takes.
    patience_s = 0.0 if mode.jobs == 1 else max(each.longest_chunk_s for each in told) + SLACK_S
    visible = [each for each in told if each.phase == "done" or (each.phase == "lines" and not mode.is_initial)]
    assert (missing := missing_of(visible, follower.reads, patience_s)) == [], missing
    took_s = time.time() - began_s
    print(f"{took_s:.1f} s, {len(follower.reads)} reads beside; killed at {', '.join(landed)}")
    return not over_early


def check_reader(follower: LogFollower, conninfo: str) -> None:
    """What it was given is what the table holds, in that order; all but the event that was added to try the store."""
    with psycopg.connect(conninfo) as connection:
        stored = connection.execute(
            "SELECT event_id FROM hindsight.events ORDER BY transaction_no, sequence_no"
        ).fetchall()
    assert len(follower.events) == len(stored) - 1
    assert [(event_id,) for _, event_id in follower.events] == stored[:-1]


def drop_last_reject(path: Path) -> None:
    for each in (path, path.with_name(path.name + ".reasons")):
        each.write_bytes(b"".join(each.read_bytes().splitlines(keepends=True)[:-1]))


def double_last_reject(path: Path) -> None:
    reasons = path.with_name(path.name + ".reasons")
    last = path.read_bytes().splitlines(keepends=True)[-1]
    reason = json.loads(reasons.read_bytes().splitlines()[-1])
    reason["end"] += len(last)
    path.write_bytes(path.read_bytes() + last)
    reasons.write_bytes(reasons.read_bytes() + json.dumps(reason).encode() + b"\n")


LAST_CHUNK = "transaction_no = (SELECT max(transaction_no) FROM hindsight.events)"
DAMAGES: dict[str, tuple[str | Callable[[Path], None], str]] = {
    "another id": (f"UPDATE hindsight.events SET event_id = gen_random_uuid() WHERE {LAST_CHUNK}", "events: "),
    "another time": ("UPDATE hindsight.events SET created_at = '2001-01-01Z' WHERE sequence_no = 7", "events: "),
    "other bytes": ("""UPDATE hindsight.events SET payload = '{"n":  1}' WHERE sequence_no = 9""", "events: "),
    "a lost chunk": (f"DELETE FROM hindsight.events WHERE {LAST_CHUNK}", "contradicts itself"),
    "a head too high": ("UPDATE hindsight.stream_heads SET stream_version = stream_version + 1", "contradicts itself"),
    "a stream too many": ("INSERT INTO hindsight.stream_heads VALUES (gen_random_uuid(), 0)", "contradicts itself"),
    "chunks the other way round": (
        f"UPDATE hindsight.events SET transaction_no = 1000000 WHERE {LAST_CHUNK.replace('max', 'min')}",
        "contradicts itself",
    ),
    "another checkpoint": ("UPDATE hindsight.imports SET byte_offset = 0", "imports: "),
    "not finished": ("UPDATE hindsight.imports SET finished = false", "imports: "),
    "a side table left over": ("CREATE TABLE hindsight.events_import ()", "catalog: "),
    "an index missing": ("DROP INDEX hindsight.events_correlation_idx", "catalog: "),
    "a store left closed": ("UPDATE hindsight.store_meta SET state = 'closed'", "contradicts itself"),
    "a bad line lost": (drop_last_reject, "rejects: "),
    "a bad line doubled": (double_last_reject, "rejects: "),
}


def test_the_check_sees_every_damage(room: Room) -> None:
    """The comparison is worth what it notices."""
    mode = MODES[1]
    expected = room.undisturbed(mode).outcome
    began_s = time.time()
    imported = room.make_store(mode)
    with room.process(mode, imported) as process:
        assert process.wait() == 0, process.errors
    seen = {}
    for name, (damage, _) in DAMAGES.items():
        damaged = room.copy_of(imported)
        rejects = room.rejects(mode, damaged)
        if isinstance(damage, str):
            with psycopg.connect(damaged, autocommit=True) as connection:
                connection.execute(damage.encode())
        else:
            assert rejects is not None
            damage(rejects)
        try:
            seen[name] = str(outcome_of(damaged, mode, rejects, began_s).difference_from(expected))
        except (AssertionError, HindsightError):
            seen[name] = "contradicts itself"
    assert {name: text.partition(" ")[0] for name, text in seen.items()} == {
        name: text.partition(" ")[0] for name, (_, text) in DAMAGES.items()
    }
    assert outcome_of(imported, mode, room.rejects(mode, imported), began_s).difference_from(expected) is None


def test_the_check_sees_a_reader_that_lacks_what_was_committed_before() -> None:
    told = [Told("lines", 100 * n, float(n), 0.0) for n in (1, 2, 3)]
    reads = [Read(0.5, 0.6, 0), Read(1.5, 1.6, 100), Read(2.5, 2.6, 200), Read(3.5, 3.6, 300)]
    assert missing_of(told, reads, 0.0) == []
    late = [read._replace(event_count=max(read.event_count - 100, 0)) for read in reads]
    assert missing_of(told, late, 0.0) == list(zip(told, late[1:], strict=True))
    assert missing_of(told, late, 1.0) == []
    assert missing_of(told, [reads[0], reads[3]._replace(event_count=299)], 0.0) != []
