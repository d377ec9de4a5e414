"""Where the store is, and how its connections are made: decisions only, no I/O."""

from __future__ import annotations

import os
from typing import Any

from psycopg import ConnectionInfo, ProgrammingError
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from .errors import HindsightError

# What libpq itself takes from the environment; any of them set means that somebody named a server.
LIBPQ_VARIABLES = ("PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGUSER", "PGSERVICE", "PGSERVICEFILE")

# A host that is gone without a word ends its connection within a minute, not after the system's two hours. Keepalives
# are silent while sent data waits to be acknowledged; for that the system takes 15 minutes, without tcp_user_timeout
# (milliseconds; libpq passes it over on Unix sockets, and on systems that do not have it).
KEEPALIVES: dict[str, Any] = {
    "keepalives_idle": 15,
    "keepalives_interval": 10,
    "keepalives_count": 4,
    "tcp_user_timeout": 55_000,
}

RECONNECT_S = 1.0
"""After how long a pool gives an attempt to connect up; if somebody still waits it then begins another. Of itself it
would pause for longer each time, and find a server that was gone for a minute up to another minute later."""


def find_conninfo(conninfo: str) -> str:
    """Return *conninfo*, or what the environment says where it is empty.

    In this order: ``HINDSIGHT_DATABASE_URL``, ``DATABASE_URL``, libpq's own ``PG*`` variables (an empty string is
    returned for them). Raises HindsightError if none is set: no server is ever started, or guessed, unasked.
    """
    if conninfo:
        return conninfo
    for name in ("HINDSIGHT_DATABASE_URL", "DATABASE_URL"):
        if value := os.environ.get(name):
            return value
    if any(os.environ.get(name) for name in LIBPQ_VARIABLES):
        return ""
    raise HindsightError(
        "no database named: pass conninfo, or set HINDSIGHT_DATABASE_URL, DATABASE_URL or libpq's PGHOST, PGDATABASE, …"
        " (`hindsight --help` tells of --embedded, a private server to try things with)"
    )


def connection_conninfo(conninfo: str) -> str:
    """Return *conninfo* with what every connection of the store's own needs, the caller's settings first."""
    try:
        given = conninfo_to_dict(conninfo)
    except ProgrammingError:
        # Not quoted, and not chained: libpq's message repeats the part it stumbled over, and that can be the password.
        raise HindsightError(
            "the connection string cannot be read; it is not shown here, as it may hold a password. In a URL,"
            " characters such as / @ : % and spaces in user and password are written %2F %40 %3A %25 %20"
        ) from None
    settings = {"application_name": "hindsight_fast", **KEEPALIVES, **given}
    # Not the caller's to choose: stored bytes are UTF-8, and any other encoding would be converted on the way.
    settings["client_encoding"] = "UTF8"
    return make_conninfo("", **settings)


def check_encodings(info: ConnectionInfo) -> None:
    """Raise HindsightError unless client and database both speak UTF-8.

    Over a LATIN1 connection events were stored mangled, without an error.
    """
    for setting, what in (("server_encoding", "database"), ("client_encoding", "connection")):
        found = info.parameter_status(setting)
        if found != "UTF8":
            raise HindsightError(f"the {what}'s encoding is {found}; events are stored over UTF8 only")


def shown_conninfo(conninfo: str) -> str:
    """Return *conninfo* for a repr or a log line: host, port, database and user, never a password or a file of keys."""
    try:
        given = conninfo_to_dict(conninfo)
    except Exception:  # noqa: BLE001 - a repr must not fail, and what cannot be parsed is not shown
        return "<unreadable>"
    return " ".join(f"{key}={given[key]}" for key in ("host", "port", "dbname", "user") if given.get(key))
