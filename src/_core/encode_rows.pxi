# Events -> the rows of COPY ... FROM STDIN (FORMAT BINARY).
#
# A row is encoded before anything is locked; its place in the log (transaction_no, sequence_no, stream_version) and,
# where the event has none, its time are patched in once the server has given them. The columns that are patched stand
# first and have a fixed width, so their offsets are constants.

cdef enum:
    COLUMN_COUNT = 11
    # offsets of the values, each behind the int32 that holds its length; the row begins with an int16 column count
    AT_TRANSACTION_NO = 6
    AT_SEQUENCE_NO = 18
    AT_EVENT_ID = 26
    AT_STREAM_ID = 46
    AT_STREAM_VERSION = 66
    AT_CREATED_AT = 78
    AT_EVENT_VERSION = 90
    FIXED_SIZE = 94
    UUID_OID = 2950
    INT8_OID = 20

EVENT_COLUMNS = (
    "transaction_no", "sequence_no", "event_id", "stream_id", "stream_version", "created_at", "event_version",
    "correlation_id", "event_name", "payload", "metadata",
)  # fmt: skip

COPY_HEADER = b"PGCOPY\n\xff\r\n\x00" + bytes(8)  # no flags, no header extension
COPY_TRAILER = b"\xff\xff"

# PostgreSQL keeps a field below 1 GiB, and a row's tuple as well.
cdef Py_ssize_t MAX_ROW_BYTES = 0x3FFFFF00

# What a B-tree takes of a row is 2,704 bytes: whoever indexes names, alone or with a position, must be able to. A longer
# one is a payload in the wrong place.
cdef Py_ssize_t MAX_NAME_BYTES = 1000

cdef object MAX_EVENT_VERSION = 2**31 - 1

cdef object EPOCH = datetime(2000, 1, 1, tzinfo=timezone.utc)  # where PostgreSQL's microseconds count from
cdef int64_t FIRST_DAY = (datetime.min - datetime(2000, 1, 1)).days
cdef int64_t LAST_DAY = (datetime.max - datetime(2000, 1, 1)).days
cdef object UTC = timezone.utc


cdef inline int64_t days_since_2000(int64_t year, int month, int day) noexcept:
    """Days from 2000-01-01 to a day of the years 1 to 9999 in the proleptic Gregorian calendar.

    After Howard Hinnant's days_from_civil: years that begin in March, in eras of 400 years.
    """
    cdef int64_t march_year = year - (month <= 2)
    cdef int64_t era = march_year // 400
    cdef int64_t year_of_era = march_year - era * 400
    cdef int64_t day_of_year = (153 * (month - 3 if month > 2 else month + 9) + 2) // 5 + day - 1
    cdef int64_t day_of_era = year_of_era * 365 + year_of_era // 4 - year_of_era // 100 + day_of_year
    return era * 146_097 + day_of_era - 730_425


cdef int64_t to_microseconds(object moment) except? -1:
    """Microseconds since 2000-01-01 UTC. Raises TypeError, or ValueError for what no reader could return.

    Runs the code of the datetime's time zone: nothing that the rows hold may be kept in a variable across a call.
    """
    if not isinstance(moment, datetime):
        raise TypeError(f"created_at must be a datetime, not {type(moment).__name__}")
    zone = c_datetime.datetime_tzinfo(moment)
    cdef int64_t local
    if type(zone) is timezone:
        # UTC or another fixed offset, as a parsed text has it: several times as fast as subtracting.
        local = (
            days_since_2000(
                c_datetime.datetime_year(moment), c_datetime.datetime_month(moment), c_datetime.datetime_day(moment)
            ) * 86_400_000_000LL
            + c_datetime.datetime_hour(moment) * 3_600_000_000LL + c_datetime.datetime_minute(moment) * 60_000_000LL
            + c_datetime.datetime_second(moment) * 1_000_000LL + c_datetime.datetime_microsecond(moment)
        )
        if zone is UTC:
            return local
        offset = zone.utcoffset(None)  # timezone cannot be subclassed: a timedelta, the same for every moment
        local -= (
            c_datetime.timedelta_days(offset) * 86_400_000_000LL + c_datetime.timedelta_seconds(offset) * 1_000_000LL
            + c_datetime.timedelta_microseconds(offset)
        )
        if FIRST_DAY * 86_400_000_000LL <= local < (LAST_DAY + 1) * 86_400_000_000LL:
            return local
    if moment.utcoffset() is None:
        raise ValueError(f"created_at must carry a time zone: {moment.isoformat()} does not")
    since = moment - EPOCH
    # A subclass of datetime may subtract as it likes, and what is read below is memory, unchecked.
    if not isinstance(since, timedelta):
        raise TypeError(f"{type(moment).__name__} minus a datetime is no timedelta but {type(since).__name__}")
    # An offset can carry a datetime out of its own range: 9999-12-31T12:00-14:00 is a moment of the year 10000.
    # PostgreSQL would store it, and every later read of the event would fail.
    cdef int64_t days = c_datetime.timedelta_days(since)
    if not FIRST_DAY <= days <= LAST_DAY:
        raise ValueError(f"{moment.isoformat()} lies outside the years 1 to 9999 in UTC")
    return (
        days * 86_400_000_000LL + c_datetime.timedelta_seconds(since) * 1_000_000LL
        + c_datetime.timedelta_microseconds(since)
    )


