"""The next page, fetched by a thread of its own while the caller is busy with the page before it.

The whole fetch is one call that runs without the interpreter lock. With psycopg's cursor, which takes the lock back for
each socketful, a busy caller let it wait 5 ms (``sys.getswitchinterval``) dozens of times a page, and nothing was won;
in one call it took reading a million decoded events from 0.43 to 0.60 of the speed of fetching them undecoded.
"""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg.adapt import PyFormat, Transformer
from psycopg.pq import ExecStatus, Format

from .statements import numbered

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

    from .reading import Request


WORTHWHILE: Final = 0.5
"""From this part of a page's fetch on that the caller spends with the page, fetching ahead won more than it cost."""


class Pace:
    """Whether it pays to fetch ahead for this caller: one who only counts pages would wait longer for a thread."""

    def __init__(self) -> None:
        self._fetch_s = 0.0  # of one event
        self._handling_s = 0.0
        self._given_at = 0.0
        self._given = 0

    def fetched(self, events: int, seconds: float) -> None:
        """Learn what it took to fetch a page of *events* while the caller waited."""
        self._fetch_s = seconds / events

    def give(self, events: int) -> None:
        """A page of *events* goes to the caller now."""
        self._given, self._given_at = events, time.monotonic()

    def come_back(self) -> None:
        """The caller asks for the next page."""
        self._handling_s = (time.monotonic() - self._given_at) / self._given

    @property
    def fetch_ahead(self) -> bool:
        return self._handling_s > WORTHWHILE * self._fetch_s


class PageAhead:
    """A request for events under way on *connection*, which is given back by leaving *lent* as soon as they have come.

    It is a head start and nothing more: whatever goes wrong here is met again, and told, by who asks anew.
    """

    def __init__(
        self, request: Request, connection: psycopg.Connection[Any], lent: AbstractContextManager[object]
    ) -> None:
        self.request = request
        self._result: PGresult | None = None
        self._text = numbered(request.statement)
        adapting = Transformer(connection)
        self._values = adapting.dump_sequence(request.parameters, [PyFormat.BINARY] * len(request.parameters))
        self._types, self._formats = adapting.types, adapting.formats
        # A daemon: an interpreter that ends does not wait for a server.
        self._thread = threading.Thread(
            target=self._fetch, args=(connection, lent), name="hindsight-read-ahead", daemon=True
        )
        self._thread.start()

    def result(self) -> PGresult | None:
        """Wait for the page. None if it cannot be had this way; ask in the ordinary one then."""
        self._thread.join()
        return self._result

    def _fetch(self, connection: psycopg.Connection[Any], lent: AbstractContextManager[object]) -> None:
        try:
            with lent:
                result = connection.pgconn.exec_params(
                    self._text, self._values, self._types, self._formats, Format.BINARY
                )
                if result.status == ExecStatus.TUPLES_OK:
                    self._result = result
        except Exception:  # noqa: BLE001 - the same statement asked in the ordinary way tells what is wrong
            pass
