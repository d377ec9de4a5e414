"""Where an export goes: a file that has its name is whole, and what ends it early leaves none."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exports import exported, parts_in
from hindsight_fast import EventStore, ExportProgress, SchemaError
from hindsight_fast.demo_events import demo_lines

# --- Where to -------------------------------------------------------------------------------------------------------


class TakesLittle(io.RawIOBase):
    """An unbuffered file that takes a few bytes of what it is given."""

    def __init__(self) -> None:
        self.taken = b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.taken += bytes(data[:777])
        return min(len(data), 777)


class TakesNothing(TakesLittle):
    """One in non-blocking mode, and full."""

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        return None


class Silent:
    """A writer of somebody's own that does not say how much it took."""

    def __init__(self) -> None:
        self.taken = b""

    def write(self, data: bytes) -> None:
        self.taken += data


def test_every_kind_of_target_gets_the_same_bytes(
    shop: EventStore, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    whole = exported(shop)
    assert shop.export_events(tmp_path / "path.ndjson") == 600
    assert shop.export_events(str(tmp_path / "text.ndjson")) == 600
    shop.export_events(tmp_path / "packed.ndjson.gz")
    little, silent = TakesLittle(), Silent()
    shop.export_events(little)
    shop.export_events(silent)  # type: ignore[arg-type]
    with (tmp_path / "file.ndjson.gz").open("wb") as file:
        shop.export_events(file)
        assert not file.closed
    with (tmp_path / "one.ndjson").open("wb") as file:
        shop.export_events(file, limit=1)
        assert (tmp_path / "one.ndjson").read_bytes() == exported(shop, limit=1)  # flushed
    shop.export_events("-")
    assert capsysbinary.readouterr().out == whole
    assert (tmp_path / "path.ndjson").read_bytes() == whole
    assert (tmp_path / "text.ndjson").read_bytes() == whole
    assert (tmp_path / "file.ndjson.gz").read_bytes() == whole  # uncompressed: what is open has no name
    assert little.taken == silent.taken == whole
    with gzip.open(tmp_path / "packed.ndjson.gz") as packed:
        assert packed.read() == whole
    assert parts_in(tmp_path) == []


def test_the_same_events_make_the_same_compressed_file(shop: EventStore, tmp_path: Path) -> None:
    for name in ("a.gz", "b.gz"):
        shop.export_events(tmp_path / name)
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    if program := shutil.which("gzip"):
        subprocess.run([program, "-t", str(tmp_path / "a.gz")], check=True, timeout=60)


def test_a_store_without_events_makes_an_empty_file(store: EventStore, tmp_path: Path) -> None:
    for name in ("nothing.ndjson", "nothing.ndjson.gz"):
        assert store.export_events(tmp_path / name) == 0
    assert (tmp_path / "nothing.ndjson").read_bytes() == b""
    assert gzip.decompress((tmp_path / "nothing.ndjson.gz").read_bytes()) == b""


def test_a_file_is_made_as_the_umask_says(shop: EventStore, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        shop.export_events(tmp_path / "all.ndjson")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "all.ndjson").stat().st_mode) == 0o640


def test_a_file_that_is_there_is_replaced_only_if_asked(shop: EventStore, tmp_path: Path) -> None:
    path = tmp_path / "all.ndjson"
    path.write_bytes(b"precious")
    path.chmod(0o600)
    told: list[ExportProgress] = []
    with pytest.raises(FileExistsError, match=r"all\.ndjson"):
        shop.export_events(path, progress=told.append)
    assert told == []  # not only at the end
    assert path.read_bytes() == b"precious"
    shop.export_events(path, overwrite=True)
    assert path.read_bytes() == exported(shop)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_made_meanwhile_is_not_replaced(shop: EventStore, tmp_path: Path) -> None:
    path = tmp_path / "all.ndjson"
    with pytest.raises(FileExistsError):
        shop.export_events(path, progress=lambda _: path.write_bytes(b"precious"))
    assert path.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("overwrite", "naming"), [(False, "link"), (True, "replace")])
def test_a_file_is_on_disk_before_it_has_its_name(
    shop: EventStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool, naming: str
) -> None:
    calls: list[tuple[str, str]] = []

    def watched(name: str) -> Callable[..., None]:
        really = getattr(os, name)

        def call(what: Any, *others: Any) -> None:
            path = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else what
            calls.append((name, "folder" if path == str(tmp_path) else "file"))
            really(what, *others)

        return call

    for name in ("fsync", "link", "replace"):
        monkeypatch.setattr(os, name, watched(name))
    shop.export_events(tmp_path / "all.ndjson", overwrite=overwrite)
    assert calls == [("fsync", "file"), (naming, "file"), ("fsync", "folder")]


