"""A group's parameters and the arrays that the server answers with: the compiled form against its plain twin."""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import plain_python
from compiled_core import rows_of
from event_strategies import new_events
from hindsight_fast._core import EventRows, group_parameters, int_array, row_values
from hindsight_fast.errors import MalformedRow
from leaks import kept_bytes
from plain_python import PlainNewEvent, PlainRequest, PlainWrite

STREAMS = [UUID(int=n) for n in (3, 1, 2**127, 2)]
NOTED = PlainNewEvent(UUID(int=7), STREAMS[0], "noted", 0, b"{}")
FULL = PlainNewEvent(
    UUID(int=8), STREAMS[1], "größe", 2, b'{"a": 1}', datetime(2024, 5, 6, tzinfo=UTC), UUID(int=9), b'{"b": 2}'
)

versions = st.integers(-1, 2**63 - 1)
bounds = st.none() | st.tuples(versions, versions)
cursors = st.none() | st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**31 - 1))


@st.composite
def requests(draw: st.DrawFn) -> PlainRequest:
    writes = []
    for stream_id in draw(st.lists(st.sampled_from(STREAMS), min_size=1, unique=True)):
        in_stream = [replace(event, stream_id=stream_id) for event in draw(st.lists(new_events, max_size=3))]
        expects_cursor = draw(cursors)
        writes.append(PlainWrite(stream_id, in_stream, None if expects_cursor else draw(bounds), expects_cursor))
    return PlainRequest(writes)


def as_given(request: PlainRequest) -> tuple[EventRows, list[Any]]:
    """The request as ``group_parameters`` takes it."""
    return rows_of([event for write in request.writes for event in write.events]), [
        (write.stream_id.bytes, len(write.events), *(write.bounds or (None, None)), *(write.cursor or (None, None)))
        for write in request.writes
    ]


def one_write(events: list[PlainNewEvent], **expected: Any) -> PlainRequest:
    return PlainRequest([PlainWrite(events[0].stream_id, events, **expected)])


@given(st.lists(requests(), min_size=1, max_size=5))
@example([one_write([NOTED])])
@example([one_write([FULL], bounds=(-1, -1)), one_write([NOTED], cursor=(812, 3))])
@example([PlainRequest([PlainWrite(STREAMS[0], [])])])
def test_parameters_are_what_the_twin_makes_of_them(group: list[PlainRequest]) -> None:
    assert group_parameters([as_given(request) for request in group]) == plain_python.group_parameters(group)


@given(new_events)
@example(FULL)
@example(NOTED)
def test_the_values_of_a_row_are_what_it_was_given(event: PlainNewEvent) -> None:
    rows = rows_of([NOTED, event])
    assert row_values(rows, 1) == plain_python.row_values(event)
    for index in (-1, 2, 2**40):
        with pytest.raises(IndexError):
            row_values(rows, index)


# --- What a group cannot be -------------------------------------------------------------------------------------------


def write(stream_id: Any = STREAMS[0].bytes, count: Any = 1, *expected: Any) -> tuple[Any, ...]:
    return (stream_id, count, *(expected or (None, None, None, None)))


