"""``hindsight demo``: import the events of an invented shop, read them back, compare every one, then say how fast.

It works in the database ``demo`` of a private server, made anew by each run, and touches no other. The events also
stay as a file beside the data. No number leaves this module before the check of every event has passed.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import shlex
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Final
from uuid import UUID

import click
import orjson
import psycopg

from ._core import Cursor, RecordedEvent
from .demo_events import DemoEvent, demo_events, demo_lines
from .embedded import EmbeddedServer
from .errors import HindsightError
from .import_lines import LineReader
from .importer import ImportProgress
from .progress import EventProgress
from .store import EventStore

DATABASE: Final = "demo"
IMPORT_ID: Final = "demo"
DATABASE_COMMENT: Final = "made anew by every run of hindsight demo"
LINES_AT_ONCE: Final = 5_000

Show = Callable[[int], object]


class DemoError(HindsightError):
    """The demo cannot be run there; the message says why and what to do."""


class DemoCheckFailed(HindsightError):
    """What was read back is not what was imported: the first difference.

    ``number`` counts the events of the log from 1, ``cursor`` is where that event stands (None where it is missing),
    ``field`` what differs.
    """

    def __init__(self, field: str, expected: object, found: object, *, number: int, cursor: Cursor | None) -> None:
        place = f"event {number:,}" if cursor is None else f"event {number:,} (at cursor {cursor})"
        super().__init__(
            f"THE CHECK FAILED at {place}: {field} should be {_shortened(expected)}, but is {_shortened(found)}"
        )
        self.field = field
        self.expected = expected
        self.found = found
        self.number = number
        self.cursor = cursor


@dataclass(frozen=True, slots=True)
class CheckedLog:
    """What a full comparison of the log with the generator has seen."""

    events: int
    streams: int
    data_bytes: int
    head: Cursor | None


@dataclass(frozen=True, slots=True)
class DemoReport:
    """The outcome of a demo whose check has passed."""

    events: int
    streams: int
    seed: int
    file: Path
    file_bytes: int
    import_seconds: float
    read_seconds: float
    data_bytes: int
    head: Cursor | None
    server_version: str
    programs: Path
    data_dir: Path

    @property
    def import_events_per_s(self) -> float:
        return self.events / self.import_seconds

    @property
    def import_mb_per_s(self) -> float:
        return self.file_bytes / 1e6 / self.import_seconds

    @property
    def read_events_per_s(self) -> float:
        return self.events / self.read_seconds

    @property
    def read_mb_per_s(self) -> float:
        return self.data_bytes / 1e6 / self.read_seconds

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "file": str(self.file),
            "programs": str(self.programs),
            "data_dir": str(self.data_dir),
            "head": None if self.head is None else str(self.head),
            "database": DATABASE,
            "checked": True,
            "import_events_per_s": round(self.import_events_per_s, 1),
            "import_mb_per_s": round(self.import_mb_per_s, 3),
            "read_events_per_s": round(self.read_events_per_s, 1),
            "read_mb_per_s": round(self.read_mb_per_s, 3),
        }

    def __str__(self) -> str:
        folder = shlex.quote(str(self.data_dir))
        psql = "\n".join(f"  {line}" for line in _psql_lines(self.programs, self.data_dir))
        return f"""\
{self.events:,} events in {self.streams:,} streams: every one was read back and is what was written.

import  {self.import_events_per_s:>11,.0f} events/s  {self.import_mb_per_s:>7,.1f} MB/s  {self.import_seconds:>7.2f} s
        from the file to committed and flushed; MB of the file
read    {self.read_events_per_s:>11,.0f} events/s  {self.read_mb_per_s:>7,.1f} MB/s  {self.read_seconds:>7.2f} s
        in order, every payload decoded; MB of payload; a pass of its own, without the comparison

server  PostgreSQL {self.server_version} in {self.programs}, default durability
data    {self.data_dir}, database {DATABASE} (the next demo makes it anew)
file    {self.file} ({self.file_bytes / 1e6:,.1f} MB)

The server has stopped. To look at its data:
  hindsight status --embedded {folder} --database {DATABASE}
  hindsight read --embedded {folder} --database {DATABASE} --limit 3
