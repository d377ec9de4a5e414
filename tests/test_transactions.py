"""What an append is made of: StreamWrites, and Transactions that add up."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Mapping
from functools import reduce
from itertools import count
from operator import add
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hindsight_fast import ANY, NO_STREAM, STREAM_EXISTS, Cursor, NewEvent, StreamWrite, Transaction
from hindsight_fast.writes import MOST_EVENTS

STREAMS = [UUID(int=n) for n in range(4)]
STREAM = STREAMS[0]

expectations = st.sampled_from([ANY, NO_STREAM, STREAM_EXISTS, 0, 3, Cursor(8, 1)])
stream_writes = st.builds(StreamWrite, st.sampled_from(STREAMS), st.lists(st.integers(0, 9), max_size=3), expectations)
transactions = st.lists(stream_writes, max_size=4, unique_by=lambda write: write.stream_id).map(Transaction)


def plain_sum(writes: list[StreamWrite]) -> list[StreamWrite]:
    """Each stream where it came first, with what was first expected of it and all of its events."""
    merged: list[StreamWrite] = []
    for write in writes:
        if all(other.stream_id != write.stream_id for other in merged):
            events = [event for other in writes if other.stream_id == write.stream_id for event in other.events]
            merged.append(StreamWrite(write.stream_id, events, write.expected))
    return merged


@given(st.lists(transactions, max_size=5))
def test_a_sum_has_every_stream_where_it_came_first_with_all_its_events(many: list[Transaction]) -> None:
    total = sum(many, Transaction())
    assert list(total) == plain_sum([write for each in many for write in each])
    assert len(total) == len({write.stream_id for each in many for write in each})


@given(transactions, transactions, transactions)
def test_it_does_not_matter_what_is_added_first(a: Transaction, b: Transaction, c: Transaction) -> None:
    before = [copy.copy(each) for each in (a, b, c)]
    assert (a + b) + c == a + (b + c)
    assert [a, b, c] == before  # none is changed by it


@given(transactions)
def test_nothing_added_changes_nothing(one: Transaction) -> None:
    assert Transaction() + one == one == one + Transaction()
    assert reduce(add, [one]) == one


@given(transactions)
def test_a_transaction_survives_pickling_and_is_its_writes(one: Transaction) -> None:
    assert pickle.loads(pickle.dumps(one)) == one
    assert Transaction(iter(one)) == one
    assert Transaction(list(one)).writes == one.writes
    assert hash(Transaction(one)) == hash(one)
    assert repr(one) == f"Transaction({list(one.writes)!r})"


def test_the_left_expectation_stands_even_if_it_brings_no_events() -> None:
    checked = Transaction([StreamWrite(STREAM, [], NO_STREAM)])
    appended = Transaction([StreamWrite(STREAM, ["a"], 5)])
    assert list(checked + appended) == [StreamWrite(STREAM, ["a"], NO_STREAM)]
    assert list(appended + checked) == [StreamWrite(STREAM, ["a"], 5)]


def test_transactions_differ_by_the_order_of_their_streams() -> None:
    writes = [StreamWrite(stream, ["a"], ANY) for stream in STREAMS]
    assert Transaction(writes) != Transaction(writes[::-1])
    assert Transaction(writes) != writes


@pytest.mark.parametrize("other", [[], 1, None, StreamWrite(STREAM, [], ANY)])
def test_only_transactions_are_added(other: Any) -> None:
    for left, right in ((Transaction(), other), (other, Transaction())):
        with pytest.raises(TypeError):
            left + right


@pytest.mark.parametrize("other", [1, "write", (STREAM, [], ANY), Transaction(), NewEvent("noted", {})])
def test_a_transaction_is_made_of_stream_writes(other: Any) -> None:
    with pytest.raises(TypeError, match="made of StreamWrites"):
        Transaction([StreamWrite(STREAM, [], ANY), other])


def test_a_stream_listed_twice_is_refused() -> None:
    write = StreamWrite(STREAM, [], ANY)
    with pytest.raises(ValueError, match=f"{STREAM} is listed twice"):
        Transaction([write, StreamWrite(uuid4(), [], ANY), write])


def test_a_write_keeps_what_a_generator_gave() -> None:
    write = StreamWrite(STREAM, (n for n in range(3)), ANY)
    assert write.events == (0, 1, 2) == write.events
    given = [1, 2]
    write = StreamWrite(STREAM, given, ANY)
    given.append(3)
    assert write.events == (1, 2)


class Readings(Mapping[str, int]):
    def __getitem__(self, key: str) -> int:
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


@pytest.mark.parametrize("events", ["", "text", b"", b"bytes", {}, {"n": 1}, Readings()], ids=repr)
def test_what_is_no_list_of_events_is_refused_even_if_it_is_empty(events: Any) -> None:
    with pytest.raises(TypeError, match="events is a list of events, not a"):
        StreamWrite(STREAM, events, ANY)


@pytest.mark.parametrize("events", [None, 1, NewEvent("noted", {})])
def test_one_event_by_itself_is_refused(events: Any) -> None:
    with pytest.raises(TypeError, match="not iterable"):
        StreamWrite(STREAM, events, ANY)


def test_events_without_end_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 1000000 events in one append: import them"):
        StreamWrite(STREAM, count(), ANY)  # type: ignore[arg-type]
    assert len(StreamWrite(STREAM, range(MOST_EVENTS), ANY).events) == MOST_EVENTS


@pytest.mark.parametrize(
    ("expected", "error", "message"),
    [
        (True, TypeError, "not bool"),
        (False, TypeError, "not bool"),
        (None, TypeError, "not NoneType"),
        (1.0, TypeError, "not float"),
        ("any", TypeError, "not str"),
        (-1, ValueError, "counts from 0: -1 is none"),
        (2**63, ValueError, "no stream's version exceeds 9223372036854775807: 9223372036854775808"),
        (10**30, ValueError, "exceeds"),
    ],
)
def test_an_expectation_that_none_can_be_is_refused(expected: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        StreamWrite(STREAM, [], expected)


@pytest.mark.parametrize("stream_id", ["order-1", str(STREAM), STREAM.bytes, 1, None])
def test_a_stream_is_a_uuid(stream_id: Any) -> None:
    with pytest.raises(TypeError, match="stream_id must be a UUID"):
        StreamWrite(stream_id, [], ANY)
