# RecordedEvents -> lines of the import format.
#
# From an event and not from its row: the event was checked and copied when it was made, and names nothing of libpq's.
# 0.5 µs a line of 350 bytes, where b"..." % (...) of the same fields took 10: fetching an event takes 1.5.

cdef const char *HEX_DIGITS = b"0123456789abcdef"


def export_lines(events, Py_ssize_t block_size=256 * 1024):
    """Yield *events* as lines of the import format, in blocks of whole lines of about *block_size* bytes.

    ``data`` and ``metadata`` are the stored bytes, but for white space that a line cannot hold: line breaks, which can
    only stand between tokens, become spaces, and what stands around the whole value goes. Metadata that is JSON's null
    is left out, as none is. Raises MalformedRow for stored bytes that hold no value at all.
    """
    cdef Sink lines = Sink()
    cdef RecordedEvent event
    if block_size <= 0:
        raise ValueError("block_size must be positive")
    for each in events:
        event = <RecordedEvent?>each
        put_line(lines, event)
        if lines.size >= block_size:
            yield PyBytes_FromStringAndSize(<const char *>lines.start, lines.size)
            if lines.capacity <= 2 * block_size:
                lines.size = 0
            else:
                # What a huge event took is given back.
                lines = Sink()
    if lines.size:
        yield PyBytes_FromStringAndSize(<const char *>lines.start, lines.size)


cdef int put_line(Sink lines, RecordedEvent event) except -1:
    """Append the line of *event*; *lines* stay as they were where it has none."""
    cdef Py_ssize_t before = lines.size
    try:
        put(lines, b'{"stream":"')
        put_uuid(lines, event.numbers.stream_id)
        put(lines, b'","type":"')
        put_escaped(lines, event.name)
        put(lines, b'","data":')
        put_json(lines, event.data, trimmed(event.data, "payload"))
        put(lines, b',"version":')
        put_decimal(lines, event.numbers.event_version)
        put(lines, b',"id":"')
        put_uuid(lines, event.numbers.event_id)
        put(lines, b'","time":"')
        put_moment(lines, event.numbers.created_at)
        if event.numbers.correlated:
            put(lines, b'","correlation_id":"')
            put_uuid(lines, event.numbers.correlation_id)
        put(lines, b'"')
        if event.metadata_json is not None:
            put_metadata(lines, event.metadata_json)
        put(lines, b"}\n")
    except BaseException:
        lines.size = before
        raise
    return 0


cdef int put_metadata(Sink lines, bytes metadata) except -1:
    cdef Span span = trimmed(metadata, "metadata")
    if span.size == 4 and memcmp(PyBytes_AS_STRING(metadata) + span.start, b"null", 4) == 0:
        return 0
    put(lines, b',"metadata":')
    put_json(lines, metadata, span)
    return 0


cdef inline int put(Sink lines, bytes text) except -1:
    cdef Py_ssize_t size = PyBytes_GET_SIZE(text)
    memcpy(lines.reserve(size), PyBytes_AS_STRING(text), size)
    return 0


cdef int put_uuid(Sink lines, const unsigned char *uuid) except -1:
    cdef unsigned char *at = lines.reserve(36)
    cdef int i
    for i in range(16):
        if i == 4 or i == 6 or i == 8 or i == 10:
            at[0] = c"-"
            at += 1
        at[0] = HEX_DIGITS[uuid[i] >> 4]
        at[1] = HEX_DIGITS[uuid[i] & 15]
        at += 2
    return 0


cdef int put_escaped(Sink lines, str text) except -1:
    """What *text* is between the quotes of a JSON string: only what must be is escaped, the rest stays UTF-8."""
    cdef Py_ssize_t i, size = 0, escapes = 0
    cdef const unsigned char *letters = <const unsigned char *>PyUnicode_AsUTF8AndSize(text, &size)
    cdef unsigned char letter
    cdef unsigned char *at
    for i in range(size):
        if letters[i] < 0x20:
            escapes += 5
        elif letters[i] == c'"' or letters[i] == c"\\":
            escapes += 1
    at = lines.reserve(size + escapes)
    if escapes == 0:
        memcpy(at, letters, size)
        return 0
    for i in range(size):
        letter = letters[i]
        if letter < 0x20:
            memcpy(at, b"\\u00", 4)
            at[4] = HEX_DIGITS[letter >> 4]
            at[5] = HEX_DIGITS[letter & 15]
            at += 6
            continue
        if letter == c'"' or letter == c"\\":
            at[0] = c"\\"
            at += 1
        at[0] = letter
        at += 1
    return 0


