"""What the tests of exports share."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from hindsight_fast import EventStore


def exported(store: EventStore, **selection: Any) -> bytes:
    target = io.BytesIO()
    count = store.export_events(target, **selection)
    assert target.getvalue().count(b"\n") == count
    return target.getvalue()


def parts_in(folder: Path) -> list[Path]:
    return list(folder.glob("*.part"))
