"""How a store does: what ``hindsight status`` shows."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ._core import Cursor
from .errors import SchemaError
from .statements import TABLE_SIZES

if TYPE_CHECKING:
    from .store import EventStore


@dataclass(frozen=True, slots=True)
class TableStatus:
    """One table with its indexes; ``estimated_rows`` is None until the server has analysed it."""

    name: str
    estimated_rows: int | None
    bytes: int


@dataclass(frozen=True, slots=True)
class ImportStatus:
    """How far an import has come: lines and (decompressed) bytes of its source that are done, events stored."""

    import_id: str
    lines: int
    bytes: int
    events: int
    finished: bool
    started_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class OpenAppend:
    """An append whose transaction is open: readers wait for it before ``transaction_no``.

    ``pid`` is its server process; None for a prepared transaction, which has a name, ``prepared_as``. ``state``,
    ``wait_event`` (as in pg_stat_activity) and ``open_s``, how long the transaction has been open, are None where the
    role is not told of other users' sessions.
    """

    transaction_no: int
    pid: int | None
    prepared_as: str | None
    application_name: str | None
    state: str | None
    wait_event: str | None
    open_s: float | None


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """What the store says of itself.

    ``head`` is the last event that every reader may see; transactions from ``bound`` on may still be open, and those
    that are stand in ``open_appends``, the one that holds readers up first.
    """

    server_version: str
    schema: str
    layout: int
    state: str
    generation: int
    head: Cursor | None
    bound: int
    tables: tuple[TableStatus, ...]
    imports: tuple[ImportStatus, ...]
    open_appends: tuple[OpenAppend, ...]

    @property
    def estimated_events(self) -> int | None:
        return self._estimated_rows("events")

    @property
    def estimated_streams(self) -> int | None:
        return self._estimated_rows("stream_heads")

    def _estimated_rows(self, name: str) -> int | None:
        return next((table.estimated_rows for table in self.tables if table.name == name), None)


def read_status(store: EventStore) -> StoreStatus:
    """Ask an open *store*. Counts nothing, so it is quick however long the log is. Raises SchemaError."""
    statements = store._statements
    with store._connection() as connection:

        def ask(statement: bytes, *parameters: Any) -> list[Any]:
            return store._ask(connection, statement, parameters).fetchall()

        meta = ask(statements.store_meta)
        if not meta:
            raise SchemaError(f"schema {store.schema!r} has lost its row of store_meta", schema=store.schema)
        layout, _oldest_writing_layout, generation, state, *_ = meta[0]
        bound, server_run, _large_events, _blocked = ask(statements.read_barrier)[0]
        head = ask(statements.head, bound, server_run)
        # Before its first ANALYZE a table has -1 rows.
        tables = [
            TableStatus(name, rows if rows >= 0 else None, size)
            for name, rows, size in ask(TABLE_SIZES.encode(), statements.quoted_schema)
        ]
        return StoreStatus(
            server_version=connection.info.parameter_status("server_version") or "unknown",
            schema=store.schema,
            layout=layout,
            state=state,
            generation=generation,
            head=Cursor(*head[0]) if head else None,
            bound=bound,
            tables=tuple(sorted(tables, key=lambda table: table.name)),
            imports=tuple(ImportStatus(*row) for row in ask(statements.list_imports)),
            open_appends=tuple(OpenAppend(*row) for row in ask(statements.open_appends)),
        )
