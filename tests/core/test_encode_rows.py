"""Events into the rows of a binary COPY: the compiled EventRows against its plain twin."""

import array
import contextlib
import mmap
import os
import resource
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from uuid import UUID

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import plain_python
from compiled_core import event_counts, head_array, no_payload, rows_of
from event_strategies import FIRST_MOMENT, LAST_MOMENT, new_events
from given_rows import NOW, THREE_HEADS, THREE_STREAMS, A, B, Raising, one_row, placed_events, state_of
from hindsight_fast._core import COPY_HEADER, COPY_TRAILER, EVENT_COLUMNS, EventRows, decode_row
from hindsight_fast.errors import MalformedRow
from leaks import kept_bytes
from plain_python import PlainNewEvent

# --- What is sent is what the twin writes ---------------------------------------------------------------------------


def test_the_constants_are_the_twins():
    assert EVENT_COLUMNS == plain_python.EVENT_COLUMNS
    assert plain_python.encode_copy([]) == COPY_HEADER + COPY_TRAILER


@given(placed_events(), st.integers(1, 700))
def test_rows_are_byte_for_byte_the_twins(placed, block_size):
    events, transaction_no, heads, now = placed
    rows = rows_of(events)
    rows.place(transaction_no, head_array(events, heads), now)

    expected = [plain_python.encode_row(event) for event in plain_python.place(events, transaction_no, heads, now)]

    assert [rows.row(n) for n in range(len(rows))] == expected
    assert rows.byte_count == sum(map(len, expected))
    blocks = list(rows.blocks(block_size))
    assert b"".join(blocks) == plain_python.encode_copy(expected) == b"".join(rows.blocks())
    assert (blocks[0], blocks[-1]) == (COPY_HEADER, COPY_TRAILER)
    assert all(len(block) == block_size for block in blocks[1:-2])
    assert len(blocks[-2]) <= block_size


@given(st.lists(new_events, max_size=12))
@example([])
def test_the_arrays_name_each_stream_once_in_byte_order(events):
    counts = event_counts(events)
    rows = rows_of(events)
    assert rows.stream_count == len(counts)
    assert rows.stream_arrays() == (
        plain_python.encode_uuid_array(list(counts)),
        plain_python.encode_bigint_array(list(counts.values())),
    )


def test_many_streams_and_rows_make_the_buffers_grow_and_nothing_is_lost():
    events = [
        PlainNewEvent(UUID(int=n), UUID(int=n * 7919 % 1009), f"name {n % 17}", n, b"x" * (n % 251))
        for n in range(5000)
    ]
    rows = rows_of(events)
    heads = {stream_id: 10**12 + count for stream_id, count in event_counts(events).items()}
    rows.place(99, head_array(events, heads), NOW)
    next_version = {stream_id: heads[stream_id] - count + 1 for stream_id, count in event_counts(events).items()}
    for n, event in enumerate(events):
        stored = plain_python.decode_row(rows.row(n))
        assert (stored.sequence_no, stored.stream_version) == (n, next_version[event.stream_id])
        assert (stored.event_id, stored.payload) == (event.event_id, event.payload)
        next_version[event.stream_id] += 1


# --- Times ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "moment",
    [
        FIRST_MOMENT,
        LAST_MOMENT,
        datetime(1999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),  # encoded as -1, C's usual mark of an error
        datetime(2000, 1, 1, tzinfo=UTC),
        datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
        datetime(1, 1, 1, 0, 0, tzinfo=timezone(timedelta(hours=-14))),
        datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=timezone(timedelta(hours=14))),
        datetime(2024, 2, 29, 12, tzinfo=timezone(timedelta(hours=5, minutes=45, seconds=7, microseconds=3))),
    ],
)
def test_every_moment_of_the_years_1_to_9999_survives_to_the_microsecond(moment):
    rows = EventRows()
    rows.add(b"e" * 16, A, "name", 1, b"{}", moment)
    rows.add(b"f" * 16, A, "name", 1, b"{}")
    rows.place(1, plain_python.encode_bigint_array([1]), moment)
    assert plain_python.decode_row(rows.row(0)).created_at == moment
    assert plain_python.decode_row(rows.row(1)).created_at == moment


