# Lines of an import -> rows, a block of lines in one call: 0.5 to 0.8 µs a line of 350 bytes, where msgspec, an object for
# each field and EventRows.add took 4.5.
#
# There are two readers of a line, and only one of them judges. LineReader.add (import_lines.py) knows all that a line may
# hold, and words every error. What stands here takes the lines of which it is entirely sure, and stops in front of the
# first other one: it may be stricter than LineReader.add, and must never be laxer, nor read anything differently. So it
# has no errors of its own: NULL and False mean "not sure", of a broken line as of one that is merely unusual.
#
# Each read stands behind a comparison with the end of the line. All that is scanned is strict JSON (RFC 8259) in UTF-8.

cdef int64_t MAX_LINE_NO = (1 << 40) - 1  # what a derived id has room for

# The value of each hexadecimal digit, -1 for any other byte.
cdef signed char DIGIT_VALUES[256]
for _byte in range(256):
    DIGIT_VALUES[_byte] = int(chr(_byte), 16) if chr(_byte) in "0123456789abcdefABCDEF" else -1

cdef enum:  # places in FIELD_NAMES
    STREAM, TYPE, DATA, VERSION, ID, TIME, CORRELATION_ID, METADATA
    REQUIRED = (1 << STREAM) | (1 << TYPE) | (1 << DATA)


cdef inline bint is_digit(unsigned char byte) noexcept:
    return c"0" <= byte <= c"9"


cdef inline const unsigned char *past_blanks(const unsigned char *at, const unsigned char *end) noexcept:
    while at < end and is_blank(at[0]):
        at += 1
    return at


# --- Strings --------------------------------------------------------------------------------------------------------


cdef inline uint64_t odd_letters(uint64_t word) noexcept:
    """Bit 7 of the first byte that is a quote, a backslash, a control character or not ASCII; 0 if no byte is.

    Of the bytes behind that one nothing is said: a subtraction may have borrowed from them. Before it none can, as
    only an odd byte is smaller than what is taken from it.
    """
    return (
        ((word ^ 0x2222222222222222ULL) - 0x0101010101010101ULL)
        | ((word ^ 0x5C5C5C5C5C5C5C5CULL) - 0x0101010101010101ULL)
        | (word - 0x2020202020202020ULL)
        | word
    ) & 0x8080808080808080ULL


cdef const unsigned char *scan_letters(const unsigned char *at, const unsigned char *end) noexcept:
    """Step over what a string holds unescaped; returns where the quote or backslash behind it stands."""
    cdef uint64_t word, odd
    while True:
        odd = 0
        while end - at >= 8:
            memcpy(&word, at, 8)
            odd = odd_letters(word)
            if odd:
                at += hs_first_bit(odd) >> 3
                break
            at += 8
        if not odd:
            while at < end and 0x20 <= at[0] < 0x80 and at[0] != c'"' and at[0] != c"\\":
                at += 1
            if at == end:
                return NULL
        if at[0] == c'"' or at[0] == c"\\":
            return at
        # Texts that are not ASCII are rarely so for one character.
        while at < end and at[0] >= 0x80:
            at = scan_character(at, end)
            if at is NULL:
                return NULL
        if at < end and at[0] < 0x20:
            return NULL


cdef inline bint continues(unsigned char byte) noexcept:
    return byte & 0xC0 == 0x80


cdef const unsigned char *scan_character(const unsigned char *at, const unsigned char *end) noexcept:
    """Step over a character that is not ASCII: well-formed UTF-8 as in table 3-7 of the Unicode standard."""
    cdef unsigned char first = at[0]
    cdef Py_ssize_t left = end - at
    if first < 0xC2:
        return NULL
    if first < 0xE0:
        return at + 2 if left >= 2 and continues(at[1]) else NULL
    if first < 0xF0:
        if left < 3 or not continues(at[1]) or not continues(at[2]):
            return NULL
        if (first == 0xE0 and at[1] < 0xA0) or (first == 0xED and at[1] > 0x9F):
            return NULL  # longer than need be, or a surrogate
        return at + 3
    if first > 0xF4 or left < 4 or not continues(at[1]) or not continues(at[2]) or not continues(at[3]):
        return NULL
    if (first == 0xF0 and at[1] < 0x90) or (first == 0xF4 and at[1] > 0x8F):
        return NULL
    return at + 4


