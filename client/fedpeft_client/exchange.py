"""The client's side of AdapterExchange: send and fetch objects over lines that break.

Both directions work in attempts. An attempt asks where the last one ended, goes on there, and lasts as long as bytes
move. When it breaks for a passing reason (the daemon restarts, the line is down, other transfers have their turn), the
next one follows after a growing pause. What ends the whole is not a time-out but silence: no byte moved and no sign of
life for ``patience_s``. Reasons that will not pass (not allowed, not what the round expects, disk full at the server)
end it at once, each with one line.

A file is read chunk by chunk into one buffer, so memory does not grow with the payload. A download goes to a ``.part``
file beside its target, which gets its name only when the SHA-256 is right.

Example (``channel`` is a ``grpc.Channel`` made with :data:`CHANNEL_OPTIONS`)::

    exchange = ExchangeClient(channel)
    exchange.download(task.start_state, task.run_id, cache / task.start_state)
    receipt = exchange.upload(delta_path, task.run_id, task.round, digest)
    if not receipt.accepted:
        ...  # receipt.code and receipt.reason say why; sending again would not help
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from fedpeft.errors import FedPeftError, IntegrityError
from fedpeft_proto.framing import Chunk, decode_chunk, encode_chunk
from fedpeft_proto.v1 import exchange_pb2 as pb

log = logging.getLogger(__name__)

SERVICE = "fedpeft.v1.AdapterExchange"

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    # One chunk ahead of the reader instead of a window that grows: a download then needs two chunks of memory.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1 << 20),
]
"""Options for the channel to the daemon, beside those of security and keep-alive."""

_PASSING = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.INTERNAL,  # how gRPC reports a stream that was reset under it
}
_ALIVE = {"busy", "too-many-streams"}  # fedpeft-code: the server is alive and will have a turn for us
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Receipt:
    """The server's word on an upload.

    Attributes:
        accepted: recorded durably by the server; otherwise refused for good.
        code: short stable word of a refusal, e.g. ``"shape"``.
        reason: one line for people.
        digest, round: of what the receipt is for.
        payload_bytes: length of the object.
        sent_bytes: what went over the wire for it, repeats included; less than the length when the server held a part.
        attempts: streams that were opened.
    """

    accepted: bool
    code: str
    reason: str
    digest: str
    round: int
    payload_bytes: int
    sent_bytes: int
    attempts: int


class ExchangeClient:
    """Uploads and downloads over one channel; may be used from several threads.

    Args:
        channel: to the daemon; it is not closed here.
        chunk_bytes: size of the chunks sent, reduced to what the server takes. On a line slower than
            ``chunk_bytes`` per the server's stall time-out (256 KiB in 30 s: 9 KB/s), choose smaller ones.
        stall_timeout_s: an attempt in which nothing moved for so long is given up; the next one resumes.
        patience_s: the transfer fails when nothing moved over all attempts for so long.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        *,
        chunk_bytes: int = 1 << 20,
        stall_timeout_s: float = 60.0,
        patience_s: float = 600.0,
    ):
        self.chunk_bytes, self.stall_timeout_s, self.patience_s = chunk_bytes, stall_timeout_s, patience_s
        self._call_probe = channel.unary_unary(
            f"/{SERVICE}/Probe",
            request_serializer=pb.ProbeRequest.SerializeToString,
            response_deserializer=pb.ProbeReply.FromString,
        )
        self._call_upload = channel.stream_unary(  # the generator yields serialised messages
            f"/{SERVICE}/Upload", request_serializer=None, response_deserializer=pb.UploadReceipt.FromString
        )
        self._call_download = channel.unary_stream(
            f"/{SERVICE}/Download",
            request_serializer=pb.DownloadRequest.SerializeToString,
            response_deserializer=lambda message: decode_chunk(message) or pb.DownloadChunk.FromString(message),
        )

    def upload(
        self,
        payload: Path | bytes,
        run_id: str,
        round: int,
        digest: str,
        progress: Progress | None = None,
        *,
        kind: str = "delta",
    ) -> Receipt:
        """Send the object ``digest`` (hex SHA-256 of the payload) and wait for the server's word on it.

        Args:
            payload: a file, which must not change meanwhile, or the bytes.
            progress: called with (bytes sent, total bytes).

        Raises:
            FedPeftError: not allowed, storage at the server full, no contact for ``patience_s``, or the file is
                missing or empty.
            IntegrityError: the payload does not hash to ``digest``.
        """
        with _source(payload) as source:
            attempt = _Attempts(self.patience_s, "upload", digest)
            sent, damaged = 0, 0

            def count(size: int) -> None:
                nonlocal sent
                sent += size
                attempt.moved()

            while True:
                attempt.begin()
                try:
                    answer = self._upload_once(source, run_id, round, digest, kind, count, progress)
                    accepted = answer.status == pb.UploadReceipt.ACCEPTED
                    return Receipt(
                        accepted, answer.code, answer.reason, digest, round, source.total, sent, attempt.number
                    )
                except grpc.RpcError as error:
                    status, code = error.code(), _refusal_code(error)
                    if status is grpc.StatusCode.FAILED_PRECONDITION:
                        return Receipt(False, code, error.details(), digest, round, source.total, sent, attempt.number)
                    if status is grpc.StatusCode.DATA_LOSS and damaged == 0:
                        damaged += 1  # a part held from an earlier attempt may have been bad; the server dropped it
                        continue
                    attempt.failed(error)

    def _upload_once(
        self,
        source: _Source,
        run_id: str,
        round: int,
        digest: str,
        kind: str,
        count: Callable[[int], None],
        progress: Progress | None,
    ) -> pb.UploadReceipt:
        probe = self._call_probe(
            pb.ProbeRequest(digest=digest, run_id=run_id, round=round, total_bytes=source.total),
            timeout=self.stall_timeout_s,
        )
        size = min(self.chunk_bytes, probe.chunk_bytes or self.chunk_bytes)
        header = pb.UploadHeader(
            run_id=run_id, round=round, digest=digest, total_bytes=source.total, offset=probe.offset, kind=kind
        )
        moved_at = time.monotonic()

        def messages() -> Iterator[bytes]:
            # gRPC asks for the next message when the last has passed flow control, so being asked is progress.
            nonlocal moved_at
            yield pb.UploadChunk(header=header).SerializeToString()
            at = probe.offset
            for view in source.read(at, size):
                yield encode_chunk(view)
                at += len(view)
                moved_at = time.monotonic()
                count(len(view))
                if progress is not None:
                    progress(at, source.total)

        ended = threading.Event()
        call = self._call_upload.future(messages())
        call.add_done_callback(lambda _: ended.set())
        try:
            while not ended.wait(timeout=1.0):
                if time.monotonic() - moved_at > self.stall_timeout_s:
                    call.cancel()
            return call.result()
        except grpc.FutureCancelledError:
            raise _Stalled(f"nothing moved for {self.stall_timeout_s:g} s") from None
        finally:
            call.cancel()  # on KeyboardInterrupt too, so that no thread goes on reading the source

    def download(self, digest: str, run_id: str, target: Path, progress: Progress | None = None) -> Path:
        """Fetch the object ``digest`` to ``target``, verified; ``target`` itself.

        A target that exists is verified first and returned when it is right. The rename is atomic for other processes
        on this machine; after a power cut the digest decides.

        Args:
            progress: called with (bytes here, total bytes).

        Raises:
            FedPeftError: not allowed, not there, no contact for ``patience_s``, or the disk is full.
            IntegrityError: the server's bytes do not hash to ``digest``.
        """
        target = Path(target)
        part = target.with_name(f"{target.name}.{digest[:12]}.part")
        attempt = _Attempts(self.patience_s, "download", digest)
        mismatches = 0
        try:
            if target.is_file() and _hash_file(target).hexdigest() == digest:
                return target
            target.parent.mkdir(parents=True, exist_ok=True)
            while True:
                attempt.begin()
                try:
                    found = self._download_once(digest, run_id, part, attempt, progress)
                except grpc.RpcError as error:
                    if part.stat().st_size == 0:
                        part.unlink()
                    if error.code() is grpc.StatusCode.OUT_OF_RANGE:  # the part is longer than the object
                        part.unlink(missing_ok=True)
                        mismatches += 1
                        if mismatches < 2:
                            continue
                    attempt.failed(error)
                    continue
                if found == digest:
                    os.replace(part, target)
                    return target
                part.unlink(missing_ok=True)
                mismatches += 1
                if mismatches > 1:
                    raise IntegrityError(
                        f"the bytes received hash to {found}",
                        field="download",
                        value=digest,
                        hint="let the server's operator verify its store",
                    )
        except OSError as error:
            raise FedPeftError(
                f"cannot be written ({error.strerror or error})",
                field="download",
                value=str(target),
                hint="free space or choose another folder",
            ) from error

    def _download_once(
        self, digest: str, run_id: str, part: Path, attempt: _Attempts, progress: Progress | None
    ) -> str:
        """Append to ``part`` until the object is whole; the SHA-256 of what is there then."""
        with part.open("ab") as file:
            running, at = _hash_file(part), file.tell()
            moved_at = time.monotonic()
            call = self._call_download(pb.DownloadRequest(digest=digest, offset=at, run_id=run_id))
            ended = threading.Event()

            def watch() -> None:
                while not ended.wait(1.0):
                    if time.monotonic() - moved_at > self.stall_timeout_s:
                        call.cancel()
                        return

            threading.Thread(target=watch, name="download-watch", daemon=True).start()
            total = None
            try:
                for message in call:
                    if not isinstance(message, Chunk):
                        total = message.total_bytes if total is None else total
                        message = Chunk(memoryview(message.data), message.crc32)
                    if not message.intact():
                        raise _Stalled(f"the chunk at byte {at} was damaged on its way")
                    file.write(message.data)
                    running.update(message.data)
                    at += len(message.data)
                    moved_at = time.monotonic()
                    if len(message.data):
                        attempt.moved()
                    if progress is not None and total:
                        progress(at, total)
            finally:
                ended.set()
                call.cancel()
            if at != total:
                raise _Stalled(f"the stream ended at byte {at} of {total}")
        return running.hexdigest()


