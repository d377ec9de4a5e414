"""Rows into recorded events: the compiled decoder against its plain twin."""

import array
import contextlib
import copy
import ctypes
import gc
import os
import pickle
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from types import GenericAlias
from uuid import UUID

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import plain_python
from compiled_core import PlainResult, decode_both_ways, expected_of, no_payload, rows_of, seen
from event_strategies import events
from hindsight_fast import _core
from hindsight_fast._core import (
    Cursor,
    EventBatch,
    EventRows,
    RecordedEvent,
    ResultReader,
    decode_result,
    decode_row,
)
from hindsight_fast.errors import EventParseError, HindsightError, MalformedRow
from leaks import kept_bytes
from locked_page import BytesBeforeLockedPage
from plain_python import EVENT_COLUMNS, PlainEvent, PlainNewEvent

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


# --- Good rows ------------------------------------------------------------------------------------------------------


@given(events)
@example(EVENT)
@example(BARE)
@example(EMPTY)
def test_a_row_is_read_as_the_twin_reads_it(event):
    row = plain_python.encode_row(event)
    assert decode_both_ways(row) == plain_python.decode_row(row) == plain_python.in_utc(event)


@given(events)
def test_what_the_encoder_wrote_the_decoder_reads(event):
    new_event = PlainNewEvent(**{field.name: getattr(event, field.name) for field in fields(PlainNewEvent)})
    rows = rows_of([new_event])
    rows.place(event.transaction_no, plain_python.encode_bigint_array([event.stream_version]), event.created_at)
    assert seen(decode_row(rows.row(0), no_payload)) == plain_python.in_utc(replace(event, sequence_no=0))


@pytest.mark.parametrize(
    "kind",
    [
        bytes,
        bytearray,
        memoryview,
        msgspec.Raw,
        lambda row: array.array("B", row),
        lambda row: memoryview(b"x" + row)[1:],
    ],
    ids=["bytes", "bytearray", "memoryview", "msgspec.Raw", "array", "odd address"],
)
def test_any_contiguous_buffer_is_a_row(kind):
    assert seen(decode_row(kind(ROW), no_payload)) == EVENT


def test_an_event_keeps_nothing_of_its_buffer():
    buffer = bytearray(ROW)
    event = decode_row(buffer, no_payload)
    buffer[:] = bytes(len(ROW))
    buffer.extend(b"a bytearray cannot grow while a buffer of it is held")
    assert seen(event) == EVENT


@pytest.mark.parametrize("extreme", [datetime.min, datetime.max, datetime(1999, 12, 31, 23, 59, 59, 999999)])
def test_the_ends_of_time_are_read(extreme):
    event = replace(EVENT, created_at=extreme.replace(tzinfo=UTC))
    assert decode_both_ways(plain_python.encode_row(event)) == event


def test_a_long_row_is_read():
    event = replace(EVENT, payload=b"x" * 5_000_000, event_name="ñ" * 1_000_000)
    assert decode_both_ways(plain_python.encode_row(event)) == event


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


# --- Results without a reader ---------------------------------------------------------------------------------------


@given(st.lists(events, max_size=30))
def test_a_result_is_the_list_of_its_rows(many):
    result = PlainResult([plain_python.split_row(plain_python.encode_row(event)) for event in many])
    assert [seen(event) for event in decode_result(result, no_payload)] == [plain_python.in_utc(e) for e in many]


def test_more_names_than_are_remembered_are_kept_apart():
    # One name is the beginning of the next, and they come back after they were forgotten.
    many = [replace(EVENT, event_name="n" * (1 + n * 7 % 23)) for n in range(500)]
    result = PlainResult([plain_python.split_row(plain_python.encode_row(event)) for event in many])
    assert [event.name for event in decode_result(result, no_payload)] == [event.event_name for event in many]


