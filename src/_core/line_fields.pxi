# What msgspec does not say of an import line that it has taken: that a field stands twice (it keeps the last), and how
# deeply a value is nested (it goes as deep as the caller's own stack allows, another depth on every Python).
#
# Written for lines that are valid JSON, and safe for any bytes: each read stands behind a comparison with the end.

cdef enum:
    MAX_NESTING = 500
    FIELD_COUNT = 8

FIELD_NAMES = ("stream", "type", "data", "version", "id", "time", "correlation_id", "metadata")

cdef list FIELD_BYTES = [name.encode() for name in FIELD_NAMES]
cdef const char *FIELD_AT[FIELD_COUNT]
cdef Py_ssize_t FIELD_SIZE[FIELD_COUNT]
for _field in range(FIELD_COUNT):
    FIELD_AT[_field] = PyBytes_AS_STRING(FIELD_BYTES[_field])
    FIELD_SIZE[_field] = PyBytes_GET_SIZE(FIELD_BYTES[_field])


cdef inline bint is_blank(unsigned char byte) noexcept:
    return byte == c" " or byte == c"\t" or byte == c"\r" or byte == c"\n"


cdef int skip_blanks(Source *text) noexcept:
    """Step over white space; returns the byte that follows it, which is not stepped over, or -1 at the end."""
    while text.at < text.end and is_blank(text.at[0]):
        text.at += 1
    return text.at[0] if text.at < text.end else -1


cdef int step_over(Source *text, unsigned char expected) except -1:
    if text.at >= text.end or text.at[0] != expected:
        raise ValueError("not one JSON object")
    text.at += 1
    return 0


cdef int skip_string(Source *text) except -1:
    """Step over a string."""
    cdef const unsigned char *content
    cdef const unsigned char *quote
    cdef const unsigned char *escape
    step_over(text, c'"')
    content = text.at
    while True:
        quote = <const unsigned char *>memchr(text.at, c'"', text.end - text.at)
        if quote is NULL:
            raise ValueError("a string without an end")
        text.at = quote + 1
        # Escaped by an odd number of backslashes; no quote stands between them and it, so none is counted twice.
        escape = quote
        while escape > content and (escape - 1)[0] == c"\\":
            escape -= 1
        if (quote - escape) & 1 == 0:
            return 0


cdef Py_ssize_t skip_value(Source *text) except -1:
    """Step over a value; returns how deeply it is nested, 0 for what is no array or object."""
    cdef Py_ssize_t depth = 0, deepest = 0
    cdef const unsigned char *start = text.at
    cdef unsigned char byte
    while text.at < text.end:
        byte = text.at[0]
        if byte == c'"':
            skip_string(text)
        elif byte == c"[" or byte == c"{":
            depth += 1
            deepest = max(deepest, depth)
            text.at += 1
        elif byte == c"]" or byte == c"}":
            if depth == 0:
                break
            depth -= 1
            text.at += 1
        elif depth > 0:
            text.at += 1
            continue
        elif byte == c"," or byte == c":" or is_blank(byte):
            break
        else:
            text.at += 1  # of a number or a literal
            continue
        if depth == 0:
            return deepest
    if depth > 0 or text.at == start:
        raise ValueError("a value without an end")
    return deepest


cdef int find_field(const unsigned char *name, Py_ssize_t size) noexcept:
    """Which of FIELD_NAMES it is, -1 for none."""
    cdef int field
    for field in range(FIELD_COUNT):
        if FIELD_SIZE[field] == size and memcmp(FIELD_AT[field], name, size) == 0:
            return field
    return -1


cdef int take_key(Source *text) except -2:
    """Step over a key; returns which of FIELD_NAMES it is, -1 for none."""
    cdef const unsigned char *start = text.at
    cdef Py_ssize_t size
    cdef bytes name
    skip_string(text)
    size = text.at - start
    if memchr(start, c"\\", size) is NULL:
        return find_field(start + 1, size - 2)
    try:
        name = decode_json(PyBytes_FromStringAndSize(<const char *>start, size)).encode()  # "\u0073tream" is stream too
    except MsgspecError as error:
        raise ValueError(f"a key that is no JSON: {error}") from error
    return find_field(<const unsigned char *>PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name))


