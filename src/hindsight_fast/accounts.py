"""As whom PostgreSQL runs, and what that account must reach: programs, a data folder, a folder for the socket.

PostgreSQL refuses to run as root. For root it runs as another account, which may be unable to enter folders of root's;
no folder's permissions are ever widened for it: programs are copied, data folders refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from .errors import EmbeddedServerError
from .installations import Installation

LOCK_TIMEOUT_S: Final = 60.0

_CACHE_FOLDER = Path("/var/cache/hindsight_fast")
# sockaddr_un.sun_path holds 108 bytes with its final zero; PostgreSQL refuses anything longer.
_LONGEST_SOCKET_PATH: Final = 106


@dataclass(frozen=True)
class Account:
    """The account PostgreSQL runs under: ours, or for root another."""

    name: str
    uid: int
    gid: int
    is_ours: bool

    def __str__(self) -> str:
        return "this account" if self.is_ours else f"the account {self.name!r}, as which PostgreSQL runs for root"

    @property
    def popen_arguments(self) -> dict[str, Any]:
        if self.is_ours:
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": os.getgrouplist(self.name, self.gid)}

    def succeeds(self, *command: str | Path) -> bool:
        """Tell whether *command*, run by this account, ends with 0. Trying it also sees what mode bits do not show."""
        try:
            run = subprocess.run(command, capture_output=True, cwd="/", env=environment(), **self.popen_arguments)
        except OSError:
            return False
        return run.returncode == 0

    def may(self, operator: Literal["-r", "-x"], path: Path) -> bool:
        return self.succeeds("/bin/sh", "-c", f'test {operator} "$1"', "sh", path)


def server_account(data_dir: Path | None = None) -> Account:
    """Return our own account; for root the one that HINDSIGHT_PG_ACCOUNT names, or else "postgres" or "nobody".

    A *data_dir* that is there already keeps its owner: a package installed since may have brought another account.
    """
    if (ours := os.geteuid()) != 0:
        return Account(str(ours), ours, os.getegid(), is_ours=True)
    chosen = os.environ.get("HINDSIGHT_PG_ACCOUNT")
    names = [chosen] if chosen else ["postgres", "nobody"]
    if not chosen and data_dir is not None and data_dir.exists():
        with suppress(KeyError):
            names.insert(0, pwd.getpwuid(data_dir.stat().st_uid).pw_name)
    for name in names:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        account = Account(name, entry.pw_uid, entry.pw_gid, is_ours=False)
        if account.uid != 0 and account.may("-x", Path("/")):
            return account
    raise EmbeddedServerError(
        f"PostgreSQL does not run as root, and {' or '.join(map(repr, names))} is no other account that this process "
        "may act as. Set HINDSIGHT_PG_ACCOUNT=<an existing ordinary account>, or run as an ordinary user."
    )


def environment() -> dict[str, str]:
    """Our environment without what would steer PostgreSQL's programs (PGDATA, PGPORT …); messages in English."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {"LC_ALL": "C"}


# --- Programs -------------------------------------------------------------------------------------------------------


def within_reach(installation: Installation, account: Account) -> Installation:
    """Return *installation*, or a copy of it in /var/cache where *account* can run it.

    A checkout or virtual environment of root's often lies where only root may enter.
    """
    if account.is_ours or _runs_for(account, installation.bin_dir):
        return installation
    try:
        copy = Installation(_copied(installation), installation.version)
        if _runs_for(account, copy.bin_dir):
            return copy
        problem = f"a copy was made in {copy.bin_dir}, to no avail; delete it to have it made again"
    except (OSError, subprocess.SubprocessError) as error:
        problem = f"copying it to {_CACHE_FOLDER} failed: {error}"
    raise EmbeddedServerError(
        f"The account {account.name!r} cannot run the PostgreSQL in {installation.bin_dir} ({problem}). "
        "Set HINDSIGHT_PG_BIN to one which that account can run."
    )


def _runs_for(account: Account, bin_dir: Path) -> bool:
    # initdb also needs libpq, and says so at once if that is out of reach.
    if not all(account.succeeds(bin_dir / program, "--version") for program in ("postgres", "initdb")):
        return False
    share = bin_dir.parent / "share"
    return not share.is_dir() or account.may("-r", share)


