"""docs/events.md: its programs do what they say, one after the other, in one folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "docs" / "events.md").read_text(encoding="utf-8")
FILES = re.findall(r'^```python title="([^"]+)"\n(.*?)^```$', GUIDE, re.DOTALL | re.MULTILINE)


@pytest.fixture
def run(tmp_path: Path, database: str):
    def run(*command: str) -> str:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
            "PYTHONPATH": str(ROOT / "src"),
            "HINDSIGHT_DATABASE_URL": database,
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }
        command = (sys.executable, "-W", "error", *command)
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_the_guide_from_its_first_event_to_its_golden_files(tmp_path: Path, run) -> None:
    assert [name for name, _ in FILES] == ["events.py", "program.py", "events.py", "test_events.py"]
    (_, first), (_, program), (_, second), (_, tests) = FILES
    (tmp_path / "events.py").write_text(first)
    (tmp_path / "program.py").write_text(program)
    assert re.fullmatch(r"\d+:0 0 Ada\n", run("program.py"))
    (tmp_path / "events.py").write_text(second)
    changed_program = program.replace("datetime.now(UTC))", 'datetime.now(UTC), "b@c")').replace('"Ada"', '"Bob"')
    (tmp_path / "program.py").write_text(changed_program)
    assert re.fullmatch(r"\d+:0 0 Ada\n\d+:0 1 Bob\n", run("program.py"))
    (tmp_path / "test_events.py").write_text(tests)
    pytest_run = ("-m", "pytest", "-q", "-p", "pytest_hindsight_fast", "-p", "no:cacheprovider")
    assert "5 passed" in run(*pytest_run, "--hindsight-update-golden")
    assert sorted(path.name for path in (tmp_path / "golden" / "user_registered").iterdir()) == ["0.json", "1.json"]
    assert "5 passed" in run(*pytest_run)
