"""What becomes of every bad input of an import, and of the odd ones that are good: each has an outcome, written down.

``docs/import-format.md`` shows the same table to users; a test compares the two.
"""

from __future__ import annotations

import gzip
import io
import secrets
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from hindsight_fast import Cursor, EventStore, ImportFailed, RecordedEvent, stream_uuid
from hindsight_fast._core import EventRows
from hindsight_fast.embedded import EmbeddedServer
from hindsight_fast.errors import EventParseError
from hindsight_fast.import_lines import BadLine, LineReader
from hindsight_fast.import_source import LineSource, SourceError

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "import-format.md"
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def store(server: EmbeddedServer) -> Iterator[EventStore]:
    """One store for all: every test looks at what came behind the last event that it found."""
    name = f"test_{secrets.token_hex(8)}"
    with psycopg.connect(server.conninfo, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name)))
        with EventStore(server.conninfo_for(name)) as store:
            store.create_schema()
            yield store
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def events_behind(store: EventStore, place: Cursor | None) -> list[RecordedEvent]:
    return list(store.read(after=place or Cursor.BEGINNING))


def new_id() -> str:
    return secrets.token_hex(8)


# The table


@dataclass(frozen=True)
class Refused:
    """The import stops at the line and says why."""

    reason: str


@dataclass(frozen=True)
class Stored:
    """The line is an event; *note* is what to know about it."""

    note: str


def line(**fields: bytes) -> bytes:
    """A good line, its fields replaced (by name, ``b""`` takes one out); values are JSON."""
    members = {"stream": b'"s"', "type": b'"t"', "data": b"{}", **fields}
    return b"{" + b",".join(b'"%s":%s' % (name.encode(), value) for name, value in members.items() if value) + b"}"


GOOD = line()
UUID_TEXT = b"018f3b1e-0000-7000-8000-0000000000aa"


def nested(depth: int) -> bytes:
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