cdef const unsigned char *scan_escape(const unsigned char *at, const unsigned char *end) noexcept:
    """Step over the escape that begins with the backslash here; not over half a surrogate pair, nor over a whole one."""
    cdef int i
    if end - at < 2:
        return NULL
    if at[1] != c"u":
        return at + 2 if memchr(b'"\\/bfnrt', at[1], 8) is not NULL else NULL
    if end - at < 6:
        return NULL
    for i in range(2, 6):
        if DIGIT_VALUES[at[i]] < 0:
            return NULL
    if DIGIT_VALUES[at[2]] == 0xD and DIGIT_VALUES[at[3]] >= 8:
        return NULL
    return at + 6


cdef inline const unsigned char *scan_string(const unsigned char *at, const unsigned char *end) noexcept:
    """Step over the string whose quote stands here."""
    at = scan_letters(at + 1, end)
    while at is not NULL and at[0] == c"\\":
        at = scan_escape(at, end)
        if at is not NULL:
            at = scan_letters(at, end)
    return at + 1 if at is not NULL else NULL


cdef inline const unsigned char *scan_text(
    const unsigned char *at, const unsigned char *end, Piece *text
) noexcept:
    """Step over a string without escapes, which *text* then names."""
    if at == end or at[0] != c'"':
        return NULL
    text.start = at + 1
    at = scan_letters(at + 1, end)
    if at is NULL or at[0] != c'"':
        return NULL
    text.size = at - text.start
    return at + 1


# --- Other values ---------------------------------------------------------------------------------------------------


cdef inline const unsigned char *scan_digits(const unsigned char *at, const unsigned char *end) noexcept:
    """Step over digits, one at least."""
    cdef const unsigned char *start = at
    while at < end and is_digit(at[0]):
        at += 1
    return at if at > start else NULL


cdef const unsigned char *scan_number(const unsigned char *at, const unsigned char *end) noexcept:
    if at < end and at[0] == c"-":
        at += 1
    if at < end and at[0] == c"0":
        at += 1
    else:
        at = scan_digits(at, end)
    if at is not NULL and at < end and at[0] == c".":
        at = scan_digits(at + 1, end)
    if at is not NULL and at < end and (at[0] == c"e" or at[0] == c"E"):
        at += 1
        if at < end and (at[0] == c"+" or at[0] == c"-"):
            at += 1
        at = scan_digits(at, end)
    return at


cdef inline const unsigned char *scan_literal(const unsigned char *at, const unsigned char *end) noexcept:
    if end - at >= 4 and (memcmp(at, b"true", 4) == 0 or memcmp(at, b"null", 4) == 0):
        return at + 4
    return at + 5 if end - at >= 5 and memcmp(at, b"false", 5) == 0 else NULL


cdef inline const unsigned char *scan_name(const unsigned char *at, const unsigned char *end) noexcept:
    """Step over a member's name and the colon, up to its value."""
    if at == end or at[0] != c'"':
        return NULL
    at = scan_string(at, end)
    if at is NULL:
        return NULL
    at = past_blanks(at, end)
    return past_blanks(at + 1, end) if at < end and at[0] == c":" else NULL


cdef const unsigned char *scan_object(const unsigned char *at, const unsigned char *end) noexcept:
    """Step over an object of whatever is valid in it, nested no deeper than MAX_NESTING."""
    cdef unsigned char closing[MAX_NESTING]  # what ends each array and object that is open
    cdef int depth = 0
    cdef unsigned char byte
    if at == end or at[0] != c"{":
        return NULL
    while True:
        # A value begins here.
        if at == end:
            return NULL
        byte = at[0]
        if byte == c'"':
            at = scan_string(at, end)
        elif byte == c"{" or byte == c"[":
            if depth == MAX_NESTING:
                return NULL
            closing[depth] = byte + 2  # ASCII has it so, of both
            depth += 1
            at = past_blanks(at + 1, end)
            if at == end:
                return NULL
            if at[0] != byte + 2:
                if byte == c"{":
                    at = scan_name(at, end)
                    if at is NULL:
                        return NULL
                continue
            depth -= 1
            at += 1
        elif byte == c"-" or is_digit(byte):
            at = scan_number(at, end)
        else:
            at = scan_literal(at, end)
        if at is NULL:
            return NULL
        # A value ended here, and perhaps others around it.
        while True:
            if depth == 0:
                return at
            at = past_blanks(at, end)
            if at == end:
                return NULL
            if at[0] != closing[depth - 1]:
                break
            depth -= 1
            at += 1
        if at[0] != c",":
            return NULL
        at = past_blanks(at + 1, end)
        if closing[depth - 1] == c"}":
            at = scan_name(at, end)
            if at is NULL:
                return NULL


