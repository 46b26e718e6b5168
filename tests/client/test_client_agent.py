"""What an agent says to a server that it does not trust with its data, and what its own restarts do not change.

Each agent here is a real one with the built-in model, called through its Flower app; where something is sent or
fetched, it is from a real AdapterExchange.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from flwr.app import ConfigRecord, Context, Metadata, RecordDict
from flwr.app.message import make_message

from fedpeft.adapters.attach import State
from fedpeft.adapters.delta import content_address
from fedpeft.federation.participant import Participant
from fedpeft.federation.run import pack_state
from fedpeft.job import parse_job
from fedpeft.job.loading import dump_job
from fedpeft.models import LoadedBase, load_base
from fedpeft.store.blobs import BlobStore
from fedpeft_client import agent as agent_module
from fedpeft_client.agent import BAD_DATA, BAD_JOB, BAD_TASK, DISK_FAILED, Agent
from fedpeft_client.config import ClientConfig, Limits
from fedpeft_proto.v1 import round_pb2 as pb
from fedpeft_server import exchange
from fedpeft_server.pki import init_authority

DECLINED, FAILED, DELIVERED = pb.RoundReply.DECLINED, pb.RoundReply.FAILED, pb.RoundReply.DELIVERED
SECRET = "HIV positive"
IS_A_PATH = "base model is a path; map it in [base_models]"

JOB = """
name = "ward-7"
[model]
base = "builtin:tiny-code-lm"
[data]
source = "/etc/passwd"
task = "causal-lm"
max_length = 16
[adapter]
kind = "ffa-lora"
rank = 2
[train]
local_steps = 1
batch_size = 2
optimizer = "sgd"
[aggregation]
rule = "ffa"
rounds = 3
"""


@dataclass(frozen=True)
class Peer:
    name: str


class Rules:
    """An authority that lets everybody do everything and remembers what came."""

    def __init__(self) -> None:
        self.accepted: list[tuple[str, int, str]] = []

    def may_upload(self, peer: Peer, header: exchange.UploadHeader) -> None: ...

    def may_download(self, peer: Peer, digest: str, run_id: str) -> None: ...

    def accept(self, peer: Peer, header: exchange.UploadHeader, path: Path) -> str:
        self.accepted.append((header.run_id, header.round, header.digest))
        return ""


class Server:
    """An exchange that has the starting state of :data:`JOB`, and whatever tasks a test thinks of."""

    def __init__(self, folder: Path, base: LoadedBase):
        participant = Participant(parse_job(JOB), base=base)
        state: State = participant.initial_state()
        self.fingerprint = participant.fingerprint
        self.rules, blobs = Rules(), BlobStore(folder / "blobs")
        self.start_state = blobs.put_bytes(pack_state(participant.spec, state))
        self.grpc = grpc.server(futures.ThreadPoolExecutor(4))
        service = exchange.AdapterExchangeService(
            blobs, self.rules, identify=lambda _: Peer("ada"), admit=lambda _: None
        )
        service.add_to(self.grpc)
        self.port = self.grpc.add_insecure_port("127.0.0.1:0")
        self.grpc.start()

    def task(self, job_toml: str = JOB, **fields: Any) -> pb.RoundTask:
        known = {"run_id": "r1", "round": 1, "attempt": 1, "job_toml": job_toml, "train": True}
        return pb.RoundTask(
            **{**known, "start_state": self.start_state, "base_fingerprint": self.fingerprint, **fields}
        )


@pytest.fixture(scope="module")
def base() -> LoadedBase:
    return load_base("builtin:tiny-code-lm", "causal-lm")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), load_base("builtin:tiny-code-lm", "causal-lm"))
    yield server
    server.grpc.stop(0)


class Client:
    """A data owner's machine; ``start`` begins an agent on what the last one left there."""

    def __init__(self, folder: Path, port: int):
        self.folder, self.port = folder, port
        self.data = folder / "patients"
        self.bundle = init_authority(folder / "ca").issue("ada", "client", endpoints=["localhost:1"])
        self.write({"text": "def f(x):\n    return x + 1\n"})

    def write(self, record: dict[str, Any]) -> None:
        self.data.mkdir(exist_ok=True)
        for part in ("train", "heldout"):
            (self.data / f"{part}.jsonl").write_text((json.dumps(record) + "\n") * 3)

    def start(self, **config: Any) -> Agent:
        settings = {"data": str(self.data), "device": "cpu", "state": self.folder / "state", **config}
        return Agent(self.bundle, ClientConfig(**settings), grpc.insecure_channel(f"127.0.0.1:{self.port}"))


@pytest.fixture
def client(tmp_path: Path, server: Server) -> Client:
    return Client(tmp_path, server.port)


def send(agent: Agent, content: RecordDict, kind: str = "train") -> pb.RoundReply:
    metadata = Metadata(
        run_id=1, message_id="m", src_node_id=1, dst_node_id=2, reply_to_message_id="", group_id="",
        created_at=time.time(), ttl=600.0, message_type=kind,
    )  # fmt: skip
    message = make_message(metadata, content)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    reply = agent.app()(message, context)
    return pb.RoundReply.FromString(bytes(reply.content["fedpeft"]["task"]))


