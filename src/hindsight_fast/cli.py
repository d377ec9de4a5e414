"""The command line: ``hindsight demo | init | import | read | status``. Data on stdout; talk and progress on stderr."""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, ParamSpec, TypeVar
from uuid import UUID

import click
import orjson
import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from ._core import Cursor, RecordedEvent
from .connecting import find_conninfo, shown_conninfo
from .demo import DATABASE as DEMO_DATABASE
from .demo import default_data_dir, run_demo
from .embedded import EmbeddedServer
from .errors import HindsightError, ImportFailed, SchemaError
from .importer import MOST_JOBS, ImportProgress, ImportReport, check_import_id
from .progress import EventProgress
from .schema import LAYOUT, check_schema_name, schema_sql
from .status import ImportStatus, StoreStatus, read_status
from .store import EventStore
from .streams import stream_uuid

P = ParamSpec("P")
T = TypeVar("T")

FAILED: Final = 1
BAD_DATA: Final = 3
INTERRUPTED: Final = 130

BLOCK_BYTES: Final = 128 * 1024
"""What ``read`` gathers before it writes."""

EXIT_CODES: Final = """
\b
Exit codes:
  0    done
  1    an error: no connection, no schema, a refusal, a check that failed
  2    wrong usage
  3    bad data in what was to be imported; nothing of the bad line's chunk is stored
  130  interrupted (Ctrl-C); a message says how to go on

\b
Which database: --dsn, else HINDSIGHT_DATABASE_URL, DATABASE_URL, or libpq's PGHOST,
PGDATABASE and so on. A private server is started only by demo and --embedded.
"""


# --- What all commands share ----------------------------------------------------------------------------------------


class Commands(click.Group):
    """Turns what a command raises into one clear line on stderr and the exit code of ``--help``."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # `| head` has seen enough. Python would complain when it flushes at its end.
            _drop_stdout()
            ctx.exit(0)
        except KeyboardInterrupt:
            _say("\nInterrupted.")
            ctx.exit(INTERRUPTED)
        except (HindsightError, psycopg.Error, OSError) as error:
            if _wants_traceback(ctx):
                _say(_without_passwords(traceback.format_exc().rstrip(), ctx))
            else:
                _say(f"Error: {_without_passwords(_one_line(error), ctx)}")
            try:
                sys.stdout.flush()
            except (OSError, ValueError, AttributeError):
                # What a full disk did not take would be tried again at Python's end, which then exits with 120.
                _drop_stdout()
            ctx.exit(BAD_DATA if isinstance(error, ImportFailed) else FAILED)


class DataSource:
    """Where a command's store is: a named server, or a private one on a kept folder."""

    def __init__(self, dsn: str | None, embedded: str | None, database: str | None, schema: str) -> None:
        if dsn is not None and embedded is not None:
            raise click.UsageError("--dsn and --embedded exclude each other")
        if database is not None and embedded is None:
            raise click.UsageError("--database goes with --embedded; with --dsn it is part of the DSN")
        self.schema = schema
        self._dsn = dsn
        self._database = database
        self._folder: Path | None = None
        if embedded is not None:
            self._folder = Path(embedded).absolute() if embedded else default_data_dir("data")

    @contextmanager
    def open_store(self, purpose: Literal["look", "write", "make"]) -> Iterator[EventStore]:
        """Lend an open store. A private server's folder is made only to "make" a store in it."""
        if self._folder is None:
            with EventStore(_checked_conninfo(self._dsn), schema=self.schema) as store:
                yield store
            return
        if purpose != "make" and not (self._folder / "PG_VERSION").exists():
            raise HindsightError(
                f"there is no private server's data in {self._folder}; this makes it: hindsight init{self.options()}"
            )
        with EmbeddedServer(self._folder) as server:
            database = self._database or ("postgres" if purpose != "look" else self._database_to_look_at(server))
            with EventStore(server.conninfo_for(database), schema=self.schema) as store:
                yield store

    def place(self, store: EventStore) -> str:
        """Say where *store* is, without a password."""
        if self._folder is not None:
            return f"private server on {self._folder}, database {conninfo_to_dict(store.conninfo)['dbname']}"
        return shown_conninfo(store.conninfo) or "the server that the environment names"

    def options(self) -> str:
        """The options that lead to this store, for a command line to be shown: the DSN's place is only pointed to."""
        parts = [] if self._dsn is None else ["--dsn …"]
        if self._folder is not None:
            parts.append(f"--embedded {shlex.quote(str(self._folder))}")
        if self._database is not None:
            parts.append(f"--database {shlex.quote(self._database)}")
        if self.schema != "hindsight":
            parts.append(f"--schema {shlex.quote(self.schema)}")
        return "".join(f" {part}" for part in parts)

    def _database_to_look_at(self, server: EmbeddedServer) -> str:
        # Whoever only looks also finds the demo's events; nobody writes there unasked: the next demo drops them.
        table = sql.Identifier(self.schema).as_string(None) + ".store_meta"
        for name in ("postgres", DEMO_DATABASE):
            with suppress(psycopg.OperationalError), psycopg.connect(server.conninfo_for(name)) as connection:
                row = connection.execute("SELECT to_regclass(%s) IS NOT NULL", (table,)).fetchone()
                if row is not None and row[0]:
                    return name
        return "postgres"


