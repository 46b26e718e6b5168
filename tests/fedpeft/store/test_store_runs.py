"""The state of runs: every method one transaction with its ledger entry, the same again changes nothing."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import FrozenInstanceError
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from fedpeft.errors import FedPeftError, IntegrityError
from fedpeft.store import RunStore

START, END = hashlib.sha256(b"start").hexdigest(), hashlib.sha256(b"end").hexdigest()
JOB = 'name = "quickstart"\nseed = 7\n'
CLIENTS = [f"client-{number}" for number in range(8)]


def digest_of(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def start_run(store: RunStore, run_id: str = "run-1") -> None:
    store.create_run(run_id, "quickstart", JOB, 2)
    store.set_run_state(run_id, "running")
    store.open_round(run_id, 1, START, CLIENTS)


def accept(store: RunStore, client: str, *, run_id: str = "run-1", round: int = 1, **changed: Any) -> bool:
    values: dict[str, Any] = {
        "digest": digest_of(round, client),
        "payload_bytes": 1000,
        "weight": 50,
        "metrics": {"loss": 1.5},
    }
    return store.accept_delta(run_id, round, client, **(values | changed))


def play(store: RunStore, run_id: str = "run-1") -> None:
    """A run of one committed and one open round with everything in its ledger."""
    start_run(store, run_id)
    for client in CLIENTS[:3]:
        accept(store, client, run_id=run_id)
    store.refuse_delta(run_id, 1, "client-3", "not-finite", "tensor lora_B holds NaN")
    store.commit_round(run_id, 1, END, {"clients": 3})
    store.open_round(run_id, 2, END, CLIENTS[:2])
    accept(store, "client-0", run_id=run_id, round=2)


def kinds(store: RunStore, run_id: str = "run-1") -> list[str]:
    return [entry.kind for entry in store.ledger_entries(run_id)]


def execute(store: RunStore, statement: str, **values: object) -> None:
    """Change the database behind the store's back."""
    with store._engine.execution_options(fedpeft_write=True).begin() as connection:
        connection.execute(sa.text(statement), values)


# Runs


def test_a_run_is_kept_as_it_was_given(store: RunStore) -> None:
    before = datetime.now(UTC)
    run = store.create_run("run-1", "quickstart", JOB, 20, base_fingerprint="f" * 64)
    assert (run.id, run.name, run.job_toml, run.rounds_total) == ("run-1", "quickstart", JOB, 20)
    assert run.job_sha256 == hashlib.sha256(JOB.encode()).hexdigest()
    assert (run.state, run.base_fingerprint, run.error, run.summary) == ("queued", "f" * 64, None, None)
    assert before <= run.created_at == run.updated_at <= datetime.now(UTC)
    assert run.created_at.utcoffset() == timedelta(0)
    assert store.run("run-1") == run
    with pytest.raises(FrozenInstanceError):
        run.state = "failed"  # type: ignore[misc]


def test_creating_the_same_run_again_returns_it_and_another_job_is_refused(store: RunStore) -> None:
    run = store.create_run("run-1", "quickstart", JOB, 2)
    assert store.create_run("run-1", "quickstart", JOB, 2) == run
    with pytest.raises(FedPeftError, match=r"run: this run exists with another job \(got 'run-1'\)"):
        store.create_run("run-1", "quickstart", JOB + "#", 2)
    assert kinds(store) == ["run-created"]


def test_what_does_not_exist_is_named(store: RunStore) -> None:
    for ask in (store.run, store.rounds, store.evaluations, store.refusals, store.ledger_entries, store.verify_ledger):
        with pytest.raises(FedPeftError, match=r"run: there is no such run \(got 'nope'\)"):
            ask("nope")
    store.create_run("run-1", "quickstart", JOB, 2)
    with pytest.raises(FedPeftError, match=r"round: .*no such round \(got 3\)"):
        store.round("run-1", 3)


def test_the_queue_gives_the_oldest_run_first(store: RunStore) -> None:
    assert store.next_queued() is None
    for run_id in ("b", "a", "c"):
        store.create_run(run_id, "quickstart", JOB, 2)
    assert [run.id for run in store.runs()] == ["b", "a", "c"]
    order = []
    while (run := store.next_queued()) is not None:
        order.append(run.id)
        store.set_run_state(run.id, "running")
    assert order == ["b", "a", "c"]


