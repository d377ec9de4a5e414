"""A private PostgreSQL server: for the demo, for ``--embedded`` and for the tests.

    with EmbeddedServer() as server:
        psycopg.connect(server.conninfo)

Three processes: ours; a guard (``server_guard``), which outlives us by seconds; and PostgreSQL, a child of the guard.
However we end, the server ends with us.

The server listens on no network address, and its Unix socket lies in a folder which only its account may enter:
that is why it may ask for no password. Linux only (it uses ``/proc`` and ``prctl``). Not for sharing between threads.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self, TypeVar

import psycopg
from psycopg.conninfo import make_conninfo

from .accounts import Account, folder_locked, prepare_data_dir, server_account, usable_temporary_root, within_reach
from .errors import EmbeddedServerError
from .installations import Installation, find_installations, newest_installation
from .server_guard import Guard

_T = TypeVar("_T")

START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 60.0
LOG_LIMIT_BYTES: Final = 8 << 20

DEFAULT_SETTINGS: Final[Mapping[str, str]] = {
    # No network: the account's own folder is the only way in.
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    # Estimate: the indexes of a million events take about 100 MB, and appends touch them at random places.
    "shared_buffers": "256MB",
    # Imports write much WAL; at 1 GB, the default, they would force one checkpoint after the other.
    "max_wal_size": "4GB",
}


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
        self._guard: Guard | None = None
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
        account = server_account(self._kept_dir)
        try:
            if self._kept_dir is None:
                self._start_own(account)
            else:
                prepare_data_dir(self._kept_dir, account)
                with folder_locked(self._kept_dir):
                    if not self._join_running_server(self._kept_dir):
                        self._start_own(account)
        except OSError as error:
            raise EmbeddedServerError(
                f"The embedded server could not be started: {error}. Mend that, or name another folder."
            ) from error
        finally:
            if self.pid is None:
                self.stop()

    def stop(self) -> None:
        """Stop the server and wait until it is gone; temporary data is removed. A shared server is only let go."""
        guard, pid = self._guard, self.pid
        self._guard = self.pid = self._host = None
        self._data_dir, self.is_shared = self._kept_dir, False
        if guard is None or guard.made_in != os.getpid():
            return  # Shared, or inherited by a forked child: not ours to stop.
        try:
            guard.ask("end_server", signal.SIGINT, STOP_TIMEOUT_S)
        except EmbeddedServerError:
            # The guard was killed, by which PostgreSQL was told to stop: see to it that it does.
            deadline = time.monotonic() + STOP_TIMEOUT_S
            while pid is not None and _is_postgres(pid):
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.01)
        guard.end()
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
        self._guard.ask("end_server", first_signal, STOP_TIMEOUT_S)
        self.pid = None

    def _start_own(self, account: Account) -> None:
        if self._guard is None:
            self._installation = within_reach(self._choose_installation(), account)
            self._guard = Guard(account, usable_temporary_root(self._temporary_root, account))
            self._host = str(self._guard.folder)
            self._port = int(self._settings.get("port") or _free_port())
            self._data_dir = self._kept_dir or self._guard.folder / "data"
        if not (self.data_dir / "PG_VERSION").exists():
            self._initialise(self._guard)
        if self.log_path.exists() and self.log_path.stat().st_size > LOG_LIMIT_BYTES:
            self.log_path.replace(self.log_path.with_name("server.log.1"))
        settings = {**self._settings, "unix_socket_directories": self._host, "port": str(self._port)}
        command = [str(self.bin("postgres")), "-D", str(self.data_dir)]
        command += [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        pid = self._guard.ask("start_server", command, str(self.log_path))
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                psycopg.connect(self.conninfo, connect_timeout=5).close()
                break
            except psycopg.OperationalError:
                status = self._guard.ask("server_status")
                if status is None and time.monotonic() < deadline:
                    time.sleep(0.01)
                    continue
            problem = "takes no connections" if status is None else f"ended with status {status} instead of starting"
            raise EmbeddedServerError(
                f"PostgreSQL {problem} (data in {self.data_dir}, programs in {self.installation.bin_dir}). Mend what "
                f"its log names; often it is a setting. The end of {self.log_path}:\n"
                f"{_last_lines(self.log_path.read_text(errors='replace'))}"
            )
        self.pid = pid

    def _choose_installation(self) -> Installation:
        kept_dir = self._kept_dir
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

    def _initialise(self, guard: Guard) -> None:
        command = [str(self.bin("initdb")), "-D", str(self.data_dir), "--encoding=UTF8", "--locale=C"]
        # Whoever gets at the socket is us. Who turns TCP on in the settings needs a password first.
        command += ["--username=postgres", "--auth-local=trust", "--auth-host=scram-sha-256", "--no-instructions"]
        if self._kept_dir is None:
            command.append("--no-sync")
        status, output = guard.ask("run", command)
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
                        self._installation = self._choose_installation()
                    self.pid, self.is_shared = pid, True
                    return True
            if time.monotonic() > deadline:
                raise EmbeddedServerError(
                    f"According to {pid_file} process {pid} is the server of {data_dir}, but it takes no connections. "
                    f"Stop it; or, if it has nothing to do with {data_dir}, delete that file."
                )
            time.sleep(0.05)


def _started(value: _T | None) -> _T:
    if value is None:
        raise EmbeddedServerError("The embedded server is not running: call start(), or enter it by a with statement.")
    return value


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
    return re.match(r"\d+ \((postgres|postmaster)\) [^ZX]", status) is not None


def _last_lines(text: str, count: int = 20) -> str:
    return "\n".join(text.splitlines()[-count:])
