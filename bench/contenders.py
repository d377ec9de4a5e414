"""Comparing within one run: contenders take turns, every answer is checked, a wrong one gets no number.

What was measured goes into pytest-benchmark's ``extra_info``, from which report.py makes its tables. pytest-benchmark
itself times only the first contender, ours: its statistics are what ``--benchmark-compare`` watches.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any

ROUNDS = int(os.environ.get("HINDSIGHT_BENCH_ROUNDS") or 5)


def _nothing() -> None:
    pass


def _accept(_: Any) -> None:
    pass


@dataclass(frozen=True)
class Contender:
    """One way to do the job: *run* handles *items* things and is all that is timed.

    *check* takes what *run* returned, after every turn; *verify* looks at everything, once, before the first turn. Both
    raise AssertionError. *prepare* comes before every turn. *target* is the least ratio that ours should reach to this
    contender. *run* may put into *latencies* how many seconds each thing took; it finds the list empty.
    """

    name: str
    run: Callable[[], Any]
    items: int
    check: Callable[[Any], None] = _accept
    verify: Callable[[], None] = _nothing
    prepare: Callable[[], None] = _nothing
    target: float | None = None
    latencies: list[float] = field(default_factory=list)


@dataclass
class _Record:
    contender: Contender
    seconds: list[float] = field(default_factory=list)
    percentiles: dict[str, list[float]] = field(default_factory=dict)  # "p50", "p99": seconds of each turn
    wrong: str | None = None

    def judge(self, check: Callable[[], None]) -> None:
        try:
            check()
        except AssertionError as error:
            self.wrong = (str(error) or "the answer is not the expected one").splitlines()[0]

    def forget(self) -> None:
        self.seconds.clear()
        self.percentiles.clear()

    def run(self) -> Any:
        self.contender.latencies.clear()
        began = time.perf_counter()
        result = self.contender.run()
        self.seconds.append(time.perf_counter() - began)
        return result

    def end_turn(self, result: Any) -> None:
        if len(self.contender.latencies) > 1:
            cuts = quantiles(self.contender.latencies, n=100)
            self.percentiles.setdefault("p50", []).append(cuts[49])
            self.percentiles.setdefault("p99", []).append(cuts[98])
        self.judge(lambda: self.contender.check(result))

    def take_turn(self) -> None:
        if self.wrong is None:
            self.contender.prepare()
            gc.collect()
            self.end_turn(self.run())

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.contender.name,
            "items": self.contender.items,
            "target": self.contender.target,
            "wrong": self.wrong,
            "seconds": [] if self.wrong else self.seconds,
            "latencies": {} if self.wrong else self.percentiles,
        }


def compare(
    benchmark: Any,
    ours: Contender,
    *others: Contender,
    rounds: int,
    unit: str,
    checked: str,
    warm_up: bool = True,
    note: str = "",
) -> None:
    """Let the contenders run in turn for *rounds* rounds and record what they took.

    Raises AssertionError at the end if ours was wrong, so that pytest-benchmark records nothing either. *checked* says
    in words what the checks compared.
    """
    our_record = _Record(ours)
    records = [our_record, *map(_Record, others)]
    for record in records:
        record.judge(record.contender.verify)
        if warm_up:
            record.take_turn()
            record.forget()
    results: list[Any] = []

    def before_ours() -> None:
        for record in records[1:]:
            record.take_turn()
        ours.prepare()
        gc.collect()

    def after_ours() -> None:
        our_record.end_turn(results.pop())

    benchmark.extra_info["comparison"] = {"unit": unit, "checked": checked, "note": note}
    if our_record.wrong is None:
        benchmark.pedantic(
            lambda: results.append(our_record.run()), setup=before_ours, teardown=after_ours, rounds=rounds
        )
    benchmark.extra_info["comparison"]["contenders"] = [record.as_dict() for record in records]
    if our_record.wrong is not None:
        benchmark.has_error = True
        raise AssertionError(f"{ours.name}: {our_record.wrong}")


def ratios(ours: Sequence[float], our_items: int, theirs: Sequence[float], their_items: int) -> list[float]:
    """How many times as many items a second ours handled, round by round: above 1, ours is the faster one."""
    return [(our_items / a) / (their_items / b) for a, b in zip(ours, theirs, strict=True)]
