"""Appends within the caller's own transactions: psycopg's, and those that SQLAlchemy and Django lend."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
import sqlalchemy
import sqlalchemy.orm
from psycopg import IsolationLevel
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row

from hindsight_fast import ANY, NO_STREAM, AppendResult, ConcurrencyConflict, EventStore, HindsightError, StreamWrite
from ledger import Ledger, event, table
from rivals import Follower, wait_until


def append(store: EventStore, ledger: Ledger, key: str, stream: UUID | None = None, **options: Any) -> AppendResult:
    write = StreamWrite(stream or uuid4(), [event(key)], options.pop("expected", ANY))
    return ledger.carry_out(key, [write], lambda: store.transact([write], **options))


def tokens(database: str) -> list[str]:
    return [row.token for row in table(database)]


@pytest.mark.essential
@pytest.mark.parametrize("autocommit", [False, True])
def test_commit_and_rollback_stay_the_callers(database: str, store: EventStore, autocommit: bool) -> None:
    with psycopg.connect(database, autocommit=autocommit, row_factory=dict_row) as lent:
        lent.execute("CREATE TABLE orders (n integer)")
        lent.commit()
        for n, end in enumerate(("commit", "rollback", "error", "commit")):
            try:
                with lent.transaction():
                    lent.execute("INSERT INTO orders VALUES (%s)", (n,))
                    result = store.append(uuid4(), [event(f"{n}")], expected=NO_STREAM, connection=lent)
                    assert result.cursor is not None
                    assert lent.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS
                    assert f"{n}" not in tokens(database)
                    if end == "rollback":
                        raise psycopg.Rollback
                    if end == "error":
                        lent.execute("SELECT 1 / 0")
            except psycopg.errors.DivisionByZero:
                assert end == "error"
        assert [row["n"] for row in lent.execute("SELECT n FROM orders ORDER BY n")] == [0, 3]
    assert tokens(database) == ["0", "3"]


def test_an_append_begins_the_callers_transaction_or_is_one_of_its_own(database: str, store: EventStore) -> None:
    with psycopg.connect(database) as lent:
        store.append(uuid4(), [event("rolled back")], expected=ANY, connection=lent)
        lent.rollback()
        store.append(uuid4(), [event("committed")], expected=ANY, connection=lent)
        lent.commit()
        lent.autocommit = True
        store.append(uuid4(), [event("at once")], expected=ANY, connection=lent)
        assert tokens(database) == ["committed", "at once"]


def test_a_transaction_goes_on_after_a_conflict(database: str, store: EventStore) -> None:
    ledger, stream = Ledger(), uuid4()
    with psycopg.connect(database) as lent:
        append(store, ledger, "first", stream, connection=lent)
        with pytest.raises(ConcurrencyConflict) as caught:
            append(store, ledger, "conflict", stream, expected=NO_STREAM, connection=lent)
        assert caught.value.mismatches[0].actual_version == 0
        append(store, ledger, "second", stream, expected=0, connection=lent)
        lent.commit()
    ledger.check(database)


def test_what_cannot_carry_an_append_is_refused_and_stays_as_it_was(database: str, store: EventStore) -> None:
    def refused(connection: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            store.append(uuid4(), [event("refused")], expected=ANY, connection=connection)

    with psycopg.connect(database) as lent:
        with lent.pipeline():
            refused(lent, HindsightError, "pipeline mode")
        lent.rollback()
        for level in (IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE):
            lent.isolation_level = level
            refused(lent, HindsightError, level.name)
        lent.isolation_level = None
        lent.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        refused(lent, HindsightError, "READ COMMITTED, not REPEATABLE READ")
        refused(lent, psycopg.errors.InFailedSqlTransaction, "current transaction is aborted")
        lent.rollback()
        lent.execute("SET client_encoding = 'LATIN1'")
        refused(lent, HindsightError, "LATIN1")
        lent.execute("SET client_encoding = 'UTF8'")
        lent.commit()
        refused(lent.cursor(), TypeError, "raw psycopg Connection, not Cursor")
        store.append(uuid4(), [event("Grüße ✓")], expected=ANY, connection=lent)
        lent.commit()
    refused(lent, psycopg.OperationalError, "closed")
    assert tokens(database) == ["Grüße ✓"]
    with psycopg.connect(make_conninfo(database, client_encoding="LATIN1")) as latin:
        refused(latin, HindsightError, "LATIN1")


def test_a_role_whose_snapshots_stay_is_refused_on_its_own_connection(database: str, store: EventStore) -> None:
    name = conninfo_to_dict(database)["dbname"]
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = 'repeatable read'".encode())
    with psycopg.connect(database) as lent:
        with pytest.raises(HindsightError, match="READ COMMITTED, not REPEATABLE READ"):
            store.append(uuid4(), [event("refused")], expected=ANY, connection=lent)
        lent.rollback()
        lent.isolation_level = IsolationLevel.READ_COMMITTED
        store.append(uuid4(), [event("fine")], expected=ANY, connection=lent)
    assert tokens(database) == ["fine"]


@pytest.mark.parametrize(
    ("setting", "bound"), [("0", "1min"), ("5min", "1min"), ("10s", "10s"), ("800ms", "800ms"), ("1h", "1min")]
)
def test_the_smaller_bound_of_idleness_holds_and_ends_with_the_transaction(
    database: str, store: EventStore, setting: str, bound: str
) -> None:
    with psycopg.connect(database, options=f"-c idle_in_transaction_session_timeout={setting}") as lent:
        store.append(uuid4(), [event("any")], expected=ANY, connection=lent)
        show = "SELECT current_setting('idle_in_transaction_session_timeout')"
        assert lent.execute(show).fetchone() == (bound,)
        lent.commit()
        assert lent.execute(show).fetchone() == (setting,)


@pytest.mark.essential
@pytest.mark.parametrize("large", [False, True])
def test_who_idles_after_an_append_is_ended_and_readers_go_on(
    database: str, store: EventStore, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    monkeypatch.setattr("hindsight_fast.appending.MOST_IDLE", "19s")
    if large:
        monkeypatch.setattr("hindsight_fast.append_call.COPY_FROM_BYTES", 1)
    ledger, follower, stream = Ledger(), Follower(store), uuid4()
    lent = psycopg.connect(database)
    store.append(stream, [event("idle")], expected=ANY, connection=lent)
    append(store, ledger, "other")
    assert follower.look() == 0, "nothing was held up: this run shows nothing"
    show = "SELECT current_setting('idle_in_transaction_session_timeout')"
    assert lent.execute(show).fetchone() == ("19s",)
    # Shorter only now: a pause of the machine would have ended it before it was looked at.
    lent.execute("SET LOCAL idle_in_transaction_session_timeout = '200ms'")
    began = time.monotonic()
    # Who waits for its stream is served as soon as it has ended.
    append(store, ledger, "waits for the stream", stream)
    wait_until(follower.look, what="readers go on")
    assert time.monotonic() - began < 15  # and not the 19 s, nor the store's timeout of 30
    with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout):
        lent.execute("SELECT 1")
    lent.close()
    follower.look()
    follower.check(ledger.check(database))


def lent_by(session: sqlalchemy.orm.Session) -> Any:
    return session.connection().connection.driver_connection


@pytest.mark.essential
def test_a_sqlalchemy_session_commits_its_rows_and_our_events_together(database: str, store: EventStore) -> None:
    engine = sqlalchemy.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(database))
    orders = sqlalchemy.table("orders", sqlalchemy.column("n"))
    stream = uuid4()
    try:
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text("CREATE TABLE orders (n integer)"))
        for n, commits in enumerate((True, False, True)):
            with sqlalchemy.orm.Session(engine) as session:
                session.execute(orders.insert().values(n=n))
                store.append(stream, [event(f"{n}")], expected=ANY, connection=lent_by(session))
                with session.begin_nested() as savepoint:
                    # Asked for anew: the savepoint is set when the session next uses its connection.
                    store.append(stream, [event(f"{n} undone")], expected=ANY, connection=lent_by(session))
                    savepoint.rollback()
                if commits:
                    session.commit()
        with engine.connect() as connection:
            assert connection.execute(sqlalchemy.select(orders.c.n).order_by("n")).scalars().all() == [0, 2]
        strict = engine.execution_options(isolation_level="REPEATABLE READ")
        with sqlalchemy.orm.Session(strict) as session:
            with pytest.raises(HindsightError, match="READ COMMITTED"):
                store.append(stream, [event("refused")], expected=ANY, connection=lent_by(session))
        with sqlalchemy.orm.Session(engine) as session, pytest.raises(TypeError, match="driver_connection"):
            store.append(stream, [event("refused")], expected=ANY, connection=session.connection())  # type: ignore
    finally:
        engine.dispose()
    assert tokens(database) == ["0", "2"]


# In a process of its own: Django's settings are one process's, for good.
DJANGO = """
import sys
from uuid import UUID
import django
from django.conf import settings
from psycopg.conninfo import conninfo_to_dict
from hindsight_fast import ANY, EventStore
from ledger import event

