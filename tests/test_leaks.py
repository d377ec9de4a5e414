"""The leak check is trusted because it has fired."""

import ctypes

from leaks import kept_bytes


def test_the_check_sees_a_kept_object():
    kept = []
    assert kept_bytes(lambda: kept.append(bytes(100))) >= 100


def test_the_check_sees_a_lost_reference():
    def lose_a_reference():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(object()))

    assert kept_bytes(lose_a_reference) >= 16


def test_the_check_sees_memory_that_no_object_owns():
    allocate = ctypes.pythonapi.PyMem_Malloc
    allocate.argtypes, allocate.restype = [ctypes.c_size_t], ctypes.c_void_p
    assert kept_bytes(lambda: allocate(40)) >= 40


def test_the_check_lets_a_cache_pass_that_grows_once():
    cache = {}

    def fill_once():
        if len(cache) < 700:
            cache[len(cache)] = bytes(50)

    assert kept_bytes(fill_once) == 0


def test_the_check_lets_a_cycle_pass():
    def make_a_cycle():
        cycle = []
        cycle.append(cycle)

    assert kept_bytes(make_a_cycle) == 0
