"""The command line: demo, init, import, export, read, schema, status. Data on stdout, talk on stderr."""

from __future__ import annotations

import io
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Final

import click

from .cli_common import (
    Commands,
    DataSource,
    common_options,
    interrupted,
    print_json,
    print_line,
    say,
    traceback_option,
    write_out,
)
from .cli_import import import_
from .cli_read import export, read
from .cli_schema import schema
from .demo import run_demo
from .schema import LAYOUT, schema_sql
from .status import OpenAppend, StoreStatus, read_status

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


def main() -> None:
    """The entry point ``hindsight``."""
    for stream in (sys.stdout, sys.stderr):
        # Under a locale that cannot show a character, an escape instead of an error.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    commands(prog_name="hindsight")


@click.group(cls=Commands, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hindsight-fast")
@traceback_option
def commands() -> None:
    """A fast, trustworthy event store on PostgreSQL.

    Data goes to stdout, talk and progress to stderr. HINDSIGHT_DEBUG=1 shows tracebacks, as --traceback does.
    """


for command in (import_, export, read, schema):
    commands.add_command(command)


# --- demo -----------------------------------------------------------------------------------------------------------


@commands.command()
@click.option("--events", type=click.IntRange(min=1), default=1_000_000, show_default=True, metavar="N")
@click.option(
    "--embedded", "folder", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
    help="Where to keep the data.  [default: a folder of its own; its path is shown]",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of the text.")
@traceback_option
def demo(events: int, folder: Path | None, as_json: bool) -> None:
    """Import N events, read them back, compare every one, and show how fast it was.

    Starts a private server on a kept folder and works in its database "demo", which is made anew by every run; no
    other database is touched. Numbers are shown only if every event came back as it was written.
    """
    try:
        report = run_demo(events, folder)
    except KeyboardInterrupt:
        again = f"hindsight demo --events {events}" + (f" --embedded {shlex.quote(str(folder))}" if folder else "")
        interrupted(f"No number is shown, as the check has not been made. To start afresh: {again}")
    print_json(report.to_dict()) if as_json else print_line(str(report))


# --- init -----------------------------------------------------------------------------------------------------------


@commands.command()
@click.option("--print", "only_print", is_flag=True, help="Only write the SQL to stdout, for a DBA; needs no server.")
@common_options
def init(source: DataSource, only_print: bool) -> None:
    """Create the tables and functions, or bring older ones up to date. Harmless to repeat."""
    if only_print:
        write_out(schema_sql(source.schema).encode())
        return
    with source.open_store("make") as store:
        store.create_schema()
        say(f"Schema {source.schema!r} is ready (layout {LAYOUT}): {source.place(store)}")


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
        print_json(
            {
                **asdict(found),
                "head": head,
                "estimated_events": found.estimated_events,
                "estimated_streams": found.estimated_streams,
            }
        )
    else:
        print_line(_status_text(found, place))


def _status_text(found: StoreStatus, place: str) -> str:
    lines = [
        f"server   PostgreSQL {found.server_version}, {place}",
        f"schema   {found.schema}, layout {found.layout}, {found.state}, generation {found.generation}",
        f"head     {'none: the store is empty' if found.head is None else found.head}",
        f"bound    {found.bound} (transactions from here on may still be open)",
        *map(_open_append, found.open_appends),
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


def _open_append(found: OpenAppend) -> str:
    who = f"process {found.pid}" if found.prepared_as is None else f"prepared as {found.prepared_as!r}"
    if found.application_name:
        who += f" ({found.application_name})"
    since = "" if found.open_s is None else f", open for {found.open_s:,.1f} s"
    state = "" if found.state is None else f", {found.state}"
    return f"append   {who}{state}{since}: readers wait at {found.transaction_no}"


def _estimate(rows: int | None) -> str:
    return "not estimated yet (the server has not analysed the table)" if rows is None else f"about {rows:,}"