def test_states_follow_the_ways_that_there_are(store: RunStore) -> None:
    store.create_run("run-1", "quickstart", JOB, 2)
    store.set_run_state("run-1", "running")
    failed = store.set_run_state("run-1", "failed", error="2 of 6 clients delivered")
    assert failed.error == "2 of 6 clients delivered"
    with pytest.raises(FedPeftError, match=r"is failed and cannot become finished .*it can become queued"):
        store.set_run_state("run-1", "finished")
    assert store.set_run_state("run-1", "queued").error is None
    store.set_run_state("run-1", "running")
    done = store.set_run_state("run-1", "finished", summary={"loss": 0.1 + 0.2})
    assert done.summary == {"loss": 0.30000000000000004}
    assert store.set_run_state("run-1", "finished") == done  # again: nothing happens
    with pytest.raises(FedPeftError, match="submit the job as a new run"):
        store.set_run_state("run-1", "running")
    with pytest.raises(FedPeftError, match="is not a state of a run"):
        store.set_run_state("run-1", "done")  # type: ignore[arg-type]
    assert kinds(store) == ["run-created", "run-running", "run-failed", "run-queued", "run-running", "run-finished"]


def test_the_base_fingerprint_is_set_once(store: RunStore) -> None:
    store.create_run("run-1", "quickstart", JOB, 2)
    assert store.set_base_fingerprint("run-1", "a" * 64).base_fingerprint == "a" * 64
    store.set_base_fingerprint("run-1", "a" * 64)
    with pytest.raises(FedPeftError, match=r"base_fingerprint: .*started on the base model a"):
        store.set_base_fingerprint("run-1", "b" * 64)


# Rounds and deltas


def test_a_round_opens_once_and_knows_its_start_and_clients(store: RunStore) -> None:
    store.create_run("run-1", "quickstart", JOB, 2)
    opened = store.open_round("run-1", 1, START, ["b", "a"])
    assert (opened.state, opened.start_state, opened.selected) == ("open", START, ("a", "b"))
    assert store.open_round("run-1", 1, START, ["a", "b"]) == opened == store.round("run-1", 1)
    with pytest.raises(FedPeftError, match=f"round: .*opened from state {START}"):
        store.open_round("run-1", 1, END, ["a", "b"])
    with pytest.raises(FedPeftError, match="opened with the clients a, b"):
        store.open_round("run-1", 1, START, ["a"])
    with pytest.raises(FedPeftError, match="selected: names a client twice"):
        store.open_round("run-1", 2, START, ["a", "a"])
    assert kinds(store) == ["run-created", "round-opened"]


def test_a_delta_counts_once(store: RunStore) -> None:
    start_run(store)
    assert accept(store, "client-1") is True
    assert accept(store, "client-1") is False
    with pytest.raises(FedPeftError, match="delta: client 'client-1' has delivered delta"):
        accept(store, "client-1", digest=END)
    assert accept(store, "client-0", weight=2**40, payload_bytes=2**40) is True
    rows = store.deltas("run-1", 1)
    assert [(row.client, row.digest, row.payload_bytes, row.weight, row.metrics) for row in rows] == [
        ("client-0", digest_of(1, "client-0"), 2**40, 2**40, {"loss": 1.5}),
        ("client-1", digest_of(1, "client-1"), 1000, 50, {"loss": 1.5}),
    ]
    assert kinds(store).count("delta-accepted") == 2


def test_only_selected_clients_deliver_and_only_to_an_open_round(store: RunStore) -> None:
    start_run(store)
    with pytest.raises(FedPeftError, match="client: is not selected for round 1"):
        accept(store, "stranger")
    with pytest.raises(FedPeftError, match="has no such round"):
        accept(store, "client-0", round=2)
    accept(store, "client-0")
    store.commit_round("run-1", 1, END, {})
    with pytest.raises(FedPeftError, match="round: round 1 of run 'run-1' is committed"):
        accept(store, "client-1")
    assert accept(store, "client-0") is False  # its acknowledgement got lost: it is told again
    assert len(store.deltas("run-1", 1)) == 1


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"digest": "zz"}, "digest"),
        ({"weight": -1}, "weight"),
        ({"weight": 1.0}, "weight"),
        ({"payload_bytes": 2**63}, "payload_bytes"),
        ({"metrics": {"loss": float("nan")}}, "metrics.loss"),
    ],
)
def test_values_that_cannot_be_kept_are_refused_by_name(store: RunStore, changed: dict[str, Any], field: str) -> None:
    start_run(store)
    with pytest.raises(FedPeftError) as caught:
        accept(store, "client-1", **changed)
    assert caught.value.field == field
    assert store.deltas("run-1", 1) == []
    assert store.verify_ledger("run-1") == 3


