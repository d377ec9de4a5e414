"""The compiled core spoken to in the twins' words: their events in, their events out."""

from datetime import UTC
from uuid import UUID

import plain_python
from hindsight_fast._core import EventRows, RecordedEvent, decode_result, decode_row
from hindsight_fast.errors import MalformedRow
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


class PlainResult:
    """A query result as ``decode_result`` sees it without a reader: rows of values."""

    def __init__(self, rows, formats=None, column_count=11):
        self.rows, self.formats = rows, formats or [1] * column_count
        self.ntuples, self.nfields = len(rows), column_count

    def fformat(self, column):
        return self.formats[column]

    def get_value(self, row, column):
        return self.rows[row][column]


def decode_both_ways(row):
    """The outcome of ``decode_row`` and of ``decode_result`` over the same values, which must be one."""
    results = []
    calls = [lambda: decode_row(row, no_payload)]
    try:
        values = plain_python.split_row(bytes(row))
    except ValueError:
        pass
    else:
        calls.append(lambda: decode_result(PlainResult([values]), no_payload)[0])
    for call in calls:
        try:
            results.append(seen(call()))
        except MalformedRow:
            results.append(MalformedRow)
    assert all(result == results[0] for result in results)
    return results[0]


def expected_of(row):
    try:
        return plain_python.decode_row(bytes(row))
    except ValueError:
        return MalformedRow
