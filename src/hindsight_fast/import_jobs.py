"""Storing the chunks of several shards at once: a thread and a connection for each.

Encoding stays with the thread that reads: it is a third of the server's work. A sender may wait 5 ms for the
interpreter lock before each block that it sends, but a socket's buffer holds about as much work for the server.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from .import_chunks import Chunk
from .import_writer import ChunkWriter, Stored


class Jobs:
    """A writer for each shard; a shard's chunks are stored one after the other, in the order in which they come.

    Use it in a ``with`` statement. Left by an exception, it lets each writer end the chunk that it is at, and drops
    what waits; what was not stored is read again by the next import under the same id.
    """

    def __init__(self, writers: Sequence[ChunkWriter]) -> None:
        self._waiting: list[SimpleQueue[Chunk | None]] = [SimpleQueue() for _ in writers]
        # Of each shard one chunk is being stored and one waits, so that its server is never idle.
        self._room = [threading.Semaphore(2) for _ in writers]
        self._stored: SimpleQueue[Stored] = SimpleQueue()
        self._failure: BaseException | None = None
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._work, args=(shard, writer), name=f"hindsight-import-{shard}", daemon=True)
            for shard, writer in enumerate(writers)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopping = True
        self._join()

    def give(self, chunk: Chunk) -> Iterator[Stored]:
        """Give a chunk to its shard's writer, waiting until that has room; yields what was stored meanwhile.

        Raises what a writer raised.
        """
        while not self._room[chunk.shard].acquire(timeout=0.1):
            self._raise_failure()
        self._raise_failure()
        self._waiting[chunk.shard].put(chunk)
        yield from self._finished()

    def finish(self) -> Iterator[Stored]:
        """Wait until all is stored; yields what was stored meanwhile. Raises what a writer raised."""
        self._join()
        self._raise_failure()
        yield from self._finished()

    def _join(self) -> None:
        for waiting in self._waiting:
            waiting.put(None)
        for thread in self._threads:
            thread.join()

    def _finished(self) -> Iterator[Stored]:
        while not self._stored.empty():
            yield self._stored.get()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self, shard: int, writer: ChunkWriter) -> None:
        while (chunk := self._waiting[shard].get()) is not None and not self._stopping:
            try:
                self._stored.put(writer.store(chunk))
            except BaseException as error:  # noqa: BLE001 - raised in the thread that gives chunks
                self._failure = self._failure or error
                self._stopping = True
                return
            self._room[shard].release()
