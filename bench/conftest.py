"""What the benchmarks share: a server with PostgreSQL's own durability on a real disk, and the events.

HINDSIGHT_BENCH_EVENTS (1000000) is the size of imports and reads, HINDSIGHT_BENCH_ROUNDS (5) how often they take turns.
HINDSIGHT_PG_BIN chooses the server; otherwise it is the newest at hand.
"""

from __future__ import annotations

import gzip
import platform
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from contenders import ROUNDS
from datasets import EVENTS, DataSet
from hindsight_fast.demo_events import demo_lines
from hindsight_fast.embedded import EmbeddedServer

REAL_DATA_FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"

# Facts of this run that only its fixtures and hooks know; they end up in the JSON file, beside the benchmarks.
_FACTS = pytest.StashKey[dict[str, Any]]()
# Where the server keeps itself and how it is reached says nothing about its speed, but much about the machine.
_PRIVATE_SETTINGS = "data_directory|config_file|hba_file|ident_file|unix_socket_directories|port|.*log.*"


def pytest_configure(config: pytest.Config) -> None:
    _facts(config)


def _facts(config: pytest.Config) -> dict[str, Any]:
    # Made when first asked for: this file is a plugin from the start, or only once bench/ is collected.
    if _FACTS not in config.stash:
        config.stash[_FACTS] = {"failed": {}, "events": EVENTS, "rounds": ROUNDS, "versions": _versions()}
    return config.stash[_FACTS]


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version(), "psycopg": f"{psycopg.__version__} ({psycopg.pq.__impl__})"}
    versions["libpq"] = "{}.{}".format(*divmod(psycopg.pq.version(), 10_000))
    for package in ("msgspec", "orjson", "Cython", "pytest-benchmark", "eventsourcing"):
        try:
            versions[package] = version(package)
        except ImportError:
            versions[package] = "not installed here"
    return versions


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.failed and call.excinfo is not None:
        why = (str(call.excinfo.value) or call.excinfo.typename).splitlines()[0]
        _facts(item.config)["failed"][item.nodeid] = why
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["hindsight_fast"] = _facts(config)


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """A folder for files, gone afterwards; beside the server's own."""
    path = Path(tempfile.mkdtemp(prefix="hindsight-bench-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[EmbeddedServer]:
    """A server as ``EmbeddedServer`` starts it: fsync and synchronous_commit are on. Not the tests' server."""
    if request.config.getoption("postgres", "newest") != "newest":
        raise pytest.UsageError("benchmarks take the newest PostgreSQL, or the one that HINDSIGHT_PG_BIN names")
    with EmbeddedServer() as server:
        with psycopg.connect(server.conninfo) as connection:
            settings = connection.execute(
                "SELECT name, current_setting(name) FROM pg_settings WHERE source IN ('configuration file', "
                "'command line', 'environment variable') AND name !~ %s ORDER BY name",
                (f"^({_PRIVATE_SETTINGS})$",),
            ).fetchall()
            durable = connection.execute(
                "SELECT name, setting FROM pg_settings WHERE name IN ('fsync', 'synchronous_commit',"
                " 'full_page_writes', 'wal_level') ORDER BY name"
            ).fetchall()
            number = connection.info.server_version
        facts = _facts(request.config)
        facts["settings"] = dict(settings)
        facts["durability"] = dict(durable)
        facts["versions"]["PostgreSQL"] = "{}.{}".format(*divmod(number, 10_000))
        facts["disk"] = _disk_of(server.data_dir)
        yield server


@pytest.fixture
def database(server: EmbeddedServer) -> Iterator[str]:
    """The conninfo of a new, empty database."""
    name = f"bench_{secrets.token_hex(4)}"
    with psycopg.connect(server.conninfo, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name)))
    yield server.conninfo_for(name)
    with psycopg.connect(server.conninfo, autocommit=True) as admin:
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture(scope="session")
def demo_data(folder: Path) -> Callable[[int], DataSet]:
    """A function that gives so many events of the demo's shop as a file of lines."""
    made: dict[int, DataSet] = {}

    def make(count: int) -> DataSet:
        if count not in made:
            path = folder / f"demo-{count}.ndjson"
            with path.open("wb") as file:
                file.writelines(demo_lines(count))
            made[count] = DataSet("demo", path, count)
        return made[count]

    return make


@pytest.fixture(scope="session")
def git_history(folder: Path) -> DataSet:
    """The real history of a source tree; skipped where the file is not there."""
    compressed = REAL_DATA_FOLDER / "postgres-git-history.ndjson.gz"
    if not compressed.exists():
        pytest.skip("needs the real data shared/data/postgres-git-history.ndjson.gz, which is not part of the checkout")
    path = folder / "git-history.ndjson"
    with gzip.open(compressed) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target)
    with path.open("rb") as lines:
        return DataSet("git history", path, sum(1 for _ in lines))


@pytest.fixture(scope="session")
def real_webhooks() -> list[bytes]:
    """Real webhooks, a line each; skipped where the file is not there."""
    path = REAL_DATA_FOLDER / "github-webhooks.ndjson.gz"
    if not path.exists():
        pytest.skip("needs the real data shared/data/github-webhooks.ndjson.gz, which is not part of the checkout")
    with gzip.open(path) as lines:
        return list(lines)


def _disk_of(path: Path) -> str:
    """The kind of the file system that *path* lies on, and of its disk; no names of either."""
    resolved = path.resolve()
    mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [mount for mount in mounts if resolved.is_relative_to(mount[1])]
    device, _, kind = max(above, key=lambda mount: len(mount[1]), default=("", "", "unknown"))
    name = Path(device).name
    if name.startswith("vd"):
        return f"{kind} on a virtual disk"  # which says of itself that it rotates, whatever lies behind it
    try:
        rotational = (Path("/sys/class/block") / name / "queue" / "rotational").read_text().strip()
    except OSError:
        return kind
    return f"{kind} on a disk that {'rotates' if rotational == '1' else 'does not rotate'}"


if sys.platform != "linux":
    raise pytest.UsageError("the benchmarks read /proc: Linux only")
