"""hindsight_fast.testing: a user's contract tests fail where they should, and say what to do."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict
from uuid import UUID

import attrs
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hindsight_fast import EventDefinitionError, EventType, NewEvent
from hindsight_fast.testing import event_contract_tests, new_events, payloads

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parents[1]

Run = Callable[..., pytest.RunResult]

EVENTS = """
from dataclasses import dataclass
from datetime import datetime
from hindsight_fast import EventType
from hindsight_fast.testing import event_contract_tests

@dataclass
class UserV0:
    name: str
    at: datetime

@dataclass
class User:
    name: str
    at: datetime
    email: str | None

registered = EventType("user registered", (UserV0, User), [lambda v0: User(v0.name, v0.at, None)])
test_events = event_contract_tests([registered])
"""
FOLDER = Path("golden/user registered")


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the contract tests of a module of events, in a project of its own."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeini("[pytest]\nfilterwarnings = error\n")

    def run(events: str, *options: str) -> pytest.RunResult:
        pytester.makepyfile(test_events=events)
        # Few examples: what is tested here is what the tests say.
        pytester.makeconftest(
            "from hypothesis import settings\n"
            "settings.register_profile('few', max_examples=10, database=None)\n"
            "settings.load_profile('few')\n"
        )
        return pytester.runpytest_inprocess("-p", "pytest_hindsight_fast", "-p", "no:cacheprovider", "-v", *options)

    return run


@pytest.fixture
def pinned(run: Run, pytester: pytest.Pytester) -> Run:
    """The same, in a project whose golden files are written and committed."""
    run(EVENTS, "--hindsight-update-golden").assert_outcomes(passed=5)
    return run


def changed(old: str, new: str) -> str:
    assert old in EVENTS
    return EVENTS.replace(old, new)


def complaints(result: pytest.RunResult) -> str:
    return re.sub(r"\s+", " ", result.stdout.str())


# --- What passes ------------------------------------------------------------------------------------------------------


def test_golden_files_are_written_once_and_then_hold(pinned: Run, pytester: pytest.Pytester) -> None:
    files = {path: path.read_bytes() for path in (pytester.path / FOLDER).iterdir()}
    assert sorted(path.name for path in files) == ["0.json", "1.json"]
    golden = json.loads(files[pytester.path / FOLDER / "0.json"])
    assert (golden["event"], golden["version"], golden["latest_version"]) == ("user registered", 0, 1)
    assert golden["shape"] == {"at": "datetime", "name": "str"}
    assert len(golden["examples"]) == 5
    for example in golden["examples"]:
        assert example["today"] == {**example["stored"], "email": None}
    names = [f"test_events[user registered-{v}-{what}]" for v in (0, 1) for what in ("golden", "round_trip")]
    result = pinned(EVENTS)
    result.assert_outcomes(passed=5)
    result.stdout.fnmatch_lines([f"*::{name.replace('[', '[[]')} PASSED*" for name in names])
    pinned(EVENTS, "--hindsight-update-golden").assert_outcomes(passed=5)
    assert {path: path.read_bytes() for path in (pytester.path / FOLDER).iterdir()} == files


def test_the_examples_are_the_same_whoever_draws_them(pinned: Run, pytester: pytest.Pytester) -> None:
    before = (pytester.path / FOLDER / "0.json").read_bytes()
    (pytester.path / FOLDER / "0.json").unlink()
    pinned(EVENTS, "--hindsight-update-golden").assert_outcomes(passed=5)
    assert (pytester.path / FOLDER / "0.json").read_bytes() == before


def test_what_changes_nothing_that_is_stored_passes(pinned: Run) -> None:
    other = EVENTS.replace("UserV0", "OldUser").replace(
        "    name: str\n    at: datetime", "    at: datetime\n    name: str"
    )
    other = other.replace("User(v0.name, v0.at, None)", "User(v0.at, v0.name, None)")
    pinned(other).assert_outcomes(passed=5)


def test_without_the_plugin_only_the_option_is_missing(pinned: Run, pytester: pytest.Pytester) -> None:
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=5)


# --- What fails, and what it says -------------------------------------------------------------------------------------


def test_a_version_without_a_golden_file_fails(run: Run, pytester: pytest.Pytester) -> None:
    result = run(EVENTS)
    result.assert_outcomes(failed=2, passed=3)
    assert "version 0 of 'user registered' has no golden file" in complaints(result)
    assert "Run pytest --hindsight-update-golden, look at what it writes, and commit it." in complaints(result)
    assert not (pytester.path / "golden").exists()


def test_a_field_of_another_type_fails_as_events_that_can_no_longer_be_read(pinned: Run) -> None:
    result = pinned(changed("class UserV0:\n    name: str", "class UserV0:\n    name: int"))
    result.assert_outcomes(failed=2, passed=3)
    said = complaints(result)
    assert "the shape of version 0 of 'user registered' changed: stored events can no longer be read" in said
    assert "Expected `int`, got `str` ($.name of example 0 in" in said
    assert "Put the class back, and add a version 2 with an upcast instead." in said
    assert "If version 0 was never stored anywhere, run pytest --hindsight-update-golden." in said


def test_a_required_field_that_is_new_fails(pinned: Run) -> None:
    result = pinned(
        changed("    email: str | None\n", "    email: str | None\n    age: int\n").replace("None)]", "None, 0)]")
    )
    assert "Object missing required field `age` (example 0 in" in complaints(result)


def test_a_field_taken_out_fails_by_what_would_be_forgotten(pinned: Run) -> None:
    result = pinned(
        changed("    name: str\n    at: datetime\n\n", "    name: str\n\n").replace("v0.at", "datetime.now()")
    )
    said = complaints(result)
    assert "stored events can no longer be read for what they say (example 0 in" in said
    assert re.search(r'- "at": "[^"]+"', said)


def test_a_wider_type_fails_for_the_sake_of_older_programs(pinned: Run) -> None:
    result = pinned(changed("    email: str | None", "    email: str | int | None"))
    said = complaints(result)
    assert "the shape of version 1 of 'user registered' changed. Its stored events can still be read" in said
    assert '- "email": "none | str" + "email": "int | none | str"' in said.replace(",", "")


def test_a_default_that_is_not_stored_is_pinned(run: Run) -> None:
    events = """
