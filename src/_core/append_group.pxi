# A group of appends -> the parameters of one call, as binary arrays; and the arrays that the call answers with.
#
# The events stand in EventRows already, checked and in PostgreSQL's form: here they are only put together by column.
# Through psycopg's own adaption, from lists, the same parameters took longer than all of the server's work.

cdef enum:
    INT4_OID = 23
    TEXT_OID = 25
    JSON_OID = 114
    TIMESTAMPTZ_OID = 1184
    ARRAY_HEADER = 20
    AT_HAS_NULL = 4
    AT_COUNT = 12


cdef Sink new_array(uint32_t element_oid):
    """A one-dimensional array without elements."""
    cdef Sink array = Sink()
    cdef unsigned char *at = array.reserve(ARRAY_HEADER)
    write_int32(at, 1)
    write_int32(at + AT_HAS_NULL, 0)
    write_int32(at + 8, <int32_t>element_oid)
    write_int32(at + AT_COUNT, 0)
    write_int32(at + 16, 1)
    return array


cdef int add_element(Sink array, const unsigned char *value, Py_ssize_t size) except -1:
    """Append an element; NULL for a negative *size*."""
    cdef unsigned char *at = array.reserve(4 + max(size, 0))
    write_int32(at, <int32_t>size)
    if size > 0:
        memcpy(at + 4, value, size)
    elif size < 0:
        write_int32(array.start + AT_HAS_NULL, 1)
    write_int32(array.start + AT_COUNT, read_int32(array.start + AT_COUNT) + 1)
    return 0


cdef inline int add_int4(Sink array, int64_t value) except -1:
    cdef unsigned char raw[4]
    write_int32(raw, <int32_t>value)
    return add_element(array, raw, 4)


cdef inline int add_int8(Sink array, int64_t value) except -1:
    cdef unsigned char raw[8]
    write_int64(raw, value)
    return add_element(array, raw, 8)


cdef bytes finished(Sink array):
    return PyBytes_FromStringAndSize(<const char *>array.start, array.size)


cdef bytes unless_all_null(Sink array, bint any_value):
    return finished(array) if any_value else None


cdef class EventColumns:
    """The events of a group, a column each."""

    cdef Sink writes, nths, event_ids, correlation_ids, created_ats, names, versions, payloads, metadatas
    cdef bint correlated, dated, described

    def __cinit__(self):
        self.writes, self.nths = new_array(INT4_OID), new_array(INT4_OID)
        self.event_ids, self.correlation_ids = new_array(UUID_OID), new_array(UUID_OID)
        self.created_ats, self.names = new_array(TIMESTAMPTZ_OID), new_array(TEXT_OID)
        self.versions, self.payloads, self.metadatas = new_array(INT4_OID), new_array(JSON_OID), new_array(JSON_OID)

    cdef int add_rows(self, EventRows rows, list writes) except -1:
        """Add the rows of one request. *writes* gives the number of the write by the row's stream, as the rows count it."""
        cdef Py_ssize_t i, start = 0, size = 0
        cdef const unsigned char *fixed
        cdef const unsigned char *value
        cdef Py_ssize_t length = 0
        cdef RowMark *mark
        cdef Source rest
        for i in range(rows.row_count_):
            rows.find_row(i, &start, &size)
            mark = <RowMark *>rows.marks.place(i * <Py_ssize_t>sizeof(RowMark), sizeof(RowMark))
            add_int4(self.writes, writes[mark.stream])
            add_int4(self.nths, mark.nth)
            fixed = rows.rows.place(start, size)
            add_element(self.event_ids, fixed + AT_EVENT_ID, 16)
            add_element(self.created_ats, fixed + AT_CREATED_AT, -1 if mark.undated else 8)
            add_element(self.versions, fixed + AT_EVENT_VERSION, 4)
            self.dated = self.dated or not mark.undated
            rest.at, rest.end = fixed + FIXED_SIZE, fixed + size
            value = take_value(&rest, &length)
            add_element(self.correlation_ids, value, length)
            self.correlated = self.correlated or length >= 0
            value = take_value(&rest, &length)
            add_element(self.names, value, length)
            value = take_value(&rest, &length)
            add_element(self.payloads, value, length)
            value = take_value(&rest, &length)
            add_element(self.metadatas, value, length)
            self.described = self.described or length >= 0
        return 0

    cdef list finish(self):
        return [
            finished(self.writes), finished(self.nths), finished(self.event_ids),
            unless_all_null(self.correlation_ids, self.correlated), unless_all_null(self.created_ats, self.dated),
            finished(self.names), finished(self.versions), finished(self.payloads),
            unless_all_null(self.metadatas, self.described),
        ]


