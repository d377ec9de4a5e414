"""Events in files, and what must become of them."""

from __future__ import annotations

import functools
import gzip
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from expected import Row, digest_of, rows_of

EVENTS = int(os.environ.get("HINDSIGHT_BENCH_EVENTS") or 1_000_000)
IMPORT_ID = "bench"


@dataclass(frozen=True)
class DataSet:
    """*count* events, a line each."""

    name: str
    path: Path
    count: int

    def rows(self, count: int | None = None) -> Iterator[Row]:
        """What the store must hold once this was imported under IMPORT_ID, in order."""
        return rows_of(self.path, IMPORT_ID, count)

    @functools.cached_property
    def digest(self) -> str:
        return digest_of(self.rows())

    @functools.cached_property
    def digest_by_stream(self) -> str:
        """Of the rows in the order of streams, and versions within them."""
        return digest_of(sorted(self.rows(), key=lambda row: (row.stream_id, row.stream_version)))

    @functools.cached_property
    def compressed(self) -> Path:
        """The same file, by gzip at its default level."""
        path = self.path.with_suffix(".ndjson.gz")
        with self.path.open("rb") as source, gzip.open(path, "wb", compresslevel=6) as target:
            while block := source.read(1 << 20):
                target.write(block)
        return path
