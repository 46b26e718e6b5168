"""The promise of the main job: one job file, the same adapter, byte for byte, simulated and deployed, and after
kills."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from federation import ROOT, Federation, fedpeft, ok, wait_for
from peft import PeftModel

JOB = ROOT / "simulations" / "jobs" / "quickstart.toml"
OVERRIDES = (
    "clients.count=4",
    "aggregation.rounds=3",
    "train.local_steps=2",
    "train.batch_size=4",
    "evaluation.baselines=[]",
)
SETS = [part for o in OVERRIDES for part in ("--set", o)]
WEIGHTS = "adapter_model.safetensors"

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every client's data in a folder of its own, as four organisations would have it."""
    folder = tmp_path_factory.mktemp("data")
    ok("data", "export", JOB, "--out", folder, *SETS)
    return folder


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same job in one process."""
    folder = tmp_path_factory.mktemp("simulated") / "run"
    ok("simulate", JOB, "--out", folder, "--engine", "in-process", *SETS)
    return folder


@pytest.fixture
def federation(tmp_path: Path, data: Path):
    """A daemon and four agents with different data."""
    federation = Federation(tmp_path)
    for client in sorted(data.iterdir()):
        federation.enroll(client.name, client)
    try:
        federation.start_server()
        federation.start_agents()
        yield federation
    finally:
        federation.close()


def same_adapter(a: Path, b: Path) -> bool:
    return (a / "adapter" / WEIGHTS).read_bytes() == (b / "adapter" / WEIGHTS).read_bytes()


def test_simulation_and_deployment_give_the_same_adapter(federation, simulated, tmp_path):
    run = federation.submit(JOB, *OVERRIDES)
    status = federation.wait_until_ended(run)
    assert status["state"] == "finished", status["error"]
    ok("fetch", run, "--bundle", federation.operator, "--out", tmp_path / "fetched")
    assert same_adapter(tmp_path / "fetched", simulated)

    # The folder that was fetched is a run folder like the simulation's.
    ours, theirs = (json.loads(ok("status", d, "--json")) for d in (tmp_path / "fetched", simulated))
    assert [r["end_state"] for r in ours["rounds"]] == [r["end_state"] for r in theirs["rounds"]]
    assert len(theirs["clients"]) == 4
    for mine, yours in zip(ours["clients"], theirs["clients"], strict=True):
        assert (mine["name"], mine["delivered"], mine["weight"]) == (yours["name"], 3, yours["weight"])
        assert [e["loss"] for e in mine["evaluations"]] == [e["loss"] for e in yours["evaluations"]]
    assert "verify" in ok("verify", tmp_path / "fetched")

    # Stock PEFT loads it.
    from fedpeft.models import load_base

    PeftModel.from_pretrained(
        load_base("builtin:tiny-code-lm", "causal-lm").model, str(tmp_path / "fetched" / "adapter")
    )

    # watch replays the whole run and ends.
    watched = [
        json.loads(line)["kind"] for line in ok("watch", run, "--bundle", federation.operator, "--json").splitlines()
    ]
    assert watched.count("round-committed") == 3
    assert watched.count("delta-accepted") == 12
    assert watched[-1] == "run-finished"


def test_the_adapter_survives_a_killed_daemon_and_a_killed_agent(federation, simulated):
    run = federation.submit(JOB, *OVERRIDES, "train.local_steps=2")
    clients = sorted(federation.agents)

    # The daemon dies in round 2, when it has acknowledged at least one delta of it.
    wait_for("a delta of round 2", lambda: federation.happened(run, "delta-accepted", round=2), 120)
    federation.server.kill()
    acknowledged = [e["client"] for e in federation.events(run) if e["kind"] == "delta-accepted" and e["round"] == 2]
    assert acknowledged
    federation.start_server()

    # An agent dies in round 3 and comes back.
    wait_for("round 3", lambda: federation.happened(run, "round-started", round=3), 120)
    victim = federation.agents[clients[0]]
    victim.kill()
    victim.start()
    status = federation.wait_until_ended(run)
    assert status["state"] == "finished", status["error"]
    assert same_adapter(federation.server_dir / "runs" / run, simulated)

    # What was acknowledged was not asked for again: one delta per client and round, and one ledger that verifies.
    accepted = [(e["round"], e["client"]) for e in federation.events(run) if e["kind"] == "delta-accepted"]
    assert len(accepted) == len(set(accepted))
    fetched = federation.root / "fetched"
    ok("fetch", run, "--bundle", federation.operator, "--out", fetched)
    ok("verify", fetched)
    entries = json.loads(ok("status", fetched, "--json"))["rounds"]
    assert [e["report"]["accepted"] for e in entries] == [4, 4, 4]


def test_a_second_run_queues_and_a_stopped_run_keeps_its_rounds_and_can_go_on(federation):
    long = federation.submit(JOB, *OVERRIDES, "aggregation.rounds=12", "name=long")
    short = federation.submit(JOB, *OVERRIDES, "aggregation.rounds=1", "name=short")
    wait_for("a committed round", lambda: federation.happened(long, "round-committed"), 120)
    assert federation.status(short)["state"] == "queued"
    ok("stop", long, "--bundle", federation.operator)
    assert federation.wait_until_ended(long)["state"] == "stopped"
    assert federation.wait_until_ended(short)["state"] == "finished"
    assert federation.status(long)["round"] >= 1
    assert (federation.server_dir / "runs" / long / "adapter" / WEIGHTS).exists()
    # A stopped run can be taken up again.
    ok("resume", long, "--bundle", federation.operator)
    resumed = federation.wait_until_ended(long)
    assert (resumed["state"], resumed["round"]) == ("finished", 12)
    listed = ok("status", "--bundle", federation.operator)
    assert long in listed
    assert short in listed


def test_a_simulation_that_was_killed_continues_to_the_same_bytes(simulated, tmp_path):
    import subprocess

    from federation import FEDPEFT, environment

    out = tmp_path / "run"
    process = subprocess.Popen([*FEDPEFT, "simulate", str(JOB), "--out", str(out), "--engine", "in-process", *SETS],
                               env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    wait_for("a checkpoint", lambda: list(out.glob("checkpoints/*")), 120)
    process.kill()
    process.wait()
    ok("simulate", JOB, "--out", out, *SETS)
    assert same_adapter(out, simulated)
    again = fedpeft("simulate", JOB, "--out", out, *SETS)
    assert again.returncode == 2
    assert "finished already" in again.stderr


def test_the_engine_does_not_change_a_bit(simulated, tmp_path):
    ok("simulate", JOB, "--out", tmp_path / "run", "--engine", "processes", *SETS)
    assert same_adapter(tmp_path / "run", simulated)
    shutil.rmtree(tmp_path / "run")
