from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ProbeRequest(_message.Message):
    __slots__ = ("digest", "run_id", "round", "total_bytes")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    digest: str
    run_id: str
    round: int
    total_bytes: int
    def __init__(self, digest: _Optional[str] = ..., run_id: _Optional[str] = ..., round: _Optional[int] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class ProbeReply(_message.Message):
    __slots__ = ("offset", "complete", "chunk_bytes")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    offset: int
    complete: bool
    chunk_bytes: int
    def __init__(self, offset: _Optional[int] = ..., complete: _Optional[bool] = ..., chunk_bytes: _Optional[int] = ...) -> None: ...

class UploadHeader(_message.Message):
    __slots__ = ("run_id", "round", "digest", "total_bytes", "offset", "kind")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    round: int
    digest: str
    total_bytes: int
    offset: int
    kind: str
    def __init__(self, run_id: _Optional[str] = ..., round: _Optional[int] = ..., digest: _Optional[str] = ..., total_bytes: _Optional[int] = ..., offset: _Optional[int] = ..., kind: _Optional[str] = ...) -> None: ...

class UploadChunk(_message.Message):
    __slots__ = ("data", "crc32", "header")
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    crc32: int
    header: UploadHeader
    def __init__(self, data: _Optional[bytes] = ..., crc32: _Optional[int] = ..., header: _Optional[_Union[UploadHeader, _Mapping]] = ...) -> None: ...

class UploadReceipt(_message.Message):
    __slots__ = ("status", "code", "reason", "digest", "round")
    class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATUS_UNSPECIFIED: _ClassVar[UploadReceipt.Status]
        ACCEPTED: _ClassVar[UploadReceipt.Status]
        REFUSED: _ClassVar[UploadReceipt.Status]
    STATUS_UNSPECIFIED: UploadReceipt.Status
    ACCEPTED: UploadReceipt.Status
    REFUSED: UploadReceipt.Status
    STATUS_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    status: UploadReceipt.Status
    code: str
    reason: str
    digest: str
    round: int
    def __init__(self, status: _Optional[_Union[UploadReceipt.Status, str]] = ..., code: _Optional[str] = ..., reason: _Optional[str] = ..., digest: _Optional[str] = ..., round: _Optional[int] = ...) -> None: ...

class DownloadRequest(_message.Message):
    __slots__ = ("digest", "offset", "run_id")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    digest: str
    offset: int
    run_id: str
    def __init__(self, digest: _Optional[str] = ..., offset: _Optional[int] = ..., run_id: _Optional[str] = ...) -> None: ...

class DownloadChunk(_message.Message):
    __slots__ = ("data", "crc32", "total_bytes")
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    crc32: int
    total_bytes: int
    def __init__(self, data: _Optional[bytes] = ..., crc32: _Optional[int] = ..., total_bytes: _Optional[int] = ...) -> None: ...
