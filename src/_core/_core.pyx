# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: auto_pickle=False, autotestdict=False
"""The compiled core: bytes and Python objects in, bytes and Python objects out; no I/O, no psycopg, no network.

The parts, in reading order: what a position is, how bytes are read and written, rows going in, rows coming out, lines
made of them, what an import's line must not hold, and rows made of lines.
Their plain Python twins are the oracle of the tests and are not shipped.
"""

cimport cython
from cpython cimport datetime as c_datetime
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.number cimport PyNumber_AsSsize_t
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from cpython.object cimport Py_EQ, Py_GE, Py_GT, Py_LE, Py_LT, Py_NE, PyTypeObject
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int16_t, int32_t, int64_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memchr, memcmp, memcpy

from datetime import datetime, timedelta, timezone
from os import fsencode
from types import GenericAlias
from uuid import UUID, SafeUUID
from zlib import crc32

from msgspec import MsgspecError
from msgspec.json import Decoder as JsonDecoder

from hindsight_fast.errors import EventParseError, MalformedRow

__all__ = [
    "COPY_HEADER",
    "COPY_TRAILER",
    "EVENT_COLUMNS",
    "Cursor",
    "EventBatch",
    "EventRows",
    "LineEncoder",
    "RecordedEvent",
    "ResultReader",
    "check_fields",
    "count_newlines",
    "decode_result",
    "decode_row",
    "export_lines",
    "group_parameters",
    "int_array",
    "row_values",
    "time_ordered_uuid",
]

c_datetime.import_datetime()

include "cursor.pxi"
include "wire.pxi"
include "encode_rows.pxi"
include "append_group.pxi"
include "decode_rows.pxi"
include "export_lines.pxi"
include "line_fields.pxi"
include "import_lines.pxi"
