"""A job on Flower's own processes ends in the bytes that ``fedpeft simulate`` makes; a mistake is said in one line."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict

from fedpeft.data.sources import write_client_folder
from fedpeft.errors import DeltaRefused, FedPeftError, RunFailed
from fedpeft.federation.status import open_run_folder, run_status
from fedpeft.job.loading import parse_job
from fedpeft.job.schema import Job
from fedpeft_proto.v1 import round_pb2 as pb
from fedpeft_simulations import flower_app
from fedpeft_simulations.engine import simulate
from fedpeft_simulations.hosts import simulated_clients

APP = Path(__file__).parents[2] / "simulations" / "flower-app"
COMMANDS = Path(sys.executable).parent
JOB = """
name = "digits-on-flower"
seed = 7
[model]
base = "builtin:digits-vit"
[data]
source = "builtin:digits"
task = "image-classification"
partition = { by = "dirichlet", alpha = 0.5 }
[adapter]
kind = "lora"
rank = 4
[clients]
count = 2
deadline_s = 120
[train]
local_steps = 5
batch_size = 8
[aggregation]
rule = "mean"
rounds = 1
[evaluation]
max_examples = 8
baselines = []
"""
OVERRIDE = "train.local_steps=1"
NO_COUNT = JOB.replace("count = 2", "")


def small_job() -> Job:
    return parse_job(JOB, [OVERRIDE])


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class StockFlower:
    """Flower's own commands, with its files in ``root``. :meth:`close` ends them and all that they have started."""

    def __init__(self, root: Path):
        self.root = root
        self.home = root / "flwr"
        self.home.mkdir()
        self.superlink, *self.nodes = free_ports(3)
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "lab"\n[superlink.lab]\naddress = "127.0.0.1:{self.superlink}"\ninsecure = true\n'
        )
        self.environment = {
            **os.environ,
            "PATH": f"{COMMANDS}{os.pathsep}{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(self.home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        self.processes: list[subprocess.Popen[bytes]] = []

    def documented(self, beginning: str, **values: str) -> list[str]:
        """A command of the README, with the ports and paths of this test instead of its own."""
        lines = [line for line in (APP / "README.md").read_text().splitlines() if line.startswith(beginning)]
        assert len(lines) == 1, f"{len(lines)} lines of the README begin with {beginning!r}"
        ports = dict(zip(("8000", "9094", "9095"), map(str, (self.superlink, *self.nodes)), strict=True))
        line = re.sub(r"\b(8000|9094|9095)\b", lambda found: ports[found[0]], lines[0])
        for key, value in values.items():
            line, found = re.subn(rf"({key.replace('_', '-')})='[^']*'", rf"\1='{value}'", line)
            assert found == 1, f"{key} is not in {line!r}"
        command, *arguments = shlex.split(line)
        return [str(COMMANDS / command), *arguments]

    def start(self, command: list[str]) -> None:
        with open(self.root / f"{len(self.processes)}-{Path(command[0]).name}.log", "ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment, cwd=self.root)
        self.processes.append(process)

    def start_superlink(self, *more: str) -> None:
        self.start([*self.documented("flower-superlink "), "--port", str(self.superlink), *more])
        self._await_health()

    def run(self, connection: str, out: Path, timeout: float = 240) -> str:
        """The README's ``flwr run`` of the small job, to its end; what it printed."""
        job = self.root / "job.toml"
        job.write_text(JOB)
        command = self.documented(
            f"flwr run . {connection} ", fedpeft_job=str(job), fedpeft_set=OVERRIDE, fedpeft_out=str(out)
        )
        command[3] = "lab"  # "local" would start a SuperLink that stays behind
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=self.environment, cwd=APP)
        assert done.returncode == 0, done.stdout + done.stderr + self.logs()
        return done.stdout + done.stderr

    def logs(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')}" for p in sorted(self.root.glob("*.log")))

    def close(self) -> None:
        every = []
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                root = psutil.Process(process.pid)
                every += [root, *root.children(recursive=True)]
        for process in every:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for process in self.processes:
            process.wait()
        psutil.wait_procs(every, timeout=10)

    def _await_health(self) -> None:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                opener.open(f"http://127.0.0.1:{self.superlink}/health", timeout=2).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise AssertionError("flower-superlink did not start\n" + self.logs())


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[StockFlower]:
    stock = StockFlower(tmp_path)
    try:
        yield stock
    finally:
        stock.close()


def committed_bytes(folder: Path) -> dict[str, bytes]:
    kept = [*folder.glob("checkpoints/*"), *folder.glob("adapter/*"), folder / "job.toml"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in kept}


def assert_same_as_simulated(out: Path, reference: Path) -> None:
    simulated = simulate(small_job(), reference, engine="in-process")
    assert len(committed_bytes(out)) == 4
    assert committed_bytes(out) == committed_bytes(reference)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["columns"] == ["base", "federated"]
    assert summary["state"] == simulated.summary["state"]
    assert summary["clients"] == simulated.summary["clients"]
    with open_run_folder(out) as store:
        status = run_status(store, summary["run_id"])
        store.verify_ledger(summary["run_id"])
    assert status["state"] == "finished"


# --- Flower's own processes ------------------------------------------------------------------------------------------


@pytest.mark.e2e
@pytest.mark.slow
def test_superlink_and_two_supernodes_give_the_bytes_of_the_simulation(tmp_path, flower):
    """One node goes by Flower's convention, the other is a data owner with a folder of the same client's records."""
    second = simulated_clients(small_job())[1]
    write_client_folder(second, tmp_path / "data")
    node = "flower-supernode --insecure --superlink 127.0.0.1:8000 --port"
    flower.start_superlink()
    flower.start(flower.documented(f'{node} 9094 --node-config "partition-id=0 '))
    flower.start(
        flower.documented(
            f'{node} 9095 --node-config "fedpeft', fedpeft_client=second.name, fedpeft_data=str(tmp_path / "data")
        )
    )
    printed = flower.run("lab", tmp_path / "out")
    assert "round 1 committed: 2 of 2 deltas" in printed, printed + flower.logs()
    assert_same_as_simulated(tmp_path / "out", tmp_path / "reference")


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'fedpeft[ray]'")
def test_the_ray_simulation_gives_the_bytes_of_ours(tmp_path, flower):
    flower.start_superlink("--simulation")
    printed = flower.run("local", tmp_path / "out")
    assert "round 1 committed: 2 of 2 deltas" in printed, printed + flower.logs()
    assert_same_as_simulated(tmp_path / "out", tmp_path / "reference")


# --- accidents, on a grid in this process ----------------------------------------------------------------------------


class LocalGrid:
    """Calls the client app in this process. ``accident`` may answer for it, or swallow a message by giving ``None``."""

    def __init__(self, nodes: dict[int, dict[str, Any]]):
        self.nodes = nodes
        self.accident: Callable[[Message, Callable[[], Message]], Message | None] = lambda message, answer: answer()
        self.pushed: list[tuple[int, str]] = []
        self._replies: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            self.pushed.append((node, message.metadata.message_type))
            ids.append(f"message-{len(self.pushed)}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            context = Context(1, node, self.nodes[node], RecordDict(), {})
            reply = self.accident(message, lambda m=message, c=context: flower_app.client_app(m, c))
            if reply is not None:
                self._replies[ids[-1]] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]


@pytest.fixture
def grid(monkeypatch) -> LocalGrid:
    from flwr.supercore.task_identity import (
        TaskIdentity,
    )  # a message takes its run from here; Flower's processes set it

    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    for name in ("POLL_S", "LIVENESS_S", "RETRY_S"):
        monkeypatch.setattr(flower_app, name, 0.0)
    return LocalGrid({10 + i: {"partition-id": i, "num-partitions": 2} for i in range(2)})


def test_a_lost_message_a_restarted_node_and_a_crash_do_not_change_one_bit(tmp_path, grid):
    happened: list[str] = []

    def accident(message: Message, answer: Callable[[], Message]) -> Message | None:
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        if (node, kind) == (10, "train"):  # it takes the message with it and comes back under another node id
            happened.append("restarted")
            grid.nodes[20] = grid.nodes.pop(10)
            return None
        if (node, kind) == (11, "train") and "crashed" not in happened:
            happened.append("crashed")
            return Message(Error(2, "out of memory"), reply_to=message)
        return answer()

    grid.accident = accident
    flower_app.federate(grid, small_job(), tmp_path / "out", 2)
    assert sorted(happened) == ["crashed", "restarted"]
    assert grid.pushed.count((20, "evaluate")) == 2  # once to say who it is, once for the final figures
    assert_same_as_simulated(tmp_path / "out", tmp_path / "reference")


def test_a_run_that_failed_goes_on_in_the_same_folder(tmp_path, grid):
    grid.accident = lambda message, answer: (
        Message(Error(2, "no such device"), reply_to=message)
        if (message.metadata.dst_node_id, message.metadata.message_type) == (11, "train")
        else answer()
    )
    with pytest.raises(RunFailed, match=r"1 of the 2 deltas.*client-01: no such device"):
        flower_app.federate(grid, small_job(), tmp_path / "out", 2)
    again = LocalGrid(grid.nodes)
    flower_app.federate(again, small_job(), tmp_path / "out", 2)
    assert [message for message in again.pushed if message[1] == "train"] == [(11, "train")]
    assert_same_as_simulated(tmp_path / "out", tmp_path / "reference")


def test_a_tampered_delta_is_refused_recorded_and_not_kept(tmp_path, grid):
    def accident(message: Message, answer: Callable[[], Message]) -> Message:
        reply = answer()
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 11:
            array = reply.content["arrays"]["packed"]
            data = array.data[:-4] + b"\x00\x00\xc0\x7f"  # NaN
            reply.content["arrays"]["packed"] = Array(array.dtype, array.shape, array.stype, data)
        return reply

    grid.accident = accident
    with pytest.raises(RunFailed, match=r"client-01.*"):
        flower_app.federate(grid, small_job(), tmp_path / "out", 2)
    with open_run_folder(tmp_path / "out") as store:
        run = store.runs()[0]
        deltas = store.deltas(run.id, 1)
        kept = set(store.blobs.digests())
    assert run.state == "failed"
    assert [row.client for row in deltas] == ["client-00"]
    assert len(kept) == 2  # the starting state and the good delta


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"partition-id": 1, "num-partitions": 3}, r"num-partitions: the job has 2 clients \(got 3\)"),
        ({"partition-id": 2, "num-partitions": 2}, r"partition-id: must be from 0 to 1 \(got 2\)"),
        ({"partition-id": 0, "num-partitions": 2}, "another node is client client-00 already"),
        ({}, "the node config names no client; start the node with --node-config"),
        ({"fedpeft-client": "bank"}, "fedpeft-data: is required beside the other"),
        ({"fedpeft-client": "bank", "fedpeft-data": "/nowhere/at/all"}, "no such file or folder"),
    ],
)
def test_a_node_that_cannot_take_part_says_why_in_one_line(tmp_path, grid, node, said):
    grid.nodes[11] = node
    with pytest.raises(RunFailed, match=f"1 of 2 nodes take part .*{said}") as caught:
        flower_app.federate(grid, small_job(), tmp_path / "out", 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("metrics", "client", "said"),
    [
        ({"loss": float("nan")}, "client-01", "sent scores"),
        ({"loss": 1.0, "event": 2.0}, "client-01", "sent scores"),
        ({}, "client-01", "sent scores"),
        ({"loss": 1.0}, "client\n01", "does not say which client it is"),
        ({"loss": 1.0}, "x" * 300, "does not say which client it is"),
    ],
)
def test_odd_scores_and_names_are_not_taken(tmp_path, grid, metrics, client, said):
    def accident(message: Message, answer: Callable[[], Message]) -> Message:
        if message.metadata.dst_node_id == 10:
            return answer()
        reply = pb.RoundReply(client=client, status=pb.RoundReply.EVALUATED)
        reply.evaluations.append(pb.Evaluation(split="heldout", metrics=metrics))
        return Message(flower_app._content(reply, None), reply_to=message)

    grid.accident = accident
    with pytest.raises(RunFailed, match=f"1 of 2 nodes take part .*{said}"):
        flower_app.federate(grid, small_job(), tmp_path / "out", 2)


