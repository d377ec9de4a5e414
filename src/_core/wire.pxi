# The only pointer arithmetic: every read goes through take(), every write through reserve(). Integers are big-endian,
# as PostgreSQL sends and expects them.

cdef extern from *:
    """
    #include <stdint.h>
    static inline uint16_t hs_swap16(uint16_t n) { return __builtin_bswap16(n); }
    static inline uint32_t hs_swap32(uint32_t n) { return __builtin_bswap32(n); }
    static inline uint64_t hs_swap64(uint64_t n) { return __builtin_bswap64(n); }
    static inline int hs_first_bit(uint64_t n) { return __builtin_ctzll(n); }  /* the lowest one; n is not 0 */
    #if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
    #error "written for little-endian machines: make the swaps conditional and run the tests"
    #endif
    """
    uint16_t hs_swap16(uint16_t) noexcept
    uint32_t hs_swap32(uint32_t) noexcept
    uint64_t hs_swap64(uint64_t) noexcept
    int hs_first_bit(uint64_t) noexcept


cdef struct Source:
    const unsigned char *at
    const unsigned char *end


cdef inline const unsigned char *take(Source *source, Py_ssize_t size) except NULL:
    """Step over *size* bytes and return where they start. Raises MalformedRow."""
    cdef const unsigned char *start = source.at
    if size < 0 or size > source.end - source.at:
        raise MalformedRow(f"{size} bytes announced, {source.end - source.at} there")
    source.at += size
    return start


# Through memcpy: fields stand at odd addresses, where a plain load is undefined behaviour.
cdef inline int16_t read_int16(const unsigned char *at) noexcept:
    cdef uint16_t raw
    memcpy(&raw, at, 2)
    return <int16_t>hs_swap16(raw)


cdef inline int32_t read_int32(const unsigned char *at) noexcept:
    cdef uint32_t raw
    memcpy(&raw, at, 4)
    return <int32_t>hs_swap32(raw)


cdef inline int64_t read_int64(const unsigned char *at) noexcept:
    cdef uint64_t raw
    memcpy(&raw, at, 8)
    return <int64_t>hs_swap64(raw)


cdef inline void write_int16(unsigned char *at, int16_t value) noexcept:
    cdef uint16_t raw = hs_swap16(<uint16_t>value)
    memcpy(at, &raw, 2)


cdef inline void write_int32(unsigned char *at, int32_t value) noexcept:
    cdef uint32_t raw = hs_swap32(<uint32_t>value)
    memcpy(at, &raw, 4)


cdef inline void write_int64(unsigned char *at, int64_t value) noexcept:
    cdef uint64_t raw = hs_swap64(<uint64_t>value)
    memcpy(at, &raw, 8)


@cython.final
cdef class Sink:
    """A growing run of bytes. Nothing of it is handed out by reference: growing moves it."""

    cdef unsigned char *start
    cdef Py_ssize_t size
    cdef Py_ssize_t capacity

    def __dealloc__(self):
        PyMem_Free(self.start)

    cdef unsigned char *reserve(self, Py_ssize_t size) except NULL:
        """Append *size* bytes, not yet written, and return where they start (valid until the next call)."""
        cdef Py_ssize_t wanted = self.size + size
        cdef Py_ssize_t capacity
        cdef void *moved
        if size < 0 or wanted < self.size:
            raise OverflowError("size out of range")
        if wanted > self.capacity:
            capacity = max(wanted, self.capacity + (self.capacity >> 1), 4096)
            moved = PyMem_Realloc(self.start, capacity)
            if moved is NULL:
                raise MemoryError()
            self.start = <unsigned char *>moved
            self.capacity = capacity
        cdef unsigned char *reserved = self.start + self.size
        self.size = wanted
        return reserved

    cdef unsigned char *place(self, Py_ssize_t offset, Py_ssize_t size) except NULL:
        """Where *size* bytes at *offset*, written before, stand."""
        if offset < 0 or size < 0 or size > self.size - offset:
            raise IndexError("outside the buffer")
        return self.start + offset


cdef bytes encode_array(uint32_t element_oid, Py_ssize_t count, const unsigned char *elements, Py_ssize_t width):
    """The binary form of a one-dimensional PostgreSQL array of *count* elements of *width* bytes without NULLs."""
    # dimensions, has-null flag, element type, length, lower bound; then each element behind its length
    cdef bytes result = PyBytes_FromStringAndSize(NULL, 20 + count * (4 + width))
    cdef unsigned char *at = <unsigned char *>PyBytes_AS_STRING(result)
    cdef Py_ssize_t i
    write_int32(at, 1)
    write_int32(at + 4, 0)
    write_int32(at + 8, <int32_t>element_oid)
    write_int32(at + 12, <int32_t>count)
    write_int32(at + 16, 1)
    at += 20
    for i in range(count):
        write_int32(at, <int32_t>width)
        memcpy(at + 4, elements + i * width, width)
        at += 4 + width
    return result
