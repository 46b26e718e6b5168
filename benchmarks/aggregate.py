"""What folding deltas costs, beside a plain copy-add, Flower's FedAvg and NVFlare's aggregator.

    python benchmarks/aggregate.py --quick     # 8 MiB payloads, 4 and 16 clients, seconds
    python benchmarks/aggregate.py --report    # 32 MiB, 10 and 100 clients, writes results/aggregate.{md,json}

Each client has its own arrays, so that data come from memory and not from a cache. The payload is shaped as a rank-16
adapter of 4096-wide layers (tensors of 256 KiB). All contenders have the same number of threads. Each runs in its own
process; ``--rounds`` times every contender is started in turn, for ``--repeats`` passes over all clients each, and its
best pass counts, so that other work on the machine disturbs one contender no more than another. Two things are timed:

- *fold*: from an empty sum to one that only needs dividing. The rate is payload bytes (float32, 10^9) over processor
  seconds of the process, which with one thread is the wall clock of an idle machine;
- *whole*: the same and the result, in processor seconds and on the wall clock. This is what a user waits for, and what
  is compared with Flower.

Contenders:

- *copy-add*: ``acc.add_(x)`` in float32, tensor by tensor: 12 bytes of memory traffic per element, the ceiling. The
  fixed-point sum moves 20 (int64 in, int64 out, float32 in);
- *fixed point*, *float32*: ``fedpeft.aggregation``, every value checked for finiteness and bound; compiled where the
  extra ``fast`` is installed, and *fixed point, no compiler* as it is without. Whole: with ``LinearMean.commit``;
- *Flower*: ``FedAvg.aggregate_train`` on messages that have arrived, holding their arrays as Flower holds them, in
  serialised form. The call deserialises each array, sums, and serialises the mean; receiving is not included;
- *NVFlare*: ``WeightedAggregationHelper`` on numpy arrays, as its in-memory aggregator receives them, and on tensors.
  Whole: with ``get_result``.

*memory*: data lie in memory. *file*: safetensors objects read by the coordinator's own reader from the page cache; for
copy-add, the same reads and a plain add. Memory is the peak resident set (the kernel's high-water mark) above the level
with the payloads in place and the loops compiled. The payloads that Flower must hold all at once are not in its figure;
in *file* mode fedpeft holds none.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MIB = 1 << 20
COLUMNS = {
    "copy-add": "copy-add (ceiling)",
    "fixed": "fedpeft, fixed point",
    "fixed-numpy": "fedpeft, fixed point, no compiler",
    "float32": "fedpeft, float32",
    "flower": "Flower FedAvg",
    "nvflare-numpy": "NVFlare, numpy",
    "nvflare-torch": "NVFlare, tensors",
}
TIMES = ("fold_cpu_seconds", "whole_cpu_seconds", "whole_wall_seconds")
Shapes = dict[str, tuple[int, ...]]
Fold = Callable[[], Callable[[], Any]]  # folds all clients, and returns what gives the result
FILE_CONTENDERS = ("copy-add", "fixed", "fixed-numpy", "float32")


# --- one contender, in its own process ---------------------------------------------------------------------------


class HeldDelta:
    """A delta that lies in memory."""

    def __init__(self, tensors: Mapping[str, Any]):
        self.tensors = tensors

    def names(self) -> Sequence[str]:
        return sorted(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def chunks(self, name: str, elements: int) -> Iterator[Any]:
        flat = self.tensors[name].view(-1)
        yield from flat.split(elements) if flat.numel() > elements else (flat,)

    def tensor(self, name: str) -> Any:
        return self.tensors[name]


def shapes_of(mib: int) -> dict[str, tuple[int, ...]]:
    count = mib * MIB // (4 * 16 * 4096)
    return {f"layer{k:03d}": (16, 4096) if k % 2 else (4096, 16) for k in range(count)}


def contend(name: str, clients: int, mib: int, source: str, threads: int, repeats: int, folder: Path) -> dict[str, Any]:
    import torch

    torch.set_num_threads(threads)
    shapes = shapes_of(mib)
    generator = torch.Generator().manual_seed(1)
    base = {n: torch.empty(s).normal_(0.0, 1e-3, generator=generator) for n, s in shapes.items()}
    payloads: list[Any] = []
    for k in range(clients):
        tensors = {n: t * (1.0 + k / 64) for n, t in base.items()}
        payloads.append(to_file(tensors, folder / f"{k}.safetensors") if source == "file" else tensors)
        del tensors
    weights = [100 + k for k in range(clients)]
    prepare = globals()["run_" + name.split("-")[0].replace("copy", "copy_add")]
    fold: Fold = prepare(name, payloads, weights, shapes)
    if name == "flower":
        payloads.clear()  # its records hold copies
    idle = reset_peak()
    passes = []
    for _ in range(repeats):
        cpu, wall = time.process_time(), time.perf_counter()
        finish = fold()
        folded = time.process_time() - cpu
        result = finish()
        passes.append((folded, time.process_time() - cpu, time.perf_counter() - wall))
        del result, finish
    return {
        "contender": name,
        "clients": clients,
        "source": source,
        "threads": threads,
        "payload_bytes": 4 * clients * sum(math.prod(s) for s in shapes.values()),
        **dict(zip(TIMES, (min(column) for column in zip(*passes, strict=True)), strict=True)),
        "peak_mib": (peak_bytes() - idle) / MIB,
    }


def to_file(tensors: Mapping[str, Any], path: Path) -> Any:
    from fedpeft.adapters.delta import PackedFile, pack
    from fedpeft.adapters.manifest import Manifest

    manifest = Manifest("lora", "", "benchmark", 1, "", "", "fp32", 1, 1, ())
    path.write_bytes(pack(tensors, manifest))
    return PackedFile(path)


def run_copy_add(_: str, payloads: list[Any], weights: list[int], shapes: Shapes) -> Fold:
    import torch

    def fold() -> Callable[[], Any]:
        sums = {n: torch.zeros(math.prod(s)) for n, s in shapes.items()}
        for payload in payloads:
            for n, total in sums.items():
                if isinstance(payload, dict):
                    total.add_(payload[n].view(-1))
                    continue
                position = 0
                for piece in payload.chunks(n, 1 << 18):
                    total[position : position + piece.numel()].add_(piece)
                    position += piece.numel()
        return lambda: sums

    return fold


def run_fedpeft(name: str, payloads: list[Any], weights: list[int], shapes: Shapes) -> Fold:
    import torch

    from fedpeft.aggregation.fixed_point import plan
    from fedpeft.aggregation.linear_mean import LinearMean

    spec = plan(shapes, 64.0, 1 << 24)
    start = {n: torch.zeros(s) for n, s in shapes.items()}
    readers = [HeldDelta(p) if isinstance(p, dict) else p for p in payloads]

    def fold(readers: Sequence[Any] = readers) -> Callable[[], Any]:
        mean = LinearMean(start, spec, "float32" if name == "float32" else "fixed")
        mean.accumulator.compiled = name != "fixed-numpy"  # type: ignore[attr-defined]
        for reader, weight in zip(readers, weights, strict=False):
            mean.fold(reader, weight)
        return mean.commit

    fold(readers[:1])()  # compiles
    return fold


run_fixed = run_float32 = run_fedpeft


def run_flower(_: str, payloads: list[Any], weights: list[int], shapes: Shapes) -> Fold:
    import logging

    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp.strategy import FedAvg
    from flwr.supercore.task_identity import TaskIdentity

    logging.getLogger("flwr").setLevel(logging.ERROR)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1  # who writes messages in this process
    messages = [
        Message(
            RecordDict({"arrays": ArrayRecord(p), "metrics": MetricRecord({"num-examples": w})}),
            dst_node_id=k + 1,
            message_type="train",
        )
        for k, (p, w) in enumerate(zip(payloads, weights, strict=True))
    ]

    def fold() -> Callable[[], Any]:
        arrays, _ = FedAvg().aggregate_train(1, messages)
        if arrays is None or len(arrays) != len(shapes):
            raise RuntimeError("Flower aggregated nothing")
        return lambda: arrays

    return fold


def run_nvflare(name: str, payloads: list[Any], weights: list[int], shapes: Shapes) -> Fold:
    from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper

    data = [{n: t.numpy() for n, t in p.items()} for p in payloads] if name.endswith("numpy") else payloads

    def fold() -> Callable[[], Any]:
        helper = WeightedAggregationHelper()
        for k, (update, weight) in enumerate(zip(data, weights, strict=True)):
            helper.add(update, weight, f"client-{k}", 1)
        return helper.get_result

    return fold


def reset_peak() -> int:
    """Give freed memory back, reset the kernel's high-water mark; the resident bytes now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("needs /proc/self/status (Linux)")


