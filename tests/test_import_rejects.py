"""Bad lines set aside: which, where, why; each in one place only, whatever stops the import in between."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hindsight_fast import EventStore, ImportFailed, ImportProgress, RecordedEvent
from hindsight_fast.import_chunks import RejectedLine
from hindsight_fast.import_rejects import RejectFile


@pytest.fixture
def aside(tmp_path: Path) -> Path:
    """Where bad lines go."""
    return tmp_path / "bad.ndjson"


def line(n: int, stream: str = "s", type_: str = "t") -> bytes:
    return b'{"stream":"%s","type":"%s","data":{"n":%d}}' % (stream.encode(), type_.encode(), n)


def numbers(events: Iterable[RecordedEvent]) -> list[int]:
    return sorted(event.payload["n"] for event in events)


def lines_of(path: Path) -> list[bytes]:
    """The lines that are not blank, as an import takes them."""
    return [each for each in path.read_bytes().split(b"\n") if each.strip()]


def reasons_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(each) for each in lines_of(path.with_name(path.name + ".reasons"))]


def forbid(store: EventStore, type_: str) -> None:
    """Let the server refuse a type of events."""
    with store.pool.connection() as connection:
        connection.execute(f"ALTER TABLE hindsight.events ADD CONSTRAINT mine CHECK (event_name <> '{type_}')")


def allow_again(store: EventStore) -> None:
    with store.pool.connection() as connection:
        connection.execute("ALTER TABLE hindsight.events DROP CONSTRAINT mine")


# What is set aside


MIXED = [
    line(0),
    b"hello",
    line(1, "a"),
    b"",
    b'{"stream":"a","type":"t","data":[]}',
    line(2, "b", "forbidden"),
    b'{"stream":"\xff","type":"t","data":{}}',
    line(3, "c"),
    b'{"stream":"a","type":"t","data":{},"time":"2024-01-01T00:00:00"} \r',
]
BAD = [(2, "malformed"), (5, "object"), (6, "mine"), (7, "invalid UTF-8"), (9, "time zone")]


@pytest.mark.essential
@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize("packed", [False, True])
def test_bad_lines_are_set_aside_with_number_offset_and_reason(
    store: EventStore, aside: Path, jobs: int, chunk_size: int | None, packed: bool
) -> None:
    forbid(store, "forbidden")
    text = b"\n".join(MIXED)
    source = io.BytesIO(gzip.compress(text) if packed else text)
    report = store.import_events(source, import_id="a", jobs=jobs, chunk_size=chunk_size, on_error=aside)
    assert (report.events, report.bad_lines, report.lines, report.bytes) == (3, 5, 9, len(text))
    assert numbers(store.read()) == [0, 1, 3]
    reasons = reasons_of(aside)
    assert lines_of(aside) == [MIXED[reason["line_no"] - 1] for reason in reasons]
    end = 0
    for reason in reasons:
        bad = MIXED[reason["line_no"] - 1]
        assert text[reason["byte_offset"] :].startswith(bad)
        end += len(bad) + 1
        assert reason["end"] == end
        assert dict(BAD)[reason["line_no"]] in reason["reason"]
    assert sorted(reason["line_no"] for reason in reasons) == [number for number, _ in BAD]


def test_mended_lines_are_imported_under_another_id(store: EventStore, aside: Path, tmp_path: Path) -> None:
    store.import_events([line(0), line(1)[:-1], line(2), line(3)[:-1]], import_id="a", on_error=aside)
    mended = tmp_path / "mended.ndjson"
    mended.write_bytes(b"}\n".join(lines_of(aside)) + b"}\n")
    store.import_events(mended, import_id="a, mended")
    assert numbers(store.read()) == [0, 1, 2, 3]


def test_the_set_aside_file_is_itself_a_source(store: EventStore, aside: Path, tmp_path: Path) -> None:
    store.import_events([line(0), b"{", line(1)], import_id="a", on_error=aside)
    again = tmp_path / "again.ndjson"
    report = store.import_events(aside, import_id="b", on_error=again)
    assert (report.events, report.bad_lines) == (0, 1)
    assert lines_of(again) == lines_of(aside) == [b"{"]


def test_no_reason_quotes_a_payload(store: EventStore, aside: Path) -> None:
    with store.pool.connection() as connection:
        connection.execute("CREATE UNIQUE INDEX mine ON hindsight.events ((payload ->> 'password'))")
    secret = b'{"stream":"s","type":"t","data":{"password":"hunter2"}}'
    store.import_events([secret, secret], import_id="a", on_error=aside)
    (reason,) = reasons_of(aside)
    assert reason["line_no"] == 2
    assert "hunter2" not in json.dumps(reason)


@pytest.mark.parametrize("import_id", ['"', "a\nb\r", "ü ☃ \u2028", "\\", "x" * 500])
def test_import_ids_with_odd_characters_find_their_file_again(store: EventStore, aside: Path, import_id: str) -> None:
    for lines in ([b"{", line(0)], [b"{", line(0), b"["]):
        store.import_events(lines, import_id=import_id, on_error=aside)
    assert lines_of(aside) == [b"{", b"["]


# How many


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("bad_line", [b"{", line(99, "s", "forbidden")], ids=["not JSON", "refused by the server"])
def test_one_bad_line_too_many_ends_the_import_and_is_named(
    store: EventStore, aside: Path, jobs: int, bad_line: bytes
) -> None:
    forbid(store, "forbidden")
    lines = [line(0), bad_line, line(1), bad_line, line(2)]
    report = store.import_events(lines, import_id="enough", on_error=aside, max_errors=2, jobs=jobs)
    assert report.bad_lines == 2
    with pytest.raises(ImportFailed, match="one bad line more than max_errors allows") as caught:
        store.import_events(lines, import_id="few", on_error=f"{aside}.2", max_errors=1, jobs=jobs, chunk_size=1)
    assert caught.value.line_no == 4
    assert caught.value.byte_offset == sum(len(each) + 1 for each in lines[:3])
    with pytest.raises(ImportFailed, match="allows") as caught:
        store.import_events(lines, import_id="none", on_error=f"{aside}.3", max_errors=0, jobs=jobs)
    assert caught.value.line_no == 2
    # Those of earlier calls count, too.
    with pytest.raises(ImportFailed, match="allows"):
        store.import_events([*lines, b"["], import_id="enough", on_error=aside, max_errors=2, jobs=jobs)
    assert len(lines_of(aside)) == 2


@pytest.mark.essential
@pytest.mark.parametrize("jobs", [1, 2])
def test_what_a_failed_chunk_set_aside_is_judged_anew(store: EventStore, aside: Path, jobs: int) -> None:
    """Or else a line that is stored after all would be in the file as well, and be doubled by whoever mends that."""
    forbid(store, "forbidden")
    lines = [line(n, f"s{n}", "forbidden" if n % 2 else "t") for n in range(20)]
    with pytest.raises(ImportFailed, match="max_errors"):
        store.import_events(lines, import_id="a", on_error=aside, max_errors=6, jobs=jobs, chunk_size=5)
    assert lines_of(aside) != []
    allow_again(store)
    store.import_events(lines, import_id="a", on_error=aside, max_errors=6, jobs=jobs, chunk_size=5)
    # Each line is in one place, and none in both.
    assert sorted([*numbers(store.read()), *(json.loads(each)["data"]["n"] for each in lines_of(aside))]) == [
        *range(20)
    ]


def test_what_is_taken_back_between_others_leaves_blank_lines(aside: Path) -> None:
    bad = [RejectedLine(n, 10 * n, "why", b"bad %d" % n) for n in range(1, 7)]
    with RejectFile(aside, "a", None) as rejects:
        for each in bad:
            rejects.write([each], each.line_no % 2)
    with RejectFile(aside, "a", None) as rejects:
        rejects.take_back([2, 5])  # shard 0 has come to line 2, shard 1 to line 5
        assert rejects.count == 4
        assert aside.read_bytes() == b"bad 1\nbad 2\nbad 3\n     \nbad 5\n"
        rejects.write([bad[3], bad[5]], 0)
    assert lines_of(aside) == [b"bad 1", b"bad 2", b"bad 3", b"bad 5", b"bad 4", b"bad 6"]
    assert [reason["line_no"] for reason in reasons_of(aside)] == [1, 2, 3, 5, 4, 6]
    with RejectFile(aside, "a", None) as rejects:
        assert rejects.count == 6
        rejects.take_back([0, 0])
        assert rejects.count == 0
    assert aside.read_bytes() == b""


def test_bytes_of_bad_lines_fill_a_chunk_too(store: EventStore, aside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many lines a chunk may have: what is bad is held in memory as well."""
    monkeypatch.setattr("hindsight_fast.import_chunks.MOST_CHUNK_BYTES", 10_000)
    told: list[ImportProgress] = []
    bad = b"x" * 99
    store.import_events([bad] * 5000, import_id="a", on_error=aside, chunk_size=10**6, progress=told.append)
    steps = [after.bad_lines - before.bad_lines for before, after in pairwise(told)]
    assert max(steps) <= 1000  # as many lines as are read between two looks
    assert told[-1].bad_lines == 5000


