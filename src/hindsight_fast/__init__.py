"""A fast, trustworthy event store for Python on PostgreSQL."""

from ._core import Cursor, RecordedEvent
from .async_store import AsyncEventStore
from .errors import (
    ConcurrencyConflict,
    EmbeddedServerError,
    EventDefinitionError,
    EventEncodeError,
    EventParseError,
    HindsightError,
    ImportFailed,
    MalformedRow,
    SchemaError,
    StoreClosed,
)
from .events import EventType, NewEvent
from .exporter import ExportProgress
from .importer import ImportProgress, ImportReport
from .store import EventStore
from .streams import STREAM_NAMESPACE, stream_uuid
from .writes import ANY, NO_STREAM, STREAM_EXISTS, AppendResult, VersionMismatch

__all__ = [
    "ANY",
    "NO_STREAM",
    "STREAM_EXISTS",
    "STREAM_NAMESPACE",
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
    "ImportFailed",
    "ImportProgress",
    "ImportReport",
    "MalformedRow",
    "NewEvent",
    "RecordedEvent",
    "SchemaError",
    "StoreClosed",
    "VersionMismatch",
    "stream_uuid",
]
