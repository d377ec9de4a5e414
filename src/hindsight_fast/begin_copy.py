"""How every append begins, one by COPY: a statement that locks, registers and draws, and what it answers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import psycopg
from psycopg.adapt import Dumper
from psycopg.pq import Format
from psycopg.rows import tuple_row

from ._core import EventRows
from .schema import refusal_of

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

    from .statements import Statements

_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)


class Begun(NamedTuple):
    """What ``EventRows.place`` takes: the append's number, its streams' new versions as a binary bigint[], the time."""

    transaction_no: int
    head_versions: bytes
    started_at: datetime


class UuidArray(bytes):
    """A ``uuid[]`` in PostgreSQL's binary form, as the core makes it."""


class BigintArray(bytes):
    """A ``bigint[]`` in PostgreSQL's binary form."""


class _UuidArrayDumper(Dumper):
    format = Format.BINARY
    oid = 2951

    def dump(self, obj: UuidArray) -> bytes:
        return obj


class _BigintArrayDumper(Dumper):
    format = Format.BINARY
    oid = 1016

    def dump(self, obj: BigintArray) -> bytes:
        return obj


def begin_copy(connection: psycopg.Connection[Any], statements: Statements, rows: EventRows) -> Begun:
    """Lock and advance the heads of the rows' streams, register, and draw a number. Raises as ``execute`` does."""
    stream_ids, event_counts = rows.stream_arrays()
    parameters = (UuidArray(stream_ids), BigintArray(event_counts))
    result = execute(connection, statements, statements.begin_copy, parameters).pgresult
    assert result is not None
    return begun_of(result)


def begun_of(result: PGresult) -> Begun:
    """Return what BEGIN_COPY answered, in binary format."""
    transaction_no, head_versions, started_at = (result.get_value(0, column) for column in range(3))
    assert transaction_no is not None
    assert head_versions is not None
    assert started_at is not None
    moment = _EPOCH + timedelta(microseconds=int.from_bytes(started_at, "big", signed=True))
    return Begun(int.from_bytes(transaction_no, "big"), head_versions, moment)


def execute(
    connection: psycopg.Connection[Any], statements: Statements, statement: bytes, parameters: tuple[Any, ...]
) -> psycopg.Cursor[tuple[Any, ...]]:
    """Run a statement in binary format. Raises SchemaError where the store refuses it."""
    cursor: psycopg.Cursor[tuple[Any, ...]] = psycopg.Cursor(connection, row_factory=tuple_row)
    cursor.adapters.register_dumper(UuidArray, _UuidArrayDumper)
    cursor.adapters.register_dumper(BigintArray, _BigintArrayDumper)
    try:
        return cursor.execute(statement, parameters, binary=True, prepare=False)
    except psycopg.Error as error:
        if (refusal := refusal_of(error, statements.schema)) is not None:
            raise refusal from error
        raise
