"""Where bad lines go when an import is told to go on behind them: two files side by side.

``PATH`` holds the lines as they came, byte for byte, to be mended and imported under another id; ``PATH.reasons`` says
of each, one JSON object a line in the same order: ``line_no``, ``byte_offset`` (in the source, decompressed),
``reason``, and ``end``, the size of ``PATH`` behind that line.

Both are on disk before the chunk commits that passes the lines over: killed at any point, no line is in neither place.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from .import_chunks import RejectedLine


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


class RejectFile:
    """The bad lines of one import, at most *max_errors* of them (None: any number). Use it in a ``with`` statement.

    A file of the same import is gone on with, and what it holds is not written twice. Threads may share it. Raises
    ValueError for the file of another import, OSError if it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], import_id: str, max_errors: int | None) -> None:
        self.path = Path(path)
        self.reasons_path = self.path.with_name(self.path.name + ".reasons")
        self._import_id = import_id
        self._max_errors = max_errors
        self._line_nos: set[int] = set()
        self._end = 0
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """How many lines it holds."""
        return len(self._line_nos)

    def __enter__(self) -> Self:
        kept = self._read_reasons()
        # Unbuffered: what write() returned from has left this process.
        self._lines = open(self.path, "ab", buffering=0)
        try:
            self._reasons = open(self.reasons_path, "ab", buffering=0)
        except BaseException:
            self._lines.close()
            raise
        # What a run that was killed has left half-written.
        self._lines.truncate(self._end)
        self._reasons.truncate(kept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lines.close()
        self._reasons.close()

    def write(self, rejected: Sequence[RejectedLine]) -> None:
        """Add lines, and return when they are on disk. Raises TooManyRejects, with nothing added; OSError."""
        with self._lock:
            self._write(rejected)

    def _write(self, rejected: Sequence[RejectedLine]) -> None:
        fresh = [line for line in rejected if line.line_no not in self._line_nos]
        if not fresh:
            return
        if self._max_errors is not None and self.count + len(fresh) > self._max_errors:
            raise TooManyRejects(fresh[self._max_errors - self.count])
        texts, reasons, end = [], [], self._end
        for each in fresh:
            texts.append(each.line + b"\n")
            end += len(texts[-1])
            reason = _Reason(each.line_no, each.byte_offset, each.reason, end, self._import_id)
            reasons.append(msgspec.json.encode(reason) + b"\n")
        # The lines first: a reason without its line would claim bytes that are not there.
        _write_out(self._lines, b"".join(texts))
        _write_out(self._reasons, b"".join(reasons))
        self._end = end
        self._line_nos.update(each.line_no for each in fresh)

    def _read_reasons(self) -> int:
        """Learn what earlier runs have noted; returns the size of the whole reasons."""
        try:
            stored = self.reasons_path.read_bytes()
        except FileNotFoundError:
            if self.path.exists() and self.path.stat().st_size:
                raise ValueError(f"{self.path} exists, and is no file of bad lines: name another") from None
            return 0
        whole = stored[: stored.rfind(b"\n") + 1]
        try:
            reasons = msgspec.json.Decoder(_Reason).decode_lines(whole)
        except msgspec.MsgspecError as error:
            raise ValueError(f"{self.reasons_path} exists, and is no list of reasons: {error}") from error
        for reason in reasons:
            if reason.import_id != self._import_id:
                raise ValueError(f"{self.path} holds bad lines of the import {reason.import_id!r}: name another file")
            self._line_nos.add(reason.line_no)
            self._end = reason.end
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < self._end:
            raise ValueError(f"{self.path} has {size} bytes, but {self.reasons_path} speaks of {self._end}")
        return len(whole)


def _write_out(file: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
    os.fsync(file.fileno())
