"""The store's tables: the text that makes them under any schema name, and what the layout found there means."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import NamedTuple

import psycopg
from psycopg import sql

from .errors import SchemaError

LAYOUT = 1
"""Version of the tables and functions in schema.sql that this code writes and reads."""

# PostgreSQL cuts longer names off without an error: two schemas could become one.
MAX_NAME_BYTES = 63

_BODY = re.compile(r"\$body\$(.*?)\$body\$", re.DOTALL)
# A comment, in which nothing is replaced: a name that holds a line break would end it, and go on as SQL. Or a name in
# a literal ('hindsight' or 'hindsight.transaction_no', to be cast), or a plain one.
_NAME = re.compile(r"(?P<comment>--[^\n]*)|'hindsight(?P<member>\.\w+)?'|\bhindsight\b(?=\.|;)")


# Another script, as psql includes it.
_INCLUDE = re.compile(r"^\\ir (\w+\.sql)$", re.MULTILINE)


def check_schema_name(name: str) -> str:
    """Return *name* if PostgreSQL can use it as it is. Raises TypeError or ValueError."""
    if not isinstance(name, str):
        raise TypeError(f"schema must be a str, not {type(name).__name__}")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise ValueError(f"schema name {name!r} holds a lone surrogate") from None
    if not 0 < size <= MAX_NAME_BYTES or "\0" in name:
        raise ValueError(f"schema name must be 1 to {MAX_NAME_BYTES} bytes without NUL, not {name!r}")
    if name.startswith("pg_"):
        raise ValueError(f"PostgreSQL keeps schema names that begin with 'pg_' for itself: {name!r}")
    return name


def schema_sql(schema: str) -> str:
    """Return the script that makes the tables and functions under the name *schema*; it holds its own transaction."""
    quoted = sql.Identifier(check_schema_name(schema)).as_string(None)

    def named(match: re.Match[str]) -> str:
        if match["comment"] is not None:
            return match[0]
        if match[0].startswith("'"):
            return sql.Literal(quoted + (match["member"] or "")).as_string(None)
        return quoted

    def body(match: re.Match[str]) -> str:
        # As a literal: a name with $body$ in it would end a dollar-quoted one.
        return sql.Literal(_NAME.sub(named, match[1])).as_string(None)

    text = _INCLUDE.sub(lambda match: _packaged(match[1]), _packaged("schema.sql"))
    parts: list[str] = []
    end = 0
    for match in _BODY.finditer(text):
        parts += [_NAME.sub(named, text[end : match.start()]), body(match)]
        end = match.end()
    parts.append(_NAME.sub(named, text[end:]))
    return "".join(parts)


def _packaged(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


# What the functions raise when the store, or the server, is in a state that forbids the call. HS003, an expired bound,
# is not among them: the reader asks for another.
_REFUSALS = frozenset({"HS001", "HS002", "HS004", "HS005", "HS010", "HS011", "HS012", "HS013"})


def refusal_of(error: psycopg.Error, schema: str) -> SchemaError | None:
    """Return the SchemaError that *error* is in this package's words, or None if it is something else."""
    if error.sqlstate not in _REFUSALS:
        return None
    parts = [error.diag.message_primary or str(error), error.diag.message_hint or ""]
    return SchemaError(f"schema {schema!r}: {'. '.join(part.rstrip('.') for part in parts if part)}", schema=schema)


class StoreMeta(NamedTuple):
    """What a writer has to know of the store: the row of ``store_meta`` beside what the server says of itself."""

    layout: int
    oldest_writing_layout: int
    generation: int
    state: str
    same_server: bool
    sequence_lags: bool


def check_layout(schema: str, found: int | None) -> None:
    """Raise SchemaError unless *found*, the layout version in the database, is the one that this code knows."""
    if found is None:
        raise SchemaError(
            f"schema {schema!r} holds no event store; make it with create_schema() or `hindsight init`", schema=schema
        )
    if found > LAYOUT:
        raise SchemaError(
            f"schema {schema!r} has layout {found}, made by a newer version; this one knows layout {LAYOUT}:"
            " upgrade hindsight-fast",
            schema=schema,
            found_layout=found,
        )
    if found < LAYOUT:
        raise SchemaError(
            f"schema {schema!r} has the older layout {found}; bring it to layout {LAYOUT} with create_schema()"
            " or `hindsight init`",
            schema=schema,
            found_layout=found,
        )
