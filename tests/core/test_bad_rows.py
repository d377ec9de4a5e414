"""Rows that are none: always MalformedRow, never another event, never a crash, no byte read behind their end."""

import ctypes
import os
import pickle
import signal
import struct
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

import plain_python
from compiled_core import PlainResult, decode_both_ways, expected_of, no_payload
from event_strategies import events
from given_rows import BARE_ROW, EMPTY_ROW, EVENT, ROW
from hindsight_fast._core import (
    EventRows,
    decode_result,
    decode_row,
)
from hindsight_fast.errors import HindsightError, MalformedRow
from locked_page import BytesBeforeLockedPage
from plain_python import EVENT_COLUMNS

# --- Bad rows: always MalformedRow, never another event, never a crash ----------------------------------------------


@pytest.mark.parametrize("row", [ROW, BARE_ROW, EMPTY_ROW], ids=["full", "bare", "empty"])
def test_every_prefix_of_a_row_is_malformed(row):
    for size in range(len(row)):
        with pytest.raises(MalformedRow):
            decode_row(row[:size], no_payload)
        with pytest.raises(MalformedRow):  # of a longer buffer: what follows must not be read
            decode_row(memoryview(row)[:size], no_payload)


def run_this_file_as(job):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, __file__, job], timeout=60, env=environment, capture_output=True)


def test_no_byte_behind_a_row_is_read():
    # In a process of its own, which a byte too many would kill.
    done = run_this_file_as("before a locked page")
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_byte_too_many_would_have_been_noticed():
    done = run_this_file_as("into a locked page")
    assert done.stdout == b"reading on\n"
    assert done.returncode == -signal.SIGSEGV or b"AddressSanitizer: SEGV" in done.stderr


def read_rows_before_a_locked_page():
    before = BytesBeforeLockedPage()
    for row in (ROW, BARE_ROW, EMPTY_ROW):
        assert decode_both_ways(before.view(row)) == plain_python.decode_row(row)
        for size in range(len(row)):
            with pytest.raises(MalformedRow):
                decode_row(before.view(row[:size]), no_payload)
    rows = EventRows()
    for size in range(200):
        rows.add(b"e" * 16, b"s" * 16, "name", 1, before.view(b"x" * size), None, None, before.view(b"x" * size))
    heads = plain_python.encode_bigint_array([199])
    rows.place(1, before.view(heads), EVENT.created_at)
    for size in range(len(heads)):
        with pytest.raises(MalformedRow):
            rows.place(1, before.view(heads[:size]), EVENT.created_at)


@pytest.mark.parametrize("row", [ROW, BARE_ROW, EMPTY_ROW], ids=["full", "bare", "empty"])
@pytest.mark.parametrize("surplus", [b"\0", b"\xff\xff\xff\xff", b"\xff\xff", b"\0\0\0\0"])
def test_surplus_bytes_are_malformed(row, surplus):
    with pytest.raises(MalformedRow):
        decode_row(row + surplus, no_payload)
    with pytest.raises(MalformedRow):
        decode_row(row + row, no_payload)


def places_of_lengths(row):
    """Where the column count and each length stand."""
    places, at = [0, 1], 2
    for value in plain_python.split_row(row):
        places += range(at, at + 4)
        at += 4 + len(value or b"")
    return places


@pytest.mark.parametrize("row", [ROW, BARE_ROW, EMPTY_ROW], ids=["full", "bare", "empty"])
def test_every_single_byte_lie_of_a_length_is_malformed_or_what_the_twin_reads(row):
    for at in places_of_lengths(row):
        for value in range(256):
            lie = bytearray(row)
            lie[at] = value
            assert decode_both_ways(lie) == expected_of(lie)


def test_no_single_byte_lie_of_a_length_makes_another_event_of_a_full_row():
    # The twin may share a mistake with the core; this needs none: no length of a full row can change unnoticed.
    for at in places_of_lengths(ROW):
        for value in set(range(256)) - {ROW[at]}:
            lie = bytearray(ROW)
            lie[at] = value
            with pytest.raises(MalformedRow):
                decode_row(lie, no_payload)


@pytest.mark.parametrize("column", range(11))
@pytest.mark.parametrize("length", [-2, -3, -(2**31), 2**31 - 1, 2**31 - 5, 1000, 2**24, 2**16])
def test_lengths_far_off_are_malformed(column, length):
    at = 2 + sum(4 + len(value or b"") for value in plain_python.split_row(ROW)[:column])
    lie = ROW[:at] + struct.pack("!i", length) + ROW[at + 4 :]
    with pytest.raises(MalformedRow):
        decode_row(lie, no_payload)


