"""Whether an idle connection's server is still there, found out without asking it.

A round trip before each use of a pooled connection cost as much as the shortest statements themselves. But a server
that ends a connection closes its socket, so the kernel knows: while nobody asks anything, an idle socket has nothing
to read. Only a host that vanished without a word is not noticed so; that neither is by a round trip, in good time.
"""

from __future__ import annotations

import select
from typing import Any, Final

import psycopg

MOST_MESSAGES: Final = 100
"""How often what an idle connection says is read, before its server is taken for gone: nothing may go on for ever."""


def server_has_gone(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> bool:
    """Return whether the server has ended this idle connection. Takes 1 µs and does not wait."""
    pgconn = connection.pgconn
    try:
        idle_socket = select.poll()
        idle_socket.register(pgconn.socket, select.POLLIN)
        for _ in range(MOST_MESSAGES):
            # The end of a connection stays readable in the kernel, whatever libpq or TLS hold before it.
            if not idle_socket.poll(0):
                return False
            # It may be a notification that the caller listens for: libpq keeps it. The end raises.
            pgconn.consume_input()
            pgconn.is_busy()
    except (psycopg.Error, OSError, ValueError):
        pass
    return True
