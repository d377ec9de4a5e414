"""Importing: the lines of a source into chunks, and the chunks into the store, to the end or to the first bad line."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import psycopg

from ._core import Cursor
from .errors import ImportFailed
from .import_chunks import Checkpoint, Chunk, ChunkMaker
from .import_dry_run import DryRun
from .import_initial import InitialImport, Phase
from .import_jobs import Jobs
from .import_rejects import RejectFile
from .import_source import ImportSource, LineSource
from .import_writer import ChunkWriter, Stored, find_checkpoints

if TYPE_CHECKING:
    from .statements import Statements

CHUNK_SECONDS: Final = 0.25
"""What a chunk should take: as long as that live readers wait for events that follow it, and a crash repeats."""
FIRST_CHUNK_EVENTS: Final = 5_000
MOST_CHUNK_EVENTS: Final = 100_000
LEAST_CHUNK_EVENTS: Final = 100
MOST_JOBS: Final = 64
RATE_WAIT_S: Final = 0.25
"""How soon an import that keeps to a rate sees that it should stop."""


@dataclass(frozen=True, slots=True)
class ImportProgress:
    """How far a running import has come: what is stored, and how much of the source has been read.

    An initial import goes on when all lines are stored: its ``phase`` is "indexes", of which ``phase_share`` (0 to 1)
    is built, and then "switch".
    """

    events: int
    lines: int
    seconds: float
    source_bytes_read: int
    source_size: int | None
    bad_lines: int = 0
    phase: Phase = "lines"
    phase_share: float | None = None


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What one call of ``import_events`` did.

    ``events`` were stored by this call; ``skipped_events`` by an earlier one under the same import id, ``known_events``
    under their own ids in whatever way; ``bad_lines`` were passed over into the file for them. ``new_streams`` had no
    event before; ``bytes`` are those of the ``lines`` (decompressed) behind what an earlier call had done.

    Of a dry run ``events`` would be stored, in about ``projected_seconds``; cursors and new streams are not known.
    """

    import_id: str
    events: int
    skipped_events: int
    known_events: int
    bad_lines: int
    new_streams: int
    lines: int
    bytes: int
    seconds: float
    first_cursor: Cursor | None
    last_cursor: Cursor | None
    projected_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What ``import_events`` was asked for, checked.

    *go_on* is called after each chunk and while the source, or the rate, is waited for: what it raises ends the import.
    """

    import_id: str
    initial: bool = False
    jobs: int = 1
    chunk_size: int | None = None
    reject_path: str | os.PathLike[str] | None = None
    max_errors: int | None = None
    max_rate: float | None = None
    dry_run: bool = False
    progress: Callable[[ImportProgress], object] | None = None
    go_on: Callable[[], object] | None = None

    @property
    def most_events(self) -> int:
        """Of the first chunk."""
        if self.chunk_size is not None:
            return self.chunk_size
        most = FIRST_CHUNK_EVENTS
        return min(most, self.most_events_ever)

    @property
    def most_events_ever(self) -> int:
        # A slow import stores often rather than much: nobody should wait a minute to see whether it works.
        return MOST_CHUNK_EVENTS if self.max_rate is None else max(1, int(self.max_rate * CHUNK_SECONDS))


@dataclass(slots=True)
class _Tally:
    """What has been stored so far."""

    began: float = field(default_factory=time.monotonic)
    events: int = 0
    known: int = 0
    rejected: int = 0
    new_streams: int = 0
    first: Cursor | None = None
    last: Cursor | None = None

    def add(self, stored: Stored) -> None:
        self.events += stored.events
        self.known += stored.known
        self.rejected += stored.rejected
        self.new_streams += stored.new_streams
        if stored.first is not None and stored.last is not None:
            self.first = min(self.first or stored.first, stored.first)
            self.last = max(self.last or stored.last, stored.last)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


def check_import_id(import_id: str) -> str:
    """Return *import_id*. Raises TypeError or ValueError unless it is a text that PostgreSQL can hold."""
    if not isinstance(import_id, str):
        raise TypeError(f"import_id must be a str, not {type(import_id).__name__}")
    if not import_id or len(import_id) > 500 or "\0" in import_id:
        raise ValueError("import_id must have 1 to 500 characters, none of them NUL")
    import_id.encode()  # a lone surrogate is a UnicodeEncodeError, which is a ValueError
    return import_id


def run_import(
    lend: Callable[..., AbstractContextManager[psycopg.Connection[Any]]],
    statements: Statements,
    source: ImportSource,
    options: ImportOptions,
    generation: int,
) -> ImportReport:
    """Import *source* to its end; see ``EventStore.import_events``. ``lend(timeout)`` gives connections."""
    with ExitStack() as stack:
        lines = stack.enter_context(LineSource(source))
        connections = [stack.enter_context(lend()) for _ in range(1 if options.dry_run else options.jobs)]
        rejects = None
        if options.reject_path is not None:
            rejects = stack.enter_context(RejectFile(options.reject_path, options.import_id, options.max_errors))
        if options.initial:
            initial = InitialImport(connections[0], lend, statements, options.import_id, lines.name)
            stack.enter_context(initial)
        maker = ChunkMaker(
            lines, options.import_id, options.most_events, shard_count=options.jobs, collect=rejects is not None
        )
        checkpoints, skipped = find_checkpoints(
            connections[0], statements, options.import_id, lines.name, options.jobs, begin=not options.dry_run
        )
        if rejects is not None:
            rejects.take_back([checkpoint.line_no for checkpoint in checkpoints])
        maker.skip_to(checkpoints)
        start = min(checkpoints, key=lambda checkpoint: checkpoint.line_no)
        run = _Run(options, maker, lines, start, skipped)
        how = (statements, options.import_id, lines.name, generation, rejects)
        projected_seconds = None
        if options.dry_run:
            dry_run = stack.enter_context(DryRun(connections[0], *how))
            run.store_all(lambda chunk: [dry_run.store(chunk, maker)])
            projected_seconds = dry_run.projected_seconds
        elif options.initial:
            beside = initial.writer(*how[-2:])
            run.store_all(lambda chunk: [beside.store(chunk, maker)])
            initial.complete(run.tell)
        elif options.jobs == 1:
            writer = ChunkWriter(connections[0], *how)
            run.store_all(lambda chunk: [writer.store(chunk, maker)])
        else:
            writers = [ChunkWriter(connection, *how) for connection in connections]
            jobs = stack.enter_context(Jobs(writers, [checkpoint.line_no for checkpoint in checkpoints]))
            try:
                try:
                    run.store_all(jobs.give, jobs.finished)
                except ImportFailed:
                    # What stands before a bad line is good, and is stored.
                    run.take(jobs.finish())
                    raise
                run.take(jobs.finish())
            except ImportFailed as error:
                error.stored_lines = jobs.lines_done  # a writer knows of its own shard only
                raise
    tally = run.tally
    return ImportReport(
        import_id=options.import_id,
        events=tally.events,
        skipped_events=skipped,
        known_events=tally.known,
        bad_lines=tally.rejected,
        new_streams=tally.new_streams,
        lines=run.end.line_no - start.line_no,
        bytes=run.end.byte_offset - start.byte_offset,
        seconds=tally.seconds,
        first_cursor=tally.first,
        last_cursor=tally.last,
        projected_seconds=projected_seconds,
    )


class _Run:
    """The loop from chunk to chunk, and what is told of it."""

    def __init__(
        self, options: ImportOptions, maker: ChunkMaker, lines: LineSource, start: Checkpoint, skipped: int
    ) -> None:
        self._options = options
        self._maker = maker
        self._lines = lines
        self._skipped = skipped
        self._given = 0  # events handed over to be stored
        self.tally = _Tally()
        self.end = start

    def store_all(
        self,
        store: Callable[[Chunk], Iterable[Stored]],
        stored_meanwhile: Callable[[], Iterable[Stored]] = tuple,
    ) -> None:
        """Give each chunk to *store* until the source ends; it answers with what has been stored by then.

        *stored_meanwhile* is asked the same while the source is waited for: it may be slow, and a writer may fail.
        """
        at_end = False
        while not at_end:
            for chunk in self._maker.finish(lambda: self._meanwhile(stored_meanwhile)):
                at_end, self.end = chunk.at_end, chunk.end
                self._given += len(chunk.rows)
                self.take(store(chunk))
                self._keep_to_rate()

    def take(self, stored: Iterable[Stored]) -> None:
        """Count what was stored, tell of it, and learn from what it took."""
        for each in stored:
            self.tally.add(each)
            rows = each.events + each.known + each.rejected
            # Not from a small one that was quick: a shard with few events would make everybody's chunks as small.
            if (
                self._options.chunk_size is None
                and rows
                and (2 * rows >= self._maker.most_events or each.seconds > CHUNK_SECONDS)
            ):
                following = next_chunk_events(rows, each.seconds)
                self._maker.most_events = min(following, self._options.most_events_ever)
            self.tell()

    def _meanwhile(self, stored: Callable[[], Iterable[Stored]]) -> None:
        self._go_on()
        self.take(stored())

    def _go_on(self) -> None:
        if self._options.go_on is not None:
            self._options.go_on()

    def tell(self, phase: Phase = "lines", share: float | None = None) -> None:
        """Call ``progress=`` with how far all has come."""
        self._go_on()
        if self._options.progress is not None:
            self._options.progress(
                ImportProgress(
                    self._skipped + self.tally.events,
                    self.end.line_no,
                    self.tally.seconds,
                    self._lines.bytes_read,
                    self._lines.size,
                    self.tally.rejected,
                    phase,
                    share,
                )
            )

    def _keep_to_rate(self) -> None:
        if self._options.max_rate is not None:
            # Of what was handed over: with several jobs it may still wait to be stored.
            events = self._given - self.tally.known
            ahead_s = events / self._options.max_rate - self.tally.seconds
            while ahead_s > 0:
                time.sleep(min(ahead_s, RATE_WAIT_S))
                self._go_on()
                ahead_s = events / self._options.max_rate - self.tally.seconds


def next_chunk_events(events: int, seconds: float) -> int:
    """How many events the next chunk should take, when *events* took *seconds*: at most twice as many, or half."""
    wanted = int(events * CHUNK_SECONDS / max(seconds, 1e-6))
    return max(min(wanted, 2 * events, MOST_CHUNK_EVENTS), events // 2, LEAST_CHUNK_EVENTS)
