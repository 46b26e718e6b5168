"""What was acknowledged survives: a killed process, a full disk, a database that another process holds."""

from __future__ import annotations

import hashlib
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpeft.errors import FedPeftError
from fedpeft.store import RunStore

# Opens rounds, accepts three deltas in each and commits, for ever; says on stdout what the store has acknowledged.
LOOP = """
import hashlib, itertools, sys
from pathlib import Path
from fedpeft.store import RunStore

store = RunStore.open(sys.argv[1], Path(sys.argv[2]))
store.create_run("run-1", "quickstart", "", 1000)
state = hashlib.sha256(b"0").hexdigest()
clients = ["a", "b", "c"]
first = max((row.number for row in store.rounds("run-1")), default=1)
for number in itertools.count(first):
    if number > 1:
        state = store.round("run-1", number - 1).end_state
    store.open_round("run-1", number, state, clients)
    for client in clients:
        digest = store.blobs.put_bytes(f"{number} {client}".encode())
        store.accept_delta("run-1", number, client, digest, 3, 1, {"loss": 1 / number})
        print("accepted", number, client, digest, flush=True)
    end = store.blobs.put_bytes(f"state {number}".encode())
    store.commit_round("run-1", number, end, {"clients": 3})
    print("committed", number, end, flush=True)
"""


def test_everything_acknowledged_before_kill_9_is_there_and_the_run_goes_on(database_url: str, tmp_path: Path) -> None:
    acknowledged: list[str] = []
    for lines in (10, 17, 24):  # three lives, each killed at another point of a round
        with subprocess.Popen(
            [sys.executable, "-c", LOOP, database_url, str(tmp_path / "blobs")], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            acknowledged += [process.stdout.readline() for _ in range(lines)]
            process.send_signal(signal.SIGKILL)
            acknowledged += process.stdout.readlines()
        with RunStore.open(database_url, tmp_path / "blobs") as store:
            store.verify_ledger("run-1")
            for line in acknowledged:
                what, number, *rest = line.split()
                if what == "accepted":
                    [client, digest] = rest
                    assert (client, digest) in [(row.client, row.digest) for row in store.deltas("run-1", int(number))]
                else:
                    [digest] = rest
                    assert store.round("run-1", int(number)).end_state == digest
                store.blobs.verify(digest)
            rounds = store.rounds("run-1")
            assert [row.number for row in rounds] == list(range(1, len(rounds) + 1))
            assert {row.state for row in rounds[:-1]} == {"committed"}
            told = [entry.details for entry in store.ledger_entries("run-1") if entry.kind == "delta-accepted"]
            assert len(told) == len({(entry["round"], entry["client"]) for entry in told})  # nothing counted twice


def test_a_full_disk_is_one_clear_error_and_loses_nothing(small_disk: Callable[[int], Path], tmp_path: Path) -> None:
    disk = small_disk(1024)
    clients = [f"client-{number}" for number in range(3000)]
    accepted = 0

    def accept_next() -> bool:
        nonlocal accepted
        client = clients[accepted]
        new = store.accept_delta("run-1", 1, client, hashlib.sha256(client.encode()).hexdigest(), 1, 1, {})
        accepted += 1
        return new

    def accept_all() -> None:
        while accepted < len(clients):
            accept_next()

    with RunStore.open(f"sqlite:///{disk}/state.db", tmp_path / "blobs") as store:
        store.create_run("run-1", "quickstart", "", 1)
        store.open_round("run-1", 1, hashlib.sha256(b"").hexdigest(), clients)
        (disk / "other").write_bytes(b"x" * 300_000)
        with pytest.raises(FedPeftError, match=r"storage: the disk of the database is full .*free space") as caught:
            accept_all()
        assert caught.value.field == "storage"
        assert len(store.deltas("run-1", 1)) == accepted > 0
        (disk / "other").unlink()  # with space again the same store goes on
        assert accept_next() is True
        assert store.verify_ledger("run-1") == 2 + accepted
    with RunStore.open(f"sqlite:///{disk}/state.db", tmp_path / "blobs") as store:
        assert store.verify_ledger("run-1") == 2 + accepted


def test_a_disk_too_small_to_begin_is_one_clear_error(small_disk: Callable[[int], Path], tmp_path: Path) -> None:
    with pytest.raises(FedPeftError, match="storage: "):
        RunStore.open(f"sqlite:///{small_disk(32)}/state.db", tmp_path / "blobs")


def test_a_database_held_by_another_process_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpeft.store.store._BUSY_TIMEOUT_S", 0.2)
    with RunStore.open(f"sqlite:///{tmp_path}/state.db", tmp_path / "blobs") as store:
        store.create_run("run-1", "quickstart", "", 1)
        other = sqlite3.connect(tmp_path / "state.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(FedPeftError, match="storage: another process keeps the database locked"):
            store.set_run_state("run-1", "running")
        assert store.run("run-1").state == "queued"  # reading goes on meanwhile
        other.execute("ROLLBACK")
        other.close()
        assert store.set_run_state("run-1", "running").state == "running"
