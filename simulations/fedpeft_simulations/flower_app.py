"""A fedpeft job on Flower's own engines: ``flower-superlink`` with ``flower-supernode``, or Flower's Ray simulation.

fedpeft embeds Flower and does not use its processes (``docs/flower.md`` says why). Who runs them already can run a job
there all the same: this module is a Flower app, made of Flower's public API alone. The server app drives the state
machine of every other way to run a job, :class:`~fedpeft.federation.run.FederatedRun`; the client app is one
:class:`~fedpeft.federation.participant.Participant`. So the adapter is the one that ``fedpeft simulate`` makes of the
same job, byte for byte, and a run that died continues when it is started again on the same folder.

What travels is as few objects as Flower allows, because its cost is per object: a serialised ``RoundTask`` or
``RoundReply`` in a ConfigRecord, and the global state or the delta as *one* packed array of bytes.

Run config (``flwr run --run-config``), see ``simulations/flower-app/README.md``:

====================  =====================================================================================
``fedpeft-job``       absolute path of the job file, or its TOML text
``fedpeft-set``       overrides of the job, separated by spaces: ``train.local_steps=1 aggregation.rounds=2``
``fedpeft-out``       absolute path of the run folder, on the machine of the server app
``fedpeft-nodes``     how many nodes to wait for; 0: the job's ``clients.count``
====================  =====================================================================================

Node config: ``partition-id`` and ``num-partitions``, Flower's convention, make the node the simulated client of that
index; ``fedpeft-client`` and ``fedpeft-data`` make it a data owner with a name and a folder (or
``builtin:SOURCE/CLIENT``).

A node says which client it is in its first reply, an evaluation, and that reply also gives the figures of the base
model. There is no policy of the data owner here, and no proof of who a node is beyond Flower's.
"""

from __future__ import annotations

import shlex
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from google.protobuf.message import DecodeError

from fedpeft.adapters.delta import PackedFile, content_address
from fedpeft.data.sources import load_client_data
from fedpeft.errors import DeltaRefused, FedPeftError, RunFailed
from fedpeft.federation.folder import RunFolder
from fedpeft.federation.participant import Participant
from fedpeft.federation.run import FederatedRun, Round
from fedpeft.federation.status import LEDGER
from fedpeft.federation.summary import are_scores, summarise
from fedpeft.job.loading import dump_job, job_digest, load_job, parse_job
from fedpeft.job.schema import Job
from fedpeft.store.store import RunStore
from fedpeft_proto.v1 import round_pb2 as pb
from fedpeft_simulations.engine import open_run
from fedpeft_simulations.hosts import ClientHost, simulated_clients

STYPE = "fedpeft.safetensors.v1"
RECORD, KEY = "fedpeft", "task"
ARRAYS, PAYLOAD = "arrays", "packed"
POLL_S = 0.2
LIVENESS_S = 2.0
OFFLINE_GRACE_S = 60.0
RETRY_S = 1.0
MAX_CRASHES = 3
MAX_NAME, MAX_REASON = 64, 500  # characters of a node's own words that are taken
SPLIT = "heldout"
_NODE_GONE = {3, 4, 5}  # Flower's codes for a message or a node that is not available: ask again

server_app = ServerApp()
client_app = ClientApp()


