"""The agent: resident, answers tasks, keeps everything loaded.

A task arrives as a Flower message and is handled by a Flower ``ClientApp`` in this very process: base model, adapter
and encoded data stay where they are from round to round. The handler checks the owner's policy, fetches the global
state over the adapter exchange, trains, uploads the delta, and replies with a receipt.

Everything that can go wrong at a task becomes a reply with a reason, and the server that reads it is not trusted with
the data. So a task is done in stages, and each stage has its own sentences for the server. They are fixed, or made
only of what the server sent itself, of fingerprints, and of names of error codes and exception types:

==========  =====================================================================================
task, job   what is wrong with the server's own text; the owner's limit that declines it
base model  that it cannot be loaded, under the job's name for it; both fingerprints if they differ
data        that they cannot be used
training    the loss that is not finite; gradient checkpointing that the base model cannot do
transfer    the status code; the server's own refusal
==========  =====================================================================================

The whole text, with paths, column names and values where an error has them, goes to the agent's log.

A task may come twice (a message was lost, the daemon was restarted). The delta of the last round is kept on disk, so a
repeat is answered without training again, and it would be the same delta anyway.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedpeft import __version__
from fedpeft.adapters.attach import State
from fedpeft.adapters.delta import PackedFile
from fedpeft.data.encode import Encoded
from fedpeft.data.sources import is_local_path, load_client_data
from fedpeft.errors import FedPeftError, JobError
from fedpeft.federation.participant import Participant
from fedpeft.job.loading import job_digest, parse_job
from fedpeft.job.schema import Job
from fedpeft.models import LoadedBase, load_base
from fedpeft.store.blobs import check_digest
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
_REASON_CHARACTERS = 500
NO_SPACE = "waiting for space at the server"  # the phase that is reported meanwhile

# What the server is told; see the module's docstring.
BAD_TASK = "the server's task cannot be read"
BAD_JOB = "the server's job cannot be read"
BAD_STATE_NAME = "the server's task names no starting state: it must be a SHA-256 as 64 lowercase hex digits"
BAD_STATE = "the server's starting state cannot be read"
BAD_DATA = "this client's data cannot be used for the job; its own log says why"
DISK_FULL = "this client's disk is full"
DISK_FAILED = "this client's disk failed; its own log says why"
NO_STATE = "this client could not fetch the starting state"
NO_DELIVERY = "this client could not send the delta"

# Errors of the training that are about the job alone: it sees the data as tensors only, and the loss that such an
# error names is infinite or not a number.
_FIELDS_OF_TRAINING = ("train.learning_rate", "train.gradient_checkpointing")


class Cancelled(Exception):
    """The server no longer needs this work."""


class _Told(Exception):
    """Ends a task with a ``reason`` that may leave the machine; its ``__cause__`` is for the log only."""

    def __init__(self, reason: str, status: pb.RoundReply.Status = pb.RoundReply.FAILED):
        super().__init__(reason)
        self.reason, self.status = reason, status


class Agent:
    """Everything an agent does between two messages.

    Args:
        bundle: identity.
        config: the owner's data and limits.
        channel: to the server; the caller closes it.
    """

    def __init__(self, bundle: Bundle, config: ClientConfig, channel: grpc.Channel):
        self.bundle, self.config = bundle, config
        self.policy = Policy(config.limits, config.state / "rounds.json", config.base_models)
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
        task = pb.RoundTask()
        began = time.monotonic()
        try:
            task = _read_task(message)
            job = _read_job(task)
            if (objection := self.policy.objection(job)) is not None:
                raise _Told(objection, pb.RoundReply.DECLINED)
            reply = work(job, task)
        except Cancelled:
            reply = pb.RoundReply(status=pb.RoundReply.FAILED, reason="cancelled by the server")
        except _Told as told:
            _log_end(task, told)
            reply = pb.RoundReply(status=told.status, reason=_one_line(told.reason))
        except OSError as error:
            log.error("round %d of %s: %s", task.round, task.run_id, error)
            reply = pb.RoundReply(status=pb.RoundReply.FAILED, reason=_disk(error))
        except Exception as error:  # a defect, or a message of a library that may name anything of this machine
            log.error("round %d of %s failed", task.round, task.run_id, exc_info=error)
            reply = pb.RoundReply(status=pb.RoundReply.FAILED, reason=_failure("the agent failed", error))
        reply.run_id, reply.round, reply.client, reply.attempt = task.run_id, task.round, self.bundle.name, task.attempt
        reply.metrics["seconds"] = time.monotonic() - began
        return Message(RecordDict({RECORD: ConfigRecord({KEY: reply.SerializeToString()})}), reply_to=message)

    def _train(self, job: Job, task: pb.RoundTask) -> pb.RoundReply:
        payload = self._kept_delta(task)
        if payload is None:
            work = round_key(job, task)
            if (objection := self.policy.round_objection(work)) is not None:
                raise _Told(objection, pb.RoundReply.DECLINED)
            participant = self._ready(job, task)
            data = self._data(participant, job, "train")
            state = self._state(task)
            self.policy.count_round(work)
            report = self._reporter(task, "training")
            with _training("this client failed at training"):
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
        with _transfer(NO_DELIVERY):
            receipt = self._deliver(payload, task, digest)
        if not receipt.accepted:
            raise _Told(f"the server refused the delta ({receipt.code}): {receipt.reason}")
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
        state = self._state(task)
        with _training("this client failed at evaluation"):
            metrics = participant.evaluate(data, state)
        evaluation = pb.Evaluation(split="heldout", metrics=metrics)
        return pb.RoundReply(status=pb.RoundReply.EVALUATED, evaluations=[evaluation])

    # -- what stays loaded ------------------------------------------------------------------------------------------

    def _ready(self, job: Job, task: pb.RoundTask) -> Participant:
        """The resident participant of this job; the base model is checked against the server's fingerprint."""
        key = job_digest(job)
        if self._participant is None or self._participant[0] != key:
            self._participant = None
            self._encoded.clear()
            with _telling(f"this client cannot load base model {job.model.base!r} (its own log says why)"):
                base = self._base(job)
            try:
                participant = Participant(job, base=base, device=self.config.resolve_device())
            except FedPeftError as error:
                if error.field == "model.fingerprint":  # names both fingerprints and nothing else
                    raise _Told(str(error)) from error
                adapter = f"the job's adapter cannot be put on base model {job.model.base!r} here"
                raise _Told(f"{adapter} (its own log says why)") from error
            self._participant = (key, participant)
        participant = self._participant[1]
        if participant.fingerprint != task.base_fingerprint:
            mismatch = FedPeftError(
                f"the base model here has fingerprint {participant.fingerprint[:16]}..., the server's has "
                f"{task.base_fingerprint[:16]}...",
                field="model.base",
                value=job.model.base,
                hint="install the same model files at client and server",
            )
            raise _Told(str(mismatch)) from mismatch
        return participant

    def _base(self, job: Job) -> LoadedBase:
        name = job.model.base
        local = self.config.base_models.get(name)
        # The policy lets no path through. What is left is a hub id, unless the working directory happens to hold
        # something of that name: it is not opened, and the server is told the same as of an id that does not exist.
        if local is None and not name.startswith("builtin:") and is_local_path(name):
            raise FedPeftError(
                "the working directory holds something of this name, so it is not taken for a hub id",
                field="model.base",
                value=name,
                hint="start the agent elsewhere, or map the name in [base_models] of client.toml",
            )
        return load_base(local or name, job.data.task, job.model.num_labels)

    def _data(self, participant: Participant, job: Job, split: str) -> Encoded:
        key = (job_digest(job), split)
        if key not in self._encoded:
            with _telling(BAD_DATA):
                records = load_client_data(self.config.data, job.data.task)
                self._encoded[key] = participant.encode(getattr(records, split))
        return self._encoded[key]

    def _state(self, task: pb.RoundTask) -> State:
        """The global state to start from. It is kept on disk for a repeat; older ones are removed."""
        with _telling(BAD_STATE_NAME):  # it becomes a file name
            digest = check_digest(task.start_state, field="start_state")
        folder = self.config.state / "states"
        target = folder / f"{digest}.safetensors"
        with _transfer(NO_STATE):
            self._exchange.download(digest, task.run_id, target)
        for other in folder.glob("*.safetensors"):
            if other != target:
                other.unlink(missing_ok=True)
        try:
            return PackedFile(target).state()
        except FedPeftError as error:
            raise _Told(BAD_STATE) from error

    def _kept_delta(self, task: pb.RoundTask) -> Path | None:
        """The delta of this very task, if it was finished before and is whole."""
        path = self.config.state / "delta.safetensors"
        try:
            note = json.loads((self.config.state / "delta.json").read_text())
            payload = path.read_bytes()
        except (FileNotFoundError, ValueError, RecursionError):
            return None
        return path if note == _note(task, payload) else None

    def _keep_delta(self, task: pb.RoundTask, payload: bytes) -> Path:
        path, note = self.config.state / "delta.safetensors", self.config.state / "delta.json"
        note.unlink(missing_ok=True)
        for target, data in ((path, payload), (note, json.dumps(_note(task, payload)).encode())):
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