# --- the comparison ------------------------------------------------------------------------------------------------


def launch(args: argparse.Namespace, name: str, clients: int, source: str) -> dict[str, Any]:
    environment = dict(os.environ, OMP_NUM_THREADS=str(args.threads))
    if name.startswith("nvflare") and args.nvflare_path:
        environment["PYTHONPATH"] = str(args.nvflare_path)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        spec = [name, str(clients), str(args.mib), source, str(args.threads), str(args.repeats), folder]
        done = subprocess.run(
            [sys.executable, __file__, "--contend", *spec], capture_output=True, text=True, env=environment
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"skipped {COLUMNS[name]}, {clients} clients, {source}: {reason}", file=sys.stderr)
        return {"contender": name, "clients": clients, "source": source, "skipped": reason}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def best(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The shortest times and the highest peak of one contender's rounds."""
    done = [r for r in rounds if "skipped" not in r]
    if not done:
        return rounds[0]
    row = {**done[0], **{key: min(r[key] for r in done) for key in TIMES}, "peak_mib": max(r["peak_mib"] for r in done)}
    return {**row, "gb_per_s": row["payload_bytes"] / row["fold_cpu_seconds"] / 1e9}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| contender | data in | clients | fold, GB per CPU s | of copy-add | whole, CPU s | whole, wall s "
        "| times Flower, CPU | times Flower, wall | peak MiB above payloads |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    done = {(r["contender"], r["source"], r["clients"]): r for r in rows if "skipped" not in r}
    for r in rows:
        head = f"| {COLUMNS[r['contender']]:<33} | {r['source']:<6} | {r['clients']:>3} |"
        if "skipped" in r:
            lines.append(f"{head} skipped: {r['skipped']} | | | | | | |")
            continue
        cells = [f"{r['gb_per_s']:.2f}"]
        ceiling = done.get(("copy-add", r["source"], r["clients"]))
        cells.append(f"{r['gb_per_s'] / ceiling['gb_per_s']:.2f}" if ceiling else "")
        cells += [f"{r['whole_cpu_seconds']:.3f}", f"{r['whole_wall_seconds']:.3f}"]
        flower = done.get(("flower", "memory", r["clients"]))
        cells += [f"{flower[key] / r[key]:.1f}" if flower else "" for key in TIMES[1:]]
        lines.append(f"{head} {' | '.join(cells)} | {r['peak_mib']:.0f} |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    import numpy
    import torch

    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    versions = {}
    for package in ("numba", "flwr", "nvflare"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "separate folder or absent" if package == "nvflare" else "absent"
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        **versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 MiB, 4 and 16 clients")
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--mib", type=int, default=32, help="payload of a client")
    parser.add_argument("--threads", type=int, default=1, help="threads, for all contenders")
    parser.add_argument("--rounds", type=int, default=3, help="how often every contender is started")
    parser.add_argument("--repeats", type=int, default=3, help="passes each time")
    parser.add_argument("--folder", type=Path, help="where to put payload files")
    parser.add_argument("--nvflare-path", type=Path, help="pip install --no-deps --target DIR nvflare msgpack")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--report", action="store_true", help="write results/aggregate.md and .json")
    parser.add_argument("--contend", nargs=7, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contend:
        name, clients, mib, source, threads, repeats, folder = args.contend
        found = contend(name, int(clients), int(mib), source, int(threads), int(repeats), Path(folder))
        print(json.dumps(found))
        return
    if args.quick:
        args.mib, args.clients = 8, [4, 16]
    rows = []
    for clients in args.clients:
        for source in ("memory", "file"):
            names = list(COLUMNS) if source == "memory" else FILE_CONTENDERS
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
            for _ in range(args.rounds):
                for name in names:
                    found[name].append(launch(args, name, clients, source))
                    print(json.dumps(found[name][-1]), file=sys.stderr)
            rows += [best(found[name]) for name in names]
    text, facts = table(rows), machine()
    print(text)
    setting = {"payload_mib": args.mib, "threads": args.threads, "rounds": args.rounds, "repeats": args.repeats}
    result = {"machine": facts, **setting, "rows": rows}
    if args.report:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "aggregate.json").write_text(json.dumps(result, indent=1) + "\n")
        described = ", ".join(f"{key} {value}" for key, value in facts.items())
        options = f"--threads {args.threads} --rounds {args.rounds} --repeats {args.repeats}"
        heading = (
            f"# Folding deltas\n\n`python benchmarks/aggregate.py --report {options}`\n\n{described}; {args.threads} "
            f"thread(s); payload {args.mib} MiB of float32 per client. Every contender was started {args.rounds} "
            f"times in turn, for {args.repeats} passes each, on a machine with other work on it; the best pass counts. "
            "The script's docstring says what is timed."
        )
        (RESULTS / "aggregate.md").write_text(f"{heading}\n\n{text}\n")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
