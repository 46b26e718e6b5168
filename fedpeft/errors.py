"""One error type for everything that a user or a peer can get wrong.

An error names the *field* that is wrong, the *value* that was given and the *way out*. The command line prints it on
one line and exits with :attr:`FedPeftError.exit_code`; the daemon returns it to the peer and goes on serving. A
traceback is only ever shown for a defect of our own.

>>> print(FedPeftError("must be at least 1", field="adapter.rank", value=0, hint="choose a rank from 1 to 256"))
adapter.rank: must be at least 1 (got 0); choose a rank from 1 to 256
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FedPeftError(Exception):
    """A mistake that its maker can correct.

    Args:
        message: what is wrong, as a clause without a full stop.
        field: the dotted name of the job key, option or file that is wrong.
        value: what was given there.
        hint: what to do instead.
    """

    exit_code = 2

    def __init__(self, message: str, *, field: str | None = None, value: object = None, hint: str | None = None):
        self.message, self.field, self.value, self.hint = message, field, value, hint
        super().__init__(message)

    def __str__(self) -> str:
        text = f"{self.field}: {self.message}" if self.field else self.message
        if self.value is not None:
            text += f" (got {self.value!r})"
        if self.hint:
            text += f"; {self.hint}"
        return text


class JobError(FedPeftError):
    """The job file is wrong."""


class DeltaRefused(FedPeftError):
    """An incoming delta does not match what the round expects; the sender is told why and the round goes on.

    ``code`` is a short stable word for metrics and the ledger, e.g. ``"shape"`` or ``"not-finite"``.
    """

    def __init__(self, code: str, message: str, **details: object):
        super().__init__(message, **details)  # type: ignore[arg-type]
        self.code = code

    def __reduce__(self) -> tuple[type, tuple[str, str], dict[str, object]]:
        """Pickling by :mod:`multiprocessing` calls the class with its arguments, of which ``code`` is one."""
        return type(self), (self.code, self.message), self.__dict__


class IntegrityError(FedPeftError):
    """Stored bytes do not match their recorded hash."""


class RunFailed(FedPeftError):
    """A run ended without its result, e.g. because too few clients delivered; what was committed is kept."""

    exit_code = 1


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that a misspelt ``word`` most likely meant, or ``None``.

    >>> nearest("learnin_rate", ["learning_rate", "local_steps"])
    'learning_rate'
    """
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return found[0] if found else None