def ask(agent: Agent, task: pb.RoundTask, kind: str = "train") -> pb.RoundReply:
    return send(agent, RecordDict({"fedpeft": ConfigRecord({"task": task.SerializeToString()})}), kind)


def said(reply: pb.RoundReply) -> tuple[int, str]:
    return reply.status, reply.reason


def with_base(name: str) -> str:
    return JOB.replace('"builtin:tiny-code-lm"', json.dumps(name))


# What leaves ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "in_the_log"),
    [
        ({"diagnosis": SECRET}, "diagnosis"),
        ({"text": 17, "diagnosis": SECRET}, "'text'"),
    ],
)
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_what_is_wrong_with_the_data_is_in_the_log_and_not_in_the_reply(
    client, server, caplog, record, in_the_log, kind
):
    client.write(record)
    assert said(ask(client.start(), server.task(), kind)) == (FAILED, BAD_DATA)
    assert in_the_log in caplog.text


def test_a_label_that_is_no_integer_does_not_leave(client, server, caplog, base, monkeypatch):
    # The same model with a head for classes; only the labels of the data are wrong.
    client.write({"text": "x = 1", "label": SECRET})
    folder = client.folder / "classifier"
    from transformers import AutoModelForSequenceClassification

    config = base.model.config.to_dict() | {"num_labels": 2}
    classifier = AutoModelForSequenceClassification.from_config(type(base.model.config)(**config))
    classifier.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    job = with_base("org/c").replace("causal-lm", "sequence-classification")
    agent = client.start(base_models={"org/c": str(folder)})
    reply = ask(agent, server.task(job))
    assert "fingerprint" in reply.reason  # as honest as it is with both fingerprints
    assert str(client.folder) not in reply.reason
    here = agent._participant[1].fingerprint
    assert here[:16] in reply.reason
    assert said(ask(agent, server.task(job, base_fingerprint=here))) == (FAILED, BAD_DATA)
    assert SECRET in caplog.text


def test_a_missing_data_folder_is_not_named(client, server, caplog):
    gone = client.folder / "gone"
    assert said(ask(client.start(data=str(gone)), server.task())) == (FAILED, BAD_DATA)
    assert str(gone) in caplog.text


def test_a_server_cannot_ask_which_paths_exist(client, server, monkeypatch):
    agent = client.start(base_models={"org/mapped": str(client.folder / "nowhere")})
    for path in ("/etc", "/nope", "~", "./x", "../x", "a/b/c", "..", ".", "\\x", "C:\\x", str(client.data)):
        assert said(ask(agent, server.task(with_base(path)))) == (DECLINED, IS_A_PATH), path
    # A relative name that looks like an id of the hub, with and without something of that name in the working folder.
    monkeypatch.chdir(client.folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("patients", "no-patients", "org/mapped"):
        reason = f"this client cannot load base model {name!r} (its own log says why)"
        assert said(ask(agent, server.task(with_base(name)))) == (FAILED, reason)


def test_a_path_that_the_owner_mapped_is_no_path(client, server):
    agent = client.start(base_models={"/models/a": str(client.folder / "nowhere")})
    reply = ask(agent, server.task(with_base("/models/a")))
    assert said(reply) == (FAILED, "this client cannot load base model '/models/a' (its own log says why)")


def test_an_adapter_that_does_not_fit_says_nothing_of_the_model_here(client, server):
    job = JOB.replace("rank = 2", 'rank = 2\ntarget_modules = ["q_prj"]')
    reply = ask(client.start(), server.task(job))
    assert said(reply) == (
        FAILED,
        "the job's adapter cannot be put on base model 'builtin:tiny-code-lm' here (its own log says why)",
    )


def test_a_loss_that_is_not_finite_is_said_with_the_way_out(client, server):
    job = JOB.replace("local_steps = 1", "local_steps = 4\nlearning_rate = 1e38\nmax_grad_norm = 1e30")
    reply = ask(client.start(), server.task(job))
    assert reply.status == FAILED
    assert reply.reason.startswith("train.learning_rate: the training loss became nan in round 1")


def test_of_an_unknown_exception_only_the_type_leaves(client, server, caplog, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"{SECRET} in {client.data}")

    monkeypatch.setattr(Participant, "train", fail)
    reply = ask(client.start(), server.task())
    assert said(reply) == (FAILED, "this client failed at training (RuntimeError); its own log says why")
    assert SECRET in caplog.text
    monkeypatch.setattr(agent_module, "round_key", fail)
    reply = ask(client.start(), server.task())
    assert said(reply) == (FAILED, "the agent failed (RuntimeError); its own log says why")


def test_a_disk_that_fails_is_said_without_the_path(client, server):
    agent = client.start()
    (client.folder / "state" / "states").write_text("a file where a folder should be")
    assert said(ask(agent, server.task())) == (FAILED, DISK_FAILED)
    (client.folder / "state" / "rounds.json").mkdir()
    assert said(ask(agent, server.task())) == (FAILED, DISK_FAILED)


def test_a_transfer_that_fails_leaves_the_status_only(client, server):
    reply = ask(client.start(), server.task(start_state="0" * 64))
    assert said(reply) == (FAILED, "this client could not fetch the starting state (NOT_FOUND); its own log says why")


# What comes in --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digest", ["", "../../../escaped", "/etc/passwd", "A" * 64, "0" * 63, "0" * 64 + "\n"])
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_starting_state_that_is_no_digest_is_refused_before_it_becomes_a_path(
    client, server, digest, kind, monkeypatch
):
    agent = client.start()
    agent._exchange.download = lambda *_: pytest.fail("asked for it")  # type: ignore[method-assign]
    reply = ask(agent, server.task(start_state=digest), kind)
    assert reply.status == FAILED
    assert reply.reason.startswith("the server's task names no starting state")
    assert not list(client.folder.rglob("*escaped*"))


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("name = ", "the server's job: is not valid TOML"),
        ("", "is required"),
        (JOB + "[modle]\nbase = 'x'", "did you mean 'model'?"),
        ("x = " + "9" * 5000, BAD_JOB),
        ("x = " + "[" * 100_000, BAD_JOB),
    ],
    ids=["not TOML", "empty", "unknown key", "a number too long", "too deep"],
)
def test_a_job_that_cannot_be_read_fails_with_one_line(client, server, toml, words):
    reply = ask(client.start(), server.task(toml))
    assert reply.status == FAILED
    assert words in reply.reason
    assert "\n" not in reply.reason
    assert (reply.run_id, reply.round, reply.client) == ("r1", 1, "ada")


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"fedpeft": ConfigRecord({})}),
        RecordDict({"fedpeft": ConfigRecord({"task": b"\xff\xff not a task"})}),
        RecordDict({"fedpeft": ConfigRecord({"task": 10**12})}),
        RecordDict({"fedpeft": ConfigRecord({"task": "text"})}),
    ],
    ids=["nothing", "no task", "garbage", "a number", "a text"],
)
def test_a_task_that_cannot_be_read_fails_with_one_line(client, content):
    assert said(send(client.start(), content)) == (FAILED, BAD_TASK)


