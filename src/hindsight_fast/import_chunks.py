"""Lines into chunks: what is read of a source is encoded, chunk after chunk, as much at a time as one is told to.

No I/O but the source's own. With several shards a stream's lines all go to one of them, and each shard has chunks and
checkpoints of its own.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Final

from ._core import EventRows
from .errors import ImportFailed
from .import_lines import BadLine, LineReader
from .import_source import LineSource, SourceError

MOST_CHUNK_BYTES: Final = 32 * 1024 * 1024
"""What chunks being encoded take together, a line more or less; as much again may wait, and be on its way."""
STEP_LINES: Final = 200
"""Lines encoded between two looks at the socket: about 0.15 ms, while its buffer holds milliseconds of work."""
SHARD_LAG: Final = 8
"""A shard that gets few events is stored after so many chunks' lines all the same, so that its checkpoint keeps up."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A place between two lines of a source: *line_no* lines and *byte_offset* bytes lie before it."""

    line_no: int
    byte_offset: int
    digest: bytes

    @classmethod
    def at_start(cls) -> Checkpoint:
        return cls(0, 0, sha256().digest())


@dataclass(frozen=True, slots=True)
class RejectedLine:
    """A line that cannot be imported: its number, the byte where it begins, why, and the line itself."""

    line_no: int
    byte_offset: int
    reason: str
    line: bytes


@dataclass(slots=True)
class Chunk:
    """Encoded events of one shard, and what lies between two of its checkpoints.

    ``line_nos`` and ``offsets`` tell of each row where its line stood; ``lines``, the lines themselves, are kept only
    where bad ones are collected; they and the rejected ones take ``line_bytes``. Of the latter the first
    ``rejected_on_disk`` are written down.
    """

    start: Checkpoint
    shard: int = 0
    rows: EventRows = field(default_factory=EventRows)
    line_nos: array[int] = field(default_factory=lambda: array("q"))
    offsets: array[int] = field(default_factory=lambda: array("q"))
    lines: list[bytes] | None = None
    line_bytes: int = 0
    rejected: list[RejectedLine] = field(default_factory=list)
    rejected_on_disk: int = 0
    end: Checkpoint = field(default_factory=Checkpoint.at_start)
    at_end: bool = False

    @property
    def byte_count(self) -> int:
        return self.rows.byte_count + self.line_bytes

    def reject(self, row: int, reason: str) -> None:
        """Move a row's line to the rejected ones."""
        assert self.lines is not None
        self.rejected.append(RejectedLine(self.line_nos[row], self.offsets[row], reason, self.lines[row]))
        rest = self.without({row})
        self.rows, self.line_nos, self.offsets, self.lines = rest.rows, rest.line_nos, rest.offsets, rest.lines

    def without(self, rows: Set[int]) -> Chunk:
        """Return the same chunk without some of its rows."""
        kept = [row for row in range(len(self.rows)) if row not in rows]
        return replace(
            self,
            rows=self.rows.select(kept),
            line_nos=array("q", [self.line_nos[row] for row in kept]),
            offsets=array("q", [self.offsets[row] for row in kept]),
            lines=None if self.lines is None else [self.lines[row] for row in kept],
        )


