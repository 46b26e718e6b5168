"""Blobs: whole or absent, named by their hash, uploads that survive a broken link, a killed process, a full disk."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import FedPeftError, IntegrityError
from fedpeft.store import BlobStore

DATA = bytes(range(256)) * 5000  # 1.28 MB: more than one piece when a partial is read back


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def test_a_blob_lies_under_the_hash_of_its_bytes(blobs: BlobStore) -> None:
    digest = blobs.put_bytes(DATA)
    assert digest == sha256(DATA)
    assert blobs.path(digest) == blobs.root / digest[:2] / digest[2:]
    assert blobs.path(digest).read_bytes() == DATA
    with blobs.open(digest) as file:
        assert file.read() == DATA
    assert blobs.exists(digest)
    assert blobs.size(digest) == blobs.verify(digest) == len(DATA)
    assert list(blobs.digests()) == [digest]
    assert files_below(blobs.root) == [blobs.path(digest)]  # no temporary file stays


def test_a_file_is_copied_in_pieces(blobs: BlobStore, tmp_path: Path) -> None:
    source = tmp_path / "adapter.safetensors"
    source.write_bytes(DATA)
    digest = blobs.put_file(source)
    source.write_bytes(b"changed later")
    assert digest == sha256(DATA)
    assert blobs.verify(digest) == len(DATA)


def test_a_file_that_cannot_be_read_is_named(blobs: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(FedPeftError, match=r"file: cannot be read .*nowhere"):
        blobs.put_file(tmp_path / "nowhere")


def test_storing_again_keeps_one_file_and_repairs_a_short_one(blobs: BlobStore) -> None:
    digest = blobs.put_bytes(DATA)
    before = blobs.path(digest).stat().st_ino
    assert blobs.put_bytes(memoryview(DATA)) == digest
    assert blobs.path(digest).stat().st_ino == before
    os.truncate(blobs.path(digest), 10)
    blobs.put_bytes(DATA)
    assert blobs.verify(digest) == len(DATA)


def test_delete_removes_the_bytes_for_good(blobs: BlobStore) -> None:
    digest = blobs.put_bytes(DATA)
    assert blobs.delete(digest) is True
    assert blobs.delete(digest) is False
    assert not blobs.exists(digest)
    assert files_below(blobs.root) == []
    for use in (blobs.open, blobs.size, blobs.verify):
        with pytest.raises(FedPeftError, match="blob: is not in the store"):
            use(digest)


def test_verify_finds_one_flipped_bit(blobs: BlobStore) -> None:
    digest = blobs.put_bytes(DATA)
    with blobs.path(digest).open("r+b") as file:
        file.seek(777)
        file.write(bytes([DATA[777] ^ 1]))
    with pytest.raises(IntegrityError, match=digest):
        blobs.verify(digest)


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 64 + "\n", "/" + "a" * 63])
def test_only_a_digest_becomes_a_file_name(blobs: BlobStore, name: str) -> None:
    for use in (blobs.path, blobs.open, blobs.exists, blobs.delete, blobs.verify, lambda d: blobs.resume(d, 1)):
        with pytest.raises(FedPeftError, match="64 lowercase hex"):
            use(name)


@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=400), cuts=st.lists(st.integers(0, 400), max_size=6), breaks=st.sets(st.integers(0, 6)))
def test_any_cutting_into_chunks_and_any_breaks_give_the_same_blob(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, cuts: list[int], breaks: set[int]
) -> None:
    blobs = BlobStore(tmp_path_factory.mktemp("blobs"))
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    writer = blobs.resume(sha256(data), len(data))
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        assert writer.offset == start
        chunk = data[start:end]
        assert writer.write(memoryview(chunk) if number % 2 else chunk) == end
        if number in breaks:
            writer.close()
            writer = blobs.resume(sha256(data), len(data))
    assert writer.finish() == sha256(data)
    assert blobs.path(sha256(data)).read_bytes() == data
    assert files_below(blobs.root) == [blobs.path(sha256(data))]


def test_an_upload_goes_on_after_close_even_from_another_store(blobs: BlobStore) -> None:
    digest = sha256(DATA)
    with blobs.resume(digest, len(DATA)) as writer:
        writer.write(DATA[:1_100_000])
    assert not blobs.exists(digest)
    with BlobStore(blobs.root).resume(digest, len(DATA)) as writer:
        assert writer.offset == 1_100_000
        writer.write(DATA[1_100_000:])
        assert writer.finish() == digest
        assert writer.complete
    assert blobs.verify(digest) == len(DATA)


def test_an_upload_goes_on_after_the_process_is_killed(blobs: BlobStore) -> None:
    script = f"""
