"""What tests of an application's events are made of: contract tests with golden files, and Hypothesis strategies.

    # tests/test_events.py
    from hindsight_fast.testing import event_contract_tests

    test_events = event_contract_tests([user_registered, order_placed], golden_dir="golden")

Needs pytest and Hypothesis: ``pip install 'hindsight-fast[testing]'``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from . import golden
from .event_registry import EventRegistry
from .events import EventType, NewEvent
from .payloads import PayloadCodec

try:
    import hypothesis
    import pytest
    from hypothesis import strategies as st
    from hypothesis.errors import HypothesisException
except ImportError as error:
    raise ImportError(
        "hindsight_fast.testing needs pytest and Hypothesis: pip install 'hindsight-fast[testing]'"
    ) from error

__all__ = ["event_contract_tests", "new_events", "payloads"]

T = TypeVar("T")

EXAMPLES: Final = 5
"""So many payloads stand in a golden file; more would be written, and read by nobody."""
DRAWN: Final = 100
"""Among so many they are chosen, as different in size as possible."""
LARGEST_EXAMPLE: Final = 500
"""Bytes; larger ones are taken only where there are no smaller."""


class _Unstorable:
    """Stands for what Hypothesis thought of and no event can hold."""


def payloads(event_type: EventType[T], version: int | None = None) -> st.SearchStrategy[Any]:
    """Return a strategy for payloads of a version, the latest unless another is named.

    It is ``st.from_type`` of the class, so that what you gave to ``st.register_type_strategy`` counts, for the class
    or for what it holds. What no event can hold is made storable: a naive time becomes one in UTC, NaN 0. What the
    class itself refuses is left out. A version whose class is ``dict`` draws dicts of JSON.
    """
    return _payloads_of(event_type.versions[event_type.latest_version if version is None else version])


def new_events(*event_types: EventType[Any]) -> st.SearchStrategy[NewEvent]:
    """Return a strategy for events of these types, as they are appended. Raises ValueError without a type."""
    if not event_types:
        raise ValueError("new_events needs at least one event type")
    return st.one_of(*(payloads(each).map(each) for each in event_types))


def event_contract_tests(
    event_types: Iterable[EventType[Any]], golden_dir: str | Path = "golden"
) -> Callable[..., None]:
    """Return a test function for pytest, with several tests for each version of each event type.

    Assign it to a name that pytest collects: ``test_events = event_contract_tests([user_registered])``. Golden files
    ``<name>/<version>.json`` lie in *golden_dir*, beside the test's file unless the path is absolute; ``pytest
    --hindsight-update-golden`` writes them. They belong under version control, and each call has a folder of its own.

    The tests fail on a version whose shape changed, that is missing, or that upcasts turn into something else than
    before; and on payloads, thought of by Hypothesis under the profile in force, that do not come back as they are or
    that cannot be brought to the latest version. Raises EventDefinitionError for two types with one name or class.
    """
    types = list(event_types)
    EventRegistry(types)
    folder = Path(golden_dir)
    checks = [
        pytest.param(check, each, version, id=f"{each.name}-{version}-{name}")
        for each in types
        for version in range(len(each.versions))
        for name, check in (("golden", _check_golden), ("round_trip", _check_round_trip))
    ]

    @pytest.mark.parametrize(
        ("check", "event_type", "version"), [*checks, pytest.param(_check_leftovers, types, None, id="no_leftovers")]
    )
    def test_event_contract(
        check: Callable[..., None], event_type: Any, version: int | None, request: pytest.FixtureRequest
    ) -> None:
        complaint = None
        try:
            check(request.path.parent / folder, event_type, version, _is_update(request.config))
        except golden.Broken as broken:
            complaint = str(broken)
        if complaint is not None:  # outside of the except, so that pytest shows the complaint alone
            pytest.fail(complaint, pytrace=False)

    made: Callable[..., None] = test_event_contract
    return made


def _is_update(config: pytest.Config) -> bool:
    return bool(config.getoption("hindsight_update_golden", default=False))


def _check_golden(folder: Path, event_type: EventType[Any], version: int, update: bool) -> None:
    if update:
        # Examples that are still read stay: what changes in version control is what changed in the code.
        examples = golden.readable_examples(folder, event_type, version) or _drawn_examples(event_type, version)
        golden.write(folder, event_type, version, examples)
    golden.compare(folder, event_type, version)


def _check_leftovers(folder: Path, event_types: list[EventType[Any]], version: None, update: bool) -> None:
    golden.check_leftovers(folder, event_types)


def _check_round_trip(folder: Path, event_type: EventType[Any], version: int, update: bool) -> None:
    """Whatever a version may have stored comes back, and can be brought to the latest."""
    codec = PayloadCodec(event_type.versions[version])

    @hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.too_slow], deadline=None)
    @hypothesis.given(_payloads_of(codec.payload_class))
    def comes_back(payload: Any) -> None:
        stored = codec.encode(payload)  # raises unless decoding gives its equal
        event_type.encode(event_type.decode(version, stored))

    try:
        comes_back()
    except HypothesisException as error:
        raise golden.Broken(_unthinkable(event_type, version, error)) from error


def _drawn_examples(event_type: EventType[Any], version: int) -> list[bytes]:
    """Return stored payloads, the same ones each time: from small to large, as different as may be."""
    codec = PayloadCodec(event_type.versions[version])
    drawn: set[bytes] = set()

    @hypothesis.settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=DRAWN,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(_payloads_of(codec.payload_class))
    def draw(payload: Any) -> None:
        codec.encode(payload)
        drawn.add(golden.canonical(payload))

    try:
        draw()
    except HypothesisException as error:
        raise golden.Broken(_unthinkable(event_type, version, error)) from error
    by_size = sorted(drawn, key=lambda stored: (len(stored), stored))
    small = [stored for stored in by_size if len(stored) <= LARGEST_EXAMPLE] or by_size[:EXAMPLES]
    count = min(EXAMPLES, len(small))
    return [small[index * (len(small) - 1) // max(1, count - 1)] for index in range(count)]


def _unthinkable(event_type: EventType[Any], version: int, error: Exception) -> str:
    name = event_type.versions[version].__name__
    return (
        f"Hypothesis cannot think of payloads for version {version} of {event_type.name!r}: {error}. Tell it how,"
        f" before this test: hypothesis.strategies.register_type_strategy({name}, ...)."
    )


_json: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


def _payloads_of(payload_class: type[Any]) -> st.SearchStrategy[Any]:
    if payload_class is dict:
        return st.dictionaries(st.text(), _json, max_size=6)

    @st.composite
    def storable(draw: st.DrawFn) -> Any:
        try:
            parts = _mended(msgspec.to_builtins(draw(st.from_type(payload_class)), builtin_types=_LEFT_ALONE))
            return msgspec.convert(parts, payload_class, builtin_types=_LEFT_ALONE)
        except HypothesisException:
            raise
        except Exception:  # noqa: BLE001  # a constraint that Hypothesis does not know, or what __post_init__ refuses
            return _Unstorable

    return storable().filter(lambda mended: mended is not _Unstorable)


_LEFT_ALONE: Final = (datetime, Decimal)


def _mended(value: Any) -> Any:
    """Return what *value* is made of with what no event can hold replaced by what it can."""
    if isinstance(value, dict):
        return {_mended(key): _mended(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_mended(inner) for inner in value]
    if isinstance(value, datetime) and value.utcoffset() is None:
        return value.replace(tzinfo=UTC)
    if isinstance(value, float) and not math.isfinite(value):
        return 0.0
    if isinstance(value, Decimal) and not value.is_finite():
        return Decimal(0)
    return value