def _copied(installation: Installation) -> Path:
    """Return the bin folder of the copy of *installation*, which is made if need be."""
    prefix = installation.bin_dir.parent
    program = (installation.bin_dir / "postgres").stat()
    identity = f"{installation.bin_dir}\0{program.st_size}\0{program.st_mtime_ns}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    target = _CACHE_FOLDER / "postgresql-{}.{}-{}".format(*installation.version, digest)
    # Wheels keep their shared libraries at ../../<package>.libs, as seen from the programs' folder: keep that shape.
    libraries = prefix.parent.parent / f"{prefix.parent.name}.libs"
    below = Path("package", prefix.name)

    if not _CACHE_FOLDER.exists():
        _CACHE_FOLDER.mkdir(parents=True, exist_ok=True)
        _CACHE_FOLDER.chmod(0o711)  # To be passed through, not opened: who can open it could also hold its lock.
    _check_is_roots(_CACHE_FOLDER)
    with folder_locked(_CACHE_FOLDER):
        for left_by_a_killed_process in _CACHE_FOLDER.glob("copying-*"):
            shutil.rmtree(left_by_a_killed_process)
        if not target.exists():
            work = Path(tempfile.mkdtemp(prefix="copying-", dir=_CACHE_FOLDER))
            try:
                only_for_compilers = shutil.ignore_patterns("*.a", "pgxs", "pkgconfig")
                for part in ("share", "lib", "bin"):  # Debian's has no share beside it, and cannot be moved.
                    shutil.copytree(prefix / part, work / below / part, symlinks=True, ignore=only_for_compilers)
                if libraries.is_dir():
                    shutil.copytree(libraries, work / libraries.name, symlinks=True)
                # The source may have been installed under a strict umask.
                subprocess.run(["chmod", "-R", "u=rwX,go=rX", work], check=True)
                work.rename(target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    _check_is_roots(target)
    return target / below / "bin"


def _check_is_roots(folder: Path) -> None:
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != 0 or state.st_mode & 0o022:
        raise EmbeddedServerError(
            f"{folder} is not a folder that only root can write to, so programs in it are not to be trusted. Delete it."
        )


# --- Folders --------------------------------------------------------------------------------------------------------


@contextmanager
def folder_locked(folder: Path) -> Iterator[None]:
    """Let one process at a time work in *folder*. Raises EmbeddedServerError if another does for too long."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise EmbeddedServerError(
                        f"Another process has held the lock on {folder} for {LOCK_TIMEOUT_S:.0f} s; `lsof {folder}` "
                        "names it. Wait for it or end it, then try again."
                    ) from None
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def prepare_data_dir(folder: Path, account: Account) -> None:
    """Make *folder* if need be, and see to it that it is *account*'s. Every folder above it is left as it is."""
    above = next(parent for parent in [*folder.parents, folder] if parent.exists())
    if not account.may("-x", above):
        raise EmbeddedServerError(
            f"{folder} cannot hold data: {account}, may not enter {above} or a folder above it. Name a folder that it "
            "can reach (below /var/lib or /srv, say), or let it in; nothing was changed here."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    if not account.is_ours and folder.stat().st_uid == 0 and not any(folder.iterdir()):
        os.chown(folder, account.uid, account.gid)
    owner = folder.stat().st_uid
    if owner != account.uid:
        raise EmbeddedServerError(
            f"{folder} belongs to the user number {owner}, but PostgreSQL would run as {account.name!r} (number "
            f"{account.uid}). Name another folder, or run as its owner (as root: HINDSIGHT_PG_ACCOUNT=<its owner>)."
        )


def usable_temporary_root(wanted: Path, account: Account) -> Path:
    """Return *wanted* or another folder which *account* can enter and in which a socket's path is short enough."""
    roots = list(dict.fromkeys([wanted.absolute(), Path("/tmp"), Path("/var/tmp")]))
    for root in roots:
        longest = root / "hindsight-123456789abc" / ".s.PGSQL.65535"
        if len(os.fsencode(longest)) <= _LONGEST_SOCKET_PATH and os.access(root, os.W_OK) and account.may("-x", root):
            return root
    raise EmbeddedServerError(
        f"None of {', '.join(map(str, roots))} can hold the server's socket: we must be able to write there, "
        f"{account} to enter, and the socket's path may have {_LONGEST_SOCKET_PATH} bytes. Set TMPDIR to a short path "
        "that is open to all, like /tmp."
    )
