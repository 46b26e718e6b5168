"""The data owner's word: may this task run here?

A decline is a sentence that names the limit; it is shown at the server. The count of rounds per day survives restarts.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path

from fedpeft.job.schema import Job
from fedpeft_client.config import Limits


class Policy:
    """Checks tasks against the limits.

    Args:
        limits: from ``client.toml``.
        path: file that keeps the count of training rounds per UTC day.
    """

    def __init__(self, limits: Limits, path: Path):
        self.limits, self._path = limits, path

    def objection(self, job: Job, *, trains: bool) -> str | None:
        """Why a task is declined, or ``None``."""
        limits = self.limits
        if not any(fnmatchcase(job.name, p) for p in limits.allowed_jobs):
            return f"job {job.name!r} is not among this client's allowed_jobs"
        if not any(fnmatchcase(job.model.base, p) for p in limits.allowed_bases):
            return f"base model {job.model.base!r} is not among this client's allowed_bases"
        if job.adapter.rank > limits.max_rank:
            return f"rank {job.adapter.rank} is above this client's max_rank {limits.max_rank}"
        if trains and self.rounds_today() >= limits.max_rounds_per_day:
            return f"this client has trained its max_rounds_per_day {limits.max_rounds_per_day} today"
        return None

    def rounds_today(self) -> int:
        try:
            counts = json.loads(self._path.read_text())
        except (FileNotFoundError, ValueError):
            return 0
        return int(counts.get(_today(), 0))

    def count_round(self) -> None:
        """Record one more training round, durably, before it begins."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        with open(temporary, "w") as file:
            json.dump({_today(): self.rounds_today() + 1}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)


def _today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")
