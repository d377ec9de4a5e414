# Result rows -> RecordedEvent.
#
# A row is checked and copied whole when its event is asked for: numbers into C fields, payload into bytes of its own.
# Python objects for the rest (UUID, datetime, Cursor, the payload's dict) are made when asked for. That costs a fifth of
# fetching (0.3 µs of 1.5) and buys that no event ever points into libpq's memory, nor keeps a page of 5,000 others alive.

cdef extern from "dlfcn.h":
    void *dlopen(const char *path, int flags)
    void *dlsym(void *handle, const char *name)
    int RTLD_LAZY, RTLD_NOLOAD

ctypedef int (*result_int)(const void *) noexcept
ctypedef int (*result_column_int)(const void *, int) noexcept
ctypedef int (*result_field_int)(const void *, int, int) noexcept
ctypedef const unsigned char *(*result_field)(const void *, int, int) noexcept


cdef struct Libpq:
    result_int ntuples
    result_int nfields
    result_column_int fformat
    result_field_int getisnull
    result_field_int getlength
    result_field getvalue


@cython.final
cdef class ResultReader:
    """Reads libpq results in place, with the functions of the very libpq that psycopg has loaded.

    *library* is the path of a loaded shared object that depends on that libpq (psycopg's own C module). Raises OSError
    if it is not loaded or brings no libpq.
    """

    cdef Libpq pq
    cdef readonly str library

    # Not __init__: a reader that skipped it would call functions at NULL.
    def __cinit__(self, str library not None):
        cdef bytes path = fsencode(library)
        if b"\0" in path:
            raise ValueError(f"embedded null byte in {library!r}")
        # NOLOAD: a second copy of libpq would have its own idea of a result's layout.
        cdef void *handle = dlopen(path, RTLD_LAZY | RTLD_NOLOAD)
        if handle is NULL:
            raise OSError(f"{library} is not loaded")
        # The handle is never closed: the function pointers live as long as the process.
        self.pq.ntuples = <result_int>dlsym(handle, "PQntuples")
        self.pq.nfields = <result_int>dlsym(handle, "PQnfields")
        self.pq.fformat = <result_column_int>dlsym(handle, "PQfformat")
        self.pq.getisnull = <result_field_int>dlsym(handle, "PQgetisnull")
        self.pq.getlength = <result_field_int>dlsym(handle, "PQgetlength")
        self.pq.getvalue = <result_field>dlsym(handle, "PQgetvalue")
        if (
            self.pq.ntuples is NULL or self.pq.nfields is NULL or self.pq.fformat is NULL or self.pq.getisnull is NULL
            or self.pq.getlength is NULL or self.pq.getvalue is NULL
        ):
            raise OSError(f"{library} brings no libpq")
        self.library = library


cdef enum:
    PAYLOAD_COLUMN = 9


cdef struct Field:
    const unsigned char *at
    Py_ssize_t size        # -1: NULL


cdef struct EventNumbers:
    int64_t transaction_no
    int64_t stream_version
    int64_t created_at     # microseconds since 2000-01-01 UTC
    int32_t sequence_no
    int32_t event_version
    bint correlated
    unsigned char event_id[16]
    unsigned char stream_id[16]
    unsigned char correlation_id[16]


# datetime covers less than timestamptz: years 1 to 9999, in microseconds since 2000.
cdef int64_t FIRST_MOMENT = to_microseconds(datetime.min.replace(tzinfo=timezone.utc))
cdef int64_t LAST_MOMENT = to_microseconds(datetime.max.replace(tzinfo=timezone.utc))

cdef object new_uuid = UUID.__new__
# UUID's own constructor parses and checks what is known to be right: 0.8 µs against 0.2.
cdef object set_uuid_int = UUID.int.__set__
cdef object set_uuid_is_safe = UUID.is_safe.__set__
cdef object UNKNOWN_SAFETY = SafeUUID.unknown
cdef object int_from_bytes = int.from_bytes
# Exact where orjson is not: integers beyond 64 bits stay integers.
cdef object decode_json = JsonDecoder().decode


cdef object make_uuid(const unsigned char *at):
    made = new_uuid(UUID)
    set_uuid_int(made, int_from_bytes(PyBytes_FromStringAndSize(<const char *>at, 16), "big"))
    set_uuid_is_safe(made, UNKNOWN_SAFETY)
    return made