def test_the_calendar_is_right_around_every_turn_of_year_and_month():
    # In UTC, which the core converts by a calendar of its own, and an hour off, which datetime converts.
    days = [
        datetime(year, month, day, 23, 59, 59, 999999)
        for year in range(1, 10_000)
        for month, day in ((1, 1), (2, 28), (3, 1), (12, 31))
    ]
    days += [datetime(year, 2, 29) for year in range(4, 10_000, 4) if year % 100 or not year % 400]
    days += [datetime(year, month, 1) for year in (1, 1900, 1999, 2000, 2001, 9999) for month in range(1, 13)]
    an_hour_off = timezone(timedelta(hours=1))
    expected = [day.replace(tzinfo=UTC) for day in days]
    expected += [day.replace(tzinfo=an_hour_off) for day in days if day.year > 1]
    rows = EventRows()
    for moment in expected:
        rows.add(b"e" * 16, A, "name", 1, b"{}", moment)
    for n, moment in enumerate(expected):
        assert plain_python.decode_row(rows.row(n)).created_at == moment
        assert decode_row(rows.row(n), no_payload).created_at == moment


@pytest.mark.parametrize("answer", [None, 5, 1.5, "", b"", [], NOW, object()])
def test_a_datetime_that_subtracts_to_something_else_is_refused(answer):
    # Once read as a timedelta without a look: other memory was stored as the event's time.
    class Odd(datetime):
        def __sub__(self, other):
            return answer

    class Hour(tzinfo):  # any but the plain timezone, which the core converts by itself
        def utcoffset(self, moment):
            return timedelta(hours=1)

    rows = one_row()
    before = state_of(rows)
    with pytest.raises(TypeError, match="no timedelta"):
        rows.add(b"e" * 16, A, "name", 1, b"{}", Odd(2024, 1, 1, tzinfo=Hour()))
    assert state_of(rows) == before
    # With a fixed offset there is nothing to subtract.
    rows.add(b"e" * 16, A, "name", 1, b"{}", Odd(2024, 1, 1, 1, tzinfo=timezone(timedelta(hours=1))))
    assert plain_python.decode_row(rows.row(len(rows) - 1)).created_at == datetime(2024, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    "moment",
    [
        datetime(1, 1, 1, 13, 59, 59, 999999, tzinfo=timezone(timedelta(hours=14))),
        datetime(9999, 12, 31, 10, 0, tzinfo=timezone(timedelta(hours=-14))),
    ],
)
def test_a_moment_that_no_reader_could_return_is_refused(moment):
    # In UTC it lies outside the years 1 to 9999: PostgreSQL stores it, and decoding it fails for ever after.
    rows = one_row()
    with pytest.raises(ValueError, match="years 1 to 9999"):
        rows.add(b"e" * 16, A, "name", 1, b"{}", moment)
    with pytest.raises(ValueError, match="years 1 to 9999"):
        rows.place(1, plain_python.encode_bigint_array([0]), moment)
    assert len(rows) == 1


# --- add() that raises changes nothing ------------------------------------------------------------------------------


class Undecided(tzinfo):
    def utcoffset(self, moment):
        return None


GOOD = {
    "event_id": b"e" * 16,
    "stream_id": b"s" * 16,
    "event_name": "name",
    "event_version": 1,
    "payload": b"{}",
    "created_at": NOW,
    "correlation_id": b"c" * 16,
    "metadata": b"[]",
}

