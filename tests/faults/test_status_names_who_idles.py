"""Who holds readers up is named by the status, as long as it does."""

from __future__ import annotations

from uuid import uuid4

import psycopg
import pytest
from click.testing import CliRunner
from psycopg import sql

from hindsight_fast import ANY, EventStore
from hindsight_fast.cli import commands
from hindsight_fast.status import read_status
from ledger import event
from rivals import Follower, wait_until


def shown(database: str) -> str:
    result = CliRunner().invoke(commands, ["status", "--dsn", database])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.essential
def test_who_idles_after_an_append_is_named_until_it_is_ended(
    database: str, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    follower = Follower(store)
    assert read_status(store).open_appends == ()
    with psycopg.connect(database, application_name="nightly job") as lent:
        store.append(uuid4(), [event("held")], expected=ANY, connection=lent)
        store.append(uuid4(), [event("behind it")], expected=ANY)
        assert follower.look() == 0
        status = read_status(store)
        (held,) = status.open_appends
        assert (held.pid, held.application_name) == (lent.info.backend_pid, "nightly job")
        assert (held.state, held.transaction_no) == ("idle in transaction", status.bound)
        assert held.open_s is not None
        assert held.open_s > 0
        assert f"process {held.pid} (nightly job), idle in transaction" in shown(database)
        lent.rollback()
    # Ended after the set time, it is named no more.
    monkeypatch.setattr("hindsight_fast.appending.MOST_IDLE", "200ms")
    with psycopg.connect(database) as lent:
        store.append(uuid4(), [event("idle")], expected=ANY, connection=lent)
        wait_until(lambda: not read_status(store).open_appends, what="it is ended", deadline_s=5)
        with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout):
            lent.execute("SELECT 1")
    assert follower.look() == 1


def test_a_prepared_transaction_is_named_as_it_was_prepared(database: str, store: EventStore) -> None:
    name = f"append {uuid4()}"
    with psycopg.connect(database) as lent:
        store.append(uuid4(), [event("prepared")], expected=ANY, connection=lent)
        lent.execute(sql.SQL("PREPARE TRANSACTION {}").format(name))
    try:
        (held,) = read_status(store).open_appends
        assert (held.pid, held.prepared_as) == (None, name)
        assert f"prepared as '{name}'" in shown(database)
    finally:
        with psycopg.connect(database, autocommit=True) as admin:
            admin.execute(sql.SQL("ROLLBACK PREPARED {}").format(name))
    assert read_status(store).open_appends == ()
