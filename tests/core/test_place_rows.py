"""Rows get their number, versions and time: by arrays of heads as they should be, and by all others."""

import struct
from datetime import timedelta, tzinfo
from uuid import UUID

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import plain_python
from compiled_core import event_counts, head_array, rows_of
from event_strategies import moments
from given_rows import NOW, THREE_HEADS, THREE_STREAMS, A, Raising, placed_events, state_of
from hindsight_fast._core import EventRows
from hindsight_fast.errors import MalformedRow

# --- place() --------------------------------------------------------------------------------------------------------


@given(placed_events(max_size=8), st.data())
def test_placing_again_is_as_good_as_placing_once(placed, data):
    events, transaction_no, heads, now = placed
    other_heads = {stream_id: data.draw(st.integers(n - 1, 100)) for stream_id, n in event_counts(events).items()}
    twice, once = rows_of(events), rows_of(events)
    twice.place(data.draw(st.integers(0, 2**63 - 1)), head_array(events, other_heads), data.draw(moments))
    twice.place(transaction_no, head_array(events, heads), now)
    once.place(transaction_no, head_array(events, heads), now)
    assert state_of(twice) == state_of(once)


def unchanged_and_unsendable(rows, before):
    assert [rows.row(n) for n in range(len(rows))] == before
    with pytest.raises(ValueError, match="place"):
        list(rows.blocks())


@pytest.mark.parametrize("size", range(len(THREE_HEADS)))
def test_every_truncated_array_is_malformed(size):
    rows = rows_of(THREE_STREAMS)
    rows.place(1, THREE_HEADS, NOW)
    before = [rows.row(n) for n in range(len(rows))]
    with pytest.raises(MalformedRow):
        rows.place(2, THREE_HEADS[:size], NOW)
    unchanged_and_unsendable(rows, before)


@pytest.mark.parametrize("offset", [*range(16), *range(20, 24), *range(32, 36), *range(44, 48)])
def test_every_single_byte_lie_of_an_array_is_malformed(offset):
    # All but the lower bound (16 to 20), which says nothing, and the versions themselves.
    rows = rows_of(THREE_STREAMS)
    rows.place(1, THREE_HEADS, NOW)
    before = [rows.row(n) for n in range(len(rows))]
    for value in range(256):
        lie = bytearray(THREE_HEADS)
        if lie[offset] == value:
            continue
        lie[offset] = value
        with pytest.raises(MalformedRow):
            rows.place(2, lie, NOW)
    unchanged_and_unsendable(rows, before)


@pytest.mark.parametrize(
    "array_of_another_kind",
    [
        THREE_HEADS + b"\0",
        THREE_HEADS * 2,
        plain_python.encode_bigint_array([1, 2]),
        plain_python.encode_bigint_array([1, 2, 3, 4]),
        plain_python.encode_bigint_array([]),
        struct.pack("!iii", 0, 0, 20),
        plain_python.encode_uuid_array([UUID(int=1)] * 3),
        struct.pack("!iiIii", 1, 1, 20, 3, 1) + struct.pack("!iqiqi", 8, 1, 8, 2, -1),
        bytes(len(THREE_HEADS)),
        b"\xff" * len(THREE_HEADS),
    ],
)
def test_an_array_of_another_kind_is_malformed(array_of_another_kind):
    rows = rows_of(THREE_STREAMS)
    with pytest.raises(MalformedRow):
        rows.place(2, array_of_another_kind, NOW)


@given(st.binary(max_size=80) | st.binary(min_size=len(THREE_HEADS), max_size=len(THREE_HEADS)))
def test_random_bytes_are_malformed(noise):
    assume(noise[:16] != THREE_HEADS[:16])
    with pytest.raises(MalformedRow):
        rows_of(THREE_STREAMS).place(2, noise, NOW)


@pytest.mark.parametrize("head", [1, 0, -1, -(2**63), -(2**63) + 1])
def test_a_head_that_cannot_hold_its_events_is_refused(head):
    # The first stream has three events: its head is at least 2.
    rows = rows_of(THREE_STREAMS)
    before = [rows.row(n) for n in range(len(rows))]
    with pytest.raises(ValueError, match="below the number of events") as caught:
        rows.place(2, plain_python.encode_bigint_array([head, 20, 30]), NOW)
    assert not isinstance(caught.value, MalformedRow)
    unchanged_and_unsendable(rows, before)


def test_the_lowest_and_highest_heads_hold_their_events():
    for heads in ((2, 1, 1), (2**63 - 1,) * 3):
        rows = rows_of(THREE_STREAMS)
        rows.place(2**63 - 1, plain_python.encode_bigint_array(list(heads)), NOW)
        versions = [plain_python.decode_row(rows.row(n)).stream_version for n in (0, 3, 6)]
        assert versions == [heads[0] - 2, heads[0] - 1, heads[0]]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((-1, THREE_HEADS, NOW), ValueError),
        ((2**63, THREE_HEADS, NOW), ValueError),
        ((1.0, THREE_HEADS, NOW), TypeError),
        ((True, THREE_HEADS, NOW), TypeError),
        ((None, THREE_HEADS, NOW), TypeError),
        (("1", THREE_HEADS, NOW), TypeError),
        ((1, None, NOW), TypeError),
        ((1, [10, 20, 30], NOW), TypeError),
        ((1, THREE_HEADS.decode("latin-1"), NOW), TypeError),
        ((1, memoryview(THREE_HEADS * 2)[::2], NOW), (ValueError, BufferError)),
        ((1, THREE_HEADS, None), TypeError),
        ((1, THREE_HEADS, 5), TypeError),
        ((1, THREE_HEADS, NOW.replace(tzinfo=None)), ValueError),
        ((1, THREE_HEADS, NOW.replace(tzinfo=Raising())), RuntimeError),
    ],
)
def test_rows_cannot_be_sent_after_any_place_that_failed(arguments, error):
    rows = rows_of(THREE_STREAMS)
    rows.place(1, THREE_HEADS, NOW)
    before = [rows.row(n) for n in range(len(rows))]
    with pytest.raises(error):
        rows.place(*arguments)
    unchanged_and_unsendable(rows, before)


def test_no_rows_cannot_be_placed():
    with pytest.raises(ValueError, match="no rows"):
        EventRows().place(1, plain_python.encode_bigint_array([]), NOW)


def test_a_caller_that_empties_the_rows_while_they_are_placed_does_no_harm():
    class Emptying(tzinfo):
        def utcoffset(self, moment):
            rows.clear()
            return timedelta(0)

    class EmptyingInt(int):
        def __ge__(self, other):
            rows.clear()
            return True

        __le__ = __gt__ = __lt__ = __ge__

    for arguments in ((1, THREE_HEADS, NOW.replace(tzinfo=Emptying())), (EmptyingInt(1), THREE_HEADS, NOW)):
        rows = rows_of(THREE_STREAMS)
        with pytest.raises(ValueError, match="no rows"):
            rows.place(*arguments)
        assert len(rows) == 0

    rows = rows_of(THREE_STREAMS)
    rows.add(b"e" * 16, A, "name", 1, b"{}", NOW.replace(tzinfo=Emptying()))
    assert len(rows) == rows.stream_count == 1
