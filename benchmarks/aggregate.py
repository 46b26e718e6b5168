"""What folding deltas costs, beside a plain copy-add, Flower's FedAvg and NVFlare's aggregator.

    python benchmarks/aggregate.py --quick     # 8 MiB payloads, 4 and 16 clients, seconds
    python benchmarks/aggregate.py --report    # 32 MiB, 10 and 100 clients, writes results/aggregate.{md,json}

Rates are payload bytes (float32, 10^9) over processor seconds of the process, from the first fold to a sum that only
needs dividing; the best of ``--repeats`` passes over all clients. With one thread that is the wall clock of an idle
machine, and it depends far less on what else runs; the wall clock is in the JSON. Every client has its own arrays, so
that data come from memory and not from a cache. The payload is shaped as a rank-16 adapter of 4096-wide layers
(tensors of 256 KiB).

Contenders, each in its own process, one after the other:

- *copy-add*: ``acc.add_(x)`` in float32, tensor by tensor: 12 bytes of memory traffic per element, the ceiling. The
  fixed-point sum moves 20 (int64 in, int64 out, float32 in);
- *fixed point*, *float32*: ``fedpeft.aggregation``, every value checked for finiteness and bound;
- *Flower*: ``aggregate_arrayrecords`` of FedAvg on the same arrays, as records that have arrived;
- *NVFlare*: ``WeightedAggregationHelper`` on numpy arrays, as its in-memory aggregator receives them, and on tensors.

*memory*: data lie in memory. *file*: safetensors objects read by the coordinator's own reader from the page cache; for
copy-add, the same reads and a plain add. Memory is the peak resident set (the kernel's high-water mark) above the level
with the payloads in place. The payloads that Flower must hold all at once are not in its figure; in *file* mode fedpeft
holds none.
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
    "float32": "fedpeft, float32",
    "flower": "Flower FedAvg",
    "nvflare-numpy": "NVFlare, numpy",
    "nvflare-torch": "NVFlare, tensors",
}
FILE_CONTENDERS = ("copy-add", "fixed", "float32")


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
        yield from self.tensors[name].view(-1).split(elements)

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
    payloads: list[Any] = []
    for k in range(clients):
        tensors = {n: torch.empty(s).normal_(0.0, 1e-3, generator=generator) for n, s in shapes.items()}
        payloads.append(to_file(tensors, folder / f"{k}.safetensors") if source == "file" else tensors)
        del tensors
    weights = [100 + k for k in range(clients)]
    prepare = globals()["run_" + name.split("-")[0].replace("copy", "copy_add")]
    once: Callable[[], Any] = prepare(name, payloads, weights, shapes)
    if name == "flower":
        payloads.clear()  # its records hold copies
    idle = reset_peak()
    seconds, wall = [], []
    for _ in range(repeats):
        begin, begin_wall = time.process_time(), time.perf_counter()
        once()
        seconds.append(time.process_time() - begin)
        wall.append(time.perf_counter() - begin_wall)
    payload = 4 * clients * sum(math.prod(s) for s in shapes.values())
    return {
        "contender": name,
        "clients": clients,
        "source": source,
        "threads": threads,
        "gb_per_s": payload / min(seconds) / 1e9,
        "cpu_seconds": min(seconds),
        "wall_seconds": min(wall),
        "peak_mib": (peak_bytes() - idle) / MIB,
    }


def to_file(tensors: Mapping[str, Any], path: Path) -> Any:
    from fedpeft.adapters.delta import PackedFile, pack
    from fedpeft.adapters.manifest import Manifest

    manifest = Manifest("lora", "", "benchmark", 1, "", "", "fp32", 1, 1, ())
    path.write_bytes(pack(tensors, manifest))
    return PackedFile(path)


def run_copy_add(
    _: str, payloads: list[Any], weights: list[int], shapes: dict[str, tuple[int, ...]]
) -> Callable[[], Any]:
    import torch

    def once() -> None:
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

    return once


def run_fedpeft(
    name: str, payloads: list[Any], weights: list[int], shapes: dict[str, tuple[int, ...]]
) -> Callable[[], Any]:
    from fedpeft.aggregation.fixed_point import FixedPointAccumulator, plan
    from fedpeft.aggregation.linear_mean import FloatAccumulator

    spec = plan(shapes, 64.0, 1 << 24)
    readers = [HeldDelta(p) if isinstance(p, dict) else p for p in payloads]

    def once() -> None:
        accumulator = FixedPointAccumulator(spec) if name == "fixed" else FloatAccumulator(spec)
        for reader, weight in zip(readers, weights, strict=True):
            accumulator.fold(reader, weight)

    return once


run_fixed = run_float32 = run_fedpeft


def run_flower(
    _: str, payloads: list[Any], weights: list[int], shapes: dict[str, tuple[int, ...]]
) -> Callable[[], Any]:
    from flwr.app import ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    records = [
        RecordDict({"arrays": ArrayRecord(p), "metrics": MetricRecord({"num-examples": w})})
        for p, w in zip(payloads, weights, strict=True)
    ]
    return lambda: aggregate_arrayrecords(records, "num-examples")


def run_nvflare(
    name: str, payloads: list[Any], weights: list[int], shapes: dict[str, tuple[int, ...]]
) -> Callable[[], Any]:
    from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper

    data = [{n: t.numpy() for n, t in p.items()} for p in payloads] if name.endswith("numpy") else payloads

    def once() -> None:
        helper = WeightedAggregationHelper()
        for k, (update, weight) in enumerate(zip(data, weights, strict=True)):
            helper.add(update, weight, f"client-{k}", 1)
        helper.get_result()

    return once


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


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| contender | data in | clients | GB per CPU second | of copy-add | times Flower | peak MiB above payloads |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    rate = {(r["contender"], r["source"], r["clients"]): r["gb_per_s"] for r in rows if "gb_per_s" in r}
    for r in rows:
        head = f"| {COLUMNS[r['contender']]:<20} | {r['source']:<7} | {r['clients']:>7} |"
        if "skipped" in r:
            lines.append(f"{head} skipped: {r['skipped']} | | | |")
            continue
        ceiling, flower = (
            rate.get(("copy-add", r["source"], r["clients"])),
            rate.get(("flower", "memory", r["clients"])),
        )
        lines.append(
            f"{head} {r['gb_per_s']:>12.2f} | {r['gb_per_s'] / ceiling if ceiling else float('nan'):>11.2f} "
            f"| {r['gb_per_s'] / flower if flower else float('nan'):>12.1f} | {r['peak_mib']:>23.0f} |"
        )
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
    for package in ("flwr", "nvflare"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "separate folder or absent"
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
    parser.add_argument("--repeats", type=int, default=3)
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
            for name in COLUMNS if source == "memory" else FILE_CONTENDERS:
                rows.append(launch(args, name, clients, source))
                print(json.dumps(rows[-1]), file=sys.stderr)
    text, facts = table(rows), machine()
    print(text)
    result = {"machine": facts, "payload_mib": args.mib, "threads": args.threads, "repeats": args.repeats, "rows": rows}
    if args.report:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "aggregate.json").write_text(json.dumps(result, indent=1) + "\n")
        described = ", ".join(f"{key} {value}" for key, value in facts.items())
        command = f"python benchmarks/aggregate.py --report --threads {args.threads} --repeats {args.repeats}"
        heading = (
            f"# Folding deltas\n\n`{command}`\n\n{described}; {args.threads} thread(s); payload {args.mib} MiB of "
            f"float32 per client; best of {args.repeats} passes. The script's docstring says what is counted."
        )
        (RESULTS / "aggregate.md").write_text(f"{heading}\n\n{text}\n")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
