"""The run folder: what a person or a script finds when a run is over.

job.toml          the job as resolved, every default written out
metrics.jsonl     one JSON object per event (round, evaluation), in order
adapter/          the newest committed adapter as a stock PEFT folder
checkpoints/      the committed global state after every round
summary.json      the final table: base / local / federated / pooled per client
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.adapters.delta import PackedFile
from fedpeft.adapters.peft_folder import write_peft_folder
from fedpeft.errors import FedPeftError
from fedpeft.job.loading import dump_job

if TYPE_CHECKING:
    from fedpeft.federation.run import FederatedRun
    from fedpeft.job.schema import Job


class RunFolder:
    """The files of one run. Every write leaves complete files, whenever the process dies."""

    def __init__(self, root: Path):
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FedPeftError(f"cannot be a run folder: {error.strerror}", field=str(root)) from None

    def write_job(self, job: Job) -> None:
        self._replace("job.toml", dump_job(job))

    def log(self, event: str, **facts: Any) -> None:
        """Append one event to ``metrics.jsonl``."""
        append_line(self.root / "metrics.jsonl", json.dumps({"event": event, **facts}, sort_keys=True))

    def write_state(self, run: FederatedRun, round_number: int) -> None:
        """Publish the newest committed state: as a checkpoint and as a PEFT folder."""
        blob = run.store.blobs.path(run.state_digest)
        checkpoint = self.root / "checkpoints" / f"round-{round_number:04d}.safetensors"
        checkpoint.parent.mkdir(exist_ok=True)
        if not checkpoint.exists():
            try:
                os.link(blob, checkpoint)
            except OSError:  # another file system, or one without hard links
                temporary = checkpoint.with_suffix(".tmp")
                shutil.copyfile(blob, temporary)
                os.replace(temporary, checkpoint)
        write_peft_folder(self.root / "adapter", run.spec, PackedFile(blob).state(), run.job.seed)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self._replace("summary.json", json.dumps(summary, indent=2, sort_keys=True) + "\n")

    def _replace(self, name: str, text: str) -> None:
        temporary = self.root / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.root / name)


def append_line(path: Path, *lines: str) -> None:
    """Append lines to a text file, all of them or, on a full disk, none.

    Raises:
        OSError: the file is as it was before.
    """
    data = "".join(line + "\n" for line in lines).encode()
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(data) != len(data):  # a disk that fills up takes a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(before)
            raise
