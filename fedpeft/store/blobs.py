"""Blobs: bytes on disk under the name of their own SHA-256.

Adapter payloads and global states are large, immutable and shared between rounds, so they stay out of the database. A
blob is named by its *digest* (SHA-256, lowercase hex) and lies at ``root/ab/cdef...``; the same bytes are stored once,
and a name can never come to mean other bytes. A blob is either there whole or not at all: it is written beside its
place, flushed to the device, renamed, and the folder is flushed, so that a digest that was acknowledged is still there
after ``kill -9`` and after a power cut.

Uploads of any size arrive in chunks and may break off. :class:`BlobWriter` appends to ``root/partial/<digest>.part``
and keeps it for the next attempt; the running SHA-256 is rebuilt from that file, so nothing but the file is state. An
advisory lock on it (``flock``, hence POSIX only) lets one writer at a time work on a digest, across processes too.

>>> import tempfile
>>> root = tempfile.TemporaryDirectory()
>>> blobs = BlobStore(Path(root.name))
>>> digest = blobs.put_bytes(b"adapter")
>>> with blobs.open(digest) as file:
...     file.read()
b'adapter'
>>> with blobs.resume(hashlib.sha256(b"12345678").hexdigest(), total_bytes=8) as writer:  # the link breaks
...     writer.write(b"1234")
4
>>> with blobs.resume(writer.digest, total_bytes=8) as writer:
...     print("go on at", writer.offset)
...     _ = writer.write(memoryview(b"5678"))
...     writer.finish() == writer.digest
go on at 4
True
>>> root.cleanup()
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from fedpeft.errors import FedPeftError, IntegrityError

_READ_BYTES = 1 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")


def check_digest(digest: str, *, field: str = "digest") -> str:
    """``digest`` itself when it is a lowercase hex SHA-256; digests become file names, so nothing else may pass.

    Raises:
        FedPeftError: it is anything else.
    """
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise FedPeftError("must be a SHA-256 as 64 lowercase hex digits", field=field, value=digest)
    return digest


def storage_error(error: OSError, path: Path) -> FedPeftError:
    """The error to raise when the file system under ``path`` does not do what it should."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        message, hint = "the disk is full", f"free space on the file system of {path} and try again"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        message, hint = f"may not write ({error.strerror})", f"give this user write access to {path}"
    else:
        message, hint = f"the file system failed ({error.strerror or error})", f"check {path} and its device"
    return FedPeftError(message, field="storage", value=str(path), hint=hint)


