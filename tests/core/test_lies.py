"""Rows, arrays, results and lines that lie, by the million where there is time: an error each time, never a crash.

What Hypothesis does thoughtfully in the other files is done here fast: a generator with a printed seed damages what was
right, and every outcome is compared with the plain twin's. HINDSIGHT_SOAK makes it a million a test.
"""

from __future__ import annotations

import os
import random
import struct
from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID

import psycopg
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import plain_python
from compiled_core import decode_both_ways, expected_of, no_payload, rows_of, seen
from event_strategies import events
from hindsight_fast._core import Cursor, EventBatch, EventRows, check_fields, decode_result
from hindsight_fast.errors import MalformedRow
from hindsight_fast.import_lines import BadLine, LineReader
from hindsight_fast.results import result_reader
from libpq_results import LibpqResult
from plain_python import PlainCursor, PlainEvent, PlainNewEvent

EXAMPLES = 1_000_000 if os.environ.get("HINDSIGHT_SOAK") else 2_000
NOW = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
FULL = PlainEvent(812, 3, UUID(int=1), UUID(int=2), 44, NOW, 2, UUID(int=3), "größe", b'{"a": 1}', b'{"b": 2}')
ROWS = [
    plain_python.encode_row(event)
    for event in (FULL, replace(FULL, correlation_id=None, metadata=None), replace(FULL, payload=b"", metadata=b""))
]
LENGTHS = [-(2**31), -2, -1, 0, 1, 7, 8, 9, 15, 16, 17, 255, 2**16, 2**24, 2**31 - 5, 2**31 - 1]


@pytest.fixture
def chance() -> random.Random:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")  # pytest shows it where a test fails
    return random.Random(seed)


def damaged(good: bytes, chance: random.Random) -> bytes:
    """*good* with some bytes changed, lost, repeated, moved, or replaced by a length."""
    bad = bytearray(good)
    for _ in range(chance.randint(1, 3)):
        at, to = sorted(chance.randrange(len(bad) + 1) for _ in range(2))
        match chance.randrange(7):
            case 0:
                del bad[at:]
            case 1:
                del bad[at : min(to, at + 8)]
            case 2:
                bad[at:at] = bad[at:to]  # overlapping what follows
            case 3:
                bad[at : at + 4] = struct.pack("!i", chance.choice(LENGTHS))
            case 4:
                bad[at:at] = chance.randbytes(chance.randint(1, 9))
            case 5 if at < len(bad):
                bad[at] ^= 1 << chance.randrange(8)
            case _ if at < len(bad):
                bad[at] = chance.randrange(256)
        if not bad:
            break
    return bytes(bad)


# --- Rows and results -----------------------------------------------------------------------------------------------


def test_damaged_rows(chance: random.Random) -> None:
    for _ in range(EXAMPLES):
        row = damaged(chance.choice(ROWS), chance)
        assert decode_both_ways(row) == expected_of(row)


def in_libpq(rows: list[list[bytes | None]], formats: tuple[int, ...] = (1,) * 11) -> LibpqResult:
    reader = result_reader()
    assert reader is not None
    return LibpqResult(reader.library, rows, formats)


def outcome_in_place(values: list[bytes | None]) -> object:
    """What decoding makes of a row in libpq's memory, where a sanitizer knows the end of it."""
    try:
        return seen(decode_result(in_libpq([values]), no_payload, result_reader())[0])
    except MalformedRow:
        return MalformedRow


def outcome_of_values(values: list[bytes | None]) -> object:
    try:
        return plain_python.decode_values(values)
    except ValueError:
        return MalformedRow


needs_reader = pytest.mark.skipif(
    psycopg.pq.__impl__ == "python", reason="psycopg's Python implementation: nothing is read in libpq's memory"
)


@needs_reader
@given(events, st.lists(st.tuples(st.integers(0, 10), st.none() | st.binary(max_size=20)), max_size=3))
@example(FULL, [(n, b"") for n in range(11)])
@example(FULL, [(n, None) for n in range(11)])
def test_values_of_any_size_in_a_result(event: PlainEvent, lies: list[tuple[int, bytes | None]]) -> None:
    values = plain_python.split_row(plain_python.encode_row(event))
    for column, value in lies:
        values[column] = value
    assert outcome_in_place(values) == outcome_of_values(values)