def round_key(job: Job, task: pb.RoundTask) -> str:
    """One name for one piece of training.

    A repeat of a round has the same name. Another starting state or another job under the same run and round is other
    work, which would teach the server something new and has to count anew.
    """
    parts = json.dumps([task.run_id, task.round, task.start_state, job_digest(job)])
    return hashlib.sha256(parts.encode()).hexdigest()


def _note(task: pb.RoundTask, payload: bytes) -> dict[str, object]:
    digest = hashlib.sha256(payload).hexdigest()
    return {"run_id": task.run_id, "round": task.round, "start_state": task.start_state, "digest": digest}


def _read_task(message: Message) -> pb.RoundTask:
    with _telling(BAD_TASK):
        packed = message.content[RECORD][KEY]
        if not isinstance(packed, bytes):
            raise TypeError(f"the task is {type(packed).__name__} instead of bytes")
        return pb.RoundTask.FromString(packed)


def _read_job(task: pb.RoundTask) -> Job:
    with _telling(BAD_JOB):
        try:
            return parse_job(task.job_toml, name="the server's job")
        except JobError as error:  # made from the server's text and the names in the schema
            raise _Told(str(error)) from error


@contextmanager
def _telling(sentence: str) -> Iterator[None]:
    """Whatever goes wrong inside, the server is told ``sentence``."""
    try:
        yield
    except (Cancelled, _Told):
        raise
    except Exception as error:
        raise _Told(sentence) from error


