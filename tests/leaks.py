"""A check for memory that is kept, by Python objects or by the core's own allocations."""

import gc
import tracemalloc
from collections.abc import Callable

WINDOWS = 5
CALLS_PER_WINDOW = 400


def kept_bytes(call: Callable[[], object]) -> int:
    """Return how many bytes each *call* keeps; 0 if it is less than one byte a call.

    A leak adds up with every call, in every window; what grows once (a cache, a list) shows in some and not in others:
    the window that grew least decides. tracemalloc sees every object and everything from PyMem_Malloc, which is all
    that the core allocates.
    """
    growths = []
    for _ in range(200):  # fill caches and freelists
        call()
    tracemalloc.start()
    try:
        for _ in range(50):  # objects that replace untraced ones in the caches are counted from here on
            call()
        for _ in range(WINDOWS):
            gc.collect()
            before, _peak = tracemalloc.get_traced_memory()
            for _ in range(CALLS_PER_WINDOW):
                call()
            gc.collect()
            after, _peak = tracemalloc.get_traced_memory()
            growths.append((after - before) // CALLS_PER_WINDOW)
    finally:
        tracemalloc.stop()
    return max(0, min(growths))
