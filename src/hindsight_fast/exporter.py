"""Exporting: pages of the log into lines, and the lines to where they are wanted, page after page to the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ._core import Cursor, RecordedEvent, export_lines
from .export_target import BLOCK_BYTES, ExportTarget, LineTarget


@dataclass(frozen=True, slots=True)
class ExportProgress:
    """How far a running export has come: what is written, and the place of the last event of it (None without one).

    ``bytes`` are those of the lines, before compression. The place is one that ``export_events(after=...)`` goes on
    behind, later and in another file.
    """

    events: int
    bytes: int
    cursor: Cursor | None
    seconds: float


def run_export(
    pages: Iterator[Sequence[RecordedEvent]],
    target: ExportTarget,
    *,
    overwrite: bool,
    progress: Callable[[ExportProgress], object] | None,
) -> int:
    """Write the events of *pages* to *target*, and return how many; the store's ``export_events`` tells the rest."""
    began = time.monotonic()
    events = byte_count = 0
    with LineTarget(target, overwrite=overwrite) as lines:
        for page in pages:
            for block in export_lines(page, BLOCK_BYTES):
                lines.write(block)
                byte_count += len(block)
            events += len(page)
            if progress is not None:
                progress(ExportProgress(events, byte_count, page[-1].cursor, time.monotonic() - began))
    return events