BAD = [
    *[("event_id", bad, ValueError) for bad in (b"", b"e" * 15, b"e" * 17)],
    *[("event_id", bad, TypeError) for bad in (None, "e" * 16, bytearray(16), UUID(int=1), 16)],
    *[("stream_id", bad, ValueError) for bad in (b"", b"e" * 15, b"e" * 17)],
    *[("stream_id", bad, TypeError) for bad in (None, "e" * 16, bytearray(16), UUID(int=1), 16)],
    *[("correlation_id", bad, ValueError) for bad in (b"", b"e" * 15, b"e" * 17)],
    *[("correlation_id", bad, TypeError) for bad in ("e" * 16, bytearray(16), UUID(int=1), 16)],
    *[("event_name", bad, ValueError) for bad in ("", "\0", "a\0", "\0a", "a" * 10_000 + "\0", "\ud800", "a\udfff")],
    *[("event_name", bad, TypeError) for bad in (None, b"name", 5)],
    *[("event_version", bad, ValueError) for bad in (-1, 2**31, 2**32, 2**64, -(2**31), -(2**63) - 1)],
    *[("event_version", bad, TypeError) for bad in (None, "1", 1.0, 1.7, True)],
    *[("payload", bad, TypeError) for bad in (None, "{}", 5, {"a": 1}, [1])],
    *[("metadata", bad, TypeError) for bad in ("{}", 5, {"a": 1}, [1])],
    *[
        (field, bad, (ValueError, TypeError, BufferError))
        for field in ("payload", "metadata")
        for bad in (
            memoryview(b"abcdef")[::2],
            memoryview(b"abcdef")[::-1],
            memoryview(b"abcdef").cast("B", (2, 3)),
            memoryview(b"abcd").cast("I"),
            memoryview(b"abcd").cast("b"),
            array.array("I", [1, 2]),
            array.array("d", [1.0]),
        )
    ],
    ("created_at", NOW.replace(tzinfo=None), ValueError),
    ("created_at", NOW.replace(tzinfo=Undecided()), ValueError),
    ("created_at", NOW.replace(tzinfo=Raising()), RuntimeError),
    *[("created_at", bad, TypeError) for bad in ("2024-01-01T00:00:00Z", 0, NOW.date(), NOW.time(), timedelta(1))],
]


@pytest.mark.parametrize("new_stream", [False, True], ids=["known stream", "new stream"])
@pytest.mark.parametrize(("field", "bad", "error"), BAD, ids=lambda value: repr(value)[:40])
def test_an_add_that_raises_leaves_the_rows_as_they_were(field, bad, error, new_stream):
    rows = one_row(A if new_stream else GOOD["stream_id"])
    rows.place(7, plain_python.encode_bigint_array([0]), NOW)
    before = state_of(rows)
    with pytest.raises(error):
        rows.add(**{**GOOD, field: bad})
    assert state_of(rows) == before
    rows.add(**GOOD)
    assert len(rows) == 2


def test_the_good_event_is_good():
    # Otherwise every case above could fail for a reason of its own.
    rows = EventRows()
    rows.add(**GOOD)
    assert len(rows) == 1


def test_add_without_or_with_surplus_arguments_leaves_the_rows_alone():
    rows = one_row()
    for arguments in ((), (b"e" * 16,), (b"e" * 16, A, "n", 1, b"", None, None, None, None)):
        with pytest.raises(TypeError):
            rows.add(*arguments)
    with pytest.raises(TypeError):
        rows.add(**GOOD, colour="blue")
    assert len(rows) == 1


@pytest.mark.parametrize("sizes", [(2**30, 0), (0, 2**30), (600 << 20, 600 << 20), (2**31, 0), (2**32 + 2, 0)])
def test_an_event_too_large_for_postgresql_is_refused_before_it_is_copied(sizes):
    rows = one_row()
    before = state_of(rows)
    # Pages of an anonymous mapping cost nothing until they are touched.
    payload, metadata = (mmap.mmap(-1, size) if size else b"{}" for size in sizes)
    with pytest.raises(ValueError, match="1 GiB"):
        rows.add(b"e" * 16, B, "name", 1, payload, None, None, metadata)
    assert state_of(rows) == before


def test_a_name_of_a_thousand_bytes_is_the_longest():
    rows = EventRows()
    name = "ñ" * 500
    rows.add(b"e" * 16, A, name, 1, b"{}")
    rows.place(1, plain_python.encode_bigint_array([0]), NOW)
    assert plain_python.decode_row(rows.row(0)).event_name == name
    for longer in (name + "n", "n" * 5_000_000):
        before = state_of(rows)
        with pytest.raises(ValueError, match=r"takes \d+ bytes, 1000 at most") as caught:
            rows.add(b"e" * 16, A, longer, 1, b"{}")
        assert len(str(caught.value)) < 200
        assert state_of(rows) == before


