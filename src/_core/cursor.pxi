# A position in the one total order of all events.

cdef extern from "Python.h":
    void PyType_Modified(PyTypeObject *)
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL

cdef object MAX_TRANSACTION_NO = 2**63 - 1
cdef object MAX_SEQUENCE_NO = 2**31 - 1


cdef int check_part(object value, object maximum, str name) except -1:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if not 0 <= value <= maximum:
        raise ValueError(f"{name} must lie between 0 and {maximum}, not {value}")
    return 0


cdef object parse_part(str digits, str text):
    # Only what str() writes: one text per cursor, so that a stored or compared text is as good as the cursor.
    if not (digits.isascii() and digits.isdigit()) or (digits[0] == "0" and len(digits) > 1):
        raise ValueError(f"not a cursor: {text!r} (expected '<transaction_no>:<sequence_no>', as in '812:3')")
    return int(digits)


@cython.final
@cython.freelist(1024)
cdef class Cursor:
    """A place in the total order of all events: ``(transaction_no, sequence_no)``, compared in that order.

    Both parts are non-negative: ``transaction_no`` below 2**63, ``sequence_no`` below 2**31. Immutable, hashable,
    picklable. ``Cursor.BEGINNING`` stands before every event.
    """

    cdef readonly int64_t transaction_no
    cdef readonly int32_t sequence_no
    cdef bint made

    __match_args__ = ("transaction_no", "sequence_no")
    BEGINNING = None  # set below: a class body cannot make an instance of itself

    def __init__(self, transaction_no, sequence_no):
        if self.made:
            raise TypeError("a Cursor is immutable")
        check_part(transaction_no, MAX_TRANSACTION_NO, "transaction_no")
        check_part(sequence_no, MAX_SEQUENCE_NO, "sequence_no")
        self.transaction_no = transaction_no
        self.sequence_no = sequence_no
        self.made = True

    def __richcmp__(self, other, int op):
        cdef int order
        if type(other) is not Cursor:
            return NotImplemented
        order = compare_cursors(self, <Cursor>other)
        if op == Py_LT:
            return order < 0
        if op == Py_LE:
            return order <= 0
        if op == Py_EQ:
            return order == 0
        if op == Py_NE:
            return order != 0
        if op == Py_GT:
            return order > 0
        return order >= 0

    def __hash__(self):
        # One multiply and shift (the finaliser of splitmix64): neighbours in a transaction must not share buckets.
        cdef uint64_t mixed = <uint64_t>self.transaction_no * 0x9E3779B97F4A7C15ULL + <uint64_t>self.sequence_no
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9ULL
        cdef int64_t result = <int64_t>(mixed ^ (mixed >> 31))
        return -2 if result == -1 else result

    def __repr__(self):
        return f"Cursor({self.transaction_no}, {self.sequence_no})"

    def __str__(self):
        return f"{self.transaction_no}:{self.sequence_no}"

    def __reduce__(self):
        return Cursor, (self.transaction_no, self.sequence_no)

    @staticmethod
    def parse(text):
        """Read what ``str(cursor)`` wrote, as in ``"812:3"``. Raises ValueError for anything else."""
        if not isinstance(text, str):
            raise TypeError(f"a cursor is parsed from str, not {type(text).__name__}")
        transaction_no, colon, sequence_no = (<str>text).partition(":")
        if not (transaction_no and sequence_no):
            raise ValueError(f"not a cursor: {text!r} (expected '<transaction_no>:<sequence_no>', as in '812:3')")
        return Cursor(parse_part(transaction_no, text), parse_part(sequence_no, text))

    def to_dict(self):
        """Return ``{"transaction_no": ..., "sequence_no": ...}``, ready for JSON."""
        return {"transaction_no": self.transaction_no, "sequence_no": self.sequence_no}

    @staticmethod
    def from_dict(parts):
        """Make a cursor of what ``to_dict`` returned. Raises ValueError for missing or surplus keys."""
        if set(parts) != {"transaction_no", "sequence_no"}:
            raise ValueError(f"a cursor has the keys transaction_no and sequence_no, not {sorted(map(str, parts))}")
        return Cursor(parts["transaction_no"], parts["sequence_no"])


cdef inline int compare_cursors(Cursor left, Cursor right) noexcept:
    if left.transaction_no != right.transaction_no:
        return -1 if left.transaction_no < right.transaction_no else 1
    if left.sequence_no != right.sequence_no:
        return -1 if left.sequence_no < right.sequence_no else 1
    return 0


cdef inline Cursor make_cursor(int64_t transaction_no, int32_t sequence_no):
    """A cursor of numbers already known to be in range, without boxing them."""
    cdef Cursor cursor = Cursor.__new__(Cursor)
    cursor.transaction_no = transaction_no
    cursor.sequence_no = sequence_no
    cursor.made = True
    return cursor


# An extension type refuses assignment from outside; its dictionary does not.
(<dict>(<PyTypeObject *>Cursor).tp_dict)["BEGINNING"] = make_cursor(0, 0)
PyType_Modified(<PyTypeObject *>Cursor)
