"""Reading event rows out of psycopg's results, whichever psycopg implementation is loaded."""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Any

import msgspec
import psycopg

from ._core import RecordedEvent, ResultReader, decode_result
from .errors import EventParseError

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

# Exact where orjson is not: an integer beyond 64 bits stays an integer, whatever its size.
_decode_json = msgspec.json.Decoder().decode


@cache
def result_reader() -> ResultReader | None:
    """Return the core's reader for the libpq that psycopg has loaded; None under psycopg's pure Python implementation.

    Without it results are read field by field through ``get_value``, which gives the same events more slowly.
    """
    module = {"c": "psycopg_c.pq", "binary": "psycopg_binary.pq"}.get(psycopg.pq.__impl__)
    library = getattr(sys.modules.get(module), "__file__", None) if module else None
    if library is None:
        return None
    try:
        return ResultReader(library)
    except OSError:
        return None


def decode_payload(event: RecordedEvent) -> Any:
    """Return the payload of *event* as plain Python values. Raises EventParseError."""
    try:
        return _decode_json(event.data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise EventParseError.of(event, str(error)) from error


def events_of(result: PGresult) -> list[RecordedEvent]:
    """Return the events that a query for EVENT_COLUMNS in binary format answered. Raises MalformedRow."""
    return decode_result(result, decode_payload, result_reader())