def run_this_file_as(job, **environment):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    done = subprocess.run([sys.executable, __file__, job], timeout=60, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_add_that_finds_no_memory_leaves_the_rows_as_they_were():
    # In a process of its own, whose address space is closed after the first row.
    run_this_file_as("run out of memory")


def test_no_byte_behind_a_buffer_is_written():
    # The debug allocator puts guard bytes behind every block and ends the process if they have changed.
    run_this_file_as("write long rows", PYTHONMALLOC="debug")


def write_long_rows():
    for size in range(4096 - 150, 4096 + 150):
        # First a row about as long as the smallest buffer, then one for which growing by half is not enough.
        for sizes in ((size,), (size, 3 * size), (1, size), (size, 2 * size, 1)):
            events = [PlainNewEvent(UUID(int=n), UUID(int=1), "name", 1, b"x" * size) for n, size in enumerate(sizes)]
            rows = rows_of(events)
            rows.place(1, plain_python.encode_bigint_array([len(sizes) - 1]), NOW)
            rows.stream_arrays()
            rows.clear()


def run_out_of_memory():
    rows = one_row()
    rows.place(7, plain_python.encode_bigint_array([0]), NOW)
    before = state_of(rows)
    payload = bytes(200 << 20)
    with open("/proc/self/statm") as statm:
        used_bytes = int(statm.read().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + (50 << 20), resource.RLIM_INFINITY))
    for stream_id in (A, B):
        try:
            rows.add(b"f" * 16, stream_id, "name", 1, payload)
        except MemoryError:
            pass
        else:
            raise AssertionError("there was memory after all")
        assert state_of(rows) == before
    # And what comes after it is stored as if nothing had happened.
    fresh = one_row()
    for other in (rows, fresh):
        other.add(b"f" * 16, B, "name", 1, b"{}")
        other.add(b"g" * 16, A, "name", 1, b"{}")
        other.place(7, plain_python.encode_bigint_array([31, 42]), NOW)
    assert state_of(rows) == state_of(fresh)


# --- What a payload may be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        bytes,
        bytearray,
        memoryview,
        msgspec.Raw,
        lambda data: array.array("B", data),
        lambda data: memoryview(bytearray(b"[" + data + b"]"))[1:-1],
        lambda data: memoryview(data).toreadonly(),
    ],
    ids=["bytes", "bytearray", "memoryview", "msgspec.Raw", "array", "slice of a bytearray", "read-only view"],
)
@pytest.mark.parametrize("data", [b"", b"{}", b'{"a": 1}' * 1000])
def test_any_contiguous_buffer_is_a_payload(kind, data):
    rows = EventRows()
    buffer = kind(data)
    rows.add(b"e" * 16, A, "name", 1, buffer, None, None, buffer)
    rows.place(1, plain_python.encode_bigint_array([0]), NOW)
    stored = plain_python.decode_row(rows.row(0))
    assert (stored.payload, stored.metadata) == (data, data)


def test_a_buffer_is_copied_and_let_go():
    payload = bytearray(b"before")
    rows = EventRows()
    rows.add(b"e" * 16, A, "name", 1, payload, None, None, payload)
    payload[:] = b"after!"
    payload.extend(b"a bytearray cannot grow while a buffer of it is held")
    rows.place(1, plain_python.encode_bigint_array([0]), NOW)
    assert plain_python.decode_row(rows.row(0)).payload == b"before"


# --- blocks(), row(), clear() ---------------------------------------------------------------------------------------


def test_blocks_before_place_send_nothing_at_all():
    for rows in (EventRows(), one_row()):
        with pytest.raises(ValueError, match="place"):
            next(rows.blocks())


@pytest.mark.parametrize("block_size", [0, -1, -(2**40)])
def test_a_block_has_a_size(block_size):
    rows = one_row()
    rows.place(1, plain_python.encode_bigint_array([0]), NOW)
    with pytest.raises(ValueError, match="positive"):
        next(rows.blocks(block_size))


def test_a_block_may_be_larger_than_everything():
    rows = one_row()
    rows.place(1, plain_python.encode_bigint_array([0]), NOW)
    assert len(list(rows.blocks(2**63 - 1))) == 3
    for wrong in (1.5, None, "1"):
        with pytest.raises(TypeError):
            next(rows.blocks(wrong))


def change_by_adding(rows):
    rows.add(b"f" * 16, A, "name", 1, b"{}")


