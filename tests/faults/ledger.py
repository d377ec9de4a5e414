"""What every append came to, as its caller knows it, and whether the tables agree: P1 to P4.

A writer says what it is about to append before it does, and afterwards what became of it: acknowledged, with the places
it was told; refused, so that nothing may be there; or unknown, as an append is that nobody has answered. Events are
known by the token in their payload, whatever ids they got.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
from psycopg import sql

from hindsight_fast import AppendOutcomeUnknown, AppendResult, Cursor, NewEvent, StreamWrite

Record = dict[str, Any]
"""Plain values, so that a process can write it as a line."""


class Row(NamedTuple):
    cursor: Cursor
    event_id: UUID
    stream_id: UUID
    stream_version: int
    token: str


def event(token: str, **settings: Any) -> NewEvent:
    return NewEvent("noted", {"token": token}, **settings)


def begun(key: str, writes: Iterable[StreamWrite]) -> Record:
    """What is about to be appended under *key*: the tokens of each stream's events."""
    return {"append": key, "streams": [[str(w.stream_id), [_token_of(e) for e in w.events]] for w in writes]}


def acknowledged(key: str, result: AppendResult) -> Record:
    return {
        "append": key,
        "outcome": "acknowledged",
        "cursors": {str(stream): str(cursor) for stream, cursor in result.stream_cursors.items()},
        "versions": {str(stream): version for stream, version in result.stream_versions.items()},
        "ids": [str(each) for each in result.event_ids],
    }


def failed(key: str, error: BaseException, *, unknown: bool = False) -> Record:
    """*unknown*: whatever the error says, such as of an interrupt or of a commit of one's own."""
    unknown = unknown or isinstance(error, AppendOutcomeUnknown)
    what = "unknown" if unknown else "refused"
    return {"append": key, "outcome": what, "error": type(error).__name__, "message": str(error)}


class Ledger:
    """Takes records, from any thread, and is compared with the tables in the end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun: dict[str, Record] = {}
        self._outcomes: dict[str, Record] = {}

    def take(self, record: Record) -> None:
        with self._lock:
            place = self._outcomes if "outcome" in record else self._begun
            assert record["append"] not in place, record
            place[record["append"]] = record

    def carry_out(self, key: str, writes: Sequence[StreamWrite], append: Callable[[], AppendResult]) -> AppendResult:
        """Append by *append*, and keep account of it. Raises what it raises."""
        self.take(begun(key, writes))
        try:
            result = append()
        except BaseException as error:
            self.take(failed(key, error, unknown=not isinstance(error, Exception)))
            raise
        self.take(acknowledged(key, result))
        return result

    def count(self, outcome: str) -> int:
        with self._lock:
            return sum(record["outcome"] == outcome for record in self._outcomes.values())

    def unknown(self) -> list[str]:
        """The keys of appends that nobody has answered, or could."""
        with self._lock:
            settled = {key for key, record in self._outcomes.items() if record["outcome"] != "unknown"}
            return [key for key in self._begun if key not in settled]

    def errors(self) -> Counter[str]:
        """By their names, how often something else came back than a result."""
        with self._lock:
            return Counter(record["error"] for record in self._outcomes.values() if "error" in record)

    def messages(self) -> list[str]:
        with self._lock:
            return [record["message"] for record in self._outcomes.values() if "message" in record]

    def check(self, database: str, schema: str = "hindsight") -> list[Row]:
        """Assert P1, P2 and P4 of what is in the tables, and return that in its order."""
        rows = table(database, schema)
        by_token: dict[str, Row] = {}
        for row in rows:
            assert row.token not in by_token, f"{row.token} is stored twice"
            by_token[row.token] = row
        known: set[str] = set()
        for key, record in self._begun.items():
            streams = [(UUID(stream), tokens) for stream, tokens in record["streams"]]
            tokens = [token for _, each in streams for token in each]
            known.update(tokens)
            outcome = self._outcomes.get(key, {"outcome": "unknown"})
            stored = [by_token[token] for token in tokens if token in by_token]
            if outcome["outcome"] == "acknowledged":
                assert len(stored) == len(tokens), f"P1: {key} was acknowledged, {len(stored)} events of it are stored"
                _check_places(key, streams, outcome, by_token)
            elif outcome["outcome"] == "refused":
                assert not stored, f"P2: {key} was refused ({outcome['error']}), and is stored at {stored[0].cursor}"
            else:
                assert len(stored) in (0, len(tokens)), f"P2: {key} is half stored"
            if stored:
                first = stored[0].cursor
                places = [Cursor(first.transaction_no, first.sequence_no + n) for n in range(len(tokens))]
                assert [row.cursor for row in stored] == places, f"{key} does not stand one behind the other"
        strangers = by_token.keys() - known
        assert not strangers, f"P2: stored, and appended by nobody: {sorted(strangers)[:3]}"
        _check_streams(rows, database, schema)
        return rows


def _check_places(key: str, streams: list[tuple[UUID, list[str]]], told: Record, by_token: dict[str, Row]) -> None:
    ids = iter(told["ids"])
    for stream_id, tokens in streams:
        for token in tokens:
            row = by_token[token]
            assert (row.stream_id, str(row.event_id)) == (stream_id, next(ids)), f"P1: {key}, {token}"
        if tokens:
            last = by_token[tokens[-1]]
            assert told["cursors"][str(stream_id)] == str(last.cursor), f"P1: {key} was told another place"
            assert told["versions"][str(stream_id)] == last.stream_version, f"P1: {key} was told another version"


def _check_streams(rows: list[Row], database: str, schema: str) -> None:
    versions: dict[UUID, int] = {}
    for row in rows:
        expected = versions.get(row.stream_id, -1) + 1
        assert row.stream_version == expected, f"P4: stream {row.stream_id} has {row.stream_version}, not {expected}"
        versions[row.stream_id] = expected
    with psycopg.connect(database) as connection:
        query = sql.SQL("SELECT stream_id, stream_version FROM {}.stream_heads").format(sql.Identifier(schema))
        heads: dict[UUID, int] = dict(connection.execute(query).fetchall())
    assert heads == versions, "P4: the heads are not the last events' versions"


def table(database: str, schema: str = "hindsight") -> list[Row]:
    """Every event, in the order of the log, by plain SQL."""
    query = sql.SQL(
        "SELECT transaction_no, sequence_no, event_id, stream_id, stream_version, payload ->> 'token' FROM {}.events"
        " ORDER BY transaction_no, sequence_no"
    ).format(sql.Identifier(schema))
    with psycopg.connect(database) as connection:
        return [Row(Cursor(no, place), *rest) for no, place, *rest in connection.execute(query)]


def _token_of(given: Any) -> str:
    assert isinstance(given, NewEvent)
    return str(given.data.decode().split('"')[3])
