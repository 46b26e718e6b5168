"""The committed protobuf code is what the sources give, and the hand-written framing is the same wire format."""

from __future__ import annotations

import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft_proto.framing import decode_chunk, encode_chunk
from fedpeft_proto.v1 import exchange_pb2, manifest_pb2

PROTO = Path(__file__).resolve().parents[2] / "proto"


def test_the_committed_code_is_up_to_date() -> None:
    pytest.importorskip("grpc_tools")
    done = subprocess.run([sys.executable, str(PROTO / "generate.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_generated_code_lives_beside_flowers() -> None:
    import flwr.proto.fleet_pb2  # noqa: F401 - both register in one descriptor pool

    from fedpeft_proto.v1 import coordinator_pb2_grpc, exchange_pb2_grpc, round_pb2

    assert round_pb2.RoundTask.DESCRIPTOR.full_name == "fedpeft.v1.RoundTask"
    assert coordinator_pb2_grpc.CoordinatorStub
    assert exchange_pb2_grpc.AdapterExchangeStub


def test_a_manifest_has_one_serialisation() -> None:
    forward = manifest_pb2.Manifest(rank={f"layer.{n}": n for n in range(50)}, metrics={"loss": 1.5, "accuracy": 0.25})
    backward = manifest_pb2.Manifest(rank={f"layer.{n}": n for n in reversed(range(50))})
    backward.metrics["accuracy"], backward.metrics["loss"] = 0.25, 1.5
    assert forward.SerializeToString(deterministic=True) == backward.SerializeToString(deterministic=True)


SIZES = st.one_of(st.integers(1, 300), st.sampled_from([127, 128, 16383, 16384, 1 << 20, (1 << 21) + 1]))


@given(SIZES, st.integers(0, 255))
def test_an_encoded_chunk_is_what_generated_code_sends_and_reads(size: int, fill: int) -> None:
    data = bytes((fill + n) % 256 for n in range(min(size, 1000))).ljust(size, b"x")
    ours = encode_chunk(memoryview(data))
    assert exchange_pb2.UploadChunk.FromString(ours) == exchange_pb2.UploadChunk(data=data, crc32=zlib.crc32(data))
    assert exchange_pb2.DownloadChunk.FromString(ours).data == data
    theirs = exchange_pb2.UploadChunk(data=data, crc32=zlib.crc32(data)).SerializeToString()
    if zlib.crc32(data):
        assert ours == theirs
    chunk = decode_chunk(theirs) or exchange_pb2.UploadChunk.FromString(theirs)
    assert bytes(chunk.data) == data
    assert chunk.crc32 == zlib.crc32(data)


@given(st.binary(max_size=64))
def test_decoding_never_reads_past_a_message(message: bytes) -> None:
    """Any bytes are either not for the fast path or read as generated code reads them."""
    chunk = decode_chunk(message)
    if chunk is not None:
        assert exchange_pb2.UploadChunk.FromString(message).data == bytes(chunk.data)


@given(st.binary(min_size=1, max_size=40), st.data())
def test_a_cut_or_changed_message_is_read_like_generated_code_or_left_to_it(data: bytes, choice: st.DataObject) -> None:
    frame = bytearray(encode_chunk(data))
    at = choice.draw(st.integers(0, len(frame) - 1))
    frame[at] ^= 1 << choice.draw(st.integers(0, 7))
    message = bytes(frame[: choice.draw(st.integers(0, len(frame)))])
    chunk = decode_chunk(message)
    if chunk is not None:
        generated = exchange_pb2.UploadChunk.FromString(message)
        assert (generated.data, generated.crc32) == (bytes(chunk.data), chunk.crc32)


def test_headers_and_first_messages_are_left_to_generated_code() -> None:
    header = exchange_pb2.UploadChunk(header=exchange_pb2.UploadHeader(run_id="r", digest="0" * 64, total_bytes=9))
    assert decode_chunk(header.SerializeToString()) is None
    assert decode_chunk(exchange_pb2.DownloadChunk(total_bytes=1 << 30).SerializeToString()) is None
    assert (
        decode_chunk(exchange_pb2.DownloadChunk(data=b"abcdefgh", crc32=1, total_bytes=3).SerializeToString()) is None
    )