# Title: (line, outcome). A reason is quoted up to what differs from line to line.
OUTCOMES: dict[str, dict[str, tuple[bytes, Refused | Stored]]] = {
    "The line": {
        "no JSON": (b"hello", Refused("JSON is malformed: invalid character (byte 0)")),
        "an array, a text, a number, `null`": (b"[" + GOOD + b"]", Refused("Expected `object`, got `array`")),
        "cut off": (GOOD[:-1], Refused("the JSON ends early")),
        "two objects": (GOOD + b" " + GOOD, Refused("JSON is malformed: trailing characters")),
        "a comma behind it": (GOOD + b",", Refused("JSON is malformed: trailing characters")),
        "invalid UTF-8, UTF-16, an encoded surrogate": (line(data=b'{"a":"\xed\xa0\x80"}'), Refused("invalid UTF-8")),
        "a raw NUL or another control character in a text": (
            line(data=b'{"a":"\0"}'),
            Refused("JSON is malformed: invalid character"),
        ),
        "a carriage return before the newline": (GOOD + b"\r", Stored("white space")),
        "blanks around and within": (b" \t{ " + GOOD[1:-1] + b" }\t ", Stored("white space")),
    },
    "Fields": {
        "an unknown field": (line(extra=b"1"), Refused("Object contains unknown field `extra`")),
        "another case": (line(stream=b"", Stream=b'"s"'), Refused("Object contains unknown field `Stream`")),
        "no `stream`, `type` or `data`": (line(data=b""), Refused("Object missing required field `data`")),
        "a field twice": (b'{"stream":"a",' + GOOD[1:], Refused("the field stream stands twice")),
        "a field twice, escaped": (b'{"\\u0074ype":"a",' + GOOD[1:], Refused("the field type stands twice")),
        "a wrong type": (line(stream=b"7"), Refused("Expected `str`, got `int` - at `$.stream`")),
    },
    "`stream`": {
        "empty": (line(stream=b'""'), Refused("stream is empty")),
        "36 characters of a UUID, upper case too": (line(stream=b'"%s"' % UUID_TEXT.upper()), Stored("that UUID")),
        "a UUID in braces or without hyphens": (
            line(stream=b'"{%s}"' % UUID_TEXT),
            Stored("a name like any other"),
        ),
        "`\\u0000` in it": (line(stream=b'"a\\u0000b"'), Stored("a name like any other: only its UUID is stored")),
        "a megabyte": (line(stream=b'"%s"' % (b"x" * MIB)), Stored("a name like any other: only its UUID is stored")),
        "half of a surrogate pair": (
            line(stream=b'"\\ud800"'),
            Refused("JSON is malformed: unexpected end of escaped"),
        ),
    },
    "`type`": {
        "empty": (line(type=b'""'), Refused("type is empty")),
        "more than 1,000 bytes": (line(type=b'"%s"' % (b"x" * 1001)), Refused("type takes 1001 bytes, 1000 at most")),
        "1,000 bytes": (line(type=b'"%s"' % (b"x" * 1000)), Stored("the longest")),
        "`\\u0000` in it": (line(type=b'"a\\u0000b"'), Refused("type 'a\\x00b' holds a NUL character")),
        "half of a surrogate pair": (
            line(type=b'"\\udc00"'),
            Refused("JSON is malformed: invalid utf-16 surrogate pair"),
        ),
    },
    "`data` and `metadata`": {
        "`data` that is no object": (line(data=b"[1]"), Refused("data must be a JSON object")),
        "`metadata` that is neither object nor `null`": (
            line(metadata=b"[1]"),
            Refused("metadata must be a JSON object or null"),
        ),
        "nested 500 deep": (line(data=nested(500)), Stored("the deepest")),
        "nested deeper": (line(data=nested(501)), Refused("data is nested more than 500 deep")),
        "nested 10,000 deep": (line(data=nested(10_000)), Refused("data or metadata is nested too deeply")),
        "a key twice": (line(data=b'{"a":1,"a":2}'), Stored("byte for byte; `payload` has the last")),
        "half of a surrogate pair": (line(data=b'{"a":"\\ud800"}'), Refused("half of an escaped surrogate pair")),
        "`\\u0000` in a text": (line(data=b'{"a":"\\u0000"}'), Stored("byte for byte; SQL's `->>` fails on it")),
        "`1e999`": (line(data=b'{"a":1e999}'), Stored("byte for byte; `payload` raises `EventParseError`")),
        "an integer of 400 digits": (
            line(data=b'{"a":1%s}' % (b"0" * 400)),
            Stored("byte for byte; `payload` has it exactly"),
        ),
        "`NaN`, `Infinity`, `01`, `.5`, `+1`": (
            line(data=b'{"a":NaN}'),
            Refused("JSON is malformed: invalid character"),
        ),
    },
    "`version`": {
        "negative": (line(version=b"-1"), Refused("version must lie between 0 and 2147483647, not -1")),
        "above 2,147,483,647": (line(version=b"2147483648"), Refused("version must lie between 0 and 2147483647")),
        "thousands of digits": (line(version=b"1" * 5000), Refused("Integer value out of range - at `$.version`")),
        "`1.0`, `1e2`": (line(version=b"1.0"), Refused("Expected `int`, got `float` - at `$.version`")),
        "`true`": (line(version=b"true"), Refused("Expected `int`, got `bool` - at `$.version`")),
        "`null`": (line(version=b"null"), Refused("Expected `int`, got `null` - at `$.version`")),
    },
    "`id` and `correlation_id`": {
        "no UUID": (line(id=b'"4711"'), Refused("Invalid UUID - at `$.id`")),
        "in braces, with `urn:uuid:`": (line(id=b'"{%s}"' % UUID_TEXT), Refused("Invalid UUID - at `$.id`")),
        "upper case": (line(correlation_id=b'"%s"' % UUID_TEXT.upper()), Stored("that UUID")),
        "without hyphens": (line(correlation_id=b'"%s"' % UUID_TEXT.replace(b"-", b"")), Stored("that UUID")),
        "`null`": (line(id=b"null"), Stored("as if absent")),
    },
    "`time`": {
        "without a zone": (
            line(time=b'"2024-01-01T00:00:00"'),
            Refused("time must carry a time zone: 2024-01-01T00:00:00 does not"),
        ),
        "no RFC 3339": (line(time=b'"2024-01-01"'), Refused("Invalid RFC3339 encoded datetime - at `$.time`")),
        "a number": (line(time=b"1704067200"), Refused("Expected `datetime | null`, got `int` - at `$.time`")),
        "a leap second, `24:00`, 30 February": (
            line(time=b'"2016-12-31T23:59:60Z"'),
            Refused("Invalid RFC3339 encoded datetime - at `$.time`"),
        ),
        "the years 0, 10000, 294277": (
            line(time=b'"294277-01-01T00:00:00Z"'),
            Refused("Invalid RFC3339 encoded datetime - at `$.time`"),
        ),
        "a year outside 1 to 9999 once in UTC": (
            line(time=b'"0001-01-01T00:00:00+14:00"'),
            Refused("0001-01-01T00:00:00+14:00 lies outside the years 1 to 9999 in UTC"),
        ),
        "offsets up to ±23:59, `-00:00`, without a colon": (
            line(time=b'"2024-01-01T12:00:00-2359"'),
            Stored("that moment"),
        ),
        "more than six digits of a second": (line(time=b'"2024-01-01T12:00:00.1234567Z"'), Stored("rounded")),
        "`null`": (line(time=b"null"), Stored("as if absent")),
    },
}
CASES = {f"{subject}: {title}": case for subject, cases in OUTCOMES.items() for title, case in cases.items()}
BAD = {title: (text, outcome.reason) for title, (text, outcome) in CASES.items() if isinstance(outcome, Refused)}
ODD = {title: text for title, (text, outcome) in CASES.items() if isinstance(outcome, Stored)}

