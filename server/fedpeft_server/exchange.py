"""The server's side of AdapterExchange: objects of any size in and out, with memory for two chunks per stream.

A payload is named by the SHA-256 of its bytes and lives in the blob store. It arrives as a stream of chunks, each with
a CRC-32; every chunk goes to disk and through the running hash before the next one is taken, and the next one is only
taken when the last is dropped, so gRPC's flow control slows the sender down to the speed of the disk. What was written
stays when a stream breaks: the sender probes for the offset and goes on there. There is no time-out on the whole. A
stream is cut only when it made no progress for ``stall_timeout_s``, because an hour is fine for a slow line and
thirty seconds of silence are not.

Turns are scarce, so nobody holds one who has not shown that it needs it: the caller is admitted, its header has come
and the authority has agreed before it queues for a turn; a header must come within ``header_timeout_s``; and one peer
has at most ``streams_per_peer`` streams, waiting or moving, so that a peer with many silent calls blocks itself alone.
Disk is scarce too: a peer has one unfinished object per round, and unfinished objects that nobody touched for
``keep_partials_s`` are removed.

This module moves bytes and knows nothing of rounds. Who may send what, and whether a complete object is what the round
expects, is asked of an :class:`Authority` at three moments: before the first byte of an upload, before the first byte
of a download, and when an object is complete and its hash is right.

Status codes (``docs/transport.md`` has the table for other clients): UNAUTHENTICATED and PERMISSION_DENIED for who,
INVALID_ARGUMENT and FAILED_PRECONDITION for what, ABORTED and UNAVAILABLE for "probe and try again", DATA_LOSS for
an object that is not what its name says, RESOURCE_EXHAUSTED for a full disk or too many streams of one peer.

Generated message classes copy each chunk twice in either direction; :mod:`fedpeft_proto.framing` does without, which is
why :meth:`AdapterExchangeService.add_to` registers handlers of its own instead of the generated servicer.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NoReturn, Protocol, TypeVar

import grpc

from fedpeft.errors import DeltaRefused, FedPeftError, IntegrityError
from fedpeft.store.blobs import BlobStore, BlobWriter, check_digest
from fedpeft_proto.framing import Chunk, decode_chunk, encode_chunk
from fedpeft_proto.v1 import exchange_pb2 as pb

log = logging.getLogger(__name__)

SERVICE = "fedpeft.v1.AdapterExchange"

SERVER_OPTIONS: list[tuple[str, int]] = [
    # gRPC's bandwidth probe would let the receive window of a stream grow to many chunks. With a small fixed one, the
    # chunk that is being received gets the window it needs, and a stream that waits for its turn holds next to nothing.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 128 << 10),
]
"""Options for the ``grpc.server`` that hosts the service, beside those of security and keep-alive."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h of glibc

_PRUNE_EVERY_S = 3600.0
_HANG_UP_CHECK_S = 1.0

T = TypeVar("T")


