"""The flag ``--benchmark``, which pytest-benchmark lacks: pytest then runs what lies in bench/, and nothing else.

Without it bench/ is never collected, and pytest-benchmark need not be installed. Beside it that plugin's own options
work: ``--benchmark-json``, ``--benchmark-autosave``, ``--benchmark-compare``, ``--benchmark-compare-fail=median:10%``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

import pytest

BENCH = Path(__file__).resolve().parent / "bench"


class _MissingPlugin(argparse.Action):
    """Stands in for the flag: says what is missing while the options are read, before one is called unknown."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(nargs=0, **settings)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        parser.error("--benchmark needs the plugin pytest-benchmark: pip install 'hindsight-fast[bench]'")


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    has_plugin = pluginmanager.hasplugin("benchmark")
    parser.addoption(
        "--benchmark",
        action="store_true" if has_plugin else _MissingPlugin,
        default=False,
        help="run the benchmarks in bench/, and nothing else (needs pytest-benchmark)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.benchmark:
        if config.args_source is config.ArgsSource.ARGS and any(map(_is_in_bench, config.args)):
            raise pytest.UsageError("bench/ is run with --benchmark only")
        return
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")
    # That the compared run is another machine's is worth a line, not the end of this run.
    config.addinivalue_line("filterwarnings", "default::pytest_benchmark.logger.PytestBenchmarkWarning")
    if config.args_source is not config.ArgsSource.ARGS:
        config.args[:] = [str(BENCH)]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if not config.option.benchmark:
        return True if collection_path.is_relative_to(BENCH) else None
    return None if collection_path.is_relative_to(BENCH) or BENCH.is_relative_to(collection_path) else True


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Leave out the host's name, and today's clock rate: with it no run would be of the same machine as another."""
    machine_info.pop("node", None)
    for name in [name for name in machine_info.get("cpu", {}) if name.startswith("hz_actual")]:
        del machine_info["cpu"][name]


def _is_in_bench(argument: str) -> bool:
    return Path(argument.partition("::")[0]).resolve().is_relative_to(BENCH)
