"""The data owner's word: may this task run here?

A decline is a sentence that names the limit; it is shown at the server, so it is made of the job's own words and of
the limits alone. Whether a base model is a path is told from its spelling and never from this machine's disk: a server
that asks for one path after the other learns nothing about which of them exist.

The count of rounds per day is of pieces of training, not of attempts. It is on disk before the training begins, so an
agent that was killed in it does its round again without paying twice:

>>> import tempfile
>>> folder = tempfile.TemporaryDirectory()
>>> policy = Policy(Limits(max_rounds_per_day=1), Path(folder.name) / "rounds.json")
>>> policy.count_round("run-1 round 1")
>>> policy.round_objection("run-1 round 1") is None
True
>>> policy.round_objection("run-1 round 2")
'this client has trained its max_rounds_per_day 1 today'
>>> folder.cleanup()
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Container
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path

from fedpeft.job.schema import Job
from fedpeft_client.config import Limits

log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_REMEMBERED = timedelta(days=7)  # for how long a round that was begun may be repeated without counting again


class Policy:
    """Checks tasks against the limits.

    Args:
        limits: from ``client.toml``.
        path: file that keeps which training was begun on which UTC day.
        base_models: the names of base models that ``client.toml`` maps to folders.
    """

    def __init__(self, limits: Limits, path: Path, base_models: Container[str] = ()):
        self.limits, self._path, self._base_models = limits, path, base_models

    def objection(self, job: Job) -> str | None:
        """Why every task of ``job`` is declined, or ``None``."""
        limits, base = self.limits, job.model.base
        if not any(fnmatchcase(job.name, p) for p in limits.allowed_jobs):
            return f"job {job.name!r} is not among this client's allowed_jobs"
        if not any(fnmatchcase(base, p) for p in limits.allowed_bases):
            return f"base model {base!r} is not among this client's allowed_bases"
        if not (base in self._base_models or base.startswith("builtin:") or _HUB_ID.fullmatch(base)):
            return "base model is a path; map it in [base_models]"
        if job.adapter.rank > limits.max_rank:
            return f"rank {job.adapter.rank} is above this client's max_rank {limits.max_rank}"
        return None

    def round_objection(self, work: str) -> str | None:
        """Why the training named ``work`` is declined, or ``None``; what was begun before may always be repeated."""
        days = self._days()
        if any(work in begun for begun in days.values()):
            return None
        if len(days.get(_today(), ())) >= self.limits.max_rounds_per_day:
            return f"this client has trained its max_rounds_per_day {self.limits.max_rounds_per_day} today"
        return None

    def rounds_today(self) -> int:
        """Different pieces of training that were begun this UTC day."""
        return len(self._days().get(_today(), ()))

    def count_round(self, work: str) -> None:
        """Record durably, before it begins, that the training named ``work`` is done; a repeat changes nothing.

        Raises:
            OSError: the record cannot be kept; the training must not begin then.
        """
        days = self._days()
        if any(work in begun for begun in days.values()):
            return
        days.setdefault(_today(), []).append(work)
        oldest = (datetime.now(UTC) - _REMEMBERED).strftime("%Y-%m-%d")
        folder = self._path.parent
        folder.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump({day: begun for day, begun in days.items() if day >= oldest}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)
        entry = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(entry)  # the new name, too, is there after a power cut
        finally:
            os.close(entry)

    def _days(self) -> dict[str, list[str]]:
        """UTC day -> what was begun on it. A file that says something else counts as empty, with a warning."""
        try:
            days = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError):
            days = None
        if not isinstance(days, dict) or not all(_is_names(begun) for begun in days.values()):
            log.warning("%s does not hold the rounds of each day; counting begins anew", self._path)
            return {}
        return days


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")