LIES: dict[str, tuple[Any, type[Exception]]] = {
    "no list": (None, TypeError),
    "a tuple": ((), TypeError),
    "no pair": ([1], TypeError),
    "rows that are none": ([(None, [write()])], TypeError),
    "rows of another kind": ([(object(), [write()])], TypeError),
    "writes that are none": ([(rows_of([NOTED]), None)], TypeError),
    "a write too short": ([(rows_of([NOTED]), [write()[:5]])], ValueError),
    "no stream": ([(rows_of([NOTED]), [write(None)])], TypeError),
    "a stream as text": ([(rows_of([NOTED]), [write("x" * 16)])], TypeError),
    "a stream too short": ([(rows_of([NOTED]), [write(bytes(15))])], ValueError),
    "a stream too long": ([(rows_of([NOTED]), [write(bytes(17))])], ValueError),
    "another stream": ([(rows_of([NOTED]), [write(bytes(16))])], ValueError),
    "no write for the rows": ([(rows_of([NOTED]), [])], ValueError),
    "no rows for the write": ([(EventRows(), [write()])], ValueError),
    "more events than rows": ([(rows_of([NOTED]), [write(count=2)])], ValueError),
    "fewer events than rows": ([(rows_of([NOTED, FULL]), [write()])], ValueError),
    "no events for a row": ([(rows_of([NOTED]), [write(count=0)])], ValueError),
    "a negative number of events": ([(rows_of([NOTED]), [write(count=-1)])], ValueError),
    "a number of events that no int64 holds": ([(rows_of([NOTED]), [write(count=2**63)])], OverflowError),
    "a number of events as text": ([(rows_of([NOTED]), [write(count="1")])], TypeError),
    "a stream twice": ([(rows_of([NOTED, NOTED]), [write(), write()])], ValueError),
    "another order": (
        [(rows_of([NOTED, FULL]), [write(FULL.stream_id.bytes), write(NOTED.stream_id.bytes)])],
        ValueError,
    ),
    "half of the bounds": ([(rows_of([NOTED]), [write(STREAMS[0].bytes, 1, 0, None, None, None)])], TypeError),
    "half of a cursor": ([(rows_of([NOTED]), [write(STREAMS[0].bytes, 1, None, None, 1, None)])], TypeError),
    "a version out of range": ([(rows_of([NOTED]), [write(STREAMS[0].bytes, 1, 2**63, 0, None, None)])], OverflowError),
    "a place out of range": ([(rows_of([NOTED]), [write(STREAMS[0].bytes, 1, None, None, 1, 2**31)])], OverflowError),
}


