"""Bytes that end where readable memory ends: who reads on dies of it."""

import ctypes
import mmap

PAGE = mmap.PAGESIZE
PROT_NONE = 0


class BytesBeforeLockedPage:
    """``view(data)`` holds *data* just before a page that must not be touched. Holds one data at a time.

    A bytes object would not do: the zero that CPython keeps behind it may be read, and a sanitizer thinks so too.
    """

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 2 * PAGE)
        self.locked_address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) + PAGE
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(self.locked_address), ctypes.c_size_t(PAGE), PROT_NONE) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")

    def view(self, data: bytes) -> memoryview:
        view = memoryview(self.memory)[PAGE - len(data) : PAGE]
        view[:] = data
        return view
