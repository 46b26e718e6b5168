"""What is wrong is refused with one clear line, nothing that was accepted is lost, and the daemon goes on serving.

One federation of two honest agents stays up for the whole module. Every mistake and every hostile participant meets
this same daemon, and afterwards the same two agents still bring a job to its end with the adapter of the simulation.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from federation import FEDPEFT, ROOT, Federation, Process, environment, fedpeft, free_port, ok, wait_for
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedpeft.adapters.delta import PackedFile, content_address, pack
from fedpeft.bundle import Bundle, load_bundle, write_bundle
from fedpeft.cli.server import enroll, revoke
from fedpeft.errors import FedPeftError
from fedpeft.federation.participant import Participant
from fedpeft.job import parse_job
from fedpeft.models import load_base
from fedpeft_client.agent import Agent, load_client_data
from fedpeft_client.bundle import channel_credentials, channel_options, open_channel
from fedpeft_client.config import ClientConfig, Limits
from fedpeft_client.engine import FleetSession
from fedpeft_client.exchange import ExchangeClient
from fedpeft_proto.v1 import coordinator_pb2 as control
from fedpeft_proto.v1 import coordinator_pb2_grpc as rpc
from fedpeft_proto.v1 import round_pb2 as pb
from fedpeft_server.config import init_server, load_config

pytestmark = pytest.mark.e2e

JOB = ROOT / "simulations" / "jobs" / "quickstart.toml"
HONEST = ("ada", "bob")
SMALL = (
    "aggregation.rounds=1",
    "train.local_steps=1",
    "train.batch_size=2",
    "data.max_length=32",
    "evaluation.max_examples=4",
    "evaluation.baselines=[]",
)
WEIGHTS = "adapter_model.safetensors"


def sets(*overrides: str) -> list[str]:
    return [part for o in overrides for part in ("--set", o)]


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """What the user sees of a mistake: exit code 2, nothing on standard output, one line on standard error."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stdout.strip() == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def dies_with_one_line(process: Process, timeout: float = 120) -> str:
    """The same for a long-running command, which may have logged before."""
    assert process.process is not None
    assert process.process.wait(timeout) == 2, process.log.read_text()
    lines = process.log.read_text().splitlines()
    assert "Traceback" not in process.log.read_text()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few lines of text for each of the two honest clients."""
    folder = tmp_path_factory.mktemp("data")
    for number, name in enumerate(HONEST):
        (folder / name).mkdir()
        for part in ("train", "heldout"):
            lines = [
                json.dumps({"text": f"def {name}_{part}_{i}(x):\n    return x * {i + number}\n"}) for i in range(12)
            ]
            (folder / name / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def simulated(data: Path, out: Path, *overrides: str) -> bytes:
    """The adapter of the same job, simulated: what every run here has to end with."""
    ok("simulate", JOB, "--out", out, "--engine", "in-process",
       *sets(*SMALL, f"data.source={data}", "clients.count=2", *overrides))  # fmt: skip
    return (out / "adapter" / WEIGHTS).read_bytes()


@pytest.fixture(scope="module")
def expected(data: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return simulated(data, tmp_path_factory.mktemp("simulated") / "run")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Iterator[Federation]:
    federation = Federation(tmp_path_factory.mktemp("federation"))
    for name in HONEST:
        federation.enroll(name, data / name)
    try:
        federation.start_server()
        federation.start_agents()
        yield federation
    finally:
        federation.close()


@pytest.fixture(scope="module")
def second_agent(federation: Federation) -> Iterator[Process]:
    """A second agent with the bundle of one that runs; it is given time, as a restarted agent would need."""
    home = federation.root / "ada"
    process = Process(home / "second.log", "client", "up", "--bundle", home / "ada.toml").start()
    yield process
    process.stop()


@pytest.fixture(autouse=True)
def _still_serving(federation: Federation, second_agent: Process) -> Iterator[None]:
    """After each test the same daemon and the same agents are there, and no process showed a traceback."""
    yield
    for process in (federation.server, *federation.agents.values()):
        assert process.process is not None
        assert process.process.poll() is None, process.log.read_text()
        assert not process.says("Traceback"), process.log.read_text()


def finishes(federation: Federation, run: str, expected: bytes) -> dict[str, Any]:
    """The run ends with the adapter that was to be expected and a ledger that verifies."""
    status = federation.wait_until_ended(run)
    assert status["state"] == "finished", status["error"]
    out = federation.root / f"fetched-{run}"
    ok("fetch", run, "--bundle", federation.operator, "--out", out)
    ok("verify", out)
    assert (out / "adapter" / WEIGHTS).read_bytes() == expected
    return status


# Mistakes in the job --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.learnin_rate=1", ["train.learnin_rate", "did you mean 'learning_rate'?"]),
        ("adapter.rank=0", ["adapter.rank", "greater than or equal to 1", "(got 0)"]),
        (
            "adapter.target_modules=['q_prj']",
            ["adapter.target_modules", "'q_prj'", "did you mean 'q_proj'?", "linear layers are named", "k_proj"],
        ),
        ("model.base='/no/such/model'", ["model.base", "no such folder", "'/no/such/model'", "save_pretrained"]),
        ("model.fingerprint='" + "0" * 64 + "'", ["model.fingerprint", "000000", "same base model files"]),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_mistake_in_the_job_gets_the_same_line_from_the_simulator_and_the_daemon(
    federation, tmp_path, override, words
):
    submitted = one_line(fedpeft("submit", JOB, "--bundle", federation.operator, *sets(*SMALL, override)))
    simulated = one_line(
        fedpeft("simulate", JOB, "--out", tmp_path / "run", *sets(*SMALL, "clients.count=2", override))
    )
    assert submitted == simulated
    for word in words:
        assert word in submitted


def test_a_job_file_that_is_not_toml_or_not_there_is_named(federation, tmp_path):
    broken = tmp_path / "broken.toml"
    broken.write_text('name = "x\n[model')
    for command in (
        ["simulate", broken, "--out", tmp_path / "run"],
        ["submit", broken, "--bundle", federation.operator],
    ):
        line = one_line(fedpeft(*command))
        assert str(broken) in line
        assert "not valid TOML" in line
    assert "no such job file" in one_line(fedpeft("submit", tmp_path / "none.toml", "--bundle", federation.operator))


def test_a_job_that_needs_more_clients_than_there_are_is_refused_by_the_daemon(federation):
    line = one_line(fedpeft("submit", JOB, "--bundle", federation.operator, *sets(*SMALL, "clients.min_to_commit=3")))
    assert "clients.min_to_commit: is more than the 2 enrolled clients (got 3)" in line


def test_a_good_job_runs_after_all_those(federation, expected):
    finishes(federation, federation.submit(JOB, *SMALL), expected)


# Mistakes of an operator ----------------------------------------------------------------------------------------------


def test_an_unknown_run_is_named(federation):
    for command in ("status", "watch", "stop", "fetch"):
        line = one_line(fedpeft(command, "no-such-run", "--bundle", federation.operator))
        assert "no such run (got 'no-such-run')" in line
        assert "fedpeft status" in line


def test_a_command_without_a_daemon_says_where_it_looked(federation, tmp_path):
    config = init_server(tmp_path / "server", [], free_port())
    done = fedpeft("submit", JOB, "--bundle", tmp_path / "server" / "operator.toml", *sets(*SMALL))
    assert done.returncode == 2
    waiting, line = done.stderr.splitlines()  # a daemon that has just been started gets a few seconds
    assert waiting == f"waiting for the daemon at localhost:{config.port}"
    assert f"error: no daemon answers at localhost:{config.port}" in line
    assert "fedpeft server up" in line


def test_one_folder_has_one_daemon(federation):
    line = one_line(fedpeft("server", "up", federation.server_dir))
    assert "another daemon is running on this folder" in line
    assert str(federation.server_dir) in line


def test_a_port_in_use_is_named(federation, tmp_path):
    init_server(tmp_path / "server", [], federation.port)
    line = one_line(fedpeft("server", "up", tmp_path / "server"))
    assert f"(got {federation.port})" in line
    assert "in use" in line
    with socket.create_server(("127.0.0.1", 0)) as taken:
        (tmp_path / "server" / "server.toml").write_text(f"port = {free_port()}\n")
        port = taken.getsockname()[1]
        line = one_line(fedpeft("server", "up", tmp_path / "server", "--metrics-port", port))
    assert "--metrics-port" in line
    assert str(port) in line


def test_a_server_whose_certificate_has_expired_says_how_to_renew_it(federation, tmp_path):
    config = init_server(tmp_path / "server", [], free_port())
    config.authority().issue_server([], valid_days=1e-6)  # a tenth of a second
    line = one_line(fedpeft("server", "up", tmp_path / "server"))
    assert "expired" in line
    assert "--renew" in line


def test_enrolment_mistakes_are_named(federation):
    where = ("--dir", federation.server_dir)
    assert "is enrolled already (got 'ada'); use --renew" in one_line(fedpeft("server", "enroll", "ada", *where))
    assert "not a valid participant name (got 'Ada B')" in one_line(fedpeft("server", "enroll", "Ada B", *where))
    assert "enrolled: ada, bob" in one_line(fedpeft("server", "revoke", "eve", *where))
    assert "is not a server folder" in one_line(fedpeft("server", "enroll", "eve", "--dir", federation.root))


# Who is not welcome ---------------------------------------------------------------------------------------------------


def agent_of(home: Path, bundle: Bundle, data: Path) -> Process:
    home.mkdir()
    write_bundle(bundle, home / "bundle.toml")
    (home / "client.toml").write_text(f'data = "{data}"\n')
    return Process(home / "agent.log", "client", "up", "--bundle", home / "bundle.toml").start()


def call(bundle: Bundle, endpoint: str, ask: Callable[[grpc.Channel], Any]) -> grpc.StatusCode:
    """What a caller that skips every check of our own client is told."""
    with grpc.secure_channel(endpoint, channel_credentials(bundle), options=channel_options(endpoint)) as channel:
        try:
            ask(channel)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def announce(channel: grpc.Channel) -> None:
    rpc.AgentLinkStub(channel).Announce(control.AnnounceRequest(session_id="x"), timeout=20)


def status(channel: grpc.Channel) -> None:
    rpc.CoordinatorStub(channel).Status(control.StatusRequest(), timeout=20)


def test_strangers_are_turned_away_with_a_reason(federation, data, tmp_path):
    authority = load_config(federation.server_dir).authority()
    endpoints = [f"localhost:{federation.port}"]
    elsewhere = (
        init_server(tmp_path / "elsewhere", [], free_port()).authority().issue("eve", "client", endpoints=endpoints)
    )
    # Their certificate, our authority in the bundle: the only way for a stranger to get past the client's own checks.
    stranger = replace(elsewhere, ca_certificate_pem=authority.certificate_pem)
    never_enrolled = authority.issue("carl", "client", endpoints=endpoints)
    enroll(federation.server_dir, ["rita"], tmp_path / "rita.toml", 365, False, True)
    revoke(federation.server_dir, "rita")
    revoked = load_bundle(tmp_path / "rita.toml")
    expired = authority.issue(
        "ada", "client", endpoints=endpoints, valid_days=1, now=datetime.now(UTC) - timedelta(days=2)
    )

    agents = {
        "other authority": agent_of(tmp_path / "eve", elsewhere, data / "ada"),
        "never enrolled": agent_of(tmp_path / "carl", never_enrolled, data / "ada"),
        "revoked": agent_of(tmp_path / "rita", revoked, data / "ada"),
        "expired": agent_of(tmp_path / "old", expired, data / "ada"),
    }
    said = {who: dies_with_one_line(agent) for who, agent in agents.items()}
    assert "the server's certificate is not accepted" in said["other authority"]
    assert "the server does not know the key of carl" in said["never enrolled"]
    assert "fedpeft server enroll carl" in said["never enrolled"]
    assert "the server does not know the key of rita" in said["revoked"]
    assert f"certificate of ada expired on {expired.expires_at:%Y-%m-%d}" in said["expired"]
    assert "fedpeft server enroll ada --renew" in said["expired"]

    # Without our client's checks: TLS stops those without a valid certificate, the roster the others.
    assert call(stranger, endpoints[0], announce) is grpc.StatusCode.UNAVAILABLE
    assert call(expired, endpoints[0], announce) is grpc.StatusCode.UNAVAILABLE
    assert call(never_enrolled, endpoints[0], announce) is grpc.StatusCode.PERMISSION_DENIED
    assert call(revoked, endpoints[0], announce) is grpc.StatusCode.PERMISSION_DENIED
    for bundle in (never_enrolled, revoked):
        with open_channel(bundle)[0] as channel, pytest.raises(FedPeftError, match="PERMISSION_DENIED"):
            ExchangeClient(channel).upload(b"x", "run", 1, content_address(b"x"))


def test_an_expired_operator_cannot_submit(federation, tmp_path):
    old = load_config(federation.server_dir).authority().issue(
        "operator", "operator", endpoints=[f"localhost:{federation.port}"], valid_days=1,
        now=datetime.now(UTC) - timedelta(days=2),
    )  # fmt: skip
    write_bundle(old, tmp_path / "old.toml")
    assert "certificate of operator expired on" in one_line(fedpeft("submit", JOB, "--bundle", tmp_path / "old.toml"))


def test_clients_cannot_command_and_operators_cannot_train(federation, tmp_path):
    ada, operator = federation.root / "ada" / "ada.toml", federation.operator
    for command in (["submit", JOB], ["status"], ["stop", "x"], ["fetch", "x"], ["watch", "x"]):
        line = one_line(fedpeft(*command, "--bundle", ada))
        assert "this call is for operators; ada is a client" in line
    assert "belongs to an operator" in one_line(fedpeft("client", "up", "--bundle", operator))

    bundle = load_bundle(operator)
    assert call(bundle, bundle.endpoints[0], announce) is grpc.StatusCode.PERMISSION_DENIED
    assert call(load_bundle(ada), bundle.endpoints[0], status) is grpc.StatusCode.PERMISSION_DENIED
    with open_channel(bundle)[0] as channel:
        with pytest.raises(FedPeftError, match=r"PERMISSION_DENIED.*operator"):
            ExchangeClient(channel).upload(b"x", "run", 1, content_address(b"x"))
        with pytest.raises(FedPeftError, match="does not know the key of operator"):
            FleetSession(channel, bundle, bundle.endpoints[0]).run(ClientApp(), threading.Event())


def test_an_agent_whose_files_are_wrong_does_not_start(federation, tmp_path):
    home = federation.root / "ada"
    for text, words in (
        ("data = ", "not valid TOML"),
        ('dota = "x"', "did you mean 'data'?"),
        ('data = "nowhere"', "client.toml: data: no such folder"),
        ('data = "x"\n[limits]\nmax_rnk = 3', "did you mean 'max_rank'?"),
    ):
        (tmp_path / "client.toml").write_text(text)
        arguments = ("client", "up", "--bundle", home / "ada.toml", "--config", tmp_path / "client.toml")
        assert words in one_line(fedpeft(*arguments))
    (tmp_path / "edited.toml").write_text((home / "ada.toml").read_text().replace('name = "ada"', 'name = "bob"'))
    assert "do not edit bundles" in one_line(fedpeft("client", "up", "--bundle", tmp_path / "edited.toml"))


# Agents that cannot, may not, or mean harm ----------------------------------------------------------------------------


LOADING = threading.Lock()  # transformers cannot load two models in one process at the same time


class InThread:
    """An agent of this process: a real session with the daemon, whose answers the test decides."""

    def __init__(self, federation: Federation, name: str, home: Path, app: Callable[[Bundle, grpc.Channel], ClientApp]):
        enroll(federation.server_dir, [name], home / f"{name}.toml", 365, False, True)
        self.federation, self.bundle = federation, load_bundle(home / f"{name}.toml")
        self.channel, self.endpoint = open_channel(self.bundle)
        self.stop, self.online = threading.Event(), threading.Event()
        inner = app(self.bundle, self.channel)

        def one_at_a_time(message: Message, context: Context) -> Message:
            with LOADING:
                return inner(message, context)

        self.thread = threading.Thread(target=self._run, args=(one_at_a_time,), daemon=True)
        self.thread.start()
        assert self.online.wait(60)

    def _run(self, app: Any) -> None:
        def on_state(state: str) -> None:
            if state == "online":
                self.online.set()

        for _ in range(20):  # the daemon learns of a new enrolment within a second
            try:
                FleetSession(self.channel, self.bundle, self.endpoint).run(app, self.stop, on_state)
            except FedPeftError:
                time.sleep(0.5)
            if self.online.is_set() or self.stop.is_set():
                return

    def close(self) -> None:
        revoke(self.federation.server_dir, self.bundle.name)
        self.stop.set()
        self.thread.join(30)
        self.channel.close()


@pytest.fixture
def in_thread(federation: Federation, tmp_path: Path) -> Iterator[Callable[..., InThread]]:
    agents: list[InThread] = []

    def make(name: str, app: Callable[[Bundle, grpc.Channel], ClientApp]) -> InThread:
        agents.append(InThread(federation, name, tmp_path, app))
        return agents[-1]

    yield make
    for agent in agents:
        agent.close()
    if agents:  # until the daemon has taken note, a new job would still count on them
        time.sleep(2.5)


def test_an_agent_with_another_base_or_outside_its_owners_limits_says_so_and_the_round_goes_on(
    federation, in_thread, data, expected, tmp_path
):
    # The same model with one number changed, where client.toml says that the job's base lies.
    other = load_base("builtin:tiny-code-lm", "causal-lm")
    next(other.model.parameters()).data.view(-1)[0] += 1e-3
    other.model.save_pretrained(tmp_path / "base")
    other.tokenizer.save_pretrained(tmp_path / "base")

    def agent(name: str, **config: Any) -> None:
        settings = ClientConfig(data=str(data / "ada"), device="cpu", state=tmp_path / f"state-{name}", **config)
        in_thread(name, lambda bundle, channel: Agent(bundle, settings, channel).app())

    agent("changed-base", base_models={"builtin:tiny-code-lm": str(tmp_path / "base")})
    agent("other-jobs", limits=Limits(allowed_jobs=["trial-*"]))
    agent("other-bases", limits=Limits(allowed_bases=["org/*"]))
    agent("small-ranks", limits=Limits(max_rank=4))
    agent("no-rounds", limits=Limits(max_rounds_per_day=0))

    run = federation.submit(JOB, *SMALL, "clients.min_to_commit=2")
    finishes(federation, run, expected)
    said = {e["client"]: (e["kind"], e["text"]) for e in federation.events(run) if e["round"] == 1 and e["client"]}
    kind, text = said["changed-base"]
    assert kind == "client-failed"
    assert "model.base: the base model here has fingerprint" in text
    assert "the server's has" in text
    assert "install the same model files" in text
    for name, reason in {
        "other-jobs": "job 'quickstart' is not among this client's allowed_jobs",
        "other-bases": "base model 'builtin:tiny-code-lm' is not among this client's allowed_bases",
        "small-ranks": "rank 8 is above this client's max_rank 4",
        "no-rounds": "this client has trained its max_rounds_per_day 0 today",
    }.items():
        declined = [e["text"] for e in federation.events(run) if e["kind"] == "client-declined" and e["client"] == name]
        assert f"{name} declined: {reason}" in declined
    assert all(reason in ok("watch", run, "--bundle", federation.operator) for reason in ("max_rank 4", "fingerprint"))

    # Where the job needs everybody, the run fails and says who did not deliver, and why; the queue goes on.
    run = federation.submit(JOB, *SMALL)
    status = federation.wait_until_ended(run)
    assert status["state"] == "failed"
    assert "round 1 has 2 of the 7 deltas it needs" in status["error"]
    assert "small-ranks declined: rank 8 is above" in status["error"]
    assert "changed-base failed: model.base" in status["error"]
    watched = fedpeft("watch", run, "--bundle", federation.operator)
    assert watched.returncode == 1
    assert "Traceback" not in watched.stderr


class Mallory:
    """An enrolled client that answers a round with everything but an honest delta.

    It makes the delta that an honest agent would send and spoils it in one way after the other, so each refusal is
    about that one thing.
    """

    def __init__(self, bundle: Bundle, channel: grpc.Channel, data: Path, home: Path):
        self.bundle, self.exchange, self.data, self.home = bundle, ExchangeClient(channel), data, home
        self.told: dict[str, str] = {}
        self.failure: BaseException | None = None

    def app(self) -> ClientApp:
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            try:
                self.attack(pb.RoundTask.FromString(bytes(message.content["fedpeft"]["task"])))
            except BaseException as error:  # shown by the test
                self.failure = error
            return Message(RecordDict({"fedpeft": ConfigRecord({"task": b"\xff not a reply"})}), reply_to=message)

        @app.evaluate()
        def evaluate(message: Message, context: Context) -> Message:
            task = pb.RoundTask.FromString(bytes(message.content["fedpeft"]["task"]))
            scores = {"loss": float("nan")} if task.round else {}
            reply = pb.RoundReply(
                status=pb.RoundReply.EVALUATED, evaluations=[pb.Evaluation(split="heldout", metrics=scores)]
            )
            record = ConfigRecord({"task": reply.SerializeToString()})
            return Message(RecordDict({"fedpeft": record}), reply_to=message)

        return app

    def attack(self, task: pb.RoundTask) -> None:
        job = parse_job(task.job_toml)
        participant = Participant(job)
        state = PackedFile(self.exchange.download(task.start_state, task.run_id, self.home / "state")).state()
        honest = participant.train(
            self.bundle.name,
            participant.encode(load_client_data(str(self.data), job.data.task).train),
            state,
            run_id=task.run_id,
            round_number=task.round,
            start_digest=task.start_state,
        )
        (self.home / "delta").write_bytes(honest.payload)
        packed = PackedFile(self.home / "delta")
        tensors, manifest = packed.state(), packed.manifest
        first, last = min(tensors), max(tensors)

        def changed(name: str, value: float) -> dict[str, torch.Tensor]:
            spoilt = tensors[name].clone()
            spoilt.view(-1)[-1] = value
            return {**tensors, name: spoilt}

        def send(what: str, payload: bytes, **header: Any) -> None:
            header = {"run_id": task.run_id, "round": task.round, "digest": content_address(payload), **header}
            try:
                receipt = self.exchange.upload(payload, **header)
                self.told[what] = "accepted" if receipt.accepted else receipt.code
                assert receipt.accepted or receipt.reason
            except FedPeftError as error:
                self.told[what] = f"{type(error).__name__}: {error}"

        without = {name: tensor for name, tensor in tensors.items() if name != first}
        send("truncated", honest.payload[:-64])
        send("truncated in its header", honest.payload[:40])
        send("one byte too many", honest.payload + b"\0")
        send("NaN", pack(changed(first, float("nan")), manifest))
        send("infinity", pack(changed(last, float("-inf")), manifest))
        send("beyond the bound", pack(changed(first, 65.0), manifest))
        send("wrong shape", pack({**tensors, first: tensors[first].T.contiguous()}, manifest))
        send("extra tensor", pack({**tensors, "zz.extra": torch.zeros(2)}, manifest))
        send("missing tensor", pack(without, manifest))
        send("pickle", pickle.dumps({name: t.tolist() for name, t in tensors.items()}))
        torch.save(tensors, self.home / "delta.safetensors")
        send("torch.save under the name .safetensors", (self.home / "delta.safetensors").read_bytes())
        send("no manifest", pack(tensors, manifest).replace(b"fedpeft.manifest", b"fedpeft.manifesT"))
        send("other number format", pack(tensors, replace(manifest, codec="bf16")))
        send("other base", pack(tensors, replace(manifest, base_fingerprint="0" * 64)))
        send("other client's name", pack(tensors, replace(manifest, client="ada")))
        send("other starting state", pack(tensors, replace(manifest, start_state="0" * 64)))
        send("other round inside", pack(tensors, replace(manifest, round=task.round + 1)))
        send("huge weight", pack(tensors, replace(manifest, weight=2**40)))
        send("negative weight", pack(tensors, replace(manifest, weight=-5)))
        send(
            "figures that are not numbers", pack(tensors, replace(manifest, metrics={"train_loss_mean": float("nan")}))
        )
        send("too large", bytes(40 << 20))
        send("later round", honest.payload, round=task.round + 1)
        send("other run", honest.payload, run_id="no-such-run")
        send("a global state", honest.payload, kind="state")
        send("other bytes than announced", honest.payload, digest=content_address(b"other"))
        try:
            self.exchange.download(honest.digest, task.run_id, self.home / "stolen")
            self.told["somebody's delta"] = "accepted"
        except FedPeftError as error:
            self.told["somebody's delta"] = f"{type(error).__name__}: {error}"


REFUSED = {
    "truncated": "format",
    "truncated in its header": "format",
    "one byte too many": "format",
    "NaN": "not-finite",
    "infinity": "not-finite",
    "beyond the bound": "out-of-bounds",
    "wrong shape": "shape",
    "extra tensor": "extra-tensor",
    "missing tensor": "missing-tensor",
    "pickle": "format",
    "torch.save under the name .safetensors": "format",
    "no manifest": "manifest",
    "other number format": "codec",
    "other base": "fingerprint",
    "other client's name": "client",
    "other starting state": "start-state",
    "other round inside": "round",
    "huge weight": "weight",
    "negative weight": "weight",
    "figures that are not numbers": "metrics",
    "too large": "size",
    "later round": "late",
    "other run": "late",
    "a global state": "kind",
}


def test_every_kind_of_bad_payload_is_refused_with_its_code_and_the_round_goes_on(
    federation, in_thread, data, expected, tmp_path
):
    seen: list[Mallory] = []

    def mallory(bundle: Bundle, channel: grpc.Channel) -> ClientApp:
        seen.append(Mallory(bundle, channel, data / "ada", tmp_path))
        return seen[0].app()

    in_thread("mallory", mallory)
    run = federation.submit(JOB, *SMALL, "clients.min_to_commit=2")
    status = finishes(federation, run, expected)
    if seen[0].failure is not None:
        raise seen[0].failure
    told = dict(seen[0].told)
    assert "hash to" in told.pop("other bytes than announced")
    assert told.pop("somebody's delta").startswith("FedPeftError: download: PERMISSION_DENIED")
    assert told == REFUSED

    # The operator sees each of them: in the status, and in the log that watch shows.
    entry = next(c for c in status["clients"] if c["name"] == "mallory")
    assert (entry["delivered"], entry["bytes_up"]) == (0, 0)
    about_the_round = [code for code in REFUSED.values() if code not in ("late", "kind")]
    assert entry["refused"] == len(about_the_round)
    assert entry["last_refusal"]["code"] == "size"
    watched = [json.loads(line) for line in ok("watch", run, "--bundle", federation.operator, "--json").splitlines()]
    texts = [e["text"] for e in watched if e["kind"] == "delta-refused" and e["client"] == "mallory"]
    assert [text.split("(")[1].split(")")[0] for text in texts] == about_the_round
    assert any("pickle or zip file" in text for text in texts)
    # Replies that cannot be read, and scores that are no numbers, are mallory's failure and not the run's.
    assert any(e["kind"] == "client-failed" and e["client"] == "mallory" and e["round"] == 1 for e in watched)
    assert {row["client"] for row in status["summary"]["clients"]} == set(HONEST)
    # What was refused does not stay on the server's disk.
    kept = {p.name for p in (federation.server_dir / "blobs").rglob("*") if p.is_file()}
    deltas = {r["digest"][2:] for r in _deltas(federation, run)}
    states = {s[2:] for r in status["rounds"] for s in (r["start_state"], r["end_state"])}
    assert deltas | states <= kept
    assert not list((federation.server_dir / "blobs" / "partial").iterdir())


def _deltas(federation: Federation, run: str) -> list[dict[str, Any]]:
    with load_config(federation.server_dir).open_store() as store:
        return [{"client": d.client, "digest": d.digest} for d in store.deltas(run, 1)]


def test_two_agents_cannot_share_a_bundle(second_agent):
    line = dies_with_one_line(second_agent)
    assert "another agent is running with the bundle of ada" in line
    assert "a bundle of its own" in line


def test_a_good_job_still_runs_at_the_end(federation, expected):
    finishes(federation, federation.submit(JOB, *SMALL), expected)


# A full disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 48 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48m", "fedpeft-test", str(folder)], capture_output=True
    ).returncode == 0  # fmt: skip
    if not mounted:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Take every free byte of ``disk`` with one file."""
    filler = disk / "filler"
    with open(filler, "ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                pass
    return filler


def test_a_run_waits_while_the_disk_is_full_and_ends_with_the_right_adapter(small_disk, data, tmp_path):
    rounds = "aggregation.rounds=3"
    right = simulated(data, tmp_path / "simulated", rounds)
    (tmp_path / "fed").mkdir()
    (tmp_path / "fed" / "server").symlink_to(small_disk, target_is_directory=True)
    federation = Federation(tmp_path / "fed")
    for name in HONEST:
        federation.enroll(name, data / name)
    try:
        federation.start_server()
        federation.start_agents()
        # Full before the job comes: the operator is told, and nothing of the job is left.
        filler = fill(small_disk)
        line = one_line(fedpeft("submit", JOB, "--bundle", federation.operator, *sets(*SMALL, rounds)))
        assert "full" in line
        assert "free space" in line
        filler.unlink()
        assert json.loads(ok("status", "--bundle", federation.operator, "--json")) == []

        # Full in the middle of a round.
        run = federation.submit(JOB, *SMALL, rounds)
        wait_for("round 1", lambda: federation.happened(run, "round-started", round=1), 120)
        filler = fill(small_disk)
        watcher = subprocess.Popen(
            [*FEDPEFT, "watch", run, "--bundle", str(federation.operator), "--json"],
            stdout=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip
        assert watcher.stdout is not None
        seen = []
        for text in watcher.stdout:
            seen.append(json.loads(text))
            if seen[-1]["kind"] in ("storage", "run-finished", "run-failed"):
                break
        assert seen[-1]["kind"] == "storage", seen
        assert "full" in seen[-1]["text"]
        time.sleep(8)  # longer than the daemon's pause between attempts
        assert federation.status(run)["state"] == "running"

        # Space again: the run goes on by itself.
        filler.unlink()
        finishes(federation, run, right)
        rest = [json.loads(text) for text in watcher.communicate(timeout=60)[0].splitlines()]
        assert rest[-1]["kind"] == "run-finished"
        assert sum(e["kind"] == "storage" for e in federation.events(run)) < 10  # said, not repeated without end
        accepted = [(e["round"], e["client"]) for e in federation.events(run) if e["kind"] == "delta-accepted"]
        assert sorted(accepted) == [(r, c) for r in (1, 2, 3) for c in HONEST]
    finally:
        federation.close()
