"""Run the benchmarks and write bench/results/report.md: ``./dev bench [pytest arguments]``.

Only what pytest-benchmark's JSON file holds gets into the report, and only what was found right: a contender whose
answer was wrong, and a benchmark that failed, stand there without a number. So that the report can be committed,
nothing in it names the machine it was made on, its users or its folders, nor the day.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from contenders import ratios

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "bench" / "results" / "report.md"
VARIABLES = ("HINDSIGHT_BENCH_EVENTS", "HINDSIGHT_BENCH_ROUNDS")


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="hindsight-bench-") as folder:
        given = [argument.partition("=")[2] for argument in arguments if argument.startswith("--benchmark-json=")]
        results = Path(given[-1] if given else Path(folder, "results.json"))
        command = [sys.executable, "-m", "pytest", "--benchmark", *arguments]
        if not given:
            command.append(f"--benchmark-json={results}")
        # Results of an earlier run must not pass for this one's.
        results.unlink(missing_ok=True)
        idle = [_idle_percent()]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        if not results.exists() or not results.stat().st_size:
            print("no report: nothing was measured", file=sys.stderr)
            return status or 1
        run = json.loads(results.read_text())
    run["idle"] = [*idle, _idle_percent()]
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(report_of(run, command_line(arguments)))
    print(f"wrote {REPORT.relative_to(ROOT)}")
    return status


def command_line(arguments: Sequence[str]) -> str:
    """How to run it again: with the same arguments, but for paths, which are this machine's."""
    variables = [f"{name}={os.environ[name]}" for name in VARIABLES if os.environ.get(name)]
    return shlex.join([*variables, "./dev", "bench", *(each for each in arguments if str(Path.home()) not in each)])


def report_of(run: dict[str, Any], command: str) -> str:
    """Return the report of *run*, the content of pytest-benchmark's JSON file, as Markdown."""
    facts = run.get("hindsight_fast", {})
    lines = ["# What the benchmarks measured", ""]
    lines += [f"To repeat: `{command}`.", ""]
    lines += [
        "Contenders take turns inside one run; every figure is the median of its turns, with the least and the most. A "
        "ratio is taken round by round, ours by theirs, so above 1 we are faster. Absolute figures drift by tens of "
        "percent from day to day; ratios are what counts. A contender whose answer was wrong gets no number.",
        "",
    ]
    if "idle" in run:
        before, after = run["idle"]
        lines += [
            f"Without the benchmarks the machine's processors were {before:.0f} % idle just before the run and "
            f"{after:.0f} % just after it. Well below 90 %, others took part: then do not trust these figures.",
            "",
        ]
    lines += _machine(run.get("machine_info", {}), facts)
    lines += _summary(run, facts)
    for benchmark in run["benchmarks"]:
        lines += ["", f"## {_title(benchmark['fullname'])}", ""]
        lines += _comparison(benchmark["extra_info"]) if "comparison" in benchmark["extra_info"] else []
        lines += _figures(benchmark["extra_info"]["figures"]) if "figures" in benchmark["extra_info"] else []
    return "\n".join(lines).rstrip() + "\n"


def _idle_percent(seconds: float = 3.0) -> float:
    """How much of all processors' time nobody wants, looked at for so many seconds."""

    def times() -> list[int]:
        return [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]

    before = times()
    time.sleep(seconds)
    passed = [later - earlier for earlier, later in zip(before, times(), strict=True)]
    return 100 * (passed[3] + passed[4]) / max(sum(passed), 1)  # idle, and waiting for a disk


def _machine(machine: dict[str, Any], facts: dict[str, Any]) -> Iterator[str]:
    cpu = machine.get("cpu", {})
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    kernel = ".".join(platform.release().split("-")[0].split(".")[:2])
    yield from ("| | |", "|---|---|")
    yield _row("processor", f"{cpu.get('brand_raw', machine.get('machine', 'unknown'))}, {os.cpu_count()} cores")
    yield _row("memory", f"{memory:.0f} GiB")
    yield _row("system", f"{platform.system()} {kernel}")
    if "disk" in facts:
        yield _row("the server's data", facts["disk"])
    for name, number in facts.get("versions", {}).items():
        yield _row(name, number)
    for title in ("durability", "settings"):
        if title in facts:
            settings = ", ".join(f"`{name} = {value}`" for name, value in facts[title].items())
            yield _row("settings that are not PostgreSQL's own" if title == "settings" else title, settings)


