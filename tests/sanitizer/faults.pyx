# cython: language_level=3
"""C that is wrong on purpose, one mistake a function; see sanitizer_bites.py. Never part of a wheel.

What each mistake needs comes in as an argument: a compiler that sees the numbers would report it, or leave it out.
"""

from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc


def nothing_wrong(Py_ssize_t size):
    return touch(size, size - 1, False)


def read_past_the_heap(Py_ssize_t size):
    return touch(size, size, False)


def write_past_the_heap(Py_ssize_t size):
    return touch(size, size, True)


def overflow(int64_t number):
    return number + number


def shift(int distance):
    cdef int one = 1
    return one << distance


cdef int touch(Py_ssize_t size, Py_ssize_t at, bint write) except -1:
    cdef unsigned char *block = <unsigned char *>malloc(size)
    cdef Py_ssize_t i
    cdef int found
    for i in range(size):
        block[i] = <unsigned char>i
    if write:
        block[at] = 7
    found = block[at]
    free(block)
    return found
