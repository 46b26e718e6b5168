"""Where simulated clients live: in this process, or in a pool of worker processes.

A host holds one resident :class:`~fedpeft.federation.participant.Participant` and the encoded data of the clients
that it has served so far. Both kinds of host run the same function on the same bytes, with the number of threads that
the job fixes, so the result is the same to the last bit; the pool only uses more cores.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol

import torch

from fedpeft.adapters.attach import State
from fedpeft.adapters.delta import PackedFile
from fedpeft.data.encode import Encoded
from fedpeft.data.partition import partition
from fedpeft.data.records import ClientData
from fedpeft.data.sources import load_source
from fedpeft.errors import FedPeftError, RunFailed
from fedpeft.federation.participant import ClientUpdate, Participant
from fedpeft.job.loading import dump_job, parse_job
from fedpeft.job.schema import Job

Metrics = dict[str, float]


def simulated_clients(job: Job) -> tuple[ClientData, ...]:
    """The clients of a simulation: the job's source under the job's partition.

    Raises:
        FedPeftError: the source cannot be read, or cannot be split as asked.
    """
    natural = load_source(job.data.source, job.data.task)
    split = job.data.partition
    count = job.clients.count
    if count is None:
        if split.by != "natural":
            raise FedPeftError(
                "is required for this partition",
                field="clients.count",
                hint=f"partition.by = {split.by!r} splits by number",
            )
        count = len(natural)
    return partition(natural, split.by, count, job.seed, alpha=split.alpha, shards=split.shards)


class ClientHost:
    """Serves any client of the job, one at a time."""

    def __init__(self, job: Job, clients: tuple[ClientData, ...], participant: Participant | None = None):
        self.job = job
        self.clients = {c.name: c for c in clients}
        self.participant = participant or Participant(job)
        self._encoded: dict[tuple[str, str], Encoded] = {}

    def data(self, client: str, split: str) -> Encoded:
        """Encoded examples of one client; ``split`` is ``train`` or ``heldout``."""
        key = (client, split)
        if key not in self._encoded:
            self._encoded[key] = self.participant.encode(getattr(self.clients[client], split))
        return self._encoded[key]

    def train(self, client: str, run_id: str, round_number: int, state: Path, digest: str) -> ClientUpdate:
        return self.participant.train(
            client,
            self.data(client, "train"),
            PackedFile(state).state(),
            run_id=run_id,
            round_number=round_number,
            start_digest=digest,
        )

    def evaluate(self, client: str, state: Path) -> Metrics:
        return self.participant.evaluate(self.data(client, "heldout"), PackedFile(state).state())

    def local_baseline(self, client: str, state: Path) -> Metrics:
        """The client alone: the same rounds and steps, from the same start, without exchange."""
        return self.participant.evaluate(
            self.data(client, "heldout"),
            self._train_alone(client, self.data(client, "train"), PackedFile(state).state(), 1),
        )

    def pooled_baseline(self, state: Path, steps_factor: int) -> dict[str, Metrics]:
        """One model on everybody's data, with as many steps as all clients of a round together."""
        parts = [self.data(name, "train").tensors for name in sorted(self.clients)]
        pooled = Encoded({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
        trained = self._train_alone("pooled", pooled, PackedFile(state).state(), steps_factor)
        return {name: self.participant.evaluate(self.data(name, "heldout"), trained) for name in sorted(self.clients)}

    def sizes(self, client: str) -> tuple[int, int]:
        """Training and held-out examples of a client."""
        return len(self.data(client, "train")), len(self.data(client, "heldout"))

    def _train_alone(self, client: str, data: Encoded, state: Mapping[str, torch.Tensor], steps_factor: int) -> State:
        section = self.job.train.model_copy(update={"local_steps": self.job.train.local_steps * steps_factor})
        current: State = dict(state)
        for number in range(1, self.job.aggregation.rounds + 1):
            current, _ = self.participant.train_state(client, data, current, round_number=number, section=section)
        return current


Task = tuple[Any, ...]
"""Name of a method of :class:`ClientHost` and its arguments."""


class Hosts(Protocol):
    """Runs methods of a :class:`ClientHost`, somewhere."""

    def each(self, tasks: Mapping[str, Task]) -> Iterator[tuple[str, Any]]:
        """Do the tasks; yield (key, result) of each as soon as it is done, in any order."""
        ...

    def close(self) -> None: ...


class InProcessHost:
    """One host in this process; a task is begun when the result of the one before has been taken."""

    def __init__(self, host: ClientHost):
        self.host = host

    def each(self, tasks: Mapping[str, Task]) -> Iterator[tuple[str, Any]]:
        for key, (method, *args) in tasks.items():
            yield key, getattr(self.host, method)(*args)

    def close(self) -> None:
        pass


class HostPool:
    """One host per worker process, started with ``spawn`` so that no thread or lock of this process is inherited."""

    def __init__(self, job: Job, workers: int):
        self.pool = ProcessPoolExecutor(
            workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start, initargs=(dump_job(job),)
        )

    def each(self, tasks: Mapping[str, Task]) -> Iterator[tuple[str, Any]]:
        keys = {self.pool.submit(_call, method, tuple(args)): key for key, (method, *args) in tasks.items()}
        try:
            for future in as_completed(list(keys)):
                yield keys.pop(future), future.result()
        except BrokenProcessPool:
            raise RunFailed(
                "a worker process died",
                field="--engine",
                value="processes",
                hint="run the command again to continue; if memory ran out, use --engine in-process",
            ) from None

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)


def make_hosts(engine: str, host: ClientHost) -> Hosts:
    """``engine``: ``in-process``, ``processes``, or ``auto`` (a process per core, if there is work for two)."""
    job = host.job
    workers = min(max(1, _cores() // job.train.threads), len(host.clients))
    if engine == "in-process" or (engine == "auto" and workers < 2):
        return InProcessHost(host)
    return HostPool(job, max(workers, 1))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


_host: ClientHost | None = None


def _start(job_toml: str) -> None:
    """In a worker: load base model, adapter and data once."""
    global _host
    job = parse_job(job_toml)
    torch.set_num_threads(job.train.threads)
    _host = ClientHost(job, simulated_clients(job))


def _call(method: str, args: tuple[Any, ...]) -> Any:
    assert _host is not None
    return getattr(_host, method)(*args)
