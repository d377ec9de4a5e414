"""Rows to encode, to place, to decode and to look at: what the tests of the core's rows share."""

from dataclasses import replace
from datetime import UTC, datetime, tzinfo
from uuid import UUID

from hypothesis import strategies as st

import plain_python
from compiled_core import event_counts
from event_strategies import moments, new_events
from hindsight_fast._core import EventRows
from plain_python import PlainEvent, PlainNewEvent

NOW = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
EVENT = PlainEvent(
    transaction_no=812,
    sequence_no=3,
    event_id=UUID(int=1 << 100 | 1),
    stream_id=UUID(int=2 << 100 | 2),
    stream_version=44,
    created_at=datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC),
    event_version=2,
    correlation_id=UUID(int=3 << 100 | 3),
    event_name="größe",
    payload=b'{"a": 1}',
    metadata=b'{"b": 2}',
)
BARE = replace(EVENT, correlation_id=None, metadata=None)
EMPTY = replace(BARE, payload=b"", metadata=b"")
ROW, BARE_ROW, EMPTY_ROW = (plain_python.encode_row(event) for event in (EVENT, BARE, EMPTY))

A, B = bytes(15) + b"\1", bytes(15) + b"\2"


@st.composite
def placed_events(draw, max_size=12):
    """Events and everything ``place`` needs for them."""
    events = draw(st.lists(new_events, min_size=1, max_size=max_size))
    before = st.integers(-1, 5) | st.integers(-1, 2**63 - 1 - len(events))
    heads = {stream_id: draw(before) + count for stream_id, count in event_counts(events).items()}
    return events, draw(st.integers(0, 2**63 - 1)), heads, draw(moments)


def one_row(stream_id=A):
    rows = EventRows()
    rows.add(b"e" * 16, stream_id, "name", 1, b"{}")
    return rows


def state_of(rows):
    """Everything that can be seen of rows."""
    everything = [rows.row(n) for n in range(len(rows))]
    try:
        sent = b"".join(rows.blocks())
    except ValueError:
        sent = None
    return len(rows), rows.byte_count, rows.stream_count, rows.stream_arrays(), everything, sent


class Raising(tzinfo):
    def utcoffset(self, moment):
        raise RuntimeError("no offset today")


THREE_STREAMS = [PlainNewEvent(UUID(int=n), UUID(int=n % 3 + 1), "name", 1, b"{}") for n in range(7)]
THREE_HEADS = plain_python.encode_bigint_array([10, 20, 30])
