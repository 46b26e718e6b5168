"""Write docs/job-file.md and docs/job.schema.json from the schema; ``--check`` exits 1 if they are out of date."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from fedpeft.job import job_schema
from fedpeft.job.schema import Job

DOCS = Path(__file__).parent
INTRO = """# The job file

Everything about a run, in one TOML file that simulation and daemon read alike. Unknown keys are errors that suggest
the nearest key; `fedpeft job check FILE` checks a file against the base model too, and `--set section.key=value`
overrides a key on the command line. Examples are in `simulations/jobs/`. This page and
[job.schema.json](job.schema.json) are written by `python docs/generate.py`.
"""


def pages() -> dict[str, str]:
    """File name -> content."""
    text = [INTRO, "## Top level\n", _table({n: f for n, f in Job.model_fields.items() if not _section(f)}, [])]
    for name, field in Job.model_fields.items():
        if section := _section(field):
            text += [
                f"## `[{name}]`\n",
                (section.__doc__ or "").strip().replace("``", "`") + "\n",
                _table(section.model_fields, [name]),
            ]
    return {"job-file.md": "\n".join(text), "job.schema.json": json.dumps(job_schema(), indent=2) + "\n"}


def _section(field: Any) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _table(fields: dict[str, Any], path: list[str]) -> str:
    properties = job_schema()["$defs"]
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        if nested := _section(field):
            for key, inner in nested.model_fields.items():
                rows.append(_row(f"{name}.{key}", inner, properties[nested.__name__]["properties"][key]))
            continue
        owner = Job.model_fields[path[0]].annotation.__name__ if path else None  # type: ignore[union-attr]
        shown = properties[owner]["properties"][name] if owner else job_schema()["properties"][name]
        rows.append(_row(name, field, shown))
    return "\n".join(rows) + "\n"


def _row(name: str, field: Any, shown: dict[str, Any]) -> str:
    default = "required" if field.is_required() else ""
    if not default:
        value = field.default if field.default is not PydanticUndefined else field.default_factory()
        default = "" if value is None else f"`{json.dumps(value)}`"
    return f"| `{name}` | {_values(shown)} | {default} | {field.description or ''} |"


def _values(shown: dict[str, Any]) -> str:
    if "enum" in shown:
        return ", ".join(f"`{v}`" for v in shown["enum"])
    if "const" in shown:
        return f"`{json.dumps(shown['const'])}`"
    if "anyOf" in shown:
        return " or ".join(_values(s) for s in shown["anyOf"] if s.get("type") != "null")
    if shown.get("type") == "array":
        items = _values(shown["items"]) if shown.get("items") else "values"
        return f"list of {items}" if shown.get("maxItems") != 0 else "empty list"
    limits = [
        f"{sign} {shown[key]:g}"
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if key in shown
    ]
    return " ".join(
        [{"string": "text", "boolean": "true / false"}.get(shown.get("type", ""), shown.get("type", "")), *limits]
    )


def main() -> int:
    stale = [name for name, text in pages().items() if not _same(DOCS / name, text)]
    if "--check" in sys.argv:
        print("\n".join(f"docs/{name} is out of date: run python docs/generate.py" for name in stale))
        return 1 if stale else 0
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
    return 0


def _same(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