class BlobStore:
    """Content-addressed files below ``root``; every method may be called from any thread and process.

    Args:
        root: the folder, created (readable by this user alone) when missing.

    Raises:
        FedPeftError: (field ``storage``) from every method that writes, when the file system is full, read-only or
            failing. Nothing is left behind then.
    """

    def __init__(self, root: Path):
        self.root = Path(root).absolute()
        self._partial = self.root / "partial"
        self._temporary = self.root / "tmp"
        try:
            for folder in (self.root, self._partial, self._temporary):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, self.root) from error

    def path(self, digest: str) -> Path:
        """Where the blob lies, or would lie."""
        check_digest(digest)
        return self.root / digest[:2] / digest[2:]

    def exists(self, digest: str) -> bool:
        """Whether the blob is here, whole."""
        return self.path(digest).is_file()

    def size(self, digest: str) -> int:
        """The blob's length in bytes.

        Raises:
            FedPeftError: (field ``blob``) it is not here.
        """
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            raise _missing(digest) from None

    def open(self, digest: str) -> BinaryIO:
        """The blob as a file open for reading. Its bytes are not checked here; see :meth:`verify`.

        Raises:
            FedPeftError: (field ``blob``) it is not here.
        """
        try:
            return self.path(digest).open("rb")
        except FileNotFoundError:
            raise _missing(digest) from None

    def digests(self) -> Iterator[str]:
        """The digests of all blobs here, sorted."""
        for folder in sorted(self.root.glob("[0-9a-f][0-9a-f]")):
            for name in sorted(os.listdir(folder)):
                if _DIGEST.fullmatch(folder.name + name):
                    yield folder.name + name

    def put_bytes(self, data: bytes | bytearray | memoryview) -> str:
        """Store ``data``; its digest. Storing the same bytes again costs a hash and nothing else."""
        view = memoryview(data).cast("B")
        digest = hashlib.sha256(view).hexdigest()
        if not self._has(digest, len(view)):

            def write(fd: int) -> str:
                _write_at(fd, view, 0)
                return digest

            self._put(write)
        return digest

    def put_file(self, path: Path) -> str:
        """Store a copy of the file at ``path``, read once in pieces; its digest.

        Raises:
            FedPeftError: (field ``file``) it cannot be read.
        """
        try:
            source = Path(path).open("rb")  # noqa: SIM115 - opened apart, so that its errors are told from the store's
        except OSError as error:
            raise FedPeftError(f"cannot be read ({error.strerror})", field="file", value=str(path)) from error

        def write(fd: int) -> str:
            running, offset = hashlib.sha256(), 0
            while piece := source.read(_READ_BYTES):
                running.update(piece)
                offset += _write_at(fd, memoryview(piece), offset)
            return running.hexdigest()

        with source:
            return self._put(write)

    def delete(self, digest: str) -> bool:
        """Remove the blob for good; ``False`` when it was not here. The caller knows that nothing refers to it."""
        path = self.path(digest)
        try:
            path.unlink()
            _fsync_folder(path.parent)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise storage_error(error, self.root) from error
        return True

    def verify(self, digest: str) -> int:
        """Read the blob and compare it with its name; its length in bytes.

        Raises:
            IntegrityError: its bytes are not those that were stored.
            FedPeftError: (field ``blob``) it is not here.
        """
        running, length = hashlib.sha256(), 0
        with self.open(digest) as file:
            while piece := file.read(_READ_BYTES):
                running.update(piece)
                length += len(piece)
        if running.hexdigest() != digest:
            raise IntegrityError(
                f"the stored bytes hash to {running.hexdigest()}",
                field="blob",
                value=digest,
                hint="restore this blob from a backup or delete it and send it again",
            )
        return length

    def resume(self, digest: str, total_bytes: int) -> BlobWriter:
        """A writer for the blob ``digest`` that goes on where an earlier attempt ended.

        When the blob is already here, the writer's ``offset`` is ``total_bytes`` and only ``finish`` is left to call.

        Raises:
            FedPeftError: (field ``upload``) another writer is at work on this digest, or the blob is here with
                another length; (field ``storage``) the file system is full or failing.
        """
        check_digest(digest)
        if isinstance(total_bytes, bool) or not isinstance(total_bytes, int) or total_bytes < 0:
            raise FedPeftError("must be a length in bytes", field="total_bytes", value=total_bytes)
        try:
            if self.exists(digest):
                return self._complete_writer(digest, total_bytes)
            fd = self._lock_partial(digest)
            try:
                if not self.exists(digest):
                    return BlobWriter(self, digest, total_bytes, fd)
                self._partial_path(digest).unlink()  # the previous writer finished between the two looks
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
            return self._complete_writer(digest, total_bytes)
        except OSError as error:
            raise storage_error(error, self.root) from error

    def has_partial(self, digest: str) -> bool:
        """Whether an unfinished upload of ``digest`` lies here."""
        check_digest(digest)
        return self._partial_path(digest).exists()

    def drop_partial(self, digest: str) -> bool:
        """Remove what arrived of an unfinished upload; ``False`` when there is none or a writer is at work on it."""
        check_digest(digest)
        path = self._partial_path(digest)
        try:
            return _unlink_unused(path)
        except OSError as error:
            raise storage_error(error, self.root) from error

    def prune(self, older_than_s: float) -> int:
        """Remove the remains of uploads and writes that nobody touched for ``older_than_s`` seconds; how many."""
        limit, removed = time.time() - older_than_s, 0
        try:
            for path in (*self._temporary.iterdir(), *self._partial.iterdir()):
                try:
                    old = path.stat().st_mtime <= limit
                except FileNotFoundError:
                    continue
                removed += old and _unlink_unused(path)
        except OSError as error:
            raise storage_error(error, self.root) from error
        return removed

    def _has(self, digest: str, length: int) -> bool:
        # The length is compared so that a blob cut short by a failing device is written anew instead of trusted.
        try:
            return self.path(digest).stat().st_size == length
        except FileNotFoundError:
            return False

    def _put(self, write: Callable[[int], str]) -> str:
        temporary = self._temporary / secrets.token_hex(16)
        try:
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)  # tells prune() that this file is in use
                digest = write(fd)
                os.fsync(fd)
                self._publish(temporary, digest)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            finally:
                os.close(fd)
        except OSError as error:
            raise storage_error(error, self.root) from error
        return digest

    def _publish(self, source: Path, digest: str) -> None:
        """Give a flushed file its final name, durably."""
        target = self.path(digest)
        if not target.parent.is_dir():
            target.parent.mkdir(mode=0o700, exist_ok=True)
            _fsync_folder(self.root)
        os.replace(source, target)
        _fsync_folder(target.parent)

    def _partial_path(self, digest: str) -> Path:
        return self._partial / f"{digest}.part"

    def _complete_writer(self, digest: str, total_bytes: int) -> BlobWriter:
        if (length := self.size(digest)) != total_bytes:
            raise FedPeftError(
                f"this blob is already here and has {length} bytes",
                field="upload",
                value=total_bytes,
                hint="announce the true length",
            )
        return BlobWriter(self, digest, total_bytes, None)

    def _lock_partial(self, digest: str) -> int:
        path = self._partial_path(digest)
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                raise FedPeftError(
                    "these bytes are being uploaded already",
                    field="upload",
                    value=digest,
                    hint="wait until that upload ends, then resume it",
                ) from None
            # The file may have been renamed to its final place or removed between open and lock: then the lock is
            # on a file that is no longer the partial, and writing to it could damage a finished blob.
            try:
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    return fd
            except FileNotFoundError:
                pass
            os.close(fd)


