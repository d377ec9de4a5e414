"""Query results made by hand in libpq's own memory: whatever a server might answer, without a server."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

PGRES_TUPLES_OK = 2


class _Attribute(ctypes.Structure):
    """PGresAttDesc of libpq-fe.h."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("tableid", ctypes.c_uint),
        ("columnid", ctypes.c_int),
        ("format", ctypes.c_int),
        ("typid", ctypes.c_uint),
        ("typlen", ctypes.c_int),
        ("atttypmod", ctypes.c_int),
    ]


class LibpqResult:
    """A PGresult of these rows (None is NULL), as much of a psycopg ``pq.PGresult`` as a batch needs.

    *library* is a shared object that depends on libpq. ``clear`` frees it, as psycopg's does.
    """

    def __init__(
        self, library: str, rows: Sequence[Sequence[bytes | None]], formats: Sequence[int] = (1,) * 11
    ) -> None:
        self._libpq = libpq = ctypes.CDLL(library)
        libpq.PQmakeEmptyPGresult.restype = ctypes.c_void_p
        for name in ("PQsetResultAttrs", "PQsetvalue", "PQclear", "PQntuples", "PQnfields", "PQfformat"):
            getattr(libpq, name).argtypes = None
        self.pgresult_ptr: int | None = libpq.PQmakeEmptyPGresult(None, PGRES_TUPLES_OK)
        attributes = (_Attribute * len(formats))(*((b"c", 0, 0, each, 0, -1, -1) for each in formats))
        assert libpq.PQsetResultAttrs(self._pointer, len(formats), attributes) == 1
        for row_no, row in enumerate(rows):
            for column, value in enumerate(row):
                size = -1 if value is None else len(value)
                assert libpq.PQsetvalue(self._pointer, row_no, column, value, size) == 1

    @property
    def _pointer(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.pgresult_ptr)

    def clear(self) -> None:
        if self.pgresult_ptr is not None:
            self._libpq.PQclear(self._pointer)
            self.pgresult_ptr = None

    def __del__(self) -> None:
        self.clear()
