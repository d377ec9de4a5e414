"""``pytest --benchmark``: it keeps out of plain test runs, sees a slowdown, and prints no number without its check."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
HAS_PLUGIN = importlib.util.find_spec("pytest_benchmark") is not None
needs_plugin = pytest.mark.skipif(not HAS_PLUGIN, reason="needs pytest-benchmark: pip install 'hindsight-fast[bench]'")
WITHOUT_PLUGIN = ["-p", "no:benchmark"] if HAS_PLUGIN else []

STAND_IN = """
import os, time

def bench_stand_in(benchmark):
    benchmark.pedantic(time.sleep, args=(float(os.environ["STAND_IN_SECONDS"]),), rounds=5)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small project with the flag, a test and a benchmark."""
    shutil.copy(ROOT / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = tests\nfilterwarnings = error\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_stand_in.py").write_text("def test_stand_in(): pass\n")
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "bench_stand_in.py").write_text(STAND_IN)
    return tmp_path


def run_pytest(folder: Path, *arguments: str, seconds: float = 0.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment["STAND_IN_SECONDS"] = str(seconds)
    # From the checkout, whatever folder the tests were started in.
    environment["PYTHONPATH"] = str(ROOT / "src")
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def names_in(output: str) -> set[str]:
    return {line for line in output.splitlines() if "::" in line}


# --- Nothing of bench/ without the flag, nothing else with it ---------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["."], ["tests"]], ids=str)
@pytest.mark.parametrize("plugin", [[], WITHOUT_PLUGIN], ids=["with plugin", "without"])
def test_without_the_flag_no_benchmark_is_collected(project, plugin, arguments):
    done = run_pytest(project, "--collect-only", "-q", *plugin, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert names_in(done.stdout) == {"tests/test_stand_in.py::test_stand_in"}


def test_without_the_flag_a_named_benchmark_is_an_error_that_says_so():
    done = run_pytest(ROOT, "--collect-only", "-q", "bench/bench_cursor.py::bench_sort")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "bench/ is run with --benchmark only" in done.stderr


@needs_plugin
@pytest.mark.parametrize("arguments", [[], ["."], ["bench"], ["bench/bench_stand_in.py"]], ids=str)
def test_with_the_flag_only_benchmarks_are_collected(project, arguments):
    done = run_pytest(project, "--benchmark", "--collect-only", "-q", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert names_in(done.stdout) == {"bench/bench_stand_in.py::bench_stand_in"}


@needs_plugin
def test_the_project_s_own_benchmarks_are_found():
    done = run_pytest(ROOT, "--benchmark", "--collect-only", "-q")
    assert done.returncode == 0, done.stdout + done.stderr
    names = names_in(done.stdout)
    assert "bench/bench_import.py::bench_import_demo" in names
    assert all(name.startswith("bench/") for name in names)


@pytest.mark.parametrize("arguments", [[], ["--benchmark-json=results.json"]], ids=str)
def test_a_missing_plugin_is_named(project, arguments):
    done = run_pytest(project, *WITHOUT_PLUGIN, "--benchmark", *arguments)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "pip install 'hindsight-fast[bench]'" in done.stderr


# --- A slowdown is noticed ------------------------------------------------------------------------------------------


@needs_plugin
@pytest.mark.parametrize("slowed", [False, True], ids=["as fast as before", "slowed"])
def test_the_comparison_fails_exactly_when_something_became_slower(project, slowed):
    first = run_pytest(project, "--benchmark", "--benchmark-save=before", seconds=0.05)
    assert first.returncode == 0, first.stdout + first.stderr

    watch = ["--benchmark-compare=0001", "--benchmark-compare-fail=median:100%"]
    second = run_pytest(project, "--benchmark", *watch, seconds=0.2 if slowed else 0.05)

    assert (second.returncode != 0) is slowed, second.stdout + second.stderr
    assert ("Performance has regressed" in second.stderr) is slowed


# --- No number without a right answer -------------------------------------------------------------------------------


@pytest.fixture
def bench_module(monkeypatch):
    """A function that imports a module of bench/, for this test only."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


class StandInBenchmark:
    """As much of pytest-benchmark's fixture as ``compare`` uses."""

    def __init__(self) -> None:
        self.extra_info: dict[str, object] = {}
        self.has_error = False

    def pedantic(self, run, *, setup, teardown, rounds):
        for _ in range(rounds):
            setup()
            run()
            teardown()


def honest(answer):
    assert answer == 42, "the answer is not 42"