@needs_reader
def test_damaged_values_in_a_result(chance: random.Random) -> None:
    good = [plain_python.split_row(row) for row in ROWS]
    for _ in range(EXAMPLES // 4):
        values = list(chance.choice(good))
        for column in chance.sample(range(11), chance.randint(1, 3)):
            values[column] = None if chance.random() < 0.2 else damaged(values[column] or bytes(8), chance)
        assert outcome_in_place(values) == outcome_of_values(values)


@needs_reader
def test_a_result_of_another_shape_is_refused_where_it_lies() -> None:
    values = plain_python.split_row(ROWS[0])
    for column_count in (0, 1, 10, 12, 40):
        result = in_libpq([(values * 4)[:column_count]], (1,) * column_count)
        with pytest.raises(MalformedRow, match="11 columns"):
            EventBatch(result, no_payload, result_reader())
    for column in range(11):
        formats = tuple(0 if n == column else 1 for n in range(11))
        with pytest.raises(MalformedRow, match="binary"):
            EventBatch(in_libpq([values], formats), no_payload, result_reader())


@needs_reader
def test_a_result_that_was_cleared_is_an_error_and_its_events_live_on() -> None:
    result = in_libpq([plain_python.split_row(row) for row in ROWS])
    batch = EventBatch(result, no_payload, result_reader())
    first, second = batch[0], batch[1]
    size = batch.payload_bytes
    assert size == sum(len(event.data) for event in batch)
    result.clear()
    for touch in (lambda: batch[2], lambda: list(batch), lambda: batch.payload_bytes):
        with pytest.raises(ValueError, match="cleared"):
            touch()
    assert (seen(first), seen(second)) == tuple(plain_python.decode_row(row) for row in ROWS[:2])


class LyingResult:
    """A result that answers with something else each time it is asked."""

    def __init__(self, answers: dict[str, object]) -> None:
        self.answers = answers

    def __getattr__(self, name: str) -> object:
        answer = self.answers[name]
        if isinstance(answer, Exception):
            raise answer
        return answer


VALUES = plain_python.split_row(ROWS[0])
HONEST = {"ntuples": 1, "nfields": 11, "fformat": lambda column: 1, "get_value": lambda row, column: VALUES[column]}


@pytest.mark.parametrize(
    ("name", "lie", "error"),
    [
        ("ntuples", 2**31, OverflowError),
        ("ntuples", -1, MalformedRow),  # once a SystemError, as no length may be negative
        ("ntuples", "1", TypeError),
        ("ntuples", RuntimeError("no"), RuntimeError),
        ("nfields", 10, MalformedRow),
        ("nfields", None, MalformedRow),
        ("fformat", lambda column: 0, MalformedRow),
        ("fformat", None, TypeError),
        ("get_value", lambda row, column: None, MalformedRow),
        ("get_value", lambda row, column: b"", MalformedRow),
        ("get_value", lambda row, column: "text", TypeError),
        ("get_value", lambda row, column: bytearray(8), TypeError),
        ("get_value", lambda row, column: VALUES[10 - column], MalformedRow),
        ("get_value", None, TypeError),
    ],
)
def test_a_result_that_lies_is_an_error(name: str, lie: object, error: type[Exception]) -> None:
    assert seen(EventBatch(LyingResult(HONEST), no_payload)[0]) == FULL  # type: ignore[arg-type]
    with pytest.raises(error):
        EventBatch(LyingResult({**HONEST, name: lie}), no_payload)[0]  # type: ignore[arg-type]


@needs_reader
def test_an_address_of_nothing_is_a_cleared_result() -> None:
    for nothing in (0, None):
        with pytest.raises(ValueError, match="cleared"):
            EventBatch(LyingResult({"pgresult_ptr": nothing}), no_payload, result_reader())  # type: ignore[arg-type]


# --- Arrays ---------------------------------------------------------------------------------------------------------

THREE_STREAMS = [PlainNewEvent(UUID(int=n), UUID(int=n % 3 + 1), "name", 1, b"{}") for n in range(7)]
THREE_HEADS = plain_python.encode_bigint_array([10, 20, 30])
COUNTS = [3, 2, 2]


def heads_in(array: bytes) -> list[int] | type[Exception]:
    """What ``place`` should see in *array*: the heads of THREE_STREAMS, or which error."""
    good = plain_python.encode_bigint_array([0, 0, 0])
    # The lower bound may be any, the heads are the heads; every other byte is given.
    if len(array) != len(good) or any(
        array[at] != good[at] for at in (*range(16), *(20 + 12 * n + i for n in range(3) for i in range(4)))
    ):
        return MalformedRow
    heads = [struct.unpack_from("!q", array, 24 + 12 * n)[0] for n in range(3)]
    return heads if all(head >= count - 1 for head, count in zip(heads, COUNTS, strict=True)) else ValueError


def assert_placed_as(rows: EventRows, array: bytes) -> None:
    expected = heads_in(array)
    if not isinstance(expected, list):
        # Of an array with both faults either may be met first; a MalformedRow is a ValueError, too.
        with pytest.raises(ValueError, match="head version" if expected is ValueError else None):
            rows.place(7, array, NOW)
        with pytest.raises(ValueError, match="place"):
            next(rows.blocks())
        return
    new_streams = rows.place(7, array, NOW)
    heads = {UUID(int=n + 1): head for n, head in enumerate(expected)}
    placed = plain_python.place(THREE_STREAMS, 7, heads, NOW)
    assert [rows.row(n) for n in range(7)] == [plain_python.encode_row(event) for event in placed]
    assert new_streams == sum(head == count - 1 for head, count in zip(expected, COUNTS, strict=True))


@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 4), min_size=3, max_size=3))
@example([2, 1, 1])
@example([1, 1, 1])
@example([-(2**63)] * 3)
@example([2**63 - 1] * 3)
def test_heads_that_lie(heads: list[int]) -> None:
    assert_placed_as(rows_of(THREE_STREAMS), plain_python.encode_bigint_array(heads))


