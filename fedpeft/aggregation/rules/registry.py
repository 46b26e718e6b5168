"""Aggregation rules by name.

Importing this module, or a rule, does not import torch: the job schema asks for names, and the command line must answer
at once.

>>> get_rule("ffa").exact
True
>>> get_rule("fff")
Traceback (most recent call last):
    ...
fedpeft.errors.JobError: aggregation.rule: is no aggregation rule (got 'fff'); did you mean 'ffa'? There are: ffa, mean
"""

from __future__ import annotations

from fedpeft.aggregation.protocols import Rule
from fedpeft.aggregation.rules.ffa import FfaRule
from fedpeft.aggregation.rules.mean import MeanRule
from fedpeft.errors import JobError, nearest

_RULES: dict[str, Rule] = {rule.name: rule for rule in (FfaRule(), MeanRule())}


def rule_names() -> list[str]:
    """Every rule's name, sorted."""
    return sorted(_RULES)


def get_rule(name: str) -> Rule:
    """The rule called ``name``. Raises :class:`~fedpeft.errors.JobError` that lists what exists."""
    if name in _RULES:
        return _RULES[name]
    known = rule_names()
    guess = nearest(name, known)
    hint = (f"did you mean {guess!r}? " if guess else "") + f"There are: {', '.join(known)}"
    raise JobError("is no aggregation rule", field="aggregation.rule", value=name, hint=hint)