# --- the server app --------------------------------------------------------------------------------------------------


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Flower's entry point on the server's side."""
    config = context.run_config
    job = _configured_job(config)
    nodes = config.get("fedpeft-nodes", 0) or job.clients.count
    if not isinstance(nodes, int) or nodes < 1:
        raise FedPeftError(
            "must be a whole number from 1 when the job has no clients.count",
            field="fedpeft-nodes",
            value=nodes,
            hint="say how many nodes take part, e.g. --run-config 'fedpeft-nodes=2 ...'",
        )
    federate(grid, job, _absolute(config, "fedpeft-out"), nodes)


def federate(grid: Grid, job: Job, out: Path, nodes: int) -> dict[str, Any]:
    """Run ``job`` over a grid; continue it if ``out`` holds the same job unfinished.

    Args:
        grid: Flower's link to the nodes.
        job: the job.
        out: run folder, made if missing.
        nodes: how many nodes to wait for before the first round.

    Returns:
        The summary, as written to ``summary.json``.

    Raises:
        FedPeftError: the job cannot be run here, a node cannot take part in it, or ``out`` holds another run.
        RunFailed: too few nodes, or a round ended with too few deltas.
    """
    began = time.monotonic()
    if job.clients.per_round is not None and job.clients.per_round > nodes:
        raise FedPeftError(
            f"is more than the {nodes} nodes", field="clients.per_round", value=job.clients.per_round, hint="lower it"
        )
    participant = Participant(job)
    folder = RunFolder(out)
    with RunStore.open(f"sqlite:///{out / LEDGER}", out / "blobs") as store:
        try:
            run = open_run(store, job, participant, out)
        except FedPeftError as error:
            error.field = "fedpeft-out" if error.field == "--out" else error.field
            raise
        folder.write_job(job)
        if run.committed_rounds:  # it may have died between a commit and its publication
            folder.write_state(run, run.committed_rounds)
        try:
            loop = _RoundLoop(grid, run, folder)
            loop.evaluate(nodes)
            while not run.done:
                loop.one_round()
                every = job.evaluation.every
                if run.done or (every and run.committed_rounds % every == 0):
                    loop.evaluate(nodes)
            summary = loop.summary()
            summary["seconds"] = round(time.monotonic() - began, 1)
            folder.write_summary(summary)
            run.finish(summary)
        except FedPeftError as error:
            run.fail(str(error))
            raise
    _say(f"finished: {out}")
    return summary


@dataclass
class _Phase:
    """One question to several nodes: train in a round, or evaluate a state.

    Attributes:
        number: the round, or that of the state to evaluate.
        round: the open round; ``None`` in an evaluation.
        answered: clients that have been evaluated.
        failed: node -> why it will not answer.
    """

    number: int
    start_state: str
    round: Round | None = None
    answered: set[str] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)


class _RoundLoop:
    """Asks nodes and takes what they send.

    ``send_and_receive`` of Flower polls every 3 s and waits for nodes that are gone, so messages are pushed and pulled
    one by one. Flower delivers at most once and says nothing of a message lost while its node was away: a node that was
    away is asked again, which gives the same delta, since training is a function of job, client and round.
    """

    def __init__(self, grid: Grid, run: FederatedRun, folder: RunFolder):
        self.grid, self.run, self.folder = grid, run, folder
        self.clients: dict[int, str] = {}  # node id -> client
        self.sizes: dict[str, int] = {}  # client -> training examples
        self._online: set[int] = set()
        for number in range(1, run.committed_rounds + 1):
            self._note_sizes(number)

    def evaluate(self, nodes: int) -> None:
        """Held-out figures of the newest state from everybody, and from new nodes their names.

        Raises:
            RunFailed: fewer than ``nodes`` nodes have said who they are.
        """
        number = self.run.committed_rounds
        known = {row.client for row in self.run.store.evaluations(self.run.run_id) if row.round == number}
        phase = _Phase(number, self.run.state_digest, answered=known & set(self.clients.values()))
        self._converse(phase, nodes)
        if len(self.clients) < nodes:
            reasons = "; ".join(f"node {node}: {reason}" for node, reason in phase.failed.items())
            raise RunFailed(
                f"{len(self.clients)} of {nodes} nodes take part" + (f" ({reasons})" if reasons else ""),
                field="fedpeft-nodes",
                value=nodes,
                hint="start the missing nodes, correct their --node-config, or wait for fewer",
            )

    def one_round(self) -> None:
        """Open the next round, collect its deltas until the deadline, commit."""
        round_ = self.run.open_round(sorted(self.clients.values()))
        phase = _Phase(round_.number, round_.start_digest, round_)
        _say(
            f"round {round_.number}/{self.run.job.aggregation.rounds}: asking {', '.join(round_.missing()) or 'nobody'}"
        )
        self._converse(phase)
        self._note_sizes(round_.number)
        try:
            report = round_.commit()
        except RunFailed as error:
            reasons = "; ".join(f"{self.clients.get(n, n)}: {reason}" for n, reason in phase.failed.items())
            message = error.message + (f" ({reasons})" if reasons else "")
            raise RunFailed(message, field=error.field, value=error.value, hint=error.hint) from None
        self.folder.log("round", **report)
        self.folder.write_state(self.run, round_.number)
        _say(f"round {round_.number} committed: {report['accepted']} of {report['selected']} deltas")

    def summary(self) -> dict[str, Any]:
        """The final table: base and federated; nobody may pool data here."""
        scores: dict[str, dict[str, Mapping[str, float]]] = {"base": {}, "federated": {}}
        for row in self.run.store.evaluations(self.run.run_id):
            if row.round == 0:
                scores["base"][row.client] = row.metrics
            if row.round == self.run.committed_rounds:
                scores["federated"][row.client] = row.metrics
        return summarise(self.run, scores, self.sizes)

    # -- asking and listening ------------------------------------------------------------------------------------------

    def _converse(self, phase: _Phase, nodes: int = 0) -> None:
        """Ask until nobody who could still answer is missing, or the deadline has passed."""
        deadline = time.monotonic() + self.run.job.clients.deadline_s
        asked: dict[str, int] = {}  # message id -> node
        attempts: Counter[int] = Counter()
        crashes: Counter[int] = Counter()
        not_before: dict[int, float] = {}
        look_at, alone_since = 0.0, None
        while (now := time.monotonic()) < deadline and not self._complete(phase, nodes):
            if now >= look_at:
                self._online, look_at = set(self.grid.get_node_ids()), now + LIVENESS_S
                asked = {message: node for message, node in asked.items() if node in self._online}
            due = [node for node in sorted(self._online) if self._wants(phase, node)]
            if due or not self._enough(phase, nodes):
                alone_since = None
            else:  # all who are missing are offline, and it can be done without them
                alone_since = alone_since or now
                if now - alone_since >= OFFLINE_GRACE_S:
                    return
            for node in set(due) - set(asked.values()):
                if now >= not_before.get(node, 0.0):
                    attempts[node] += 1
                    not_before[node] = now + RETRY_S
                    asked |= dict.fromkeys(self._push(phase, node, attempts[node], deadline - now), node)
            for reply in self.grid.pull_messages(list(asked)) if asked else ():
                if reply.metadata.reply_to_message_id not in asked:
                    continue
                node = asked.pop(reply.metadata.reply_to_message_id)
                if not reply.has_error():
                    self._take(phase, node, reply)
                elif reply.error.code not in _NODE_GONE:
                    crashes[node] += 1
                    if crashes[node] >= MAX_CRASHES:
                        self._give_up(phase, node, reply.error.reason or f"Flower's error {reply.error.code}")
            time.sleep(POLL_S)

    def _complete(self, phase: _Phase, nodes: int) -> bool:
        failed = {self.clients[node] for node in phase.failed if node in self.clients}
        if phase.round is not None:
            return not set(phase.round.missing()) - failed
        if any(node not in self.clients for node in phase.failed) and len(self.clients) < nodes:
            return True  # a node that was waited for cannot take part
        return len(self.clients) >= nodes and not set(self.clients.values()) - phase.answered - failed

    def _enough(self, phase: _Phase, nodes: int) -> bool:
        if phase.round is not None:
            return len(phase.round.accepted()) >= phase.round.needed
        return len(self.clients) >= nodes

    def _wants(self, phase: _Phase, node: int) -> bool:
        """Whether ``node`` has something to answer: a new one always has, namely who it is."""
        if node in phase.failed:
            return False
        client = self.clients.get(node)
        if client is None:
            return True
        return client in phase.round.missing() if phase.round is not None else client not in phase.answered

    def _push(self, phase: _Phase, node: int, attempt: int, ttl_s: float) -> list[str]:
        train = phase.round is not None and node in self.clients
        job, blobs = self.run.job, self.run.store.blobs
        task = pb.RoundTask(
            run_id=self.run.run_id,
            round=phase.number,
            rounds_total=job.aggregation.rounds,
            attempt=attempt,
            job_toml=dump_job(job),
            start_state=phase.start_state,
            start_state_bytes=blobs.size(phase.start_state),
            base_fingerprint=self.run.spec.base_fingerprint,
            deadline_s=job.clients.deadline_s,
            train=train,
            evaluate=not train,
        )
        content = _content(task, blobs.path(phase.start_state).read_bytes())
        message = Message(
            content, node, "train" if train else "evaluate", ttl=max(ttl_s, 1.0), group_id=str(phase.number)
        )
        return [message_id for message_id in self.grid.push_messages([message]) if message_id]

    def _take(self, phase: _Phase, node: int, message: Message) -> None:
        try:
            reply = pb.RoundReply.FromString(_bytes_of(message.content))
        except (DecodeError, KeyError, TypeError):
            self._give_up(phase, node, "sent a reply that cannot be read")
            return
        if reply.status == pb.RoundReply.EVALUATED:
            self._take_evaluation(phase, node, reply)
        elif reply.status == pb.RoundReply.DELIVERED and phase.round is not None and node in self.clients:
            try:
                self._accept(phase.round, self.clients[node], message.content)
            except DeltaRefused as refusal:
                self._give_up(phase, node, str(refusal))
        else:
            self._give_up(phase, node, reply.reason or "did not do what it was asked")

    def _take_evaluation(self, phase: _Phase, node: int, reply: pb.RoundReply) -> None:
        name = reply.client
        others = {client: other for other, client in self.clients.items() if other != node}
        fit = 0 < len(name) <= MAX_NAME and name.isprintable()
        if not fit or self.clients.get(node, name) != name:
            self._give_up(phase, node, "does not say which client it is")
            return
        if name in others:
            if others[name] in self._online:
                self._give_up(phase, node, f"another node is client {name} already")
                return
            del self.clients[others[name]]  # the same client, restarted: Flower gave it a new node id
        metrics = dict(reply.evaluations[0].metrics) if len(reply.evaluations) == 1 else {}
        if not are_scores(metrics) or reply.evaluations[0].split != SPLIT:
            self._give_up(phase, node, "sent scores that are not what was asked for")
            return
        self.clients[node] = name
        if phase.round is not None:
            return  # a node that came late has said who it is, and is asked to train next
        phase.answered.add(name)
        self.run.store.record_evaluation(self.run.run_id, phase.number, name, SPLIT, metrics)
        self.folder.log("evaluation", round=phase.number, client=name, metrics=metrics)
        _say(f"{name}: held-out loss {metrics['loss']:.4f} after round {phase.number}")

    def _accept(self, round_: Round, client: str, content: RecordDict) -> None:
        """Store one delta and hand it to the round. Raises :class:`DeltaRefused`, recorded."""
        try:
            payload = _payload_of(content)
        except DeltaRefused as refusal:
            round_.refuse(client, refusal)
            raise
        blobs = self.run.store.blobs
        was_here = blobs.exists(content_address(payload))
        digest = blobs.put_bytes(payload)
        try:
            round_.accept(client, digest)
        except DeltaRefused:
            if not was_here:
                blobs.delete(digest)
            raise

    def _note_sizes(self, number: int) -> None:
        """Training examples of the clients of a round, as long as its deltas are kept."""
        blobs = self.run.store.blobs
        for row in self.run.store.deltas(self.run.run_id, number):
            if blobs.exists(row.digest):
                self.sizes[row.client] = PackedFile(blobs.path(row.digest)).manifest.example_count

    def _give_up(self, phase: _Phase, node: int, reason: str) -> None:
        reason = "".join(c if c.isprintable() else " " for c in reason[:MAX_REASON])
        phase.failed[node] = reason
        _say(f"{self.clients.get(node) or f'node {node}'}: {reason}")


def _configured_job(config: Mapping[str, Any]) -> Job:
    """The job of a run config: a path or TOML text, with overrides."""
    given = str(config.get("fedpeft-job", ""))
    try:
        overrides = shlex.split(str(config.get("fedpeft-set", "")))
    except ValueError as error:
        raise FedPeftError(f"cannot be split: {error}", field="fedpeft-set", value=config["fedpeft-set"]) from None
    if "=" in given and not given.lstrip().startswith(("/", "~")):
        return parse_job(given, overrides, name="fedpeft-job")
    return load_job(_absolute(config, "fedpeft-job"), overrides)


def _absolute(config: Mapping[str, Any], key: str) -> Path:
    """A path of the run config. It must be absolute: an app's working folder is wherever Flower's process was begun."""
    path = Path(str(config.get(key, ""))).expanduser()
    if not path.is_absolute():
        raise FedPeftError(
            "must be an absolute path on the machine of the server app",
            field=key,
            value=str(config.get(key, "")),
            hint=f"--run-config '{key}=\"/absolute/path\" ...'",
        )
    return path


def _say(text: str) -> None:
    """One line for ``flwr log``, which shows what an app prints."""
    print(f"fedpeft: {text}", flush=True)


# --- the client app --------------------------------------------------------------------------------------------------

# One job stays loaded for the life of the process. A stock node starts a process per message and gains nothing; Ray's
# actors, and an executor that stays, load the base model once.
_resident: tuple[tuple[str, str, str], ClientHost] | None = None
_lock = threading.Lock()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Flower's entry point for a round of training."""
    return _answer(message, context)