import sys
from pathlib import Path
from fedpeft.store import BlobStore
writer = BlobStore(Path({str(blobs.root)!r})).resume({sha256(DATA)!r}, {len(DATA)})
writer.write((bytes(range(256)) * 5000)[:700_001])
print("written", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        with pytest.raises(FedPeftError, match="being uploaded already"):
            blobs.resume(sha256(DATA), len(DATA))
        process.send_signal(signal.SIGKILL)
        process.wait()
    with blobs.resume(sha256(DATA), len(DATA)) as writer:
        assert writer.offset == 700_001
        writer.write(DATA[700_001:])
        writer.finish()
    assert blobs.verify(sha256(DATA)) == len(DATA)


def test_a_wrong_hash_is_an_integrity_error_and_the_partial_goes(blobs: BlobStore) -> None:
    writer = blobs.resume(sha256(DATA), len(DATA))
    writer.write(DATA[:-1] + b"!")
    with pytest.raises(IntegrityError, match=r"upload: the bytes received hash to"):
        writer.finish()
    assert files_below(blobs.root) == []
    with blobs.resume(sha256(DATA), len(DATA)) as again:
        assert again.offset == 0


def test_a_partial_damaged_on_disk_is_found_at_the_end(blobs: BlobStore) -> None:
    with blobs.resume(sha256(DATA), len(DATA)) as writer:
        writer.write(DATA[:1000])
    [partial] = files_below(blobs.root)
    partial.write_bytes(b"\0" * 1000)
    with blobs.resume(sha256(DATA), len(DATA)) as writer:
        writer.write(DATA[writer.offset :])
        with pytest.raises(IntegrityError):
            writer.finish()
    assert files_below(blobs.root) == []


def test_missing_bytes_are_counted_and_the_upload_can_go_on(blobs: BlobStore) -> None:
    writer = blobs.resume(sha256(DATA), len(DATA))
    writer.write(DATA[:-3])
    with pytest.raises(FedPeftError, match=f"3 of {len(DATA)} bytes are missing") as caught:
        writer.finish()
    assert not isinstance(caught.value, IntegrityError)
    writer.write(DATA[-3:])
    assert writer.finish() == sha256(DATA)


def test_more_bytes_than_announced_are_refused_before_they_are_written(blobs: BlobStore) -> None:
    writer = blobs.resume(sha256(DATA), len(DATA))
    writer.write(DATA)
    with pytest.raises(FedPeftError, match="more bytes arrived than the"):
        writer.write(b"x")
    assert writer.finish() == sha256(DATA)


def test_one_writer_at_a_time_and_the_next_takes_over(blobs: BlobStore) -> None:
    first = blobs.resume(sha256(DATA), len(DATA))
    first.write(DATA[:10])
    for other in (blobs, BlobStore(blobs.root)):
        with pytest.raises(FedPeftError, match="being uploaded already"):
            other.resume(sha256(DATA), len(DATA))
    first.close()
    second = blobs.resume(sha256(DATA), len(DATA))
    assert second.offset == 10
    with pytest.raises(FedPeftError, match="closed"):
        first.write(DATA[10:20])
    second.close()


def test_a_blob_that_is_here_needs_no_upload(blobs: BlobStore) -> None:
    digest = blobs.put_bytes(DATA)
    with blobs.resume(digest, len(DATA)) as writer:
        assert writer.offset == len(DATA)
        assert writer.complete
        assert writer.finish() == digest
    with pytest.raises(FedPeftError, match=f"has {len(DATA)} bytes"):
        blobs.resume(digest, len(DATA) + 1)


def test_a_partial_longer_than_announced_starts_anew(blobs: BlobStore) -> None:
    with blobs.resume(sha256(DATA), len(DATA) * 2) as writer:
        writer.write(DATA + DATA[:5])
    with blobs.resume(sha256(DATA), len(DATA)) as writer:
        assert writer.offset == 0


def test_many_threads_racing_for_one_upload_leave_one_whole_blob(blobs: BlobStore) -> None:
    data = DATA[:300_000]
    outcomes: list[str] = []

    def upload() -> None:
        for _ in range(20):
            try:
                with blobs.resume(sha256(data), len(data)) as writer:
                    while writer.offset < len(data):
                        writer.write(data[writer.offset : writer.offset + 50_000])
                    writer.finish()
                    outcomes.append("done")
            except FedPeftError as error:
                outcomes.append(str(error.field))

    threads = [threading.Thread(target=upload) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(outcomes) <= {"done", "upload"}
    assert "done" in outcomes
    assert blobs.verify(sha256(data)) == len(data)
    assert files_below(blobs.root) == [blobs.path(sha256(data))]


def test_a_writer_that_opens_while_another_finishes_never_touches_the_finished_blob(
    blobs: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = blobs.resume(sha256(DATA), len(DATA))
    first.write(DATA)
    lock = fcntl.flock

    def finish_first_then_lock(fd: int, operation: int) -> None:
        if operation & fcntl.LOCK_EX and not first.complete:
            first.finish()  # renames the file that the second writer has just opened
        lock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", finish_first_then_lock)
    with blobs.resume(sha256(DATA), len(DATA)) as second:
        assert second.complete
        assert second.offset == len(DATA)
    assert blobs.verify(sha256(DATA)) == len(DATA)
    assert files_below(blobs.root) == [blobs.path(sha256(DATA))]


def test_memory_does_not_grow_with_the_blob(blobs: BlobStore) -> None:
    import tracemalloc

    chunk = os.urandom(1 << 16)
    digest = sha256(chunk * 256)  # 16 MiB
    tracemalloc.start()
    with blobs.resume(digest, len(chunk) * 256) as writer:
        for _ in range(128):
            writer.write(chunk)
    with blobs.resume(digest, len(chunk) * 256) as writer:
        for _ in range(128):
            writer.write(chunk)
        writer.finish()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 << 20  # reading a partial back takes pieces of 1 MiB


def test_prune_takes_old_remains_but_no_upload_in_progress(blobs: BlobStore) -> None:
    with blobs.resume(sha256(b"old"), 3) as writer:
        writer.write(b"o")
    running = blobs.resume(sha256(b"new"), 3)
    running.write(b"n")
    (blobs.root / "tmp" / "left by a killed process").write_bytes(b"x")
    digest = blobs.put_bytes(DATA)
    assert blobs.prune(older_than_s=3600) == 0
    assert blobs.prune(older_than_s=-1) == 2
    running.write(b"ew")
    running.finish()
    assert sorted(blobs.digests()) == sorted([digest, sha256(b"new")])


def test_a_partial_can_be_dropped_unless_a_writer_is_at_work_on_it(blobs: BlobStore) -> None:
    digest = sha256(b"old")
    assert not blobs.drop_partial(digest)
    with blobs.resume(digest, 3) as writer:
        writer.write(b"o")
        assert not blobs.drop_partial(digest)
    assert blobs.has_partial(digest)
    assert blobs.drop_partial(digest)
    assert not blobs.has_partial(digest)
    assert blobs.resume(digest, 3).offset == 0


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_behind(small_disk: Callable[[int], Path]) -> None:
    blobs = BlobStore(small_disk(256) / "blobs")
    kept = blobs.put_bytes(b"k" * 50_000)
    source = blobs.root.parent.parent / "source"
    source.write_bytes(DATA)
    for put in (lambda: blobs.put_bytes(DATA), lambda: blobs.put_file(source)):
        with pytest.raises(FedPeftError, match=r"storage: the disk is full .*; free space") as caught:
            put()
        assert caught.value.field == "storage"
        assert files_below(blobs.root) == [blobs.path(kept)]
    writer = blobs.resume(sha256(DATA), len(DATA))

    def write_all() -> None:
        for start in range(0, len(DATA), 10_000):
            writer.write(DATA[start : start + 10_000])

    with pytest.raises(FedPeftError, match="storage: the disk is full"):
        write_all()
    assert files_below(blobs.root) == [blobs.path(kept)]
    assert blobs.put_bytes(b"n" * 150_000)  # the space is there again
    assert blobs.verify(kept) == 50_000
