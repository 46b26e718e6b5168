"""``fedpeft simulate`` and ``fedpeft compare``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedpeft.cli.tables import bytes_line, err, out, score_table, size
from fedpeft.errors import FedPeftError
from fedpeft.job import load_job

ENGINES = ("auto", "in-process", "processes")


def run_simulation(path: Path, directory: Path, overrides: list[str], engine: str, as_json: bool) -> None:
    if engine not in ENGINES:
        raise FedPeftError(f"unknown engine; known: {', '.join(ENGINES)}", field="--engine", value=engine)
    job = load_job(path, overrides)
    from fedpeft_simulations.engine import simulate

    with err.status("loading base model and data"):
        from transformers.utils import logging

        logging.disable_progress_bar()
    with _SimulationProgress(job.aggregation.rounds) as progress:
        result = simulate(job, directory, engine=engine, watch=progress)
    if as_json:
        print(json.dumps({"directory": str(directory), **result.summary}, indent=2, sort_keys=True))
        return
    out.print(score_table(result.summary))
    out.print(bytes_line(result.summary))
    out.print("privacy: none (this run carries no formal privacy guarantee)")
    out.print(f"results: {directory}/  (adapter in {directory / 'adapter'})", soft_wrap=True)


def compare_runs(directories: list[Path], as_json: bool) -> None:
    """Mean scores and bytes of several run folders."""
    summaries = {str(d): _read_summary(d) for d in directories}
    if as_json:
        print(json.dumps(summaries, indent=2, sort_keys=True))
        return
    table = Table(title="mean over clients, held-out", title_justify="left")
    table.add_column("run")
    for column in ("base", "local", "federated", "pooled"):
        table.add_column(column, justify="right")
    table.add_column("up / client / round", justify="right")
    for name, summary in summaries.items():
        mean = summary["mean"]

        def cell(column: str, mean: Mapping[str, Any] = mean) -> str:
            if column not in mean:
                return "-"
            accuracy = mean[column].get("accuracy")
            return f"{mean[column]['loss']:.4f}" + (f" / {accuracy:.3f}" if accuracy is not None else "")

        table.add_row(
            name,
            *[cell(c) for c in ("base", "local", "federated", "pooled")],
            size(summary["bytes"]["up_per_client_round"]),
        )
    out.print(table)


def _read_summary(directory: Path) -> dict[str, Any]:
    try:
        return json.loads((directory / "summary.json").read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise FedPeftError(
            "holds no finished run", field=str(directory), hint="give a folder that `fedpeft simulate --out` wrote"
        ) from None


class _SimulationProgress:
    """Progress bars on standard error, fed by the simulator's events."""

    def __init__(self, rounds: int):
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=err,
            disable=not err.is_terminal,
        )
        self.rounds = self.bars.add_task("rounds", total=rounds, note="")
        self.clients = self.bars.add_task("clients", total=None, note="loading")
        self.count = 0

    def __enter__(self) -> _SimulationProgress:
        self.bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bars.stop()

    def __call__(self, event: str, facts: Mapping[str, Any]) -> None:
        bars = self.bars
        if event == "start":
            self.count = len(facts["clients"])
            bars.reset(self.clients, total=self.count, description="evaluating", note="before training")
        elif event == "round":
            bars.reset(
                self.clients, total=len(facts["selected"]), description=f"round {facts['round']}", note="training"
            )
        elif event == "committed":
            loss = facts.get("train_loss")
            bars.update(
                self.rounds, completed=facts["round"], note=f"train loss {loss:.4f}" if loss is not None else ""
            )
            bars.reset(self.clients, total=self.count, description="evaluating", note="held-out data")
        elif event == "baseline":
            if not bars.tasks[self.clients].description.startswith("baselines"):
                bars.reset(self.clients, total=self.count + 1, description="baselines", note="local only, pooled")
            bars.advance(self.clients)
        elif event in ("client", "evaluate"):
            bars.advance(self.clients)
