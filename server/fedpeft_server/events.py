"""What happened in a run, as it happens: the log behind ``fedpeft watch`` and the status page.

Events are numbered from 1 within a run and kept in a file of the run folder, so a watcher that reconnects goes on where
it was, also after a restart of the daemon. The ledger is the evidence; this log is for people.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fedpeft.federation.folder import append_line

BEGUN = frozenset({"run-queued", "run-started"})
FINAL = frozenset({"run-finished", "run-failed", "run-stopped"})


@dataclass(frozen=True)
class RunEvent:
    """One event.

    Attributes:
        seq: 1, 2, 3, ... within the run.
        at: seconds since the epoch, UTC.
        kind: a stable word, e.g. ``round-committed``.
        text: one line for people.
        metrics: numbers that belong to it.
    """

    seq: int
    at: float
    kind: str
    round: int = 0
    client: str = ""
    text: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)


class EventLog:
    """The events of one run. Thread-safe."""

    def __init__(self, path: Path):
        self._path = path
        self._changed = threading.Condition()
        self._events: list[RunEvent] = []
        if path.exists():
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.truncate(path, whole)  # the last line was cut off by a crash
            self._events = [event for line in data[:whole].splitlines() if (event := _parse(line))]
        self._saved = len(self._events)

    def add(
        self, kind: str, *, round: int = 0, client: str = "", text: str = "", metrics: Mapping[str, float] | None = None
    ) -> None:
        """Append an event and wake the watchers.

        A disk that is full does not stop the run for the sake of its log: what could not be written is kept in memory
        and written with a later event.
        """
        with self._changed:
            seq = self._events[-1].seq + 1 if self._events else 1
            event = RunEvent(seq, time.time(), kind, round, client, printable(text), dict(metrics or {}))
            self._events.append(event)
            try:
                append_line(self._path, *(json.dumps(asdict(e)) for e in self._events[self._saved :]))
                self._saved = len(self._events)
            except OSError:
                pass
            self._changed.notify_all()

    def once(self, kind: str, text: str) -> None:
        """Append an event unless the newest one says the same: for conditions that last."""
        last = self.last()
        if last is None or (last.kind, last.text) != (kind, text):
            self.add(kind, text=text)

    def last(self) -> RunEvent | None:
        with self._changed:
            return self._events[-1] if self._events else None

    def has(self, kind: str, round: int) -> bool:
        """Whether there is an event of this kind about this round."""
        with self._changed:
            return any(event.kind == kind and event.round == round for event in self._events)

    def follow(self, from_seq: int, hold_s: float = 1.0) -> Iterator[RunEvent | None]:
        """Events after ``from_seq``, live, until the run's final event; ``None`` at least every ``hold_s`` seconds."""
        at = from_seq
        while True:
            with self._changed:
                if not self._events or self._events[-1].seq <= at:
                    if self._ended():
                        return
                    self._changed.wait(hold_s)
                fresh = [event for event in self._events if event.seq > at]
            if not fresh:
                yield None
            for event in fresh:
                at = event.seq
                yield event

    def _ended(self) -> bool:
        """Whether the run is over: nothing after its end has taken it up again. Stragglers' events do not count."""
        for event in reversed(self._events):
            if event.kind in FINAL:
                return True
            if event.kind in BEGUN:
                return False
        return False


def printable(text: str, most: int = 2000) -> str:
    """``text`` on one line, without control characters and cut at ``most``: part of it may be a peer's words."""
    return "".join(c if c.isprintable() else " " for c in text[:most])


def _parse(line: bytes) -> RunEvent | None:
    """An event, or ``None`` for a line that cannot be read. Fields of a newer version are left out."""
    try:
        facts = json.loads(line)
        return RunEvent(**{key: value for key, value in facts.items() if key in RunEvent.__dataclass_fields__})
    except (ValueError, TypeError, AttributeError):
        return None