# --- the run config --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "fedpeft-job: must be an absolute path on the machine of the server app"),
        ({"fedpeft-job": "job.toml"}, "fedpeft-job: must be an absolute path"),
        ({"fedpeft-job": "/nowhere/job.toml"}, "no such job file"),
        ({"fedpeft-job": JOB, "fedpeft-set": "train.local_stepz=1"}, "train.local_stepz: unknown key"),
        ({"fedpeft-job": JOB, "fedpeft-set": "name='x"}, "fedpeft-set: cannot be split"),
        ({"fedpeft-job": JOB}, "fedpeft-out: must be an absolute path"),
        ({"fedpeft-job": NO_COUNT}, "fedpeft-nodes: must be a whole number from 1"),
        ({"fedpeft-job": NO_COUNT, "fedpeft-nodes": "two"}, "fedpeft-nodes: must be a whole number"),
        (
            {
                "fedpeft-job": NO_COUNT,
                "fedpeft-set": "clients.per_round=3",
                "fedpeft-out": "/tmp/never-made",
                "fedpeft-nodes": 2,
            },
            "clients.per_round: is more than the 2 nodes",
        ),
    ],
)
def test_a_mistake_in_the_run_config_names_the_key(grid, config, said):
    with pytest.raises(FedPeftError, match=said):
        flower_app.main(grid, Context(1, 1, {}, RecordDict(), config))