import msgspec
from hindsight_fast import EventType
from hindsight_fast.testing import event_contract_tests

class Seat(msgspec.Struct, omit_defaults=True):
    row: int
    number: int = 1
    tags: set[str] = msgspec.field(default_factory=set)

test_events = event_contract_tests([EventType("user registered", (Seat,))])
"""
    run(events, "--hindsight-update-golden").assert_outcomes(passed=3)
    run(events).assert_outcomes(passed=3)
    result = run(events.replace("number: int = 1", "number: int = 2"))
    result.assert_outcomes(failed=1, passed=2)
    assert '- "when absent": 1 + "when absent": 2' in complaints(result)


def test_a_chain_whose_result_changed_fails(pinned: Run) -> None:
    result = pinned(changed("User(v0.name, v0.at, None)", "User(v0.name, v0.at, 'unknown')"))
    result.assert_outcomes(failed=1, passed=4)
    said = complaints(result)
    assert "what version 0 of 'user registered' becomes today changed" in said
    assert '- "email": null' in said
    assert '+ "email": "unknown"' in said
    assert "Put the upcasts back as they were. If the change is meant, run pytest --hindsight-update-golden" in said


def test_a_chain_that_fails_now_fails(pinned: Run) -> None:
    result = pinned(changed("User(v0.name, v0.at, None)", "User(v0.nam, v0.at, None)"))
    assert "cannot be brought to version 1 any more: upcasts[0] raised AttributeError" in complaints(result)


def test_a_chain_that_ends_with_what_cannot_be_stored_fails(pinned: Run) -> None:
    result = pinned(changed("User(v0.name, v0.at, None)", "User(v0.name, v0.at, 5)"))
    assert "becomes is no payload of version 1" in complaints(result)


def test_an_upcast_left_to_chance_is_refused_when_the_file_is_written(run: Run) -> None:
    by_chance = EVENTS.replace("v0.at, None)", "v0.at, str(__import__('uuid').uuid4()))")
    result = run(by_chance, "--hindsight-update-golden")
    assert "an upcast may use nothing but the payload it is given" in complaints(result)


NEW_VERSION = """
@dataclass
class UserV2:
    name: str

