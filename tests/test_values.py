"""Stream names, errors and connection settings: what needs no server."""

from __future__ import annotations

import copy
import pickle
import uuid
from datetime import UTC, datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict

import hindsight_fast
from hindsight_fast import (
    STREAM_NAMESPACE,
    Cursor,
    EventParseError,
    EventStore,
    HindsightError,
    ImportFailed,
    SchemaError,
    errors,
    stream_uuid,
)
from hindsight_fast.connecting import check_encodings, connection_conninfo, find_conninfo, shown_conninfo

names = st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=4)


@given(names)
def test_a_stream_name_is_a_version_5_uuid_of_its_netstrings(parts: list[str]) -> None:
    netstrings = "".join(f"{len(part.encode())}:{part}," for part in parts)
    assert stream_uuid(*parts) == uuid.uuid5(STREAM_NAMESPACE, netstrings)


@given(names, names)
@example(["a", "b"], ["ab"])
@example(["a:b"], ["a", "b"])
@example(["1:a,"], ["a"])
def test_different_parts_are_different_streams(left: list[str], right: list[str]) -> None:
    assert (stream_uuid(*left) == stream_uuid(*right)) == (left == right)


def test_stream_names_are_pinned_for_ever() -> None:
    assert str(stream_uuid("order", "4711")) == "435884b8-7170-5976-9d62-629e27ef6a2c"
    assert str(stream_uuid("src/Makefile")) == "84e0005f-6f1d-5817-b387-7552468994ed"


@pytest.mark.parametrize(
    ("parts", "error"), [((), ValueError), (("\ud800",), ValueError), ((1,), TypeError), ((b"a",), TypeError)]
)
def test_bad_stream_names_are_refused(parts: tuple[object, ...], error: type[Exception]) -> None:
    with pytest.raises(error):
        stream_uuid(*parts)  # type: ignore[arg-type]


EVENT_FACTS = {
    "cursor": Cursor(1, 2),
    "event_id": uuid.UUID(int=1),
    "name": "placed",
    "version": 0,
    "stream_id": uuid.UUID(int=2),
    "stream_version": 7,
    "correlation_id": None,
    "created_at": datetime(2024, 1, 1, tzinfo=UTC),
}


@pytest.mark.parametrize(
    "error",
    [
        HindsightError("plain"),
        SchemaError("too new", schema="s", found_layout=9),
        ImportFailed("bad", import_id="i", source="f", line_no=3, byte_offset=99, stored_lines=2),
        EventParseError("broken", **EVENT_FACTS),  # type: ignore[arg-type]
        errors.MalformedRow("short"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_pickling_with_their_facts(error: HindsightError) -> None:
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert vars(again) == vars(error)


def test_every_error_is_a_hindsight_error_drawn_in_the_tree() -> None:
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, HindsightError)
            assert name in (errors.__doc__ or "")
            assert name in hindsight_fast.__all__


def test_everything_exported_has_a_docstring() -> None:
    for name in hindsight_fast.__all__:
        if name != "STREAM_NAMESPACE":
            assert getattr(hindsight_fast, name).__doc__, name


@pytest.fixture
def no_database_named(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("HINDSIGHT_DATABASE_URL", "DATABASE_URL", "PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGUSER"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_environment_names_the_server_in_a_fixed_order(no_database_named: pytest.MonkeyPatch) -> None:
    with pytest.raises(HindsightError, match="no database named"):
        EventStore()
    no_database_named.setenv("PGHOST", "a")
    assert find_conninfo("") == ""
    no_database_named.setenv("DATABASE_URL", "postgresql://b/x")
    assert find_conninfo("") == "postgresql://b/x"
    no_database_named.setenv("HINDSIGHT_DATABASE_URL", "postgresql://c/x")
    assert find_conninfo("") == "postgresql://c/x"
    assert find_conninfo("host=d") == "host=d"


def test_no_password_is_shown() -> None:
    for conninfo in ("postgresql://me:s3cret@host/db", "host=host user=me password=s3cret dbname=db"):
        assert shown_conninfo(conninfo) == "host=host dbname=db user=me"
        assert "s3cret" not in repr(EventStore(conninfo))
    assert shown_conninfo("no such = thing s3cret") == "<unreadable>"


def test_a_connection_speaks_utf8_whatever_was_asked_and_keeps_the_callers_name() -> None:
    settings = connection_conninfo("host=h client_encoding=LATIN1 application_name=mine")
    assert "client_encoding=UTF8" in settings
    assert "application_name=mine" in settings
    assert "application_name=hindsight_fast" in connection_conninfo("host=h")


def test_a_vanished_host_is_noticed_within_a_minute_unless_the_caller_says_otherwise() -> None:
    settings = conninfo_to_dict(connection_conninfo("host=h"))
    idle_s, interval_s, count = (int(settings[f"keepalives_{each}"]) for each in ("idle", "interval", "count"))
    assert idle_s + interval_s * count < 60  # while nothing is under way
    assert 0 < int(settings["tcp_user_timeout"]) < 60_000  # while sent data waits to be acknowledged
    theirs = conninfo_to_dict(connection_conninfo("postgresql://h/?tcp_user_timeout=7000&keepalives_idle=3"))
    assert (theirs["tcp_user_timeout"], theirs["keepalives_idle"]) == ("7000", "3")


class LatinConnection:
    def parameter_status(self, name: str) -> str:
        return {"server_encoding": "UTF8", "client_encoding": "LATIN1"}[name]


def test_another_encoding_is_refused() -> None:
    with pytest.raises(HindsightError, match="connection's encoding is LATIN1"):
        check_encodings(LatinConnection())  # type: ignore[arg-type]


@pytest.mark.parametrize("schema", ["", "x" * 64, "é" * 32, "a\0b", "pg_mine", "\ud800"])
def test_schema_names_that_postgresql_would_change_are_refused(schema: str) -> None:
    with pytest.raises(ValueError, match="schema name"):
        EventStore("host=h", schema=schema)
