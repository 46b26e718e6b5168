"""A small federation without a network: a real store on disk, a real adapter on a tiny model, three clients."""

from __future__ import annotations

from pathlib import Path

import torch

from fedpeft.adapters.attach import State
from fedpeft.adapters.delta import pack
from fedpeft.adapters.manifest import manifest_for
from fedpeft.data.encode import Encoded
from fedpeft.federation.participant import Participant
from fedpeft.federation.run import FederatedRun, Round
from fedpeft.job.schema import Job
from fedpeft.models import LoadedBase
from fedpeft.store.store import RunStore

CLIENTS = ("ann", "bob", "eve")
EXAMPLES = {"ann": 3, "bob": 5, "eve": 9}
RUN = "run-1"


def job(**sections) -> Job:
    """A job of two rounds; a keyword is a section, merged over the defaults below."""
    tree = {
        "name": "small",
        "seed": 7,
        "model": {"base": "./tiny"},
        "data": {"source": "./data", "task": "causal-lm"},
        "adapter": {"kind": "lora", "rank": 3, "alpha": 6},
        "train": {"local_steps": 2, "batch_size": 2, "learning_rate": 0.02},
        "aggregation": {"rule": "mean", "rounds": 2},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return Job.model_validate(tree)


def participant(model, **sections) -> Participant:
    return Participant(job(**sections), base=LoadedBase(model=model, tokenizer=None, task="causal-lm"))


def examples(client: str) -> Encoded:
    generator = torch.Generator().manual_seed(CLIENTS.index(client))
    ids = torch.randint(0, 64, (EXAMPLES[client], 10), generator=generator)
    return Encoded({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})


def open_store(folder: Path) -> RunStore:
    folder.mkdir(parents=True, exist_ok=True)
    return RunStore.open(f"sqlite:///{folder / 'ledger.db'}", folder / "blobs")


def start(store: RunStore, party: Participant) -> FederatedRun:
    return FederatedRun.create(store, RUN, party.job, party.spec, party.initial_state())


def train(party: Participant, round_: Round, client: str) -> bytes:
    """The client's real delta for the round, as it would travel."""
    update = party.train(
        client,
        examples(client),
        round_.run.state(),
        run_id=RUN,
        round_number=round_.number,
        start_digest=round_.start_digest,
    )
    return update.payload


def forged(party: Participant, round_: Round, client: str, *, weight: int, scale: float = 0.1, **facts) -> bytes:
    """A delta of random numbers; ``facts`` replace facts of its manifest."""
    generator = torch.Generator().manual_seed(1000 + CLIENTS.index(client))
    delta = {name: scale * torch.randn(shape, generator=generator) for name, shape in party.spec.shapes.items()}
    told = {
        "run_id": RUN,
        "round": round_.number,
        "client": client,
        "start_state": round_.start_digest,
        "codec": party.job.adapter.codec,
        "example_count": weight,
        "weight": weight,
        **facts,
    }
    return pack(delta, manifest_for(party.spec, **told))


def deliver(round_: Round, client: str, payload: bytes):
    return round_.accept(client, round_.run.store.blobs.put_bytes(payload))


def whole_round(party: Participant, run: FederatedRun, order=CLIENTS) -> dict:
    """Open, train, accept in ``order``, commit; the round's report."""
    round_ = run.open_round(CLIENTS)
    for client in order:
        if client in round_.missing():
            deliver(round_, client, train(party, round_, client))
    return round_.commit()


def same(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
