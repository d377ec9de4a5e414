"""The command line as tests call it: inside this process, or as one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hindsight_fast.cli import commands

NAMED_BY_ENVIRONMENT = (
    "HINDSIGHT_DATABASE_URL",
    "DATABASE_URL",
    "PGHOST",
    "PGHOSTADDR",
    "PGPORT",
    "PGDATABASE",
    "PGUSER",
)


def forget_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take out of the environment whatever names a database."""
    for name in (*NAMED_BY_ENVIRONMENT, "PGSERVICE", "PGSERVICEFILE", "PGPASSWORD", "HINDSIGHT_DEBUG"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments: str, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(commands, arguments, input=stdin, catch_exceptions=False)


@contextmanager
def started(
    *arguments: str, environment: dict[str, str] | None = None, **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """The command as a process of its own, which is gone afterwards."""
    inherited = {**os.environ, **(environment or {})}
    process = subprocess.Popen(
        [sys.executable, "-c", "from hindsight_fast.cli import main; main()", *arguments],
        env={**inherited, "PYTHONPATH": os.pathsep.join(sys.path)},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def run_apart(*arguments: str, **options: Any) -> tuple[int, bytes, str]:
    """Run the command as a process of its own; return its exit code, stdout and stderr."""
    with started(*arguments, **options) as process:
        stdout, stderr = process.communicate(timeout=60)
        return process.returncode, stdout, "" if stderr is None else stderr.decode()
