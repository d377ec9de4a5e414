"""Encoding, decoding, batches, lines and every way to fail, a million rows each: the process must not grow.

(A million in a soak, else 400,000.)

``kept_bytes`` (leaks.py) sees what Python allocates, over some thousand calls. This sees all of it, libpq's memory and
the C library's too, by the size of the process. Each job runs in a process of
its own: in one that has freed much before, a leak could fill that up unseen.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID

import pytest

import plain_python
from compiled_core import PlainResult, rows_of
from hindsight_fast._core import EventBatch, EventRows, ResultReader, check_fields, decode_result, decode_row
from hindsight_fast.errors import EventParseError, MalformedRow
from hindsight_fast.import_lines import BadLine, LineReader
from hindsight_fast.results import result_reader
from libpq_results import LibpqResult
from plain_python import PlainEvent, PlainNewEvent

MOST_GROWTH_BYTES = 3_000_000
"""Noise of the allocators is below 1 MB (seen); the least leak, of 16 bytes a row, adds 6.4 MB to 400,000 rows."""
# In the short form a leak of 16 bytes a row still adds twice as much as may be.
ROWS = 1_000_000 if os.environ.get("HINDSIGHT_SOAK") else 400_000
ROWS_A_CALL = 500

NOW = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
NEW_EVENTS = [
    PlainNewEvent(UUID(int=n), UUID(int=n % 7), f"name {n % 11}", 1, b'{"n":1}', NOW if n % 2 else None, metadata=b"{}")
    for n in range(ROWS_A_CALL)
]
EVENT = PlainEvent(812, 3, UUID(int=1), UUID(int=2), 44, NOW, 2, UUID(int=3), "größe", b'{"a": 1}', b'{"b": 2}')
VALUES = plain_python.split_row(plain_python.encode_row(EVENT))
ROW = plain_python.encode_row(EVENT)


def resident_bytes() -> int:
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * mmap.PAGESIZE


def growth_over_a_million(call: Callable[[], object], rows_a_call: int) -> int:
    """By how many bytes this process is larger after *call* has handled a million rows, the first few aside."""
    calls = ROWS // rows_a_call
    for _ in range(calls // 20):
        call()
    before = resident_bytes()
    for _ in range(calls):
        call()
    return resident_bytes() - before


# What leaks on purpose


def lose_references() -> None:
    lose = ctypes.pythonapi.Py_IncRef
    for _ in range(ROWS_A_CALL):
        lose(ctypes.py_object(object()))


def lose_memory_of_the_c_library() -> None:
    allocate = ctypes.CDLL(None).malloc
    allocate.restype = ctypes.c_void_p
    for _ in range(ROWS_A_CALL):
        ctypes.memset(allocate(16), 1, 16)


never_cleared = []


def keep_results() -> None:
    reader = result_reader()
    assert reader is not None
    never_cleared.append(LibpqResult(reader.library, [VALUES] * ROWS_A_CALL))


# The core


def encode() -> None:
    rows = rows_of(NEW_EVENTS)
    ids, _ = rows.stream_arrays()
    heads = plain_python.encode_bigint_array([10**6] * rows.stream_count)
    rows.place(1, heads, NOW)
    assert len(ids) == 20 + 20 * 7
    for _ in rows.blocks(20_000):
        pass
    chosen = rows.select(range(0, ROWS_A_CALL, 2))
    chosen.event_ids()
    chosen.is_dated(0)


def fail_to_encode() -> None:
    rows = EventRows()
    good: list[object] = [b"e" * 16, b"s" * 16, "name", 1, b"{}", NOW, b"c" * 16, b"{}"]
    bad: list[tuple[int, object]] = [(0, b""), (1, b""), (2, ""), (2, "\ud800"), (2, "x" * 2000), (3, -1), (3, 2**70)]
    bad += [(4, None), (5, NOW.replace(tzinfo=None)), (5, 7), (6, b""), (7, 7)]
    for n in range(ROWS_A_CALL):
        place, value = bad[n % len(bad)]
        with contextlib.suppress(ValueError, TypeError):
            rows.add(*good[:place], value, *good[place + 1 :])  # type: ignore[arg-type]
    rows.add(*good)  # type: ignore[arg-type]
    for array in (b"", bytes(32), plain_python.encode_bigint_array([-1])):
        with contextlib.suppress(ValueError):
            rows.place(1, array, NOW)
    for numbers in ([1], [0, 0], [None]):
        with contextlib.suppress(ValueError, IndexError, TypeError):
            rows.select(numbers)  # type: ignore[arg-type]
    assert len(rows) == 1


RESULT = PlainResult([VALUES] * ROWS_A_CALL)


def decode() -> None:
    for event in decode_result(RESULT):
        event.payload, event.metadata, event.event_id, event.created_at, event.cursor  # noqa: B018
    for event in EventBatch(RESULT):
        event.stream_id, event.correlation_id, hash(event), event == event


def fail_to_decode() -> None:
    bad_name = [*VALUES[:8], b"\xff", *VALUES[9:]]
    result = PlainResult([VALUES, bad_name])
    broken = decode_row(plain_python.encode_row(replace(EVENT, payload=b"{", metadata=b"{")))
    for size in range(ROWS_A_CALL):
        with contextlib.suppress(MalformedRow):
            decode_row(ROW[: size % len(ROW)])
        with contextlib.suppress(MalformedRow):
            decode_result(result)
        if size % 10 == 0:
            with contextlib.suppress(EventParseError):
                broken.payload  # noqa: B018
            with contextlib.suppress(EventParseError):
                broken.metadata  # noqa: B018
            with contextlib.suppress(OSError):
                ResultReader("libpq-of-nobody.so")


def read_in_place() -> None:
    reader = result_reader()
    assert reader is not None
    batch = EventBatch(LibpqResult(reader.library, [VALUES] * 50), None, reader)
    for _ in range(ROWS_A_CALL // 50):
        for event in batch:
            event.payload  # noqa: B018
    assert batch.payload_bytes == 50 * 8
    with contextlib.suppress(MalformedRow):
        decode_result(LibpqResult(reader.library, [[b"", *VALUES[1:]]]), None, reader)


LINES = [
    b'{"stream":"s%d","type":"t","data":{"n":[1]},"time":"2024-01-01T00:00:00+02:00","metadata":{}}' % n
    for n in range(50)
]


def read_lines() -> None:
    reader, rows = LineReader("a"), EventRows()
    for n in range(ROWS_A_CALL):
        reader.add(LINES[n % 50], n, [rows])
    assert len(rows) == ROWS_A_CALL


BLOCK = b"\n".join(LINES)


def read_blocks_of_lines() -> None:
    reader, rows = LineReader("a"), EventRows()
    for _ in range(ROWS_A_CALL // 50):
        assert reader.add_plain(BLOCK, 0, 50, 1, 0, [rows, rows])[:2] == (50, len(BLOCK))
    assert len(rows) == ROWS_A_CALL


BAD_LINES = [
    *(b"", b"hello", b"{}", b"[]", LINES[0][:-1], LINES[0] * 2, b'{"type":"a",' + LINES[0][1:], b"\xff"),
    *(b'{"stream":"s","type":"t","data":%s}' % data for data in (b"[]", b'{"a":"\\ud800"}', b'{"a":' + b"[" * 2000)),
    *(b'{"stream":"s","type":"%s","data":{}}' % name for name in (b"", b"\\u0000", b"x" * 2000)),
    b'{"\\u0073tream":"s","stream":"s","type":"t","data":{}}',
    b'{"stream":"s","type":"t","data":{"a":' + b"[" * 600 + b"]" * 600 + b"}}",
]


def fail_to_read_lines() -> None:
    reader, rows = LineReader("a"), EventRows()
    for n in range(ROWS_A_CALL):
        with contextlib.suppress(BadLine):
            reader.add(BAD_LINES[n % len(BAD_LINES)], n, [rows])
        reader.add_plain(BAD_LINES[n % len(BAD_LINES)], 0, 1, n, 0, [rows])
    assert len(rows) == 0
    for text in (b"{", b'{"', b'{"stream":', b'{"\\x":1}'):
        with contextlib.suppress(ValueError):
            check_fields(text, b"{}", b"{}")


# Job: how many rows a call of it handles.
LEAKS = {lose_references: ROWS_A_CALL, lose_memory_of_the_c_library: ROWS_A_CALL, keep_results: 5 * ROWS_A_CALL}
JOBS = {
    encode: ROWS_A_CALL,
    fail_to_encode: ROWS_A_CALL,
    decode: 2 * ROWS_A_CALL,
    fail_to_decode: 3 * ROWS_A_CALL,
    read_in_place: ROWS_A_CALL,
    read_lines: ROWS_A_CALL,
    read_blocks_of_lines: ROWS_A_CALL,
    fail_to_read_lines: ROWS_A_CALL,
}


def growth_in_a_process(call: Callable[[], object]) -> int:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, call.__name__]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=110, check=True)
    print(f"{call.__name__}: {int(done.stdout)} bytes")
    return int(done.stdout)


@pytest.mark.parametrize("leak", LEAKS, ids=lambda call: call.__name__)
def test_the_check_sees_a_leak(leak: Callable[[], None]) -> None:
    assert growth_in_a_process(leak) > 1.5 * MOST_GROWTH_BYTES


@pytest.mark.parametrize("job", JOBS, ids=lambda call: call.__name__)
def test_a_million_rows_leave_nothing_behind(job: Callable[[], None]) -> None:
    assert growth_in_a_process(job) < MOST_GROWTH_BYTES


if __name__ == "__main__":
    job, rows_a_call = next((job, rows) for job, rows in {**LEAKS, **JOBS}.items() if job.__name__ == sys.argv[1])
    print(growth_over_a_million(job, rows_a_call))
