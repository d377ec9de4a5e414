"""Storing the chunks of several shards at once: a thread and a connection for each.

Encoding stays with the thread that reads: it is a third of the server's work. A sender may wait 5 ms for the
interpreter lock before each block that it sends, but a socket's buffer holds about as much work for the server.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Final, Self

from .import_chunks import Chunk
from .import_writer import ChunkWriter, Stored

WAIT_S: Final = 0.1
"""How soon what a writer has done or met is noticed by whoever waits for room or for the end."""


class Jobs:
    """A writer for each shard; a shard's chunks are stored one after the other, in the order in which they come.

    *lines_done* says of each shard how many lines it had before. Use it in a ``with`` statement. Left by an exception,
    it lets each writer end the chunk that it is at (one that waits for a lock gives up), and drops what waits; what was
    not stored is read again by the next import under the same id.
    """

    def __init__(self, writers: Sequence[ChunkWriter], lines_done: Sequence[int]) -> None:
        self._writers = writers
        self._waiting: list[SimpleQueue[Chunk | None]] = [SimpleQueue() for _ in writers]
        # Permits: of each shard one chunk is being stored and one waits, so that its server is never idle. No
        # semaphores: an interrupt between two bytecodes of theirs leaves a lock held, and a writer would stop there.
        self._room: list[SimpleQueue[None]] = [SimpleQueue() for _ in writers]
        for room in self._room:
            room.put(None)
            room.put(None)
        self._lines_done = list(lines_done)
        self._stored: SimpleQueue[Stored] = SimpleQueue()
        self._failure: BaseException | None = None
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._work, args=(shard, writer), name=f"hindsight-import-{shard}", daemon=True)
            for shard, writer in enumerate(writers)
        ]

    def __enter__(self) -> Self:
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:  # an interrupt, or no more threads: those that run would wait for ever
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def lines_done(self) -> int:
        """How many lines every shard has done."""
        return min(self._lines_done)

    def give(self, chunk: Chunk) -> Iterator[Stored]:
        """Give a chunk to its shard's writer, waiting until that has room; yields what was stored meanwhile.

        Raises what a writer raised.
        """
        while not self._has_room(chunk.shard):
            yield from self.finished()
        yield from self.finished()
        self._waiting[chunk.shard].put(chunk)

    def finished(self) -> Iterator[Stored]:
        """Yield what has been stored by now. Raises what a writer raised."""
        while not self._stored.empty():
            yield self._stored.get()
        if self._failure is not None:
            raise self._failure

    def finish(self) -> Iterator[Stored]:
        """Wait until all is stored; yields what was stored meanwhile. Raises what a writer raised."""
        for waiting in self._waiting:
            waiting.put(None)
        for thread in self._threads:
            while thread.is_alive():
                thread.join(WAIT_S)
                yield from self.finished()
        yield from self.finished()

    def _has_room(self, shard: int) -> bool:
        try:
            self._room[shard].get(timeout=WAIT_S)
        except Empty:
            return False
        return True

    def _stop(self) -> None:
        self._stopping = True
        for writer, waiting in zip(self._writers, self._waiting, strict=True):
            writer.hurry()
            waiting.put(None)
        for thread in self._threads:
            if thread.ident is not None:  # None: it was never started
                thread.join()

    def _work(self, shard: int, writer: ChunkWriter) -> None:
        while (chunk := self._waiting[shard].get()) is not None and not self._stopping:
            try:
                self._stored.put(writer.store(chunk))
            except BaseException as error:  # noqa: BLE001 - raised in the thread that gives chunks
                # The first one is told: the others may follow from it.
                self._failure = self._failure or error
                self._stopping = True
                for each in self._writers:
                    each.hurry()
                return
            self._lines_done[shard] = chunk.end.line_no
            self._room[shard].put(None)
