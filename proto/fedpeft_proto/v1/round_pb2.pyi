from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RoundTask(_message.Message):
    __slots__ = ("run_id", "round", "rounds_total", "attempt", "job_toml", "start_state", "start_state_bytes", "base_fingerprint", "deadline_s", "chunk_bytes", "train", "evaluate")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    JOB_TOML_FIELD_NUMBER: _ClassVar[int]
    START_STATE_FIELD_NUMBER: _ClassVar[int]
    START_STATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    BASE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRAIN_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    round: int
    rounds_total: int
    attempt: int
    job_toml: str
    start_state: str
    start_state_bytes: int
    base_fingerprint: str
    deadline_s: float
    chunk_bytes: int
    train: bool
    evaluate: bool
    def __init__(self, run_id: _Optional[str] = ..., round: _Optional[int] = ..., rounds_total: _Optional[int] = ..., attempt: _Optional[int] = ..., job_toml: _Optional[str] = ..., start_state: _Optional[str] = ..., start_state_bytes: _Optional[int] = ..., base_fingerprint: _Optional[str] = ..., deadline_s: _Optional[float] = ..., chunk_bytes: _Optional[int] = ..., train: _Optional[bool] = ..., evaluate: _Optional[bool] = ...) -> None: ...

class Evaluation(_message.Message):
    __slots__ = ("split", "metrics")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    split: str
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, split: _Optional[str] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class RoundReply(_message.Message):
    __slots__ = ("run_id", "round", "client", "status", "reason", "digest", "payload_bytes", "metrics", "evaluations", "attempt")
    class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATUS_UNSPECIFIED: _ClassVar[RoundReply.Status]
        DELIVERED: _ClassVar[RoundReply.Status]
        DECLINED: _ClassVar[RoundReply.Status]
        FAILED: _ClassVar[RoundReply.Status]
        EVALUATED: _ClassVar[RoundReply.Status]
    STATUS_UNSPECIFIED: RoundReply.Status
    DELIVERED: RoundReply.Status
    DECLINED: RoundReply.Status
    FAILED: RoundReply.Status
    EVALUATED: RoundReply.Status
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    round: int
    client: str
    status: RoundReply.Status
    reason: str
    digest: str
    payload_bytes: int
    metrics: _containers.ScalarMap[str, float]
    evaluations: _containers.RepeatedCompositeFieldContainer[Evaluation]
    attempt: int
    def __init__(self, run_id: _Optional[str] = ..., round: _Optional[int] = ..., client: _Optional[str] = ..., status: _Optional[_Union[RoundReply.Status, str]] = ..., reason: _Optional[str] = ..., digest: _Optional[str] = ..., payload_bytes: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., evaluations: _Optional[_Iterable[_Union[Evaluation, _Mapping]]] = ..., attempt: _Optional[int] = ...) -> None: ...
