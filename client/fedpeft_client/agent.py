"""The agent: resident, answers tasks, keeps everything loaded.

A task arrives as a Flower message and is handled by a Flower ``ClientApp`` in this very process: base model, adapter
and encoded data stay where they are from round to round. The handler checks the owner's policy, fetches the global
state over the adapter exchange, trains, uploads the delta, and replies with a receipt. Everything that can go wrong
at a task becomes a reply with a reason; nothing of the data, no path and no traceback is in it.

A task may come twice (a message was lost, the daemon was restarted). The delta of the last round is kept on disk, so a
repeat is answered without training again, and it would be the same delta anyway.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import grpc
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedpeft import __version__
from fedpeft.adapters.delta import PackedFile
from fedpeft.data.encode import Encoded
from fedpeft.data.records import ClientData
from fedpeft.data.sources import load_source
from fedpeft.errors import FedPeftError
from fedpeft.federation.participant import Participant
from fedpeft.job.loading import job_digest, parse_job
from fedpeft.job.schema import Job
from fedpeft.models import load_base
from fedpeft_client.bundle import Bundle
from fedpeft_client.config import ClientConfig
from fedpeft_client.exchange import ExchangeClient, Receipt
from fedpeft_client.policy import Policy
from fedpeft_proto.v1 import coordinator_pb2 as control
from fedpeft_proto.v1 import coordinator_pb2_grpc as rpc
from fedpeft_proto.v1 import round_pb2 as pb

log = logging.getLogger(__name__)

RECORD, KEY = "fedpeft", "task"
_REPORT_EVERY_S = 1.0
_CALL_S = 10.0
_SPACE_RETRY_S = 2.0
NO_SPACE = "waiting for space at the server"  # the phase that is reported meanwhile


class Cancelled(Exception):
    """The server no longer needs this work."""


class Agent:
    """Everything an agent does between two messages.

    Args:
        bundle: identity.
        config: the owner's data and limits.
        channel: to the server; the caller closes it.
    """

    def __init__(self, bundle: Bundle, config: ClientConfig, channel: grpc.Channel):
        self.bundle, self.config = bundle, config
        self.policy = Policy(config.limits, config.state / "rounds.json")
        self._exchange = ExchangeClient(channel)
        self._link = rpc.AgentLinkStub(channel)
        self._session = uuid.uuid4().hex
        self._participant: tuple[str, Participant] | None = None
        self._encoded: dict[tuple[str, str], Encoded] = {}
        config.state.mkdir(parents=True, exist_ok=True)

    def app(self) -> ClientApp:
        """The Flower ``ClientApp``; its handlers run in this process."""
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            return self._handle(message, self._train)

        @app.evaluate()
        def evaluate(message: Message, context: Context) -> Message:
            return self._handle(message, self._evaluate)

        return app

    def announce(self) -> None:
        """Tell the server version and limits; called whenever the node has joined. A failure is not fatal."""
        import flwr

        try:
            self._link.Announce(
                control.AnnounceRequest(
                    session_id=self._session,
                    agent_version=__version__,
                    flwr_version=flwr.__version__,
                    limits=self.config.limits.words(),
                ),
                timeout=_CALL_S,
            )
        except grpc.RpcError as error:
            log.warning("announce: %s", error.details())

    # -- tasks ------------------------------------------------------------------------------------------------------

    def _handle(self, message: Message, work: Callable[[Job, pb.RoundTask], pb.RoundReply]) -> Message:
        task = pb.RoundTask.FromString(bytes(message.content[RECORD][KEY]))
        began = time.monotonic()
        try:
            job = parse_job(task.job_toml, name="the server's job")
            objection = self.policy.objection(job, trains=task.train)
            if objection is None:
                reply = work(job, task)
            else:
                log.info("declined round %d of %s: %s", task.round, task.run_id, objection)
                reply = pb.RoundReply(status=pb.RoundReply.DECLINED, reason=objection)
        except Cancelled:
            reply = pb.RoundReply(status=pb.RoundReply.FAILED, reason="cancelled by the server")
        except FedPeftError as error:
            log.warning("round %d of %s: %s", task.round, task.run_id, error)
            reply = pb.RoundReply(status=pb.RoundReply.FAILED, reason=str(error))
        except OSError as error:  # without the path: it is nobody's business but the owner's
            log.error("round %d of %s: %s", task.round, task.run_id, error)
            reason = f"the agent's disk failed: {error.strerror or type(error).__name__}"
            reply = pb.RoundReply(status=pb.RoundReply.FAILED, reason=reason)
        reply.run_id, reply.round, reply.client, reply.attempt = task.run_id, task.round, self.bundle.name, task.attempt
        reply.metrics["seconds"] = time.monotonic() - began
        return Message(RecordDict({RECORD: ConfigRecord({KEY: reply.SerializeToString()})}), reply_to=message)

    def _train(self, job: Job, task: pb.RoundTask) -> pb.RoundReply:
        payload = self._kept_delta(task)
        if payload is None:
            participant = self._ready(job, task)
            data = self._data(participant, job, "train")
            state = PackedFile(self._state(task)).state()
            self.policy.count_round()
            report = self._reporter(task, "training")
            update = participant.train(
                self.bundle.name,
                data,
                state,
                run_id=task.run_id,
                round_number=task.round,
                start_digest=task.start_state,
                progress=report,
            )
            payload = self._keep_delta(task, update.payload)
            log.info("round %d of %s: trained, loss %.4f", task.round, task.run_id, update.metrics["train_loss_mean"])
        digest = hashlib.sha256(payload.read_bytes()).hexdigest()
        receipt = self._deliver(payload, task, digest)
        if not receipt.accepted:
            raise FedPeftError(f"the server refused the delta ({receipt.code}): {receipt.reason}")
        return pb.RoundReply(status=pb.RoundReply.DELIVERED, digest=digest, payload_bytes=payload.stat().st_size)

    def _deliver(self, payload: Path, task: pb.RoundTask, digest: str) -> Receipt:
        """Upload; when the server's disk is full, again until there is space or the delta is no longer wanted.

        The training is done and paid for, and a full disk is the operator's to mend: no reason to give the round up.
        """
        report = self._reporter(task, NO_SPACE)
        while True:
            try:
                return self._exchange.upload(payload, task.run_id, task.round, digest)
            except FedPeftError as error:
                cause = error.__cause__
                if not (isinstance(cause, grpc.RpcError) and cause.code() is grpc.StatusCode.RESOURCE_EXHAUSTED):
                    raise
                log.warning("round %d of %s: %s; the delta is kept and sent again", task.round, task.run_id, error)
            report(0, 0, 0.0)
            time.sleep(_SPACE_RETRY_S)

    def _evaluate(self, job: Job, task: pb.RoundTask) -> pb.RoundReply:
        participant = self._ready(job, task)
        data = self._data(participant, job, "heldout")
        metrics = participant.evaluate(data, PackedFile(self._state(task)).state())
        evaluation = pb.Evaluation(split="heldout", metrics=metrics)
        return pb.RoundReply(status=pb.RoundReply.EVALUATED, evaluations=[evaluation])

    # -- what stays loaded ------------------------------------------------------------------------------------------

    def _ready(self, job: Job, task: pb.RoundTask) -> Participant:
        """The resident participant of this job; the base model is checked against the server's fingerprint."""
        key = job_digest(job)
        if self._participant is None or self._participant[0] != key:
            self._participant = None
            self._encoded.clear()
            local = self.config.base_models.get(job.model.base, job.model.base)
            base = load_base(local, job.data.task, job.model.num_labels)
            self._participant = (key, Participant(job, base=base, device=self.config.resolve_device()))
        participant = self._participant[1]
        if participant.fingerprint != task.base_fingerprint:
            raise FedPeftError(
                f"the base model here has fingerprint {participant.fingerprint[:16]}..., the server's has "
                f"{task.base_fingerprint[:16]}...",
                field="model.base",
                value=job.model.base,
                hint="install the same model files at client and server",
            )
        return participant

    def _data(self, participant: Participant, job: Job, split: str) -> Encoded:
        key = (job_digest(job), split)
        if key not in self._encoded:
            records = load_client_data(self.config.data, job.data.task)
            self._encoded[key] = participant.encode(getattr(records, split))
        return self._encoded[key]

    def _state(self, task: pb.RoundTask) -> Path:
        """The global state on disk; older ones are removed."""
        folder = self.config.state / "states"
        target = folder / f"{task.start_state}.safetensors"
        self._exchange.download(task.start_state, task.run_id, target)
        for other in folder.glob("*.safetensors"):
            if other != target:
                other.unlink(missing_ok=True)
        return target

    def _kept_delta(self, task: pb.RoundTask) -> Path | None:
        path = self.config.state / "delta.safetensors"
        try:
            key = json.loads((self.config.state / "delta.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        return path if key == _key(task) and path.exists() else None

    def _keep_delta(self, task: pb.RoundTask, payload: bytes) -> Path:
        path, note = self.config.state / "delta.safetensors", self.config.state / "delta.json"
        note.unlink(missing_ok=True)
        for target, data in ((path, payload), (note, json.dumps(_key(task)).encode())):
            temporary = target.with_suffix(".tmp")
            temporary.write_bytes(data)
            os.replace(temporary, target)
        return path

    def _reporter(self, task: pb.RoundTask, phase: str) -> Callable[[int, int, float], None]:
        """A progress callback that reports about once a second and raises :class:`Cancelled` when told to give up.

        Reports go out from a thread of their own: a slow link must not slow the training.
        """
        cancel = threading.Event()
        last = 0.0

        def send(step: int, total: int, loss: float) -> None:
            request = control.ReportRequest(
                run_id=task.run_id, round=task.round, phase=phase, step=step, steps_total=total, loss=loss
            )
            try:
                if self._link.Report(request, timeout=_CALL_S).cancel:
                    cancel.set()
            except grpc.RpcError:
                pass  # no contact just now: the work goes on

        def report(step: int, total: int, loss: float) -> None:
            nonlocal last
            if cancel.is_set():
                raise Cancelled
            if time.monotonic() - last >= _REPORT_EVERY_S:
                last = time.monotonic()
                threading.Thread(target=send, args=(step, total, loss), daemon=True).start()

        return report


def load_client_data(spec: str, task: str) -> ClientData:
    """One owner's data: a folder, or ``builtin:SOURCE/CLIENT``.

    Raises:
        FedPeftError: there is no such data, or it belongs to several owners.
    """
    source, _, owner = spec.partition("/") if spec.startswith("builtin:") else (spec, "", "")
    clients = load_source(source, task)
    if owner:
        found = next((c for c in clients if c.name == owner), None)
        if found is None:
            names = ", ".join(c.name for c in clients)
            raise FedPeftError("no such client in the source", field="data", value=spec, hint=f"known: {names}")
        return found
    if len(clients) != 1:
        raise FedPeftError(
            f"holds the data of {len(clients)} owners",
            field="data",
            value=spec,
            hint="name the folder of one owner, or builtin:SOURCE/CLIENT",
        )
    return clients[0]


def _key(task: pb.RoundTask) -> dict[str, object]:
    return {"run_id": task.run_id, "round": task.round, "start_state": task.start_state}