@pytest.mark.parametrize("column_count", [0, 1, 10, 12])
def test_a_result_has_eleven_columns(column_count):
    with pytest.raises(MalformedRow, match="11 columns"):
        decode_result(PlainResult([[b""] * column_count], column_count=column_count), no_payload)


@pytest.mark.parametrize("column", range(11))
def test_every_column_is_binary(column):
    values = plain_python.split_row(ROW)
    formats = [0 if n == column else 1 for n in range(11)]
    with pytest.raises(MalformedRow, match="binary"):
        decode_result(PlainResult([values], formats), no_payload)


def test_values_that_are_no_bytes_are_refused():
    for wrong in ("x" * 8, bytearray(8), 5):
        with pytest.raises(TypeError):
            decode_result(PlainResult([[wrong, *plain_python.split_row(ROW)[1:]]]), no_payload)


def test_wrong_arguments_are_type_errors():
    for arguments in ((None, no_payload), (PlainResult([]), no_payload, "reader")):
        with pytest.raises(TypeError):
            decode_result(*arguments)
    with pytest.raises(TypeError):
        decode_row("text", None)


# --- The reader -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "library",
    ["/nonexistent/libpq.so", "", "libpq-of-nobody.so", "/", __file__, "\udcff", "libc.so.6", "x" * 10_000],
)
def test_a_library_that_is_not_loaded_or_brings_no_libpq_is_an_os_error(library):
    with pytest.raises(OSError, match=r"is not loaded|brings no libpq"):
        ResultReader(library)


def test_a_loaded_library_without_libpq_is_an_os_error():
    with pytest.raises(OSError, match="brings no libpq"):
        ResultReader(_core.__file__)


def test_a_path_with_a_nul_is_refused_and_not_cut_short():
    with pytest.raises(ValueError, match="null"):
        ResultReader(_core.__file__ + "\0.so")


@pytest.mark.parametrize("wrong", [None, b"libpq.so", 5])
def test_a_library_is_named_by_a_str(wrong):
    with pytest.raises(TypeError):
        ResultReader(wrong)


def test_there_is_no_reader_without_a_library():
    # Its function pointers would be NULL.
    with pytest.raises(TypeError):
        ResultReader()
    with pytest.raises(TypeError):
        ResultReader.__new__(ResultReader)


# --- The event ------------------------------------------------------------------------------------------------------


def test_the_payload_is_decoded_when_asked_for_and_once():
    calls = []

    def decode_payload(event):
        calls.append(event)
        return event.data.decode()

    event = decode_row(ROW, decode_payload)
    assert not calls
    assert event.payload is event.payload
    assert event.payload == '{"a": 1}'
    assert len(calls) == 1
    assert calls[0] is event


def test_a_payload_that_cannot_be_decoded_raises_every_time_and_keeps_the_rest():
    def decode_payload(event):
        raise LookupError("no such version")

    event = decode_row(ROW, decode_payload)
    for _ in range(2):
        with pytest.raises(LookupError):
            event.payload  # noqa: B018
    assert seen(event) == EVENT


def test_a_payload_of_none_is_also_decoded_once():
    calls = []
    event = decode_row(ROW, calls.append)
    assert event.payload is None
    assert event.payload is None
    assert len(calls) == 1


def test_metadata_is_exact_or_an_error():
    def metadata_of(text):
        return decode_row(plain_python.encode_row(replace(EVENT, metadata=text)), no_payload).metadata

    assert metadata_of(None) is None
    assert metadata_of(b"null") is None
    assert metadata_of(b"[123456789012345678901234567890, 1.5]") == [123456789012345678901234567890, 1.5]
    assert metadata_of('{"größe": "\\u00e4"}'.encode()) == {"größe": "ä"}
    for broken in (b"", b"{", b"NaN", b"{}x"):
        with pytest.raises(EventParseError, match="metadata: "):
            metadata_of(broken)