cdef struct Span:
    Py_ssize_t start
    Py_ssize_t size


cdef inline bint is_json_space(char letter) noexcept:
    return letter == c" " or letter == c"\n" or letter == c"\r" or letter == c"\t"


cdef Span trimmed(bytes stored, str column) except *:
    """Where *stored* begins and ends without the white space around it. Raises MalformedRow if nothing is left."""
    cdef const char *letters = PyBytes_AS_STRING(stored)
    cdef Py_ssize_t start = 0, end = PyBytes_GET_SIZE(stored)
    cdef Span span
    while end > start and is_json_space(letters[end - 1]):
        end -= 1
    while start < end and is_json_space(letters[start]):
        start += 1
    if start == end:
        raise MalformedRow(f"{column} holds no JSON value")
    span.start = start
    span.size = end - start
    return span


cdef int put_json(Sink lines, bytes stored, Span span) except -1:
    cdef unsigned char *at = lines.reserve(span.size)
    memcpy(at, PyBytes_AS_STRING(stored) + span.start, span.size)
    blank_out(at, span.size, c"\n")
    blank_out(at, span.size, c"\r")
    return 0


cdef void blank_out(unsigned char *at, Py_ssize_t size, char letter) noexcept:
    """Put a space wherever *letter* stands."""
    cdef unsigned char *end = at + size
    cdef unsigned char *found
    while at < end:
        found = <unsigned char *>memchr(at, letter, end - at)
        if found is NULL:
            return
        found[0] = c" "
        at = found + 1


cdef int put_decimal(Sink lines, uint32_t number) except -1:
    cdef unsigned char digits[10]
    cdef int start = 10
    while True:
        start -= 1
        digits[start] = <unsigned char>(c"0" + number % 10)
        number //= 10
        if number == 0:
            break
    memcpy(lines.reserve(10 - start), digits + start, 10 - start)
    return 0


cdef inline void write_digits(unsigned char *at, int width, uint32_t number) noexcept:
    """The last *width* decimal digits of *number*."""
    while width:
        width -= 1
        at[width] = <unsigned char>(c"0" + number % 10)
        number //= 10


cdef int put_moment(Sink lines, int64_t moment) except -1:
    """Microseconds since 2000 as ``2024-05-06T07:08:09.123456Z``: exact, and every line's as long."""
    cdef unsigned char *at = lines.reserve(27)
    # Counted from 0000-03-01, like days_since_2000: no moment of the years 1 to 9999 is negative.
    cdef int64_t since = moment + 730_425 * 86_400_000_000LL
    cdef int64_t days = since // 86_400_000_000LL
    cdef int64_t rest = since - days * 86_400_000_000LL
    cdef uint32_t seconds = <uint32_t>(rest // 1_000_000)
    cdef int64_t era = days // 146_097
    cdef int64_t day_of_era = days - era * 146_097
    cdef int64_t year_of_era = (day_of_era - day_of_era // 1460 + day_of_era // 36_524 - day_of_era // 146_096) // 365
    cdef int64_t day_of_year = day_of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    cdef int64_t march_month = (5 * day_of_year + 2) // 153
    cdef int64_t month = march_month + 3 if march_month < 10 else march_month - 9
    memcpy(at, b"0000-00-00T00:00:00.000000Z", 27)
    write_digits(at, 4, <uint32_t>(era * 400 + year_of_era + (month <= 2)))
    write_digits(at + 5, 2, <uint32_t>month)
    write_digits(at + 8, 2, <uint32_t>(day_of_year - (153 * march_month + 2) // 5 + 1))
    write_digits(at + 11, 2, seconds // 3600)
    write_digits(at + 14, 2, seconds // 60 % 60)
    write_digits(at + 17, 2, seconds % 60)
    write_digits(at + 20, 6, <uint32_t>(rest % 1_000_000))
    return 0