or with psql:
{psql}"""


def run_demo(count: int, folder: Path | None = None, *, seed: int = 0) -> DemoReport:
    """Run the demo with *count* events on the data folder *folder* (None: the default one), which is kept.

    Talks and shows progress on standard error. Raises DemoCheckFailed at the first difference, DemoError or another
    HindsightError where it cannot be run.
    """
    folder = default_data_dir("demo") if folder is None else folder.absolute()
    _say(f"starting a private PostgreSQL server on {folder}")
    with EmbeddedServer(folder) as server, _events_file(folder, may_wait=not server.is_shared) as (path, file):
        try:
            _say(f"writing {count:,} events to {path}")
            file_bytes = write_events(file, count, seed)
            make_database(server)
            with EventStore(server.conninfo_for(DATABASE)) as store:
                store.create_schema()
                import_seconds = import_events(store, path, count, file_bytes)
                with EventProgress("reading  ", count) as progress:
                    read_seconds = read_all(store, count, lambda events: progress.show(events, events))
                with EventProgress("comparing", count) as progress:
                    checked = check_events(store, count, seed, lambda events: progress.show(events, events))
                with store.pool.connection() as connection:
                    version = connection.info.parameter_status("server_version") or "unknown"
                    # For `hindsight status`: the server stops before it would do so of its own.
                    connection.execute("ANALYZE hindsight.events, hindsight.stream_heads")
        finally:
            # While the file is still locked: nobody else's demo shares this server, then.
            server.stop()
        return DemoReport(
            events=checked.events,
            streams=checked.streams,
            seed=seed,
            file=path,
            file_bytes=file_bytes,
            import_seconds=import_seconds,
            read_seconds=read_seconds,
            data_bytes=checked.data_bytes,
            head=checked.head,
            server_version=version,
            programs=server.installation.bin_dir,
            data_dir=folder,
        )


def default_data_dir(name: str) -> Path:
    """Return where data named *name* is kept unless somebody says otherwise; for root, its parent is made.

    Raises DemoError if this account has no home.
    """
    if os.geteuid() == 0:
        parent = Path("/var/lib/hindsight_fast")
        if not parent.exists():
            parent.mkdir(exist_ok=True)
            parent.chmod(0o755)  # whatever the umask: the account that PostgreSQL runs as must get through
        return parent / name
    given = os.environ.get("XDG_DATA_HOME", "")
    if os.path.isabs(given):  # a relative one is to be ignored, says the XDG specification
        return Path(given, "hindsight-fast", name)
    try:
        return Path.home() / ".local" / "share" / "hindsight-fast" / name
    except RuntimeError:
        raise DemoError("this account has no home folder to keep data in: name a folder with --embedded DIR") from None


def write_events(file: BinaryIO, count: int, seed: int = 0) -> int:
    """Write the events as lines to *file*; return how many bytes they took."""
    lines = demo_lines(count, seed)
    written = size = 0
    with EventProgress("writing  ", count) as progress:
        while block := list(islice(lines, LINES_AT_ONCE)):
            size += file.write(b"".join(block))
            written += len(block)
            progress.show(written, written)
    file.flush()
    return size


def make_database(server: EmbeddedServer) -> None:
    """Make the demo's database anew. Raises DemoError if there is one of that name that no demo has made."""
    with psycopg.connect(server.conninfo, autocommit=True) as connection:
        row = connection.execute(
            "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = %s", (DATABASE,)
        ).fetchone()
        if row is not None and row[0] != DATABASE_COMMENT:
            raise DemoError(
                f"the server of {server.data_dir} has a database {DATABASE!r} that no demo has made (it lacks the "
                f"comment {DATABASE_COMMENT!r}); it was left alone. Drop it, or name another folder: --embedded DIR"
            )
        # Constants, and statements that take no parameters. template0: nobody can be connected to it.
        connection.execute(f"DROP DATABASE IF EXISTS {DATABASE} WITH (FORCE)")
        connection.execute(f"CREATE DATABASE {DATABASE} TEMPLATE template0")
        connection.execute(f"COMMENT ON DATABASE {DATABASE} IS '{DATABASE_COMMENT}'")


def import_events(store: EventStore, path: Path, count: int, file_bytes: int) -> float:
    """Import the file; return how many seconds that took."""
    with EventProgress("importing", count) as progress:

        def show(done: ImportProgress) -> None:
            progress.show(done.events, done.events)

        began = time.perf_counter()
        report = store.import_events(path, import_id=IMPORT_ID, progress=show)
        seconds = time.perf_counter() - began
    if (report.events, report.bytes) != (count, file_bytes):
        raise DemoCheckFailed(
            "the import's count of events and bytes",
            (count, file_bytes),
            (report.events, report.bytes),
            number=count,
            cursor=report.last_cursor,
        )
    return seconds


def read_all(store: EventStore, count: int, show: Show) -> float:
    """Read the whole log and decode every payload, nothing else; return how many seconds that took."""
    events = 0
    began = time.perf_counter()
    for batch in store.read_batches():
        for event in batch:
            event.payload  # noqa: B018 - decoded on first use
        events += len(batch)
        show(events)
    seconds = time.perf_counter() - began
    if events != count:
        raise DemoCheckFailed("the number of events read", count, events, number=events, cursor=None)
    return seconds


