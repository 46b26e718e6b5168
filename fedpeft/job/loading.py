"""Reading a job file: TOML to :class:`~fedpeft.job.schema.Job`, with one-line errors.

>>> parse_job('name = "x"\\n[modle]\\nbase = "b"')
Traceback (most recent call last):
    ...
fedpeft.errors.JobError: modle: unknown key; did you mean 'model'?
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fedpeft.errors import JobError, nearest
from fedpeft.job.schema import Job


def load_job(path: Path, overrides: Iterable[str] = ()) -> Job:
    """Read a job file.

    Args:
        path: the TOML file.
        overrides: ``"section.key=value"`` strings; the value is TOML, or a bare word taken as a string.

    Raises:
        JobError: the file is missing, is not TOML, or does not follow the schema.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise JobError("no such job file", field=str(path), hint="see simulations/jobs/ for examples") from None
    except IsADirectoryError:
        raise JobError("is a folder, not a job file", field=str(path), hint="name the TOML file in it") from None
    except UnicodeDecodeError:
        raise JobError("is not a text file", field=str(path), hint="a job file is UTF-8 encoded TOML") from None
    except OSError as error:
        raise JobError(f"cannot be read: {error.strerror}", field=str(path)) from None
    return parse_job(text, overrides, name=str(path))


def parse_job(text: str, overrides: Iterable[str] = (), *, name: str = "job file") -> Job:
    """The job in ``text``. Raises :class:`JobError` like :func:`load_job`."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise JobError(f"is not valid TOML: {error}", field=name, hint="see https://toml.io for the syntax") from None
    for override in overrides:
        _apply(tree, override)
    try:
        return Job.model_validate(tree)
    except ValidationError as error:
        raise _as_job_error(error.errors(include_url=False)) from None


def dump_job(job: Job) -> str:
    """The job as TOML with every default written out; the same job gives the same text."""
    return tomli_w.dumps(_without_none(job.model_dump()))


def job_digest(job: Job) -> str:
    """SHA-256 over :func:`dump_job`."""
    return hashlib.sha256(dump_job(job).encode()).hexdigest()


def job_schema() -> dict[str, Any]:
    """The JSON Schema of the job file, with the names that the registries of this version know."""
    from fedpeft.adapters.kinds.registry import kind_names
    from fedpeft.aggregation.rules.registry import rule_names

    schema = Job.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["$defs"]["AdapterSection"]["properties"]["kind"]["enum"] = kind_names()
    schema["$defs"]["AggregationSection"]["properties"]["rule"]["enum"] = rule_names()
    return schema


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return value


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise JobError("is not of the form section.key=value", field="--set", value=override)
    *sections, last = key.strip().split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise JobError(f"{section} is not a section", field="--set", value=override)
    try:
        node[last] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        node[last] = value.strip()


def _as_job_error(errors: list[ErrorDetails]) -> JobError:
    """The first failure as one sentence; unknown keys first, since they usually explain a missing one."""
    errors = sorted(errors, key=lambda e: e["type"] != "extra_forbidden")
    first, more = errors[0], len(errors) - 1
    where = ".".join(str(part) for part in first["loc"] if not str(part).startswith("list["))
    tail = f" (and {more} more problem{'s' if more > 1 else ''})" if more else ""
    if first["type"] == "extra_forbidden":
        guess = nearest(str(first["loc"][-1]), _keys_at(first["loc"][:-1]))
        keys = ", ".join(_keys_at(first["loc"][:-1]))
        return JobError(
            "unknown key", field=where, hint=(f"did you mean {guess!r}?" if guess else f"known: {keys}") + tail
        )
    if first["type"] == "missing":
        return JobError("is required", field=where, hint=f"add it to the job file{tail}")
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    value = first["input"] if isinstance(first["input"], str | int | float | bool) else None
    if first["type"] in ("literal_error", "too_long") and where.split(".")[0] in ("privacy", "audit"):
        message = f"{message} (other values are not available in this version)"
    return JobError(message + tail, field=where or None, value=value if where else None)


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """Known keys of the section at ``location``."""
    model: type[BaseModel] = Job
    for part in location:
        annotation = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
