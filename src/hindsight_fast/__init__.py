"""A fast, trustworthy event store for Python on PostgreSQL."""

from ._core import Cursor, RecordedEvent
from .errors import (
    EmbeddedServerError,
    EventParseError,
    HindsightError,
    ImportFailed,
    MalformedRow,
    SchemaError,
    StoreClosed,
)
from .exporter import ExportProgress
from .importer import ImportProgress, ImportReport
from .store import EventStore
from .streams import STREAM_NAMESPACE, stream_uuid

__all__ = [
    "STREAM_NAMESPACE",
    "Cursor",
    "EmbeddedServerError",
    "EventParseError",
    "EventStore",
    "ExportProgress",
    "HindsightError",
    "ImportFailed",
    "ImportProgress",
    "ImportReport",
    "MalformedRow",
    "RecordedEvent",
    "SchemaError",
    "StoreClosed",
    "stream_uuid",
]
