"""What the tests share that kill an import: its source, the importer as a process of its own, and what must come of it.

A process stands still a few chunks behind the place that it was told to reach, so that a kill which aims at that place
never comes when all is over, however slow the machine.
"""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Self

import psycopg

from hindsight_fast import EventStore
from initial_imports import catalog

DEADLINE_S: Final = 60.0
"""After this a process that neither ends nor comes to where it should is killed, and the test fails."""
LEASH_CHUNKS: Final = 4
PHASES: Final = ("lines", "indexes", "switch")
FORBIDDEN: Final = "forbidden"
"""A type of event that only the server refuses."""
STREAM_COUNT: Final = 300

# Tells of each chunk, of each phase and of the end: the phase, the events stored, when that was on the monotonic clock
# (which all processes share), and the longest that a chunk has taken. Says "there" where it was told to come to, and
# waits to be killed when it comes too far beyond.
IMPORT_PROGRAM = """
import json, sys, time
from hindsight_fast import EventStore
from hindsight_fast.import_writer import ChunkWriter

conninfo, source, options, aim, leash, phases = map(json.loads, sys.argv[1:])
longest_s, beyond = 0.0, None
store_chunk = ChunkWriter.store

def store_and_measure(writer, *chunk):
    global longest_s
    stored = store_chunk(writer, *chunk)
    longest_s = max(longest_s, stored.seconds)
    return stored

def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\\n")
    sys.stdout.flush()

def look_around(phase, events):
    global beyond
    if aim is None:
        return
    if beyond is not None:
        beyond += 1
    elif (phases.index(phase), events) >= (phases.index(aim[0]), aim[1]):
        say("there")
        beyond = 0
    if beyond is not None and (beyond > leash or phases.index(phase) > phases.index(aim[0])):
        sys.stdin.readline()

def tell(progress):
    say(progress.phase, progress.events, time.monotonic(), longest_s)
    look_around(progress.phase, progress.events)

ChunkWriter.store = store_and_measure
# A server that was killed is noticed soon.
with EventStore(conninfo, timeout=5.0) as store:
    say("begun", 0, time.monotonic(), 0)
    look_around(phases[0], 0)
    report = store.import_events(source, progress=tell, **options)
    say("done", report.events + report.skipped_events, time.monotonic(), longest_s)
"""


@dataclass(frozen=True)
class Mode:
    """How to import so many events, arguments of ``import_events``, a source plain or gzip, with bad lines or not."""

    name: str
    event_count: int
    options: Mapping[str, Any]
    compressed: bool = False
    with_bad_lines: bool = False

    @property
    def is_initial(self) -> bool:
        return self.options.get("mode") == "initial"

    @property
    def jobs(self) -> int:
        return int(self.options.get("jobs", 1))

    @property
    def chunk_size(self) -> int:
        return int(self.options["chunk_size"])


@dataclass(frozen=True)
class Source:
    """A file of lines; *bad_lines* are those that are not good, in order."""

    path: Path
    bad_lines: tuple[bytes, ...]