# The files


def test_what_a_kill_left_half_written_is_cut_off(store: EventStore, aside: Path) -> None:
    lines = [line(0), b"{", line(1), b"["]
    store.import_events(lines, import_id="a", on_error=aside)
    whole, whole_reasons = aside.read_bytes(), Path(f"{aside}.reasons").read_bytes()
    # Between the two writes, and in the middle of each.
    for tail, reason_tail in ((b"hel", b""), (b"hello\n", b""), (b"hello\n", b'{"line_no":5,"byte_')):
        with aside.open("ab") as file, Path(f"{aside}.reasons").open("ab") as reasons:
            file.write(tail)
            reasons.write(reason_tail)
        store.import_events(lines, import_id="a", on_error=aside)
        assert aside.read_bytes() == whole
        assert Path(f"{aside}.reasons").read_bytes() == whole_reasons


def test_a_write_that_fails_half_way_leaves_no_trace(aside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a full disk: another shard's next line stands where its reason says."""
    real = os.pwrite
    first, second = (RejectedLine(n, 0, "why", b"bad %d" % n) for n in (1, 2))
    with RejectFile(aside, "a", None) as rejects:
        for fails_at in (1, 2):  # the line, its reason
            calls = 0

            def full(descriptor: int, data: bytes, at: int, fails_at: int = fails_at) -> int:
                nonlocal calls
                calls += 1
                if calls == fails_at:
                    real(descriptor, bytes(data)[:3], at)
                    raise OSError(28, "No space left on device")
                return real(descriptor, data, at)

            with monkeypatch.context() as patch:
                patch.setattr(os, "pwrite", full)
                with pytest.raises(OSError, match="No space"):
                    rejects.write([first], 0)
            assert (aside.read_bytes(), rejects.count) == (b"", 0)
        rejects.write([second], 0)
    assert (lines_of(aside), [reason["end"] for reason in reasons_of(aside)]) == ([b"bad 2"], [6])


def test_a_file_that_is_something_else_is_refused_and_kept(store: EventStore, aside: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"precious")
    with pytest.raises(ValueError, match="is no file of bad lines"):
        store.import_events([line(0)], import_id="a", on_error=other)
    Path(f"{tmp_path}/list.reasons").write_bytes(b"precious\n")
    with pytest.raises(ValueError, match="is no list of reasons"):
        store.import_events([line(0)], import_id="a", on_error=tmp_path / "list")
    store.import_events([b"{"], import_id="a", on_error=aside)
    with pytest.raises(ValueError, match="bad lines of the import 'a'"):
        store.import_events([line(0)], import_id="b", on_error=aside)
    with pytest.raises(ValueError, match="is no file"):
        store.import_events([line(0)], import_id="a", on_error=tmp_path)
    with pytest.raises(FileNotFoundError):
        store.import_events([line(0)], import_id="a", on_error=tmp_path / "no such folder" / "bad")
    assert other.read_bytes() == b"precious"
    assert Path(f"{tmp_path}/list.reasons").read_bytes() == b"precious\n"
    assert lines_of(aside) == [b"{"]
    assert store.head() is None


def test_the_source_is_no_place_for_bad_lines(store: EventStore, tmp_path: Path) -> None:
    source = tmp_path / "events.ndjson"
    source.write_bytes(line(0) + b"\n{\n")
    (tmp_path / "link").symlink_to(source)
    for path in (source, tmp_path / "link"):
        with pytest.raises(ValueError, match="is no file of bad lines"):
            store.import_events(source, import_id="a", on_error=path)
    assert source.read_bytes() == line(0) + b"\n{\n"


def test_a_file_that_was_mended_where_it_stands_is_not_cut(store: EventStore, aside: Path) -> None:
    lines = [line(0), b'{"stream":"s"', b"{"]
    store.import_events(lines, import_id="a", on_error=aside)
    for mended in (line(1) + b"\n" + line(2) + b"\n", b"{\n"):
        aside.write_bytes(mended)
        with pytest.raises(ValueError, match="changed since"):
            store.import_events(lines, import_id="a", on_error=aside)
        assert aside.read_bytes() == mended


def test_a_second_import_is_kept_out_of_the_file(store: EventStore, aside: Path) -> None:
    def lines() -> Iterator[bytes]:
        yield b"{"
        with pytest.raises(OSError, match="another import is writing to it"):
            store.import_events([b"["], import_id="a", on_error=aside)

    store.import_events(lines(), import_id="a", on_error=aside)
    assert lines_of(aside) == [b"{"]
