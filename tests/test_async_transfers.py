"""Imports and exports of an AsyncEventStore, which run in a thread: cancelled, failed, and alike with the others."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from async_stores import COUNT, PATIENCE_S, Locked, check_whole, lines, run, until
from hindsight_fast import (
    AsyncEventStore,
    EventStore,
    ImportFailed,
    ImportProgress,
)

# Imports and exports, in a thread


def test_a_cancelled_import_stops_and_is_gone_on_with(database: str) -> None:
    async def main() -> None:
        async with AsyncEventStore(database, pool_size=2) as store:
            await store.create_schema()
            for jobs, count in ((1, 20_000), (2, 40_000)):
                name = f"with {jobs}"
                told: list[ImportProgress] = []
                chunks = asyncio.Event()

                def tell(progress: ImportProgress, told: Any = told, chunks: Any = chunks) -> None:
                    assert asyncio.get_running_loop()  # called in the loop
                    told.append(progress)
                    if len(told) == 5:
                        chunks.set()

                task = asyncio.create_task(
                    store.import_events(lines(20_000), import_id=name, chunk_size=100, jobs=jobs, progress=tell)
                )
                await chunks.wait()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert not [each for each in threading.enumerate() if each.name.startswith("hindsight-import")]
                found = [event async for event in store.read()]
                stored = len(found) - (count - 20_000)
                assert 400 <= stored < 20_000
                assert stored % 100 == 0 or jobs == 2  # whole chunks
                report = await store.import_events(lines(20_000), import_id=name, jobs=jobs)
                assert report.skipped_events == stored
                assert report.events == 20_000 - stored
                found = [event async for event in store.read()]
                assert sorted(event.payload["n"] for event in found[count - 20_000 :]) == list(range(20_000))

    run(main)


@pytest.mark.parametrize("waits_for", ["its source", "its rate", "its turn"])
def test_an_import_that_waits_is_cancelled_soon(database: str, waits_for: str) -> None:
    async def main() -> None:
        async with AsyncEventStore(database) as store:
            await store.create_schema()
            release, begun = threading.Event(), threading.Event()

            def source() -> Iterator[bytes]:
                yield from lines(10)
                begun.set()
                if waits_for == "its source":
                    release.wait(PATIENCE_S)
                yield from lines(10)

            rate = 0.1 if waits_for == "its rate" else None
            task = asyncio.create_task(store.import_events(source(), import_id="slow", max_rate=rate, chunk_size=10))
            if waits_for != "its turn":
                await until(begun.is_set)
            await asyncio.sleep(0.1 if waits_for != "its turn" else 0)
            began = time.monotonic()
            task.cancel()
            try:
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert time.monotonic() - began < PATIENCE_S - 5  # its source and its rate keep it for longer
            finally:
                release.set()
            assert await store.import_events(lines(10), import_id="after") is not None

    run(main)


def test_what_progress_raises_ends_the_import_and_reaches_the_caller(database: str) -> None:
    class Enough(Exception):
        pass

    def enough(_: object) -> None:
        raise Enough

    async def main() -> None:
        async with AsyncEventStore(database) as store:
            await store.create_schema()
            with pytest.raises(Enough):
                await store.import_events(lines(), import_id="x", chunk_size=500, progress=enough)
            assert len([event async for event in store.read()]) == 500
            with pytest.raises(ImportFailed, match="malformed"):
                await store.import_events([b"bad"], import_id="bad")
            with pytest.raises(ValueError, match="jobs"):
                await store.import_events([], import_id="x", jobs=0)

    run(main)


def test_an_initial_import_is_abandoned(database: str) -> None:
    def broken() -> Iterator[bytes]:
        yield from lines(1000)
        raise RuntimeError("the source broke")

    async def main() -> None:
        async with AsyncEventStore(database) as store:
            await store.create_schema()
            with pytest.raises(RuntimeError, match="broke"):
                await store.import_events(broken(), import_id="x", mode="initial", chunk_size=100)
            await store.abandon_import("x")
            report = await store.import_events(lines(), import_id="x", mode="initial")
            assert report.events == COUNT

    run(main)


def test_an_export_writes_what_the_synchronous_one_does(filled: str, tmp_path: Path) -> None:
    with EventStore(filled) as sync_store:
        sync_store.export_events(tmp_path / "sync.ndjson", event_types=["t"])

    async def main() -> None:
        async with AsyncEventStore(filled, pool_size=1) as store:
            told: list[int] = []
            target = tmp_path / "async.ndjson"
            count = await store.export_events(
                target, event_types=["t"], progress=lambda progress: told.append(progress.events)
            )
            assert count == COUNT == told[-1]
            assert target.read_bytes() == (tmp_path / "sync.ndjson").read_bytes()
            with pytest.raises(FileExistsError):
                await store.export_events(target)
            with pytest.raises(TypeError, match="target"):
                await store.export_events(7)  # type: ignore[arg-type]
            await check_whole(store, 1)

    run(main)


def test_a_cancelled_export_leaves_no_file_and_no_query(filled: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with AsyncEventStore(filled, pool_size=1) as store:
            with Locked(filled) as locked:
                task = asyncio.create_task(store.export_events(tmp_path / "all.ndjson"))
                await until(lambda: len(locked.waiting()) == 1)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await until(lambda: not locked.waiting())
            assert list(tmp_path.iterdir()) == []
            await check_whole(store, 1)

    run(main)
