"""Stable stream ids for people whose streams have names."""

from __future__ import annotations

from hashlib import sha1
from typing import Final
from uuid import UUID

STREAM_NAMESPACE: Final = UUID("03256585-295d-5521-875e-a6e6d09f422f")
"""The UUIDv5 namespace of ``stream_uuid``; fixed for ever, because stored streams are found by it."""
_NAMESPACE_BYTES: Final = STREAM_NAMESPACE.bytes


def stream_uuid(*parts: str) -> UUID:
    """Return the id of the stream that is named by *parts*, as in ``stream_uuid("order", "4711")``.

    A UUIDv5 (RFC 9562, section 5.5) in ``STREAM_NAMESPACE`` of the parts as netstrings (their length in UTF-8 bytes,
    a colon, the bytes, a comma: ``5:order,4:4711,``), so that no two lists of parts share a name. Raises ValueError
    without parts or for a lone surrogate, TypeError for a part that is no str.
    """
    if not parts:
        raise ValueError("a stream name has at least one part")
    return UUID(bytes=_uuid5(_netstrings(parts)))


def stream_bytes(text: str) -> bytes:
    """Return the 16 bytes of ``stream_uuid(text)``."""
    return _uuid5(_netstrings((text,)))


def _netstrings(parts: tuple[str, ...]) -> bytes:
    name = bytearray()
    for part in parts:
        if not isinstance(part, str):
            raise TypeError(f"a part of a stream name is a str, not {type(part).__name__}")
        encoded = part.encode()  # UnicodeEncodeError is a ValueError
        name += b"%d:%b," % (len(encoded), encoded)
    return bytes(name)


def _uuid5(name: bytes) -> bytes:
    digest = bytearray(sha1(_NAMESPACE_BYTES + name, usedforsecurity=False).digest()[:16])
    digest[6] = digest[6] & 0x0F | 0x50
    digest[8] = digest[8] & 0x3F | 0x80
    return bytes(digest)