@pytest.mark.parametrize(("lie", "error"), LIES.values(), ids=LIES)
def test_a_group_that_lies_is_refused(lie: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        group_parameters(lie)


@pytest.mark.parametrize("rows", [None, object(), b""])
def test_values_are_taken_of_rows_only(rows: Any) -> None:
    with pytest.raises(TypeError):
        row_values(rows, 0)


# --- Arrays of integers -----------------------------------------------------------------------------------------------

integers = st.lists(st.none() | st.integers(-(2**63), 2**63 - 1))


@given(integers)
def test_an_array_reads_as_what_it_holds(numbers: list[int | None]) -> None:
    assert int_array(plain_python.encode_int_array(20, numbers)) == numbers
    short = [None if number is None else number >> 32 for number in numbers]
    assert int_array(plain_python.encode_int_array(23, short)) == short


def test_no_array_and_an_empty_one_hold_nothing() -> None:
    assert int_array(None) == []
    assert int_array(struct.pack("!iiI", 0, 0, 20)) == []  # as PostgreSQL writes '{}'


ARRAY = plain_python.encode_int_array(20, [812, None, -1])
LYING_ARRAYS = {
    "empty": b"",
    "cut in its header": ARRAY[:19],
    "cut in an element": ARRAY[:-1],
    "cut before an element": ARRAY[:-12],
    "a byte too many": ARRAY + b"\0",
    "elements too many": ARRAY + ARRAY[-12:],
    "two dimensions": struct.pack("!iiIiiii", 2, 0, 20, 1, 1, 1, 1) + ARRAY[-12:],
    "a negative dimension": struct.pack("!i", -1) + ARRAY[4:],
    "a negative length": ARRAY[:12] + struct.pack("!i", -1) + ARRAY[16:],
    "a length beyond memory": ARRAY[:12] + struct.pack("!i", 2**31 - 1) + ARRAY[16:],
    "uuids": struct.pack("!iiIii", 1, 0, 2950, 0, 1),
    "empty, of uuids": struct.pack("!iiI", 0, 0, 2950),
    "empty, and a byte": struct.pack("!iiIb", 0, 0, 20, 0),
    "shorts in longs": struct.pack("!iiIii", 1, 0, 20, 1, 1) + struct.pack("!ii", 4, 1),
    "longs in shorts": struct.pack("!iiIii", 1, 0, 23, 1, 1) + struct.pack("!iq", 8, 1),
    "an element of size -2": struct.pack("!iiIiii", 1, 0, 20, 1, 1, -2),
}


@pytest.mark.parametrize("array", LYING_ARRAYS.values(), ids=LYING_ARRAYS)
def test_an_array_that_lies_is_refused(array: bytes) -> None:
    with pytest.raises(MalformedRow):
        int_array(array)


@given(st.binary(max_size=60) | integers.map(lambda numbers: plain_python.encode_int_array(20, numbers)), st.randoms())
@example(ARRAY, random.Random(0))
def test_damaged_arrays_are_refused_as_by_the_twin(array: bytes, chance: random.Random) -> None:
    bad = bytearray(array)
    for _ in range(chance.randrange(3)):
        if bad:
            bad[chance.randrange(len(bad))] = chance.choice([0, 1, 8, 20, 255])
    for damaged in (bytes(bad), bytes(bad[: chance.randrange(len(bad) + 1)])):
        try:
            expected: list[int | None] | None = plain_python.decode_int_array(damaged)
        except ValueError:
            expected = None
        if expected is None:
            with pytest.raises(MalformedRow):
                int_array(damaged)
        else:
            assert int_array(damaged) == expected


@pytest.mark.parametrize("wrong", ["text", 1, object(), [1]])
def test_an_array_is_a_buffer(wrong: Any) -> None:
    with pytest.raises(TypeError):
        int_array(wrong)


def test_any_buffer_in_one_piece_will_do() -> None:
    for buffer in (bytearray(ARRAY), memoryview(ARRAY), memoryview(ARRAY + b"x")[:-1]):
        assert int_array(buffer) == [812, None, -1]
    with pytest.raises((ValueError, BufferError)):
        int_array(memoryview(ARRAY)[::2])


# --- Nothing is kept --------------------------------------------------------------------------------------------------


def test_nothing_is_kept() -> None:
    many = [PlainNewEvent(UUID(int=n), STREAMS[n % 2], "noted", 0, b"{}" * n) for n in range(10)]
    in_stream = [[event for event in many if event.stream_id == stream_id] for stream_id in STREAMS[:2]]
    group = [as_given(PlainRequest([PlainWrite(events[0].stream_id, events) for events in in_stream]))]
    rows = rows_of([FULL])
    assert kept_bytes(lambda: group_parameters(group)) == 0
    assert kept_bytes(lambda: row_values(rows, 0)) == 0
    assert kept_bytes(lambda: int_array(ARRAY)) == 0


def test_nothing_is_kept_of_what_was_refused() -> None:
    refused: list[Callable[[], object]] = [partial(group_parameters, lie) for lie, _ in LIES.values()]
    refused += [partial(int_array, array) for array in LYING_ARRAYS.values()]

    def try_all() -> None:
        for call in refused:
            with suppress(ValueError, TypeError, OverflowError):
                call()

    assert kept_bytes(try_all) == 0


def test_what_was_given_is_let_go() -> None:
    rows, stream_id = rows_of([NOTED]), bytes(bytearray(STREAMS[0].bytes))
    group = [(rows, [write(stream_id)])]
    before = [sys.getrefcount(each) for each in (rows, stream_id, group)]
    for _ in range(100):
        group_parameters(group)
        with pytest.raises(ValueError, match="no rows"):
            group_parameters([*group, (EventRows(), [write(stream_id)])])
        row_values(rows, 0)
    assert [sys.getrefcount(each) for each in (rows, stream_id, group)] == before


def test_a_group_of_many_events_takes_memory_in_proportion() -> None:
    late = datetime(9999, 12, 31, tzinfo=UTC) - timedelta(microseconds=1)
    many = [PlainNewEvent(UUID(int=n), STREAMS[0], "noted", n % 5, b"{}", late) for n in range(20_000)]
    request = one_write(many)
    assert group_parameters([as_given(request)]) == plain_python.group_parameters([request])
