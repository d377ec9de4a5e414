"""A role that may not ask which server this is, as on some managed clouds: appends go on, and are still guarded."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from hindsight_fast import ANY, EventStore
from ledger import event, table

REFUSED = ["pg_control_system()", "pg_walfile_name(pg_lsn)", "pg_current_wal_insert_lsn()"]


@pytest.fixture
def refused(database: str) -> Iterator[str]:
    """The conninfo of an ordinary role to which the functions are refused, and which may make a schema."""
    role = f"tenant_{uuid4().hex}"
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {role} LOGIN; GRANT CREATE ON DATABASE {admin.info.dbname} TO {role}".encode())
        for each in REFUSED:
            admin.execute(f"REVOKE EXECUTE ON FUNCTION {each} FROM PUBLIC".encode())
        yield make_conninfo(database, user=role)
        admin.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())


def numbers(database: str) -> list[int]:
    return [row.cursor.transaction_no for row in table(database)]


@pytest.mark.essential
def test_a_role_that_may_not_ask_appends_and_notices_another_server(database: str, refused: str) -> None:
    with EventStore(refused) as store:
        store.create_schema()
        for n in range(3):
            store.append(uuid4(), [event(f"{n}")], expected=ANY)
        with psycopg.connect(database, autocommit=True) as admin:
            admin.execute("UPDATE hindsight.store_meta SET server_started_at = server_started_at - interval '1 day'")
        store.append(uuid4(), [event("elsewhere")], expected=ANY)
        store.append(uuid4(), [event("there again")], expected=ANY)
    *before, elsewhere, there_again = numbers(database)
    assert before == [1, 2, 3]
    assert 2**32 < elsewhere < 2**32 + 10, "it was not noticed, or more than once"
    assert there_again == elsewhere + 1
    with EventStore(refused) as again:
        assert [each.payload["token"] for each in again.read()] == ["0", "1", "2", "elsewhere", "there again"]


@pytest.mark.parametrize("first", ["who may", "who may not"])
def test_one_role_that_may_ask_and_one_that_may_not_share_a_store(database: str, refused: str, first: str) -> None:
    """Neither takes the server for another because the other has written: each time would cost 2^32 numbers."""
    # A superuser may always ask; the tables belong to the other.
    with EventStore(refused) as unprivileged, EventStore(database) as privileged:
        unprivileged.create_schema()
        if first == "who may":
            with psycopg.connect(database, autocommit=True) as admin:
                admin.execute(
                    "UPDATE hindsight.store_meta SET (system_identifier, timeline)"
                    " = (SELECT i.system_identifier, i.timeline FROM hindsight.server_identity_v1() AS i)"
                )
        for n in range(5):
            for store in (privileged, unprivileged):
                store.append(uuid4(), [event(f"{n} {id(store)}")], expected=ANY)
    assert numbers(database) == list(range(1, 11))