@client_app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Flower's entry point for an evaluation."""
    return _answer(message, context)


def _answer(message: Message, context: Context) -> Message:
    """Do the task in ``message``. What a user can mend becomes a reply with a reason."""
    task = pb.RoundTask.FromString(_bytes_of(message.content))
    reply = pb.RoundReply(run_id=task.run_id, round=task.round, attempt=task.attempt)
    payload: bytes | None = None
    began = time.monotonic()
    try:
        with _lock, tempfile.TemporaryDirectory(prefix="fedpeft-") as folder:
            job = parse_job(task.job_toml, name="the server's job")
            host, reply.client = _host(job, context.node_config, task.base_fingerprint)
            state = Path(folder) / "state.safetensors"
            state.write_bytes(_state_of(message.content, task.start_state))
            if task.train:
                update = host.train(reply.client, task.run_id, task.round, state, task.start_state)
                payload = update.payload
                reply.status, reply.digest, reply.payload_bytes = pb.RoundReply.DELIVERED, update.digest, len(payload)
            else:
                metrics = host.evaluate(reply.client, state)
                reply.status = pb.RoundReply.EVALUATED
                reply.evaluations.append(pb.Evaluation(split=SPLIT, metrics=metrics))
    except FedPeftError as error:
        reply.status, reply.reason = pb.RoundReply.FAILED, str(error)
    except OSError as error:  # without the path: it is nobody's business but the owner's
        reply.status = pb.RoundReply.FAILED
        reply.reason = f"the node's disk failed: {error.strerror or type(error).__name__}"
    reply.metrics["seconds"] = time.monotonic() - began
    return Message(_content(reply, payload), reply_to=message)