def test_a_file_system_without_hard_links_will_do(
    shop: EventStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_paths: object) -> None:
        raise PermissionError(1, "Operation not permitted")  # what vfat says

    monkeypatch.setattr(os, "link", refused)
    path = tmp_path / "all.ndjson"
    shop.export_events(path)
    with pytest.raises(FileExistsError):
        shop.export_events(path)
    assert path.read_bytes() == exported(shop)
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_one(shop: EventStore, tmp_path: Path) -> None:
    link, file = tmp_path / "link.ndjson", tmp_path / "there" / "file.ndjson"
    file.parent.mkdir()
    link.symlink_to(file)
    for overwrite in (False, True):
        shop.export_events(link, overwrite=overwrite)
        assert link.is_symlink()
        assert file.read_bytes() == exported(shop)


def test_a_device_is_written_to_and_not_replaced(shop: EventStore, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with (tmp_path / "seen").open("wb") as seen, subprocess.Popen(["cat", pipe], stdout=seen) as reader:
        try:
            shop.export_events(pipe)
            assert reader.wait(timeout=30) == 0
        finally:
            reader.kill()
    assert (tmp_path / "seen").read_bytes() == exported(shop)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_long_name_is_no_obstacle(shop: EventStore, tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 127)
    shop.export_events(path)
    assert path.read_bytes() == exported(shop)


@pytest.mark.parametrize(
    ("target", "error"),
    [
        (io.StringIO(), TypeError),
        (7, TypeError),
        (b"bytes", TypeError),
        (None, TypeError),
        ("", ValueError),
        ("/no/such/folder/file", FileNotFoundError),
        ("/", IsADirectoryError),
        (TakesNothing(), BlockingIOError),
    ],
    ids=["text file", "int", "bytes", "None", "empty", "no folder", "folder", "non-blocking"],
)
def test_what_is_no_target_is_refused(shop: EventStore, target: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        shop.export_events(target)


def test_a_missing_schema_leaves_no_file(database: str, tmp_path: Path) -> None:
    with EventStore(database) as store, pytest.raises(SchemaError):
        store.export_events(tmp_path / "all.ndjson")
    assert list(tmp_path.iterdir()) == []


# --- When it does not come to an end --------------------------------------------------------------------------------


@pytest.mark.parametrize("leaving", [KeyboardInterrupt, SystemExit, RuntimeError])
@pytest.mark.parametrize("name", ["all.ndjson", "all.ndjson.gz"])
def test_whatever_ends_it_early_leaves_no_file(
    shop: EventStore, tmp_path: Path, leaving: type[BaseException], name: str
) -> None:
    seen: list[list[Path]] = []

    def leave(_: ExportProgress) -> None:
        seen.append(parts_in(tmp_path))
        raise leaving

    with pytest.raises(leaving):
        shop.export_events(tmp_path / name, progress=leave)
    assert len(seen[0]) == 1
    assert seen[0][0].name.startswith(name)
    assert list(tmp_path.iterdir()) == []


SLOW_PROGRAM = """
import sys, time
from hindsight_fast import EventStore
def stop(progress):
    print(progress.events, flush=True)
    time.sleep(120)
with EventStore(sys.argv[1]) as store:
    store.export_events(sys.argv[2], overwrite=True, progress=stop)
"""


@pytest.mark.essential
@pytest.mark.parametrize("there_before", [False, True])
def test_a_killed_export_leaves_no_file_that_looks_whole(
    shop: EventStore, database: str, tmp_path: Path, there_before: bool
) -> None:
    path = tmp_path / "all.ndjson"
    if there_before:
        path.write_bytes(b"the one of yesterday")
    with subprocess.Popen([sys.executable, "-c", SLOW_PROGRAM, database, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) > 0
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    assert path.exists() == there_before
    if there_before:
        assert path.read_bytes() == b"the one of yesterday"
    (part,) = parts_in(tmp_path)
    part.unlink()
    shop.export_events(path, overwrite=there_before)
    assert path.read_bytes() == exported(shop)


LIMITED_PROGRAM = """
import resource, sys
from hindsight_fast import EventStore
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
with EventStore(sys.argv[1]) as store:
    try:
        store.export_events(sys.argv[2])
    except OSError as error:
        print(error.filename)
"""


def test_a_disk_that_fills_up_is_named_and_leaves_no_file(shop: EventStore, database: str, tmp_path: Path) -> None:
    path = tmp_path / "all.ndjson"
    assert len(exported(shop)) > 100_000
    done = subprocess.run(
        [sys.executable, "-c", LIMITED_PROGRAM, database, str(path)], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == (f"{path}\n", "")
    assert list(tmp_path.iterdir()) == []


def test_a_full_device_is_an_error(shop: EventStore) -> None:
    with pytest.raises(OSError, match=r"No space left.*/dev/full"):
        shop.export_events("/dev/full")


def test_a_reader_that_goes_away_is_a_broken_pipe(store: EventStore) -> None:
    store.import_events(demo_lines(3_000), import_id="many")
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "wb", buffering=0) as pipe:
        os.close(read_end)
        with pytest.raises(BrokenPipeError):
            store.export_events(pipe)
