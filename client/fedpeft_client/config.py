"""``client.toml``: where a data owner's data is, and what may be done with it.

The file belongs to the data owner. The server never sees it and cannot change it; a task outside its limits is
declined by the agent, and the server is told which limit.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedpeft.errors import FedPeftError, nearest

TEMPLATE = """\
# client.toml: this machine's data and limits. Paths are relative to this file.

# Training data: a folder of JSONL, Parquet, text or images with train.* and heldout.*, or "builtin:stdlib/asyncio".
data = "data"

# "auto" takes a CUDA device where there is one.
device = "auto"

# Where caches and the count of rounds are kept. Default: NAME.state beside this file.
# state = "agent-state"

[limits]
allowed_jobs = ["*"]            # patterns for the job's name
allowed_bases = ["*"]           # patterns for model.base
max_rank = 64                   # largest adapter rank
max_rounds_per_day = 10000      # training rounds in one UTC day

# Where this machine keeps a base model that jobs call by another name. A job that names a folder is declined unless
# that name is listed here: the server cannot make the agent look at places of its choice.
[base_models]
# "org/model" = "/models/org-model"
"""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(_Table):
    """What the data owner allows."""

    allowed_jobs: list[str] = ["*"]
    allowed_bases: list[str] = ["*"]
    max_rank: int = Field(64, ge=1)
    max_rounds_per_day: int = Field(10_000, ge=0)

    def words(self) -> dict[str, str]:
        """The limits as the operator sees them."""
        return {
            "jobs": " ".join(self.allowed_jobs),
            "bases": " ".join(self.allowed_bases),
            "max_rank": str(self.max_rank),
            "max_rounds_per_day": str(self.max_rounds_per_day),
        }


class ClientConfig(_Table):
    """A data owner's configuration.

    Attributes:
        data: folder, or ``builtin:SOURCE/CLIENT``.
        device: ``auto``, ``cpu`` or a torch device.
        state: folder for caches and counts.
        base_models: job's name of a base model -> local folder.
    """

    data: str
    device: str = "auto"
    state: Path = Path()
    limits: Limits = Limits()
    base_models: dict[str, str] = {}

    def resolve_device(self) -> str:
        if self.device != "auto":
            return self.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"


def load_client_config(path: Path, name: str, data: str | None = None) -> ClientConfig:
    """Read ``client.toml``; relative paths become absolute.

    Args:
        path: the file; it may be missing if ``data`` is given, and every limit then has its default.
        name: the client's name, for the default state folder.
        data: overrides the file's ``data``; relative to the working directory.

    Raises:
        FedPeftError: the file is missing or wrong.
    """
    try:
        table = {} if data is not None and not path.exists() else tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FedPeftError(
            "no such file", field=str(path), hint="write one (fedpeft client config > client.toml) or give --data"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FedPeftError(f"is not valid TOML: {error}", field=str(path)) from None
    except OSError as error:
        raise FedPeftError(f"cannot be read: {error.strerror}", field=str(path)) from None
    if data is not None:
        table["data"] = data if data.startswith("builtin:") else str(Path(data).expanduser().absolute())
    table.setdefault("state", f"{name}.state")
    try:
        config = ClientConfig.model_validate(table)
    except ValidationError as error:
        # An unknown key first: it usually explains one that is missing.
        first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
        where = ".".join(str(part) for part in first["loc"])
        known = Limits.model_fields if where.startswith("limits.") else ClientConfig.model_fields
        guess = nearest(str(first["loc"][-1]), known) if first["type"] == "extra_forbidden" else None
        message = "unknown key" if first["type"] == "extra_forbidden" else first["msg"].lower()
        raise FedPeftError(
            message, field=f"{path.name}: {where}", hint=f"did you mean {guess!r}?" if guess else None
        ) from None
    folder = path.absolute().parent
    data = config.data if config.data.startswith("builtin:") else str(folder / Path(config.data).expanduser())
    bases = {name: str(folder / Path(local).expanduser()) for name, local in config.base_models.items()}
    state = folder / config.state.expanduser()
    return config.model_copy(update={"data": data, "state": state, "base_models": bases})
