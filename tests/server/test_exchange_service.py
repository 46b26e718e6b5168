"""AdapterExchange between a real gRPC server and real channels: what arrives, what resumes, what is refused.

The server's side of the conversation is also spoken with generated stubs alone, as a client in another language would.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from fedpeft.errors import DeltaRefused, FedPeftError, IntegrityError
from fedpeft.store.blobs import BlobStore
from fedpeft_client.exchange import CHANNEL_OPTIONS, ExchangeClient
from fedpeft_proto.v1 import exchange_pb2 as pb
from fedpeft_proto.v1.exchange_pb2_grpc import AdapterExchangeStub
from fedpeft_server import exchange

MB = 1 << 20
CHUNK = 64 << 10
TOO_MANY = ("RESOURCE_EXHAUSTED", "too-many-streams")


@dataclass(frozen=True)
class Caller:
    name: str
    role: str = "client"


@dataclass
class Rules:
    """An authority as the daemon has one: known clients, a size limit, a round's judgement on complete objects."""

    max_bytes: int = 64 * MB
    refuse: DeltaRefused | None = None
    accepted: list[tuple[str, exchange.UploadHeader, bytes]] = field(default_factory=list)
    asked: list[exchange.UploadHeader] = field(default_factory=list)

    def may_upload(self, peer: Caller, header: exchange.UploadHeader) -> None:
        self.asked.append(header)
        if peer.role != "client":
            raise FedPeftError("only clients deliver deltas", field="role", value=peer.role)
        if header.total_bytes > self.max_bytes:
            raise DeltaRefused("too-large", f"at most {self.max_bytes} bytes", field="total_bytes")

    def may_download(self, peer: Caller, digest: str, run_id: str) -> None:
        if run_id == "secret":
            raise FedPeftError("not a member of this run", field="run", value=run_id)

    def accept(self, peer: Caller, header: exchange.UploadHeader, path: Path) -> str:
        if self.refuse:
            raise self.refuse
        self.accepted.append((peer.name, header, path.read_bytes()))
        return "folded in"


def identify(context: grpc.ServicerContext) -> Caller:
    """Tests name the caller in metadata; the daemon takes it from the TLS certificate."""
    named = dict(context.invocation_metadata())
    if named.get("name") == "stranger":
        raise FedPeftError("the caller showed no certificate")
    return Caller(str(named.get("name", "hospital-a")), str(named.get("role", "client")))