class _Stalled(grpc.RpcError):
    """An attempt that this side gave up; it resumes like one that the network ended."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.ABORTED

    def details(self) -> str:
        return str(self)

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()


class _Attempts:
    """Pauses between attempts and the end of patience."""

    def __init__(self, patience_s: float, what: str, digest: str):
        self.patience_s, self.what, self.digest = patience_s, what, digest
        self.number = 0
        self._pause_s = _FIRST_PAUSE_S
        self._alive_at = time.monotonic()

    def begin(self) -> None:
        self.number += 1

    def moved(self) -> None:
        self._alive_at, self._pause_s = time.monotonic(), _FIRST_PAUSE_S

    def failed(self, error: grpc.RpcError) -> None:
        """Pause, or raise what the user should read."""
        status, reason = error.code(), " ".join((error.details() or "").split())
        waits = _refusal_code(error) in _ALIVE
        if status not in _PASSING and not waits:
            raise _permanent(status, reason, self.what, self.digest) from error
        if waits:
            self._alive_at = time.monotonic()
        if time.monotonic() - self._alive_at > self.patience_s:
            raise FedPeftError(
                f"nothing moved for {self.patience_s:g} s; the last answer was {status.name}: {reason}",
                field=self.what,
                value=self.digest,
                hint="check that the server runs and can be reached, then start again: what was sent is kept",
            ) from error
        log.info("%s %s, attempt %d: %s: %s", self.what, self.digest[:12], self.number, status.name, reason)
        time.sleep(self._pause_s * random.uniform(0.5, 1.0))
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)


@dataclass(frozen=True)
class _Source:
    total: int
    read: Callable[[int, int], Iterator[memoryview]]


@contextmanager
def _source(payload: Path | bytes) -> Iterator[_Source]:
    """The payload as chunks from an offset on. A chunk is valid until the next one is asked for."""
    if isinstance(payload, bytes):
        whole = memoryview(payload)

        def slices(at: int, size: int) -> Iterator[memoryview]:
            return (whole[start : start + size] for start in range(at, len(whole), size))

        yield _checked(len(payload), slices, "bytes")
        return
    try:
        file = Path(payload).open("rb")  # noqa: SIM115 - closed below; opened apart so that its errors are told apart
    except OSError as error:
        raise FedPeftError(f"cannot be read ({error.strerror})", field="payload", value=str(payload)) from error
    with file:
        total = os.fstat(file.fileno()).st_size

        def reads(at: int, size: int) -> Iterator[memoryview]:
            # Read into one buffer: mapping the file would save a copy, but a file that shrinks meanwhile would then
            # kill the process instead of ending in an error.
            buffer = memoryview(bytearray(size))
            while at < total:
                got = os.preadv(file.fileno(), [buffer[: total - at]], at)
                if got == 0:
                    raise FedPeftError("became shorter while it was sent", field="payload", value=str(payload))
                yield buffer[:got]
                at += got

        yield _checked(total, reads, str(payload))


def _checked(total: int, read: Callable[[int, int], Iterator[memoryview]], name: str) -> _Source:
    if total == 0:
        raise FedPeftError("has no bytes", field="payload", value=name)
    return _Source(total, read)


def _hash_file(path: Path) -> hashlib._Hash:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")


def _refusal_code(error: grpc.RpcError) -> str:
    for key, value in error.trailing_metadata() or ():
        if key == "fedpeft-code":
            return str(value)
    return ""


def _permanent(status: grpc.StatusCode, reason: str, what: str, digest: str) -> FedPeftError:
    if status is grpc.StatusCode.DATA_LOSS:
        return IntegrityError(
            reason, field=what, value=digest, hint="make the digest from the very bytes that are sent"
        )
    hint = {
        grpc.StatusCode.PERMISSION_DENIED: "ask the server's operator",
        grpc.StatusCode.UNAUTHENTICATED: "use the bundle that the server's operator gave you",
        grpc.StatusCode.NOT_FOUND: "the run may be over",
        grpc.StatusCode.RESOURCE_EXHAUSTED: "the server needs space; try again later",
        grpc.StatusCode.UNIMPLEMENTED: "this is no fedpeft server, or one of another version",
    }.get(status)
    return FedPeftError(f"{status.name}: {reason}", field=what, value=digest, hint=hint)