def test_the_bundle_installs_nothing_and_sets_every_key_of_the_run_config():
    """Flower refuses keys that a bundle does not name, and installs what it depends on."""
    project = tomllib.loads((APP / "pyproject.toml").read_text())
    assert project["project"]["dependencies"] == ["flwr==1.41.0"]
    keys = set(project["tool"]["flwr"]["app"]["config"])
    assert keys == set(re.findall(r"^``(fedpeft-[a-z]+)``  ", flower_app.__doc__ or "", re.MULTILINE))


def test_a_path_and_the_text_of_a_job_are_the_same_job(tmp_path):
    path = tmp_path / "a=b.toml"
    path.write_text(JOB)
    config = {"fedpeft-set": OVERRIDE}
    assert flower_app._configured_job({**config, "fedpeft-job": JOB}) == small_job()
    assert flower_app._configured_job({**config, "fedpeft-job": str(path)}) == small_job()


@pytest.mark.parametrize(
    "array",
    [
        Array("float32", (1,), flower_app.STYPE, b"abcd"),
        Array("uint8", (3,), flower_app.STYPE, b"abcd"),
        Array("uint8", (4,), "numpy.ndarray", b"abcd"),
    ],
)
def test_only_one_packed_array_of_our_kind_is_taken(array):
    with pytest.raises(DeltaRefused, match=r"is not fedpeft\.safetensors\.v1"):
        flower_app._payload_of(RecordDict({"arrays": ArrayRecord({"packed": array})}))
    with pytest.raises(DeltaRefused, match="no packed array"):
        flower_app._payload_of(RecordDict({"arrays": ArrayRecord({"other": array})}))
