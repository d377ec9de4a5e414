"""Importing: what a file says is what the store holds, once, in its order; and what stops an import, and where."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import threading
import traceback
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hindsight_fast import Cursor, EventStore, ImportFailed, ImportProgress, RecordedEvent, stream_uuid
from hindsight_fast.import_lines import LineReader
from hindsight_fast.importer import next_chunk_events


def line(n: int, stream: str = "s") -> bytes:
    return b'{"stream":"%s","type":"t","data":{"n":%d}}' % (stream.encode(), n)


def numbers(events: Iterable[RecordedEvent]) -> list[int]:
    return [event.payload["n"] for event in events]


FULL_LINE = {
    "stream": "order-4711",
    "type": "order_placed",
    "data": {"total": 12},
    "version": 3,
    "id": "018f3b1e-0000-7000-8000-0000000000aa",
    "time": "2024-01-01T12:34:56.789012+02:00",
    "correlation_id": "00000000-0000-4000-8000-0000000000bb",
    "metadata": {"who": "Žofie"},
}


# What a line means


@pytest.mark.essential
def test_every_field_arrives(store: EventStore) -> None:
    report = store.import_events([json.dumps(FULL_LINE).encode()], import_id="a")
    (event,) = store.read()
    assert event.stream_id == stream_uuid("order-4711")
    assert event.stream_version == 0
    assert event.name == "order_placed"
    assert event.version == 3
    assert event.data == b'{"total": 12}'
    assert event.payload == {"total": 12}
    assert event.event_id == uuid.UUID("018f3b1e-0000-7000-8000-0000000000aa")
    assert event.created_at == datetime(2024, 1, 1, 10, 34, 56, 789012, tzinfo=UTC)
    assert event.correlation_id == uuid.UUID("00000000-0000-4000-8000-0000000000bb")
    assert event.metadata == {"who": "Žofie"}
    assert (report.events, report.new_streams, report.lines, report.skipped_events) == (1, 1, 1, 0)
    assert report.first_cursor == report.last_cursor == event.cursor == store.head()


@pytest.mark.essential
def test_what_a_line_leaves_out_has_a_defined_value(store: EventStore) -> None:
    before = datetime.now(UTC) - timedelta(seconds=5)
    store.import_events([line(0), b'{"stream":"s","type":"t","data":{},"metadata":null}'], import_id="a")
    for event in store.read():
        assert event.version == 0
        assert event.correlation_id is None
        assert event.metadata is None
        assert before < event.created_at < datetime.now(UTC) + timedelta(seconds=5)
        assert event.event_id.version == 8


def test_a_stream_in_the_form_of_a_uuid_is_that_uuid(store: EventStore) -> None:
    stream = uuid.uuid4()
    spellings = [str(stream), str(stream).upper(), stream.hex, "{" + str(stream) + "}", str(stream) + " "]
    store.import_events([line(n, text) for n, text in enumerate(spellings)], import_id="a")
    found = [event.stream_id for event in store.read()]
    assert found == [stream, stream, *(stream_uuid(text) for text in spellings[2:])]


def test_ids_that_are_left_out_are_the_same_every_time_and_rise_with_the_line() -> None:
    reader, other = LineReader("a"), LineReader("b")
    line_numbers = [1, 2, 3, 255, 256, 65_536, 10**6, 10**9, 2**40 - 1]
    ids = [reader.derived_id(n) for n in line_numbers]
    assert ids == sorted(ids)
    assert len({*ids, *map(other.derived_id, line_numbers)}) == 2 * len(ids)
    assert ids == [LineReader("a").derived_id(n) for n in line_numbers]
    assert {(uuid.UUID(bytes=each).version, uuid.UUID(bytes=each).variant) for each in ids} == {(8, uuid.RFC_4122)}
    assert str(uuid.UUID(bytes=LineReader("pinned").derived_id(1))) == "5eafbb74-f581-80cc-8000-000000791839"


# Sources


SOURCE_LINES = [line(n, f"s{n % 3}") for n in range(2000)]
TEXT = b"\n".join(SOURCE_LINES) + b"\n"


class Dribble(io.RawIOBase):
    """A binary file that gives a few bytes at a time."""

    def __init__(self, content: bytes, at_once: int) -> None:
        self.content, self.at_once = io.BytesIO(content), at_once

    def read(self, size: int = -1) -> bytes:
        return self.content.read(min(self.at_once, size) if size > 0 else self.at_once)


def as_path(folder: Path, text: bytes) -> Path:
    path = folder / "events.ndjson"
    path.write_bytes(text)
    return path


SOURCES: dict[str, Callable[[Path], Any]] = {
    "path": lambda folder: as_path(folder, TEXT),
    "path as text": lambda folder: str(as_path(folder, TEXT)),
    "gzip by path": lambda folder: as_path(folder, gzip.compress(TEXT)),
    "gzip in members": lambda folder: io.BytesIO(
        b"".join(gzip.compress(part) for part in (TEXT[:777], TEXT[777:5000], TEXT[5000:]))
    ),
    "gzip, padded, dribbling": lambda folder: Dribble(gzip.compress(TEXT) + bytes(512), 1),
    "gzip, padded between members": lambda folder: Dribble(
        gzip.compress(TEXT[:777]) + bytes(999) + gzip.compress(TEXT[777:]), 512
    ),
    "file object": lambda folder: io.BytesIO(TEXT),
    "dribbling": lambda folder: Dribble(TEXT, 7),
    "iterable of lines": lambda folder: SOURCE_LINES,
    "generator": lambda folder: (each + b"\n" for each in SOURCE_LINES),
    "no newline at the end": lambda folder: io.BytesIO(TEXT[:-1]),
    "CRLF": lambda folder: io.BytesIO(TEXT.replace(b"\n", b"\r\n")),
    "byte order mark": lambda folder: io.BytesIO(b"\xef\xbb\xbf" + TEXT),
    "blank lines": lambda folder: io.BytesIO(b"\n\n" + TEXT.replace(b"\n", b"\n \t\n") + b"\n\n"),
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("chunk_size", [None, 1000, 333])
def test_every_kind_of_source_gives_the_same_events(
    store: EventStore, tmp_path: Path, kind: str, chunk_size: int | None
) -> None:
    report = store.import_events(SOURCES[kind](tmp_path), import_id="a", chunk_size=chunk_size)
    assert report.events == 2000
    events = list(store.read())
    assert numbers(events) == list(range(2000))
    assert [event.stream_version for event in events] == [n // 3 for n in range(2000)]
    # Again: everything is known already.
    report = store.import_events(SOURCES[kind](tmp_path), import_id="a", chunk_size=chunk_size)
    assert (report.events, report.skipped_events) == (0, 2000)
    assert len(list(store.read())) == 2000


def test_standard_input_is_a_source(store: EventStore, database: str) -> None:
    program = "import sys; from hindsight_fast import EventStore\n"
    program += "with EventStore(sys.argv[1]) as s: s.import_events('-', import_id='a')"
    done = subprocess.run([sys.executable, "-c", program, database], input=gzip.compress(TEXT), timeout=60)
    assert done.returncode == 0
    assert numbers(store.read()) == list(range(2000))


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (io.StringIO("text"), TypeError),
        (b"bytes", TypeError),
        (7, TypeError),
        (["text"], TypeError),
        ("/no/such", OSError),
    ],
    ids=["text file", "bytes", "int", "text lines", "missing"],
)
def test_what_is_no_source_is_refused(store: EventStore, source: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        store.import_events(source, import_id="a")
    assert store.head() is None


def test_a_source_that_raises_half_way_stores_whole_chunks_only(store: EventStore) -> None:
    def lines() -> Iterator[bytes]:
        yield from SOURCE_LINES
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        store.import_events(lines(), import_id="a", chunk_size=600)
    # The block that the error cut off never arrived; whole chunks of what did are stored.
    stored = numbers(store.read())
    assert stored == list(range(len(stored)))
    assert len(stored) % 600 == 0
    store.import_events(SOURCE_LINES, import_id="a", chunk_size=600)
    assert numbers(store.read()) == list(range(2000))


def test_the_source_thread_ends_with_the_import(store: EventStore) -> None:
    with pytest.raises(ImportFailed):
        store.import_events([b"{"] + SOURCE_LINES * 100, import_id="a")
    assert not [thread for thread in threading.enumerate() if thread.name == "hindsight-import-source"]


# Bad lines

GOOD = line(0)
BAD_LINES: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"hello", "malformed"),
    "no object": (b"[1]", "Expected `object`"),
    "cut off": (GOOD[:-1], "ends early"),
    "two objects": (GOOD + GOOD, "trailing"),
    "unknown field": (b'{"stream":"s","type":"t","data":{},"extra":1}', "unknown field `extra`"),
    "no stream": (b'{"type":"t","data":{}}', "missing required field `stream`"),
    "no type": (b'{"stream":"s","data":{}}', "missing required field `type`"),
    "no data": (b'{"stream":"s","type":"t"}', "missing required field `data`"),
    "empty stream": (b'{"stream":"","type":"t","data":{}}', "stream is empty"),
    "empty type": (b'{"stream":"s","type":"","data":{}}', "type is empty"),
    "NUL in type": (b'{"stream":"s","type":"a\\u0000b","data":{}}', "NUL"),
    "number for stream": (b'{"stream":7,"type":"t","data":{}}', "Expected `str`"),
    "data is a list": (b'{"stream":"s","type":"t","data":[1]}', "data must be a JSON object"),
    "data is null": (b'{"stream":"s","type":"t","data":null}', "data must be a JSON object"),
    "metadata is a text": (b'{"stream":"s","type":"t","data":{},"metadata":"x"}', "metadata must be"),
    "bad UUID": (b'{"stream":"s","type":"t","data":{},"id":"4711"}', "Invalid UUID"),
    "naive time": (b'{"stream":"s","type":"t","data":{},"time":"2024-01-01T00:00:00"}', "time zone"),
    "no such day": (b'{"stream":"s","type":"t","data":{},"time":"2024-02-30T00:00:00Z"}', "RFC3339"),
    "negative version": (b'{"stream":"s","type":"t","data":{},"version":-1}', "version must lie between"),
    "huge version": (b'{"stream":"s","type":"t","data":{},"version":2147483648}', "version must lie between"),
    "boolean version": (b'{"stream":"s","type":"t","data":{},"version":true}', "Expected `int`"),
    "invalid UTF-8 in data": (b'{"stream":"s","type":"t","data":{"a":"\xff"}}', "invalid UTF-8"),
    "UTF-8 surrogate": (b'{"stream":"s","type":"t","data":{"a":"\xed\xa0\x80"}}', "invalid UTF-8"),
    "lone surrogate, escaped": (b'{"stream":"s","type":"t","data":{"a":"\\ud800"}}', "surrogate"),
    "lone surrogate in type": (b'{"stream":"s","type":"\\ud800","data":{"a":"\\ud800"}}', "surrogate"),
    "lone surrogate in stream": (b'{"stream":"\\udc00","type":"t","data":{}}', "surrogate"),
    "lone surrogate in a field's name": (b'{"stream":"s","type":"t","data":{},"\\ud800":1}', "surrogate|unknown field"),
    "lone surrogate before no JSON": (b'{"stream":"s","type":"t","data":{"a":"\\ud800",}}', "surrogate|malformed"),
    "raw NUL": (b'{"stream":"s","type":"t","data":{"a":"\0"}}', "invalid character"),
    "NaN": (b'{"stream":"s","type":"t","data":{"a":NaN}}', "malformed"),
    "nested 10,000 deep": (b'{"stream":"s","type":"t","data":{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}}", "deep"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_stops_before_its_chunk_and_is_named(store: EventStore, tmp_path: Path, kind: str) -> None:
    bad, reason = BAD_LINES[kind]
    lines = [*(line(n) for n in range(25)), b"", bad, *(line(n) for n in range(25, 50))]
    path = tmp_path / "events.ndjson"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ImportFailed, match=reason) as caught:
        store.import_events(path, import_id="a", chunk_size=10)
    failure = caught.value
    assert (failure.source, failure.line_no, failure.import_id) == (str(path), 27, "a")
    assert failure.byte_offset == len(b"\n".join(lines[:26])) + 1
    assert str(failure).startswith(f"{path}, line 27: ")
    assert failure.stored_lines == 20
    assert numbers(store.read()) == list(range(20))
    # Mended, the import goes on where it stopped.
    lines[26] = line(1000)
    path.write_bytes(b"\n".join(lines))
    report = store.import_events(path, import_id="a", chunk_size=10)
    assert (report.events, report.skipped_events) == (31, 20)
    assert numbers(store.read()) == [*range(25), 1000, *range(25, 50)]


def test_the_first_bad_line_is_the_one_reported(store: EventStore) -> None:
    bad_text, bad_bytes = BAD_LINES["unknown field"][0], BAD_LINES["invalid UTF-8 in data"][0]
    with pytest.raises(ImportFailed) as caught:
        store.import_events([GOOD, bad_text, bad_bytes], import_id="a")
    assert caught.value.line_no == 2
    with pytest.raises(ImportFailed) as caught:
        store.import_events([GOOD, GOOD, bad_bytes, bad_text], import_id="a")
    assert (caught.value.line_no, caught.value.reason) == (3, "invalid UTF-8")


def test_a_truncated_gzip_is_named(store: EventStore) -> None:
    whole = gzip.compress(TEXT)
    with pytest.raises(ImportFailed, match="broken gzip"):
        store.import_events(io.BytesIO(whole[:-100]), import_id="a")
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    with pytest.raises(ImportFailed, match=r"broken gzip|malformed|invalid UTF-8|trailing|ends early"):
        store.import_events(io.BytesIO(bytes(damaged)), import_id="b")


@pytest.mark.essential
def test_what_only_the_server_can_refuse_is_found_by_its_line(store: EventStore) -> None:
    known = b'{"stream":"s","type":"t","data":{"n":1},"id":"018f3b1e-0000-7000-8000-0000000000aa"}'
    store.import_events([known], import_id="a")
    lines = [line(0), b"", line(1), b" ", known.replace(b"1}", b"2}"), line(2)]
    with pytest.raises(ImportFailed, match="0000000000aa is known, with another data") as caught:
        store.import_events(lines, import_id="b", chunk_size=2)
    assert caught.value.line_no == 5
    assert caught.value.byte_offset == sum(len(each) + 1 for each in lines[:4])
    assert caught.value.stored_lines == 3
    assert numbers(store.read()) == [1, 0, 1]
    assert store.stream_version(stream_uuid("s")) == 2  # the refused chunk took no version


def test_two_events_with_one_id_in_a_chunk_leave_it_unstored(store: EventStore) -> None:
    twice = b'{"stream":"%s","type":"t","data":{},"id":"018f3b1e-0000-7000-8000-0000000000aa"}'
    with pytest.raises(ImportFailed, match="is known, with another stream") as caught:
        store.import_events([line(0), twice % b"a", twice % b"b"], import_id="b")
    assert caught.value.line_no == 3
    assert list(store.read()) == []
    assert store.stream_version(stream_uuid("a")) is None


@pytest.mark.parametrize("constraint", ["check", "unique index"])
def test_an_error_quotes_no_payload(store: EventStore, constraint: str) -> None:
    secret = b'{"stream":"s","type":"t","data":{"password":"hunter2"}}'
    with store.pool.connection() as connection:
        if constraint == "check":
            connection.execute("ALTER TABLE hindsight.events ADD CONSTRAINT mine CHECK (length(event_name) > 1)")
        else:
            connection.execute("CREATE UNIQUE INDEX mine ON hindsight.events ((payload ->> 'password'))")
    with pytest.raises(ImportFailed, match="mine") as caught:
        store.import_events([secret, secret], import_id="a")
    assert caught.value.line_no == (1 if constraint == "check" else 2)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"import_id": ""}, ValueError),
        ({"import_id": "a\0b"}, ValueError),
        ({"import_id": "\ud800"}, ValueError),
        ({"import_id": 7}, TypeError),
        ({"import_id": "a", "chunk_size": 0}, ValueError),
        ({"import_id": "a", "chunk_size": True}, TypeError),
        ({"import_id": "a", "mode": "other"}, ValueError),
        ({"import_id": "a", "jobs": 0}, ValueError),
        ({"import_id": "a", "jobs": 11}, ValueError),  # more than the pool has connections
        ({"import_id": "a", "jobs": True}, TypeError),
        ({"import_id": "a", "on_error": 1}, TypeError),
        ({"import_id": "a", "max_errors": 1}, ValueError),
        ({"import_id": "a", "on_error": "bad", "max_errors": -1}, ValueError),
        ({"import_id": "a", "max_rate": 0}, ValueError),
        ({"import_id": "a", "max_rate": "1"}, ValueError),
        ({"import_id": "a", "max_rate": float("nan")}, ValueError),
    ],
)
def test_wrong_arguments_are_refused_before_any_io(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        EventStore("host=/nonexistent").import_events([], **arguments)


# Doing it again


def test_a_source_that_changed_is_refused(store: EventStore) -> None:
    store.import_events(SOURCE_LINES, import_id="a")
    changed = [line(9999), *SOURCE_LINES[1:]]
    with pytest.raises(ImportFailed, match="bytes differ now"):
        store.import_events(changed, import_id="a")
    with pytest.raises(ImportFailed, match="shorter now"):
        store.import_events(SOURCE_LINES[:-1], import_id="a")
    assert numbers(store.read()) == list(range(2000))


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b" \n"], ids=["LF", "CRLF", "blank and LF"])
@pytest.mark.parametrize("ended", [True, False])
def test_a_source_that_grew_is_imported_from_where_it_ended(store: EventStore, ending: bytes, ended: bool) -> None:
    first = ending.join(SOURCE_LINES[:10]) + (ending if ended else b"")
    store.import_events(io.BytesIO(first), import_id="a")
    whole = ending.join(SOURCE_LINES[:20]) + ending
    report = store.import_events(io.BytesIO(whole), import_id="a")
    assert (report.events, report.skipped_events, report.lines) == (10, 10, 10)
    reader = LineReader("a")
    assert [event.event_id.bytes for event in store.read()] == [reader.derived_id(n) for n in range(1, 21)]


def test_a_last_line_that_went_on_is_a_change(store: EventStore) -> None:
    store.import_events(io.BytesIO(line(0)), import_id="a")
    with pytest.raises(ImportFailed, match="last line went on"):
        store.import_events(io.BytesIO(line(0) + line(1)), import_id="a")


def test_a_gzip_that_breaks_in_what_was_imported_is_named(store: EventStore) -> None:
    whole = gzip.compress(TEXT)
    store.import_events(io.BytesIO(whole), import_id="a")
    with pytest.raises(ImportFailed, match="broken gzip"):
        store.import_events(io.BytesIO(whole[: len(whole) // 2]), import_id="a")


@pytest.mark.parametrize("leaving", [SystemExit, GeneratorExit, KeyboardInterrupt])
def test_a_source_that_leaves_with_more_than_an_exception_hangs_nobody(
    store: EventStore, leaving: type[BaseException]
) -> None:
    def lines() -> Iterator[bytes]:
        yield line(0)
        raise leaving

    with pytest.raises(leaving):
        store.import_events(lines(), import_id="a")


def test_an_empty_source_is_an_import_of_nothing(store: EventStore) -> None:
    for source in (b"", b"\n \n", gzip.compress(b"")):
        report = store.import_events(io.BytesIO(source), import_id=repr(source))
        assert (report.events, report.first_cursor, report.last_cursor) == (0, None, None)
    assert store.head() is None


# How a chunk is sized, and what it costs


def test_chunks_aim_at_their_time_and_never_leap() -> None:
    assert next_chunk_events(5000, 0.25) == 5000
    assert next_chunk_events(5000, 0.01) == 10_000
    assert next_chunk_events(5000, 5.0) == 2500
    assert next_chunk_events(100_000, 0.01) == 100_000
    assert next_chunk_events(1, 10.0) == 100


def test_progress_is_told_after_each_chunk(store: EventStore, tmp_path: Path) -> None:
    told: list[ImportProgress] = []
    store.import_events(as_path(tmp_path, TEXT), import_id="a", chunk_size=700, progress=told.append)
    assert [each.events for each in told] == [700, 1400, 2000, 2000][: len(told)]
    assert told[-1].lines == 2000
    assert told[-1].source_size == told[-1].source_bytes_read == len(TEXT)


MEMORY_PROGRAM = """
import sys
from hindsight_fast import EventStore
def lines(count):
    for n in range(count):
        yield b'{"stream":"stream-%d","type":"t","data":{"n":%d,"filler":"%s"}}' % (n % 5000, n, b"x" * 150)
