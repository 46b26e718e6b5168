"""Tables and sizes as people read them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

# Into a file or a pipe rich would assume 80 columns and break the tables.
out = Console(width=None if sys.stdout.isatty() else 120)
err = Console(stderr=True)


def size(count: float) -> str:
    """Bytes with a decimal unit: ``1.2 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def score_table(summary: Mapping[str, Any]) -> Table:
    """The final table: one row per client, one column per model, held-out loss (and accuracy)."""
    with_accuracy = "accuracy" in summary["mean"]["base"]
    columns = summary["columns"]
    table = Table(
        title=f"held-out loss{' / accuracy' if with_accuracy else ''} ({summary['run_id']})", title_justify="left"
    )
    table.add_column("client")
    table.add_column("examples", justify="right")
    for column in columns:
        table.add_column({"local": "local only"}.get(column, column), justify="right", no_wrap=True)

    def cell(scores: Mapping[str, float]) -> str:
        return f"{scores['loss']:.4f}" + (f" / {scores['accuracy']:.3f}" if with_accuracy else "")

    for row in summary["clients"]:
        table.add_row(row["client"], str(row["train_examples"]), *[cell(row[c]) for c in columns])
    table.add_section()
    table.add_row("mean", "", *[cell(summary["mean"][c]) for c in columns], style="bold")
    return table


def bytes_line(summary: Mapping[str, Any]) -> str:
    """What travelled, in one line."""
    sent = summary["bytes"]
    return (
        f"sent per client and round: {size(sent['up_per_client_round'])} up, "
        f"{size(sent['down_per_client_round'])} down; "
        f"whole run: {size(sent['up_total'])} up, {size(sent['down_total'])} down"
    )