cdef struct Piece:
    const unsigned char *start
    Py_ssize_t size


cdef struct EventFields:
    const unsigned char *event_id        # 16 bytes
    const unsigned char *correlation_id  # 16 bytes, or NULL
    int32_t version
    int64_t moment                       # microseconds since 2000
    bint undated                         # takes the server's time
    bint has_metadata
    Piece name
    Piece payload
    Piece metadata


cdef inline unsigned char *write_piece(unsigned char *at, Piece piece) noexcept:
    """Write a field of any size behind its length; returns where it ends."""
    write_int32(at, <int32_t>piece.size)
    if piece.size:  # an empty one may start nowhere
        memcpy(at + 4, piece.start, piece.size)
    return at + 4 + piece.size


cdef struct RowMark:
    int64_t offset       # of the row in the buffer
    int32_t stream       # index of its stream, in the order of first appearance
    int32_t nth          # which of the chunk's events to that stream it is, from 0
    bint undated         # takes the server's time


@cython.final
cdef class EventRows:
    """Events encoded as rows of a binary COPY, in the order in which they were added, their place still open.

    Use: ``add`` each event; ``stream_arrays`` for the call that locks and advances the streams' heads; ``place`` with
    what that call returned (again, if the transaction has to be repeated); send ``blocks``.
    """

    cdef Sink rows
    cdef Sink marks
    cdef dict streams        # stream id (16 bytes) -> index
    cdef Sink event_counts   # int32 each, by stream index
    cdef int32_t row_count_
    cdef bint placed
    cdef uint64_t changes    # counts what would make a COPY that is under way wrong

    def __cinit__(self):
        self.clear()

    def clear(self):
        """Forget all rows; the memory they took is given back."""
        self.rows = Sink()
        self.marks = Sink()
        self.event_counts = Sink()
        self.streams = {}
        self.row_count_ = 0
        self.placed = False
        self.changes += 1

    def __len__(self):
        return self.row_count_

    @property
    def byte_count(self):
        """Size of the encoded rows in bytes, without the header and trailer of the COPY."""
        return self.rows.size

    @property
    def stream_count(self):
        """How many distinct streams the rows belong to."""
        return len(self.streams)

    def add(
        self, bytes event_id not None, bytes stream_id not None, str event_name not None, event_version,
        const unsigned char[::1] payload not None, created_at=None, bytes correlation_id=None,
        const unsigned char[::1] metadata=None,
    ):
        """Encode one event behind the others.

        *event_id*, *stream_id* and *correlation_id* are 16 bytes each, *payload* and *metadata* JSON as bytes (any
        contiguous buffer), *created_at* an aware datetime or None for the time that ``place`` gives. A call that
        raises (ValueError, TypeError, BufferError, OverflowError, MemoryError) leaves the rows as they were.
        """
        cdef Py_ssize_t name_size = 0
        cdef EventFields event

        # Everything that can fail for what it was given comes before the first byte is written.
        if PyBytes_GET_SIZE(event_id) != 16 or PyBytes_GET_SIZE(stream_id) != 16:
            raise ValueError("event_id and stream_id are 16 bytes each")
        if correlation_id is not None and PyBytes_GET_SIZE(correlation_id) != 16:
            raise ValueError("correlation_id is 16 bytes")
        # By hand: a C int as argument would take 1.7 for 1 and True for 1.
        check_part(event_version, MAX_EVENT_VERSION, "event_version")
        event.version = event_version
        try:
            event.name.start = <const unsigned char *>PyUnicode_AsUTF8AndSize(event_name, &name_size)
        except UnicodeEncodeError as error:
            raise ValueError(f"event name {event_name[:80]!r} holds a lone surrogate") from error
        if name_size == 0:
            raise ValueError("event name is empty")
        if name_size > MAX_NAME_BYTES:
            raise ValueError(f"event name takes {name_size} bytes, {MAX_NAME_BYTES} at most: {event_name[:80]!r}...")
        if memchr(event.name.start, 0, name_size) is not NULL:
            raise ValueError(f"event name {event_name!r} holds a NUL character, which PostgreSQL cannot store")
        event.name.size = name_size
        event.undated = created_at is None
        event.moment = 0 if event.undated else to_microseconds(created_at)
        event.event_id = <const unsigned char *>PyBytes_AS_STRING(event_id)
        event.correlation_id = NULL
        if correlation_id is not None:
            event.correlation_id = <const unsigned char *>PyBytes_AS_STRING(correlation_id)
        event.payload.size = payload.shape[0]
        event.payload.start = &payload[0] if event.payload.size else NULL
        event.has_metadata = metadata is not None
        event.metadata.size = 0
        event.metadata.start = NULL
        if event.has_metadata and metadata.shape[0]:
            event.metadata.size = metadata.shape[0]
            event.metadata.start = &metadata[0]
        self.write_row(stream_id, &event)

    cdef int write_row(self, bytes stream_id, const EventFields *event) except -1:
        """Encode one event behind the others. Raises ValueError, OverflowError or MemoryError, with the rows as they were.

        *stream_id* is 16 bytes, the name at most MAX_NAME_BYTES; nothing else of *event* is taken for granted.
        """
        cdef Py_ssize_t size
        cdef unsigned char *at
        if self.row_count_ == 0x7FFFFFFF:
            raise OverflowError("more rows than one transaction can number")
        # Checked one by one: their sum could wrap.
        if event.payload.size > MAX_ROW_BYTES or (event.has_metadata and event.metadata.size > MAX_ROW_BYTES):
            raise ValueError("an event must stay below 1 GiB")
        size = FIXED_SIZE + 4 + 4 + event.name.size + 4 + event.payload.size + 4
        if event.correlation_id is not NULL:
            size += 16
        if event.has_metadata:
            size += event.metadata.size
        if size > MAX_ROW_BYTES:
            raise ValueError(f"an event must stay below 1 GiB; this one takes {size} bytes")

        at = self.begin_row(stream_id, size, event.undated)
        write_int16(at, COLUMN_COUNT)
        write_int32(at + AT_TRANSACTION_NO - 4, 8)
        write_int64(at + AT_TRANSACTION_NO, 0)
        write_int32(at + AT_SEQUENCE_NO - 4, 4)
        write_int32(at + AT_SEQUENCE_NO, self.row_count_)
        write_int32(at + AT_EVENT_ID - 4, 16)
        memcpy(at + AT_EVENT_ID, event.event_id, 16)
        write_int32(at + AT_STREAM_ID - 4, 16)
        memcpy(at + AT_STREAM_ID, PyBytes_AS_STRING(stream_id), 16)
        write_int32(at + AT_STREAM_VERSION - 4, 8)
        write_int64(at + AT_STREAM_VERSION, 0)
        write_int32(at + AT_CREATED_AT - 4, 8)
        write_int64(at + AT_CREATED_AT, event.moment)
        write_int32(at + AT_EVENT_VERSION - 4, 4)
        write_int32(at + AT_EVENT_VERSION, event.version)
        at += FIXED_SIZE
        if event.correlation_id is NULL:
            write_int32(at, -1)
            at += 4
        else:
            write_int32(at, 16)
            memcpy(at + 4, event.correlation_id, 16)
            at += 20
        at = write_piece(at, event.name)
        at = write_piece(at, event.payload)
        if event.has_metadata:
            write_piece(at, event.metadata)
        else:
            write_int32(at, -1)
        self.end_row()
        return 0

    cdef unsigned char *begin_row(self, bytes stream_id, Py_ssize_t size, bint undated) except NULL:
        """Make room for a row of *size* bytes behind the others and mark it. A call that raises leaves all as it was."""
        cdef int32_t stream
        cdef unsigned char *at
        cdef int32_t *count
        cdef RowMark *mark
        cdef bint new_stream = False
        known = self.streams.get(stream_id)
        if known is None:
            stream = <int32_t>len(self.streams)
            new_stream = True
        else:
            stream = known
        # Room first, in all three buffers; sizes are put back if one of them cannot grow.
        cdef Py_ssize_t rows_size = self.rows.size
        cdef Py_ssize_t marks_size = self.marks.size
        cdef Py_ssize_t counts_size = self.event_counts.size
        try:
            mark = <RowMark *>self.marks.reserve(sizeof(RowMark))
            if new_stream:
                count = <int32_t *>self.event_counts.reserve(sizeof(int32_t))
                count[0] = 0
                self.streams[stream_id] = stream
            else:
                count = self.count_of(stream)
            at = self.rows.reserve(size)
        except BaseException:
            self.rows.size = rows_size
            self.marks.size = marks_size
            self.event_counts.size = counts_size
            if new_stream:
                self.streams.pop(stream_id, None)
            raise
        mark.offset = rows_size
        mark.stream = stream
        mark.nth = count[0]
        mark.undated = undated
        count[0] += 1
        return at

    cdef void end_row(self) noexcept:
        self.row_count_ += 1
        self.placed = False
        self.changes += 1

    def select(self, row_numbers):
        """Return new EventRows that hold only these rows (numbers from 0, rising), their place open again.

        Raises IndexError for a number that is not there, ValueError where they do not rise.
        """
        cdef EventRows chosen = EventRows()
        cdef Py_ssize_t number, last = -1
        for wanted in row_numbers:
            number = PyNumber_AsSsize_t(wanted, IndexError)
            if number <= last:
                raise ValueError("row numbers must rise, from 0")
            chosen.copy_row(self, number)
            last = number
        return chosen

    cdef int copy_row(self, EventRows source, Py_ssize_t index) except -1:
        cdef Py_ssize_t start = 0, size = 0
        cdef bint undated
        cdef unsigned char *at
        cdef bytes stream_id
        source.find_row(index, &start, &size)
        undated = (<RowMark *>source.marks.place(index * sizeof(RowMark), sizeof(RowMark))).undated
        stream_id = PyBytes_FromStringAndSize(<const char *>source.rows.place(start + AT_STREAM_ID, 16), 16)
        at = self.begin_row(stream_id, size, undated)
        memcpy(at, source.rows.place(start, size), size)
        write_int32(at + AT_SEQUENCE_NO, self.row_count_)
        self.end_row()
        return 0

    def event_ids(self):
        """Return the ids of all rows as a ``uuid[]`` in binary form."""
        cdef Py_ssize_t i, start = 0, size = 0
        cdef Sink ids = Sink()
        for i in range(self.row_count_):
            self.find_row(i, &start, &size)
            memcpy(ids.reserve(16), self.rows.place(start + AT_EVENT_ID, 16), 16)
        return encode_array(UUID_OID, self.row_count_, ids.start, 16)

    def is_dated(self, Py_ssize_t index):
        """Whether a row brought a time of its own. Raises IndexError."""
        cdef Py_ssize_t start = 0, size = 0
        self.find_row(index, &start, &size)
        return not (<RowMark *>self.marks.place(index * sizeof(RowMark), sizeof(RowMark))).undated

    def stream_arrays(self):
        """Return ``(uuid[], bigint[])`` in binary form: the distinct streams in byte order, and the events for each.

        Byte order is what every append locks in, and what keeps them from deadlocking.
        """
        cdef Py_ssize_t i
        cdef list in_order = sorted(self.streams)
        cdef Py_ssize_t stream_count = len(in_order)
        cdef Sink ids = Sink(), counts = Sink()
        cdef const int32_t *event_count
        cdef bytes stream_id
        for i in range(stream_count):
            stream_id = in_order[i]
            memcpy(ids.reserve(16), PyBytes_AS_STRING(stream_id), 16)
            event_count = self.count_of(self.streams[stream_id])
            write_int64(counts.reserve(8), event_count[0])
        return encode_array(UUID_OID, stream_count, ids.start, 16), encode_array(INT8_OID, stream_count, counts.start, 8)

    def place(self, transaction_no, head_versions, now):
        """Give every row its place in the log: what the server answered to ``stream_arrays``.

        *head_versions* is a binary bigint[]: each stream's version after these events, in the order of
        ``stream_arrays``; *now* the time of the rows that were added without one. May be repeated with other numbers. Returns how many of
        the streams had no event before.
        Raises MalformedRow for an array that is not what it should be, ValueError for a version too low to hold the
        rows, TypeError, ValueError or BufferError for the rest; the rows then cannot be sent before another call
        succeeds.
        """
        # Before anything can fail: rows of an earlier place must not be sent because nobody heard the error.
        self.placed = False
        self.changes += 1
        # Arguments next, since they may run code of the caller's: what the rows hold is looked at only afterwards.
        cdef int64_t number, moment = to_microseconds(now)
        cdef const unsigned char[::1] versions = head_versions
        cdef Py_ssize_t i, stream_count
        cdef Source source
        cdef list in_order
        cdef Sink first_versions = Sink()
        cdef int64_t head, first
        cdef int32_t stream, new_streams = 0
        cdef RowMark *mark
        check_part(transaction_no, MAX_TRANSACTION_NO, "transaction_no")
        number = transaction_no
        if versions is None:
            raise TypeError("head_versions must be a buffer, not None")
        stream_count = len(self.streams)
        if stream_count == 0:
            raise ValueError("there are no rows to place")
        if versions.shape[0] != 20 + 12 * stream_count:
            raise MalformedRow(
                f"bigint[] of {stream_count} versions must take {20 + 12 * stream_count} bytes,"
                f" not {versions.shape[0]}"
            )
        source.at = &versions[0]
        source.end = source.at + versions.shape[0]
        if (
            read_int32(take(&source, 4)) != 1 or read_int32(take(&source, 4)) != 0
            or read_int32(take(&source, 4)) != INT8_OID or read_int32(take(&source, 4)) != stream_count
        ):
            raise MalformedRow("not a one-dimensional bigint[] without NULLs of the expected length")
        take(&source, 4)  # lower bound: any
        first_versions.reserve(8 * stream_count)
        in_order = sorted(self.streams)
        for i in range(stream_count):
            if read_int32(take(&source, 4)) != 8:
                raise MalformedRow("a bigint takes 8 bytes")
            head = read_int64(take(&source, 8))
            stream = self.streams[in_order[i]]
            # In this order: the difference of a head near the lowest int64 would overflow.
            first = -1 if head < 0 else head - self.count_of(stream)[0] + 1
            if first < 0:
                raise ValueError(f"head version {head} is below the number of events of its stream")
            new_streams += first == 0
            (<int64_t *>first_versions.place(8 * stream, 8))[0] = first
        for i in range(self.row_count_):
            mark = <RowMark *>self.marks.place(i * <Py_ssize_t>sizeof(RowMark), sizeof(RowMark))
            first = (<int64_t *>first_versions.place(8 * mark.stream, 8))[0]
            write_int64(self.rows.place(mark.offset + AT_TRANSACTION_NO, 8), number)
            write_int64(self.rows.place(mark.offset + AT_STREAM_VERSION, 8), first + mark.nth)
            if mark.undated:
                write_int64(self.rows.place(mark.offset + AT_CREATED_AT, 8), moment)
        self.placed = True
        return new_streams

    def blocks(self, Py_ssize_t block_size=128 * 1024):
        """Yield the whole COPY stream, header and trailer included, as bytes of about *block_size*.

        Raises ValueError before the rows were placed, RuntimeError if they change or are placed anew while they are
        being sent: half of them would carry one transaction's number, half another's.
        """
        cdef Py_ssize_t offset = 0, size, total = self.rows.size
        cdef uint64_t changes = self.changes
        if block_size <= 0:
            raise ValueError("block_size must be positive")
        if not self.placed:
            raise ValueError("rows are sent only after place()")
        yield COPY_HEADER
        while True:
            if self.changes != changes:
                raise RuntimeError("rows changed while they were being sent")
            size = min(block_size, total - offset)
            if size == 0:
                break
            yield PyBytes_FromStringAndSize(<const char *>self.rows.place(offset, size), size)
            offset += size
        yield COPY_TRAILER

    def row(self, Py_ssize_t index):
        """Return the bytes of one row. Raises IndexError."""
        cdef Py_ssize_t start = 0, size = 0
        self.find_row(index, &start, &size)
        return PyBytes_FromStringAndSize(<const char *>self.rows.place(start, size), size)

    cdef int find_row(self, Py_ssize_t index, Py_ssize_t *start, Py_ssize_t *size) except -1:
        """Where a row lies in the buffer. Raises IndexError."""
        if not 0 <= index < self.row_count_:
            raise IndexError(index)
        cdef Py_ssize_t end = self.rows.size
        start[0] = (<RowMark *>self.marks.place(index * sizeof(RowMark), sizeof(RowMark))).offset
        if index + 1 < self.row_count_:
            end = (<RowMark *>self.marks.place((index + 1) * sizeof(RowMark), sizeof(RowMark))).offset
        size[0] = end - start[0]
        return 0

    cdef int32_t *count_of(self, int32_t stream) except NULL:
        return <int32_t *>self.event_counts.place(stream * <Py_ssize_t>sizeof(int32_t), sizeof(int32_t))