cdef Py_ssize_t count_openings(Source text) noexcept:
    """How many bytes are [ or {, also within strings: no value is nested deeper. Sixteen bytes at a time, if gcc may."""
    cdef Py_ssize_t count = 0
    cdef unsigned char some
    cdef const unsigned char *stop
    while text.at < text.end:
        stop = text.at + min(<Py_ssize_t>255, text.end - text.at)  # what one byte can count
        some = 0
        while text.at < stop:
            some += (text.at[0] & 0xDF) == 0x5B
            text.at += 1
        count += some
    return count


cdef int check_nesting(Py_buffer *value, str name) except -1:
    cdef Source text
    # What opens closes: a value of so few bytes cannot be nested deeper.
    if value.len <= 2 * MAX_NESTING:
        return 0
    text.at = <const unsigned char *>value.buf
    text.end = text.at + value.len
    if count_openings(text) > MAX_NESTING and skip_value(&text) > MAX_NESTING:
        raise ValueError(f"{name} is nested more than {MAX_NESTING} deep")
    return 0


cdef inline int first_byte(const Py_buffer *value) noexcept:
    return (<const unsigned char *>value.buf)[0] if value.len > 0 else -1


cdef inline bint skip_view(Source *text, Py_buffer *value) noexcept:
    """Step over *value* if it is a view of what stands here."""
    if value.len == 0 or value.buf != <const void *>text.at or value.len > text.end - text.at:
        return False
    text.at += value.len
    return True


cdef int check_repeated(Source text, Py_buffer *data, Py_buffer *metadata) except -1:
    cdef int field, seen = 0, following
    skip_blanks(&text)
    step_over(&text, c"{")
    if skip_blanks(&text) == c"}":
        return 0
    while True:
        field = take_key(&text)
        if field >= 0:
            if seen & (1 << field):
                raise ValueError(f"the field {FIELD_NAMES[field]} stands twice")
            seen |= 1 << field
        skip_blanks(&text)
        step_over(&text, c":")
        skip_blanks(&text)
        if not (skip_view(&text, data) or skip_view(&text, metadata)):
            skip_value(&text)
        following = skip_blanks(&text)
        if following == c"}":
            return 0
        step_over(&text, c",")
        skip_blanks(&text)


def check_fields(bytes line not None, data not None, metadata=None):
    """Check what JSON decoders let pass of an import line; returns whether *metadata* is an object, and not null.

    *data* and *metadata* are the values of the fields of that name, as contiguous buffers (None: no such field). Where
    they are views into *line*, as msgspec.Raw is, they are passed over in one step. Raises ValueError if a field of
    *line* stands twice, if *data* is no object or *metadata* neither object nor null, or if one of them is nested more
    than MAX_NESTING deep. For a line that is no JSON object nothing is promised but an end.
    """
    cdef Source text
    cdef Py_buffer data_view, metadata_view
    cdef bint has_metadata
    text.at = <const unsigned char *>PyBytes_AS_STRING(line)
    text.end = text.at + PyBytes_GET_SIZE(line)
    # By hand: a typed memoryview of each costs as much as all the rest.
    PyObject_GetBuffer(data, &data_view, PyBUF_SIMPLE)
    try:
        PyObject_GetBuffer(b"" if metadata is None else metadata, &metadata_view, PyBUF_SIMPLE)
        try:
            check_repeated(text, &data_view, &metadata_view)
            if first_byte(&data_view) != c"{":
                raise ValueError("data must be a JSON object")
            has_metadata = first_byte(&metadata_view) == c"{"
            if not (has_metadata or metadata is None or first_byte(&metadata_view) == c"n"):
                raise ValueError("metadata must be a JSON object or null")
            check_nesting(&data_view, "data")
            check_nesting(&metadata_view, "metadata")
            return has_metadata
        finally:
            PyBuffer_Release(&metadata_view)
    finally:
        PyBuffer_Release(&data_view)
