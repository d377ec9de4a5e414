"""The pytest option that ``hindsight_fast.testing`` looks at.

A module beside the package, not in it: pytest loads it in every run of every project that has hindsight_fast installed,
and must not load psycopg and the compiled core for it.

PYTEST_DONT_REWRITE: it holds no assertion, and a pytest inside of a pytest would warn that it is imported already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("hindsight").addoption(
        "--hindsight-update-golden",
        action="store_true",
        default=False,
        help="write the golden files of hindsight_fast's event contract tests anew; look at them before you commit",
    )
