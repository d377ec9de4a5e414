"""Sorting, comparing and hashing 100,000 places in the log: what a reader that merges streams does all day."""

from __future__ import annotations

import random
from dataclasses import dataclass
from operator import lt

import pytest

from contenders import ROUNDS, Contender, compare
from hindsight_fast import Cursor
from plain_python import PlainCursor

COUNT = 100_000


@dataclass(frozen=True, order=True, slots=True)
class DataclassCursor:
    transaction_no: int
    sequence_no: int


KINDS = {
    "Cursor": Cursor,
    "tuple": lambda *parts: parts,
    "dataclass(order=True, frozen=True)": DataclassCursor,
    "plain twin": PlainCursor,
}


@pytest.fixture(scope="module")
def places() -> list[tuple[int, int]]:
    draw = random.Random(4711)
    return [(draw.randrange(30_000), draw.randrange(50)) for _ in range(COUNT)]


def _key(cursor):
    return cursor if isinstance(cursor, tuple) else (cursor.transaction_no, cursor.sequence_no)


def bench_sort(benchmark, places):
    right = sorted(places)

    def contender(name):
        cursors = [KINDS[name](*place) for place in places]

        def check(answer):
            assert list(map(_key, answer)) == right, "not in order"

        return Contender(name, lambda: sorted(cursors), COUNT, check)

    compare(benchmark, *map(contender, KINDS), rounds=2 * ROUNDS, unit="cursors", checked="order of all")


def bench_compare(benchmark, places):
    right = sum(map(lt, places, places[1:]))

    def contender(name):
        cursors = [KINDS[name](*place) for place in places]
        following = cursors[1:]

        def check(answer):
            assert answer == right, f"{answer} instead of {right} are smaller than their successor"

        return Contender(name, lambda: sum(map(lt, cursors, following)), COUNT, check)

    compare(benchmark, *map(contender, KINDS), rounds=2 * ROUNDS, unit="comparisons", checked="number of true ones")


def bench_hash(benchmark, places):
    right = set(places)

    def contender(name):
        cursors = [KINDS[name](*place) for place in places]

        def check(answer):
            assert set(map(_key, answer)) == right, "another set"

        return Contender(name, lambda: set(cursors), COUNT, check)

    compare(benchmark, *map(contender, KINDS), rounds=2 * ROUNDS, unit="cursors", checked="set made of all")