# What stands for others of its kind in the table.
WITH_TYPES = ("stream", "type", "version", "id", "time", "correlation_id")
TIMES = ["2024-02-30T00:00:00Z", "2024-01-01T24:00:00Z", "0000-01-01T00:00:00Z", "10000-01-01T00:00:00Z"]
TIMES += ["2024-01-01T00:00:00+24:00", "2024-01-01T00:00:00+00:60", "2024-01-01T00:00:00+14", "2024-01-01T00:00Z"]
TIMES += ["9999-12-31T23:59:59-00:01", "9999-12-31T23:59:59.9999999Z", "-2024-01-01T00:00:00Z", "P1D", "now", ""]
LINES = [b'"x"', b"null", b"5", b"{}", b"\0", b"\xff\xfe{\0", b"\xef\xbb\xbf" + GOOD]
NUMBERS = [b"Infinity", b"-", b"01", b".5", b"+1", b"1.", b"0x1"]
METADATA = [b'{"a":"\\ud800"}', b'{"\\udc00":1}', nested(501), nested(100_000), b'"x"', b"7", b'{"a":1']
MORE_BAD = {
    **{f"line {text!r}": text for text in LINES},
    **{f"missing {name}": line(**{name: b""}) for name in ("stream", "type", "data")},
    **{f"{name} twice": line(**{name: b"null"})[:-1] + b',"%s":null}' % name.encode() for name in ("id", "metadata")},
    **{f"{name}: wrong type": line(**{name: b"{}"}) for name in WITH_TYPES},
    **{f"{name}: list": line(**{name: b"[]"}) for name in (*WITH_TYPES, "data", "metadata")},
    **{f"{name}: raw NUL": line(**{name: b'"\0"'}) for name in WITH_TYPES},
    **{f"{name}: half a pair": line(**{name: b'"\\udbff\\ud800"'}) for name in WITH_TYPES},
    **{f"number {text!r}": line(data=b'{"a":%s}' % text) for text in NUMBERS},
    **{f"metadata {text[:40]!r} {len(text)}": line(metadata=text) for text in METADATA},
    **{f"time {text}": line(time=b'"%s"' % text.encode()) for text in TIMES},
}


