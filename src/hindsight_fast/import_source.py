"""Where an import's lines come from: a path, standard input, a binary file object or an iterable of lines.

A thread of its own reads and decompresses (both without the interpreter lock) a few blocks ahead, so that whoever
takes the blocks can always ask "is there more yet?" without waiting: an importer that holds locks must never wait for
a source.
"""

from __future__ import annotations

import os
import queue
import stat
import sys
import threading
import zlib
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import BinaryIO, Final, Literal, Self, cast

from ._core import count_newlines

ImportSource = str | os.PathLike[str] | BinaryIO | Iterable[bytes]

BLOCK_BYTES: Final = 1024 * 1024
LINES_BLOCK_BYTES: Final = 64 * 1024
"""Of an iterable less is gathered: it may be slow, and what it has given should not wait long."""
BLOCKS_AHEAD: Final = 4
"""That is also the most megabytes read ahead, unless a single line takes more."""
WAIT_S: Final = 0.25
"""A wait for a slow source ends this soon, so that whoever waits can see to other things."""
MAX_LINE_BYTES: Final = 256 * 1024 * 1024
"""Its newline included. PostgreSQL takes values of nearly 1 GiB, but an import takes eight times its longest line."""
GZIP_MAGIC: Final = b"\x1f\x8b"


class SourceError(Exception):
    """The source cannot be read on behind the blocks already given: why, and in which line, beginning at which byte."""

    def __init__(self, reason: str, line_no: int, byte_offset: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.line_no = line_no
        self.byte_offset = byte_offset


class LineSource:
    """Gives a source as blocks of whole lines; the last line may lack its newline.

    ``name`` is what to call it in a message, ``size`` its bytes as stored (None where unknown), ``bytes_read`` how many
    of those have been read. Gzip is recognised by its first two bytes. Close it when done.
    """

    def __init__(self, source: ImportSource) -> None:
        self.size: int | None = None
        self.bytes_read = 0
        self._file: BinaryIO | None = None
        self._close_file = False
        self._lines: Iterable[bytes] | None = None
        if isinstance(source, str) and source == "-":
            self.name = "<stdin>"
            self._file = _standard_input()
            self.size = _size_of(self._file)
        elif isinstance(source, (str, os.PathLike)):
            self.name = os.fspath(source)
            self._file = open(source, "rb", buffering=0)  # noqa: SIM115 - closed by close()
            self._close_file = True
            self.size = _size_of(self._file)
        elif hasattr(source, "read"):
            self.name = str(getattr(source, "name", None) or f"<{type(source).__name__}>")
            self._file = cast(BinaryIO, source)
        elif isinstance(source, (bytes, bytearray)) or not isinstance(source, Iterable):
            kind = type(source).__name__
            raise TypeError(f"source must be a path, a binary file or an iterable of lines, not {kind}")
        else:
            self.name = f"<{type(source).__name__}>"
            self._lines = source
        # SimpleQueue, written in C: an interrupt between two bytecodes of queue.Queue left its lock held for ever.
        self._blocks: queue.SimpleQueue[bytes | BaseException | None] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()  # a permit for each megabyte that may be read ahead
        for _ in range(BLOCKS_AHEAD):
            self._room.put(None)
        self._stopping = False
        self._ended = False
        self._thread: threading.Thread | None = None

    def next_block(self, *, wait: bool) -> bytes | Literal["end", "not yet"]:
        """Return the next block of lines, or "not yet": at once, or with *wait* when none has come for a moment.

        Raises SourceError, or what reading raised.
        """
        if self._ended:
            return "end"
        if self._thread is None:
            self._thread = threading.Thread(target=self._read_ahead, name="hindsight-import-source", daemon=True)
            self._thread.start()
        try:
            block = self._blocks.get(block=wait, timeout=WAIT_S)
        except queue.Empty:
            return "not yet"
        if isinstance(block, bytes):
            for _ in range(_permits(block)):
                self._room.put(None)
            return block
        self._ended = True
        if block is not None:
            raise block
        return "end"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading ahead. A thread that is stuck in a read of the caller's file is left to it."""
        self._stopping = True
        self._room.put(None)
        if self._thread is not None:
            self._thread.join(timeout=1.0)
        if self._close_file and self._file is not None and not (self._thread and self._thread.is_alive()):
            self._file.close()

    def _read_ahead(self) -> None:
        last: BaseException | None = None
        try:
            for block in self._blocks_of_lines():
                for _ in range(_permits(block)):
                    self._room.get()
                    if self._stopping:
                        return
                self._blocks.put(block)
                del block  # a line of 256 MiB is not kept while the next one is read
        except BaseException as error:  # noqa: BLE001 - handed to the thread that asks for blocks, and raised there
            last = error
        self._blocks.put(last)

    def _blocks_of_lines(self) -> Iterator[bytes]:
        begun: list[bytes] = []  # pieces of a line whose end has not come yet
        begun_bytes = 0
        line_no, offset = 1, 0  # of that line
        pieces = self._decompressed()
        while True:
            try:
                piece = next(pieces, None)
            except (zlib.error, EOFError) as error:
                raise SourceError(f"broken gzip: {error}", line_no, offset) from error
            if piece is None:
                break
            # Looked at line by line only where one may be too long.
            if begun_bytes + len(piece) > MAX_LINE_BYTES and (long := _find_long_line(begun_bytes, piece)) is not None:
                reason = f"a line longer than {MAX_LINE_BYTES} bytes"
                at = offset + begun_bytes + long if long else offset
                raise SourceError(reason, line_no + piece.count(b"\n", 0, long), at)
            end = piece.rfind(b"\n") + 1
            if end == 0:
                begun.append(piece)
                begun_bytes += len(piece)
                continue
            block = b"".join((*begun, piece[:end])) if begun else piece[:end]
            begun, begun_bytes = [piece[end:]], len(piece) - end
            del piece
            line_no += count_newlines(block)
            offset += len(block)
            yield block
            del block
        if begun_bytes:
            yield b"".join(begun)

    def _decompressed(self) -> Iterator[bytes]:
        raw = self._raw()
        first = next(raw, b"")
        while 0 < len(first) < len(GZIP_MAGIC) and (more := next(raw, b"")):
            first += more
        if not first.startswith(GZIP_MAGIC):
            if first:
                yield first
            yield from raw
            return
        member = zlib.decompressobj(wbits=31)
        compressed = first
        while True:
            # Never more than a block at once, however well it was compressed.
            if piece := member.decompress(compressed, BLOCK_BYTES):
                yield piece
            compressed = member.unconsumed_tail
            if member.eof:
                # Zeros may stand behind a member, and another member behind them.
                compressed = member.unused_data.lstrip(b"\0")
                while not compressed and (more := next(raw, b"")):
                    compressed = more.lstrip(b"\0")
                if not compressed:
                    return
                while len(compressed) < len(GZIP_MAGIC) and (more := next(raw, b"")):
                    compressed += more
                if not compressed.startswith(GZIP_MAGIC):
                    raise EOFError("what follows its end is no gzip")
                member = zlib.decompressobj(wbits=31)
            elif not compressed:
                compressed = next(raw, b"")
                if not compressed:
                    raise EOFError("it ends in the middle")

    def _raw(self) -> Iterator[bytes]:
        if self._lines is not None:
            yield from self._joined(self._lines)
            return
        assert self._file is not None
        # What is there now, of a buffered pipe: read() would wait for a whole block.
        read = getattr(self._file, "read1", self._file.read)
        while not self._stopping:
            block = read(BLOCK_BYTES)
            if not isinstance(block, bytes):
                raise TypeError(f"{self.name} gives {type(block).__name__}: open it in binary mode")
            if not block:
                return
            self.bytes_read += len(block)
            yield block

    def _joined(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        gathered: list[bytes] = []
        size = 0
        for line in lines:
            if not isinstance(line, bytes):
                raise TypeError(f"lines must be bytes, not {type(line).__name__}")
            gathered.append(line if line.endswith(b"\n") else line + b"\n")
            size += len(gathered[-1])
            if size >= LINES_BLOCK_BYTES:
                self.bytes_read += size
                yield b"".join(gathered)
                gathered, size = [], 0
        if gathered:
            self.bytes_read += size
            yield b"".join(gathered)


def _permits(block: bytes) -> int:
    """How much of the room for reading ahead a block takes; one that is larger than all of it waits for all of it."""
    return min(max(len(block) // BLOCK_BYTES, 1), BLOCKS_AHEAD)


def _find_long_line(begun_bytes: int, piece: bytes) -> int | None:
    """Where in *piece* a line begins that is too long, if one does; 0 for that of which *begun_bytes* came before."""
    start, before = 0, begun_bytes
    while (end := piece.find(b"\n", start) + 1) > 0:
        if before + end - start > MAX_LINE_BYTES:
            return start
        start, before = end, 0
    return start if before + len(piece) - start > MAX_LINE_BYTES else None


def _standard_input() -> BinaryIO:
    """Standard input without Python's buffer: the interpreter's end aborts while a thread waits inside that."""
    if sys.stdin is None:
        raise OSError("standard input is closed")
    try:
        return open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)
    except (OSError, ValueError):  # replaced by something without a descriptor
        return sys.stdin.buffer


def _size_of(file: BinaryIO) -> int | None:
    """The bytes that a regular file holds; None for a pipe or what has no descriptor."""
    try:
        state = os.fstat(file.fileno())
    except (OSError, ValueError):
        return None
    return state.st_size if stat.S_ISREG(state.st_mode) else None
