"""A PNG without a library for pictures."""

from __future__ import annotations

import struct
import zlib


def png(side: int) -> bytes:
    """A picture of ``side`` x ``side`` pixels that runs from dark to light."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = [[55 + 200 * (x + y) // (2 * side) for x in range(side)] for y in range(side)]
    raw = b"".join(b"\0" + b"".join(bytes([s, s, 255 - s // 2]) for s in row) for row in rows)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
