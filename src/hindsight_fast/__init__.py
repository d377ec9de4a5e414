"""A fast, trustworthy event store for Python on PostgreSQL."""

from ._core import Cursor, RecordedEvent
from .async_store import AsyncEventStore
from .errors import (
    AppendOutcomeUnknown,
    ConcurrencyConflict,
    EmbeddedServerError,
    EventDefinitionError,
    EventEncodeError,
    EventParseError,
    HindsightError,
    IdempotencyConflict,
    ImportFailed,
    MalformedRow,
    SchemaError,
    StoreClosed,
    WaitTimeout,
)
from .events import EventType, NewEvent
from .exporter import ExportProgress
from .importer import ImportProgress, ImportReport
from .store import EventStore
from .streams import STREAM_NAMESPACE, stream_uuid
from .writes import (
    ANY,
    NO_STREAM,
    STREAM_EXISTS,
    AppendResult,
    StreamHistory,
    StreamWrite,
    Transaction,
    VersionMismatch,
)

__all__ = [
    "ANY",
    "NO_STREAM",
    "STREAM_EXISTS",
    "STREAM_NAMESPACE",
    "AppendOutcomeUnknown",
    "AppendResult",
    "AsyncEventStore",
    "ConcurrencyConflict",
    "Cursor",
    "EmbeddedServerError",
    "EventDefinitionError",
    "EventEncodeError",
    "EventParseError",
    "EventStore",
    "EventType",
    "ExportProgress",
    "HindsightError",
    "IdempotencyConflict",
    "ImportFailed",
    "ImportProgress",
    "ImportReport",
    "MalformedRow",
    "NewEvent",
    "RecordedEvent",
    "SchemaError",
    "StoreClosed",
    "StreamHistory",
    "StreamWrite",
    "Transaction",
    "VersionMismatch",
    "WaitTimeout",
    "stream_uuid",
]