@given(events, events)
def test_events_are_equal_if_they_are_stored_equal(left, right):
    a, again, b = (decode_row(plain_python.encode_row(event), no_payload) for event in (left, left, right))
    assert a == again
    assert hash(a) == hash(again)
    assert (a == b) == (plain_python.in_utc(left) == plain_python.in_utc(right))
    assert (a != b) == (not a == b)  # noqa: SIM201 (the two operators)


CHANGES = [
    {"transaction_no": 813},
    {"sequence_no": 4},
    {"event_id": UUID(int=9)},
    {"stream_id": UUID(int=9)},
    {"stream_version": 45},
    {"created_at": EVENT.created_at + timedelta(microseconds=1)},
    {"event_version": 3},
    {"correlation_id": None},
    {"correlation_id": UUID(int=9)},
    {"event_name": "grösse"},
    {"payload": b'{"a":1}'},
    {"metadata": None},
    {"metadata": b"{}"},
]


@pytest.mark.parametrize("change", CHANGES, ids=repr)
def test_one_different_field_makes_another_event(change):
    other = decode_row(plain_python.encode_row(replace(EVENT, **change)), no_payload)
    assert decode_row(ROW, no_payload) != other
    assert seen(other) == replace(EVENT, **change)


def test_the_changes_cover_every_column():
    assert {column for change in CHANGES for column in change} == set(EVENT_COLUMNS)


def test_an_event_equals_nothing_else():
    event = decode_row(ROW, no_payload)
    for other in (None, 5, ROW, EVENT, event.cursor):
        assert event != other
        assert not event == other  # noqa: SIM201 (the other operator)
    with pytest.raises(TypeError, match="not supported"):
        event < event  # noqa: B015


def test_ids_are_ordinary_uuids():
    event = decode_row(ROW, no_payload)
    for made, plain in ((event.event_id, EVENT.event_id), (event.correlation_id, EVENT.correlation_id)):
        assert type(made) is UUID
        assert (made, hash(made), str(made), made.bytes, made.is_safe) == (
            plain,
            hash(plain),
            str(plain),
            plain.bytes,
            plain.is_safe,
        )
        assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == plain


def test_an_event_cannot_be_changed_or_made():
    event = decode_row(ROW, no_payload)
    for name in ("name", "data", "metadata_json", "version", "cursor", "payload", "metadata", "anything"):
        with pytest.raises(AttributeError):
            setattr(event, name, b"")
    with pytest.raises(TypeError, match="comes from a store"):
        RecordedEvent()
    with pytest.raises(TypeError):
        type("Sub", (RecordedEvent,), {})
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):  # rather than half an event
        with pytest.raises(TypeError):
            copied(event)
    assert type(RecordedEvent[int]) is GenericAlias


def test_an_event_made_by_force_is_empty_and_harmless():
    hollow = RecordedEvent.__new__(RecordedEvent)
    assert hollow.cursor == Cursor(0, 0)
    assert hollow == RecordedEvent.__new__(RecordedEvent)
    assert hollow != decode_row(ROW, no_payload)
    assert hollow.metadata is None
    hash(hollow)
    for touch in (lambda: hollow.payload, lambda: repr(hollow)):
        with pytest.raises(TypeError):
            touch()


def test_a_repr_shows_no_payload():
    text = repr(decode_row(ROW, no_payload))
    assert str(EVENT.stream_id) in text
    assert "812:3" in text
    assert "größe" in text
    assert '"a"' not in text


# --- Memory ---------------------------------------------------------------------------------------------------------


def test_decoding_keeps_no_memory_not_even_when_it_fails():
    result = PlainResult([plain_python.split_row(ROW), plain_python.split_row(BARE_ROW)])
    values = plain_python.split_row(ROW)
    values[8] = b"\xff"
    half_bad = PlainResult([plain_python.split_row(ROW), values])

    def decode():
        event = decode_row(ROW, lambda event: event)  # a payload that is its own event: a cycle
        seen(event)
        event.payload, event.metadata, repr(event), hash(event)
        decode_result(result, no_payload)
        for bad in (ROW[:-1], ROW + b"x", b"", plain_python.encode_values(values)):
            try:
                decode_row(bad, no_payload)
            except MalformedRow:
                continue
            raise AssertionError
        with contextlib.suppress(MalformedRow):
            decode_result(half_bad, no_payload)

    assert kept_bytes(decode) == 0


