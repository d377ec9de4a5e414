"""``hindsight import`` and its options: jobs, dry run, bad lines set aside, the rate, and what --json says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hindsight_fast import EventStore, cli_common
from hindsight_fast.cli import commands


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """100 events in 9 streams, and two bad lines behind the 40th."""
    lines = [b'{"stream":"s%d","type":"t","data":{"n":%d}}' % (n % 9, n) for n in range(100)]
    lines[40:40] = [b"hello", b'{"stream":"s","type":"t","data":7}']
    path = tmp_path / "events.ndjson"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def run(*arguments: str | Path, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(commands, ["import", *map(str, arguments)], input=stdin, catch_exceptions=False)


@pytest.mark.parametrize("jobs", ["1", "4", "12"])
def test_bad_lines_go_aside_and_the_report_counts_them(
    database: str, store: EventStore, file: Path, tmp_path: Path, jobs: str
) -> None:
    """With more jobs, too, than a store usually has connections."""
    aside = tmp_path / "bad"
    result = run(file, "--jobs", jobs, "--on-error", aside, "--json", "--dsn", database)
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert (report["events"], report["bad_lines"], report["lines"], report["new_streams"]) == (100, 2, 102, 9)
    assert report["projected_seconds"] is None
    assert aside.read_bytes() == b'hello\n{"stream":"s","type":"t","data":7}\n'
    assert [json.loads(each)["line_no"] for each in Path(f"{aside}.reasons").read_bytes().splitlines()] == [41, 42]
    assert len(list(store.read())) == 100
    again = run(file, "--jobs", jobs, "--on-error", aside, "--dsn", database)
    assert again.exit_code == 0
    assert "0 events imported, 100 were there already" in again.stdout


def test_a_dry_run_says_what_an_import_would_do_and_stores_nothing(
    database: str, store: EventStore, file: Path, tmp_path: Path
) -> None:
    result = run(file, "--dry-run", "--on-error", tmp_path / "bad", "--json", "--dsn", database)
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert (report["events"], report["bad_lines"], report["first_cursor"]) == (100, 2, None)
    assert report["projected_seconds"] > 0
    text = run(file, "--dry-run", "--on-error", tmp_path / "bad", "--dsn", database)
    assert "100 events to import in about" in text.stdout
    assert "nothing was stored; 2 bad lines set aside" in text.stdout
    assert "new streams" not in text.stdout
    assert "checking" in text.stderr
    stopped = run(file, "--dry-run", "--dsn", database)
    assert stopped.exit_code == 3
    assert "line 41" in stopped.stderr
    assert store.head() is None


def test_one_bad_line_more_than_allowed_is_bad_data(
    database: str, store: EventStore, file: Path, tmp_path: Path
) -> None:
    aside = tmp_path / "bad"
    result = run(file, "--on-error", aside, "--max-errors", "1", "--dsn", database)
    assert result.exit_code == 3
    assert "line 42" in result.stderr
    assert "max_errors" in result.stderr
    assert run(file, "--on-error", aside, "--max-errors", "2", "--dsn", database).exit_code == 0
    assert len(list(store.read())) == 100


def test_standard_input_is_sharded(database: str, store: EventStore, file: Path, tmp_path: Path) -> None:
    result = run(
        "-", "--import-id", "piped", "--jobs", "3", "--on-error", tmp_path / "bad", "--json", "--dsn", database,
        stdin=file.read_bytes(),
    )  # fmt: skip
    assert json.loads(result.stdout)["events"] == 100


def test_the_rate_is_kept(database: str, store: EventStore, file: Path, tmp_path: Path) -> None:
    result = run(file, "--max-rate", "400", "--on-error", tmp_path / "bad", "--json", "--dsn", database)
    report = json.loads(result.stdout)
    assert report["events"] == 100
    assert report["seconds"] >= 0.25


@pytest.mark.parametrize(
    "options",
    [
        ("--jobs", "0"),
        ("--jobs", "65"),
        ("--max-errors", "1"),
        ("--max-errors", "-1", "--on-error", "bad"),
        ("--max-rate", "0"),
        ("--max-rate", "nan"),
        ("--max-rate", "inf"),
    ],
    ids=" ".join,
)
def test_wrong_values_are_wrong_usage(
    database: str, store: EventStore, file: Path, tmp_path: Path, options: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    result = run(file, *options, "--dsn", database)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert store.head() is None


def test_a_file_that_is_something_else_is_not_written_to(database: str, store: EventStore, file: Path) -> None:
    content = file.read_bytes()
    result = run(file, "--on-error", file, "--dsn", database)
    assert result.exit_code == 2
    assert "is no file of bad lines" in result.stderr
    assert file.read_bytes() == content


def test_ctrl_c_in_a_dry_run_does_not_speak_of_stored_events(
    database: str, store: EventStore, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_common.EventStore, "import_events", interrupted)
    result = run(file, "--dry-run", "--dsn", database)
    assert result.exit_code == 130
    assert "Nothing was stored." in result.stderr
    assert "stay so" not in result.stderr
