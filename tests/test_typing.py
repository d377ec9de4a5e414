"""What a type checker makes of events: the last version's class is what ``event.payload`` is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PROGRAM = """
from collections.abc import Iterator
from dataclasses import dataclass
from hindsight_fast import EventType, NewEvent, RecordedEvent

@dataclass
class UserV0:
    name: str

@dataclass
class UserV1:
    name: str
    email: str

@dataclass
class User:
    name: str
    email: str
    age: int | None

one = EventType("one", (User,))
many = EventType(
    "many", versions=(UserV0, UserV1, User),
    upcasts=[lambda v0: UserV1(v0.name, ""), lambda v1: User(v1.name, v1.email, None)],
)
reveal_type(one)
reveal_type(many)
reveal_type(many.decode(0, b"{}"))
reveal_type(many.payload_type)
reveal_type(many(User("", "", 1)))

def handle(event: RecordedEvent[User], anything: RecordedEvent) -> None:
    reveal_type(event.payload)
    reveal_type(anything.payload)
    event.payload.age
    event.payload.wrong  # error: "User" has no attribute "wrong"  [attr-defined]

many(UserV0(""))  # error: has incompatible type "UserV0"; expected "User"  [arg-type]
many.decode(0, b"{}").nmae  # error: "User" has no attribute "nmae"  [attr-defined]
EventType("none", ())  # error: incompatible type "tuple[()]"; expected
"""

REVEALED = [
    "hindsight_fast.events.EventType[program.User]",
    "hindsight_fast.events.EventType[program.User]",
    "program.User",
    "type[program.User]",
    "hindsight_fast.events.NewEvent",
    "program.User",
    "Any",
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What mypy says of the program, a line each, beginning with the line's number."""
    folder = tmp_path_factory.mktemp("typing")
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-error-summary", "program.py"]
    # The cache of the checkout's own runs: without it psycopg alone takes mypy ten seconds.
    command += [f"--cache-dir={ROOT / '.mypy_cache' / 'tests'}"]
    environment = {"MYPYPATH": str(ROOT / "src"), "PATH": ""}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stderr == ""
    return [line.removeprefix("program.py:") for line in done.stdout.splitlines()]


def test_the_last_class_is_what_code_sees(answers: list[str]) -> None:
    revealed = [line.split('"')[1] for line in answers if "Revealed type" in line]
    assert revealed == REVEALED


def test_wrong_attributes_and_classes_are_caught_and_nothing_else(answers: list[str]) -> None:
    expected = {
        number: line.split("# error: ")[1] for number, line in enumerate(PROGRAM.splitlines(), 1) if "# error: " in line
    }
    found = {int(line.split(":")[0]): line for line in answers if ": error: " in line}
    assert set(found) == set(expected), answers
    for number, message in expected.items():
        assert message in found[number]
