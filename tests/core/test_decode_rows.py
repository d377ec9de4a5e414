"""Rows into recorded events: the compiled decoder against its plain twin."""

import array
import contextlib
import copy
import gc
import pickle
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
from compiled_core import PlainResult, decode_both_ways, no_payload, rows_of, seen
from event_strategies import events
from given_rows import BARE, BARE_ROW, EMPTY, EVENT, ROW
from hindsight_fast import _core
from hindsight_fast._core import (
    Cursor,
    EventBatch,
    RecordedEvent,
    ResultReader,
    decode_result,
    decode_row,
)
from hindsight_fast.errors import EventParseError, MalformedRow
from leaks import kept_bytes
from plain_python import EVENT_COLUMNS, PlainNewEvent

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