def change_by_adding_and_placing(rows):
    rows.add(b"f" * 16, A, "name", 1, b"{}")
    rows.place(2, plain_python.encode_bigint_array([5]), NOW)


def change_by_placing_elsewhere(rows):
    rows.place(2, plain_python.encode_bigint_array([5]), NOW)


def change_by_a_place_that_fails(rows):
    with pytest.raises(MalformedRow):
        rows.place(2, b"", NOW)


def change_by_replacing_all(rows):
    rows.clear()
    rows.add(b"z" * 16, A, "name", 1, b"{}")
    rows.place(2, plain_python.encode_bigint_array([5]), NOW)


@pytest.mark.parametrize(
    "change",
    [
        change_by_adding,
        change_by_adding_and_placing,
        change_by_placing_elsewhere,
        change_by_a_place_that_fails,
        change_by_replacing_all,
        EventRows.clear,
    ],
)
@pytest.mark.parametrize("blocks_sent", [1, 2, 5])
def test_rows_that_change_while_they_are_sent_stop_the_sending(change, blocks_sent):
    rows = one_row()
    rows.place(1, plain_python.encode_bigint_array([0]), NOW)
    blocks = rows.blocks(rows.byte_count // 4 + 1)  # header, four blocks, trailer
    for _ in range(blocks_sent):
        next(blocks)
    change(rows)
    with pytest.raises(RuntimeError, match="while they were being sent"):
        next(blocks)
    assert list(blocks) == []


def test_two_sendings_at_once_do_not_disturb_each_other():
    rows = rows_of(THREE_STREAMS)
    rows.place(1, THREE_HEADS, NOW)
    pairs = list(zip(rows.blocks(100), rows.blocks(100), strict=True))
    assert all(left == right for left, right in pairs)


def test_an_unfinished_sending_can_be_dropped():
    rows = one_row()
    rows.place(1, plain_python.encode_bigint_array([0]), NOW)
    blocks = rows.blocks(1)
    next(blocks)
    blocks.close()
    blocks = rows.blocks(1)
    next(blocks)
    del blocks, rows


@pytest.mark.parametrize("index", [-1, 1, 2, 2**62, -(2**63)])
def test_there_is_no_row_outside(index):
    with pytest.raises(IndexError):
        one_row().row(index)
    with pytest.raises(IndexError):
        EventRows().row(0)


def test_cleared_rows_are_as_good_as_new():
    rows = rows_of(THREE_STREAMS)
    rows.place(1, THREE_HEADS, NOW)
    rows.clear()
    assert state_of(rows) == state_of(EventRows())
    for event in THREE_STREAMS:
        rows.add(event.event_id.bytes, event.stream_id.bytes, event.event_name, event.event_version, event.payload)
    rows.place(1, THREE_HEADS, NOW)
    fresh = rows_of(THREE_STREAMS)
    fresh.place(1, THREE_HEADS, NOW)
    assert state_of(rows) == state_of(fresh)


def test_rows_added_after_place_must_be_placed_again():
    rows = one_row()
    rows.place(1, plain_python.encode_bigint_array([0]), NOW)
    rows.add(b"f" * 16, A, "name", 1, b"{}")
    with pytest.raises(ValueError, match="place"):
        next(rows.blocks())
    rows.place(1, plain_python.encode_bigint_array([1]), NOW)
    versions = [plain_python.decode_row(rows.row(n)).stream_version for n in (0, 1)]
    assert versions == [0, 1]


# --- Memory ---------------------------------------------------------------------------------------------------------


def test_encoding_keeps_no_memory_not_even_when_it_fails():
    def encode():
        rows = rows_of(THREE_STREAMS)
        rows.stream_arrays()
        rows.place(1, THREE_HEADS, NOW)
        for _ in rows.blocks(100):
            pass
        for field, bad in (("event_name", "a\0"), ("event_name", "\ud800"), ("created_at", 5), ("payload", "x")):
            try:
                rows.add(**{**GOOD, field: bad})
            except (ValueError, TypeError):
                continue
            raise AssertionError
        with contextlib.suppress(MalformedRow):
            rows.place(1, b"x", NOW)
        rows.clear()

    assert kept_bytes(encode) == 0


if __name__ == "__main__":
    {"run out of memory": run_out_of_memory, "write long rows": write_long_rows}[sys.argv[1]]()