@pytest.mark.parametrize("title", BAD)
def test_a_bad_line_is_refused_with_its_reason(title: str) -> None:
    text, reason = BAD[title]
    if reason == "invalid UTF-8":
        return  # seen a block at a time, before a line is read: the test through the store has it
    rows = EventRows()
    with pytest.raises(BadLine) as caught:
        LineReader("a").add(text, 1, [rows])
    assert str(caught.value).startswith(reason)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
    assert len(rows) == 0


@pytest.mark.essential
@pytest.mark.parametrize("title", [*BAD, *MORE_BAD])
def test_a_bad_line_ends_an_import_before_its_chunk(store: EventStore, tmp_path: Path, title: str) -> None:
    text = MORE_BAD[title] if title in MORE_BAD else BAD[title][0]
    begin = store.head()
    path = tmp_path / "events.ndjson"
    before = [GOOD, b"", line(data=b'{"n":1}'), line(data=b'{"n":2}')]
    path.write_bytes(b"\n".join([*before, text, GOOD]))
    with pytest.raises(ImportFailed) as caught:
        store.import_events(path, import_id=new_id(), chunk_size=2)
    failure = caught.value
    assert (failure.source, failure.line_no) == (str(path), 5)
    assert failure.byte_offset == len(b"\n".join(before)) + 1
    assert failure.stored_lines == 3
    assert failure.reason.startswith(BAD.get(title, ("", ""))[1])
    assert str(failure) == f"{path}, line 5: {failure.reason}"
    assert [event.data for event in events_behind(store, begin)] == [b"{}", b'{"n":1}']


@pytest.mark.essential
@pytest.mark.parametrize("title", ODD)
def test_an_odd_line_is_an_event(store: EventStore, title: str) -> None:
    begin = store.head()
    report = store.import_events(io.BytesIO(ODD[title] + b"\n"), import_id=new_id())
    assert report.events == 1
    (event,) = events_behind(store, begin)
    assert b'"data":' + event.data in ODD[title]
    assert event.name in ("t", "x" * 1000)


def one_event(store: EventStore, text: bytes) -> RecordedEvent:
    begin = store.head()
    store.import_events([text], import_id=new_id())
    (event,) = events_behind(store, begin)
    return event


def test_odd_lines_mean_what_the_table_says(store: EventStore) -> None:
    def stored(title: str) -> RecordedEvent:
        return one_event(store, ODD[title])

    the_uuid = UUID_TEXT.decode()
    assert str(stored("`stream`: 36 characters of a UUID, upper case too").stream_id) == the_uuid
    assert stored("`stream`: a UUID in braces or without hyphens").stream_id == stream_uuid("{" + the_uuid + "}")
    assert stored("`stream`: `\\u0000` in it").stream_id == stream_uuid("a\0b")
    assert stored("`stream`: a megabyte").stream_id == stream_uuid("x" * MIB)
    for title in ("upper case", "without hyphens"):
        assert str(stored(f"`id` and `correlation_id`: {title}").correlation_id) == the_uuid
    twice = stored("`data` and `metadata`: a key twice")
    assert (twice.data, twice.payload) == (b'{"a":1,"a":2}', {"a": 2})
    assert stored("`data` and `metadata`: an integer of 400 digits").payload == {"a": 10**400}
    assert stored("`data` and `metadata`: `\\u0000` in a text").payload == {"a": "\0"}
    assert str(stored("`data` and `metadata`: nested 500 deep").payload).count("[") == 499
    with pytest.raises(EventParseError):
        stored("`data` and `metadata`: `1e999`").payload  # noqa: B018
    assert (
        stored("`time`: more than six digits of a second").created_at.isoformat() == "2024-01-01T12:00:00.123457+00:00"
    )
    assert stored("`time`: offsets up to ±23:59, `-00:00`, without a colon").created_at.isoformat() == (
        "2024-01-02T11:59:00+00:00"
    )


