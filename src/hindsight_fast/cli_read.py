"""``hindsight read`` and ``hindsight export``: events out of the store, selected by the same options."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import wraps
from typing import Any, Final, ParamSpec, TypeVar
from uuid import UUID

import click
import orjson

from ._core import Cursor, RecordedEvent
from .cli_common import (
    DataSource,
    checked_by,
    common_options,
    interrupted,
    is_terminal,
    write_out,
)
from .errors import HindsightError
from .exporter import ExportProgress
from .progress import EventProgress
from .status import read_status
from .store import EventStore
from .streams import stream_uuid

P = ParamSpec("P")
T = TypeVar("T")

BLOCK_BYTES: Final = 128 * 1024
"""What ``read`` gathers before it writes."""

_HYPHENATED: Final = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}").fullmatch


def _stream_id(text: str) -> UUID:
    """The rule of the import format: the hyphenated form is a UUID, any other text a name."""
    if not text:
        raise ValueError("stream is empty")
    return UUID(text) if _HYPHENATED(text) else stream_uuid(text)


def _utf8(text: str) -> str:
    text.encode()  # bytes of another encoding come from the shell as lone surrogates: a ValueError
    return text


def selecting_options(command: Callable[..., T]) -> Callable[..., T]:
    """Give *command* the options that say which events, and pass them as the arguments of the store's methods."""

    @click.option(
        "--after", metavar="CURSOR", callback=checked_by(Cursor.parse), help="Only events behind it, as 812:3."
    )
    @click.option(
        "--type", "types", multiple=True, metavar="T", callback=checked_by(_utf8),
        help="Only events of this type; may be given many times.",
    )  # fmt: skip
    @click.option("--stream", metavar="NAME|UUID", callback=checked_by(_stream_id), help="Only events of this stream.")
    @click.option("--correlation-id", type=click.UUID, metavar="UUID", help="Only events of this cause.")
    @click.option("--limit", type=click.IntRange(0, 2**63 - 1), metavar="N", help="At most so many events.")
    @wraps(command)
    def with_selection(
        *args: Any, after: Cursor | None, types: list[str], stream: UUID | None, correlation_id: UUID | None,
        limit: int | None, **options: Any,
    ) -> T:  # fmt: skip
        selection = {
            "after": Cursor.BEGINNING if after is None else after,
            "event_types": types or None,
            "stream_id": stream,
            "correlation_id": correlation_id,
            "limit": limit,
        }
        return command(*args, selection=selection, **options)

    return with_selection


@click.command()
@selecting_options
@click.option("--no-data", is_flag=True, help="Leave data and metadata out.")
@common_options
def read(source: DataSource, selection: dict[str, Any], no_data: bool) -> None:
    """Write events to stdout in the order of the log, one JSON object a line, data as it is stored.

    Ends at the head of the log as it was at the start.
    """
    with source.open_store("look") as store:
        try:
            events = store.read(**selection)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        gathered = bytearray()
        for event in events:
            gathered += _event_line(event, no_data)
            if len(gathered) >= BLOCK_BYTES:
                write_out(gathered)
                gathered.clear()
        write_out(gathered)


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


# --- export ---------------------------------------------------------------------------------------------------------


@click.command()
@selecting_options
@click.option("--until", metavar="CURSOR", callback=checked_by(Cursor.parse), help="Only events up to it, included.")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, allow_dash=True), default="-", metavar="FILE",
    help="Where to write; compressed where it ends with .gz.  [default: -, standard output]",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace FILE if it exists already.")
@click.option("--json", "as_json", is_flag=True, help="The report as one JSON object.")
@common_options
def export(
    source: DataSource, selection: dict[str, Any], until: Cursor | None, output: str, force: bool, as_json: bool
) -> None:
    """Write events as lines that import takes, in the order of the log, up to its head as it was at the start.

    FILE gets its name when all is written; until then, and after a kill -9, there is only a FILE.*.part. The report
    goes to stdout, or to stderr where the events go to stdout; its last cursor is for the next export's --after.
    """
    selection["until"] = until
    with source.open_store("look") as store:
        done = _run_export(store, output, selection, force)
    click.echo(_export_json(done, output) if as_json else _export_text(done), err=output == "-")


def _run_export(store: EventStore, output: str, selection: dict[str, Any], force: bool) -> ExportProgress:
    began = time.monotonic()
    done = ExportProgress(0, 0, None, 0.0)
    # Where lines and bar would run into each other there is no bar; a pipe gets no lines of progress beside its own.
    quiet = output == "-" and (is_terminal(sys.stdout) or not is_terminal(sys.stderr))
    progress = None if quiet else EventProgress("exporting", _estimated_events(store, selection))

    def show(now: ExportProgress) -> None:
        nonlocal done
        done = now
        if progress is not None:
            progress.show(now.events, now.events)

    try:
        with progress or nullcontext():
            store.export_events(output, **selection, overwrite=force, progress=show)
    except FileExistsError:
        raise HindsightError(f"{output} exists already; --force replaces it") from None
    except KeyboardInterrupt:
        left = "The last line on stdout may be cut off" if output == "-" else f"{output} is as it was before"
        interrupted(f"{left}; the same command starts anew.")
    # Until the file is on disk, not only until the last page was written to it.
    return replace(done, seconds=time.monotonic() - began)


def _estimated_events(store: EventStore, selection: dict[str, Any]) -> int | None:
    """How many events there will be, as far as the planner knows without counting; None for a part of the log."""
    if any(selection[each] is not None for each in ("event_types", "stream_id", "correlation_id", "until")):
        return None
    if selection["after"] != Cursor.BEGINNING:
        return None
    estimate = read_status(store).estimated_events
    return estimate if estimate is None or selection["limit"] is None else min(estimate, selection["limit"])


def _export_json(done: ExportProgress, output: str) -> str:
    last_cursor = None if done.cursor is None else str(done.cursor)
    fields = {"output": output, "events": done.events, "bytes": done.bytes, "seconds": done.seconds}
    return orjson.dumps({**fields, "last_cursor": last_cursor}).decode()


def _export_text(done: ExportProgress) -> str:
    megabytes, seconds = done.bytes / 1e6, max(done.seconds, 1e-6)
    text = f"{done.events:,} events exported, {megabytes:,.1f} MB as text, {done.seconds:.2f} s"
    if done.cursor is not None:
        text += f", {done.events / seconds:,.0f} events/s; last cursor {done.cursor}"
    return text
