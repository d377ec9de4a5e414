"""A check for memory that is kept, by Python objects or by the core's own allocations."""

import gc
import sys
import tracemalloc
from collections.abc import Callable

# CPython keeps up to 4,096 names in its type cache: every new str that names a method ("utcoffset", which datetime.c
# makes anew for each call) looks like a leak of 58 bytes until the cache is full.
clear_type_cache = sys._clear_internal_caches if sys.version_info >= (3, 13) else sys._clear_type_cache

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
            before = _traced_bytes()
            for _ in range(CALLS_PER_WINDOW):
                call()
            growths.append((_traced_bytes() - before) // CALLS_PER_WINDOW)
    finally:
        tracemalloc.stop()
    return max(0, min(growths))


def _traced_bytes() -> int:
    gc.collect()
    clear_type_cache()
    current, _peak = tracemalloc.get_traced_memory()
    return current