def as_table(subject: str) -> str:
    """A subject's outcomes as the document shows them."""
    rows = []
    for title, (_, outcome) in OUTCOMES[subject].items():
        what = f"refused: {outcome.reason}" if isinstance(outcome, Refused) else f"stored: {outcome.note}"
        rows.append(f"| {title} | {what.replace('|', chr(92) + '|')} |")
    return "\n".join([f"| {subject} | outcome |", "|---|---|", *rows])


@pytest.mark.parametrize("subject", OUTCOMES)
def test_the_document_has_the_table(subject: str) -> None:
    assert as_table(subject) in DOCUMENT.read_text(encoding="utf-8")


# Sources


def gzipped(text: bytes) -> bytes:
    return gzip.compress(text, 1)


THREE_LINES = b"".join(line(data=b'{"n":%d}' % n) + b"\n" for n in range(3))

GOOD_SOURCES: dict[str, tuple[bytes, int]] = {
    "empty": (b"", 0),
    "a byte order mark alone": (b"\xef\xbb\xbf", 0),
    "newlines alone": (b"\n\r\n \t\n", 0),
    "empty gzip": (gzipped(b""), 0),
    "CRLF": (THREE_LINES.replace(b"\n", b"\r\n"), 3),
    "byte order mark": (b"\xef\xbb\xbf" + THREE_LINES, 3),
    "byte order mark in gzip": (gzipped(b"\xef\xbb\xbf" + THREE_LINES), 3),
    "no newline at the end": (THREE_LINES[:-1], 3),
    "gzip behind gzip": (gzipped(THREE_LINES[:20]) + gzipped(THREE_LINES[20:]), 3),
    "zeros behind gzip": (gzipped(THREE_LINES) + bytes(1000), 3),
}


@pytest.mark.essential
@pytest.mark.parametrize("kind", GOOD_SOURCES)
def test_an_odd_source_is_read(store: EventStore, kind: str) -> None:
    content, events = GOOD_SOURCES[kind]
    begin = store.head()
    report = store.import_events(io.BytesIO(content), import_id=new_id())
    assert report.events == events == len(events_behind(store, begin))


BAD_SOURCES: dict[str, tuple[bytes, int, str]] = {
    "gzip cut off": (gzipped(THREE_LINES)[:-9], 4, "broken gzip: it ends in the middle"),
    "gzip cut off in its header": (gzipped(THREE_LINES)[:5], 1, "broken gzip: it ends in the middle"),
    # Found with the block it ends, of which nothing is given out.
    "gzip with a wrong checksum": (gzipped(THREE_LINES)[:-5] + b"\xff" * 5, 1, "broken gzip: .*incorrect data check"),
    "gzip that is none": (b"\x1f\x8b" + b"x" * 100, 1, "broken gzip: .*unknown compression method"),
    "garbage behind gzip": (gzipped(THREE_LINES) + b"garbage", 4, "broken gzip: what follows its end is no gzip"),
    "one byte behind gzip": (gzipped(THREE_LINES) + b"\x1f", 4, "broken gzip: what follows its end is no gzip"),
    "gzip in gzip": (gzipped(gzipped(THREE_LINES)), 1, "invalid UTF-8"),
    "a byte order mark in the middle": (THREE_LINES + b"\xef\xbb\xbf" + GOOD, 4, "JSON is malformed"),
}  # fmt: skip


@pytest.mark.essential
@pytest.mark.parametrize("kind", BAD_SOURCES)
def test_a_broken_source_is_named_with_its_line(store: EventStore, tmp_path: Path, kind: str) -> None:
    content, line_no, reason = BAD_SOURCES[kind]
    path = tmp_path / "events"
    path.write_bytes(content)
    begin = store.head()
    with pytest.raises(ImportFailed, match=reason) as caught:
        store.import_events(path, import_id=new_id(), chunk_size=2)
    assert (caught.value.source, caught.value.line_no) == (str(path), line_no)
    stored = [event.payload for event in events_behind(store, begin)]
    assert stored == [{"n": n} for n in range(3)][: len(stored)]
    assert len(stored) % 2 == 0  # whole chunks


