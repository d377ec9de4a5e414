"""Lines into chunks: what is read of a source is encoded, chunk after chunk, as much at a time as one is told to.

No I/O but the source's own. A chunk is encoded whole before anything is locked.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from ._core import EventRows
from .errors import ImportFailed
from .import_lines import BadLine, LineReader
from .import_source import LineSource, SourceError

MOST_CHUNK_BYTES: Final = 32 * 1024 * 1024
"""Two chunks are in memory at a time: the one being sent and the one being encoded."""
STEP_LINES: Final = 50
"""Lines encoded between two looks at the socket: about 0.15 ms, while its buffer holds milliseconds of work."""

_NOT_UTF8: Final = b"\xff"  # stands for a line that holds such bytes; recognised by identity


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A place between two lines of a source: *line_no* lines and *byte_offset* bytes lie before it."""

    line_no: int
    byte_offset: int
    digest: bytes


@dataclass(slots=True)
class Chunk:
    """Encoded events and the places where their lines begin and end in the source."""

    rows: EventRows
    start: Checkpoint
    end: Checkpoint
    blank_lines: list[int]
    at_end: bool

    def line_of_row(self, row_no: int) -> int:
        """Return the number of the line that the chunk's row *row_no* (from 1) came from."""
        line_no = self.start.line_no + row_no
        for blank in self.blank_lines:
            if blank <= line_no:
                line_no += 1
        return line_no


class ChunkMaker:
    """Reads lines and encodes them, chunk after chunk, as much at a time as it is told to."""

    def __init__(self, source: LineSource, import_id: str, most_events: int) -> None:
        self.most_events = most_events
        self._source = source
        self._import_id = import_id
        self._reader = LineReader(import_id)
        self._digest = blake2b(digest_size=32)
        self._digested = 0  # bytes of the block that the digest has seen
        self._block = b""
        self._block_at = 0  # where in the block the next line begins
        self._waiting: deque[bytes] = deque()
        self._line_no = 0
        self._offset = 0
        self._ended = False
        self._failure: Exception | None = None  # raised when its chunk is due: the one before it is not to blame
        self._begin()

    def skip_to(self, checkpoint: Checkpoint) -> None:
        """Pass over the lines before *checkpoint*. Raises ImportFailed if they are not the ones it was made after."""
        block, rest = b"", 0
        while self._offset < checkpoint.byte_offset:
            try:
                following = self._source.next_block(wait=True)
            except SourceError as error:
                raise self._failed(error.reason, error.line_no, None) from error
            if following == "end" or following == "not yet":
                raise self._changed(checkpoint, "it is shorter now")
            block, rest = following, checkpoint.byte_offset - self._offset
            self._digest.update(memoryview(block)[:rest])
            self._offset += min(rest, len(block))
        self._line_no = checkpoint.line_no
        if self._digest.digest() != checkpoint.digest:
            raise self._changed(checkpoint, "its bytes differ now")
        self._begin()
        if rest < len(block):
            self._take_block(block, rest)
            if rest and block[rest - 1 : rest] != b"\n":
                # The last line done had no newline yet. What comes before the next one still belongs to it.
                remainder = self._waiting.popleft()
                if remainder and not remainder.isspace():
                    raise self._changed(checkpoint, "its last line went on")
                self._offset += len(remainder) + 1
                self._block_at += len(remainder) + 1
                self._correct_end()

    def step(self, *, wait: bool, lines: int = STEP_LINES) -> bool:
        """Encode up to *lines* more lines. False if the chunk is done, or the source has nothing ready."""
        if self.done:
            return False
        if not self._waiting and not self._next_block(wait=wait):
            return False
        rows, add, waiting = self._rows, self._reader.add, self._waiting
        room = min(lines, len(waiting), self.most_events - len(rows))
        for _ in range(room):
            line = waiting.popleft()
            self._line_no += 1
            if line and not line.isspace():
                try:
                    add(line, self._line_no, rows)
                except BadLine as error:
                    reason = "invalid UTF-8" if line is _NOT_UTF8 else str(error)
                    self._failure = self._failed(reason, self._line_no, self._offset)
                    return False
            else:
                self._blank_lines.append(self._line_no)
            self._offset += len(line) + 1
            self._block_at += len(line) + 1
        self._correct_end()
        return True

    def _correct_end(self) -> None:
        if self._block_at > len(self._block):
            # The last line of a source may lack its newline, which was counted.
            self._offset -= 1
            self._block_at -= 1

    @property
    def done(self) -> bool:
        """Whether the chunk is full, or nothing can follow it."""
        return (
            self._ended
            or self._failure is not None
            or len(self._rows) >= self.most_events
            or self._rows.byte_count >= MOST_CHUNK_BYTES
        )

    def finish(self) -> Chunk:
        """Complete the chunk, waiting for the source where need be, and begin the next one.

        Raises ImportFailed if one of its lines is bad, or what the source raised: nothing of such a chunk is stored.
        """
        while self.step(wait=True, lines=1_000):
            pass
        if self._failure is not None:
            raise self._failure
        self._digest.update(memoryview(self._block)[self._digested : self._block_at])
        self._digested = self._block_at
        end = Checkpoint(self._line_no, self._offset, self._digest.digest())
        chunk = Chunk(self._rows, self._start, end, self._blank_lines, self._ended)
        self._begin()
        return chunk

    def _begin(self) -> None:
        self._rows = EventRows()
        self._blank_lines: list[int] = []
        self._start = Checkpoint(self._line_no, self._offset, self._digest.digest())

    def _next_block(self, *, wait: bool) -> bool:
        try:
            block = self._source.next_block(wait=wait)
        except SourceError as error:
            self._failure = self._failed(error.reason, error.line_no, None)
            return False
        except Exception as error:  # noqa: BLE001 - whatever the caller's source raises; kept, and raised by finish()
            self._failure = error
            return False
        if block == "not yet":
            return False
        self._digest.update(memoryview(self._block)[self._digested :])
        if block == "end":
            self._block, self._block_at, self._digested = b"", 0, 0
            self._ended = True
            return False
        self._take_block(block, 0)
        return True

    def _take_block(self, block: bytes, start: int) -> None:
        """Take the lines of *block* from *start* on."""
        self._block, self._block_at, self._digested = block, start, start
        text = block[start:] if start else block
        if self._offset == 0 and text.startswith(b"\xef\xbb\xbf"):
            text = b"   " + text[3:]  # a byte order mark, passed over as white space; offsets stay true
        damaged = False
        try:
            # Checked a block at a time: what lies inside data is not decoded here, and the server would refuse it late.
            text.decode()
        except UnicodeDecodeError as error:
            # The lines before the damage are good; the one that holds it fails, and nothing after it is read.
            text = text[: text.rfind(b"\n", 0, error.start) + 1]
            damaged = True
        self._waiting = deque(text.split(b"\n"))
        if not self._waiting[-1]:
            self._waiting.pop()
        if damaged:
            self._waiting.append(_NOT_UTF8)

    def _failed(self, reason: str, line_no: int | None, offset: int | None) -> ImportFailed:
        return ImportFailed(
            reason,
            import_id=self._import_id,
            source=self._source.name,
            line_no=line_no,
            byte_offset=offset,
            stored_lines=self._start.line_no,
        )

    def _changed(self, checkpoint: Checkpoint, how: str) -> ImportFailed:
        return ImportFailed(
            f"its first {checkpoint.line_no} lines ({checkpoint.byte_offset} bytes) were imported before under the id"
            f" {self._import_id!r}, and {how}; give another file another import id",
            import_id=self._import_id,
            source=self._source.name,
            stored_lines=checkpoint.line_no,
        )