@contextmanager
def _training(failed: str) -> Iterator[None]:
    try:
        yield
    except FedPeftError as error:
        told = str(error) if error.field in _FIELDS_OF_TRAINING else _failure(failed, error)
        raise _Told(told) from error
    except Cancelled:
        raise
    except Exception as error:
        raise _Told(_failure(failed, error)) from error


@contextmanager
def _transfer(failed: str) -> Iterator[None]:
    """The status of a call may leave; its details may name addresses of the client's network."""
    try:
        yield
    except FedPeftError as error:
        cause = error.__cause__
        if isinstance(cause, OSError):
            raise _Told(_disk(cause)) from error
        status = f" ({cause.code().name})" if isinstance(cause, grpc.RpcError) else ""
        raise _Told(f"{failed}{status}; its own log says why") from error


def _disk(error: OSError) -> str:
    return DISK_FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else DISK_FAILED


def _failure(what: str, error: Exception) -> str:
    return f"{what} ({type(error).__name__}); its own log says why"


def _one_line(reason: str) -> str:
    return " ".join(reason.split())[:_REASON_CHARACTERS]


def _log_end(task: pb.RoundTask, told: _Told) -> None:
    """The whole story for the owner; a traceback only for what is no user's mistake."""
    where, cause = f"round {task.round} of {task.run_id}", told.__cause__
    if told.status == pb.RoundReply.DECLINED:
        log.info("%s declined: %s", where, told.reason)
    elif cause is None or isinstance(cause, FedPeftError | OSError):
        log.warning("%s: %s; the server is told: %s", where, cause or told.reason, told.reason)
    else:
        log.error("%s failed; the server is told: %s", where, told.reason, exc_info=cause)