# --- Fields ---------------------------------------------------------------------------------------------------------


cdef struct ScannedLine:
    Piece stream
    EventFields event
    unsigned char event_id[16]
    unsigned char correlation_id[16]


cdef bint parse_uuid(Piece text, unsigned char *uuid) noexcept:
    """Whether *text* is a UUID in the 36-character form, which *uuid* then holds."""
    cdef const unsigned char *at = text.start
    cdef int i, value, odd = 0
    if text.size != 36 or at[8] != c"-" or at[13] != c"-" or at[18] != c"-" or at[23] != c"-":
        return False
    for i in range(16):
        if i == 4 or i == 6 or i == 8 or i == 10:
            at += 1
        value = DIGIT_VALUES[at[0]] * 16 | DIGIT_VALUES[at[1]]  # negative, if one of them is
        odd |= value
        uuid[i] = <unsigned char>value
        at += 2
    return odd >= 0


cdef inline int two_digits(const unsigned char *at) noexcept:
    """The number that stands here, below zero where none does."""
    if not is_digit(at[0]) or not is_digit(at[1]):
        return -10_000
    return (at[0] - c"0") * 10 + at[1] - c"0"


cdef inline int days_of_month(int year, int month) noexcept:
    if month == 2:
        return 29 if year % 4 == 0 and (year % 100 != 0 or year % 400 == 0) else 28
    return 30 if month == 4 or month == 6 or month == 9 or month == 11 else 31


cdef bint parse_time(Piece text, int64_t *moment) noexcept:
    """Whether *text* is a time as in RFC 3339, of microseconds at most; *moment* then counts them since 2000."""
    cdef const unsigned char *at = text.start
    cdef const unsigned char *end = at + text.size
    cdef int year, month, day, hour, minute, second, offset_hour, offset_minute
    cdef int64_t microseconds = 0, unit = 1_000_000
    if text.size < 20 or at[4] != c"-" or at[7] != c"-" or at[10] != c"T" or at[13] != c":" or at[16] != c":":
        return False
    year, month, day = two_digits(at) * 100 + two_digits(at + 2), two_digits(at + 5), two_digits(at + 8)
    hour, minute, second = two_digits(at + 11), two_digits(at + 14), two_digits(at + 17)
    if not (1 <= year <= 9999 and 1 <= month <= 12 and 1 <= day <= days_of_month(year, month)):
        return False
    if not (0 <= hour <= 23 and 0 <= minute <= 59 and 0 <= second <= 59):  # no leap second
        return False
    at += 19
    if at[0] == c".":
        at += 1
        while at < end and is_digit(at[0]):
            if unit == 1:
                return False  # a seventh digit
            unit //= 10
            microseconds += (at[0] - c"0") * unit
            at += 1
        if unit == 1_000_000:
            return False
    moment[0] = (
        days_since_2000(year, month, day) * 86_400_000_000LL
        + (hour * 3600 + minute * 60 + second) * 1_000_000LL + microseconds
    )
    if end - at == 1 and at[0] == c"Z":
        return True
    if end - at != 6 or (at[0] != c"+" and at[0] != c"-") or at[3] != c":":
        return False
    offset_hour, offset_minute = two_digits(at + 1), two_digits(at + 4)
    if not (0 <= offset_hour <= 23 and 0 <= offset_minute <= 59):
        return False
    moment[0] += (offset_hour * 60 + offset_minute) * (60_000_000LL if at[0] == c"-" else -60_000_000LL)
    return FIRST_DAY * 86_400_000_000LL <= moment[0] < (LAST_DAY + 1) * 86_400_000_000LL


cdef inline bint is_null(const unsigned char *at, const unsigned char *end) noexcept:
    return end - at >= 4 and memcmp(at, b"null", 4) == 0