def _host(job: Job, node: Mapping[str, Any], base_fingerprint: str) -> tuple[ClientHost, str]:
    """The resident host of this job, and the client that this node is.

    Raises:
        FedPeftError: the node config names no client of this job, or its base model is another.
    """
    global _resident
    name, data = str(node.get("fedpeft-client", "")), str(node.get("fedpeft-data", ""))
    if bool(name) != bool(data):
        missing = "fedpeft-data" if name else "fedpeft-client"
        raise FedPeftError("is required beside the other", field=missing, hint="--node-config sets both")
    key = (job_digest(job), name, data)
    if _resident is None or _resident[0] != key:
        _resident = None  # the old one goes before the new one is loaded
        clients = (replace(load_client_data(data, job.data.task), name=name),) if name else simulated_clients(job)
        _resident = (key, ClientHost(job, clients))
    host = _resident[1]
    if host.participant.fingerprint != base_fingerprint:
        raise FedPeftError(
            f"the base model here has fingerprint {host.participant.fingerprint[:16]}..., the server's has "
            f"{base_fingerprint[:16]}...",
            field="model.base",
            value=job.model.base,
            hint="install the same model files at server and node",
        )
    return host, name or _partition(node, list(host.clients))


def _partition(node: Mapping[str, Any], names: list[str]) -> str:
    """The simulated client of a node under Flower's convention.

    >>> _partition({"partition-id": 1, "num-partitions": 2}, ["client-00", "client-01"])
    'client-01'
    """
    index, count = node.get("partition-id"), node.get("num-partitions")
    if not isinstance(index, int) or not isinstance(count, int):
        raise FedPeftError(
            "the node config names no client",
            hint="start the node with --node-config 'partition-id=0 num-partitions=2', or "
            '\'fedpeft-client="NAME" fedpeft-data="FOLDER"\'',
        )
    if count != len(names):
        raise FedPeftError(
            f"the job has {len(names)} clients", field="num-partitions", value=count, hint="one node per client"
        )
    if not 0 <= index < count:
        raise FedPeftError(f"must be from 0 to {count - 1}", field="partition-id", value=index)
    return names[index]