def test_a_commit_names_every_delta_and_happens_once(store: RunStore) -> None:
    start_run(store)
    for client in ("client-2", "client-0"):
        accept(store, client)
    done = store.commit_round("run-1", 1, END, {"exactness": 1e-9})
    assert (done.state, done.end_state, done.report) == ("committed", END, {"exactness": 1e-9})
    assert done.committed_at is not None
    assert store.commit_round("run-1", 1, END, {"exactness": 1e-9}) == done
    with pytest.raises(FedPeftError, match=f"is committed already with state {END}"):
        store.commit_round("run-1", 1, START, {})
    with pytest.raises(FedPeftError, match="is committed already"):
        store.fail_round("run-1", 1, "late")
    told = store.ledger_entries("run-1")[-1]
    assert told.kind == "round-committed"
    assert told.details["deltas"] == [
        ["client-0", digest_of(1, "client-0"), 50],
        ["client-2", digest_of(1, "client-2"), 50],
    ]


def test_a_failed_round_can_be_opened_again_with_what_it_had(store: RunStore) -> None:
    start_run(store)
    accept(store, "client-0")
    failed = store.fail_round("run-1", 1, "1 of 6 clients delivered\x00")
    assert failed.state == "failed"
    assert failed.report == {"error": "1 of 6 clients delivered\N{REPLACEMENT CHARACTER}"}
    assert store.fail_round("run-1", 1, "again") == failed
    with pytest.raises(FedPeftError, match="is failed"):
        accept(store, "client-1")
    with pytest.raises(FedPeftError, match="open it again first"):
        store.commit_round("run-1", 1, END, {})
    assert store.open_round("run-1", 1, START, CLIENTS).state == "failed"
    assert store.open_round("run-1", 1, START, CLIENTS, reopen=True).state == "open"
    assert accept(store, "client-0") is False
    assert accept(store, "client-1") is True
    store.commit_round("run-1", 1, END, {})
    assert store.verify_ledger("run-1") == 8


def test_refusals_are_kept_in_order_and_a_repeated_one_once(store: RunStore) -> None:
    start_run(store)
    assert store.refuse_delta("run-1", 1, "client-5", "shape", "lora_B is 4 x 8") is True
    assert store.refuse_delta("run-1", 99, "client-1", "round", "x" * 10_000) is True
    assert store.refuse_delta("run-1", 1, "client-5", "shape", "lora_B is 4 x 8") is False
    found = store.refusals("run-1")
    assert [(row.round, row.client, row.code) for row in found] == [(1, "client-5", "shape"), (99, "client-1", "round")]
    assert len(found[1].reason) == 2000  # what a peer sent is quoted, within bounds
    assert kinds(store).count("delta-refused") == 2


def test_an_evaluation_replaces_the_one_of_the_same_key(store: RunStore) -> None:
    store.create_run("run-1", "quickstart", JOB, 2)
    store.record_evaluation("run-1", 0, "b", "base", {"loss": 3.0})
    store.record_evaluation("run-1", 1, "B", "federated", {"loss": 2.0})
    store.record_evaluation("run-1", 1, "B", "federated", {"loss": 1.0})
    store.record_evaluation("run-1", 1, "a", "federated", {"loss": 4})
    found = [(row.round, row.client, row.split, row.metrics) for row in store.evaluations("run-1")]
    assert found == [
        (0, "b", "base", {"loss": 3.0}),
        (1, "B", "federated", {"loss": 1.0}),
        (1, "a", "federated", {"loss": 4}),
    ]
    assert len(kinds(store)) == 1


# Ledger