registered = EventType(
    "user registered", (UserV0, User, UserV2), [lambda v0: User(v0.name, v0.at, None), lambda v1: UserV2(v1.name)]
)
"""


def test_a_new_version_wants_its_golden_file_and_the_older_ones_want_to_know(pinned: Run) -> None:
    events = changed("test_events =", f"{NEW_VERSION}\ntest_events =")
    result = pinned(events)
    result.assert_outcomes(failed=3, passed=4)
    said = complaints(result)
    assert "version 2 of 'user registered' has no golden file" in said
    assert "does not say yet what version 0 of 'user registered' becomes in version 2, which is new" in said
    pinned(events, "--hindsight-update-golden").assert_outcomes(passed=7)
    pinned(events).assert_outcomes(passed=7)


def test_a_version_that_is_gone_fails(pinned: Run) -> None:
    result = pinned(changed("(UserV0, User), [lambda v0: User(v0.name, v0.at, None)]", "(UserV0,)"))
    assert "1.json is of a version that 'user registered' does not have any more" in complaints(result)


def test_an_event_type_that_was_renamed_fails(pinned: Run) -> None:
    result = pinned(changed('"user registered"', '"registered"'))
    assert "0.json belongs to no event type here: was one renamed or taken out?" in complaints(result)


def test_a_golden_file_that_is_none_fails(pinned: Run, pytester: pytest.Pytester) -> None:
    (pytester.path / FOLDER / "0.json").write_text("<<<<<<< HEAD\n")
    assert re.search(r"0\.json is no golden file: .*Put it back from version control", complaints(pinned(EVENTS)))


def test_a_payload_that_does_not_come_back_fails_with_an_example(run: Run) -> None:
    result = run(
        changed(
            "    at: datetime\n\n", "    at: datetime\n\n    def __post_init__(self):\n        self.name += '!'\n\n"
        )
    )
    said = complaints(result)
    assert "$.name would come back as another str" in said
    assert re.search(r"comes_back\(.*payload=.*UserV0\(", said)


def test_what_hypothesis_cannot_think_of_is_said_with_the_way_out(run: Run) -> None:
    result = run(EVENTS.replace("at: datetime", "at: __import__('typing').Any"))
    said = complaints(result)
    assert "Hypothesis cannot think of payloads for version 0 of 'user registered'" in said
    assert "hypothesis.strategies.register_type_strategy(UserV0, ...)" in said


def test_what_a_class_itself_refuses_is_not_drawn(run: Run) -> None:
    events = changed(
        "    email: str | None\n",
        "    email: str | None\n\n"
        "    def __post_init__(self):\n        if self.email == '': raise LookupError(self.email)\n",
    )
    run(events, "--hindsight-update-golden").assert_outcomes(passed=5)


def test_a_class_that_refuses_all_that_is_drawn_is_said_with_the_way_out(run: Run) -> None:
    events = changed("    at: datetime\n\n", "    at: datetime\n\n    def __post_init__(self):\n        1 / 0\n\n")
    said = complaints(run(events))
    assert "Hypothesis cannot think of payloads for version 0 of 'user registered'" in said
    assert "hypothesis.strategies.register_type_strategy(UserV0, ...)" in said


# --- Strategies -------------------------------------------------------------------------------------------------------


class Line(TypedDict):
    price: Decimal
    at: datetime


class Pair(NamedTuple):
    x: float
    at: datetime


@attrs.frozen
class Inner:
    ratio: float
    by_time: dict[datetime, tuple[Pair, ...]]


class Order(msgspec.Struct, frozen=True):
    order_id: UUID
    placed_at: datetime
    lines: list[Line]
    inner: Inner | None
    times: frozenset[datetime]
    count: Annotated[int, msgspec.Meta(ge=0)]


placed = EventType("placed", (dict, Order), [lambda old: old])


@given(payloads(placed))
def test_drawn_payloads_are_of_their_class_and_can_be_stored(payload: Order) -> None:
    assert type(payload) is Order
    assert placed.decode(1, placed.encode(payload)) == payload


@given(payloads(placed, version=0))
def test_drawn_dicts_are_json(payload: dict[str, Any]) -> None:
    assert NewEvent("placed", payload).payload == payload


@dataclass
class Seat:
    number: int


def test_a_registered_strategy_counts() -> None:
    st.register_type_strategy(Seat, st.builds(Seat, number=st.just(4711)))

    @given(new_events(EventType("seated", (Seat,)), EventType("left", (Seat,))))
    def test(event: NewEvent) -> None:
        assert event.name in ("seated", "left")
        assert event.data == b'{"number":4711}'

    test()
    with pytest.raises(ValueError, match="at least one event type"):
        new_events()


def test_not_a_number_is_made_storable() -> None:
    @given(st.data())
    def test(data: st.DataObject) -> None:
        inner = data.draw(payloads(placed)).inner
        assert inner is None or math.isfinite(inner.ratio)

    test()


def test_types_that_no_store_would_open_with_are_refused_at_once() -> None:
    with pytest.raises(EventDefinitionError, match="listed twice"):
        event_contract_tests([placed, placed])


@pytest.mark.parametrize(
    ("name", "folder"),
    [("a/b", "a%2Fb"), ("..", "%2E%2E"), (".hidden", "%2Ehidden"), ("größe", "gr%C3%B6%C3%9Fe"), ("a\\b", "a%5Cb")],
)
def test_a_name_is_no_path(name: str, folder: str) -> None:
    from hindsight_fast.golden import path_of

    assert path_of(Path("golden"), EventType(name, (dict,)), 0) == Path("golden") / folder / "0.json"


def test_a_long_name_has_a_folder_of_its_own_that_file_systems_take(tmp_path: Path) -> None:
    from hindsight_fast.golden import folder_of

    long_names = ["ä" * 499 + last for last in "ab"]
    folders = {folder_of(tmp_path, EventType(name, (dict,))) for name in long_names}
    assert len(folders) == 2
    for folder in folders:
        folder.mkdir()


# --- The plugin -------------------------------------------------------------------------------------------------------


def run_python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_plugin_loads_neither_driver_nor_core_nor_pytest() -> None:
    code = (
        "import sys, pytest_hindsight_fast\n"
        "print([name for name in sys.modules if name.startswith(('psycopg', 'hindsight_fast', 'pytest.', 'msgspec'))])"
    )
    assert run_python(code) == "[]\n"


def test_the_package_loads_neither_pytest_nor_hypothesis() -> None:
    code = "import sys, hindsight_fast\nprint([name for name in ('pytest', 'hypothesis') if name in sys.modules])"
    assert run_python(code) == "[]\n"


def test_without_hypothesis_the_kit_says_what_to_install() -> None:
    code = (
        "import sys\nsys.modules['hypothesis'] = None\n"
        "try:\n    import hindsight_fast.testing\nexcept ImportError as error:\n    print(error)"
    )
    assert "pip install 'hindsight-fast[testing]'" in run_python(code)


def test_the_entry_point_names_the_plugin() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points.pytest11]\npytest_hindsight_fast = "pytest_hindsight_fast"\n' in text
    assert (ROOT / "src" / "pytest_hindsight_fast.py").exists()