# --- what both sides put into messages -------------------------------------------------------------------------------


def _content(body: pb.RoundTask | pb.RoundReply, payload: bytes | None) -> RecordDict:
    """A message: one small record, and at most one array."""
    content = RecordDict({RECORD: ConfigRecord({KEY: body.SerializeToString()})})
    if payload is not None:
        content[ARRAYS] = ArrayRecord({PAYLOAD: Array("uint8", (len(payload),), STYPE, payload)})
    return content


def _bytes_of(content: RecordDict) -> bytes:
    """The serialised task or reply. Raises :class:`KeyError` or :class:`TypeError` if there is none."""
    return bytes(content[RECORD][KEY])


def _payload_of(content: RecordDict) -> bytes:
    """The packed object in a message. Raises :class:`DeltaRefused` if there is not exactly one of our kind."""
    record = content.array_records.get(ARRAYS)
    if record is None or list(record) != [PAYLOAD]:
        raise DeltaRefused("format", "there is no packed array in the message")
    array = record[PAYLOAD]
    if (array.dtype, tuple(array.shape), array.stype) != ("uint8", (len(array.data),), STYPE):
        raise DeltaRefused("format", f"the array is not {STYPE}", field="stype", value=array.stype)
    return array.data


def _state_of(content: RecordDict, digest: str) -> bytes:
    """The global state in a message, as its digest says."""
    state = _payload_of(content)
    if content_address(state) != digest:
        raise FedPeftError("the state in the message is not the one that it names", field="start_state", value=digest)
    return state
