"""Where bad lines go when an import is told to go on behind them: two files side by side.

``PATH`` holds the lines as they came, byte for byte, to be mended and imported under another id; ``PATH.reasons`` says
of each, one JSON object a line in the same order: ``line_no``, ``byte_offset`` (in the source, decompressed),
``reason``, ``end``, the size of ``PATH`` behind that line, and ``import_id`` and ``shard``, whose checkpoint passes it.

Both are on disk before the chunk commits that passes the lines over: killed at any point, no line is in neither place.
Lines of a chunk that did not commit are taken back by the next call, which judges them anew, so that none is in both.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from .import_chunks import RejectedLine

BLANKED_BYTES: Final = 1024 * 1024
"""How much is overwritten at once of what is taken back."""


class TooManyRejects(Exception):
    """One bad line more than were to be borne: which one."""

    def __init__(self, rejected: RejectedLine) -> None:
        super().__init__(rejected.reason)
        self.rejected = rejected


class _Reason(msgspec.Struct):
    line_no: int
    byte_offset: int
    reason: str
    end: int
    import_id: str
    shard: int


class RejectFile:
    """The bad lines of one import, at most *max_errors* of them (None: any number). Use it in a ``with`` statement.

    A file of the same import is gone on with. Threads may share it; a second process is kept out. Raises ValueError
    for any other file, or one that was changed since, and OSError if it is in use or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], import_id: str, max_errors: int | None) -> None:
        self.path = Path(path)
        self.reasons_path = self.path.with_name(self.path.name + ".reasons")
        self.count = 0
        self._import_id = import_id
        self._max_errors = max_errors
        self._end = 0  # sizes without what a run that was killed has left half-written
        self._reasons_end = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        if not self.reasons_path.exists() and self.path.exists() and self.path.stat().st_size:
            raise ValueError(f"{self.path} exists, and is no file of bad lines: name another")
        with ExitStack() as stack:
            self._reasons = stack.enter_context(_open(self.reasons_path))
            self._keep_others_out()
            for _, reason in self._read_reasons():
                self._end = reason.end
                self.count += 1
            self._lines = stack.enter_context(_open(self.path))
            self._check_end()
            self._lines.truncate(self._end)
            self._reasons.truncate(self._reasons_end)
            _sync_folder(self.path.parent)
            self._files = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.close()

    def take_back(self, lines_done: Sequence[int]) -> None:
        """Forget the lines that are not passed over for good: those behind where their shard has come to.

        They stand there from a run that ended before it could commit, or from a dry run. Where others follow that stay,
        blank lines are left in their place.
        """
        kept, end, reasons_end = 0, 0, 0
        for at, reason in self._read_reasons():
            if _is_done(reason, lines_done):
                kept, end, reasons_end = kept + 1, reason.end, at.stop
        start = 0
        for at, reason in self._read_reasons():
            if at.start >= reasons_end:
                break
            if not _is_done(reason, lines_done):
                # The line first: while its reason stands, this is done again.
                _blank(self._lines, range(start, reason.end))
                _blank(self._reasons, at)
            start = reason.end
        # The reasons first: lines without them are cut off when the file is opened.
        self._reasons.truncate(reasons_end)
        os.fsync(self._reasons.fileno())
        self._lines.truncate(end)
        self.count, self._end, self._reasons_end = kept, end, reasons_end

    def write(self, rejected: Sequence[RejectedLine], shard: int) -> None:
        """Add lines, and return when they are on disk. Raises TooManyRejects or OSError, with nothing added."""
        with self._lock:
            if self._max_errors is not None and self.count + len(rejected) > self._max_errors:
                raise TooManyRejects(rejected[self._max_errors - self.count])
            try:
                self._write(rejected, shard)
            except BaseException:
                # A full disk takes half of it. What another thread writes next must stand where its reason says.
                with suppress(OSError):
                    self._lines.truncate(self._end)
                    self._reasons.truncate(self._reasons_end)
                raise

    def _write(self, rejected: Sequence[RejectedLine], shard: int) -> None:
        texts, reasons, end = [], [], self._end
        for each in rejected:
            texts.append(each.line + b"\n")
            end += len(texts[-1])
            reason = _Reason(each.line_no, each.byte_offset, each.reason, end, self._import_id, shard)
            reasons.append(msgspec.json.encode(reason) + b"\n")
        # The lines first: a reason without its line would claim bytes that are not there.
        _write_at(self._lines, self._end, b"".join(texts))
        os.fsync(self._lines.fileno())
        reason_text = b"".join(reasons)
        _write_at(self._reasons, self._reasons_end, reason_text)
        os.fsync(self._reasons.fileno())
        self._end = end
        self._reasons_end += len(reason_text)
        self.count += len(rejected)

    def _keep_others_out(self) -> None:
        try:
            fcntl.flock(self._reasons, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(errno.EWOULDBLOCK, "another import is writing to it", str(self.path)) from None

    def _read_reasons(self) -> Iterator[tuple[range, _Reason]]:
        """Yield the reasons, one at a time, and where each stands; notes where the whole ones end."""
        decode = msgspec.json.Decoder(_Reason).decode
        with self.reasons_path.open("rb") as file:
            at = 0
            for line in file:
                if not line.endswith(b"\n"):
                    break
                place = range(at, at + len(line))
                self._reasons_end = at = place.stop
                if line.isspace():
                    continue
                try:
                    reason = decode(line)
                except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                    raise ValueError(f"{self.reasons_path} exists, and is no list of reasons: {error}") from None
                if reason.import_id != self._import_id:
                    other = reason.import_id
                    raise ValueError(f"{self.path} holds bad lines of the import {other!r}: name another file")
                yield place, reason

    def _check_end(self) -> None:
        size = os.fstat(self._lines.fileno()).st_size
        if size < self._end or (self._end and os.pread(self._lines.fileno(), 1, self._end - 1) != b"\n"):
            # Mended where it stands: it is not cut to what it was.
            raise ValueError(
                f"{self.path} is not as {self.reasons_path.name} says: it was changed since; name another file"
            )


def _open(path: Path) -> FileIO:
    # Not for appending: what is taken back is overwritten. Unbuffered: what was written has left this process.
    return FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")


def _is_done(reason: _Reason, lines_done: Sequence[int]) -> bool:
    return reason.shard < len(lines_done) and reason.line_no <= lines_done[reason.shard]


def _blank(file: FileIO, place: range) -> None:
    """Overwrite lines by blank ones of the same size."""
    for at in range(place.start, place.stop, BLANKED_BYTES):
        text = os.pread(file.fileno(), min(BLANKED_BYTES, place.stop - at), at)
        _write_at(file, at, re.sub(rb"[^\n]", b" ", text))
    os.fsync(file.fileno())


def _write_at(file: FileIO, at: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file.fileno(), view, at)
        view, at = view[written:], at + written


def _sync_folder(folder: Path) -> None:
    """Let the names of new files survive a loss of power, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
