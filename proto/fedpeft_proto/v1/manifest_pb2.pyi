from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TensorSpec(_message.Message):
    __slots__ = ("name", "dtype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class SeededTensor(_message.Message):
    __slots__ = ("name", "seed_purpose", "shape", "orthonormal")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SEED_PURPOSE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    ORTHONORMAL_FIELD_NUMBER: _ClassVar[int]
    name: str
    seed_purpose: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    orthonormal: bool
    def __init__(self, name: _Optional[str] = ..., seed_purpose: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., orthonormal: _Optional[bool] = ...) -> None: ...

class PrivacyFacts(_message.Message):
    __slots__ = ("mode", "clipped", "clip_norm")
    MODE_FIELD_NUMBER: _ClassVar[int]
    CLIPPED_FIELD_NUMBER: _ClassVar[int]
    CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    mode: str
    clipped: bool
    clip_norm: float
    def __init__(self, mode: _Optional[str] = ..., clipped: _Optional[bool] = ..., clip_norm: _Optional[float] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("schema_version", "adapter_kind", "base_fingerprint", "run_id", "round", "client", "start_state", "codec", "example_count", "weight", "tensors", "peft_config_json", "rank", "seeded", "metrics", "privacy", "fedpeft_version")
    class RankEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    SCHEMA_VERSION_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_KIND_FIELD_NUMBER: _ClassVar[int]
    BASE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    START_STATE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    EXAMPLE_COUNT_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    PEFT_CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    SEEDED_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    PRIVACY_FIELD_NUMBER: _ClassVar[int]
    FEDPEFT_VERSION_FIELD_NUMBER: _ClassVar[int]
    schema_version: int
    adapter_kind: str
    base_fingerprint: str
    run_id: str
    round: int
    client: str
    start_state: str
    codec: str
    example_count: int
    weight: float
    tensors: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    peft_config_json: str
    rank: _containers.ScalarMap[str, int]
    seeded: _containers.RepeatedCompositeFieldContainer[SeededTensor]
    metrics: _containers.ScalarMap[str, float]
    privacy: PrivacyFacts
    fedpeft_version: str
    def __init__(self, schema_version: _Optional[int] = ..., adapter_kind: _Optional[str] = ..., base_fingerprint: _Optional[str] = ..., run_id: _Optional[str] = ..., round: _Optional[int] = ..., client: _Optional[str] = ..., start_state: _Optional[str] = ..., codec: _Optional[str] = ..., example_count: _Optional[int] = ..., weight: _Optional[float] = ..., tensors: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., peft_config_json: _Optional[str] = ..., rank: _Optional[_Mapping[str, int]] = ..., seeded: _Optional[_Iterable[_Union[SeededTensor, _Mapping]]] = ..., metrics: _Optional[_Mapping[str, float]] = ..., privacy: _Optional[_Union[PrivacyFacts, _Mapping]] = ..., fedpeft_version: _Optional[str] = ...) -> None: ...
