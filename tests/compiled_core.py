"""The compiled core spoken to in the twins' words: their events in, their events out."""

from datetime import UTC
from uuid import UUID

import plain_python
from hindsight_fast._core import EventRows, RecordedEvent
from plain_python import PlainEvent, PlainNewEvent


def rows_of(events: list[PlainNewEvent]) -> EventRows:
    rows = EventRows()
    for event in events:
        rows.add(
            event.event_id.bytes,
            event.stream_id.bytes,
            event.event_name,
            event.event_version,
            event.payload,
            event.created_at,
            None if event.correlation_id is None else event.correlation_id.bytes,
            event.metadata,
        )
    return rows


def streams_in_byte_order(events: list[PlainNewEvent]) -> list[UUID]:
    return sorted({event.stream_id for event in events}, key=lambda stream_id: stream_id.bytes)


def event_counts(events: list[PlainNewEvent]) -> dict[UUID, int]:
    return {stream_id: sum(e.stream_id == stream_id for e in events) for stream_id in streams_in_byte_order(events)}


def head_array(events: list[PlainNewEvent], heads: dict[UUID, int]) -> bytes:
    return plain_python.encode_bigint_array([heads[stream_id] for stream_id in streams_in_byte_order(events)])


def no_payload(event: RecordedEvent) -> None:
    """A decoder of payloads for tests that do not ask for one."""
    raise AssertionError("the payload was asked for")


def seen(event: RecordedEvent) -> PlainEvent:
    """What a RecordedEvent shows, as the twin's dataclass."""
    assert type(event) is RecordedEvent
    assert event.created_at.tzinfo is UTC
    return PlainEvent(
        transaction_no=event.cursor.transaction_no,
        sequence_no=event.cursor.sequence_no,
        event_id=event.event_id,
        stream_id=event.stream_id,
        stream_version=event.stream_version,
        created_at=event.created_at,
        event_version=event.version,
        correlation_id=event.correlation_id,
        event_name=event.name,
        payload=event.data,
        metadata=event.metadata_json,
    )