class BlobWriter:
    """The one open upload of a blob, made by :meth:`BlobStore.resume`. Memory: no copy of a chunk is kept.

    Leaving it as a context manager closes it, and what arrived is kept for the next attempt.

    Attributes:
        digest: what the whole must hash to.
        total_bytes: the length of the whole.
    """

    def __init__(self, store: BlobStore, digest: str, total_bytes: int, fd: int | None):
        self.digest, self.total_bytes = digest, total_bytes
        self._store, self._path = store, store._partial_path(digest)
        self._fd = fd  # None: nothing to write to, because the blob is complete or this writer is closed
        self._complete = fd is None
        self._closed = False
        self._lock = threading.Lock()  # a transport may close from its cancel callback while a chunk is written
        self._running = hashlib.sha256()
        self._offset = total_bytes if fd is None else self._rehash(fd)

    @property
    def offset(self) -> int:
        """How many bytes are on disk: where the sender has to go on."""
        return self._offset

    @property
    def complete(self) -> bool:
        """Whether the blob is in the store, whole and verified."""
        return self._complete

    def write(self, chunk: bytes | bytearray | memoryview) -> int:
        """Append the next bytes, of any number; the new offset.

        Raises:
            FedPeftError: (field ``upload``) more bytes than announced (none of this chunk is kept), or the writer is
                closed; (field ``storage``) the disk is full: the partial upload is removed to give its space back.
        """
        with self._lock:
            self._check_open()
            view = memoryview(chunk).cast("B")
            if self._offset + len(view) > self.total_bytes:
                raise FedPeftError(
                    f"more bytes arrived than the {self.total_bytes} announced",
                    field="upload",
                    value=self._offset + len(view),
                    hint="announce the true length, or resume at the offset that the store gives",
                )
            if self._fd is not None and len(view):
                try:
                    _write_at(self._fd, view, self._offset)
                except OSError as error:
                    self._discard()
                    raise storage_error(error, self._store.root) from error
                self._running.update(view)
                self._offset += len(view)
            return self._offset

    def finish(self) -> str:
        """Check length and hash, make the blob durable under its name and close; the digest. May be called again.

        Raises:
            IntegrityError: the bytes hash to something else; the partial upload is removed.
            FedPeftError: (field ``upload``) bytes are missing; the writer stays open. (field ``storage``) the file
                system is full or failing; the partial upload is removed.
        """
        with self._lock:
            if self._complete:
                self._closed = True
                return self.digest
            self._check_open()
            assert self._fd is not None
            if self._offset != self.total_bytes:
                raise FedPeftError(
                    f"{self.total_bytes - self._offset} of {self.total_bytes} bytes are missing",
                    field="upload",
                    value=self._offset,
                    hint="resume at this offset",
                )
            if (found := self._running.hexdigest()) != self.digest:
                self._discard()
                raise IntegrityError(
                    f"the bytes received hash to {found}",
                    field="upload",
                    value=self.digest,
                    hint="send the payload again from its start",
                )
            try:
                os.fsync(self._fd)
                self._store._publish(self._path, self.digest)
            except OSError as error:
                self._discard()
                raise storage_error(error, self._store.root) from error
            self._complete = True
            self._release()
            return self.digest

    def close(self) -> None:
        """End this attempt and keep what arrived for the next one. Closing again does nothing."""
        with self._lock:
            if self._fd is None:
                self._closed = True
            elif self._offset == 0:
                self._discard()
            else:
                try:
                    os.fsync(self._fd)
                    _fsync_folder(self._path.parent)
                except OSError as error:
                    self._discard()
                    raise storage_error(error, self._store.root) from error
                self._release()

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _rehash(self, fd: int) -> int:
        if os.fstat(fd).st_size > self.total_bytes:  # left by an attempt that announced another length
            os.ftruncate(fd, 0)
        offset = 0
        while piece := os.pread(fd, _READ_BYTES, offset):
            self._running.update(piece)
            offset += len(piece)
        if offset:
            os.fsync(fd)  # the last attempt may have died before it could: the offset promises bytes on the device
        return offset

    def _check_open(self) -> None:
        if self._closed:
            raise FedPeftError("this upload is closed", field="upload", value=self.digest, hint="resume it")

    def _discard(self) -> None:
        self._path.unlink(missing_ok=True)
        self._offset = 0
        self._release()

    def _release(self) -> None:
        if self._fd is not None:
            # Unlocked by name, not only by closing: a child forked meanwhile still holds this open file.
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
        self._fd, self._closed = None, True


def _write_at(fd: int, view: memoryview, offset: int) -> int:
    """Write all of ``view`` at ``offset``; its length. The kernel may take a chunk in several pieces."""
    written = 0
    while written < len(view):
        written += os.pwrite(fd, view[written:], offset + written)
    return written


def _unlink_unused(path: Path) -> bool:
    """Remove a file unless it is gone or a writer holds its lock; whether it was removed."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between open and lock the file may have been published or made anew: the lock is then on another file.
        if not os.path.samestat(os.fstat(fd), os.stat(path)):
            return False
        path.unlink()
        return True
    except (BlockingIOError, FileNotFoundError):
        return False
    finally:
        os.close(fd)


def _fsync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _missing(digest: str) -> FedPeftError:
    return FedPeftError("is not in the store", field="blob", value=digest, hint="send or fetch it again")
