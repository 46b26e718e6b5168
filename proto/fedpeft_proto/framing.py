"""The hot message of AdapterExchange, encoded and decoded without the copies that generated code makes.

``UploadChunk`` and ``DownloadChunk`` begin alike: ``bytes data = 1; fixed32 crc32 = 2``. Generated code copies the data
into a message object, out of it into the serialised bytes, and on the other side twice again; at a chunk of a megabyte
these copies cost more than the network. Here a chunk is joined once from its parts, and taken apart as a view into the
bytes that arrived. What goes over the wire is exactly what generated code would send (a test compares them), so any
protobuf implementation is a valid peer.

This file is written by hand; everything in ``v1/`` beside it is generated.

>>> frame = encode_chunk(b"abc")
>>> from fedpeft_proto.v1.exchange_pb2 import UploadChunk
>>> UploadChunk(data=b"abc", crc32=zlib.crc32(b"abc")).SerializeToString() == frame
True
>>> decode_chunk(frame).data.tobytes()
b'abc'
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

_DATA, _CRC = 0x0A, 0x15  # field number << 3 | wire type: 1 length-delimited, 2 fixed32
_TRAILER = struct.Struct("<BI")


class Chunk(NamedTuple):
    """A piece of an object as it arrived; ``data`` is a view into the received message."""

    data: memoryview
    crc32: int

    def intact(self) -> bool:
        """Whether the data has the checksum that was sent with it."""
        return zlib.crc32(self.data) == self.crc32


def encode_chunk(data: bytes | bytearray | memoryview) -> bytes:
    """The serialised ``UploadChunk`` or ``DownloadChunk`` of ``data`` (not empty) and its checksum: one copy."""
    head, length = bytearray((_DATA,)), len(data)
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return b"".join((head, data, _TRAILER.pack(_CRC, zlib.crc32(data))))


def decode_chunk(message: bytes) -> Chunk | None:
    """The chunk in ``message``, or ``None`` when the message is anything but plain data and checksum in this order.

    ``None`` is no error: the caller then parses with generated code (a header, another order of fields, no checksum
    because it is zero).
    """
    size = len(message)
    if size < 8 or message[0] != _DATA:
        return None
    length, shift, at = 0, 0, 1
    while shift < 35:
        byte = message[at]
        length |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            break
        shift += 7
        if at == size:
            return None
    end = at + length
    if end + _TRAILER.size != size or message[end] != _CRC:
        return None
    return Chunk(memoryview(message)[at:end], _TRAILER.unpack_from(message, end)[1])