cdef const unsigned char *take_value(Source *row, Py_ssize_t *length) except NULL:
    """Step over a column of a row, its length first (-1: NULL, and then where it would stand)."""
    length[0] = read_int32(take(row, 4))
    return take(row, max(length[0], 0))


def row_values(EventRows rows not None, Py_ssize_t index):
    """Return what a row holds of its event, each value in binary form, None for NULL.

    ``[event_id, correlation_id, created_at, event_name, event_version, payload, metadata]``; the time is None where the
    server's is taken. Raises IndexError.
    """
    cdef Py_ssize_t start = 0, size = 0, length = 0
    cdef const unsigned char *fixed
    cdef const unsigned char *value
    cdef RowMark *mark
    cdef Source rest
    cdef list values = []
    rows.find_row(index, &start, &size)
    mark = <RowMark *>rows.marks.place(index * <Py_ssize_t>sizeof(RowMark), sizeof(RowMark))
    fixed = rows.rows.place(start, size)
    rest.at, rest.end = fixed + FIXED_SIZE, fixed + size
    for _ in range(4):
        value = take_value(&rest, &length)
        values.append(None if length < 0 else PyBytes_FromStringAndSize(<const char *>value, length))
    correlation_id, event_name, payload, metadata = values
    return [
        PyBytes_FromStringAndSize(<const char *>fixed + AT_EVENT_ID, 16),
        correlation_id,
        None if mark.undated else PyBytes_FromStringAndSize(<const char *>fixed + AT_CREATED_AT, 8),
        event_name,
        PyBytes_FromStringAndSize(<const char *>fixed + AT_EVENT_VERSION, 4),
        payload,
        metadata,
    ]


def group_parameters(list requests not None, bint with_events=True):
    """Return ``(parameters, write_streams, write_offsets)`` of a group of appends, as ``append_v1`` takes them.

    *requests* are pairs of EventRows and the request's writes: ``(stream_id, event_count, least_version, most_version,
    transaction_no, sequence_no)`` with a stream only once; the streams that take events in the order in which the rows
    have them, and as many as the rows have: ValueError otherwise. The bounds are None in every write or where anything
    is expected; the cursor is None but where one is. *parameters* are 19 arrays in binary form, None for those that would
    hold nothing but NULLs; those of the events are empty without *with_events*. The other two, by write: its stream,
    counted from 0 in byte order, and how far below the advanced head it finds it.
    """
    cdef dict totals = {}, numbers = {}, taken = {}
    cdef Sink stream_ids = new_array(UUID_OID), event_counts = new_array(INT8_OID)
    cdef Sink write_requests = new_array(INT4_OID), write_streams = new_array(INT4_OID)
    cdef Sink write_counts = new_array(INT8_OID), offsets = new_array(INT8_OID)
    cdef Sink least = new_array(INT8_OID), most = new_array(INT8_OID)
    cdef Sink numbers_expected = new_array(INT8_OID), places_expected = new_array(INT4_OID)
    cdef EventColumns events = EventColumns()
    cdef list stream_of_write = [], offset_of_write = [], writes_with_events
    cdef EventRows rows
    cdef bytes stream_id
    cdef bint bounded = False, at_cursor = False
    cdef object stream
    cdef int64_t count, offset
    cdef int32_t request_no = 0, write_no = 0, place
    for _, writes in requests:
        for stream_id, count, _, _, _, _ in writes:
            if stream_id is None:
                raise TypeError("a stream id is bytes, not None")
            if PyBytes_GET_SIZE(stream_id) != 16:
                raise ValueError("a stream id is 16 bytes")
            totals[stream_id] = totals.get(stream_id, 0) + count
    for stream_id in sorted(totals):
        numbers[stream_id] = len(numbers)
        add_element(stream_ids, <const unsigned char *>PyBytes_AS_STRING(stream_id), 16)
        add_int8(event_counts, totals[stream_id])
    for rows, writes in requests:
        if rows is None:
            raise TypeError("a request has EventRows, not None")
        request_no += 1
        writes_with_events = []
        for stream_id, count, least_version, most_version, transaction_no, sequence_no in writes:
            write_no += 1
            # What the offsets are made of must be what the rows hold: a version would come twice, or never.
            stream = rows.streams.get(stream_id)
            if stream is None:
                if count != 0:
                    raise ValueError(f"{count} events are announced for a stream of which there are no rows")
            elif stream != len(writes_with_events) or count != rows.count_of(stream)[0]:
                raise ValueError("the rows belong to other streams than the writes, or to these in another order")
            else:
                writes_with_events.append(write_no)
            number = numbers[stream_id]
            offset = totals[stream_id] - taken.get(stream_id, 0)
            taken[stream_id] = totals[stream_id] - offset + count
            stream_of_write.append(number)
            offset_of_write.append(offset)
            add_int4(write_requests, request_no)
            add_int4(write_streams, number + 1)
            add_int8(write_counts, count)
            add_int8(offsets, offset)
            if least_version is None:
                add_int8(least, -1)
                add_int8(most, MAX_VERSION)
            else:
                bounded = True
                add_int8(least, least_version)
                add_int8(most, most_version)
            if transaction_no is None:
                add_element(numbers_expected, NULL, -1)
                add_element(places_expected, NULL, -1)
            else:
                bounded = at_cursor = True
                add_int8(numbers_expected, transaction_no)
                place = sequence_no
                add_int4(places_expected, place)
        if len(writes_with_events) != len(rows.streams):
            raise ValueError("the rows belong to more streams than the writes")
        if with_events:
            events.add_rows(rows, writes_with_events)
    return (
        [
            finished(stream_ids), finished(event_counts), finished(write_requests), finished(write_streams),
            finished(write_counts), finished(offsets), unless_all_null(least, bounded), unless_all_null(most, bounded),
            unless_all_null(numbers_expected, at_cursor), unless_all_null(places_expected, at_cursor),
            *events.finish(),
        ],
        stream_of_write,
        offset_of_write,
    )