# Restarts -------------------------------------------------------------------------------------------------------------


def test_a_killed_agent_may_do_its_own_round_again_and_no_other(client, server, monkeypatch):
    limits = Limits(max_rounds_per_day=1)

    def killed(*_: Any, **__: Any) -> None:
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(Participant, "train", killed)
        with pytest.raises(SystemExit):
            ask(client.start(limits=limits), server.task())
    reply = ask(client.start(limits=limits), server.task(attempt=2))
    assert reply.status == DELIVERED
    assert server.rules.accepted[-1] == ("r1", 1, reply.digest)
    assert said(ask(client.start(limits=limits), server.task(round=2))) == (
        DECLINED,
        "this client has trained its max_rounds_per_day 1 today",
    )
    # The reply was lost: the delta is there, and is sent without training.
    monkeypatch.setattr(Participant, "train", killed)
    again = ask(client.start(limits=limits), server.task(attempt=3))
    assert (again.status, again.digest) == (DELIVERED, reply.digest)
    # Even where nothing may be trained any more.
    again = ask(client.start(limits=Limits(max_rounds_per_day=0)), server.task(attempt=4))
    assert (again.status, again.digest) == (DELIVERED, reply.digest)


def test_the_same_round_with_another_job_is_other_work(client, server):
    agent = client.start(limits=Limits(max_rounds_per_day=1))
    assert ask(agent, server.task()).status == DELIVERED
    (client.folder / "state" / "delta.json").unlink()
    other = dump_job(parse_job(JOB, ["train.local_steps=2"]))
    assert ask(agent, server.task(other)).status == DECLINED
    assert ask(agent, server.task()).status == DELIVERED


@pytest.mark.parametrize("damage", ["cut", "gone", "note"])
def test_a_kept_delta_that_was_damaged_is_made_again(client, server, damage):
    first = ask(client.start(), server.task())
    state = client.folder / "state"
    if damage == "cut":
        (state / "delta.safetensors").write_bytes(b"")
    elif damage == "gone":
        (state / "delta.safetensors").unlink()
    else:
        (state / "delta.json").write_text("[" * 100_000)
    again = ask(client.start(), server.task())
    assert (again.status, again.digest) == (DELIVERED, first.digest)
    assert content_address((state / "delta.safetensors").read_bytes()) == first.digest


@pytest.mark.parametrize("content", ["[]", "garbage", '{"2026-01-01": 5}', "[" * 100_000, "\udcff"])
def test_a_spoilt_count_of_rounds_is_a_warning_and_no_failure(client, server, caplog, content):
    agent = client.start()
    (client.folder / "state" / "rounds.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with caplog.at_level(logging.WARNING):
        assert ask(agent, server.task()).status == DELIVERED
    assert "counting begins anew" in caplog.text
    assert agent.policy.rounds_today() == 1