def check_events(store: EventStore, count: int, seed: int = 0, show: Show = lambda events: None) -> CheckedLog:
    """Compare the whole log with the events made once more. Raises DemoCheckFailed at the first difference."""
    expected_events = demo_events(count, seed)
    derived_id = LineReader(IMPORT_ID).derived_id
    versions: dict[UUID, int] = {}
    number = data_bytes = 0
    last = Cursor.BEGINNING
    for batch in store.read_batches():
        for event in batch:
            number += 1
            expected = next(expected_events, None)
            if expected is None:
                raise DemoCheckFailed(
                    "the log's end", f"event {count:,}", event.event_id, number=number, cursor=event.cursor
                )
            stream_id = expected.stream_id
            stream_version = versions[stream_id] = versions.get(stream_id, -1) + 1
            data_bytes += len(expected.data)
            if (
                event.event_id.bytes != derived_id(number)
                or event.cursor <= last
                or _stored(event) != _wanted(expected, stream_id, stream_version)
                or event.payload != orjson.loads(expected.data)  # by another decoder than the store's
            ):
                raise _first_difference(event, expected, number, stream_version, derived_id(number), last)
            last = event.cursor
        show(number)
    if number != count:
        missing = next(expected_events)
        raise DemoCheckFailed("what follows", missing, "nothing", number=number + 1, cursor=None)
    if (head := store.head()) != last:
        raise DemoCheckFailed("the head of the log", last, head, number=number, cursor=last)
    _check_heads(store, versions, number)
    return CheckedLog(number, len(versions), data_bytes, head)


def _stored(event: RecordedEvent) -> tuple[object, ...]:
    return (
        event.stream_id,
        event.stream_version,
        event.name,
        event.version,
        event.data,
        event.created_at,
        event.correlation_id,
        event.metadata_json,
    )


def _wanted(event: DemoEvent, stream_id: UUID, stream_version: int) -> tuple[object, ...]:
    return (
        stream_id,
        stream_version,
        event.type.decode(),
        event.version,
        event.data,
        event.created_at,
        event.correlation_id,
        event.metadata,
    )


_FIELDS: Final = (
    "stream id", "stream version", "type", "version", "data", "time", "correlation id", "metadata",
)  # fmt: skip


def _first_difference(
    event: RecordedEvent, expected: DemoEvent, number: int, stream_version: int, event_id: bytes, last: Cursor
) -> DemoCheckFailed:
    wanted = (*_wanted(expected, expected.stream_id, stream_version), UUID(bytes=event_id), orjson.loads(expected.data))
    stored = (*_stored(event), event.event_id, event.payload)
    for field, want, have in zip((*_FIELDS, "event id", "payload"), wanted, stored, strict=True):
        if want != have:
            return DemoCheckFailed(field, want, have, number=number, cursor=event.cursor)
    return DemoCheckFailed("cursor", f"one above {last}", event.cursor, number=number, cursor=event.cursor)


def _check_heads(store: EventStore, versions: dict[UUID, int], number: int) -> None:
    """Compare the heads of all streams, from which the next append would count on."""
    with store.pool.connection() as connection:
        rows = connection.execute("SELECT stream_id, stream_version FROM hindsight.stream_heads").fetchall()
    heads: dict[UUID, int] = dict(rows)
    if heads != versions:
        stream_id = next(each for each in [*versions, *heads] if versions.get(each) != heads.get(each))
        raise DemoCheckFailed(
            f"the head of stream {stream_id}",
            versions.get(stream_id),
            heads.get(stream_id),
            number=number,
            cursor=None,
        )


@contextmanager
def _events_file(folder: Path, *, may_wait: bool) -> Iterator[tuple[Path, BinaryIO]]:
    """Open the file of events beside *folder*, emptied; one demo at a time has it."""
    stem = folder.name if folder.name.endswith("demo") else f"{folder.name}-demo"
    path = folder.with_name(f"{stem}-events.ndjson")
    # O_NOFOLLOW: we may be root, and the folder may be open to all.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    with open(descriptor, "wb", buffering=1 << 20) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise DemoError(f"{path} is no ordinary file; the demo would write its events there")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # The server's owner waits for whoever shares it: otherwise its end would be the end of the other demo.
            if not may_wait:
                raise DemoError(f"another demo runs on {folder}; wait for it, or name another folder") from None
            _say(f"another demo runs on {folder}; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.ftruncate(descriptor, 0)
        yield path, file


def _psql_lines(programs: Path, data_dir: Path) -> list[str]:
    """Command lines that start the server on *data_dir* for longer, enter it, and stop it."""
    owner = data_dir.stat().st_uid
    as_owner = "" if owner == os.geteuid() else f"cd / && runuser -u {pwd.getpwuid(owner).pw_name} -- "
    folder = shlex.quote(str(data_dir))
    pg_ctl, psql = (shlex.quote(str(programs / program)) for program in ("pg_ctl", "psql"))
    # In the data folder, which only its owner may enter: the server asks for no password.
    options = shlex.quote(f"-c listen_addresses= -c unix_socket_directories={folder} -c port=5432")
    return [
        f"{as_owner}{pg_ctl} -D {folder} -l {folder}/server.log -o {options} start",
        f"{psql} -h {folder} -U postgres {DATABASE}",
        f"{as_owner}{pg_ctl} -D {folder} stop",
    ]


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 400 else f"{text[:400]}…"


def _say(text: str) -> None:
    click.echo(text, err=True)