def test_the_ledger_grows_with_each_event_and_verifies(store: RunStore) -> None:
    play(store)
    store.append_ledger("run-1", "privacy-spend", {"epsilon": 0.25})
    assert kinds(store) == [
        "run-created",
        "run-running",
        "round-opened",
        *["delta-accepted"] * 3,
        "delta-refused",
        "round-committed",
        "round-opened",
        "delta-accepted",
        "privacy-spend",
    ]
    entries = store.ledger_entries("run-1")
    assert store.ledger_head("run-1") == entries[-1].hash == store.run("run-1").ledger_head
    assert store.verify_ledger("run-1", expected_head=entries[-1].hash) == 11
    with pytest.raises(IntegrityError, match="not in the expected head"):
        store.verify_ledger("run-1", expected_head=entries[-2].hash)
    with pytest.raises(FedPeftError, match="kind: is written by the method"):
        store.append_ledger("run-1", "delta-accepted", {})


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("kind", "'delta-accepteD'"),
        ("payload", "payload || ' '"),
        ("payload", "'not JSON'"),
        ("prev_hash", f"'{'0' * 63}1'"),
        ("hash", f"'{'0' * 63}1'"),
        ("at", "'2026-01-01 00:00:00.000000'"),
        ("run_id", "'run-2'"),
        ("seq", "seq + 1000"),
    ],
)
def test_any_changed_field_of_any_entry_is_caught(store: RunStore, column: str, value: str) -> None:
    play(store)
    store.create_run("run-2", "other", JOB, 1)
    execute(store, "DELETE FROM ledger WHERE run_id = 'run-2'")
    length = store.verify_ledger("run-1")
    for seq in range(length):
        original = store.ledger_entries("run-1")[seq]
        execute(store, f"UPDATE ledger SET {column} = {value} WHERE run_id = 'run-1' AND seq = {seq}")
        with pytest.raises(IntegrityError, match=f"ledger: entry {seq} "):
            store.verify_ledger("run-1")
        # Put back what was there, through the same back door.
        execute(
            store,
            f"UPDATE ledger SET run_id = 'run-1', seq = {seq}, kind = :kind, payload = :payload, prev_hash = :prev,"
            f" hash = :hash, at = {_literal(original.at)} WHERE (run_id = 'run-2') OR seq IN ({seq + 1000})"
            f" OR (run_id = 'run-1' AND seq = {seq})",
            kind=original.kind,
            payload=original.payload,
            prev=original.prev_hash,
            hash=original.hash,
        )
        assert store.verify_ledger("run-1") == length


def _literal(at: datetime) -> str:
    return f"'{at.strftime('%Y-%m-%d %H:%M:%S.%f')}'"


def test_a_removed_entry_is_caught_also_at_the_end(store: RunStore) -> None:
    play(store)
    length = store.verify_ledger("run-1")
    for seq in (length - 1, 4, 0):
        execute(store, f"DELETE FROM ledger WHERE seq = {seq}")
        with pytest.raises(IntegrityError, match=f"ledger: entry {seq} is missing"):
            store.verify_ledger("run-1")


def test_two_swapped_entries_are_caught(store: RunStore) -> None:
    play(store)
    for first, second in ((9, 8), (3, 5), (0, 1)):
        for old, new in ((first, -1), (second, first), (-1, second)):
            execute(store, f"UPDATE ledger SET seq = {new} WHERE seq = {old}")
        with pytest.raises(IntegrityError, match=f"ledger: entry {min(first, second)} "):
            store.verify_ledger("run-1")


@pytest.mark.parametrize(
    ("statement", "where"),
    [
        ("UPDATE deltas SET weight = 51 WHERE client = 'client-2'", "client-2' in round 1"),
        (f"UPDATE deltas SET digest = '{END}' WHERE client = 'client-0' AND round = 2", "client-0' in round 2"),
        ("DELETE FROM deltas WHERE client = 'client-1'", "client-1' in round 1"),
        (f"UPDATE rounds SET end_state = '{START}' WHERE number = 1", "round 1"),
        ("UPDATE rounds SET state = 'failed' WHERE number = 2", "round 2"),
    ],
)
def test_records_that_differ_from_the_ledger_are_caught(store: RunStore, statement: str, where: str) -> None:
    play(store)
    store.verify_ledger("run-1")
    execute(store, statement)
    with pytest.raises(IntegrityError, match=f"{where} is not what the ledger tells"):
        store.verify_ledger("run-1")