def common_options(command: Callable[..., T]) -> Callable[..., T]:
    """Give *command* the options that name a database, and pass them as one DataSource."""

    @click.option("--dsn", metavar="TEXT", help="PostgreSQL URL or connection string; else the environment names it.")
    @click.option(
        "--embedded",
        metavar="[DIR]",
        is_flag=False,
        flag_value="",
        help="A private server, its data kept in DIR. Without DIR put it last, or write --embedded=''.",
    )
    @click.option(
        "--database",
        metavar="NAME",
        help="Which database of the private server.  [default: postgres; to look at, also the demo's]",
    )
    @click.option(
        "--schema", default="hindsight", show_default=True, metavar="NAME", callback=_checked(check_schema_name),
        help="The schema that holds the store.",
    )  # fmt: skip
    @_traceback_option
    @wraps(command)
    def with_source(
        *args: Any, dsn: str | None, embedded: str | None, database: str | None, schema: str, **options: Any
    ) -> T:
        return command(*args, source=DataSource(dsn, embedded, database, schema), **options)

    return with_source


def _checked(check: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Make *check*, which raises ValueError, a callback of click's; also for an option that is given many times."""

    def callback(_ctx: click.Context, _parameter: click.Parameter, given: Any) -> Any:
        try:
            if isinstance(given, tuple):
                return [check(each) for each in given]
            return None if given is None else check(given)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None

    return callback


def _set_traceback(ctx: click.Context, _parameter: click.Parameter, given: bool) -> None:
    if given:
        ctx.meta["hindsight.traceback"] = True  # shared by a context and its children


_traceback_option = click.option(
    "--traceback", is_flag=True, expose_value=False, callback=_set_traceback, help="Show where an error came from."
)


def main() -> None:
    """The entry point ``hindsight``."""
    for stream in (sys.stdout, sys.stderr):
        # Under a locale that cannot show a character, an escape instead of an error.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    commands(prog_name="hindsight")


@click.group(cls=Commands, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hindsight-fast")
@_traceback_option
def commands() -> None:
    """A fast, trustworthy event store on PostgreSQL.

    Data goes to stdout, talk and progress to stderr. HINDSIGHT_DEBUG=1 shows tracebacks, as --traceback does.
    """


# --- demo -----------------------------------------------------------------------------------------------------------


@commands.command()
@click.option("--events", type=click.IntRange(min=1), default=1_000_000, show_default=True, metavar="N")
@click.option(
    "--embedded", "folder", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
    help="Where to keep the data.  [default: a folder of its own; its path is shown]",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of the text.")
@_traceback_option
def demo(events: int, folder: Path | None, as_json: bool) -> None:
    """Import N events, read them back, compare every one, and show how fast it was.

    Starts a private server on a kept folder and works in its database "demo", which is made anew by every run; no
    other database is touched. Numbers are shown only if every event came back as it was written.
    """
    try:
        report = run_demo(events, folder)
    except KeyboardInterrupt:
        again = f"hindsight demo --events {events}" + (f" --embedded {shlex.quote(str(folder))}" if folder else "")
        _interrupted(f"No number is shown, as the check has not been made. To start afresh: {again}")
    _print_json(report.to_dict()) if as_json else _print(str(report))


# --- init -----------------------------------------------------------------------------------------------------------


@commands.command()
@click.option("--print", "only_print", is_flag=True, help="Only write the SQL to stdout, for a DBA; needs no server.")
@common_options
def init(source: DataSource, only_print: bool) -> None:
    """Create the tables and functions, or bring older ones up to date. Harmless to repeat."""
    if only_print:
        _write(schema_sql(source.schema).encode())
        return
    with source.open_store("make") as store:
        store.create_schema()
        _say(f"Schema {source.schema!r} is ready (layout {LAYOUT}): {source.place(store)}")


# --- import ---------------------------------------------------------------------------------------------------------


@commands.command(name="import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, readable=True, allow_dash=True))
@click.option(
    "--import-id", metavar="ID", callback=_checked(check_import_id),
    help="Under which name its progress is kept.  [default: the file's base name; required for -]",
)  # fmt: skip
@click.option(
    "--chunk-size", type=click.IntRange(min=1), metavar="N", help="Events a commit.  [default: 250 ms' worth]"
)
@click.option(
    "--jobs", type=click.IntRange(1, MOST_JOBS), default=1, metavar="N",
    help="Connections that store at a time; order is then kept within each stream.  [default: 1]",
)  # fmt: skip
@click.option(
    "--on-error", type=click.Path(dir_okay=False), default="stop", metavar="stop|PATH",
    help="Go on behind bad lines: they go to PATH, and why to PATH.reasons.  [default: stop]",
)  # fmt: skip
@click.option("--max-errors", type=click.IntRange(min=0), metavar="N", help="Stop at more bad lines than this.")
@click.option("--max-rate", type=click.FloatRange(min=0, min_open=True), metavar="N", help="Events a second, at most.")
@click.option("--dry-run", is_flag=True, help="Check everything, store nothing, and project the time.")
@click.option("--json", "as_json", is_flag=True, help="The report as one JSON object.")
@common_options
def import_(source: DataSource, file: str, import_id: str | None, as_json: bool, **options: Any) -> None:
    """Append the events of FILE (NDJSON, .gz too; - for standard input) in their order.

    Killed or interrupted, the same command goes on where it stopped; what is stored already is skipped.
    """
    if options["max_errors"] is not None and options["on_error"] == "stop":
        raise click.UsageError("--max-errors goes with --on-error PATH")
    if import_id is None:
        if file == "-":
            raise click.UsageError("standard input has no name: give --import-id ID, the same one to go on later")
        import_id = _checked_name(file)
        _say(f"import id {import_id!r} (--import-id names another)")
    with source.open_store("write") as store:
        try:
            before = _import_before(store, import_id)
        except SchemaError as error:
            if error.found_layout is not None:
                raise
            raise SchemaError(
                f"{error}. Create the schema first: hindsight init{source.options()}", schema=error.schema
            ) from error
        report = _run_import(store, file, import_id, before, options)
    if as_json:
        _print_json(_import_dict(report))
    else:
        _print(_import_text(report))


def _run_import(
    store: EventStore, file: str, import_id: str, before: ImportStatus | None, options: dict[str, Any]
) -> ImportReport:
    stored = before.events if before is not None else 0
    if before is not None:
        _say(f"going on behind line {before.lines:,}: {stored:,} events are stored already")
    progress = EventProgress("importing", None, events=stored)

    def show(done: ImportProgress) -> None:
        nonlocal stored
        stored = done.events
        progress.show(done.events, done.source_bytes_read, done.source_size)

    try:
        with progress:
            return store.import_events(file, import_id=import_id, progress=show, **options)
    except KeyboardInterrupt:
        same_input = ", with the same input," if file == "-" else ""
        _interrupted(
            f"At least {stored:,} events of import {import_id!r} are stored, and stay so."
            f" The same command{same_input} goes on behind them."
        )


def _import_before(store: EventStore, import_id: str) -> ImportStatus | None:
    return next((each for each in read_status(store).imports if each.import_id == import_id and each.lines), None)


def _checked_name(file: str) -> str:
    try:
        return check_import_id(os.path.basename(file))
    except ValueError as error:
        raise click.UsageError(f"the file's name is no import id ({error}): give --import-id ID") from None


def _import_dict(report: ImportReport) -> dict[str, Any]:
    return {
        **asdict(report),
        "first_cursor": None if report.first_cursor is None else str(report.first_cursor),
        "last_cursor": None if report.last_cursor is None else str(report.last_cursor),
    }


def _import_text(report: ImportReport) -> str:
    rate = report.events / max(report.seconds, 1e-6)
    megabytes = report.bytes / 1e6
    if report.projected_seconds is None:
        first = f"{report.events:,} events imported, {report.skipped_events + report.known_events:,} were there already"
    else:
        first = (
            f"{report.events:,} events to import in about {report.projected_seconds:,.0f} s,"
            f" {report.skipped_events + report.known_events:,} are there already; nothing was stored"
        )
    if report.bad_lines:
        first += f"; {report.bad_lines:,} bad lines set aside"
    lines = [
        first,
        f"{report.new_streams:,} new streams, {report.lines:,} lines, {megabytes:,.1f} MB",
        f"{report.seconds:.2f} s, {rate:,.0f} events/s, {megabytes / max(report.seconds, 1e-6):,.1f} MB/s",
    ]
    if report.first_cursor is not None:
        lines.append(f"cursors {report.first_cursor} to {report.last_cursor}")
    return "\n".join(lines)


# --- read -----------------------------------------------------------------------------------------------------------

_HYPHENATED: Final = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}").fullmatch


def _stream_id(text: str) -> UUID:
    """The rule of the import format: the hyphenated form is a UUID, any other text a name."""
    if not text:
        raise ValueError("stream is empty")
    return UUID(text) if _HYPHENATED(text) else stream_uuid(text)


def _utf8(text: str) -> str:
    text.encode()  # bytes of another encoding come from the shell as lone surrogates: a ValueError
    return text


@commands.command()
@click.option("--after", metavar="CURSOR", callback=_checked(Cursor.parse), help="Only events behind it, as 812:3.")
@click.option(
    "--type", "types", multiple=True, metavar="T", callback=_checked(_utf8),
    help="Only events of this type; may be given many times.",
)  # fmt: skip
@click.option("--stream", metavar="NAME|UUID", callback=_checked(_stream_id), help="Only events of this stream.")
@click.option("--correlation-id", type=click.UUID, metavar="UUID", help="Only events of this cause.")
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="At most so many events.")
@click.option("--no-data", is_flag=True, help="Leave data and metadata out.")
@common_options
def read(
    source: DataSource,
    after: Cursor | None,
    types: list[str],
    stream: UUID | None,
    correlation_id: UUID | None,
    limit: int | None,
    no_data: bool,
) -> None:
    """Write events to stdout in the order of the log, one JSON object a line, data as it is stored.

    Ends at the head of the log as it was at the start.
    """
    with source.open_store("look") as store:
        try:
            events = store.read(
                after=Cursor.BEGINNING if after is None else after,
                event_types=types or None,
                stream_id=stream,
                correlation_id=correlation_id,
                limit=limit,
            )
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        gathered = bytearray()
        for event in events:
            gathered += _event_line(event, no_data)
            if len(gathered) >= BLOCK_BYTES:
                _write(gathered)
                gathered.clear()
        _write(gathered)


def _event_line(event: RecordedEvent, no_data: bool) -> bytes:
    fields: dict[str, Any] = {
        "cursor": str(event.cursor),
        "stream": event.stream_id,
        "stream_version": event.stream_version,
        "type": event.name,
        "version": event.version,
        "id": event.event_id,
        "time": event.created_at,
        "correlation_id": event.correlation_id,
    }
    if not no_data:
        metadata = event.metadata_json
        fields["data"] = _fragment(event.data)
        fields["metadata"] = None if metadata is None else _fragment(metadata)
    return orjson.dumps(fields, option=orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE)


def _fragment(stored: bytes) -> orjson.Fragment:
    # The one change: a line break, which can only stand between tokens, would break the line.
    return orjson.Fragment(stored.replace(b"\n", b" ") if b"\n" in stored else stored)


# --- status ---------------------------------------------------------------------------------------------------------


@commands.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@common_options
def status(source: DataSource, as_json: bool) -> None:
    """Show server, schema, head, sizes and imports. Counts nothing: numbers of rows are the planner's estimates."""
    with source.open_store("look") as store:
        found = read_status(store)
        place = source.place(store)
    if as_json:
        head = None if found.head is None else str(found.head)
        _print_json(
            {
                **asdict(found),
                "head": head,
                "estimated_events": found.estimated_events,
                "estimated_streams": found.estimated_streams,
            }
        )
    else:
        _print(_status_text(found, place))


def _status_text(found: StoreStatus, place: str) -> str:
    lines = [
        f"server   PostgreSQL {found.server_version}, {place}",
        f"schema   {found.schema}, layout {found.layout}, {found.state}, generation {found.generation}",
        f"head     {'none: the store is empty' if found.head is None else found.head}",
        f"bound    {found.bound} (transactions from here on may still be open)",
        f"events   {_estimate(found.estimated_events)}",
        f"streams  {_estimate(found.estimated_streams)}",
    ]
    lines += [f"table    {table.name}: {table.bytes / 1e6:,.1f} MB with its indexes" for table in found.tables]
    for each in found.imports:
        state = "finished" if each.finished else "not finished"
        lines.append(
            f"import   {each.import_id}: {state}, {each.events:,} events, {each.lines:,} lines, "
            f"{each.bytes / 1e6:,.1f} MB, last moved {each.updated_at.isoformat(' ', 'seconds')}"
        )
    return "\n".join(lines)


def _estimate(rows: int | None) -> str:
    return "not estimated yet (the server has not analysed the table)" if rows is None else f"about {rows:,}"


# --- Words and bytes out --------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    click.echo(text, err=True)


def _print(text: str) -> None:
    click.echo(text)


def _print_json(fields: dict[str, Any]) -> None:
    _write(orjson.dumps(fields, option=orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE))


def _write(data: bytes | bytearray) -> None:
    """Write bytes to stdout, whatever the locale, and flush, so that an error is ours to report."""
    if data and sys.stdout is not None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def _drop_stdout() -> None:
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _interrupted(how_to_go_on: str) -> NoReturn:
    _say(f"\nInterrupted. {how_to_go_on}")
    raise click.exceptions.Exit(INTERRUPTED)


def _wants_traceback(ctx: click.Context) -> bool:
    return bool(ctx.meta.get("hindsight.traceback") or os.environ.get("HINDSIGHT_DEBUG"))


def _one_line(error: Exception) -> str:
    if not isinstance(error, psycopg.Error):
        return str(error) or type(error).__name__
    # Not the server's detail and context: they can quote what is stored.
    parts = [error.diag.message_primary or str(error), error.diag.message_hint or ""]
    return " ".join(" ".join(parts).split()) or type(error).__name__


# --- Passwords ------------------------------------------------------------------------------------------------------


def _checked_conninfo(dsn: str | None) -> str:
    """Return the connection string to use, its passwords noted. Raises HindsightError, which does not quote it."""
    conninfo = find_conninfo(dsn or "")
    try:
        given = conninfo_to_dict(conninfo)
        # An unescaped / in a URL's password makes a port of what stands before it.
        readable = re.fullmatch(r"[\d, ]*", str(given.get("port") or "")) is not None
    except psycopg.Error:
        readable = False
    if not readable:
        whence = "--dsn" if dsn else "the environment (HINDSIGHT_DATABASE_URL or DATABASE_URL)"
        raise HindsightError(
            f"the connection string from {whence} cannot be read; it is not shown here, as it may hold a password. "
            "In a URL, characters such as / @ : and spaces in user and password are written %2F %40 %3A %20"
        ) from None
    secrets = click.get_current_context().meta.setdefault("hindsight.passwords", [])
    secrets += [str(given[key]) for key in ("password", "sslpassword") if given.get(key)]
    return conninfo


def _without_passwords(text: str, ctx: click.Context) -> str:
    for secret in [*ctx.meta.get("hindsight.passwords", []), os.environ.get("PGPASSWORD")]:
        if secret:
            text = text.replace(secret, "***")
    return text