def test_damaged_arrays(chance: random.Random) -> None:
    rows = rows_of(THREE_STREAMS)
    for _ in range(EXAMPLES):
        assert_placed_as(rows, damaged(THREE_HEADS, chance))


# --- Choosing rows --------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-2, 8), max_size=9))
@example([0, 1, 2, 3, 4, 5, 6])
@example([])
def test_choosing_rows_is_adding_those_events_alone(numbers: list[int]) -> None:
    new_events = [replace(event, created_at=NOW if n % 2 else None) for n, event in enumerate(THREE_STREAMS)]
    rows = rows_of(new_events)
    before = [rows.row(n) for n in range(7)], rows.stream_arrays(), rows.event_ids()
    rising = all(left < right for left, right in zip([-1, *numbers], numbers, strict=False))
    if not rising or any(n > 6 for n in numbers):
        with pytest.raises((ValueError, IndexError)):
            rows.select(numbers)
    else:
        chosen, fresh = rows.select(numbers), rows_of([new_events[n] for n in numbers])
        assert (len(chosen), chosen.byte_count, chosen.stream_count) == (
            len(numbers),
            fresh.byte_count,
            fresh.stream_count,
        )
        assert chosen.stream_arrays() == fresh.stream_arrays()
        assert chosen.event_ids() == plain_python.encode_uuid_array([new_events[n].event_id for n in numbers])
        assert [chosen.is_dated(n) for n in range(len(numbers))] == [n % 2 == 1 for n in numbers]
        if numbers:
            heads = plain_python.encode_bigint_array([9] * fresh.stream_count)
            assert chosen.place(5, heads, NOW) == fresh.place(5, heads, NOW)
            assert b"".join(chosen.blocks()) == b"".join(fresh.blocks())
    assert ([rows.row(n) for n in range(7)], rows.stream_arrays(), rows.event_ids()) == before


def test_rows_that_were_placed_are_open_again_once_chosen() -> None:
    rows = rows_of(THREE_STREAMS)
    rows.place(7, THREE_HEADS, NOW)
    chosen = rows.select(range(7))
    with pytest.raises(ValueError, match="place"):
        next(chosen.blocks())
    chosen.place(7, THREE_HEADS, NOW)
    assert b"".join(chosen.blocks()) == b"".join(rows.blocks())