def test_a_broken_gzip_is_placed_to_the_byte() -> None:
    # Whole lines that came out of it are given; the place is where the next one begins.
    text = THREE_LINES * 100_000
    packed = gzipped(text)
    with pytest.raises(SourceError, match="broken gzip") as caught:
        blocks_of(io.BytesIO(packed[: len(packed) // 2]))
    place = caught.value
    assert place.byte_offset == len(b"\n".join(text.split(b"\n")[: place.line_no - 1])) + 1
    assert 0 < place.byte_offset < len(text)


def blocks_of(source: Any) -> list[bytes]:
    lines = LineSource(source)
    blocks = []
    try:
        while (block := lines.next_block(wait=True)) != "end":
            assert isinstance(block, bytes)
            blocks.append(block)
    finally:
        lines.close()
    return blocks


@pytest.mark.parametrize("as_lines", [False, True])
@pytest.mark.parametrize("ending", [b"\n", b""])
def test_a_line_is_as_long_as_it_may_be_and_no_longer(
    monkeypatch: pytest.MonkeyPatch, as_lines: bool, ending: bytes
) -> None:
    monkeypatch.setattr("hindsight_fast.import_source.MAX_LINE_BYTES", 3 * MIB)
    longest = b"x" * (3 * MIB - 1) + b"\n"
    for before in (b"", b"a\n", b"a\n" * 600_000):
        good, bad = before + longest, before + b"x" + longest[: None if ending else -1] + (b"b\n" if ending else b"x")
        source: Any = good.splitlines(keepends=True) if as_lines else io.BytesIO(good)
        assert b"".join(blocks_of(source)) == good
        source = bad.splitlines(keepends=True) if as_lines else io.BytesIO(bad)
        with pytest.raises(SourceError, match="a line longer than 3145728 bytes") as caught:
            blocks_of(source)
        assert (caught.value.line_no, caught.value.byte_offset) == (before.count(b"\n") + 1, len(before))


def test_large_blocks_are_not_read_ahead_four_at_a_time() -> None:
    # One line of 8 MiB takes all of the room: until it is taken, no other is put beside it.
    lines = LineSource(b"x" * (8 * MIB) + b"\n" for _ in range(10))
    try:
        for _ in range(10):
            assert lines.next_block(wait=True) == b"x" * (8 * MIB) + b"\n"
            assert lines._blocks.qsize() <= 1
        assert lines.next_block(wait=True) == "end"
    finally:
        lines.close()


# Memory, each time the peak of a process of its own

PEAK_PROGRAM = """
import sys
from hindsight_fast import EventStore, ImportFailed
with EventStore(sys.argv[1]) as store:
    try:
        report = store.import_events(sys.argv[2], import_id=sys.argv[2])
        print("stored", report.events, report.lines)
    except ImportFailed as error:
        print("refused", error.line_no, error.reason)
# Not ru_maxrss, which a process inherits from the one that started it.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def import_in_a_process(store: EventStore, path: Path) -> tuple[str, int]:
    """What came of it, and the peak of its memory in MiB."""
    command = [sys.executable, "-c", PEAK_PROGRAM, store.conninfo, str(path)]
    done = subprocess.run(command, capture_output=True, timeout=110, check=True, text=True)
    outcome, peak_kib = done.stdout.splitlines()
    return outcome, int(peak_kib) // 1024


def write_gzip_bomb(path: Path, begin: bytes, pattern: bytes, mib: int) -> None:
    """Write *begin*, and *pattern* repeated to so many MiB, as a gzip of about a thousandth of that."""
    compress = zlib.compressobj(1, wbits=31)
    with path.open("wb") as file:
        file.write(compress.compress(begin))
        for _ in range(mib):
            file.write(compress.compress(pattern * (MIB // len(pattern))))
        file.write(compress.flush())


EMPTY_PROCESS_MIB = 60
"""An import of nothing peaks at about 45."""


def test_an_import_of_nothing_is_what_the_others_are_measured_by(store: EventStore, tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.write_bytes(b"")
    outcome, peak_mib = import_in_a_process(store, path)
    assert outcome == "stored 0 0"
    assert peak_mib < EMPTY_PROCESS_MIB


def test_a_gzip_bomb_of_newlines_is_an_import_of_nothing(store: EventStore, tmp_path: Path) -> None:
    path = tmp_path / "bomb.gz"
    write_gzip_bomb(path, b"", b"\n", 24)
    outcome, peak_mib = import_in_a_process(store, path)
    print(f"{path.stat().st_size} bytes of gzip: {peak_mib} MiB")
    assert outcome == f"stored 0 {24 * MIB}"
    # 4 blocks ahead, and a list of a block's empty lines (8 MiB). A number kept for each would be 800 MiB.
    assert peak_mib < EMPTY_PROCESS_MIB + 40


def test_a_gzip_bomb_of_one_line_is_refused_at_the_bound_of_a_line(store: EventStore, tmp_path: Path) -> None:
    path = tmp_path / "bomb.gz"
    write_gzip_bomb(path, THREE_LINES, b"x", 1024)
    begin = store.head()
    outcome, peak_mib = import_in_a_process(store, path)
    print(f"{path.stat().st_size} bytes of gzip: {peak_mib} MiB")
    assert outcome == f"refused 4 a line longer than {256 * MIB} bytes"
    assert events_behind(store, begin) == []  # the three are of its chunk
    # The line as far as it was read, and nothing of it twice.
    assert peak_mib < EMPTY_PROCESS_MIB + 256 + 40


def test_a_line_of_100_mb_is_imported(store: EventStore, tmp_path: Path) -> None:
    path = tmp_path / "events.ndjson"
    with path.open("wb") as file:
        file.write(GOOD + b'\n{"stream":"s","type":"large","data":{"a":"')
        for _ in range(100):
            file.write(b"x" * 10**6)
        file.write(b'"}}\n' + GOOD)
    outcome, peak_mib = import_in_a_process(store, path)
    print(f"a line of 100 MB: {peak_mib} MiB")
    assert outcome == "stored 3 3"
    # Five times the line: its pieces, the whole, split off, decoded for the check of UTF-8, as a row.
    assert peak_mib < EMPTY_PROCESS_MIB + 5 * 100
    with store.pool.connection() as connection:
        found = connection.execute(
            "SELECT length(payload::text) FROM hindsight.events WHERE event_name = 'large'"
        ).fetchall()
    assert found == [(10**8 + 8,)]


def test_the_longest_line_bounds_the_memory_of_many(store: EventStore, tmp_path: Path) -> None:
    def peak_mib_of(count: int) -> int:
        path = tmp_path / f"{count}.ndjson"
        with path.open("wb") as file:
            for _ in range(count):
                # Decoded, an emoji makes four bytes of every character.
                file.write(b'{"stream":"s","type":"t","data":{"a":"%s' % "🐍".encode() + b"x" * 16 * MIB + b'"}}\n')
        outcome, peak_mib = import_in_a_process(store, path)
        assert outcome == f"stored {count} {count}"
        return peak_mib

    few, many = peak_mib_of(6), peak_mib_of(14)
    print(f"peak memory: {few} MiB for 6 lines of 16 MiB, {many} MiB for 14")
    # The others' 128 MiB, even once, would show.
    assert many < few + 64
    # Two chunks come on top: a line is more than what was left of their 32 MiB, and their buffers grow by half.
    assert many < EMPTY_PROCESS_MIB + 8 * 16 + 2 * (32 + 16) * 3 // 2
