"""Recorded events into lines of the import format: the compiled encoder against its plain twin."""

import json
import tracemalloc
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import plain_python
from compiled_core import no_payload
from event_strategies import events
from hindsight_fast._core import RecordedEvent, decode_row, export_lines
from hindsight_fast.errors import MalformedRow
from leaks import kept_bytes
from plain_python import PlainEvent

EVENT = PlainEvent(
    transaction_no=812,
    sequence_no=3,
    event_id=UUID(int=1 << 100 | 0xAB),
    stream_id=UUID(int=2 << 100 | 0xCD),
    stream_version=44,
    created_at=datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC),
    event_version=2,
    correlation_id=UUID(int=3 << 100 | 0xEF),
    event_name="größe",
    payload=b'{"a": 1}',
    metadata=b'{"b": 2}',
)

# Dense in what matters here: quotes, escapes, every control character, white space around and between.
letters = st.sampled_from('"\\/\x01\x07\b\t\n\v\f\r\x1b\x1f \x7f\x80\u2028ß€\ufeff\uffff😀az')
awkward = st.text(letters, min_size=1, max_size=20)
stored = st.lists(st.sampled_from([b"\n", b"\r", b"\t", b" ", b"{}", b"null", b'"\\n"', b"\0"]), max_size=8).map(
    b"".join
)


def recorded(event: PlainEvent) -> RecordedEvent:
    return decode_row(plain_python.encode_row(event), no_payload)


def line_of(event: PlainEvent) -> bytes:
    return b"".join(export_lines([recorded(event)]))


def expected_of(event: PlainEvent) -> bytes | None:
    try:
        return plain_python.export_line(event)
    except ValueError:
        return None


@given(events, st.none() | awkward, st.none() | stored, st.none() | stored)
@example(EVENT, "".join(map(chr, range(1, 128))), None, None)
@example(EVENT, None, b" \r\n{}\t", b"\nnull ")
@example(EVENT, None, b"\n", None)
@example(EVENT, None, b"{}", b"nulls")
def test_a_line_is_what_the_twin_writes(
    event: PlainEvent, name: str | None, payload: bytes | None, metadata: bytes | None
) -> None:
    event = replace(
        event,
        event_name=name or event.event_name,
        payload=payload or event.payload,
        metadata=metadata or event.metadata,
    )
    expected = expected_of(event)
    if expected is None:
        with pytest.raises(MalformedRow, match="holds no JSON value"):
            line_of(event)
    else:
        assert line_of(event) == expected


@given(events, awkward)
def test_a_line_is_json_that_says_what_the_event_is(event: PlainEvent, name: str) -> None:
    event = replace(event, event_name=name, payload=b'{\n"a":[]}', metadata=None)
    line = line_of(event)
    assert line.count(b"\n") == 1
    fields = json.loads(line)
    assert fields.pop("correlation_id", None) == (event.correlation_id and str(event.correlation_id))
    moment = datetime.fromisoformat(fields.pop("time"))
    assert (moment, moment.tzinfo) == (event.created_at.astimezone(UTC), UTC)
    assert fields == {
        "stream": str(event.stream_id),
        "type": name,
        "data": {"a": []},
        "version": event.event_version,
        "id": str(event.event_id),
    }


def test_a_line_looks_like_this() -> None:
    assert line_of(EVENT).decode() == (
        '{"stream":"00000020-0000-0000-0000-0000000000cd","type":"größe","data":{"a": 1},"version":2,'
        '"id":"00000010-0000-0000-0000-0000000000ab","time":"2024-05-06T07:08:09.123456Z",'
        '"correlation_id":"00000030-0000-0000-0000-0000000000ef","metadata":{"b": 2}}\n'
    )


def test_every_day_of_the_calendar_has_its_name() -> None:
    """Each day of four hundred years and the ends of each of the other years, where the leap days are."""
    days = [datetime(1600, 3, 1, tzinfo=UTC) + timedelta(days=n) for n in range(146_097)]
    for year in range(1, 10_000):
        days += [datetime(year, month, day, tzinfo=UTC) for month, day in ((1, 1), (2, 28), (3, 1), (12, 31))]
    last = timedelta(hours=23, minutes=59, seconds=59, microseconds=999_999)
    bare = replace(EVENT, correlation_id=None, metadata=None)
    made = (recorded(replace(bare, created_at=day + last)) for day in days)
    at = line_of(bare).index(b"2024-05-06")
    found = [line[at : at + 27].decode() for block in export_lines(made) for line in block.splitlines()]
    assert found == [day.date().isoformat() + "T23:59:59.999999Z" for day in days]


@pytest.mark.parametrize("version", [0, 9, 10, 4711, 999_999_999, 1_000_000_000, 2**31 - 1])
def test_numbers_of_every_length_are_written(version: int) -> None:
    assert b',"version":%d,' % version in line_of(replace(EVENT, event_version=version))


def test_blocks_hold_whole_lines_and_are_about_as_large_as_asked() -> None:
    many = [recorded(replace(EVENT, payload=b'{"n":%d}' % n)) for n in range(1_000)]
    whole = b"".join(export_lines(many))
    assert whole.count(b"\n") == 1_000
    for block_size in (1, 300, 10_000, 10**9):
        blocks = list(export_lines(iter(many), block_size))
        assert b"".join(blocks) == whole
        assert all(block.endswith(b"\n") for block in blocks)
        assert all(block_size <= len(block) < block_size + 400 for block in blocks[:-1])
    assert list(export_lines([])) == []


def test_a_large_event_does_not_keep_its_memory() -> None:
    large = recorded(replace(EVENT, payload=b'{"a":"' + b"x" * 10_000_000 + b'"}'))
    small = recorded(EVENT)
    tracemalloc.start()
    try:
        blocks = export_lines([large, small, small], 100)
        sizes = [len(next(blocks)) for _ in range(2)]  # not in an assert, which keeps what it compares
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sizes[0] > 10_000_000 > 400 > sizes[1]
    assert peak > 10_000_000  # it is seen
    assert kept < 100_000


@pytest.mark.parametrize("block_size", [0, -1])
def test_a_block_size_must_be_positive(block_size: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        next(export_lines([], block_size))


@pytest.mark.parametrize("wrong", [None, "event", EVENT])
def test_only_recorded_events_have_lines(wrong: object) -> None:
    with pytest.raises(TypeError):
        next(export_lines([wrong]))  # type: ignore[list-item]


def test_nothing_is_kept() -> None:
    events = [recorded(replace(EVENT, event_name='a"b'))] * 50
    without_value = recorded(replace(EVENT, payload=b" "))

    def encode() -> None:
        for _ in export_lines(events, 1_000):
            pass
        with suppress(MalformedRow):
            list(export_lines([*events, without_value]))

    assert kept_bytes(encode) == 0
