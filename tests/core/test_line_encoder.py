"""The core's own reader of import lines: whatever it takes is what LineReader.add alone would have made of it.

LineReader.add is compared with its plain twin in test_import_lines; here it is the judge.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from hindsight_fast._core import EventRows, LineEncoder, count_newlines
from hindsight_fast.demo_events import demo_lines
from hindsight_fast.import_chunks import ChunkMaker
from hindsight_fast.import_lines import LineReader
from hindsight_fast.import_source import GZIP_MAGIC, LineSource
from line_strategies import FULL_LINE, ODD_VALUES, nearly_lines, nested, values
from locked_page import BytesBeforeLockedPage
from plain_python import FIELD_NAMES, MAX_NESTING

PLAIN = b'{"stream":"s","type":"t","data":{}}'


# --- With and without -----------------------------------------------------------------------------------------------


@contextmanager
def by_line_reader_alone() -> Iterator[None]:
    """Every line is left to LineReader.add."""

    def take_none(
        self: LineReader, block: bytes, start: int, count: int, line_no: int, offset: int, shards: Any
    ) -> Any:
        return 0, start, [(b"", b"")] * len(shards)

    with patch.object(LineReader, "add_plain", take_none):
        yield


def chunks_of(text: bytes, shard_count: int, most_events: int) -> list[dict[str, Any]]:
    """All that an import would store and report of *text*."""
    seen = []
    with LineSource(io.BytesIO(text)) as source:
        maker = ChunkMaker(source, "import", most_events, shard_count=shard_count, collect=True)
        ended = False
        while not ended:
            for chunk in maker.finish():
                ended = chunk.at_end
                seen.append(
                    {
                        "shard": chunk.shard,
                        "rows": [chunk.rows.row(n) for n in range(len(chunk.rows))],
                        "dated": [chunk.rows.is_dated(n) for n in range(len(chunk.rows))],
                        "streams": chunk.rows.stream_arrays(),
                        "line_nos": chunk.line_nos,
                        "offsets": chunk.offsets,
                        "lines": chunk.lines,
                        "line_bytes": chunk.line_bytes,
                        "rejected": chunk.rejected,
                        "start": chunk.start,
                        "end": chunk.end,
                    }
                )
    return seen


def assert_same_with_and_without(text: bytes, shard_count: int = 1, most_events: int = 1000) -> None:
    found = chunks_of(text, shard_count, most_events)
    with by_line_reader_alone():
        expected = chunks_of(text, shard_count, most_events)
    assert found == expected
    # What is said of a line is true of the source.
    for chunk in found:
        for offset, line in zip(chunk["offsets"], chunk["lines"], strict=True):
            assert text[offset : offset + len(line)] == line or text.startswith(b"\xef\xbb\xbf")


def lines_taken(text: bytes) -> tuple[int, list[bytes]]:
    """How many lines the core takes by itself, and those that it leaves to others."""
    reader, rows = LineReader("import"), EventRows()
    at, left = 0, []
    while at < len(text):
        _, at, _ = reader.add_plain(text, at, 10**9, 1, 0, [rows])
        if at < len(text):
            end = text.index(b"\n", at) if b"\n" in text[at:] else len(text)
            left.append(text[at:end])
            at = min(end + 1, len(text))
    return len(rows), left


blanks = st.just("") | st.text(st.sampled_from(" \t\r"), max_size=2)
uuids = st.builds(str, st.uuids()) | st.builds(lambda uuid: str(uuid).upper(), st.uuids())
names = st.sampled_from(["order-1", "order-2", "größe", "заказ", "주문", "\x7f", "🐍"]) | st.text(
    st.characters(exclude_characters='"\\', exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12
)
times = st.builds(
    "{:%Y-%m-%dT%H:%M:%S}{}{}".format,
    st.datetimes(datetime(1000, 1, 1)) | st.datetimes(datetime(2023, 12, 30), datetime(2024, 3, 2)),
    st.just("") | st.from_regex(r"\.[0-9]{1,6}", fullmatch=True),
    st.just("Z") | st.from_regex(r"[+-](0[0-9]|1[0-4]):[0-5][0-9]", fullmatch=True),
)
numbers = st.from_regex(r"(0|[1-9][0-9]?)(\.[0-9]{1,2})?([eE][+-]?[0-9]{1,2})?", fullmatch=True)

odd_texts = st.sampled_from(["", "x" * 1001, 'a"b', "\\", "\0", "\n", "\x1f"]) | st.text(max_size=3)
odd_uuids = st.sampled_from(
    ["018f3b1e000070008000000000000000", "018f3b1e-0000-7000-8000-00000000000g", "018f3b1e-0000-70008-000-000000000000"]
)
odd_times = st.builds(
    "{}-{}-{}{}{}:{}:{}{}{}".format,
    st.sampled_from(["2024", "2023", "1900", "2000", "0001", "9999", "0000", "+2024", "24"]),
    st.sampled_from(["00", "01", "02", "12", "13", "2"]),
    st.sampled_from(["00", "01", "28", "29", "30", "31", "32", "3"]),
    st.sampled_from("TTTt _"),
    st.sampled_from(["00", "12", "23", "24", "-1"]),
    st.sampled_from(["00", "59", "60"]),
    st.sampled_from(["00", "59", "60", "61", "5"]),
    st.sampled_from(["", "", ".", ",5", ".5e", ".123456", ".1234567", ".9999999"]),
    st.sampled_from(["Z", "z", "", "+00:00", "-00:00", "+14:00", "-23:59", "+24:00", "+10:60", "+0200", "+02", "ZZ"]),
)
odd_numbers = st.from_regex(r"\A-?[0-9]{0,3}(\.[0-9]{0,2})?([eE][+-]?[0-9]{0,2})?\Z")
odd_values = (
    st.sampled_from(ODD_VALUES).map(lambda value: value.decode())
    | st.builds(json.dumps, odd_texts | odd_uuids | odd_times)
    | odd_numbers
    | st.integers(2**31 - 2, 2**31 + 2).map(str)
    | st.builds('{{"n":[1, {}]}}'.format, odd_numbers)
)


@st.composite
def objects(draw: Any) -> str:
    """An object in JSON, with as much white space as there can be in a line."""
    if draw(st.booleans()):
        return '{"n":' + draw(blanks) + draw(numbers) + draw(blanks) + "}"
    members = draw(st.dictionaries(names, values, max_size=3))
    comma, colon = draw(blanks) + "," + draw(blanks), draw(blanks) + ":" + draw(blanks)
    text = json.dumps(members, ensure_ascii=draw(st.booleans()), separators=(comma, colon))
    return text[0] + draw(blanks) + text[1:]


RIGHT: dict[str, st.SearchStrategy[str]] = {
    "stream": (names | uuids).map(lambda name: f'"{name}"'),
    "type": names.map(lambda name: f'"{name}"'),
    "data": objects(),
    "version": st.integers(0, 2**31 - 1).map(str) | st.integers(0, 9).map(str),
    "id": uuids.map(lambda uuid: f'"{uuid}"') | st.just("null"),
    "time": times.map(lambda time: f'"{time}"') | st.just("null"),
    "correlation_id": uuids.map(lambda uuid: f'"{uuid}"') | st.just("null"),
    "metadata": objects() | st.just("null"),
}


@st.composite
def import_lines(draw: Any) -> bytes:
    """A line that is right, or would be but for one thing."""
    what = draw(st.sampled_from(["right", "right", "right", "a value", "a member", "no member", "bytes"]))
    wanted = ["stream", "type", "data", *draw(st.lists(st.sampled_from(FIELD_NAMES[3:]), unique=True))]
    members = [(name, draw(RIGHT[name])) for name in draw(st.permutations(wanted))]
    if what == "a value":
        at = draw(st.integers(0, len(members) - 1))
        members[at] = (members[at][0], draw(odd_values))
    elif what == "no member":
        members.remove(draw(st.sampled_from(members)))
    elif what == "a member":
        members.append(draw(st.sampled_from([*members, ("extra", "1"), ("\\u0074ype", '"t"'), ("", "{}")])))
    text = draw(blanks) + "{"
    for n, (name, value) in enumerate(members):
        text += "," * (n > 0) + draw(blanks) + f'"{name}"' + draw(blanks) + ":" + draw(blanks) + value + draw(blanks)
    line = (text + "}" + draw(blanks)).encode()
    if what == "bytes":
        for _ in range(draw(st.integers(1, 2))):
            at = draw(st.integers(0, len(line)))
            put = draw(st.sampled_from(b'"\\{}[],: 0aZ-.\0\x1f\x7f\x80\xc3\xed\xff') | st.integers(0, 255))
            line = line[:at] + bytes([put]) + line[at + draw(st.integers(0, 1)) :]
    return line


others = st.sampled_from([b"", b" ", b"\r", b"\t \r", b"\x0b", b"\x0c ", b"\x1c", b"{}", b"null", b"\xff"])


@st.composite
def sources(draw: Any) -> bytes:
    lines = draw(st.lists(import_lines() | import_lines() | import_lines() | nearly_lines() | others, max_size=12))
    newline = draw(st.sampled_from([b"\n", b"\n", b"\r\n"]))
    start = draw(st.sampled_from([b"", b"", b"", b"\xef\xbb\xbf", b"\xef\xbb"]))
    return start + newline.join(lines) + draw(st.sampled_from([b"", newline]))


@settings(suppress_health_check=[HealthCheck.too_slow])  # in the sanitizers' build
@given(sources(), st.sampled_from([1, 1, 2, 3, 7]), st.sampled_from([1, 2, 5, 1000]))
@example(FULL_LINE, 1, 1)
@example(b"\xef\xbb\xbf" + PLAIN + b"\r\n\r\n" + PLAIN, 1, 1000)
@example(b"\n".join([PLAIN, b"no JSON", PLAIN, PLAIN.replace(b"}}", b"\xff}}"), PLAIN]), 3, 2)
def test_an_import_is_the_same_with_the_core_s_reader_and_without(
    text: bytes, shard_count: int, most_events: int
) -> None:
    assume(not text.startswith(GZIP_MAGIC))
    assert_same_with_and_without(text, shard_count, most_events)


def assert_same_line_by_line(lines: list[bytes]) -> None:
    assert_same_with_and_without(b"\n".join(line for line in lines if b"\n" not in line))


def test_any_byte_anywhere_in_a_line_changes_nothing_between_them() -> None:
    with_more = FULL_LINE.replace(b'{"total":12}', '{"a": [1.5e-3,true,"ä\\n€🐍\\u00e4"], "b":{} }'.encode())
    lines = [with_more]
    for at in range(len(with_more)):
        for byte in (*range(0x30), *b"09:?AZ[\\]_aefnrtuz{|}~", *range(0x7F, 0x100, 5), 0xC3, 0xE2, 0xED, 0xF0, 0xF4):
            lines.append(with_more[:at] + bytes([byte]) + with_more[at + 1 :])
        lines += [with_more[:at], with_more[at:], with_more[:at] + with_more[at + 1 :]]
    assert_same_line_by_line(lines)


@pytest.mark.parametrize("name", FIELD_NAMES)
def test_odd_values_of_each_field(name: str) -> None:
    members = {"stream": b'"s"', "type": b'"t"', "data": b"{}"}
    lines = []
    for value in ODD_VALUES:
        changed = {**members, name: value}
        lines.append(b"{" + b",".join(b'"%s":%s' % (key.encode(), each) for key, each in changed.items()) + b"}")
        lines.append(b"{" + b" , ".join(b'"%s" : %s' % (key.encode(), each) for key, each in changed.items()) + b"}\r")
    assert_same_line_by_line(lines)


CHARACTERS = [
    *(bytes([first]) for first in range(0x20, 0x100)),
    *(
        bytes([first, second])
        for first in range(0xC0, 0xF8)
        for second in (0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0)
    ),
    *(
        bytes([first, second, last])
        for first in (0xE0, 0xE1, 0xED, 0xEE, 0xEF)
        for second in (0x7F, 0x80, 0x9F, 0xA0, 0xBF, 0xC0)
        for last in (0x7F, 0x80, 0xBF, 0xC0)
    ),
    *(
        bytes([first, second, third, last])
        for first in (0xF0, 0xF1, 0xF4, 0xF5)
        for second in (0x80, 0x8F, 0x90, 0xBF)
        for third in (0x7F, 0x80, 0xBF)
        for last in (0x7F, 0x80, 0xBF, 0xC0)
    ),
]
TAILS = [b"", b"x", b"abcdefg", b"abcdefgh"]


@pytest.mark.parametrize("name", ["stream", "type", "data"])
def test_characters_of_all_kinds_at_every_place_in_a_word_of_eight(name: str) -> None:
    lines = []
    for character in CHARACTERS:
        for before in range(0, 9, 1 if len(character) == 1 else 3):
            for tail in TAILS:
                text = b'"' + b"a" * before + character + tail + b'"'
                value = b'{"a":%s,%s:1}' % (text, text) if name == "data" else text
                members = {b"stream": b'"s"', b"type": b'"t"', b"data": b"{}", name.encode(): value}
                lines.append(b"{" + b",".join(b'"%s":%s' % member for member in members.items()) + b"}")
    assert_same_line_by_line(lines)


def test_times_of_all_kinds() -> None:
    days = [f"{year:04d}-{month:02d}-{day:02d}" for year in (0, 1, 1900, 2000, 2023, 2024, 9999)
            for month in range(14) for day in (0, 1, 28, 29, 30, 31, 32)]  # fmt: skip
    moments = [f"{day}T{rest}" for day in days for rest in ("00:00:00Z", "23:59:59.999999+00:01", "00:00:00-00:01")]
    day = "2024-02-29T"
    moments += [f"{day}{hour:02d}:59:59{zone}" for hour in range(25) for zone in ("Z", "+23:59", "-23:59", "+24:00")]
    moments += [f"{day}00:{n:02d}:{n:02d}Z" for n in range(62)]
    moments += [f"{day}00:00:00.{'123456789'[:n]}Z" for n in range(10)]
    moments += [
        f"{day}00:00:00{sign}{hour:02d}:{minute:02d}"
        for sign in "+-"
        for hour in range(26)
        for minute in (0, 30, 59, 60)
    ]
    assert_same_line_by_line([PLAIN[:-1] + b',"time":"%s"}' % moment.encode() for moment in moments])


def test_enough_of_the_lines_that_are_thought_of_are_taken_and_enough_are_left() -> None:
    # Else the comparison above would say little.
    outcomes = Counter()

    @given(import_lines())
    @settings(max_examples=200, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    def look_at(line: bytes) -> None:
        taken, _ = lines_taken(line)
        outcomes[taken] += 1

    look_at()
    assert min(outcomes[0], outcomes[1]) > 30


def test_numbers_of_all_kinds() -> None:
    numbers = ["".join(parts).encode() for size in range(1, 6) for parts in itertools.product("-+01.e", repeat=size)]
    assert_same_line_by_line([PLAIN.replace(b"{}", b'{"a":%s}' % number) for number in numbers])
    assert_same_line_by_line([PLAIN[:-1] + b',"version":%s}' % number for number in numbers])


@given(st.binary(max_size=300))
@example(PLAIN[:-1])
def test_noise_is_left_alone(noise: bytes) -> None:
    assume(not noise.startswith(GZIP_MAGIC))
    assert_same_with_and_without(noise)


# --- What it takes --------------------------------------------------------------------------------------------------


def test_the_demo_s_lines_are_all_taken() -> None:
    assert lines_taken(b"".join(demo_lines(20_000))) == (20_000, [])


@pytest.mark.parametrize(
    ("name", "count"), [("postgres-git-history.ndjson.gz", 283_571), ("github-webhooks.ndjson.gz", 329)]
)
def test_real_lines_are_all_taken(real_data: Callable[[str], Path], name: str, count: int) -> None:
    taken = 0
    with LineSource(real_data(name)) as source:
        while (block := source.next_block(wait=True)) != "end":
            if block != "not yet":
                rows, left = lines_taken(block)
                assert left == []
                taken += rows
    assert taken == count


TAKEN = [
    PLAIN,
    FULL_LINE,
    b' \t{ "stream" : "s" , "type" : "t" , "data" : { } } \r',
    b'{"data":{"a":[[],{},"",-0,0.5,1e5,-1.25E-7,true,false,null]},"type":"t","stream":"s"}',
    b'{"stream":"s","type":"t","data":{"a":"\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e4\\u0000\\uD7ff\\uE000"}}',
    PLAIN[:-1] + b',"id":null,"time":null,"correlation_id":null,"metadata":null,"version":2147483647}',
    PLAIN.replace(b"{}", nested(MAX_NESTING)),
    PLAIN.replace(b'"s"', b'"%s"' % (b"x" * 5000)),
]
LEFT = {
    "escape in stream": PLAIN.replace(b'"s"', b'"\\u0073"'),
    "escape in type": PLAIN.replace(b'"t"', b'"\\u0074"'),
    "escape in a key": PLAIN.replace(b'"type"', b'"\\u0074ype"'),
    "surrogates": PLAIN.replace(b"{}", b'{"a":"\\ud83d\\ude00"}'),
    "leap second": PLAIN[:-1] + b',"time":"2016-12-31T23:59:60Z"}',
    "seven digits": PLAIN[:-1] + b',"time":"2016-12-31T23:59:59.1234567Z"}',
    "small z": PLAIN[:-1] + b',"time":"2016-12-31T23:59:59z"}',
    "twice": PLAIN[:-1] + b',"data":{}}',
    "unknown": PLAIN[:-1] + b',"extra":{}}',
    "no stream": b'{"type":"t","data":{}}',
    "no type": b'{"stream":"s","data":{}}',
    "no data": b'{"stream":"s","type":"t"}',
    "too deep": PLAIN.replace(b"{}", nested(MAX_NESTING + 1)),
    "no JSON": b"hello",
    # Strict JSON, whatever LineReader.add lets pass to the server.
    **{
        f"number {number!r}": PLAIN.replace(b"{}", b'{"a":%s}' % number)
        for number in (b"01", b"-01", b"00", b"1.", b".5", b"-", b"1e", b"1e+", b"+1", b"1.e5", b"NaN", b"-Infinity")
    },
}


@pytest.mark.parametrize("line", TAKEN, ids=range(len(TAKEN)))
def test_a_plain_line_is_taken(line: bytes) -> None:
    assert lines_taken(line + b"\n") == (1, [])
    assert lines_taken(line) == (1, [])


@pytest.mark.parametrize("why", LEFT)
def test_an_unusual_line_is_left_to_others_and_those_around_it_are_taken(why: str) -> None:
    assert lines_taken(b"\n".join([PLAIN, LEFT[why], b"", PLAIN])) == (2, [LEFT[why]])


def test_it_stops_in_front_of_the_line_that_it_leaves() -> None:
    block = PLAIN + b"\n\n" + b"hello\n" + PLAIN
    rows = EventRows()
    passed, at, [(line_nos, offsets)] = LineReader("a").add_plain(block, 0, 10, 7, 1000, [rows])
    assert (passed, block[at:], len(rows)) == (2, b"hello\n" + PLAIN, 1)
    assert (array("q", line_nos), array("q", offsets)) == (array("q", [7]), array("q", [1000]))


def test_it_takes_no_more_lines_than_it_may() -> None:
    block = (PLAIN + b"\n") * 5
    rows = EventRows()
    passed, at, _ = LineReader("a").add_plain(block, 0, 3, 1, 0, [rows])
    assert (passed, at, len(rows)) == (3, 3 * len(PLAIN) + 3, 3)
    for count in (0, -1):
        assert LineReader("a").add_plain(block, at, count, 1, 0, [rows]) == (0, at, [(b"", b"")])


@given(st.text(st.sampled_from("\n\n\na\0"), max_size=600))
@example("\n" * 255)
@example("\n" * 256)
@example("\n" * 5000)
def test_newlines_are_counted(text: str) -> None:
    assert count_newlines(text.encode()) == text.count("\n")


# --- What it is given -----------------------------------------------------------------------------------------------


def encoder(find_stream: Callable[[str], Any] = lambda name: bytes(16)) -> LineEncoder:
    return LineEncoder({}, find_stream, bytes(16))


def test_a_stream_that_cannot_be_found_leaves_the_line_to_others() -> None:
    def refuse(name: str) -> bytes:
        raise ValueError(name)

    rows = EventRows()
    assert encoder(refuse).encode(PLAIN, 0, 1, 1, 0, [rows]) == (0, 0, [(b"", b"")])
    assert len(rows) == 0


def test_what_goes_wrong_otherwise_while_a_stream_is_sought_comes_out() -> None:
    def interrupt(name: str) -> bytes:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encoder(interrupt).encode(PLAIN, 0, 1, 1, 0, [EventRows()])


@pytest.mark.parametrize("answer", [None, "x" * 16, b"", b"x" * 15, b"x" * 17, bytearray(16), 5])
def test_an_id_that_is_none_is_an_error(answer: object) -> None:
    rows = EventRows()
    with pytest.raises((TypeError, ValueError)):
        encoder(lambda name: answer).encode(PLAIN, 0, 1, 1, 0, [rows])
    with pytest.raises((TypeError, ValueError)):
        LineEncoder({"s": answer}, bytes, bytes(16)).encode(PLAIN, 0, 1, 1, 0, [rows])  # type: ignore[dict-item]
    assert len(rows) == 0


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"block": None}, TypeError),
        ({"block": "text"}, TypeError),
        ({"block": memoryview(PLAIN)[::2]}, (ValueError, BufferError)),
        ({"start": -1}, ValueError),
        ({"start": len(PLAIN) + 1}, ValueError),
        ({"start": 2**63}, OverflowError),
        ({"line_count": 2**63}, OverflowError),
        ({"line_no": 2**63}, OverflowError),
        ({"offset": -1}, ValueError),
        ({"offset": 2**62 + 1}, ValueError),
        ({"shards": None}, TypeError),
        ({"shards": []}, ValueError),
        ({"shards": [None]}, TypeError),
        ({"shards": [EventRows(), b""]}, TypeError),
    ],
)
def test_wrong_arguments_are_errors(changed: dict[str, Any], error: type[Exception]) -> None:
    arguments = {"block": PLAIN, "start": 0, "line_count": 1, "line_no": 1, "offset": 0, "shards": [EventRows()]}
    encoder().encode(**arguments)
    with pytest.raises(error):
        encoder().encode(**{**arguments, **changed})


@pytest.mark.parametrize(
    "arguments", [(None, bytes, bytes(16)), ({}, bytes, None), ({}, bytes, b"x"), ({}, bytes, "x" * 16)]
)
def test_an_encoder_needs_streams_and_a_first_id(arguments: tuple[Any, ...]) -> None:
    with pytest.raises((TypeError, ValueError)):
        LineEncoder(*arguments)


@pytest.mark.parametrize("line_no", [-(2**63), -1, 2**40, 2**63 - 1])
def test_a_line_whose_number_no_id_has_room_for_is_left_to_others(line_no: int) -> None:
    assert encoder().encode(PLAIN, 0, 1, line_no, 0, [EventRows()]) == (0, 0, [(b"", b"")])


def test_ids_are_derived_as_line_reader_derives_them() -> None:
    reader = LineReader("import")
    for line_no in (0, 1, 2**32, 2**40 - 1):
        rows = EventRows()
        reader.add_plain(PLAIN, 0, 1, line_no, 0, [rows])
        assert rows.event_ids()[24:] == reader.derived_id(line_no)


def test_rows_that_change_while_a_stream_is_sought_do_no_harm() -> None:
    block = b"\n".join(PLAIN.replace(b'"s"', b'"%d"' % n) for n in range(20))
    rows = EventRows()
    shards = [rows]

    def meddle(name: str) -> bytes:
        rows.clear()
        shards.clear()
        if name == "3":
            found.encode(block, 0, 2, 1, 0, [rows])
        return name.encode().rjust(16)

    found = encoder(meddle)
    assert found.encode(block, 0, 20, 1, 0, shards)[0] == 20
    assert len(rows) == 1


# --- Where memory ends ----------------------------------------------------------------------------------------------


def test_no_byte_behind_a_block_is_read() -> None:
    # In a process of its own, which a byte too many would kill.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__], timeout=100, env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def read_lines_before_a_locked_page() -> None:
    before = BytesBeforeLockedPage()
    for line in (*TAKEN[:6], *LEFT.values(), '{"stream":"ä€🐍'.encode(), b'{"stream":"s","type":"t","data":{"abcdefgh'):
        for size in range(min(len(line), 1000) + 1):
            view = before.view(line[:size])
            found = encoder().encode(view, 0, 10, 1, 0, [EventRows()])
            assert found == encoder().encode(line[:size], 0, 10, 1, 0, [EventRows()])
            view.release()


if __name__ == "__main__":
    read_lines_before_a_locked_page()
