"""``hindsight schema``: what is stored, seen through the application's own types."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .cli_common import (
    FAILED,
    DataSource,
    common_options,
    interrupted,
    is_terminal,
    print_json,
    print_line,
    say,
)
from .errors import EventParseError, HindsightError
from .events import EventType
from .progress import EventProgress
from .schema_check import SchemaCheck, VersionCount
from .status import read_status


@click.group()
def schema() -> None:
    """Look at stored events through the application's types."""


@schema.command()
@click.option(
    "--types", "place", required=True, metavar="MODULE:ATTRIBUTE",
    help="Where the application lists its event types, as in shop.events:event_types.",
)  # fmt: skip
@click.option(
    "--sample", type=click.IntRange(min=1), metavar="N",
    help="Decode N events of each name and version, drawn from the whole log.  [default: all]",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object a failure, and a last one with the inventory.")
@common_options
def check(source: DataSource, place: str, sample: int | None, as_json: bool) -> None:
    """Decode and upcast stored events: an inventory by name and version, and every event that cannot be read.

    Exits with 1 if there is any. Imports MODULE, from the current folder too, and so runs its code.
    """
    event_types = load_event_types(place)
    began = time.monotonic()
    with source.open_store("look", event_types=event_types) as store:
        # None on a terminal that also gets the failures: the bar would stand between them.
        progress = None if is_terminal(sys.stdout) else EventProgress("checking", read_status(store).estimated_events)
        tell = None if progress is None else lambda passed: progress.show(passed, passed)
        found = SchemaCheck(store, sample=sample, progress=tell)
        try:
            with progress or nullcontext():
                for error in found:
                    if as_json:
                        print_json(_failure_dict(error))
                    else:
                        print_line(_failure_text(error))
        except KeyboardInterrupt:
            interrupted("Nothing was changed; the same command begins anew.")
    inventory = found.inventory
    failed = sum(each.failed for each in inventory)
    if as_json:
        print_json({"inventory": [asdict(each) for each in inventory], "failed": failed})
    else:
        print_line(_inventory_text(inventory))
        checked = sum(each.checked for each in inventory)
        say(f"{checked:,} events checked, {failed:,} failed, {time.monotonic() - began:.2f} s")
    if failed:
        sys.exit(FAILED)


def load_event_types(place: str) -> list[EventType[Any]]:
    """Return the event types that ``module:attribute`` holds: a list of them, or a single one.

    Raises click.BadParameter, which says what is wrong with the place.
    """
    module_name, colon, attribute = place.partition(":")
    if not colon or not module_name or not attribute:
        raise click.BadParameter(f"{place!r} is not MODULE:ATTRIBUTE", param_hint="--types")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module_name)
        for name in attribute.split("."):
            found = getattr(found, name)
    except HindsightError:
        raise  # a definition with a hole in it: it names the hole
    except Exception as error:
        raise click.BadParameter(f"{place}: {type(error).__name__}: {error}", param_hint="--types") from error
    given: Any = found
    event_types = [given] if isinstance(given, EventType) else list(given) if isinstance(given, Iterable) else [given]
    for each in event_types:
        if not isinstance(each, EventType):
            raise click.BadParameter(f"{place} holds {type(each).__name__}, not EventTypes", param_hint="--types")
    return event_types


def _failure_text(error: EventParseError) -> str:
    where = "" if error.path is None else f" (at {error.path})"
    return f"{error.cursor}  {error.name} version {error.version}, event {error.event_id}: {error.reason}{where}"


def _failure_dict(error: EventParseError) -> dict[str, Any]:
    return {
        "cursor": str(error.cursor),
        "event_id": error.event_id,
        "stream_id": error.stream_id,
        "stream_version": error.stream_version,
        "name": error.name,
        "version": error.version,
        "reason": error.reason,
        "path": error.path,
    }


def _inventory_text(inventory: list[VersionCount]) -> str:
    width = max([len(each.name) for each in inventory], default=0)
    lines = [f"{'name':{width}}  version      events     checked      failed"]
    for each in inventory:
        note = "" if each.known else "  no type of this name: read as plain JSON"
        lines.append(
            f"{each.name:{width}}  {each.version:7}  {each.events:10,}  {each.checked:10,}  {each.failed:10,}{note}"
        )
    return "\n".join(lines)
