"""The README's promises that a machine can check."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hindsight_fast import EventStore

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


@pytest.mark.essential
def test_the_first_program_runs_as_printed_and_prints_what_it_says() -> None:
    (program,) = blocks("python")
    (printed,) = blocks("text")
    assert len(program.splitlines()) <= 16
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == (printed, "")


def test_the_line_of_an_import_is_one(database: str) -> None:
    (line,) = blocks("json")
    with EventStore(database) as store:
        store.create_schema()
        store.import_events([line.encode()], import_id="readme")
        (event,) = store.read()
    assert event.payload == {"total": 12}
    assert event.metadata == {}


def test_the_places_it_names_are_there() -> None:
    for place in re.findall(r"^\| `([^`]+)` \|", README, re.MULTILINE):
        assert (ROOT / place).exists(), place
    assert (ROOT / "bench/results/report.md").exists()
    assert (ROOT / "dev").stat().st_mode & 0o111