@pytest.mark.parametrize("wrong", [None, 5, ["0"], [0.0], [None], [2**70], [-1], [-(2**70)], [0, 0], [1, 0], [7]])
def test_rows_are_chosen_by_rising_numbers_that_are_there(wrong: object) -> None:
    with pytest.raises((TypeError, ValueError, IndexError)):
        rows_of(THREE_STREAMS).select(wrong)  # type: ignore[arg-type]


def test_rows_that_change_while_they_are_chosen_do_no_harm() -> None:
    def emptying():  # type: ignore[no-untyped-def]
        yield 0
        rows.clear()
        yield 1

    class EmptyingNumber:
        def __index__(self) -> int:
            rows.clear()
            return 1

    for numbers in (emptying(), [0, EmptyingNumber()]):
        rows = rows_of(THREE_STREAMS)
        with pytest.raises(IndexError):
            rows.select(numbers)
        assert len(rows) == 0


@pytest.mark.parametrize("index", [-1, 7, 2**62, -(2**63)])
def test_no_row_outside_is_dated(index: int) -> None:
    with pytest.raises(IndexError):
        rows_of(THREE_STREAMS).is_dated(index)


# --- Lines ----------------------------------------------------------------------------------------------------------

FULL_LINE = (
    b'{"stream":"order-4711","type":"placed","data":{"t":[1,"}"]},"version":3,"id":"018f3b1e-0000-7000-8000-0000000000'
    b'aa","time":"2024-01-01T12:34:56.789012+02:00","\\u0063orrelation_id":null,"metadata":{"who":"\\"\xc5\xbdofie\\\\"}}'
)


def test_damaged_lines(chance: random.Random) -> None:
    reader, rows = LineReader("a"), EventRows()
    for n in range(EXAMPLES):
        line = damaged(FULL_LINE, chance)
        before = len(rows), rows.byte_count
        try:
            reader.add(line, n, [rows])
        except BadLine:
            assert (len(rows), rows.byte_count) == before
        else:
            assert len(rows) == before[0] + 1
            if is_utf8(line):  # what is not is found by the block
                said = plain_python.read_line(line)
                assert plain_python.decode_row(with_place(rows)).payload == said.payload
            rows.clear()


def with_place(rows: EventRows) -> bytes:
    last = rows.select([len(rows) - 1])
    last.place(1, plain_python.encode_bigint_array([0]), NOW)
    return last.row(0)


def is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_damaged_lines_a_block_at_a_time(chance: random.Random) -> None:
    # Nothing is left over that LineReader.add would not take as well, and nothing is made of what it refuses.
    plain = FULL_LINE.replace(b"\\u0063", b"c")
    for _ in range(EXAMPLES // 100):
        block = b"\n".join([damaged(plain, chance) if chance.random() < 0.9 else plain for _ in range(100)])
        reader, at, taken, expected = LineReader("a"), 0, EventRows(), EventRows()
        while at < len(block):
            start = at
            passed, at, _ = reader.add_plain(block, start, chance.choice((1, 7, 1000)), 1, 0, [taken])
            for line_no, line in enumerate(block[start:at].split(b"\n")[:passed], 1):
                if line.strip():
                    line.decode()
                    reader.add(line, line_no, [expected])
            if passed == 0:
                at = block.find(b"\n", at) + 1 or len(block)
        assert [taken.row(n) for n in range(len(taken))] == [expected.row(n) for n in range(len(expected))]


def test_damaged_lines_scanned_whatever_they_are(chance: random.Random) -> None:
    data_at, data_end = FULL_LINE.index(b'{"t"'), FULL_LINE.index(b',"version"')
    for _ in range(EXAMPLES):
        line = damaged(FULL_LINE, chance)
        view = memoryview(line)[min(data_at, len(line)) : chance.choice((data_end, len(line), data_at))]
        try:
            check_fields(line, view, view)
        except ValueError:
            continue


# --- Cursors --------------------------------------------------------------------------------------------------------


def test_damaged_cursors(chance: random.Random) -> None:
    for _ in range(EXAMPLES):
        text = damaged(b"9223372036854775807:2147483647"[chance.randrange(20) :], chance).decode("latin-1")
        try:
            expected: object = PlainCursor.parse(text)
        except ValueError:
            expected = ValueError
        try:
            cursor = Cursor.parse(text)
        except ValueError:
            assert expected is ValueError
        else:
            assert expected == PlainCursor(cursor.transaction_no, cursor.sequence_no)
