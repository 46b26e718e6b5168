"""The event log: complete lines whatever the disk does, and the same events for every watcher."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from fedpeft.federation.folder import append_line
from fedpeft_server.events import EventLog


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_a_watcher_gets_what_it_missed_and_ends_with_the_run(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    for kind, text in (("run-started", "a"), ("round-committed", "b"), ("run-finished", "c")):
        log.add(kind, round=1, text=text)
    assert [e.text for e in log.follow(1) if e] == ["b", "c"]
    assert [e.seq for e in EventLog(tmp_path / "events.jsonl").follow(0) if e] == [1, 2, 3]
    assert log.has("round-committed", 1)
    assert not log.has("round-committed", 2)


def test_a_line_cut_off_by_a_crash_is_dropped_and_the_numbers_go_on(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.add("run-started", text="a")
    log.add("storage", text="b")
    path.write_bytes(path.read_bytes()[:-7])
    again = EventLog(path)
    again.add("storage", text="c")
    assert texts(path) == ["a", "c"]
    assert json.loads(path.read_text().splitlines()[-1])["seq"] == 2


def test_a_condition_that_lasts_is_said_once(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    for text in ("full", "full", "still full", "full"):
        log.once("storage", text)
    assert texts(tmp_path / "events.jsonl") == ["full", "still full", "full"]


def test_what_a_full_disk_did_not_take_is_written_when_there_is_space(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "fedpeft-test", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        log = EventLog(disk / "events.jsonl")
        log.add("run-started", text="a")
        with open(disk / "filler", "wb", buffering=0) as filler:
            while filler.write(bytes(4096)) == 4096 and os.statvfs(disk).f_bavail:
                pass
        before = (disk / "events.jsonl").read_bytes()
        for number in range(200):  # more than the rest of the page that the file has
            log.add("delta-refused", text=str(number))
        assert texts(disk / "events.jsonl")[0] == "a"  # whole lines only, whatever fitted
        with pytest.raises(OSError, match="No space"):
            append_line(disk / "events.jsonl", "x" * 5000)
        assert (disk / "events.jsonl").read_bytes().startswith(before)
        assert (disk / "events.jsonl").read_bytes().endswith(b"}\n")
        assert log.last().text == "199"
        (disk / "filler").unlink()
        log.add("run-finished", text="z")
        assert texts(disk / "events.jsonl") == ["a", *map(str, range(200)), "z"]
        assert [e.text for e in log.follow(200) if e] == ["199", "z"]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_straggler_after_the_end_does_not_keep_watchers_waiting(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    for kind in ("run-queued", "run-started", "run-stopped", "delta-accepted"):
        log.add(kind)
    assert [e.kind for e in log.follow(0) if e] == ["run-queued", "run-started", "run-stopped", "delta-accepted"]
    log.add("run-queued")  # taken up again: not over any more
    assert next(iter(log.follow(5, hold_s=0.01))) is None


def test_a_peers_words_cannot_steer_a_terminal(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.add("client-failed", text="a\x1b[2Jb\nc" + "d" * 5000)
    assert log.last().text.startswith("a [2Jb c")
    assert len(log.last().text) == 2000


def test_an_unreadable_line_in_the_middle_loses_nothing_else(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    for kind in ("run-queued", "run-started", "run-finished"):
        log.add(kind)
    lines = path.read_text().splitlines()
    lines[1] = "garbage"
    lines[2] = lines[2][:-1] + ', "new_field": 1}'
    path.write_text("\n".join(lines) + "\n")
    again = EventLog(path)
    assert [e.kind for e in again.follow(0) if e] == ["run-queued", "run-finished"]
    again.add("evaluated")
    assert again.last().seq == 4
