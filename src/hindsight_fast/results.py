"""Reading event rows out of psycopg's results, whichever psycopg implementation is loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import psycopg

from ._core import EventBatch, ResultReader

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

    from ._core import RecordedEvent


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


# isinstance(batch, Sequence): an extension type cannot inherit it.
Sequence.register(EventBatch)


def events_of(result: PGresult, decode_payload: Callable[[RecordedEvent], Any] | None = None) -> EventBatch:
    """Return the events that a query for EVENT_COLUMNS in binary format answered. Raises MalformedRow.

    ``decode_payload(event)`` is called when a payload is first asked for; without it that is the JSON in plain values.
    """
    return EventBatch(result, decode_payload, result_reader())
