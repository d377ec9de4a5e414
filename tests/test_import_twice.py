"""What may happen twice: the outcome is the same set, once, or a clear error and nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hindsight_fast import Cursor, EventStore, ImportFailed, ImportProgress, RecordedEvent
from hindsight_fast.import_writer import ChunkWriter


def id_of(n: int) -> str:
    return str(uuid.UUID(int=(0x018F << 112) | (7 << 76) | (2 << 62) | n))


def line(n: int, *, stream: str | None = None, **fields: Any) -> bytes:
    return json.dumps({"stream": stream or f"s{n % 7}", "type": "t", "data": {"n": n}, **fields}).encode()


def numbers(events: Iterable[RecordedEvent]) -> list[int]:
    return sorted(event.payload["n"] for event in events)


WITH_IDS = [line(n, id=id_of(n)) for n in range(500)]


@pytest.mark.essential
@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("chunk_size", [37, None])
def test_explicit_ids_under_another_import_id_are_known(store: EventStore, jobs: int, chunk_size: int | None) -> None:
    store.import_events(WITH_IDS, import_id="a", jobs=jobs, chunk_size=chunk_size)
    head = store.head()
    report = store.import_events(WITH_IDS, import_id="b", jobs=jobs, chunk_size=chunk_size)
    assert (report.events, report.known_events, report.skipped_events, report.new_streams) == (0, 500, 0, 0)
    assert (report.first_cursor, report.last_cursor, store.head()) == (None, None, head)


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("chunk_size", [7, 100, None])
def test_known_ids_among_new_ones_are_passed_over(store: EventStore, jobs: int, chunk_size: int | None) -> None:
    store.import_events([each for n, each in enumerate(WITH_IDS) if n % 3 == 0], import_id="a")
    report = store.import_events(WITH_IDS, import_id="b", jobs=jobs, chunk_size=chunk_size)
    assert (report.events, report.known_events) == (333, 167)
    assert numbers(store.read()) == list(range(500))
    for stream_id in {event.stream_id for event in store.read()}:
        versions = [event.stream_version for event in store.read_stream(stream_id)]
        assert versions == list(range(len(versions)))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_known_id_with_other_data_is_an_error_and_nothing(store: EventStore, jobs: int) -> None:
    store.import_events(WITH_IDS[:10], import_id="a")
    lines = [*WITH_IDS[10:20], line(99, id=id_of(3)), *WITH_IDS[20:30]]
    with pytest.raises(ImportFailed, match=r"is known, with another (stream|data)") as caught:
        store.import_events(lines, import_id="b", jobs=jobs)
    assert caught.value.line_no == 11
    assert 99 not in numbers(store.read())


DEFERRED = """
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.event_name = 'forbidden' THEN RAISE EXCEPTION 'not this one'; END IF;
        RETURN NULL;
    END $$;
    CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON hindsight.events DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION refuse();
"""


@pytest.mark.essential
@pytest.mark.parametrize("place", [0, 1, 50, 98, 99])
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_refusal_at_the_commit_is_halved_down_to_its_line(
    store: EventStore, connection: psycopg.Connection[Any], tmp_path: Path, place: int, jobs: int
) -> None:
    connection.execute(DEFERRED)
    lines = [line(n, type="forbidden" if n == place else "t") for n in range(100)]
    with pytest.raises(ImportFailed, match="not this one") as caught:
        store.import_events(lines, import_id="a", jobs=jobs)
    assert caught.value.line_no == place + 1
    assert place not in numbers(store.read())
    report = store.import_events(lines, import_id="a", jobs=jobs, on_error=tmp_path / "bad")
    assert report.bad_lines == 1
    assert (tmp_path / "bad").read_bytes() == lines[place] + b"\n"
    assert numbers(store.read()) == [n for n in range(100) if n != place]


def test_a_refusal_that_no_line_is_to_blame_for_blames_none(
    store: EventStore, connection: psycopg.Connection[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hindsight_fast.import_writer.LOCK_PATIENCE_S", 0.2)
    connection.execute(DEFERRED.replace("NEW.event_name = 'forbidden'", "true").replace("INSERT ON hindsight.events",
        "UPDATE ON hindsight.imports"))  # fmt: skip
    with pytest.raises(ImportFailed, match="not this one") as caught:
        store.import_events([line(0), line(1)], import_id="a", on_error=tmp_path / "bad")
    assert caught.value.line_no is None
    assert (tmp_path / "bad").read_bytes() == b""
    assert store.head() is None


@pytest.mark.parametrize("same", [True, False])
def test_a_rival_that_brings_an_id_between_look_up_and_copy_is_met(
    store: EventStore, database: str, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    store.import_events(WITH_IDS[:1], import_id="history")
    rival_line = WITH_IDS[5] if same else line(99, id=id_of(5))
    copy, looked_up = ChunkWriter._copy, []

    def copy_after_the_rival(writer: ChunkWriter, *arguments: Any) -> Any:
        if writer._look_up_ids and not looked_up:  # the second try: the first met the id in the history
            looked_up.append(True)
            with EventStore(database) as rival:
                rival.import_events([rival_line], import_id="rival")
        return copy(writer, *arguments)

    monkeypatch.setattr(ChunkWriter, "_copy", copy_after_the_rival)
    if same:
        report = store.import_events(WITH_IDS[:20], import_id="a")
        assert (report.events, report.known_events) == (18, 2)
        assert numbers(store.read()) == list(range(20))
    else:
        with pytest.raises(ImportFailed, match="is known, with another") as caught:
            store.import_events(WITH_IDS[:20], import_id="a")
        assert caught.value.line_no == 6
        assert numbers(store.read()) == [0, 99]
    assert looked_up == [True]


RIVAL_PROGRAM = """
import json, sys
from hindsight_fast import EventStore, ImportFailed
lines = [json.dumps({"stream": f"s{n % 50}", "type": "t", "data": {"n": n}}).encode() for n in range(5000)]
with EventStore(sys.argv[1]) as store:
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        store.import_events(lines, import_id="a", jobs=int(sys.argv[2]), chunk_size=100)
        print("done")
    except ImportFailed as failure:
        print(failure.reason)
