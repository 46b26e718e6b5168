"""The adapter kinds of this version. A new kind is one file beside this one and one line here."""

from __future__ import annotations

from fedpeft.adapters.kinds.ffa_lora import FfaLora
from fedpeft.adapters.kinds.lora import Lora
from fedpeft.adapters.kinds.protocol import AdapterKind
from fedpeft.errors import JobError, nearest

KINDS: dict[str, AdapterKind] = {kind.name: kind for kind in (Lora(), FfaLora())}


def kind_names() -> list[str]:
    return sorted(KINDS)


def get_kind(name: str) -> AdapterKind:
    """The kind called ``name``. Raises :class:`JobError` that lists the known ones."""
    if name not in KINDS:
        guess = nearest(name, KINDS)
        hint = f"did you mean {guess!r}?" if guess else f"known: {', '.join(kind_names())}"
        raise JobError("unknown adapter kind", field="adapter.kind", value=name, hint=hint)
    return KINDS[name]