with EventStore(sys.argv[1]) as store:
    store.create_schema()
    report = store.import_events(lines(int(sys.argv[2])), import_id=sys.argv[2], chunk_size=10_000)
assert report.events == int(sys.argv[2])
# Not ru_maxrss, which a process inherits from the one that started it.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_memory_is_flat(database: str) -> None:
    def peak_kib(count: int) -> int:
        done = subprocess.run(
            [sys.executable, "-c", MEMORY_PROGRAM, database, str(count)], capture_output=True, timeout=300, check=True
        )
        return int(done.stdout)

    small, large = peak_kib(50_000), peak_kib(200_000)
    print(f"peak memory: {small} KiB for 50,000 events, {large} KiB for 200,000")
    # 12 MiB: less than half of what would be kept if each event left just its line behind, of 210 bytes. Between two
    # runs of one size it differs by up to 4.
    assert large < small + 12 * 1024


# Properties

stream_names = st.sampled_from(["a", "b", "ü", "00000000-0000-4000-8000-0000000000cc"])
events = st.lists(
    st.tuples(
        stream_names, st.sampled_from(["t", "u"]), st.integers(0, 3), st.text(st.characters(codec="utf-8"), max_size=8)
    ),
    max_size=30,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(parts=st.lists(events, min_size=1, max_size=3), chunk_size=st.integers(1, 40))
def test_the_store_holds_what_the_files_say_in_their_order(
    store: EventStore, parts: list[list[tuple[str, str, int, str]]], chunk_size: int
) -> None:
    before = store.head() or Cursor.BEGINNING
    versions = {
        name: store.stream_version(stream_id(name)) for name in ("a", "b", "ü", "00000000-0000-4000-8000-0000000000cc")
    }
    expected = []
    for part in parts:
        texts = []
        for stream, name, version, text in part:
            data = json.dumps({"text": text}).encode()
            versions[stream] = 0 if versions[stream] is None else versions[stream] + 1  # type: ignore[operator]
            expected.append((stream_id(stream), versions[stream], name, version, data))
            head = json.dumps({"stream": stream, "type": name, "version": version}).encode()
            texts.append(head[:-1] + b',"data":' + data + b"}")
        store.import_events(texts, import_id=str(uuid.uuid4()), chunk_size=chunk_size)
    found = list(store.read(after=before))
    assert [(e.stream_id, e.stream_version, e.name, e.version, e.data) for e in found] == expected
    assert [e.cursor for e in found] == sorted(e.cursor for e in found)


def stream_id(name: str) -> uuid.UUID:
    return uuid.UUID(name) if len(name) == 36 else stream_uuid(name)


# Real data


def test_the_git_history_comes_back_as_it_went_in(store: EventStore, real_data: Callable[[str], Path]) -> None:
    path = real_data("postgres-git-history.ndjson.gz")
    report = store.import_events(path, import_id="git")
    assert (report.events, report.new_streams) == (283_571, 12_383)
    by_cause: dict[uuid.UUID, list[Cursor]] = defaultdict(list)
    versions: dict[uuid.UUID, int] = defaultdict(lambda: -1)
    with gzip.open(path) as lines:
        for text, event in zip(lines, store.read(), strict=True):
            fields = json.loads(text)
            stream = stream_uuid(fields["stream"])
            versions[stream] += 1
            assert (event.stream_id, event.stream_version, event.name) == (stream, versions[stream], fields["type"])
            assert b'"data":' + event.data + b',"time":' in text
            assert event.payload == fields["data"]
            assert event.created_at == datetime.fromisoformat(fields["time"])
            assert event.correlation_id is not None
            assert str(event.correlation_id) == fields["correlation_id"]
            by_cause[event.correlation_id].append(event.cursor)
    assert len(by_cause) == 57_144
    assert len(versions) == 12_383
    # Every fiftieth (two statements each); all of them in a soak.
    for cause, cursors in list(by_cause.items())[:: 1 if os.environ.get("HINDSIGHT_SOAK") else 50]:
        assert [event.cursor for event in store.read(correlation_id=cause)] == cursors
    for stream in list(versions)[::100]:
        assert store.stream_version(stream) == versions[stream]


@pytest.mark.essential
def test_webhook_bodies_come_back_byte_for_byte(store: EventStore, real_data: Callable[[str], Path]) -> None:
    path = real_data("github-webhooks.ndjson.gz")
    assert store.import_events(path, import_id="webhooks").events == 329
    names = set()
    with gzip.open(path) as lines:
        for text, event in zip(lines, store.read(), strict=True):
            fields = json.loads(text)
            names.add(event.name)
            assert event.name == fields["type"]
            assert b'"data":' + event.data in text
            assert event.payload == fields["data"]
    assert len({name.partition(".")[0] for name in names}) == 58