"""


@pytest.mark.parametrize("jobs", [1, 3])
def test_two_processes_with_one_import_id_store_everything_once(store: EventStore, database: str, jobs: int) -> None:
    rivals = [
        subprocess.Popen(
            [sys.executable, "-c", RIVAL_PROGRAM, database, str(jobs)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    for rival in rivals:
        assert rival.stdout is not None
        assert rival.stdout.readline() == "ready\n"
    for rival in rivals:
        assert rival.stdin is not None
        rival.stdin.write("\n")
        rival.stdin.flush()
    ends = [rival.communicate(timeout=60) for rival in rivals]
    assert {out.strip() for out, _ in ends} <= {"done", "another process runs the import 'a', and has moved on"}, ends
    report = store.import_events([line(n, stream=f"s{n % 50}") for n in range(5000)], import_id="a", jobs=jobs)
    assert report.events + report.skipped_events == 5000
    assert numbers(store.read()) == list(range(5000))


# Whatever the lines, the chunks, the jobs and what comes between


@dataclass(frozen=True)
class Line:
    """A line of a made-up source: an event of *stream*, its id the stream's *nth* where it brings one, or bad."""

    stream: str
    nth: int | None
    n: int
    bad: str | None

    def text(self, run: str) -> bytes:
        match self.bad:
            case "not JSON":
                return b'{"stream":'
            case "a list":
                return json.dumps({"stream": self.stream, "type": "t", "data": [self.n]}).encode()
            case "a naive time":
                return line(self.n, stream=self.stream, time="2024-01-01T00:00:00")
        fields: dict[str, Any] = {"type": "forbidden" if self.bad else "t"}
        if self.nth is not None:
            fields["id"] = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{run} {self.stream} {self.nth}"))
        return line(self.n, stream=f"{run} {self.stream}", **fields)


lines_of_all_kinds = st.lists(
    st.builds(
        Line,
        stream=st.sampled_from("abcde"),
        nth=st.one_of(st.none(), st.integers(0, 2)),
        n=st.integers(0, 1),
        bad=st.one_of(*[st.none()] * 3, st.sampled_from(["not JSON", "a list", "a naive time"])),
    ),
    max_size=40,
)
interruptions = st.lists(st.tuples(st.sampled_from(["source", "progress"]), st.integers(0, 40)), max_size=3)


class Interruption(Exception):
    """What a source or a callback raises."""


class Dribble:
    """A binary file that gives a line at a time, and breaks before one of them."""

    def __init__(self, texts: list[bytes], breaks_before: int | None) -> None:
        self.texts, self.breaks_before = enumerate(texts), breaks_before

    def read(self, _size: int) -> bytes:
        n, text = next(self.texts, (None, None))
        if n == self.breaks_before and n is not None:
            raise Interruption
        return b"" if text is None else text + b"\n"


def model(lines: list[Line]) -> tuple[dict[str, list[int]], int, list[int]]:
    """The numbers of each stream in order, how many lines were known, and which (from 1) are bad."""
    streams: dict[str, list[int]] = {}
    stored: dict[tuple[str, int], int] = {}
    known, bad = 0, []
    for line_no, each in enumerate(lines, 1):
        key = (each.stream, each.nth)
        if each.bad:
            bad.append(line_no)
        elif each.nth is not None and key in stored:
            if stored[key] == each.n:  # type: ignore[index]
                known += 1
            else:
                bad.append(line_no)
        else:
            stored[key] = each.n  # type: ignore[index]
            streams.setdefault(each.stream, []).append(each.n)
    return streams, known, bad


@pytest.mark.essential
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(lines=lines_of_all_kinds, chunk_size=st.integers(1, 15), jobs=st.integers(1, 4), interruptions=interruptions)
def test_the_store_ends_as_the_model_whatever_comes_between(
    store: EventStore, lines: list[Line], chunk_size: int, jobs: int, interruptions: list[tuple[str, int]]
) -> None:
    run = uuid.uuid4().hex
    before = store.head() or Cursor.BEGINNING
    texts = [each.text(run) for each in lines]
    events = bad_lines = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bad"
        for kind, after in [*interruptions, ("", 0)]:

            def progress(done: ImportProgress, kind: str = kind, after: int = after) -> None:
                if kind == "progress" and done.lines >= after:
                    raise Interruption

            try:
                source = Dribble(texts, after if kind == "source" else None)
                report = store.import_events(
                    source, import_id=run, jobs=jobs, chunk_size=chunk_size, on_error=path, progress=progress
                )
            except Interruption:
                assert kind
            else:
                events, bad_lines = report.events + report.skipped_events, report.bad_lines
        aside = [each for each in path.read_bytes().split(b"\n") if each.strip()]
    streams, _, bad = model(lines)
    found: dict[str, list[int]] = {}
    for event in store.read(after=before):
        found.setdefault(str(event.stream_id), []).append(event.payload["n"])
    assert sorted(found.values()) == sorted(streams.values())
    assert Counter(aside) == Counter(texts[line_no - 1] for line_no in bad)
    assert events == sum(map(len, streams.values()))
    assert bad_lines <= len(bad)