class ChunkMaker:
    """Reads lines and encodes them, chunk after chunk, as much at a time as it is told to.

    With *collect* a bad line goes to its chunk's rejected ones, otherwise it ends everything.
    """

    def __init__(
        self, source: LineSource, import_id: str, most_events: int, *, shard_count: int = 1, collect: bool = False
    ) -> None:
        self.most_events = most_events
        self._source = source
        self._import_id = import_id
        self._collect = collect
        self._reader = LineReader(import_id)
        self._digest = sha256()  # with the processor's own instructions: 1.7 GB/s, where BLAKE2b made 0.7
        self._digested = 0  # bytes of the block that the digest has seen
        self._block = b""
        self._block_at = 0  # where in the block the next line begins
        self._text = b""  # the same, without a byte order mark
        self._line_no = 0
        self._offset = 0
        self._ended = False
        self._failure: Exception | None = None  # raised when its chunk is due: the one before it is not to blame
        self._chunks = [self._new_chunk(shard) for shard in range(shard_count)]
        # Where each line goes: for a shard whose checkpoint lies further on, into rows that are thrown away. Its lines
        # are checked all the same, because bad ones are the first shard's, and that may not have come so far.
        self._targets: list[EventRows] = [chunk.rows for chunk in self._chunks]
        self._discarded = EventRows()
        self._ahead: list[Checkpoint] = []  # of those shards, the nearest first

    def skip_to(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Pass over the lines that every shard has, and later over those that some have: one checkpoint for each.

        Raises ImportFailed, now or when the place is reached, if they are not the lines that it was made after.
        """
        first = min(checkpoints, key=lambda checkpoint: checkpoint.line_no)
        self._skip_to(first)
        for chunk, checkpoint in zip(self._chunks, checkpoints, strict=True):
            chunk.start = checkpoint
        self._ahead = sorted(
            (checkpoint for checkpoint in set(checkpoints) if checkpoint.line_no > first.line_no),
            key=lambda checkpoint: checkpoint.line_no,
        )
        self._aim()

    def step(self, *, wait: bool, lines: int = STEP_LINES) -> bool:
        """Encode up to *lines* more lines. False if a chunk is done, or the source has nothing ready."""
        if self.done:
            return False
        if self._block_at == len(self._block) and not self._next_block(wait=wait):
            return False
        fullest = max([len(chunk.rows) + len(chunk.rejected) for chunk in self._chunks])
        room = min(lines, self.most_events - fullest)
        if self._ahead:
            room = min(room, self._ahead[0].line_no - self._line_no)
        last_line_no = self._line_no + room
        while True:
            self._add_plain(last_line_no - self._line_no)
            if self._line_no == last_line_no or self._block_at == len(self._block):
                break
            if not self._add_other():
                return False
        if len(self._discarded):
            self._discarded.clear()
        if self._ahead and self._line_no == self._ahead[0].line_no:
            self._pass_checkpoint()
        return True

    def _add_plain(self, most_lines: int) -> None:
        """Encode lines up to the first that is not plainly right."""
        block_offset = self._offset - self._block_at
        line_count, self._block_at, places = self._reader.add_plain(
            self._text, self._block_at, most_lines, self._line_no + 1, block_offset, self._targets
        )
        self._line_no += line_count
        self._offset = block_offset + self._block_at
        for chunk, (line_nos, offsets) in zip(self._chunks, places, strict=True):
            old = len(chunk.line_nos)
            if len(chunk.rows) == old:
                continue  # nothing for this shard, or nothing that is kept
            chunk.line_nos.frombytes(line_nos)
            chunk.offsets.frombytes(offsets)
            if chunk.lines is not None:
                for offset in chunk.offsets[old:]:
                    chunk.lines.append(self._line_at(offset - block_offset))
                chunk.line_bytes += sum(map(len, chunk.lines[old:]))

    def _add_other(self) -> bool:
        """Encode or reject the next line, whatever it is. False if it ends the import."""
        line = self._line_at(self._block_at)
        self._line_no += 1
        if line and not line.isspace():
            try:
                _check_utf8(line)  # what lies inside data is not decoded, and the server would refuse it late
                chunk = self._chunks[self._reader.add(line, self._line_no, self._targets)]
            except BadLine as error:
                if not self._reject(line, str(error)):
                    return False
            else:
                if len(chunk.rows) > len(chunk.line_nos):
                    chunk.line_nos.append(self._line_no)
                    chunk.offsets.append(self._offset)
                    if chunk.lines is not None:
                        chunk.lines.append(line)
                        chunk.line_bytes += len(line)
        self._pass_over(line)
        return True

    def _line_at(self, start: int) -> bytes:
        """The line that begins there in the block, without its newline."""
        end = self._text.find(b"\n", start)
        return self._text[start : end if end >= 0 else None]

    def _pass_over(self, line: bytes) -> None:
        # The last line of a source may lack its newline.
        size = min(len(line) + 1, len(self._block) - self._block_at)
        self._offset += size
        self._block_at += size

    @property
    def done(self) -> bool:
        """Whether a chunk is full, or nothing can follow it."""
        return self._ended or self._failure is not None or bool(self._full())

    def finish(self, meanwhile: Callable[[], object] | None = None) -> list[Chunk]:
        """Complete what is full, waiting for the source where need be, and begin the next; at the end, complete all.

        While the source has nothing, *meanwhile* is called now and then. Raises ImportFailed if a line is bad (unless
        those are collected), or what the source raised: nothing of such a chunk is stored.
        """
        while not self.done:
            if not self.step(wait=True, lines=1_000) and meanwhile is not None:
                meanwhile()
        if self._failure is not None:
            raise self._failure
        if self._ended and self._ahead:
            raise self._changed(self._ahead[0], "it is shorter now")
        end = self._here()
        finished = list(self._chunks) if self._ended else self._full()
        for chunk in finished:
            chunk.end, chunk.at_end = end, self._ended
            self._chunks[chunk.shard] = self._new_chunk(chunk.shard)
        self._aim()
        return finished

    def _full(self) -> list[Chunk]:
        chunks = self._chunks
        most = self.most_events
        # Each its share, not the largest of all: sources sorted by stream fill one shard's queue after the other.
        most_bytes = MOST_CHUNK_BYTES // len(chunks)
        return [
            chunk
            for chunk in chunks
            if len(chunk.rows) + len(chunk.rejected) >= most
            or chunk.byte_count >= most_bytes
            or (len(chunks) > 1 and self._line_no - chunk.start.line_no >= SHARD_LAG * len(chunks) * most)
        ]

    def _new_chunk(self, shard: int) -> Chunk:
        return Chunk(self._here(), shard, lines=[] if self._collect else None)

    def _here(self) -> Checkpoint:
        """The place behind the last line that was read."""
        self._digest.update(memoryview(self._block)[self._digested : self._block_at])
        self._digested = self._block_at
        return Checkpoint(self._line_no, self._offset, self._digest.digest())

    def _aim(self) -> None:
        self._targets[:] = [
            self._discarded if chunk.start.line_no > self._line_no else chunk.rows for chunk in self._chunks
        ]

    def _pass_checkpoint(self) -> None:
        checkpoint = self._ahead.pop(0)
        # That time the source may have ended here, without the newline that its last line has now.
        at = self._block_at - (self._offset - checkpoint.byte_offset)
        digest = self._digest.copy()
        digest.update(memoryview(self._block)[self._digested : max(at, self._digested)])
        if digest.digest() != checkpoint.digest or self._block[at : self._block_at].strip():
            self._failure = self._changed(checkpoint, "its bytes differ now")
        self._aim()

    def _reject(self, line: bytes, reason: str) -> bool:
        """Note a bad line. False if it ends the import."""
        first = self._chunks[0]  # has them all, as their streams may not be known
        if first.start.line_no >= self._line_no:
            return True  # passed over by an earlier call, wherever that put it
        if not self._collect:
            self._failure = self._failed(reason, self._line_no, self._offset)
            return False
        first.rejected.append(RejectedLine(self._line_no, self._offset, reason, line))
        first.line_bytes += len(line)
        return True

    def _next_block(self, *, wait: bool) -> bool:
        try:
            block = self._source.next_block(wait=wait)
        except SourceError as error:
            self._failure = self._failed(error.reason, error.line_no, error.byte_offset)
            return False
        except Exception as error:  # noqa: BLE001 - whatever the caller's source raises; kept, and raised by finish()
            self._failure = error
            return False
        if block == "not yet":
            return False
        self._digest.update(memoryview(self._block)[self._digested :])
        if block == "end":
            self._block, self._text, self._block_at, self._digested = b"", b"", 0, 0
            self._ended = True
            return False
        self._take_block(block, 0)
        return True

    def _take_block(self, block: bytes, start: int) -> None:
        """Take the lines of *block* from *start* on."""
        self._block, self._block_at, self._digested = block, start, start
        self._text = block
        if self._offset == 0 and block.startswith(b"\xef\xbb\xbf"):
            self._text = b"   " + block[3:]  # a byte order mark, passed over as white space; offsets stay true

    def _skip_to(self, checkpoint: Checkpoint) -> None:
        block, rest = b"", 0
        while self._offset < checkpoint.byte_offset:
            try:
                following = self._source.next_block(wait=True)
            except SourceError as error:
                raise self._failed(error.reason, error.line_no, error.byte_offset) from error
            if following == "not yet":
                continue
            if following == "end":
                raise self._changed(checkpoint, "it is shorter now")
            block, rest = following, checkpoint.byte_offset - self._offset
            self._digest.update(memoryview(block)[:rest])
            self._offset += min(rest, len(block))
        self._line_no = checkpoint.line_no
        if self._digest.digest() != checkpoint.digest:
            raise self._changed(checkpoint, "its bytes differ now")
        if rest < len(block):
            self._take_block(block, rest)
            if rest and block[rest - 1 : rest] != b"\n":
                # The last line done had no newline yet. What comes before the next one still belongs to it.
                remainder = self._line_at(self._block_at)
                if remainder and not remainder.isspace():
                    raise self._changed(checkpoint, "its last line went on")
                self._pass_over(remainder)

    def _failed(self, reason: str, line_no: int | None, offset: int | None) -> ImportFailed:
        return ImportFailed(
            reason,
            import_id=self._import_id,
            source=self._source.name,
            line_no=line_no,
            byte_offset=offset,
            stored_lines=min(chunk.start.line_no for chunk in self._chunks),
        )

    def _changed(self, checkpoint: Checkpoint, how: str) -> ImportFailed:
        return ImportFailed(
            f"its first {checkpoint.line_no} lines ({checkpoint.byte_offset} bytes) were imported before under the id"
            f" {self._import_id!r}, and {how}; give another file another import id",
            import_id=self._import_id,
            source=self._source.name,
            stored_lines=checkpoint.line_no,
        )


def _check_utf8(line: bytes) -> None:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        raise BadLine("invalid UTF-8") from error