def test_cursors_keep_no_memory_not_even_when_they_fail():
    def use():
        cursor = Cursor(2**40, 2**20)
        pickle.loads(pickle.dumps(cursor))
        Cursor.from_dict(Cursor.parse(str(cursor)).to_dict())
        sorted([cursor, Cursor.BEGINNING, cursor])
        for call in (lambda: Cursor(-1, 0), lambda: Cursor.parse("x"), lambda: cursor < 5, lambda: Cursor(None, 0)):
            try:
                call()
            except (ValueError, TypeError):
                continue
            raise AssertionError

    assert kept_bytes(use) == 0


def test_an_event_holds_its_decoder_and_lets_it_go():
    def decode_payload(event):
        return object()

    before = sys.getrefcount(decode_payload)
    kept = [decode_row(ROW, decode_payload) for _ in range(100)]
    assert sys.getrefcount(decode_payload) == before + 100
    del kept
    gc.collect()
    assert sys.getrefcount(decode_payload) == before


if __name__ == "__main__":
    if sys.argv[1] == "before a locked page":
        read_rows_before_a_locked_page()
    else:
        print("reading on", flush=True)
        ctypes.string_at(BytesBeforeLockedPage().locked_address - 1, 2)


def test_a_batch_is_a_sequence_that_keeps_no_event():
    events = [replace(EVENT, sequence_no=n) for n in range(7)]
    result = PlainResult([plain_python.split_row(plain_python.encode_row(event)) for event in events])
    batch = EventBatch(result)
    expected = decode_result(result)
    assert isinstance(batch, Sequence)
    assert len(batch) == 7
    assert list(batch) == expected
    assert list(reversed(batch)) == expected[::-1]
    assert [batch[n] for n in range(-7, 7)] == expected * 2
    assert batch[1:6:2] == expected[1:6:2]
    assert batch[::-1] == expected[::-1]
    assert expected[3] in batch
    assert (batch.index(expected[3]), batch.count(expected[3])) == (3, 1)
    assert batch.payload_bytes == sum(len(event.data) for event in expected)
    assert batch[0] is not batch[0]
    for wrong in (7, -8, 10**30):
        with pytest.raises(IndexError):
            batch[wrong]
    with pytest.raises(TypeError):
        batch["0"]
    with pytest.raises(ValueError, match="not in list"):
        batch.index(decode_row(plain_python.encode_row(replace(EVENT, sequence_no=99))))
    assert "7 events" in repr(batch)
    assert not EventBatch(PlainResult([]))


def test_a_row_of_a_batch_that_is_no_event_is_found_when_it_is_reached():
    good = plain_python.split_row(ROW)
    batch = EventBatch(PlainResult([good, [good[0][:7], *good[1:]]]))
    assert batch[0] == decode_row(ROW)
    with pytest.raises(MalformedRow, match="transaction_no"):
        batch[1]


def test_without_a_decoder_a_payload_is_plain_json():
    assert decode_row(plain_python.encode_row(replace(EVENT, payload=b'{"n": 18446744073709551616}'))).payload == {
        "n": 2**64
    }
    for broken in (b"", b"{", b'{"n": 1e400}', b'"\xff"'):
        event = decode_row(plain_python.encode_row(replace(EVENT, payload=broken)))
        for _ in range(2):
            with pytest.raises(EventParseError) as caught:
                event.payload  # noqa: B018
        assert caught.value.cursor == event.cursor
        assert not str(caught.value.reason).startswith("metadata")