cdef int64_t MAX_VERSION = 0x7FFFFFFFFFFFFFFF


def int_array(data):
    """Return the elements of a binary ``integer[]`` or ``bigint[]``, None for NULLs; *data* None is an empty one.

    Raises MalformedRow for anything else.
    """
    if data is None:
        return []
    cdef const unsigned char[::1] view = data
    cdef Source source
    cdef int32_t dimensions, element_oid, count, size, i
    cdef list elements = []
    if view.shape[0] == 0:
        raise MalformedRow("an array takes at least 12 bytes")
    source.at = &view[0]
    source.end = source.at + view.shape[0]
    dimensions = read_int32(take(&source, 4))
    take(&source, 4)
    element_oid = read_int32(take(&source, 4))
    size = 4 if element_oid == INT4_OID else 8
    if not 0 <= dimensions <= 1 or (element_oid != INT4_OID and element_oid != INT8_OID):
        raise MalformedRow("not a one-dimensional array of integers")
    count = 0
    if dimensions == 1:
        count = read_int32(take(&source, 4))
        take(&source, 4)
    if count < 0:
        raise MalformedRow(f"an array of {count} elements")
    for i in range(count):
        length = read_int32(take(&source, 4))
        if length == -1:
            elements.append(None)
        elif length != size:
            raise MalformedRow(f"an integer of {length} bytes")
        elif size == 4:
            elements.append(read_int32(take(&source, 4)))
        else:
            elements.append(read_int64(take(&source, 8)))
    if source.at != source.end:
        raise MalformedRow(f"{source.end - source.at} bytes behind the last element")
    return elements


def time_ordered_uuid(uint64_t place, bytes chance not None):
    """Return the UUIDv7 (RFC 9562, section 5.7) with *place*, 48 bits of milliseconds and 12 of a counter, and *chance*.

    *chance* is 8 bytes, of which the first two bits are not used. Raises ValueError for other sizes. By UUID's own
    constructor, of an int put together in Python, an id took 1.8 µs.
    """
    cdef unsigned char raw[16]
    if PyBytes_GET_SIZE(chance) != 8 or place >> 60:
        raise ValueError("an id takes 60 bits of place, and 8 bytes of chance")
    write_int64(raw, <int64_t>((place >> 12 << 16) | 0x7000 | (place & 0xFFF)))
    memcpy(raw + 8, <const unsigned char *>PyBytes_AS_STRING(chance), 8)
    raw[8] = (raw[8] & 0x3F) | 0x80
    return make_uuid(raw)
