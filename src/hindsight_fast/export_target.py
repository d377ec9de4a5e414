"""Where an export's lines go: a path, standard output, or a binary file object.

A path gets its name last: lines go to a temporary file beside it, which is on disk before it is given the name. So what
has the name is whole, whatever was killed or cut off when.
"""

from __future__ import annotations

import errno
import io
import os
import secrets
import stat
import sys
import zlib
from contextlib import suppress
from types import TracebackType
from typing import BinaryIO, Final, Self

BLOCK_BYTES: Final = 256 * 1024
"""What is written at once."""
GZIP_LEVEL: Final = 6
"""As gzip's own: 9 takes several times as long for some per cent less."""
COMPRESSED_SUFFIX: Final = ".gz"

ExportTarget = str | os.PathLike[str] | BinaryIO


class LineTarget:
    """Takes blocks of bytes in a ``with`` statement; only leaving it without an error makes them the file at a path.

    ``name`` is what to call it in a message. Raises TypeError for what is no target; entering it raises
    FileExistsError for a path that exists already, unless it is to *overwrite* it, and whatever else OSError there is.
    """

    def __init__(self, target: ExportTarget, *, overwrite: bool = False) -> None:
        self._overwrite = overwrite
        self._path: str | None = None
        self._temporary: str | None = None
        self._file: BinaryIO | None = None
        self._close_file = False
        self._compressor: zlib._Compress | None = None
        if isinstance(target, str) and target == "-":
            self.name = "<stdout>"
        elif isinstance(target, (str, os.PathLike)):
            path = os.fspath(target)
            if not isinstance(path, str):
                raise TypeError(f"target must be a path as str, not {type(path).__name__}")
            if not path:
                raise ValueError("target is an empty path")
            self.name = self._path = path
            if path.endswith(COMPRESSED_SUFFIX):
                # Without the time in its header: the same events make the same file.
                self._compressor = zlib.compressobj(GZIP_LEVEL, wbits=31)
        elif isinstance(target, io.TextIOBase) or not hasattr(target, "write"):
            kind = type(target).__name__
            raise TypeError(f"target must be a path, '-' or a file open for writing in binary mode, not {kind}")
        else:
            self.name = str(getattr(target, "name", None) or f"<{type(target).__name__}>")
            self._file = target

    def __enter__(self) -> Self:
        try:
            if self._path is not None:
                self._open(self._path)
            elif self._file is None:
                self._file = _standard_output()
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()

    def write(self, block: bytes) -> None:
        """Write all of *block*. Raises OSError, which names the target."""
        if self._compressor is not None:
            block = self._compressor.compress(block)
        self._write(block)

    def _open(self, path: str) -> None:
        try:
            found = os.stat(path)
        except FileNotFoundError:
            found = None
        if found is not None and not stat.S_ISREG(found.st_mode):
            # A device or a pipe is written to. A temporary file renamed to it would take its place.
            self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by _discard()
            self._close_file = True
            return
        if found is not None and not self._overwrite:
            raise self._exists(path)
        # Of a symbolic link what it points to is made or replaced, not the link.
        self._path = os.path.realpath(path)
        folder, name = os.path.split(self._path)
        # Short enough with any name: 255 bytes are what most file systems take.
        begin = os.fsencode(name)[:200].decode(errors="ignore")
        temporary = os.path.join(folder, f"{begin}.{secrets.token_hex(4)}.part")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._temporary = temporary  # only now: were it somebody else's, it would not be ours to remove
        self._file = open(descriptor, "wb", buffering=0)  # noqa: SIM115 - closed by _discard()
        self._close_file = True
        if found is not None:
            # Who could not read the file that is replaced cannot read this one.
            os.fchmod(descriptor, stat.S_IMODE(found.st_mode))

    def _finish(self) -> None:
        if self._compressor is not None:
            self._write(self._compressor.flush())
        assert self._file is not None
        try:
            if hasattr(self._file, "flush"):
                self._file.flush()
            if self._temporary is not None:
                self._publish(self._file.fileno(), self._temporary)
        except OSError as error:
            self._name(error)
            raise

    def _publish(self, descriptor: int, temporary: str) -> None:
        """Give the finished file its name, in one step, once it is on disk."""
        assert self._path is not None
        os.fsync(descriptor)
        if self._overwrite:
            os.replace(temporary, self._path)
        else:
            try:
                # Not a rename, which would silently replace a file that was made there meanwhile.
                os.link(temporary, self._path)
            except FileExistsError:
                raise self._exists(self._path) from None
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                # A file system without hard links.
                if os.path.lexists(self._path):
                    raise self._exists(self._path) from None
                os.rename(temporary, self._path)
        folder = os.open(os.path.dirname(self._path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with suppress(OSError):  # some file systems know no fsync of a folder
                os.fsync(folder)
        finally:
            os.close(folder)

    def _discard(self) -> None:
        """Close what was opened here and remove the temporary file, if it is still there."""
        if self._close_file and self._file is not None:
            with suppress(OSError):  # unbuffered: all was written, or an error has said that it was not
                self._file.close()
        self._file = None
        if self._temporary is not None:
            with suppress(FileNotFoundError):
                os.unlink(self._temporary)
            self._temporary = None

    def _write(self, block: bytes) -> None:
        file = self._file
        assert file is not None
        rest: bytes | memoryview = block
        try:
            while rest:
                written = file.write(rest)
                # An unbuffered file may take a part. Writers of other people's making often do not say: then it is all.
                if written is None and not isinstance(file, io.RawIOBase):
                    return
                if not written:
                    raise BlockingIOError(errno.EAGAIN, "the target takes no more: it is not in blocking mode")
                rest = memoryview(rest)[written:]
        except OSError as error:
            self._name(error)
            raise

    def _name(self, error: OSError) -> None:
        if error.filename is None and error.errno is not None:
            error.filename = self.name

    def _exists(self, path: str) -> FileExistsError:
        return FileExistsError(errno.EEXIST, "it exists already, and is not to be overwritten", path)


def _standard_output() -> BinaryIO:
    if sys.stdout is None:
        raise OSError("standard output is closed")
    return sys.stdout.buffer