cdef const unsigned char *scan_version(const unsigned char *at, const unsigned char *end, int32_t *version) noexcept:
    cdef const unsigned char *start = at
    cdef int64_t number = 0
    at = scan_digits(at, end)
    # No zero in front of others, and no more digits than 2147483647 has.
    if at is NULL or at - start > 10 or (start[0] == c"0" and at - start > 1):
        return NULL
    while start < at:
        number = number * 10 + (start[0] - c"0")
        start += 1
    version[0] = <int32_t>number
    return at if number <= 0x7FFFFFFF else NULL


cdef const unsigned char *scan_field(
    int field, const unsigned char *at, const unsigned char *end, ScannedLine *line
) noexcept:
    """Step over a field's value and note in *line* what it says."""
    cdef Piece text
    if field == DATA or (field == METADATA and not is_null(at, end)):
        text.start = at
        at = scan_object(at, end)
        if at is NULL:
            return NULL
        text.size = at - text.start
        if field == DATA:
            line.event.payload = text
        else:
            line.event.metadata = text
            line.event.has_metadata = True
        return at
    if field == VERSION:
        return scan_version(at, end, &line.event.version)
    if field != STREAM and field != TYPE and is_null(at, end):
        return at + 4
    at = scan_text(at, end, &text)
    if at is NULL:
        return NULL
    if field == STREAM:
        line.stream = text
        return at if text.size else NULL
    if field == TYPE:
        line.event.name = text
        return at if 0 < text.size <= MAX_NAME_BYTES else NULL
    if field == TIME:
        line.event.undated = False
        return at if parse_time(text, &line.event.moment) else NULL
    if field == ID:
        line.event.event_id = line.event_id
        return at if parse_uuid(text, line.event_id) else NULL
    line.event.correlation_id = line.correlation_id
    return at if parse_uuid(text, line.correlation_id) else NULL


cdef bint scan_line(const unsigned char *at, const unsigned char *end, ScannedLine *line) noexcept:
    """Whether *line* now holds all that this line says; pointers in it are into the line's bytes and its own."""
    cdef int field, seen = 0
    cdef Piece key
    line.event.event_id = NULL
    line.event.correlation_id = NULL
    line.event.version = 0
    line.event.moment = 0
    line.event.undated = True
    line.event.has_metadata = False
    at = past_blanks(at, end)
    if at == end or at[0] != c"{":
        return False
    while True:
        at = scan_text(past_blanks(at + 1, end), end, &key)
        if at is NULL:
            return False
        field = find_field(key.start, key.size)
        if field < 0 or seen & (1 << field):
            return False
        seen |= 1 << field
        at = past_blanks(at, end)
        if at == end or at[0] != c":":
            return False
        at = scan_field(field, past_blanks(at + 1, end), end, line)
        if at is NULL:
            return False
        at = past_blanks(at, end)
        if at == end:
            return False
        if at[0] == c"}":
            return past_blanks(at + 1, end) == end and seen & REQUIRED == REQUIRED
        if at[0] != c",":
            return False


# --- Lines ----------------------------------------------------------------------------------------------------------


def count_newlines(const unsigned char[::1] text not None):
    """How many newlines *text* holds, without the interpreter lock.

    43 µs a megabyte of lines of 350 bytes, where bytes.count took 347 and let nobody else encode meanwhile.
    """
    cdef Py_ssize_t count = 0, at = 0, stop, size = text.shape[0]
    cdef unsigned char some
    with nogil:
        while at < size:
            stop = min(at + 255, size)  # what one byte can count; sixteen of them at a time, if gcc may
            some = 0
            while at < stop:
                some += text[at] == c"\n"
                at += 1
            count += some
    return count