@pytest.mark.parametrize("column", range(7))
def test_a_fixed_column_has_its_width_and_is_never_null(column):
    values = plain_python.split_row(ROW)
    width = len(values[column])
    for wrong in (None, b"", *(bytes(size) for size in range(1, 40) if size != width)):
        changed = [*values[:column], wrong, *values[column + 1 :]]
        with pytest.raises(MalformedRow, match=EVENT_COLUMNS[column]):
            decode_row(plain_python.encode_values(changed), no_payload)
        with pytest.raises(MalformedRow, match=EVENT_COLUMNS[column]):
            decode_result(PlainResult([changed]), no_payload)


@pytest.mark.parametrize("size", [size for size in range(40) if size != 16])
def test_a_correlation_id_has_16_bytes_or_is_null(size):
    values = plain_python.split_row(ROW)
    with pytest.raises(MalformedRow, match="correlation_id"):
        decode_row(plain_python.encode_values([*values[:7], bytes(size), *values[8:]]), no_payload)


@pytest.mark.parametrize("column", [8, 9])
def test_name_and_payload_are_never_null(column):
    values = plain_python.split_row(ROW)
    values[column] = None
    with pytest.raises(MalformedRow, match="NULL"):
        decode_row(plain_python.encode_values(values), no_payload)
    with pytest.raises(MalformedRow, match="NULL"):
        decode_result(PlainResult([values]), no_payload)


@pytest.mark.parametrize("column", [0, 1, 4, 6])
@pytest.mark.parametrize("number", [-1, -2, -(2**31)])
def test_negative_numbers_are_malformed(column, number):
    values = plain_python.split_row(ROW)
    values[column] = number.to_bytes(len(values[column]), "big", signed=True)
    with pytest.raises(MalformedRow, match="negative"):
        decode_row(plain_python.encode_values(values), no_payload)


@pytest.mark.parametrize(
    "microseconds",
    [
        2**63 - 1,  # infinity
        -(2**63),  # -infinity
        (datetime.max.replace(tzinfo=UTC) - plain_python.EPOCH) // timedelta(microseconds=1) + 1,
        (datetime.min.replace(tzinfo=UTC) - plain_python.EPOCH) // timedelta(microseconds=1) - 1,
    ],
)
def test_times_that_are_no_datetime_are_malformed(microseconds):
    values = plain_python.split_row(ROW)
    values[5] = struct.pack("!q", microseconds)
    assert decode_both_ways(plain_python.encode_values(values)) is MalformedRow


@pytest.mark.parametrize("name", [b"\xff", b"a\xc3", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80"])
def test_a_name_is_utf8(name):
    values = plain_python.split_row(ROW)
    values[8] = name
    with pytest.raises(MalformedRow, match="UTF-8"):
        decode_row(plain_python.encode_values(values), no_payload)


@given(st.binary(max_size=300))
def test_noise_is_malformed_or_what_the_twin_reads(noise):
    assert decode_both_ways(noise) == expected_of(noise)


@given(st.lists(st.none() | st.binary(max_size=20), min_size=11, max_size=11))
def test_random_values_are_malformed_or_what_the_twin_reads(values):
    row = plain_python.encode_values(values)
    assert decode_both_ways(row) == expected_of(row)


@given(events, st.data())
def test_a_damaged_row_is_malformed_or_what_the_twin_reads(event, data):
    row = bytearray(plain_python.encode_row(event))
    for _ in range(data.draw(st.integers(1, 4))):
        row[data.draw(st.integers(0, len(row) - 1))] = data.draw(st.integers(0, 255))
    assert decode_both_ways(row) == expected_of(row)


@pytest.mark.parametrize("wrong", [None, "row", 5, [1], memoryview(ROW * 2)[::2], memoryview(ROW).cast("b")])
def test_what_is_no_buffer_is_no_row(wrong):
    with pytest.raises((TypeError, ValueError, BufferError)):
        decode_row(wrong, no_payload)


def test_a_malformed_row_is_one_of_our_errors_and_a_value_error():
    with pytest.raises(MalformedRow) as caught:
        decode_row(b"", no_payload)
    assert isinstance(caught.value, HindsightError)
    assert isinstance(caught.value, ValueError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


if __name__ == "__main__":
    if sys.argv[1] == "before a locked page":
        read_rows_before_a_locked_page()
    else:
        print("reading on", flush=True)
        ctypes.string_at(BytesBeforeLockedPage().locked_address - 1, 2)