def bound_heap() -> bool:
    """Tune glibc's allocator to chunks of a megabyte; ``False`` where there is no glibc.

    A chunk is allocated by gRPC's polling thread and freed by a worker. With an arena per thread, freed megabytes stay
    where they are, and a server that once served 64 streams keeps tens of them for nothing: hence two arenas. And
    glibc would fetch each chunk from the kernel and give it back, zeroed page by page: keeping up to 4 MiB of free
    memory costs a third less processor time per upload. Call it once, early, before threads start.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    settings = ((_M_ARENA_MAX, 2), (_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 4 << 20))
    done = [mallopt(setting, value) for setting, value in settings]
    return all(done)


class Peer(Protocol):
    """Who is calling, as the certificate says."""

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> str: ...


P = TypeVar("P", bound=Peer)
P_contra = TypeVar("P_contra", bound=Peer, contravariant=True)


@dataclass(frozen=True)
class UploadHeader:
    """What a sender announces before its first byte."""

    run_id: str
    round: int
    digest: str
    total_bytes: int
    offset: int
    kind: str


class Authority(Protocol[P_contra]):
    """The decisions behind the transport. All methods are called from many threads at once.

    A plain :class:`~fedpeft.errors.FedPeftError` means "not you" (PERMISSION_DENIED), a
    :class:`~fedpeft.errors.DeltaRefused` means "not this" and reaches the sender as a refusal with code and reason.
    """

    def may_upload(self, peer: P_contra, header: UploadHeader) -> None:
        """Called before any byte is taken, also for a probe; checks peer, run, round, kind and ``total_bytes``."""

    def may_download(self, peer: P_contra, digest: str, run_id: str) -> None:
        """Called before any byte is sent."""

    def accept(self, peer: P_contra, header: UploadHeader, path: Path) -> str:
        """Judge and record the complete, hash-verified object at ``path``; a line for the receipt, or ``""``.

        It returns only after the record is durable. A sender that lost its receipt sends again: the same object from
        the same peer must then get the same answer. On :class:`~fedpeft.errors.DeltaRefused` the object is deleted,
        unless it was in the store before this upload.
        """


class _Stream:
    """One call, waiting or in progress: what the watchdog looks at, and what a successor of the same peer cancels."""

    def __init__(self, context: grpc.ServicerContext, peer: str):
        self.context, self.peer, self.digest = context, peer, ""
        self.has_turn = False
        self.moved_at = time.monotonic()
        self.limit_s = 0.0
        self.watched = False  # False while the server itself is at work (turns, accept), which is no stall of the peer
        self.stalled = False
        self.done = threading.Event()

    def watch(self, limit_s: float) -> None:
        """From now on the peer is cut when it does not move for ``limit_s``."""
        self.moved_at, self.limit_s = time.monotonic(), limit_s
        self.watched = True

    def moved(self) -> None:
        self.moved_at = time.monotonic()

    def late(self, now: float) -> bool:
        return self.watched and now - self.moved_at > self.limit_s


class AdapterExchangeService(Generic[P]):
    """Serve one blob store over gRPC.

    Args:
        blobs: where objects live.
        authority: who may do what; see :class:`Authority`.
        identify: the caller of a context; raises FedPeftError (UNAUTHENTICATED) when it is nobody.
        admit: asked right after ``identify`` on every call; raises FedPeftError (PERMISSION_DENIED) for a caller that
            is known and not welcome, e.g. revoked. Without it, everybody with an identity gets as far as the authority.
        chunk_bytes: largest chunk taken, and the size of those sent. Memory per stream is two of them; beside that,
            gRPC keeps a read buffer for every connection that ever uploaded, sized by the chunks that came. Hence
            half a megabyte: as fast as a megabyte, and a third of its memory at 64 clients.
        stall_timeout_s: a stream that moved no chunk for so long is cut (CANCELLED); the partial upload is kept.
        max_streams: transfers at the same time. More callers wait their turn, so memory does not grow with clients.
            Raise it where many slow lines should be served side by side, at two chunks of memory each.
        turn_timeout_s: how long a caller waits for its turn before it is told UNAVAILABLE, code ``busy``: alive, but
            ask again.
        header_timeout_s: an upload whose header has not come by then is cut (CANCELLED).
        streams_per_peer: transfers of one peer at a time, waiting ones included; more are refused at once with
            RESOURCE_EXHAUSTED, code ``too-many-streams``. Two, so that a peer whose connection died can come again
            before the server has noticed.
        keep_partials_s: unfinished uploads that nobody touched for so long are removed, at the start and hourly.
    """

    def __init__(
        self,
        blobs: BlobStore,
        authority: Authority[P],
        *,
        identify: Callable[[grpc.ServicerContext], P],
        admit: Callable[[P], None] | None = None,
        chunk_bytes: int = 256 << 10,
        stall_timeout_s: float = 30.0,
        max_streams: int = 8,
        turn_timeout_s: float = 10.0,
        header_timeout_s: float = 10.0,
        streams_per_peer: int = 2,
        keep_partials_s: float = 24 * 3600.0,
    ):
        self.blobs, self.authority, self.identify, self.admit = blobs, authority, identify, admit
        self.chunk_bytes, self.stall_timeout_s, self.turn_timeout_s = chunk_bytes, stall_timeout_s, turn_timeout_s
        self.max_streams, self.streams_per_peer = max_streams, streams_per_peer
        self.header_timeout_s, self.keep_partials_s = header_timeout_s, keep_partials_s
        self._turns = threading.BoundedSemaphore(max_streams)
        self._lock = threading.Lock()
        self._streams: set[_Stream] = set()
        self._uploads: dict[str, _Stream] = {}  # digest -> the upload that works on it, until its receipt is decided
        self._partials: dict[tuple[str, str, int], str] = {}  # (peer, run, round) -> the digest of its one partial
        self._closed = threading.Event()
        self._watchdog = threading.Thread(target=self._watch, name="exchange-watchdog", daemon=True)
        self._watchdog.start()
        # gRPC runs a handler on the pool named by this attribute. Bulk streams that wait for each other then leave
        # the server's own workers to heartbeats and control. Were it ignored, streams would only share those workers.
        self._pool = futures.ThreadPoolExecutor(4 * max_streams, thread_name_prefix="exchange")

    def add_to(self, server: grpc.Server) -> None:
        """Register the service with a server that has not been started (see :data:`SERVER_OPTIONS`)."""

        def upload(messages: Iterator[Chunk | pb.UploadChunk], context: grpc.ServicerContext) -> pb.UploadReceipt:
            return self._upload(messages, context)

        def download(request: pb.DownloadRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
            return self._download(request, context)

        upload.experimental_thread_pool = self._pool  # type: ignore[attr-defined]
        download.experimental_thread_pool = self._pool  # type: ignore[attr-defined]
        handlers = {
            "Probe": grpc.unary_unary_rpc_method_handler(
                self._probe,
                request_deserializer=pb.ProbeRequest.FromString,
                response_serializer=pb.ProbeReply.SerializeToString,
            ),
            "Upload": grpc.stream_unary_rpc_method_handler(
                upload,
                request_deserializer=lambda message: decode_chunk(message) or pb.UploadChunk.FromString(message),
                response_serializer=pb.UploadReceipt.SerializeToString,
            ),
            "Download": grpc.unary_stream_rpc_method_handler(
                download,
                request_deserializer=pb.DownloadRequest.FromString,
                response_serializer=None,  # the generator yields serialised messages
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    @property
    def active_streams(self) -> int:
        """Transfers that hold a turn now."""
        with self._lock:
            return sum(stream.has_turn for stream in self._streams)

    def close(self) -> None:
        """Cut what still runs and stop the watchdog; partial uploads stay. Call it after ``server.stop``."""
        self._closed.set()
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.context.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    # -- calls -----------------------------------------------------------------------------------------------------

    def _probe(self, request: pb.ProbeRequest, context: grpc.ServicerContext) -> pb.ProbeReply:
        announced = pb.UploadHeader(
            run_id=request.run_id,
            round=request.round,
            digest=request.digest,
            total_bytes=request.total_bytes,
            kind="delta",
        )
        header = self._header(announced, context)
        peer = self._who(context)
        self._ask(context, lambda: self.authority.may_upload(peer, header))
        if self.blobs.exists(header.digest):
            return pb.ProbeReply(offset=header.total_bytes, complete=True, chunk_bytes=self.chunk_bytes)
        self._supersede(peer.name, header.digest)
        with self._open_writer(header, context) as writer:
            return pb.ProbeReply(offset=writer.offset, complete=writer.complete, chunk_bytes=self.chunk_bytes)

    def _upload(self, messages: Iterator[Chunk | pb.UploadChunk], context: grpc.ServicerContext) -> pb.UploadReceipt:
        peer = self._who(context)
        with self._stream(context, peer.name) as stream:
            try:
                stream.watch(self.header_timeout_s)
                first = next(messages, None)
                stream.watched = False
                if not isinstance(first, pb.UploadChunk) or not first.HasField("header"):
                    _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "the first message of an upload carries a header")
                header = self._header(first.header, context)
                stream.digest = header.digest
                self._ask(context, lambda: self.authority.may_upload(peer, header))
                with self._turn(stream), self._only_upload(stream, context):
                    return self._receive(messages, context, stream, peer, header)
            except grpc.RpcError:  # the peer hung up, or the watchdog cut the stream: there is nobody to answer
                reason = f"no progress for {stream.limit_s:g} s" if stream.stalled else "the stream broke off"
                what = f"upload {stream.digest[:12]}" if stream.digest else "an upload without a header"
                log.info("%s of %s ended: %s; a partial is kept", what, peer.name, reason)
                return pb.UploadReceipt()

    def _receive(
        self,
        messages: Iterator[Chunk | pb.UploadChunk],
        context: grpc.ServicerContext,
        stream: _Stream,
        peer: P,
        header: UploadHeader,
    ) -> pb.UploadReceipt:
        with self._open_writer(header, context) as writer:
            was_here = writer.complete
            if header.offset != writer.offset:
                _abort(
                    context,
                    grpc.StatusCode.ABORTED,
                    f"this upload goes on at byte {writer.offset}, not {header.offset}; probe again",
                )
            if not was_here:
                self._only_partial(stream, header)
            while True:
                message = next(messages, None)
                if message is None:
                    break
                chunk = message if isinstance(message, Chunk) else Chunk(memoryview(message.data), message.crc32)
                if len(chunk.data) > self.chunk_bytes:
                    _abort(
                        context,
                        grpc.StatusCode.INVALID_ARGUMENT,
                        f"a chunk of {len(chunk.data)} bytes; at most {self.chunk_bytes} are taken",
                    )
                if not chunk.intact():
                    _abort(
                        context,
                        grpc.StatusCode.ABORTED,
                        f"the chunk at byte {writer.offset} was damaged on its way; probe again",
                        code="damaged",
                    )
                self._ask(context, lambda view=chunk.data: writer.write(view))  # type: ignore[misc]
                stream.moved()
                # The next chunk arrives while this loop waits: holding the last one would make it three in memory.
                message = chunk = None  # type: ignore[assignment]
            if writer.offset < header.total_bytes:
                _abort(
                    context,
                    grpc.StatusCode.ABORTED,
                    f"the stream ended at byte {writer.offset} of {header.total_bytes}; probe again",
                )
            stream.watched = False
            self._ask(context, writer.finish)
        self._forget_partial(peer.name, header)
        try:
            note = self.authority.accept(peer, header, self.blobs.path(header.digest))
        except DeltaRefused as error:
            if not was_here:
                self.blobs.delete(header.digest)
            log.info("delta %s of %s refused: %s: %s", header.digest[:12], peer.name, error.code, error)
            return _receipt(header, pb.UploadReceipt.REFUSED, error.code, _one_line(error))
        except FedPeftError as error:
            _abort(context, _code_of(error), _one_line(error))
        return _receipt(header, pb.UploadReceipt.ACCEPTED, "", note)

    def _download(self, request: pb.DownloadRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        peer = self._who(context)
        with self._stream(context, peer.name) as stream:
            digest = self._ask(
                context, lambda: check_digest(request.digest), otherwise=grpc.StatusCode.INVALID_ARGUMENT
            )
            stream.digest = digest
            self._ask(context, lambda: self.authority.may_download(peer, digest, request.run_id))
            with self._turn(stream):
                yield from self._send(context, stream, digest, request.offset)

    def _send(self, context: grpc.ServicerContext, stream: _Stream, digest: str, offset: int) -> Iterator[bytes]:
        file = self._ask(context, lambda: self.blobs.open(digest), otherwise=grpc.StatusCode.NOT_FOUND)
        with file:
            total, at = os.fstat(file.fileno()).st_size, offset
            if at > total:
                _abort(
                    context,
                    grpc.StatusCode.OUT_OF_RANGE,
                    f"offset {at} is beyond the object's {total} bytes; start over",
                )
            yield pb.DownloadChunk(total_bytes=total).SerializeToString()
            while at < total:
                # gRPC comes back for the next chunk when the last has passed flow control, hence this is progress.
                stream.moved()
                data = os.pread(file.fileno(), self.chunk_bytes, at)
                if not data:
                    _abort(context, grpc.StatusCode.DATA_LOSS, f"the stored object ends at byte {at} of {total}")
                at += len(data)
                frame = encode_chunk(data)
                # One copy waits here and one in gRPC; what is no longer needed must not wait with them.
                del data
                yield frame
                del frame

    # -- rules -----------------------------------------------------------------------------------------------------

    def _who(self, context: grpc.ServicerContext) -> P:
        peer = self._ask(context, lambda: self.identify(context), otherwise=grpc.StatusCode.UNAUTHENTICATED)
        if (admit := self.admit) is not None:
            self._ask(context, lambda: admit(peer))
        return peer

    def _ask(
        self,
        context: grpc.ServicerContext,
        question: Callable[[], T],
        otherwise: grpc.StatusCode | None = None,
    ) -> T:
        """The answer to ``question``; an error of ours ends the call with the status that stands for it."""
        try:
            return question()
        except DeltaRefused as error:
            _abort(context, grpc.StatusCode.FAILED_PRECONDITION, _one_line(error), code=error.code)
        except FedPeftError as error:
            _abort(context, otherwise or _code_of(error), _one_line(error))

    def _header(self, message: pb.UploadHeader, context: grpc.ServicerContext) -> UploadHeader:
        header = UploadHeader(
            run_id=message.run_id,
            round=message.round,
            digest=message.digest,
            total_bytes=message.total_bytes,
            offset=message.offset,
            kind=message.kind,
        )
        self._ask(context, lambda: check_digest(header.digest), otherwise=grpc.StatusCode.INVALID_ARGUMENT)
        if header.total_bytes < 1 or header.offset > header.total_bytes:
            _abort(
                context,
                grpc.StatusCode.INVALID_ARGUMENT,
                f"offset {header.offset} and total_bytes {header.total_bytes} do not fit together",
            )
        return header

    def _open_writer(self, header: UploadHeader, context: grpc.ServicerContext) -> BlobWriter:
        if self.blobs.exists(header.digest) and self.blobs.size(header.digest) != header.total_bytes:
            _abort(
                context, grpc.StatusCode.INVALID_ARGUMENT, "this object is here and has another length than announced"
            )
        return self._ask(context, lambda: self.blobs.resume(header.digest, header.total_bytes))

    @contextmanager
    def _stream(self, context: grpc.ServicerContext, peer: str) -> Iterator[_Stream]:
        """Be one of the few streams that a peer may have."""
        stream = _Stream(context, peer)
        with self._lock:
            if free := sum(other.peer == peer for other in self._streams) < self.streams_per_peer:
                self._streams.add(stream)
        if not free:
            _abort(
                context,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{peer} has {self.streams_per_peer} transfers already; try again when one has ended",
                code="too-many-streams",
            )
        try:
            yield stream
        finally:
            with self._lock:
                self._streams.discard(stream)
            stream.done.set()

    @contextmanager
    def _turn(self, stream: _Stream) -> Iterator[None]:
        """Hold one of the ``max_streams`` turns and be watched for progress."""
        deadline = time.monotonic() + self.turn_timeout_s
        while not self._turns.acquire(timeout=max(0.0, min(_HANG_UP_CHECK_S, deadline - time.monotonic()))):
            if not stream.context.is_active():  # its thread is needed for those who still wait
                _abort(stream.context, grpc.StatusCode.CANCELLED, "hung up while it waited for its turn")
            if time.monotonic() >= deadline:
                _abort(
                    stream.context,
                    grpc.StatusCode.UNAVAILABLE,
                    f"all {self.max_streams} transfers are in use; try again",
                    code="busy",
                )
        stream.has_turn = True
        stream.watch(self.stall_timeout_s)
        try:
            yield
        finally:
            stream.watched = stream.has_turn = False
            self._turns.release()

    @contextmanager
    def _only_upload(self, stream: _Stream, context: grpc.ServicerContext) -> Iterator[None]:
        """Be the one upload of a digest until its receipt is decided, so that no refusal deletes what another recorded.

        A peer that comes again has lost its old connection even where this side does not know yet: its old stream is
        cut. Another peer with the same bytes is told to come back.
        """
        self._supersede(stream.peer, stream.digest)
        with self._lock:
            if free := stream.digest not in self._uploads:
                self._uploads[stream.digest] = stream
        if not free:
            _abort(context, grpc.StatusCode.ABORTED, "these bytes are being uploaded already; probe again")
        try:
            yield
        finally:
            with self._lock:
                self._uploads.pop(stream.digest, None)

    def _supersede(self, peer: str, digest: str) -> bool:
        """End an older upload of ``digest`` by the same peer; ``False`` when one is still there."""
        with self._lock:
            old = self._uploads.get(digest)
        if old is None or old.peer != peer:
            return True
        if old.watched:
            old.context.cancel()
        return old.done.wait(self.turn_timeout_s)

    def _only_partial(self, stream: _Stream, header: UploadHeader) -> None:
        """Drop what this peer left unfinished under another digest for the same round.

        An honest client has one delta per round. One that announces many and finishes none would fill the disk. What
        was left before a restart of the server is not known here; it goes with its age.
        """
        key = (stream.peer, header.run_id, header.round)
        with self._lock:
            older = self._partials.get(key, header.digest)
            self._partials[key] = header.digest
            shared = older in self._partials.values()  # another peer sends the same bytes and wants to go on with them
        if older == header.digest:
            return
        if not self._supersede(stream.peer, older):
            with self._lock:
                self._partials[key] = older  # or it would be nobody's
            _abort(
                stream.context,
                grpc.StatusCode.ABORTED,
                f"another upload of {stream.peer} for this round is being decided; probe again",
            )
        if not shared:
            stream.watched = False
            dropped = self._ask(stream.context, lambda: self.blobs.drop_partial(older))
            stream.watch(self.stall_timeout_s)
            if dropped:
                log.info("%s began another upload for round %d: dropped %s", stream.peer, header.round, older[:12])

    def _forget_partial(self, peer: str, header: UploadHeader) -> None:
        key = (peer, header.run_id, header.round)
        with self._lock:
            if self._partials.get(key) == header.digest:
                del self._partials[key]

    def _watch(self) -> None:
        prune_at = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= prune_at:
                self._prune()
                prune_at = now + min(_PRUNE_EVERY_S, self.keep_partials_s)
            if self._closed.wait(min(1.0, self.stall_timeout_s / 4, self.header_timeout_s / 4)):
                return
            now = time.monotonic()
            with self._lock:
                late = [stream for stream in self._streams if stream.late(now)]
            for stream in late:
                stream.stalled = True
                log.warning("cut %s, %s: no progress for %g s", stream.peer, stream.digest[:12], stream.limit_s)
                stream.context.cancel()

    def _prune(self) -> None:
        try:
            if removed := self.blobs.prune(self.keep_partials_s):
                log.info("removed %d unfinished uploads older than %g s", removed, self.keep_partials_s)
            with self._lock:
                known = list(self._partials.items())
            gone = [entry for entry in known if not self.blobs.has_partial(entry[1])]
            with self._lock:
                for key, digest in gone:
                    if self._partials.get(key) == digest and digest not in self._uploads:
                        del self._partials[key]
        except (FedPeftError, OSError) as error:  # the watchdog must outlive a disk that fails
            log.warning("unfinished uploads were not removed: %s", error)


def _receipt(header: UploadHeader, status: pb.UploadReceipt.Status, code: str, reason: str) -> pb.UploadReceipt:
    return pb.UploadReceipt(status=status, code=code, reason=reason, digest=header.digest, round=header.round)


def _code_of(error: FedPeftError) -> grpc.StatusCode:
    if isinstance(error, IntegrityError):
        return grpc.StatusCode.DATA_LOSS
    if error.field == "storage":
        return grpc.StatusCode.RESOURCE_EXHAUSTED
    if error.field == "upload":  # the blob store's word for "another writer" and "more bytes than announced"
        return grpc.StatusCode.ABORTED
    return grpc.StatusCode.PERMISSION_DENIED


def _one_line(error: FedPeftError) -> str:
    return " ".join(str(error).split())


def _abort(context: grpc.ServicerContext, status: grpc.StatusCode, reason: str, code: str = "") -> NoReturn:
    if code:
        context.set_trailing_metadata((("fedpeft-code", code),))
    context.abort(status, reason)
    raise AssertionError("abort returns to nobody")
