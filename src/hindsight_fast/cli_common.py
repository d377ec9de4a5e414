"""What all commands share: where the store is, how errors end, what goes to stdout and what to stderr."""

from __future__ import annotations

import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, ParamSpec, TextIO, TypeVar

import click
import orjson
import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from .connecting import find_conninfo, shown_conninfo
from .demo import DATABASE as DEMO_DATABASE
from .demo import default_data_dir
from .embedded import EmbeddedServer
from .errors import HindsightError, ImportFailed
from .events import EventType
from .schema import check_schema_name
from .store import EventStore

P = ParamSpec("P")
T = TypeVar("T")

FAILED: Final = 1
BAD_DATA: Final = 3
INTERRUPTED: Final = 130


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
            say("\nInterrupted.")
            ctx.exit(INTERRUPTED)
        except (HindsightError, psycopg.Error, OSError) as error:
            if _wants_traceback(ctx):
                say(_without_passwords(traceback.format_exc().rstrip(), ctx))
            else:
                say(f"Error: {_without_passwords(_one_line(error), ctx)}")
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
    def open_store(
        self,
        purpose: Literal["look", "write", "make"],
        *,
        connections: int = 1,
        event_types: Iterable[EventType[Any]] = (),
    ) -> Iterator[EventStore]:
        """Lend an open store, of as many *connections* as are needed at a time (more, if those are few).

        A private server's folder is made only to "make" a store in it.
        """
        options: dict[str, Any] = {
            "schema": self.schema,
            "pool_size": max(connections, 10),
            "event_types": event_types,
        }
        if self._folder is None:
            with EventStore(_checked_conninfo(self._dsn), **options) as store:
                yield store
            return
        if purpose != "make" and not (self._folder / "PG_VERSION").exists():
            raise HindsightError(
                f"there is no private server's data in {self._folder}; this makes it: hindsight init{self.options()}"
            )
        with EmbeddedServer(self._folder) as server:
            database = self._database or ("postgres" if purpose != "look" else self._database_to_look_at(server))
            with EventStore(server.conninfo_for(database), **options) as store:
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
        "--schema", default="hindsight", show_default=True, metavar="NAME", callback=checked_by(check_schema_name),
        help="The schema that holds the store.",
    )  # fmt: skip
    @traceback_option
    @wraps(command)
    def with_source(
        *args: Any, dsn: str | None, embedded: str | None, database: str | None, schema: str, **options: Any
    ) -> T:
        return command(*args, source=DataSource(dsn, embedded, database, schema), **options)

    return with_source


def checked_by(check: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
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


traceback_option = click.option(
    "--traceback", is_flag=True, expose_value=False, callback=_set_traceback, help="Show where an error came from."
)


# --- Words and bytes out --------------------------------------------------------------------------------------------


def say(text: str) -> None:
    click.echo(text, err=True)


def print_line(text: str) -> None:
    click.echo(text)


def print_json(fields: dict[str, Any]) -> None:
    write_out(orjson.dumps(fields, option=orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE))


def write_out(data: bytes | bytearray) -> None:
    """Write bytes to stdout, whatever the locale, and flush, so that an error is ours to report."""
    if data and sys.stdout is not None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def _drop_stdout() -> None:
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def interrupted(how_to_go_on: str) -> NoReturn:
    say(f"\nInterrupted. {how_to_go_on}")
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