given = conninfo_to_dict(sys.argv[1])
default = {
    "ENGINE": "django.db.backends.postgresql", "HOST": given["host"], "PORT": given["port"], "USER": given["user"],
    "NAME": given["dbname"],
}
settings.configure(DATABASES={"default": default}, USE_TZ=True)
django.setup()
from django.db import connection, transaction

stream = UUID(int=1)

class GaveUp(Exception):
    pass

with EventStore(sys.argv[1]) as store, connection.cursor() as cursor:
    cursor.execute("CREATE TABLE orders (n integer)")
    for n, commits in enumerate((True, False, True)):
        try:
            with transaction.atomic():
                cursor.execute("INSERT INTO orders VALUES (%s)", [n])
                store.append(stream, [event(f"{n}")], expected=ANY, connection=connection.connection)
                try:
                    with transaction.atomic():
                        store.append(stream, [event(f"{n} undone")], expected=ANY, connection=connection.connection)
                        raise GaveUp
                except GaveUp:
                    pass
                if not commits:
                    raise GaveUp
        except GaveUp:
            pass
    with transaction.atomic():  # the append comes first: it begins the transaction
        store.append(stream, [event("first")], expected=1, connection=connection.connection)
        assert not connection.connection.autocommit
        transaction.set_rollback(True)
    store.append(stream, [event("outside")], expected=1, connection=connection.connection)
    cursor.execute("SELECT n FROM orders ORDER BY n")
    print([n for (n,) in cursor.fetchall()])
connection.close()
"""


@pytest.mark.essential
def test_djangos_atomic_commits_its_rows_and_our_events_together(database: str, store: EventStore) -> None:
    command = [sys.executable, "-W", "error", "-c", DJANGO, database]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent)
    assert (ended.returncode, ended.stdout) == (0, "[0, 2]\n"), ended.stderr
    assert tokens(database) == ["0", "2", "outside"]
