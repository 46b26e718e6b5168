"""``fedpeft submit``, ``status``, ``watch``, ``stop``, ``fetch`` and ``verify``."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from rich.markup import escape
from rich.table import Table

from fedpeft.cli.tables import bytes_line, err, out, score_table, size
from fedpeft.errors import FedPeftError, IntegrityError
from fedpeft.job import load_job
from fedpeft.job.loading import dump_job

T = TypeVar("T")
_CALL_S = 60.0
_START_S = 20.0  # how long a command waits for a daemon that does not listen yet


def submit_job(path: Path, bundle: Path, overrides: list[str], watch: bool, as_json: bool) -> None:
    job = load_job(path, overrides)
    from fedpeft_proto.v1 import coordinator_pb2 as pb

    with _coordinator(bundle) as (stub, ask), err.status("the daemon checks the job against the base model"):
        # No deadline: the daemon may have to load, or download, the base model.
        reply = ask(lambda: stub.Submit(pb.SubmitRequest(job_toml=dump_job(job))))
    print(json.dumps({"run_id": reply.run_id}) if as_json else reply.run_id, flush=True)
    if watch:
        watch_run(reply.run_id, bundle, as_json)


def show_status(run: str | None, bundle: Path | None, as_json: bool) -> None:
    if run is not None and Path(run).is_dir():
        from fedpeft.federation.status import open_run_folder, run_status

        with open_run_folder(Path(run)) as store:
            runs = [run_status(store, row.id) for row in store.runs()]
            if not runs:
                raise FedPeftError("holds no run", field=run, hint="give a folder that simulate or fetch wrote")
    else:
        if bundle is None:
            raise FedPeftError(
                "is neither a run folder nor is an operator's bundle given",
                field="RUN",
                value=run,
                hint="name a run folder, or add --bundle operator.toml",
            )
        from fedpeft_proto.v1 import coordinator_pb2 as pb

        with _coordinator(bundle) as (stub, ask):
            request = pb.StatusRequest(run_id=run) if run is not None else pb.StatusRequest()
            runs = json.loads(ask(lambda: stub.Status(request, timeout=_CALL_S)).json)
    if as_json:
        print(json.dumps(runs[0] if run is not None else runs, indent=2, sort_keys=True))
        return
    if run is None:
        _print_runs(runs)
    else:
        _print_run(runs[0])


def watch_run(run: str, bundle: Path, as_json: bool) -> None:
    from fedpeft_proto.v1 import coordinator_pb2 as pb

    failed = False
    with _coordinator(bundle) as (stub, ask):
        events = stub.Watch(pb.WatchRequest(run_id=run))
        for event in ask(lambda: _each(events, ask)):
            if event.kind in ("run-failed", "run-started"):
                failed = event.kind == "run-failed"
            if as_json:
                facts = {
                    "seq": event.seq,
                    "at": event.at,
                    "kind": event.kind,
                    "round": event.round,
                    "client": event.client,
                }
                print(json.dumps({**facts, "text": event.text, "metrics": dict(event.metrics)}), flush=True)
            else:
                line = f"[dim]{event.seq:4d}[/dim] {event.kind:16s} {escape(event.text)}"
                out.print(line, highlight=False, soft_wrap=True)
    if failed:
        sys.exit(1)


def stop_run(run: str, bundle: Path) -> None:
    from fedpeft_proto.v1 import coordinator_pb2 as pb

    with _coordinator(bundle) as (stub, ask):
        state = ask(lambda: stub.Stop(pb.StopRequest(run_id=run), timeout=_CALL_S)).state
    out.print(f"{run}: {state}")


def resume_run(run: str, bundle: Path) -> None:
    from fedpeft_proto.v1 import coordinator_pb2 as pb

    with _coordinator(bundle) as (stub, ask):
        state = ask(lambda: stub.Resume(pb.ResumeRequest(run_id=run), timeout=_CALL_S)).state
    out.print(f"{run}: {state}")


def fetch_run(run: str, bundle: Path, directory: Path | None) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from fedpeft_proto.v1 import coordinator_pb2 as pb

    target = directory or Path(run)
    with (
        _coordinator(bundle) as (stub, ask),
        Progress(
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=err, disable=not err.is_terminal
        ) as bars,
    ):
        bar, file, path = bars.add_task("fetching"), None, target
        for chunk in ask(lambda: _each(stub.Fetch(pb.FetchRequest(run_id=run)), ask)):
            if zlib.crc32(chunk.data) != chunk.crc32:
                raise IntegrityError("a chunk was damaged on the way", field=str(path), hint="fetch again")
            if chunk.path:
                if file:
                    file.close()
                path = _inside(target, chunk.path)
                path.parent.mkdir(parents=True, exist_ok=True)
                file = open(path, "wb")  # noqa: SIM115 - closed when the next file begins
                bars.reset(bar, description=chunk.path, total=chunk.total_bytes)
            assert file is not None
            file.write(chunk.data)
            bars.advance(bar, len(chunk.data))
        if file:
            file.close()
    out.print(f"results: {target}/  (adapter in {target / 'adapter'})", soft_wrap=True)


def verify_run(directory: Path, as_json: bool) -> None:
    """Ledger chain, ledger against tables, checkpoints, adapter and deltas."""
    from fedpeft.federation.verify import verify_folder

    found = verify_folder(directory)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    checked = ", ".join(f"{count} {kind}" for kind, count in found.checked.items() if count) or "no files"
    out.print(
        f"{found.run_id}: {found.ledger_entries} ledger entries verify; {checked} agree with them", soft_wrap=True
    )
    if absent := ", ".join(f"{count} {kind}" for kind, count in found.not_checked.items() if count):
        out.print(f"not checked, because not in this folder: {absent}", soft_wrap=True)
    out.print(f"ledger head {found.ledger_head}", soft_wrap=True)


@contextmanager
def _coordinator(bundle_path: Path) -> Iterator[tuple[Any, Callable[[Callable[[], T]], T]]]:
    """A stub of the Coordinator, and a caller that turns gRPC errors into one line."""
    import grpc

    from fedpeft.bundle import load_bundle
    from fedpeft_client.bundle import open_channel, why_refused
    from fedpeft_proto.v1 import coordinator_pb2_grpc as rpc

    bundle = load_bundle(bundle_path)
    channel, endpoint = open_channel(bundle)
    _await_daemon(channel, endpoint, lambda: why_refused(bundle, endpoint))

    def ask(call: Callable[[], T]) -> T:
        try:
            return call()
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise why_refused(bundle, endpoint) or _no_daemon(endpoint) from None
            raise FedPeftError(error.details() or str(error.code())) from None

    try:
        yield rpc.CoordinatorStub(channel), ask
    finally:
        channel.close()


def _await_daemon(channel: Any, endpoint: str, refused: Callable[[], FedPeftError | None]) -> None:
    """Give a daemon that is just starting the time to listen."""
    import grpc

    ready = grpc.channel_ready_future(channel)
    for patience_s, is_last in ((2.0, False), (_START_S, True)):
        try:
            ready.result(timeout=patience_s)
            return
        except grpc.FutureTimeoutError:
            if (reason := refused()) is not None:
                raise reason from None
            if is_last:
                raise _no_daemon(endpoint) from None
            err.print(f"waiting for the daemon at {endpoint}", style="dim")


def _no_daemon(endpoint: str) -> FedPeftError:
    return FedPeftError(f"no daemon answers at {endpoint}", hint="start it: fedpeft server up DIR")


def _each(stream: Any, ask: Callable[..., Any]) -> Iterator[Any]:
    iterator, end = iter(stream), object()
    while (item := ask(lambda: next(iterator, end))) is not end:
        yield item


def _inside(root: Path, name: str) -> Path:
    """``root / name``, unless a hostile server names a path outside."""
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise FedPeftError("the server named a file outside the folder", field="path", value=name)
    return path


def _print_runs(runs: list[dict[str, Any]]) -> None:
    table = Table()
    for column in ("run", "state", "round", "last event"):
        table.add_column(column)
    for run in runs:
        table.add_row(
            run["run_id"], run["state"], f"{run['round']}/{run['rounds_total']}", escape(run.get("last_event", ""))
        )
    out.print(table if runs else "no runs")


def _print_run(run: dict[str, Any]) -> None:
    out.print(f"{run['run_id']}: {run['state']}, round {run['round']} of {run['rounds_total']}", soft_wrap=True)
    if run["error"]:
        out.print(f"error: {escape(run['error'])}", soft_wrap=True)
    table = Table()
    for column in ("client", "link", "state", "rounds", "refused", "sent", "detail"):
        table.add_column(column, justify="right" if column in ("rounds", "refused", "sent") else "left")
    for c in run["clients"]:
        link = {True: "online", False: "offline"}.get(c.get("online"), "-")
        detail = c.get("detail") or c.get("last_refusal", {}).get("reason", "")
        table.add_row(
            c["name"], link, c.get("state", ""), f"{c['delivered']}/{c['selected']}", str(c["refused"]),
            size(c["bytes_up"]), escape(detail),
        )  # fmt: skip
    out.print(table)
    if run.get("summary") and run["summary"].get("clients"):
        out.print(score_table(run["summary"]))
        out.print(bytes_line(run["summary"]))
    out.print(f"privacy: {run['privacy']}", soft_wrap=True)