def _summary(run: dict[str, Any], facts: dict[str, Any]) -> Iterator[str]:
    targets, lost = [], []
    for benchmark in run["benchmarks"]:
        comparison = benchmark["extra_info"].get("comparison")
        if comparison is None or comparison["contenders"][0]["wrong"]:
            continue
        ours, *others = comparison["contenders"]
        for other in others:
            if other["wrong"]:
                continue
            ratio = _ratio(ours, other)
            name = f"{_title(benchmark['fullname'])}: {ours['name']} against {other['name']}"
            if other["target"] is not None:
                met = "met" if _middle(ours, other) >= other["target"] else "**missed**"
                targets.append(_row(name, f"≥ {other['target']}", ratio, met))
            if _middle(ours, other) < 1:
                lost.append(f"- {name}: {ratio}")
            for percentile in _shared_percentiles(ours, other):
                rounds = _latency_ratios(ours, other, percentile)
                if median(rounds) > 1:
                    lost.append(f"- {name}: {percentile} of the latency, ours ÷ theirs {_range(rounds)}")
    if targets:
        yield from ("", "## Targets", "", _row("", "target", "ratio: median (least to most)", ""), _row(*["---"] * 4))
        yield from targets
    if lost:
        yield from ("", "## Where we lose", "", *lost)
    if facts.get("failed"):
        yield from ("", "## Failed, so no number", "")
        yield from (f"- {_title(name)}: {_private(why)}" for name, why in facts["failed"].items())


def _comparison(extra: dict[str, Any]) -> Iterator[str]:
    comparison = extra["comparison"]
    ours = comparison["contenders"][0]
    unit = comparison["unit"]
    yield _row("", unit, "seconds: median (least to most)", f"{unit} a second", "ours ÷ this: median (least to most)")
    yield _row("---", "---:", "---:", "---:", "---:")
    for contender in comparison["contenders"]:
        if contender["wrong"] or not contender["seconds"]:
            why = f"no number: {_private(contender['wrong'])}" if contender["wrong"] else "no number: not measured"
            yield _row(contender["name"], f"{contender['items']:,}", why, "", "")
            continue
        seconds = contender["seconds"]
        rate = contender["items"] / median(seconds)
        is_comparable = contender is not ours and not ours["wrong"] and bool(ours["seconds"])
        yield _row(
            contender["name"],
            f"{contender['items']:,}",
            _spread(seconds),
            f"{float(f'{rate:.3g}'):,.0f}",
            _ratio(ours, contender) if is_comparable else "",
        )
    yield from ("", f"Rounds: {max(len(each['seconds']) for each in comparison['contenders'])}.")
    yield f"Checked: {comparison['checked']}."
    if comparison["note"]:
        yield comparison["note"]
    yield from _latencies(comparison["contenders"])


def _latencies(contenders: list[dict[str, Any]]) -> Iterator[str]:
    """What one caller waits; nothing if nobody measured it."""
    timed = [each for each in contenders if each.get("latencies")]
    if not timed:
        return
    ours = contenders[0]
    yield from ("", "Latency, in milliseconds: what a caller waits for one of them. Below 1, ours waits less.", "")
    yield _row("", "p50", "p99", "p50: ours ÷ this", "p99: ours ÷ this")
    yield _row("---", "---:", "---:", "---:", "---:")
    for contender in timed:
        milliseconds = [[1e3 * each for each in contender["latencies"][name]] for name in ("p50", "p99")]
        shared = _shared_percentiles(ours, contender) if contender is not ours else ()
        ratios_of_both = [_range(_latency_ratios(ours, contender, name)) for name in shared]
        yield _row(contender["name"], *map(_range, milliseconds), *(ratios_of_both or ["", ""]))


def _figures(figures: dict[str, Any]) -> Iterator[str]:
    yield _row(*figures["header"])
    yield _row("---", *["---:"] * (len(figures["header"]) - 1))
    yield from (_row(*row) for row in figures["rows"])
    yield from ("", f"Checked: {figures['checked']}.", figures["note"])


def _rounds(ours: dict[str, Any], other: dict[str, Any]) -> list[float]:
    return ratios(ours["seconds"], ours["items"], other["seconds"], other["items"])


def _middle(ours: dict[str, Any], other: dict[str, Any]) -> float:
    return median(_rounds(ours, other))


def _ratio(ours: dict[str, Any], other: dict[str, Any]) -> str:
    return _range(_rounds(ours, other))


def _shared_percentiles(ours: dict[str, Any], other: dict[str, Any]) -> Sequence[str]:
    return ("p50", "p99") if ours.get("latencies") and other.get("latencies") else ()


def _latency_ratios(ours: dict[str, Any], other: dict[str, Any], percentile: str) -> list[float]:
    return [a / b for a, b in zip(ours["latencies"][percentile], other["latencies"][percentile], strict=True)]


def _range(figures: Sequence[float]) -> str:
    return f"{median(figures):.2f} ({min(figures):.2f} to {max(figures):.2f})"


def _spread(seconds: list[float]) -> str:
    digits = 3 if median(seconds) < 1 else 2
    if median(seconds) < 0.1:
        digits = 4
    return f"{median(seconds):.{digits}f} ({min(seconds):.{digits}f} to {max(seconds):.{digits}f})"


def _title(name: str) -> str:
    """``bench/bench_read.py::bench_read_untouched`` is "read untouched"."""
    return name.rpartition("::")[2].removeprefix("bench_").replace("_", " ")


def _private(text: str) -> str:
    """*text* without paths: an error may quote some."""
    return " ".join("…" if "/" in word else word for word in text.split())


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
