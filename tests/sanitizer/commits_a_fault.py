"""A test that passes, unless a sanitizer watches: for sanitizer_bites.py, which expects the run to fail."""

import os

import faults


def test_a_fault_is_reported() -> None:
    name, _, argument = os.environ["FAULT"].rstrip(")").partition("(")
    getattr(faults, name)(int(argument))
