"""``hindsight import``: lines into the store."""

from __future__ import annotations

import os
import shlex
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import click
import psycopg

from .cli_common import (
    DataSource,
    checked_by,
    common_options,
    interrupted,
    print_json,
    print_line,
    say,
)
from .errors import HindsightError, ImportFailed, SchemaError
from .importer import MOST_JOBS, ImportProgress, ImportReport, check_import_id
from .progress import EventProgress
from .status import ImportStatus, read_status
from .store import EventStore


@click.command(name="import")
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, readable=True, allow_dash=True))
@click.option(
    "--import-id", metavar="ID", callback=checked_by(check_import_id),
    help="Under which name its progress is kept.  [default: the file's base name; required for -]",
)  # fmt: skip
@click.option(
    "--mode", type=click.Choice(["append", "initial"]), default="append",
    help="initial: fill an empty store faster; it takes no appends meanwhile.  [default: append]",
)  # fmt: skip
@click.option(
    "--abandon", metavar="ID", callback=checked_by(check_import_id),
    help="Instead of importing: give up an initial import that is not finished, and open the store.",
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
def import_(
    source: DataSource, file: str | None, import_id: str | None, abandon: str | None, as_json: bool, **options: Any
) -> None:
    """Append the events of FILE (NDJSON, .gz too; - for standard input) in their order.

    Killed or interrupted, the same command goes on where it stopped; what is stored already is skipped.
    """
    if abandon is not None:
        if file is not None:
            raise click.UsageError("--abandon ID takes no FILE")
        with source.open_store("write") as store:
            store.abandon_import(abandon)
        say(f"The import {abandon!r} is given up; the store is empty, and open.")
        return
    if file is None:
        raise click.UsageError("Missing argument 'FILE'.")
    if options["mode"] == "initial" and (options["jobs"] != 1 or options["dry_run"]):
        raise click.UsageError("--mode initial goes with one job, and not with --dry-run")
    if options["max_errors"] is not None and options["on_error"] == "stop":
        raise click.UsageError("--max-errors goes with --on-error PATH")
    if import_id is None:
        if file == "-":
            raise click.UsageError("standard input has no name: give --import-id ID, the same one to go on later")
        import_id = _checked_name(file)
        say(f"import id {import_id!r} (--import-id names another)")
    with source.open_store("write", connections=options["jobs"]) as store:
        try:
            before = _import_before(store, import_id)
        except SchemaError as error:
            if error.found_layout is not None:
                raise
            raise SchemaError(
                f"{error}. Create the schema first: hindsight init{source.options()}", schema=error.schema
            ) from error
        report = _run_import(store, file, import_id, before, options, source.options())
    if as_json:
        print_json(_import_dict(report))
    else:
        print_line(_import_text(report))


def _run_import(
    store: EventStore,
    file: str,
    import_id: str,
    before: ImportStatus | None,
    options: dict[str, Any],
    options_text: str,
) -> ImportReport:
    stored = before.events if before is not None else 0
    if before is not None:
        say(f"going on behind line {before.lines:,}: {stored:,} events are stored already")
    progress = EventProgress("checking" if options["dry_run"] else "importing", None, events=stored)

    def show(done: ImportProgress) -> None:
        nonlocal stored
        stored = done.events
        if done.phase != "lines":
            progress.show_share("building indexes" if done.phase == "indexes" else "switching", done.phase_share)
            return
        progress.show(done.events, done.source_bytes_read, done.source_size)

    try:
        with progress:
            return store.import_events(file, import_id=import_id, progress=show, **options)
    except ImportFailed:
        with suppress(HindsightError, psycopg.Error):
            if options["mode"] == "initial" and (state := read_status(store).state) != "open":
                say(f"The store accepts no appends: {state}")
        raise
    except ValueError as error:
        if isinstance(error, HindsightError):
            raise
        # A rate of nan, or a file for bad lines that is something else: what the options say cannot be done.
        raise click.UsageError(str(error)) from None
    except KeyboardInterrupt:
        if options["dry_run"]:
            interrupted("Nothing was stored.")
        same_input = ", with the same input," if file == "-" else ""
        if options["mode"] == "initial":
            interrupted(
                f"At least {stored:,} events of import {import_id!r} are loaded, and the store takes no appends until"
                f" all are. The same command{same_input} goes on behind them; this gives the import up:"
                f" hindsight import{options_text} --abandon {shlex.quote(import_id)}"
            )
        interrupted(
            f"At least {stored:,} events of import {import_id!r} are stored, and stay so."
            f" The same command{same_input} goes on behind them."
        )


def _import_before(store: EventStore, import_id: str) -> ImportStatus | None:
    imports = read_status(store).imports
    # Lines are those that all jobs have done.
    return next((each for each in imports if each.import_id == import_id and (each.lines or each.events)), None)


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
    # Of a dry run they are not known.
    streams = f"{report.new_streams:,} new streams, " if report.projected_seconds is None else ""
    lines = [
        first,
        f"{streams}{report.lines:,} lines, {megabytes:,.1f} MB",
        f"{report.seconds:.2f} s, {rate:,.0f} events/s, {megabytes / max(report.seconds, 1e-6):,.1f} MB/s",
    ]
    if report.first_cursor is not None:
        lines.append(f"cursors {report.first_cursor} to {report.last_cursor}")
    return "\n".join(lines)