class Named(grpc.UnaryUnaryClientInterceptor, grpc.StreamUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Puts the caller's name on every call of a channel."""

    def __init__(self, **metadata: str):
        self.metadata = tuple(metadata.items())

    def _call(self, continuation, details, request):  # type: ignore[no-untyped-def]
        return continuation(details._replace(metadata=self.metadata), request)

    intercept_unary_unary = intercept_stream_unary = intercept_unary_stream = _call


@dataclass
class House:
    """A server with its rules and store; ``open`` makes clients."""

    blobs: BlobStore
    rules: Rules
    service: exchange.AdapterExchangeService
    server: grpc.Server
    port: int

    def channel(self, **metadata: str) -> grpc.Channel:
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        channel = grpc.insecure_channel(f"127.0.0.1:{self.port}", options=options)
        return grpc.intercept_channel(channel, Named(**metadata)) if metadata else channel

    def client(self, **metadata: str) -> ExchangeClient:
        return ExchangeClient(self.channel(**metadata), chunk_bytes=CHUNK, stall_timeout_s=5, patience_s=5)

    def stub(self, **metadata: str) -> AdapterExchangeStub:
        return AdapterExchangeStub(self.channel(**metadata))


def admit(peer: Caller) -> None:
    """The daemon asks its roster."""
    if peer.role == "revoked":
        raise FedPeftError(f"client {peer.name} was revoked")


def start(folder: Path, port: int = 0, **settings: float) -> House:
    blobs, rules = BlobStore(folder), Rules()
    service = exchange.AdapterExchangeService(
        blobs,
        rules,
        identify=identify,
        admit=admit,
        chunk_bytes=int(settings.get("chunk_bytes", CHUNK)),
        stall_timeout_s=settings.get("stall_timeout_s", 20.0),
        max_streams=int(settings.get("max_streams", 8)),
        turn_timeout_s=settings.get("turn_timeout_s", 5.0),
        header_timeout_s=settings.get("header_timeout_s", 10.0),
        keep_partials_s=settings.get("keep_partials_s", 24 * 3600.0),
    )
    server = grpc.server(futures.ThreadPoolExecutor(8), options=[*exchange.SERVER_OPTIONS, ("grpc.so_reuseport", 0)])
    service.add_to(server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    return House(blobs, rules, service, server, bound)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = start(tmp_path / "blobs")
    yield made
    made.server.stop(0).wait()
    made.service.close()


def payload(size: int, seed: int = 0) -> tuple[bytes, str]:
    data = hashlib.shake_256(seed.to_bytes(4, "big")).digest(size)
    return data, hashlib.sha256(data).hexdigest()


def messages(
    data: bytes, digest: str, *, offset: int = 0, total: int | None = None, until: int | None = None, chunk: int = CHUNK
) -> Iterator[pb.UploadChunk]:
    """An upload as generated code writes it."""
    total = len(data) if total is None else total
    header = pb.UploadHeader(run_id="r", round=1, digest=digest, total_bytes=total, offset=offset, kind="delta")
    yield pb.UploadChunk(header=header)
    for at in range(offset, len(data) if until is None else until, chunk):
        piece = data[at : at + chunk]
        yield pb.UploadChunk(data=piece, crc32=zlib.crc32(piece))


@pytest.mark.parametrize("size", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * MB + 17])
def test_what_is_sent_is_what_is_stored_and_fetched(house: House, tmp_path: Path, size: int) -> None:
    data, digest = payload(size)
    source = tmp_path / "delta"
    source.write_bytes(data)
    seen: list[tuple[int, int]] = []

    receipt = house.client().upload(source, "run-1", 3, digest, progress=lambda at, total: seen.append((at, total)))

    assert receipt.accepted
    assert (receipt.digest, receipt.round, receipt.reason) == (digest, 3, "folded in")
    assert (receipt.sent_bytes, receipt.attempts) == (size, 1)
    assert seen[-1] == (size, size)
    name, header, stored = house.rules.accepted[0]
    assert (name, header.run_id, header.round, header.kind, stored) == ("hospital-a", "run-1", 3, "delta", data)

    target = house.client().download(digest, "run-1", tmp_path / "new" / "state")
    assert target.read_bytes() == data
    assert [path.name for path in target.parent.iterdir()] == ["state"]


def test_bytes_in_memory_are_a_payload_too(house: House) -> None:
    data, digest = payload(MB + 1)
    assert house.client().upload(data, "r", 1, digest).accepted
    assert house.rules.accepted[0][2] == data


def test_a_client_made_from_generated_code_alone_is_served(house: House) -> None:
    data, digest = payload(MB + 5)
    stub = house.stub()
    assert stub.Probe(pb.ProbeRequest(digest=digest, run_id="r", round=1, total_bytes=len(data))).offset == 0
    assert stub.Upload(messages(data, digest)).status == pb.UploadReceipt.ACCEPTED
    probe = stub.Probe(pb.ProbeRequest(digest=digest, run_id="r", round=1, total_bytes=len(data)))
    assert (probe.offset, probe.complete, probe.chunk_bytes) == (len(data), True, CHUNK)
    answers = list(stub.Download(pb.DownloadRequest(digest=digest, offset=1000, run_id="r")))
    assert answers[0].total_bytes == len(data)
    assert b"".join(answer.data for answer in answers) == data[1000:]
    assert all(answer.crc32 == zlib.crc32(answer.data) for answer in answers if answer.data)


def test_a_stream_that_breaks_off_goes_on_where_it_ended(house: House) -> None:
    data, digest = payload(2 * MB)
    with pytest.raises(grpc.RpcError) as caught:
        house.stub().Upload(messages(data, digest, until=10 * CHUNK))
    assert caught.value.code() is grpc.StatusCode.ABORTED

    receipt = house.client().upload(data, "r", 1, digest)

    assert receipt.accepted
    assert receipt.sent_bytes == len(data) - 10 * CHUNK
    assert house.rules.asked[-1].offset == 10 * CHUNK
    assert house.rules.accepted[-1][2] == data


def test_a_client_killed_in_the_middle_leaves_a_part_that_its_successor_completes(house: House, tmp_path: Path) -> None:
    data, digest = payload(2 * MB)
    source = tmp_path / "delta"
    source.write_bytes(data)
    script = textwrap.dedent(
        """
        import os, sys, grpc
        from pathlib import Path
        from fedpeft_client.exchange import ExchangeClient
        def progress(at, total):
            if at >= total // 2:
                os._exit(9)
        client = ExchangeClient(grpc.insecure_channel(sys.argv[1]), chunk_bytes=65536)
        client.upload(Path(sys.argv[2]), "r", 1, sys.argv[3], progress)
        """
    )
    killed = subprocess.run([sys.executable, "-c", script, f"127.0.0.1:{house.port}", str(source), digest])
    assert killed.returncode == 9

    receipt = house.client().upload(source, "r", 1, digest)

    assert receipt.accepted
    assert 0 < receipt.sent_bytes < len(data)
    assert house.rules.accepted[-1][2] == data


def test_an_upload_outlives_the_server(tmp_path: Path) -> None:
    """The daemon goes away in mid-stream and comes back on its port: the same call finishes, from an offset > 0."""
    data, digest = payload(4 * MB)
    first = start(tmp_path / "blobs")
    client = first.client()
    client.patience_s = 30
    second: list[House] = []

    def restart() -> None:
        first.server.stop(0).wait()
        first.service.close()
        second.append(start(tmp_path / "blobs", port=first.port))

    def progress(at: int, total: int) -> None:
        if at >= total // 2 and not restarter.ident:
            restarter.start()
        if restarter.ident:
            time.sleep(0.01)  # let the cut happen before the end

    restarter = threading.Thread(target=restart)
    receipt = client.upload(data, "r", 1, digest, progress)
    restarter.join()
    try:
        assert receipt.accepted
        assert receipt.attempts > 1
        assert second[0].rules.asked[-1].offset > 0
        assert second[0].rules.accepted[-1][2] == data
    finally:
        second[0].server.stop(0)
        second[0].service.close()


def test_a_download_goes_on_from_its_part(house: House, tmp_path: Path) -> None:
    data, _ = payload(MB)
    digest = house.blobs.put_bytes(data)
    target = tmp_path / "state"
    (tmp_path / f"state.{digest[:12]}.part").write_bytes(data[:300_001])
    seen: list[int] = []
    house.client().download(digest, "r", target, lambda at, total: seen.append(at))
    assert target.read_bytes() == data
    assert min(seen) >= 300_001


@pytest.mark.parametrize("wrong", [b"x" * 1000, b"x" * (MB + 1)])
def test_a_bad_part_is_dropped_and_fetched_anew(house: House, tmp_path: Path, wrong: bytes) -> None:
    data, _ = payload(MB)
    digest = house.blobs.put_bytes(data)
    (tmp_path / f"state.{digest[:12]}.part").write_bytes(wrong)
    assert house.client().download(digest, "r", tmp_path / "state").read_bytes() == data


def test_a_target_that_is_right_is_not_fetched_again(house: House, tmp_path: Path) -> None:
    data, digest = payload(1000)
    (tmp_path / "state").write_bytes(data)
    assert house.client().download(digest, "r", tmp_path / "state").read_bytes() == data  # the server does not have it


def test_a_rotten_object_at_the_server_is_not_taken_for_the_state(house: House, tmp_path: Path) -> None:
    digest = house.blobs.put_bytes(payload(MB)[0])
    with house.blobs.path(digest).open("r+b") as file:
        file.write(b"rot")
    with pytest.raises(IntegrityError):
        house.client().download(digest, "r", tmp_path / "state")
    assert list(tmp_path.glob("state*")) == []


def test_a_damaged_chunk_is_not_stored(house: House) -> None:
    data, digest = payload(4 * CHUNK)

    def damaged() -> Iterator[pb.UploadChunk]:
        for number, message in enumerate(messages(data, digest)):
            if number == 3:
                message.data = b"y" + message.data[1:]
            yield message

    with pytest.raises(grpc.RpcError) as caught:
        house.stub().Upload(damaged())
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert "damaged" in caught.value.details()
    probe = house.stub().Probe(pb.ProbeRequest(digest=digest, run_id="r", round=1, total_bytes=len(data)))
    assert probe.offset == 2 * CHUNK
    assert house.client().upload(data, "r", 1, digest).accepted


def test_a_payload_that_is_not_what_its_digest_says_is_an_error_and_leaves_nothing(house: House) -> None:
    data, _ = payload(MB)
    _, other = payload(MB, seed=1)
    with pytest.raises(IntegrityError, match="hash"):
        house.client().upload(data, "r", 1, other)
    assert not house.blobs.exists(other)
    assert house.rules.accepted == []
    assert list((house.blobs.root / "partial").iterdir()) == []


def test_too_large_is_refused_before_a_byte_is_taken(house: House) -> None:
    house.rules.max_bytes = MB
    data, digest = payload(MB + 1)
    receipt = house.client().upload(data, "r", 1, digest)
    assert (receipt.accepted, receipt.code, receipt.sent_bytes) == (False, "too-large", 0)
    assert "1048576" in receipt.reason
    with pytest.raises(grpc.RpcError) as caught:
        house.stub().Upload(messages(data, digest))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert list((house.blobs.root / "partial").iterdir()) == []


def test_more_bytes_than_announced_are_not_taken(house: House) -> None:
    data, digest = payload(4 * CHUNK)
    with pytest.raises(grpc.RpcError) as caught:
        house.stub().Upload(messages(data, digest, total=2 * CHUNK))
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert not house.blobs.exists(digest)


@pytest.mark.parametrize(
    ("metadata", "status"), [({"name": "stranger"}, "UNAUTHENTICATED"), ({"role": "operator"}, "PERMISSION_DENIED")]
)
def test_who_may_not_send_is_told_so_once_and_leaves_no_trace(
    house: House, metadata: dict[str, str], status: str
) -> None:
    data, digest = payload(MB)
    with pytest.raises(FedPeftError, match=status):
        house.client(**metadata).upload(data, "r", 1, digest)
    with pytest.raises(grpc.RpcError) as caught:
        house.stub(**metadata).Upload(messages(data, digest))
    assert caught.value.code().name == status
    assert house.rules.accepted == []
    assert list((house.blobs.root / "partial").iterdir()) == []


def test_who_may_not_fetch_is_told_so(house: House, tmp_path: Path) -> None:
    digest = house.blobs.put_bytes(b"state")
    with pytest.raises(FedPeftError, match="not a member"):
        house.client().download(digest, "secret", tmp_path / "state")
    with pytest.raises(FedPeftError, match="NOT_FOUND"):
        house.client().download("0" * 64, "r", tmp_path / "state")
    assert list(tmp_path.glob("state*")) == []


@pytest.mark.parametrize(
    ("header", "clue"),
    [
        ({"digest": "../../etc/passwd"}, "digest"),
        ({"total_bytes": 0}, "total_bytes"),
        ({"offset": 99, "total_bytes": 9}, "offset"),
        (None, "header"),
    ],
)
def test_a_header_that_makes_no_sense_is_an_invalid_argument(house: House, header: dict | None, clue: str) -> None:
    fine = {"run_id": "r", "round": 1, "digest": "0" * 64, "total_bytes": 9, "kind": "delta"}
    first = pb.UploadChunk(data=b"123456789", crc32=1) if header is None else None
    first = first or pb.UploadChunk(header=pb.UploadHeader(**{**fine, **(header or {})}))
    with pytest.raises(grpc.RpcError) as caught:
        house.stub().Upload(iter([first]))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert clue in caught.value.details()


def test_a_chunk_above_the_limit_is_an_invalid_argument(house: House) -> None:
    data, digest = payload(4 * CHUNK)
    with pytest.raises(grpc.RpcError) as caught:
        house.stub().Upload(messages(data, digest, chunk=2 * CHUNK))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_delta_that_the_round_refuses_is_deleted_and_the_sender_told_why(house: House) -> None:
    house.rules.refuse = DeltaRefused("shape", "is 4 by 8 and should be 8 by 4", field="lora_B")
    data, digest = payload(MB)
    receipt = house.client().upload(data, "r", 1, digest)
    assert (receipt.accepted, receipt.code) == (False, "shape")
    assert "8 by 4" in receipt.reason
    assert not house.blobs.exists(digest)


def test_a_refusal_never_deletes_what_was_there_before(house: House) -> None:
    """Otherwise a client could delete the global state by sending it as its delta."""
    data, digest = payload(MB)
    house.blobs.put_bytes(data)
    house.rules.refuse = DeltaRefused("stale", "this is the state itself")
    receipt = house.client().upload(data, "r", 1, digest)
    assert (receipt.accepted, receipt.sent_bytes) == (False, 0)
    assert house.blobs.exists(digest)


def test_a_lost_receipt_is_asked_for_again_without_sending_again(house: House) -> None:
    data, digest = payload(MB)
    assert house.client().upload(data, "r", 1, digest).sent_bytes == MB
    again = house.client().upload(data, "r", 1, digest)
    assert (again.accepted, again.sent_bytes) == (True, 0)


def test_two_peers_with_the_same_bytes_both_get_their_receipt(house: House) -> None:
    data, digest = payload(4 * MB)
    receipts = {}

    def send(name: str) -> None:
        receipts[name] = house.client(name=name).upload(data, "r", 1, digest)

    threads = [threading.Thread(target=send, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert receipts["a"].accepted
    assert receipts["b"].accepted
    assert {name for name, _, _ in house.rules.accepted} == {"a", "b"}
    assert all(stored == data for _, _, stored in house.rules.accepted)


def test_a_stalled_upload_is_cut_and_its_part_kept(tmp_path: Path) -> None:
    house = start(tmp_path / "blobs", stall_timeout_s=0.6)
    data, digest = payload(MB)
    released = threading.Event()

    def stalling() -> Iterator[pb.UploadChunk]:
        yield from messages(data, digest, until=4 * CHUNK)
        released.wait(20)

    began = time.monotonic()
    try:
        with pytest.raises(grpc.RpcError) as caught:
            house.stub().Upload(stalling())
        assert caught.value.code() is grpc.StatusCode.CANCELLED
        assert 0.5 < time.monotonic() - began < 5
        receipt = house.client().upload(data, "r", 1, digest)
        assert receipt.accepted
        assert receipt.sent_bytes == len(data) - 4 * CHUNK
    finally:
        released.set()
        house.server.stop(0)
        house.service.close()


def test_a_slow_but_moving_upload_is_not_cut(tmp_path: Path) -> None:
    house = start(tmp_path / "blobs", stall_timeout_s=0.6)
    data, digest = payload(8 * CHUNK)

    def slow() -> Iterator[pb.UploadChunk]:
        for message in messages(data, digest):
            yield message
            time.sleep(0.25)

    try:
        assert house.stub().Upload(slow()).status == pb.UploadReceipt.ACCEPTED  # 2 s in all, three times the limit
    finally:
        house.server.stop(0)
        house.service.close()


def test_a_client_that_does_not_read_its_download_is_cut_and_frees_its_turn(tmp_path: Path) -> None:
    house = start(tmp_path / "blobs", stall_timeout_s=0.6, max_streams=1)
    digest = house.blobs.put_bytes(payload(32 * MB)[0])
    try:
        call = house.stub().Download(pb.DownloadRequest(digest=digest, run_id="r"))
        next(call)
        time.sleep(2)
        assert house.service.active_streams == 0
        assert house.client().download(digest, "r", tmp_path / "state").stat().st_size == 32 * MB
        with pytest.raises(grpc.RpcError):
            list(call)
    finally:
        house.server.stop(0)
        house.service.close()


def test_a_peer_that_comes_again_does_not_wait_for_its_dead_stream(house: House) -> None:
    """The old connection is half-open: the server would hold the digest for the whole stall time-out."""
    data, digest = payload(MB)
    released = threading.Event()

    def hanging() -> Iterator[pb.UploadChunk]:
        yield from messages(data, digest, until=4 * CHUNK)
        released.wait(20)

    old = house.stub().Upload.future(hanging())
    while not any((house.blobs.root / "partial").iterdir()):
        time.sleep(0.01)
    began = time.monotonic()
    try:
        assert house.client().upload(data, "r", 1, digest).accepted
        assert time.monotonic() - began < 4
    finally:
        released.set()
        old.cancel()


def test_more_callers_than_turns_all_get_theirs(tmp_path: Path) -> None:
    house = start(tmp_path / "blobs", max_streams=2, turn_timeout_s=0.05)
    receipts = []

    def send(seed: int) -> None:
        data, digest = payload(MB, seed)
        receipts.append(house.client(name=f"client-{seed}").upload(data, "r", 1, digest))

    threads = [threading.Thread(target=send, args=(seed,)) for seed in range(8)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [receipt.accepted for receipt in receipts] == [True] * 8
    finally:
        house.server.stop(0)
        house.service.close()


def silent(stub: AdapterExchangeStub, count: int, released: threading.Event) -> list[grpc.Future]:
    """Uploads that are opened and never say a word."""

    def nothing() -> Iterator[pb.UploadChunk]:
        released.wait(30)
        yield from ()

    return [stub.Upload.future(nothing()) for _ in range(count)]


@pytest.mark.parametrize("role", ["revoked", "client"])
def test_silent_calls_of_one_peer_do_not_hold_up_another(tmp_path: Path, role: str) -> None:
    """Neither their number nor their silence takes a turn; here there is only one."""
    house = start(tmp_path / "blobs", max_streams=1, header_timeout_s=20.0)
    released = threading.Event()
    try:
        calls = silent(house.stub(name="mallory", role=role), 40, released)
        data, digest = payload(MB)
        began = time.monotonic()
        assert house.client(name="alice").upload(data, "r", 1, digest).accepted
        house.client(name="alice").download(digest, "r", tmp_path / "state")
        assert time.monotonic() - began < 3
        # A peer that is welcome keeps its two streams until their headers are due.
        count, answer = (40, ("PERMISSION_DENIED", "")) if role == "revoked" else (38, TOO_MANY)
        while sum(call.done() for call in calls) < count:
            assert time.monotonic() - began < 15
            time.sleep(0.02)
        ended = [call for call in calls if call.done()]
        answers = [(call.code().name, dict(call.trailing_metadata()).get("fedpeft-code", "")) for call in ended]
        assert answers == [answer] * count
        assert house.rules.asked[-1].digest == digest
    finally:
        released.set()
        house.server.stop(0)
        house.service.close()


def test_an_upload_whose_header_does_not_come_is_cut(tmp_path: Path) -> None:
    house = start(tmp_path / "blobs", header_timeout_s=0.4)
    released = threading.Event()
    began = time.monotonic()
    try:
        [call] = silent(house.stub(), 1, released)
        assert call.code() is grpc.StatusCode.CANCELLED
        assert 0.3 < time.monotonic() - began < 5
    finally:
        released.set()
        house.server.stop(0)
        house.service.close()


def test_a_revoked_peer_neither_probes_nor_fetches(house: House) -> None:
    data, digest = payload(MB)
    stub = house.stub(role="revoked")
    for call in (
        lambda: stub.Probe(pb.ProbeRequest(digest=digest, run_id="r", round=1, total_bytes=len(data))),
        lambda: list(stub.Download(pb.DownloadRequest(digest=digest, run_id="r"))),
    ):
        with pytest.raises(grpc.RpcError, match="revoked") as caught:
            call()
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert house.rules.asked == []


def test_a_client_with_its_streams_in_use_waits_for_one_to_end(tmp_path: Path) -> None:
    house = start(tmp_path / "blobs", header_timeout_s=0.8)
    released = threading.Event()
    try:
        calls = silent(house.stub(), 2, released)
        time.sleep(0.2)
        data, digest = payload(MB)
        receipt = house.client().upload(data, "r", 1, digest)
        assert receipt.accepted
        assert receipt.attempts > 1
        assert receipt.sent_bytes == MB
        assert {call.code() for call in calls} == {grpc.StatusCode.CANCELLED}
    finally:
        released.set()
        house.server.stop(0)
        house.service.close()


def begin(house: House, seed: int, round: int = 1, **metadata: str) -> str:
    """All but the last chunk of an upload, which then ends; its digest."""
    data, digest = payload(4 * CHUNK, seed)

    def cut() -> Iterator[pb.UploadChunk]:
        for message in messages(data, digest, until=3 * CHUNK):
            if message.HasField("header"):
                message.header.round = round
            yield message

    with pytest.raises(grpc.RpcError) as caught:
        house.stub(**metadata).Upload(cut())
    assert caught.value.code() is grpc.StatusCode.ABORTED
    return digest


def parts(house: House) -> set[str]:
    return {path.stem for path in (house.blobs.root / "partial").iterdir()}


def test_a_peer_has_one_unfinished_upload_per_round(house: House) -> None:
    for seed in range(10):
        last = begin(house, seed)
    assert parts(house) == {last}
    other_round = begin(house, 20, round=2)
    other_peer = begin(house, 21, name="hospital-b")
    assert parts(house) == {last, other_round, other_peer}
    data, digest = payload(4 * CHUNK, 9)
    assert digest == last
    assert house.client().upload(data, "r", 1, digest).sent_bytes == CHUNK  # the newest one is still good


def test_an_unfinished_upload_that_still_runs_is_cut_by_the_next_one(house: House) -> None:
    data, first = payload(4 * CHUNK, 1)
    released = threading.Event()

    def hanging() -> Iterator[pb.UploadChunk]:
        yield from messages(data, first, until=2 * CHUNK)
        released.wait(20)

    old = house.stub().Upload.future(hanging())
    while not parts(house):
        time.sleep(0.01)
    try:
        second = begin(house, 2)
        assert old.code() is grpc.StatusCode.CANCELLED
        assert parts(house) == {second}
    finally:
        released.set()


def test_dropping_ones_own_part_spares_that_of_a_peer_with_the_same_bytes(house: House) -> None:
    shared = begin(house, 1, name="a")
    data, _ = payload(4 * CHUNK, 1)
    with pytest.raises(grpc.RpcError):
        house.stub(name="b").Upload(messages(data, shared, offset=3 * CHUNK, until=3 * CHUNK))
    other = begin(house, 2, name="a")
    assert parts(house) == {shared, other}


def test_old_parts_go_at_the_start_and_while_the_service_runs(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path / "blobs")
    digests = [payload(100, seed)[1] for seed in range(2)]
    for digest, age_s in zip(digests, (25 * 3600, 3600), strict=True):
        with blobs.resume(digest, 100) as writer:
            writer.write(b"x")
        path = blobs.root / "partial" / f"{digest}.part"
        os.utime(path, (time.time() - age_s,) * 2)

    def wait_for(house: House, expected: set[str]) -> None:
        until = time.monotonic() + 5
        while parts(house) != expected and time.monotonic() < until:
            time.sleep(0.02)
        assert parts(house) == expected

    house = start(tmp_path / "blobs")
    try:
        wait_for(house, {digests[1]})
    finally:
        house.server.stop(0)
        house.service.close()
    house = start(tmp_path / "blobs", keep_partials_s=0.5, stall_timeout_s=0.4)
    try:
        wait_for(house, set())
        begin(house, 7)
        wait_for(house, set())
    finally:
        house.server.stop(0)
        house.service.close()


def test_no_server_is_one_error_after_the_clients_patience(tmp_path: Path) -> None:
    client = ExchangeClient(grpc.insecure_channel("127.0.0.1:1"), patience_s=0.5, stall_timeout_s=1)
    with pytest.raises(FedPeftError, match="UNAVAILABLE"):
        client.upload(b"x", "r", 1, hashlib.sha256(b"x").hexdigest())
    with pytest.raises(FedPeftError, match="UNAVAILABLE"):
        client.download("0" * 64, "r", tmp_path / "state")


def test_a_payload_without_bytes_or_file_is_an_error_that_names_it(house: House, tmp_path: Path) -> None:
    with pytest.raises(FedPeftError, match="no bytes"):
        house.client().upload(b"", "r", 1, "0" * 64)
    with pytest.raises(FedPeftError, match="missing"):
        house.client().upload(tmp_path / "missing", "r", 1, "0" * 64)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the kernel's memory high-water mark")
def test_the_server_never_holds_a_payload(tmp_path: Path) -> None:
    """A 64 MB upload and download raise the peak of the server's process by less than 16 MB."""
    script = textwrap.dedent(
        """
        import sys
        from concurrent import futures
        from pathlib import Path
        import grpc
        from fedpeft.store.blobs import BlobStore
        from fedpeft_server import exchange
        class Everyone:
            name, role = "anyone", "client"
            def may_upload(self, peer, header): ...
            def may_download(self, peer, digest, run_id): ...
            def accept(self, peer, header, path): return ""
        everyone = Everyone()
        exchange.bound_heap()
        service = exchange.AdapterExchangeService(
            BlobStore(Path(sys.argv[1])), everyone, identify=lambda context: everyone
        )
        server = grpc.server(futures.ThreadPoolExecutor(4), options=exchange.SERVER_OPTIONS)
        service.add_to(server)
        print(server.add_insecure_port("127.0.0.1:0"), flush=True)
        server.start()
        sys.stdin.read()
        server.stop(0)
        service.close()
        """
    )
    server = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "blobs")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def memory_mb(key: str) -> float:
        lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":"))

    try:
        assert server.stdout is not None
        client = ExchangeClient(grpc.insecure_channel(f"127.0.0.1:{int(server.stdout.readline())}"))
        small, digest = payload(MB)
        assert client.upload(small, "r", 1, digest).accepted
        idle = memory_mb("VmRSS")
        large = tmp_path / "large"
        with large.open("wb") as file:
            for seed in range(64):
                file.write(payload(MB, seed)[0])
        digest = hashlib.sha256(large.read_bytes()).hexdigest()
        assert client.upload(large, "r", 1, digest).accepted
        client.download(digest, "r", tmp_path / "back")
        assert memory_mb("VmHWM") - idle < 16
    finally:
        server.communicate()