@cython.final
cdef class LineEncoder:
    """Turns lines of an import into rows, as many at a time as it is told to.

    *stream_ids* maps names of streams to their ids (16 bytes each); *find_stream* is called with a name that is not
    among them, and returns its id; a ValueError of its leaves the line to others. *first_id* is the id of an event of
    line 0 that brings none (16 bytes); the line's number is added at bit 22.
    """

    cdef dict stream_ids
    cdef object find_stream
    cdef uint64_t id_high
    cdef uint64_t id_low

    def __cinit__(self, dict stream_ids not None, find_stream, bytes first_id not None):
        if PyBytes_GET_SIZE(first_id) != 16:
            raise ValueError("first_id is 16 bytes")
        self.stream_ids = stream_ids
        self.find_stream = find_stream
        self.id_high = <uint64_t>read_int64(<const unsigned char *>PyBytes_AS_STRING(first_id))
        self.id_low = <uint64_t>read_int64(<const unsigned char *>PyBytes_AS_STRING(first_id) + 8)

    def encode(
        self, const unsigned char[::1] block not None, Py_ssize_t start, Py_ssize_t line_count, int64_t line_no,
        int64_t offset, shards,
    ):
        """Add up to *line_count* lines of *block* to the rows of their shards, the one at *start* first.

        That line has the number *line_no*, and the first byte of *block* lies at *offset* in its source. Stops in front
        of a line that is not plainly right, which says nothing against it. Returns how many lines it passed, blank ones
        included, where in the block the next one begins, and for each of *shards* (EventRows) the line numbers and the
        offsets of its new rows, as bytes of int64 in the machine's order.
        Raises ValueError for a *start* or *offset* outside of what there can be, and TypeError for anything else than
        rows, before a line is added.
        """
        cdef const unsigned char *first
        cdef const unsigned char *end
        cdef const unsigned char *at
        cdef const unsigned char *line_end
        cdef ScannedLine line
        cdef unsigned char derived_id[16]
        cdef Py_ssize_t passed = 0, shard = 0, shard_count
        cdef list targets, line_nos, offsets
        cdef bytes stream_id
        if not 0 <= start <= block.shape[0]:
            raise ValueError("start lies outside the block")
        if not 0 <= offset <= 1 << 62:
            raise ValueError("offset is out of range")
        # A list of our own: finding a stream runs code of the caller's.
        targets = [<EventRows?>rows for rows in shards]
        shard_count = len(targets)
        if shard_count == 0:
            raise ValueError("there must be at least one shard")
        line_nos = [Sink() for _ in range(shard_count)]
        offsets = [Sink() for _ in range(shard_count)]
        write_int64(derived_id, <int64_t>self.id_high)
        first = &block[0] if block.shape[0] else derived_id  # an empty block stands nowhere
        end = first + block.shape[0]
        at = first + start
        while passed < line_count and at < end and 0 <= line_no <= MAX_LINE_NO:
            line_end = <const unsigned char *>memchr(at, c"\n", end - at)
            if line_end is NULL:
                line_end = end
            if past_blanks(at, line_end) < line_end:
                # No line is so long; so a row of it cannot be too large, either.
                if line_end - at > MAX_ROW_BYTES // 2 or not scan_line(at, line_end, &line):
                    break
                stream_id = self.stream_id_of(line.stream)
                if stream_id is None:
                    break
                if line.event.event_id is NULL:
                    write_int64(derived_id + 8, <int64_t>(self.id_low + (<uint64_t>line_no << 22)))
                    line.event.event_id = derived_id
                if shard_count > 1:
                    shard = crc32(stream_id) % shard_count
                (<EventRows>targets[shard]).write_row(stream_id, &line.event)
                (<int64_t *>(<Sink>line_nos[shard]).reserve(8))[0] = line_no
                (<int64_t *>(<Sink>offsets[shard]).reserve(8))[0] = offset + (at - first)
            passed += 1
            line_no += 1
            at = min(line_end + 1, end)
        return passed, at - first, [
            (
                PyBytes_FromStringAndSize(<const char *>(<Sink>line_nos[shard]).start, (<Sink>line_nos[shard]).size),
                PyBytes_FromStringAndSize(<const char *>(<Sink>offsets[shard]).start, (<Sink>offsets[shard]).size),
            )
            for shard in range(shard_count)
        ]

    cdef bytes stream_id_of(self, Piece stream):
        """The id of the stream of that name, None where the line should be left to others."""
        cdef unsigned char uuid[16]
        if parse_uuid(stream, uuid):
            return PyBytes_FromStringAndSize(<const char *>uuid, 16)
        name = PyUnicode_DecodeUTF8(<const char *>stream.start, stream.size, NULL)
        stream_id = self.stream_ids.get(name)
        if stream_id is None:
            try:
                stream_id = self.find_stream(name)
            except ValueError:
                return None
        if PyBytes_GET_SIZE(<bytes?>stream_id) != 16:
            raise ValueError("a stream's id is 16 bytes")
        return <bytes>stream_id