@cython.final
@cython.freelist(8192)
cdef class RecordedEvent:
    """An event as it is stored. Made by the store; its fields are decoded when first asked for.

    ``data`` is the stored JSON, byte for byte; ``payload`` what it means, decoded once and then kept; ``metadata`` a
    decoded JSON value or None. ``created_at`` is aware, in UTC. ``version`` is the version of the payload's layout,
    ``stream_version`` the event's place in its stream, from 0.
    """

    cdef EventNumbers numbers
    cdef readonly str name
    cdef readonly bytes data
    cdef readonly bytes metadata_json
    cdef object decode_payload
    cdef object payload_
    cdef object metadata_
    cdef bint payload_decoded
    cdef bint metadata_decoded

    __class_getitem__ = classmethod(GenericAlias)

    def __init__(self):
        raise TypeError("a RecordedEvent comes from a store")

    @property
    def cursor(self):
        return make_cursor(self.numbers.transaction_no, self.numbers.sequence_no)

    @property
    def event_id(self):
        return make_uuid(self.numbers.event_id)

    @property
    def stream_id(self):
        return make_uuid(self.numbers.stream_id)

    @property
    def stream_version(self):
        return self.numbers.stream_version

    @property
    def correlation_id(self):
        return make_uuid(self.numbers.correlation_id) if self.numbers.correlated else None

    @property
    def created_at(self):
        cdef int64_t moment = self.numbers.created_at
        cdef int64_t days = moment // 86_400_000_000LL
        if moment < days * 86_400_000_000LL:  # C division rounds towards zero
            days -= 1
        moment -= days * 86_400_000_000LL
        return EPOCH + c_datetime.timedelta_new(<int>days, <int>(moment // 1_000_000), <int>(moment % 1_000_000))

    @property
    def version(self):
        return self.numbers.event_version

    @property
    def payload(self):
        if not self.payload_decoded:
            if self.decode_payload is None:
                self.payload_ = self.plain(self.data, "")
            else:
                self.payload_ = self.decode_payload(self)
            self.payload_decoded = True
        return self.payload_

    @property
    def metadata(self):
        if not self.metadata_decoded:
            if self.metadata_json is not None:
                self.metadata_ = self.plain(self.metadata_json, "metadata: ")
            self.metadata_decoded = True
        return self.metadata_

    cdef object plain(self, bytes stored, str what):
        """What *stored* means, in plain Python values. Raises EventParseError."""
        try:
            return decode_json(stored)
        except (MsgspecError, UnicodeDecodeError, RecursionError) as error:
            reason, _, path = str(error).partition(" - at `")
            raise EventParseError.of(self, what + reason, path.rstrip("`") or None) from error

    def __eq__(self, other):
        """Equal as stored: the same place, ids, time, name and bytes."""
        if type(other) is not RecordedEvent:
            return NotImplemented
        cdef RecordedEvent that = <RecordedEvent>other
        return (
            same_numbers(&self.numbers, &that.numbers) and self.name == that.name and self.data == that.data
            and self.metadata_json == that.metadata_json
        )

    def __hash__(self):
        return hash(self.cursor)

    def __repr__(self):
        # Without the payload: a repr ends up in logs.
        return (
            f"<RecordedEvent {self.name!r} version {self.version} at {self.cursor}, number {self.stream_version} of"
            f" stream {self.stream_id}, {len(self.data)} bytes>"
        )


cdef bint same_numbers(const EventNumbers *left, const EventNumbers *right) noexcept:
    # Field by field: the padding between them is not compared.
    return (
        left.transaction_no == right.transaction_no and left.sequence_no == right.sequence_no
        and left.stream_version == right.stream_version and left.created_at == right.created_at
        and left.event_version == right.event_version and left.correlated == right.correlated
        and memcmp(left.event_id, right.event_id, 16) == 0 and memcmp(left.stream_id, right.stream_id, 16) == 0
        and (not left.correlated or memcmp(left.correlation_id, right.correlation_id, 16) == 0)
    )


cdef const unsigned char *fixed(const Field *field, Py_ssize_t size, int column) except NULL:
    if field.size != size:
        announced = "NULL" if field.size < 0 else f"{field.size} bytes"
        raise MalformedRow(f"column {EVENT_COLUMNS[column]} must take {size} bytes, not {announced}")
    return field.at


cdef class EventNames:
    """The names last seen: a log has few, and making each row's anew costs more than finding it here."""

    cdef list names
    cdef int turn

    def __cinit__(self):
        self.names = []
        self.turn = 0

    cdef str look_up(self, const Field *field):
        cdef Py_ssize_t size = 0
        cdef const char *known
        cdef str name
        for name in self.names:
            known = PyUnicode_AsUTF8AndSize(name, &size)
            if size == field.size and memcmp(known, field.at, size) == 0:
                return name
        try:
            name = PyUnicode_DecodeUTF8(<const char *>field.at, field.size, NULL)
        except UnicodeDecodeError as error:
            raise MalformedRow(f"column event_name is not UTF-8: {error.reason}") from error
        if len(self.names) < 8:
            self.names.append(name)
        else:
            self.names[self.turn] = name
            self.turn = (self.turn + 1) & 7
        return name


cdef RecordedEvent build_event(const Field *fields, object decode_payload, EventNames names):
    """Check every field of a row and copy it. Raises MalformedRow."""
    cdef RecordedEvent event = RecordedEvent.__new__(RecordedEvent)
    cdef EventNumbers *numbers = &event.numbers
    numbers.transaction_no = read_int64(fixed(&fields[0], 8, 0))
    numbers.sequence_no = read_int32(fixed(&fields[1], 4, 1))
    memcpy(numbers.event_id, fixed(&fields[2], 16, 2), 16)
    memcpy(numbers.stream_id, fixed(&fields[3], 16, 3), 16)
    numbers.stream_version = read_int64(fixed(&fields[4], 8, 4))
    numbers.created_at = read_int64(fixed(&fields[5], 8, 5))
    numbers.event_version = read_int32(fixed(&fields[6], 4, 6))
    numbers.correlated = fields[7].size >= 0
    if numbers.correlated:
        memcpy(numbers.correlation_id, fixed(&fields[7], 16, 7), 16)
    if numbers.transaction_no < 0 or numbers.sequence_no < 0 or numbers.stream_version < 0 or numbers.event_version < 0:
        raise MalformedRow("a number that counts from 0 is negative")
    if not FIRST_MOMENT <= numbers.created_at <= LAST_MOMENT:
        raise MalformedRow("created_at lies outside the years 1 to 9999")
    if fields[8].size < 0 or fields[9].size < 0:
        raise MalformedRow("event_name or payload is NULL")
    event.name = names.look_up(&fields[8])
    event.data = PyBytes_FromStringAndSize(<const char *>fields[9].at, fields[9].size)
    if fields[10].size >= 0:
        event.metadata_json = PyBytes_FromStringAndSize(<const char *>fields[10].at, fields[10].size)
    event.decode_payload = decode_payload
    return event


def decode_row(const unsigned char[::1] row not None, decode_payload=None):
    """Return the RecordedEvent that the bytes of one row of a binary COPY hold (columns: EVENT_COLUMNS).

    ``decode_payload(event)`` is called when ``payload`` is first asked for; without it that is the JSON in plain values.
    Raises MalformedRow for anything that is not exactly one row.
    """
    cdef Field fields[COLUMN_COUNT]
    cdef Source source
    cdef int column
    if row.shape[0] == 0:
        raise MalformedRow("an empty row")
    source.at = &row[0]
    source.end = source.at + row.shape[0]
    if read_int16(take(&source, 2)) != COLUMN_COUNT:
        raise MalformedRow(f"an event has {COLUMN_COUNT} columns")
    for column in range(COLUMN_COUNT):
        fields[column].size = read_int32(take(&source, 4))
        if fields[column].size < -1:
            raise MalformedRow(f"column {EVENT_COLUMNS[column]} announces {fields[column].size} bytes")
        # An empty field at the very end points one past the row, and is not read.
        fields[column].at = take(&source, max(fields[column].size, 0))
    if source.at != source.end:
        raise MalformedRow(f"{source.end - source.at} bytes behind the last column")
    return build_event(fields, decode_payload, EventNames())


@cython.final
cdef class EventBatch:
    """The events of a query result, as a sequence that decodes each one when it is asked for.

    Nothing of an event is kept here once it has been handed out: whoever goes through a batch and lets each event go
    needs the memory of one, and the processor's cache holds it. (With 5,000 decoded payloads alive at a time, decoding
    took three times as long.) So an index asked for twice gives two equal events. Columns: EVENT_COLUMNS, all in binary
    format. *result* is a psycopg ``pq.PGresult``; with a *reader* it is read in place, otherwise field by field through
    its ``get_value``. ``decode_payload(event)`` is called when a payload is first asked for; without it that is the JSON
    in plain values. Raises MalformedRow for a result of another shape at once, for a row that is no event when it is
    reached.
    """

    cdef object result
    cdef object decode_payload
    cdef ResultReader reader
    cdef EventNames names
    cdef int row_count

    def __init__(self, result not None, decode_payload=None, ResultReader reader=None):
        cdef const void *pointer
        cdef int column
        self.result = result
        self.decode_payload = decode_payload
        self.reader = reader
        self.names = EventNames()
        self.row_count = 0
        if reader is None:
            if result.nfields != COLUMN_COUNT:
                raise MalformedRow(f"an event has {COLUMN_COUNT} columns, the result {result.nfields}")
            for column in range(COLUMN_COUNT):
                if result.fformat(column) != 1:
                    raise MalformedRow("the result is not in binary format")
            self.row_count = result.ntuples
        else:
            pointer = self.pointer()
            if reader.pq.nfields(pointer) != COLUMN_COUNT:
                raise MalformedRow(f"an event has {COLUMN_COUNT} columns, the result {reader.pq.nfields(pointer)}")
            for column in range(COLUMN_COUNT):
                if reader.pq.fformat(pointer, column) != 1:
                    raise MalformedRow("the result is not in binary format")
            self.row_count = reader.pq.ntuples(pointer)
        # No length is negative: Python would end in a SystemError.
        if self.row_count < 0:
            raise MalformedRow(f"a result of {self.row_count} rows")

    def __len__(self):
        return self.row_count

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self.event(row) for row in range(*index.indices(self.row_count))]
        cdef Py_ssize_t row = PyNumber_AsSsize_t(index, IndexError)
        if row < 0:
            row += self.row_count
        if not 0 <= row < self.row_count:
            raise IndexError("no such event in the batch")
        return self.event(<int>row)

    def __iter__(self):
        cdef int row
        for row in range(self.row_count):
            yield self.event(row)

    def __repr__(self):
        return f"<EventBatch of {self.row_count} events>"

    def index(self, event, start=0, stop=9223372036854775807):
        """Return where *event* stands. Raises ValueError if it is not there."""
        return list(self).index(event, start, stop)

    def count(self, event):
        """Return how often *event* is there."""
        return list(self).count(event)

    @property
    def payload_bytes(self):
        """The size of all payloads as stored."""
        cdef Py_ssize_t size = 0
        cdef const void *pointer
        cdef int row
        if self.reader is None:
            return sum(len(self.result.get_value(row, PAYLOAD_COLUMN) or b"") for row in range(self.row_count))
        pointer = self.pointer()
        for row in range(self.row_count):
            size += self.reader.pq.getlength(pointer, row, PAYLOAD_COLUMN)
        return size

    cdef const void *pointer(self) except NULL:
        """Where libpq keeps the result; asked for anew each time, because it can be cleared. Raises ValueError."""
        address = self.result.pgresult_ptr
        if not address:
            raise ValueError("the result was cleared")
        return <const void *><uintptr_t>address

    cdef RecordedEvent event(self, int row):
        cdef Field fields[COLUMN_COUNT]
        cdef const void *pointer
        cdef int column
        cdef list values
        cdef bytes value
        if self.reader is None:
            values = [self.result.get_value(row, column) for column in range(COLUMN_COUNT)]
            for column in range(COLUMN_COUNT):
                if values[column] is None:
                    fields[column].size = -1
                else:
                    value = values[column]
                    fields[column].at = <const unsigned char *>PyBytes_AS_STRING(value)
                    fields[column].size = PyBytes_GET_SIZE(value)
            return build_event(fields, self.decode_payload, self.names)
        pointer = self.pointer()
        for column in range(COLUMN_COUNT):
            fields[column].at = self.reader.pq.getvalue(pointer, row, column)
            fields[column].size = self.reader.pq.getlength(pointer, row, column)
            # A zero length may be NULL: only then is it worth asking.
            if fields[column].size == 0 and self.reader.pq.getisnull(pointer, row, column):
                fields[column].size = -1
        # Copies all that it needs: no event points into libpq's memory.
        return build_event(fields, self.decode_payload, self.names)


def decode_result(result not None, decode_payload=None, ResultReader reader=None):
    """Return all events of a query result as a list; parameters and errors as for EventBatch."""
    return list(EventBatch(result, decode_payload, reader))