def test_threads_and_stores_appending_at_once_keep_one_chain(
    store: RunStore, database_url: str, tmp_path: Path
) -> None:
    for run_id in ("run-1", "run-2"):
        start_run(store, run_id)
    errors: list[BaseException] = []
    with RunStore.open(database_url, tmp_path / "blobs") as second:  # as another process would

        def work(client: str, through: RunStore) -> None:
            try:
                for run_id in ("run-1", "run-2"):
                    assert accept(through, client, run_id=run_id) is True
                    for number in range(10):
                        through.append_ledger(run_id, "event", {"client": client, "number": number})
                        through.ledger_head(run_id)
            except BaseException as error:
                errors.append(error)

        threads = [
            threading.Thread(target=work, args=(client, (store, second)[number % 2]))
            for number, client in enumerate(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
    for run_id in ("run-1", "run-2"):
        assert store.verify_ledger(run_id) == 3 + 8 * 11
        told = [entry.details for entry in store.ledger_entries(run_id) if entry.kind == "event"]
        for client in CLIENTS:  # each thread's own events are in its own order
            assert [event["number"] for event in told if event["client"] == client] == list(range(10))


def test_one_delta_raced_by_eight_threads_is_accepted_once(store: RunStore) -> None:
    start_run(store)
    outcomes: list[bool] = []
    threads = [threading.Thread(target=lambda: outcomes.append(accept(store, "client-0"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False] * 7 + [True]


# Clients


def test_a_client_is_found_by_name_certificate_key_and_node(store: RunStore) -> None:
    client = store.enroll("hospital-a", b"\x00key", "aa:bb")
    assert client.active
    assert (client.node_id, client.revoked_at, client.last_seen) == (None, None, None)
    assert store.enroll("hospital-a", b"\x00key", "aa:bb") == client
    client = store.set_node("hospital-a", 2**64 - 1)
    assert client.node_id == 2**64 - 1
    assert store.client_by_fingerprint("aa:bb") == store.client_by_key(b"\x00key") == client
    assert store.client_by_name("hospital-a") == store.client_by_node(2**64 - 1) == client
    assert store.client_by_fingerprint("cc") is None
    assert store.client_by_key(b"other") is None
    store.enroll("Clinic", b"k2", "cc")
    assert [row.name for row in store.clients()] == ["Clinic", "hospital-a"]


def test_identities_are_not_shared(store: RunStore) -> None:
    store.enroll("a", b"ka", "fa")
    store.enroll("b", b"kb", "fb")
    with pytest.raises(FedPeftError, match="client: is enrolled with another key"):
        store.enroll("a", b"new", "fa")
    for key, fingerprint in ((b"ka", "new"), (b"new", "fa")):
        with pytest.raises(FedPeftError, match="belongs to client 'a'"):
            store.enroll("c", key, fingerprint)
    store.set_node("a", 5)
    with pytest.raises(FedPeftError, match="node_id: this node is client 'a'"):
        store.set_node("b", 5)
    with pytest.raises(FedPeftError, match="client: is not enrolled"):
        store.set_node("c", 6)


def test_a_revoked_client_stays_known_and_may_be_enrolled_anew(store: RunStore) -> None:
    store.enroll("a", b"ka", "fa")
    store.set_node("a", 5)
    revoked = store.revoke("a")
    assert revoked.revoked_at is not None
    assert store.revoke("a") == revoked
    found = store.client_by_fingerprint("fa")
    assert found is not None
    assert not found.active
    again = store.enroll("a", b"kb", "fb")
    assert again.active
    assert again.node_id is None
    assert store.client_by_fingerprint("fa") is None  # the old certificate opens nothing


def test_last_seen_only_moves_forward(store: RunStore) -> None:
    store.enroll("a", b"ka", "fa")
    at = datetime(2026, 5, 6, 7, 8, 9, 10, tzinfo=UTC)
    store.touch("a", at)
    store.touch("a", at - timedelta(seconds=1))
    found = store.client_by_name("a")
    assert found is not None
    assert found.last_seen == at
    store.touch("a")
    with pytest.raises(FedPeftError, match="is not enrolled"):
        store.touch("b", at)