@pytest.fixture
def comparison(bench_module):
    """A function that compares contenders with these answers, the first one ours, and reports on it.

    Returns the benchmark, the report's line for each contender, and what was raised.
    """
    contenders, report = bench_module("contenders"), bench_module("report")

    def compare(*answers, verify_last=lambda: None):
        rivals = [
            contenders.Contender(f"contender {number}", each.__next__, 1_234_567, honest)
            for number, each in enumerate(map(iter, answers))
        ]
        rivals[-1] = replace(rivals[-1], verify=verify_last)
        benchmark, raised = StandInBenchmark(), None
        try:
            contenders.compare(benchmark, *rivals, rounds=3, unit="events", checked="the answer", warm_up=False)
        except AssertionError as error:
            raised = error
        run = {"benchmarks": [{"fullname": "bench/bench_x.py::bench_x", "extra_info": benchmark.extra_info}]}
        lines = report.report_of(run, "./dev bench").splitlines()
        return benchmark, [line for line in lines if line.startswith("| contender")], raised

    return compare


def test_right_answers_get_numbers(comparison):
    _, lines, raised = comparison([42] * 3, [42] * 3)
    assert raised is None
    assert all("no number" not in line and "(" in line for line in lines)


@pytest.mark.parametrize("answers", [[41, 42, 42], [42, 42, 41]], ids=["the first wrong", "the last wrong"])
def test_a_rival_with_one_wrong_answer_gets_no_number(comparison, answers):
    _, lines, raised = comparison([42] * 3, answers)
    assert raised is None
    assert "no number" not in lines[0]
    assert lines[1] == "| contender 1 | 1,234,567 | no number: the answer is not 42 |  |  |"


def test_a_rival_that_fails_the_thorough_check_gets_no_number(comparison):
    def verify():
        raise AssertionError("row 17 differs")

    _, lines, _ = comparison([42] * 3, [42] * 3, verify_last=verify)
    assert lines[1] == "| contender 1 | 1,234,567 | no number: row 17 differs |  |  |"


@pytest.mark.parametrize("answers", [[41, 42, 42], [42, 42, 41]], ids=["the first wrong", "the last wrong"])
def test_ours_when_wrong_gets_no_number_and_fails(comparison, answers):
    benchmark, lines, raised = comparison(answers, [42] * 3)
    assert "the answer is not 42" in str(raised)
    assert benchmark.has_error  # so pytest-benchmark leaves it out of its file
    assert "no number" in lines[0]
    assert lines[1].endswith("|  |")  # no ratio to what has no number


# --- What a caller waits ----------------------------------------------------------------------------------------------


@pytest.fixture
def latency_report(bench_module):
    """A function that reports on contenders whose every turn notes these latencies, in seconds, the first one ours."""
    contenders, report = bench_module("contenders"), bench_module("report")

    def compare(*latencies):
        rivals = []
        for number, turns in enumerate(map(iter, latencies)):
            noted: list[float] = []
            rivals.append(
                contenders.Contender(
                    f"contender {number}",
                    lambda noted=noted, turns=turns: noted.extend(next(turns)),
                    10,
                    latencies=noted,
                )
            )
        benchmark = StandInBenchmark()
        contenders.compare(benchmark, *rivals, rounds=2, unit="events", checked="nothing")
        run = {"benchmarks": [{"fullname": "bench/bench_x.py::bench_x", "extra_info": benchmark.extra_info}]}
        return report.report_of(run, "./dev bench")

    return compare


def test_latencies_are_compared_turn_by_turn_without_the_warm_up(latency_report):
    text = latency_report([[9.0] * 50, [0.002] * 50, [0.004] * 50], [[9.0] * 50, [0.004] * 50, [0.004] * 50])
    assert "| contender 0 | 3.00 (2.00 to 4.00) | 3.00 (2.00 to 4.00) |  |  |" in text
    assert (
        "| contender 1 | 4.00 (4.00 to 4.00) | 4.00 (4.00 to 4.00) | 0.75 (0.50 to 1.00) | 0.75 (0.50 to 1.00) |"
        in text
    )


def test_a_longer_wait_than_a_rival_s_is_listed_as_lost(latency_report):
    few_waited = [0.001] * 90 + [0.1] * 10
    text = latency_report([few_waited] * 3, [[0.001] * 100] * 3)
    lost = text.partition("## Where we lose")[2].partition("\n## ")[0]
    assert "p99 of the latency, ours ÷ theirs 100.00" in lost
    assert "p50" not in lost


def test_nobody_timed_one_by_one_means_no_table_of_latencies(latency_report):
    assert "Latency" not in latency_report([[]] * 3, [[]] * 3)