def write_source(folder: Path, event_count: int, *, compressed: bool, with_bad_lines: bool) -> Source:
    """Write events of 300 streams, some with an id, a cause or metadata, some without a time, blank lines in between.

    The bad lines are of three kinds: no JSON, an error that is found when the line is encoded, and events that only
    the server refuses.
    """
    chance = random.Random(event_count)
    path = folder / ("events.ndjson.gz" if compressed else "events.ndjson")
    bad: list[bytes] = []
    with gzip.open(path, "wb", compresslevel=1) if compressed else path.open("wb") as file:
        for n in range(event_count):
            stream = f"s{int(chance.paretovariate(0.5)) % STREAM_COUNT}"
            line: dict[str, Any] = {"stream": stream, "type": f"t{n % 5}", "data": {"n": n, "ü": "✓" * (n % 7)}}
            if n % 11:
                line["time"] = f"2024-01-01T00:{n // 60 % 60:02}:{n % 60:02}.{n:06}Z"
            if n % 3 == 0:
                line["correlation_id"] = f"00000000-0000-4000-8000-{n // 30:012}"
            if n % 7 == 0:
                line["id"] = f"10000000-0000-4000-8000-{n:012}"
            if n % 13 == 0:
                line["metadata"] = {"by": n}
            file.write(json.dumps(line, ensure_ascii=False).encode() + (b"\n\n" if n % 97 == 0 else b"\n"))
            if with_bad_lines and n % 53 == 0:
                bad.append(
                    (
                        b"line %d is bad\n" % n,
                        b'{"stream":"s%d","type":"t","data":[%d]}\n' % (n % STREAM_COUNT, n),
                        b'{"stream":"s%d","type":"forbidden","data":{"n":%d}}\n' % (n % STREAM_COUNT, n),
                    )[n // 53 % 3]
                )
                file.write(bad[-1])
    return Source(path, tuple(bad))


@dataclass(frozen=True)
class Told:
    """What an importer said: its phase ("begun" and "done" besides), the events stored, when, its longest chunk."""

    phase: str
    events: int
    at_s: float
    longest_chunk_s: float

    @classmethod
    def parse(cls, text: str) -> Told:
        phase, events, at_s, longest_chunk_s = text.split()
        return cls(phase, int(events), float(at_s), float(longest_chunk_s))


class ImportProcess:
    """An import by a process of its own; to the end, or as far as *aim*: a phase, and how many events are stored.

    Use it in a ``with`` statement, which kills what is left of it. ``told`` is what it has said.
    """

    def __init__(
        self, conninfo: str, source: Path, options: Mapping[str, Any], *, aim: tuple[str, int] | None = None
    ) -> None:
        arguments = (conninfo, str(source), options, aim, LEASH_CHUNKS, PHASES)
        self.told: list[Told] = []
        self.errors = ""
        self._process = subprocess.Popen(
            [sys.executable, "-c", IMPORT_PROGRAM, *map(json.dumps, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._watchdog = threading.Timer(DEADLINE_S, self._process.kill)
        self._watchdog.daemon = True

    def __enter__(self) -> Self:
        self._watchdog.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self.wait()
        self._watchdog.cancel()

    def wait_until_there(self) -> None:
        """Wait until it has come to where it was told to. Raises AssertionError if it ends before."""
        assert self._process.stdout is not None
        for text in self._process.stdout:
            if text == "there\n":
                return
            self.told.append(Told.parse(text))
        self.wait()
        raise AssertionError(f"the import ended too early, with {self.told[-3:]}: {self.errors}")

    def kill(self) -> int:
        """End it by SIGKILL; returns its exit status, which says whether that came in time."""
        self._process.kill()
        return self.wait()

    def wait(self) -> int:
        """Let it run to its end, and return its exit status."""
        stdin, stdout, stderr = self._process.stdin, self._process.stdout, self._process.stderr
        assert stdin is not None
        assert stdout is not None
        assert stderr is not None
        if not stdin.closed:
            stdin.close()
            # Not communicate(), which knows nothing of what wait_until_there() has left in the buffer.
            self.told += [Told.parse(text) for text in stdout if text != "there\n"]
            self.errors = stderr.read()
            stdout.close()
            stderr.close()
            self._process.wait()
        return self._process.returncode


@dataclass(frozen=True)
class Outcome:
    """What an import has come to: all that may not depend on whether it was interrupted."""

    events: list[tuple[Any, ...]]  # in the order of the log; with several jobs stream by stream
    heads: list[tuple[Any, ...]]
    imports: list[tuple[Any, ...]]
    catalog: list[tuple[Any, ...]]  # no table, index or constraint is left over, none is missing
    state: list[tuple[Any, ...]]
    rejects: list[tuple[int, int, str, bytes]]  # line number, offset, reason and line

    def difference_from(self, other: Outcome) -> str | None:
        """Return what is different, and the first of it; None if nothing is."""
        for field in fields(self):
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            if ours != theirs:
                first = next((pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1]), None)
                return f"{field.name}: {len(ours)} and not {len(theirs)}; the first that differ: {first}"
        return None


def outcome_of(conninfo: str, mode: Mode, rejects: Path | None, began_s: float) -> Outcome:
    """Look at a store into which one import has gone, which began at *began_s* (time.time()).

    Raises AssertionError where it contradicts itself: a read sees other events than the table holds, or in another
    order; versions have holes, or heads are not those of the last events; the store does not take another event.
    """
    with EventStore(conninfo) as store, psycopg.connect(conninfo, autocommit=True) as connection:
        events = list(store.read())
        stored = connection.execute(
            "SELECT event_id FROM hindsight.events ORDER BY transaction_no, sequence_no"
        ).fetchall()
        assert [(event.event_id,) for event in events] == stored
        versions: dict[Any, int] = {}
        for event in events:
            assert event.stream_version == versions.get(event.stream_id, -1) + 1
            versions[event.stream_id] = event.stream_version
        heads = connection.execute("SELECT stream_id, stream_version FROM hindsight.stream_heads ORDER BY 1").fetchall()
        assert dict(heads) == versions
        rows = [
            (
                event.stream_id,
                event.stream_version,
                event.event_id,
                event.correlation_id,
                # What the server fills in differs from run to run.
                event.created_at if event.created_at.timestamp() < began_s else "the server's time",
                event.name,
                event.version,
                event.data,
                event.metadata_json,
            )
            for event in events
        ]
        found = Outcome(
            events=rows if mode.jobs == 1 else sorted(rows, key=lambda row: row[:2]),
            heads=heads,
            # All that is stored but the times.
            imports=connection.execute(
                "SELECT import_id, shard, shard_count, line_no, byte_offset, source_digest, event_count, finished"
                " FROM hindsight.imports ORDER BY 1, 2"
            ).fetchall(),
            catalog=catalog(connection),
            state=connection.execute(
                "SELECT state, (SELECT count(*) FROM hindsight.initial_import) FROM hindsight.store_meta"
            ).fetchall(),
            rejects=[] if rejects is None else read_rejects(rejects, is_whole=mode.jobs == 1),
        )
        assert store.import_events([b'{"stream":"s1","type":"t","data":{}}'], import_id="afterwards").events == 1
        assert [event.name for event in store.read(after=events[-1].cursor)] == ["t"]
    return found


def read_rejects(path: Path, *, is_whole: bool) -> list[tuple[int, int, str, bytes]]:
    """Read a file of bad lines and its reasons. Raises AssertionError where one does not fit the other.

    Unless it is *whole*, as that of a single job is, blank lines may stand where lines were taken back.
    """
    text, start = path.read_bytes(), 0
    found = []
    for line in path.with_name(path.name + ".reasons").read_bytes().splitlines(keepends=True):
        assert line.endswith(b"\n")
        if line.isspace() and not is_whole:
            continue
        reason = json.loads(line)
        passed = text[start : reason["end"]].splitlines(keepends=True)
        assert all(each.isspace() for each in passed[:-1])
        assert len(passed) == 1 or not is_whole
        found.append((reason["line_no"], reason["byte_offset"], reason["reason"], passed[-1]))
        start = reason["end"]
    assert text[start:] == b""
    return sorted(found)
