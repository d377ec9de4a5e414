"""The sanitizers are trusted because they have fired: run first by `./dev sanitize`, and by nothing else.

(Its name keeps it out of ordinary runs: there is nothing to see without a sanitizer build.)
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hindsight_fast import _core

ROOT = Path(__file__).resolve().parents[2]

FAULTS = {
    "read_past_the_heap(40)": "AddressSanitizer: heap-buffer-overflow",
    "write_past_the_heap(40)": "AddressSanitizer: heap-buffer-overflow",
    "overflow(4611686018427387904)": "runtime error: signed integer overflow",
    "shift(40)": "runtime error: shift exponent 40 is too large",
}


def test_the_core_is_the_sanitized_one() -> None:
    built = Path(_core.__file__)
    assert built.is_relative_to(ROOT / "build" / "sanitize")
    code = built.read_bytes()
    # What a heap overflow and a signed overflow call; `abort`: nothing goes on behind a report.
    for name in (b"__asan_report_load8", b"__asan_report_store8", b"__ubsan_handle_add_overflow_abort"):
        assert name in code
    # Python's own small blocks come from arenas, in which nobody notices a byte too many.
    assert os.environ["PYTHONMALLOC"] == "malloc"


@pytest.mark.parametrize("call", FAULTS)
def test_a_fault_ends_the_process_with_a_report(call: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import faults; faults.{call}"], capture_output=True, text=True)
    assert done.returncode != 0
    assert FAULTS[call] in done.stderr


def test_what_is_right_is_not_reported() -> None:
    program = "import faults; assert faults.nothing_wrong(40) == 39; assert faults.overflow(2**61) == 2**62"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("call", FAULTS)
def test_a_fault_in_a_test_fails_the_verb(call: str) -> None:
    environment = {**os.environ, "FAULT": call}
    environment.pop("LD_PRELOAD")  # for the shell, the compiler and what else the verb starts
    command = [str(ROOT / "dev"), "sanitize", "tests/sanitizer/commits_a_fault.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    assert done.returncode not in (0, 5)  # 5: pytest found no test
    assert FAULTS[call] in done.stderr + done.stdout
